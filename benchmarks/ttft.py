"""Time to first token by stage, cold start, decoding speed and memory of one model.

The clock runs from the image's bytes to the first token: decode, resize, encode, project, tokenize, prefill, first
token. The paper's narrower figure stands beside it: encode, project and the prefill of the image's rows alone. One
answer before the others is not counted; its time is shown ("first"), since it includes what MLX does once.

Several values of --dtype, --bits, --resolution and --prompt-tokens are measured in all their combinations, each in a
process of its own, so that memory and first answer are its own. Cold start is measured on the installed command, from
the start of a process to the first character, for every --dtype, with the model and the picture's size as they are.

A released model, one of its size with random weights (speed does not depend on the values), or the demo:

  mlx-fastvlm bench ttft --model apple/FastVLM-0.5B --save
  mlx-fastvlm bench ttft --random-weights 0.5b --resolution 512 768 1024 --plot stages.png
  mlx-fastvlm bench ttft --dtype float16 float32 --bits none 8 4 --prompt-tokens 32 512

A random model's tokenizer counts words; its answers mean nothing and never end early. Resolutions other than the one a
checkpoint was trained at are for timing: its answers there are not to be trusted. Peak memory is the whole process's,
loading and quantizing included; a checkpoint is converted beforehand, in a process of its own. After Ctrl-C, or where a
variant fails, what has been measured until then is shown.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.fidelity.plot import check_plot
from mlx_fastvlm.loading import DEMO, DTYPES

from .child import code_command
from .cold_start import time_answer
from .command import (
    DEFAULT_PROMPT,
    BenchmarkError,
    add_picture,
    at_least_one,
    installed_command,
    make_parser,
    positive_multiple_of,
    progress,
    run,
    zero_or_more,
)
from .picture import picture_file
from .random_model import SIZES
from .report import Summary, format_table, plain
from .stage_plot import plot_stages
from .ttft_variant import BITS, STAGES, Request, Variant

PAPER_STAGES = ("encode", "project", "image_prefill")
_RESOLVE = """
import json, sys
from mlx_fastvlm.errors import FastVLMError
from mlx_fastvlm.loading import resolve_model
try:
    print(json.dumps(str(resolve_model(sys.argv[1]))))
except FastVLMError as error:
    sys.exit(" ".join(str(error).split()))
"""


def measure(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """See the top of this file."""
    if args.plot is not None:
        check_plot(args.plot)
    folder, name = None, f"random {args.random_weights}"
    if args.random_weights is None:
        model = args.model or DEMO
        progress(f"Preparing {model}.")
        folder, name = resolve_aside(model), Path(model).name
    cold_starts: list[dict[str, Any]] = []
    variants: list[dict[str, Any]] = []
    cut_short: dict[str, Any] = {}
    with picture_file(args.image) as picture:
        try:
            for cold_start in measure_cold_starts(folder, picture, args):
                cold_starts.append(cold_start)
            for variant in measure_variants(folder, picture, args):
                variants.append(variant)
        except (KeyboardInterrupt, BenchmarkError) as error:
            if not variants:
                raise
            cut_short = {"interrupted": True} if isinstance(error, KeyboardInterrupt) else {"error": str(error)}
    table = _report(name, variants, cold_starts)
    if args.plot is not None and not cut_short:
        try:
            plot_stages(name, [variant_name(variant) for variant in variants], variants, args.plot)
            table += f"\nPlot: {args.plot}"
        except OptionError as error:
            cut_short = {"error": str(error)}
    return table, {
        "model": name,
        "image": None if args.image is None else args.image.name,
        "prompt": args.prompt,
        "cold_start": cold_starts,
        "variants": [plain(variant) for variant in variants],
        **cut_short,
    }


def measure_cold_starts(folder: Path | None, picture: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Process start to the first character, for each type; what a random model, which has no file, cannot have.

    Raises:
        BenchmarkError: `mlx-fastvlm describe` fails.
    """
    if folder is None or args.cold_starts == 0:
        return
    for dtype in args.dtype:
        command = [str(installed_command()), "describe", str(picture), args.prompt, "--model", str(folder)]
        command += ["--max-tokens", str(args.max_tokens)] + (["--dtype", dtype] if dtype else [])
        progress(f"Cold start{f', {dtype}' if dtype else ''}: one that is not counted, then {args.cold_starts}.")
        firsts = [time_answer(command)[0] for _ in range(args.cold_starts + 1)]
        yield {"dtype": dtype, "first_character_s": Summary.of(firsts[1:]).to_dict()}


def measure_variants(folder: Path | None, picture: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every combination, one after the other: what `ttft_variant.measure` says, the samples summarized as "times_s"."""
    combinations = list(product(args.dtype, args.bits, args.resolution, args.prompt_tokens))
    for number, combination in enumerate(combinations, start=1):
        variant = Variant(*combination)
        progress(f"{number}/{len(combinations)}: {_wish(variant)}")
        request = Request(
            model=None if folder is None else str(folder),
            random_weights=args.random_weights,
            variant=variant,
            image=str(picture),
            prompt=args.prompt,
            max_tokens=args.max_tokens,
            repeat=args.repeat,
        )
        measured = run_variant(request)
        measured["times_s"] = stage_summaries(measured.pop("samples"))
        rates = measured["decode_tps"]
        measured["decode_tps"] = Summary.of(rates) if rates else None
        yield measured


def run_variant(request: Request) -> dict[str, Any]:
    """`ttft_variant.measure` in a process of its own.

    Raises:
        BenchmarkError: it fails; its own message is repeated.
    """
    done = subprocess.run(request.command(), stdout=subprocess.PIPE, text=True)
    if done.returncode == -signal.SIGKILL:
        raise BenchmarkError(
            "The measuring process was killed, probably for want of memory; measure something smaller."
        )
    if done.returncode != 0 or not done.stdout:
        raise BenchmarkError(f"The measuring process ended with exit code {done.returncode}; its own words are above.")
    reply = json.loads(done.stdout.splitlines()[-1])
    if "error" in reply:
        raise BenchmarkError(reply["error"])
    return reply


def resolve_aside(model: str) -> Path:
    """`resolve_model` in a process of its own, so that a conversion's memory is not taken for the runtime's.

    Raises:
        BenchmarkError: it fails; its own message is repeated.
    """
    done = subprocess.run(code_command(_RESOLVE, model), capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise BenchmarkError(lines[-1] if lines else f"Preparing {model} failed: exit code {done.returncode}")
    return Path(json.loads(done.stdout.splitlines()[-1]))


def stage_summaries(samples: Sequence[dict[str, float]]) -> dict[str, Summary]:
    """Seconds by stage, in order, then the total, the prefill of the image's rows alone, and the paper's figure."""
    times = {name: Summary.of([sample[name] for sample in samples]) for name in (*STAGES, "ttft", "image_prefill")}
    times["paper_ttft"] = Summary.of([sum(sample[stage] for stage in PAPER_STAGES) for sample in samples])
    return times


def variant_name(variant: dict[str, Any]) -> str:
    """What a measured variant is, in short: float32, int8, 1024 px, 256+25 tokens."""
    how = [variant["dtype"]] + ([variant["quantization"]] if variant["quantization"] else [])
    tokens = f"{variant['image_tokens']}+{variant['text_tokens']} tokens"
    return ", ".join([*how, f"{variant['resolution']} px", tokens])


def _wish(variant: Variant) -> str:
    asked = [variant.dtype, None if variant.bits == "none" else f"{variant.bits} bits"]
    asked += [variant.resolution and f"{variant.resolution} px"]
    asked += [variant.prompt_tokens and f"{variant.prompt_tokens} text tokens"]
    return ", ".join(wish for wish in asked if wish) or "as it is"


def _report(name: str, variants: Sequence[dict[str, Any]], cold_starts: Sequence[dict[str, Any]]) -> str:
    """The table of all variants, what its columns mean, and the cold starts."""
    stages = [stage.replace("_", " ") for stage in STAGES]
    header = [f"{name}: ms", *stages, "TTFT", "min-max", "paper's", "first", "tok/s", "peak GB", "/weights", "MLX GB"]
    text = format_table(header, [_row(variant) for variant in variants])
    text += (
        "\nTTFT: from the image's bytes to the first token. paper's: encode + project + the image's rows alone."
        "\npeak: the process's resident memory, loading included, and that over the weights' size. MLX: its peak while "
        "answering."
    )
    for cold_start in cold_starts:
        median, spread = Summary.of(cold_start["first_character_s"]["samples"]).cells(1e3)
        kind = cold_start["dtype"] or "the runtime's type"
        text += f"\nCold start, {kind}: {median} ms ({spread}) from the process's start to the first character."
    return text


def _row(variant: dict[str, Any]) -> list[str]:
    times = variant["times_s"]
    return [
        variant_name(variant),
        *(times[stage].cells(1e3)[0] for stage in STAGES),
        *times["ttft"].cells(1e3),
        times["paper_ttft"].cells(1e3)[0],
        f"{variant['first_answer_ttft_s'] * 1e3:,.1f}",
        f"{variant['decode_tps'].median:,.1f}" if variant["decode_tps"] else "",
        f"{variant['peak_rss_bytes'] / 1e9:.2f}",
        f"{variant['peak_rss_bytes'] / variant['weight_bytes']:.2f}",
        f"{variant['mlx_peak_bytes'] / 1e9:.2f}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("ttft", __doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help='"demo" (default), a model or checkpoint folder, or a hub id')
    source.add_argument("--random-weights", choices=SIZES, help="a released size with random weights, in memory")
    add_picture(parser)
    parser.add_argument(
        "--resolution",
        metavar="R",
        nargs="+",
        type=positive_multiple_of(64),
        default=[None],
        help="sides of the tower's input, in pixels (default: the model's)",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=[None], help="types to compute in (default: the runtime's choice)"
    )
    parser.add_argument(
        "--bits",
        nargs="+",
        choices=BITS,
        default=["none"],
        help="quantize in memory by int8, int4, ... (default: none)",
    )
    parser.add_argument(
        "--prompt-tokens",
        metavar="N",
        nargs="+",
        type=at_least_one,
        default=[None],
        help="text tokens of the prompt, template included (default: as --prompt has)",
    )
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help=f'the question ("{DEFAULT_PROMPT}")')
    parser.add_argument("--max-tokens", metavar="N", type=at_least_one, default=32, help="length of the answer (32)")
    parser.add_argument("--repeat", metavar="N", type=at_least_one, default=5, help="counted answers (5)")
    parser.add_argument(
        "--cold-starts", metavar="N", type=zero_or_more, default=3, help="counted cold starts (3; 0: none)"
    )
    parser.add_argument("--plot", metavar="FILE", type=Path, help="also draw the stages as bars, a PNG file")
    run("ttft", parser, measure, argv)


if __name__ == "__main__":
    main()
