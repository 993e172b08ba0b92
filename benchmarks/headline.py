"""Headline: the paper's comparison on this machine, FastVLM-0.5B against LLaVA-OneVision-0.5B.

The paper (arXiv 2412.13303) reports 85 times less time to first token: one picture at 1024 pixels, 256 visual tokens,
against 1152 pixels in 10 tiles, 7,290 visual tokens, with the same 0.5B decoder. Here both shapes with random weights
(speed does not depend on the values), timed as the paper defines it: vision encoder, projector and the decoder over
the image's tokens alone. No picture is decoded or resized and no words are read.

  ours             FastVLM-0.5B through this package
  fastvlm-torch    FastVLM-0.5B through transformers: the framework's share of the difference
  onevision-torch  LLaVA-OneVision-0.5B's shape through transformers
  onevision-mlx-vlm   the same through mlx-vlm: MLX on both sides, as the paper's decoders were

They take turns (pip install torch timm transformers; mlx-vlm), a first round not counted: on a CPU of the FastVLMs
only, since LLaVA-OneVision takes minutes there. Ratios are taken within a round; "cpu" is the processor time of all
threads, which a busy machine distorts less. Fewer --tiles make it faster and are another comparison than the paper's,
which the table says.

  mlx-fastvlm bench headline --save headline-0.5b
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from mlx_fastvlm.loading import DTYPES

from .command import BenchmarkError, at_least_one, make_parser, progress, run
from .headline_runners import RESOLUTION, TILE, TILE_TOKENS, grid_side
from .machine import computes_on_cpu
from .peers import ask_in_turns, summarize
from .report import Summary, format_table, plain, ratios
from .runner_process import RunnerProcess, Unavailable

FASTVLM = ("ours", "fastvlm-torch")
ONEVISION = ("onevision-torch", "onevision-mlx-vlm")
DEFAULT_SIDES = (*FASTVLM, "onevision-torch")
STAGES = ("encode", "prefill", "ttft")
TILES = (10, 5, 2)  # an overview and a square grid

# arXiv 2412.13303: M1 Max, encoders as Core ML on the Neural Engine, decoders in MLX (float16); milliseconds
PAPER_MS = {
    "fastvlm": {"encode": 116.3, "prefill": 50.5, "ttft": 166.0},
    "onevision": {"encode": 2721.0, "prefill": 11402.0, "ttft": 14124.0},
}
PAPER_RATIOS = {stage: PAPER_MS["onevision"][stage] / PAPER_MS["fastvlm"][stage] for stage in STAGES}
PAPER_TILES = 10


def measure(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """See the top of this file."""
    if not (set(args.sides) & set(FASTVLM) and set(args.sides) & set(ONEVISION)):
        raise BenchmarkError("A ratio needs a FastVLM and a LLaVA-OneVision; choose --sides with one of each.")
    on_cpu = computes_on_cpu(args.device)
    dtype = args.dtype or ("float32" if on_cpu else "float16")
    options = {"dtype": dtype, "device": args.device, "blas": "auto", "tiles": args.tiles}
    with ExitStack() as stack:
        runners = {}
        for name in args.sides:
            progress(f"Building {name}.")
            try:
                runners[name] = stack.enter_context(RunnerProcess(f"headline-{name}", _python(name, args), options))
            except Unavailable as error:
                raise BenchmarkError(f"{name} cannot run here ({error}); choose other --sides or install it.") from None
        # Minutes on a CPU; on a GPU a first run that also loads its programs would be no measurement.
        counted_only = dict.fromkeys(ONEVISION, args.repeat) if on_cpu else {}
        rounds = ask_in_turns(runners, {}, args.repeat, counted_only)
        results = {name: summarize(name, runner, rounds) for name, runner in runners.items()}
    for name, result in results.items():
        counted = [answers[name] for answers in rounds[1:]]
        result["visual_tokens"] = counted[0]["visual_tokens"]
        for stage in STAGES:
            result[f"{stage}_s"] = Summary.of([answer[stage] for answer in counted])
    comparison = onevision_over_fastvlm(results)
    return _report(results, comparison, dtype, args.tiles), {
        "dtype": dtype,
        "device": args.device,
        "tiles": args.tiles,
        "sides": plain(results),
        "ratios": plain(comparison),
        "paper_ms": PAPER_MS,
        "paper_onevision_over_fastvlm": PAPER_RATIOS,
    }


def onevision_over_fastvlm(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Summary]]:
    """Each LLaVA-OneVision's times over each FastVLM's, "one over other", by stage and round by round."""
    return {
        f"{slow} over {fast}": {
            stage: ratios(results[slow][f"{stage}_s"], results[fast][f"{stage}_s"]) for stage in STAGES
        }
        for slow in ONEVISION
        for fast in FASTVLM
        if slow in results and fast in results
    }


def differences(sides: Collection[str], dtype: str, tiles: int, visual_tokens: int) -> list[str]:
    """What keeps a ratio measured here from being the paper's, one line each."""
    pixels = TILE * grid_side(tiles)
    lines = [
        "hardware: this machine, above; the paper's is an M1 Max with 32 GB.",
        f"precision: {dtype}; the paper's decoders float16.",
        f"framework: {', '.join(_framework(side) for side in sides)}; the paper has the encoders as Core ML on the Neural "
        "Engine and the decoders in MLX.",
        f"tokens: LLaVA-OneVision adds one at the end of each row of the grid, {visual_tokens:,} in all; the paper counts "
        f"{PAPER_TILES * TILE_TOKENS:,}.",
        "weights: random, here. The projector is timed with the encoder.",
    ]
    if tiles != PAPER_TILES:
        lines.insert(
            0,
            f"TILES: {tiles} instead of {PAPER_TILES} ({pixels} pixels instead of 1152): NOT the paper's comparison.",
        )
    return lines


def _framework(side: str) -> str:
    if side == "ours":
        return "ours MLX"
    return f"{side} {'MLX' if side.endswith('mlx-vlm') else 'PyTorch (transformers)'}"


def _python(side: str, args: argparse.Namespace) -> str:
    if side == "ours":
        return sys.executable
    return args.peer_python if side.endswith("mlx-vlm") else args.torch_python


def _report(
    results: Mapping[str, Mapping[str, Any]],
    comparison: Mapping[str, Mapping[str, Summary]],
    dtype: str,
    tiles: int,
) -> str:
    header = [f"{dtype}: ms", "pixels", "visual tokens", *STAGES, "min-max", "cpu", "peak GB"]
    rows = []
    for name, result in results.items():
        pixels = TILE * grid_side(tiles) if name in ONEVISION else RESOLUTION
        cells = [result[f"{stage}_s"].cells(1e3) for stage in STAGES]
        cpu, peak = f"{result['ttft_cpu_s'].median * 1e3:,.1f}", f"{result['peak_rss_bytes'] / 1e9:.2f}"
        medians = [median for median, _ in cells]
        rows.append([name, str(pixels), f"{result['visual_tokens']:,}", *medians, cells[-1][1], cpu, peak])
    for name, times in PAPER_MS.items():
        pixels, tokens = (1152, PAPER_TILES * TILE_TOKENS) if name == "onevision" else (RESOLUTION, 256)
        rows.append(
            [f"paper, {name}", str(pixels), f"{tokens:,}", *(f"{times[stage]:,.1f}" for stage in STAGES), "", "", ""]
        )
    text = format_table(header, rows) + "\n\n"

    ratio_rows = []
    for name, by_stage in comparison.items():
        cells = [by_stage[stage].cells() for stage in STAGES]
        ratio_rows.append([name, *(median for median, _ in cells), cells[-1][1]])
    ratio_rows.append(["paper", *(f"{PAPER_RATIOS[stage]:.1f}" for stage in STAGES), ""])
    text += format_table(["how many times", *STAGES, "min-max"], ratio_rows)
    visual_tokens = next(result["visual_tokens"] for name, result in results.items() if name in ONEVISION)
    lines = differences(results, dtype, tiles, visual_tokens)
    return "\n".join([text, "", "What differs from the paper:", *(f"- {line}" for line in lines)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("headline", __doc__)
    parser.add_argument(
        "--sides", nargs="+", choices=(*FASTVLM, *ONEVISION), default=DEFAULT_SIDES, help="who (all but mlx-vlm)"
    )
    parser.add_argument("--tiles", type=int, choices=TILES, default=PAPER_TILES, help="of LLaVA-OneVision (10)")
    parser.add_argument("--dtype", choices=DTYPES, help="type to compute in (default: float32 on a CPU, else float16)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="MLX's default, or the CPU (auto)")
    parser.add_argument("--torch-python", metavar="PATH", default=sys.executable, help="has torch, timm, transformers")
    parser.add_argument("--peer-python", metavar="PATH", default=sys.executable, help="has mlx-vlm and this package")
    parser.add_argument("--repeat", metavar="N", type=at_least_one, default=1, help="counted rounds (1)")
    run("headline", parser, measure, argv)


if __name__ == "__main__":
    main()
