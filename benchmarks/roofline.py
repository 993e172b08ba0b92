"""Predicted time to first token and decoding speed on Apple's chips. A model: nothing is measured here.

Every launch of the forward passes is counted from the layers' shapes and timed from the chips' published figures; see
docs/performance-model.md for how, for its sources and for how far it was off where measurements are published.

  mlx-fastvlm bench roofline                                  all chips, FastVLM-0.5B at 1024 pixels
  mlx-fastvlm bench roofline --chip "M4 Max" --model 7b       one chip, stage by stage

"plain" is this package with MLX's own ops, "fused" with its kernels, "mlx-vlm" that package's model; all in float16, except
the decoder's weights where bits are given. Time to first token is encode, projector and prefill; decoding, resizing and
tokenizing are not in it.

The page's tables, from the repository root:  python -m mlx_fastvlm.benchmarks.roofline --docs docs/performance-model.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_fastvlm.config import FastVLMConfig

from .apple_chips import CHIPS, Chip, chip_named
from .command import BenchmarkError, at_least_one, make_parser, positive_multiple_of, run
from .docs_page import markdown_table, renew
from .layer_work import (
    FUSED,
    MLX_VLM,
    PLAIN,
    Graph,
    Stages,
    bits_per_weight,
    decode_step,
    encode_stages,
    prefill_stage,
    project_stage,
)
from .performance_model import BOUNDS, Prediction, predict
from .published_points import POINTS
from .random_model import SIZES, random_config
from .report import format_table

TITLE = "PREDICTED by a model, not measured"
TEXT_TOKENS = 24  # of the prompt, the image's rows come on top
CONTEXTS = (300, 1024, 4096)
BITS = (16, 8, 4)
FEWEST_BITS = BITS[-1]

# The fused graph without one of its kernels: what each is worth.
WITHOUT = {
    "depthwise kernel (and pair)": replace(FUSED, own_depthwise=False, depthwise_pair=False),
    "depthwise pair": replace(FUSED, depthwise_pair=False),
    "tower attention": replace(FUSED, attention="unfused"),
    "squeeze-excite": replace(FUSED, squeeze_excite=False),
    "residual and norm": replace(FUSED, add_rms_norm=False),
    "rotary heads": replace(FUSED, rotary_heads=False),
}
# The fused graph with what it leaves to tuning, or with another choice: what would pay next.
NEXT = {
    "GELU and residual inside the tower's products": replace(FUSED, linear_epilogue=True),
    "SwiGLU inside the gate/up product (decode)": replace(FUSED, gate_up_swiglu=True),
    "attention padded to 64, by MLX": replace(FUSED, attention="padded"),
}


def stages_of(config: FastVLMConfig, graph: Graph, chip: Chip, text_tokens: int) -> Stages:
    """Every stage up to the first token: the tower's, "projector" and "prefill"."""
    tokens = text_tokens + config.vision_config.num_image_tokens
    return {
        **encode_stages(config.vision_config, graph, chip.family),
        "projector": project_stage(config),
        "prefill": prefill_stage(config.text_config, graph, tokens),
    }


def predict_stages(config: FastVLMConfig, graph: Graph, chip: Chip, text_tokens: int) -> dict[str, Prediction]:
    """stage → prediction, in the order in which they run; float16."""
    return {name: predict(stage, chip) for name, stage in stages_of(config, graph, chip, text_tokens).items()}


def first_token_seconds(config: FastVLMConfig, graph: Graph, chip: Chip, text_tokens: int) -> float:
    """Encode, projector and prefill; float16."""
    return sum(stage.seconds for stage in predict_stages(config, graph, chip, text_tokens).values())


def decode_tps(config: FastVLMConfig, graph: Graph, chip: Chip, context: int, bits: int) -> float:
    """Tokens per second at a context; `bits` of the decoder's and embedding's weights: 16, or quantized in groups of 64."""
    return 1 / predict(decode_step(config.text_config, graph, context, bits_per_weight(bits)), chip).seconds


def predict_chip(config: FastVLMConfig, chip: Chip, text_tokens: int) -> dict[str, Any]:
    """Everything that is predicted for a chip, as JSON values: seconds, tokens per second, shares."""
    graphs = (PLAIN, FUSED)
    mlx_vlm = predict_stages(config, MLX_VLM, chip, text_tokens)
    stages = {graph.name: predict_stages(config, graph, chip, text_tokens) for graph in graphs}
    return {
        "stages": {
            stage: {
                "plain_s": stages["plain"][stage].seconds,
                "fused_s": fused.seconds,
                "fused_launches": fused.launches,
                "fused_shares": {bound: fused.share(bound) for bound in BOUNDS},
            }
            for stage, fused in stages["fused"].items()
        },
        "first_token_s": {
            name: sum(stage.seconds for stage in predicted.values())
            for name, predicted in {MLX_VLM.name: mlx_vlm, **stages}.items()
        },
        "decode_tps": {
            graph.name: {
                str(bits): {str(context): decode_tps(config, graph, chip, context, bits) for context in CONTEXTS}
                for bits in BITS
            }
            for graph in graphs
        },
        "without_kernel": _changes(config, chip, text_tokens, WITHOUT),
        "next": _changes(config, chip, text_tokens, NEXT),
    }


def overview_rows(config: FastVLMConfig, chips: Sequence[Chip], text_tokens: int) -> list[dict[str, str]]:
    """A row a chip: time to first token and decoding speed, plain and fused; the former of mlx-vlm's graph too."""
    rows = []
    for chip in chips:
        encode = {graph.name: _encode_seconds(config, graph, chip) for graph in (PLAIN, FUSED)}
        first = {g.name: first_token_seconds(config, g, chip, text_tokens) for g in (MLX_VLM, PLAIN, FUSED)}
        row = {"chip": chip.name}
        row |= {f"encode {name}, ms": f"{value * 1e3:.1f}" for name, value in encode.items()}
        row |= {f"first token {name}, ms": f"{value * 1e3:.1f}" for name, value in first.items()}
        for bits in BITS:
            speeds = (decode_tps(config, graph, chip, CONTEXTS[0], bits) for graph in (PLAIN, FUSED))
            row[f"{bits} bits, tok/s"] = " → ".join(f"{speed:.0f}" for speed in speeds)
        rows.append(row)
    return rows


def stage_rows(config: FastVLMConfig, chip: Chip, text_tokens: int) -> list[dict[str, str]]:
    """A row a stage: times of both graphs and what the fused one waits for."""
    plain = predict_stages(config, PLAIN, chip, text_tokens)
    fused = predict_stages(config, FUSED, chip, text_tokens)
    rows = [_stage_row(name, plain[name].seconds, stage) for name, stage in fused.items()]
    total = Prediction(
        {bound: sum(stage.waits[bound] for stage in fused.values()) for bound in BOUNDS},
        sum(stage.launches for stage in fused.values()),
    )
    return [*rows, _stage_row("first token", sum(stage.seconds for stage in plain.values()), total)]


def decode_rows(config: FastVLMConfig, chip: Chip) -> list[dict[str, str]]:
    """A row a number of bits: tokens per second by context, plain → fused."""
    return [
        {
            "bits of the decoder's weights": str(bits),
            **{
                f"context {context}, tok/s": " → ".join(
                    f"{decode_tps(config, graph, chip, context, bits):.0f}" for graph in (PLAIN, FUSED)
                )
                for context in CONTEXTS
            },
        }
        for bits in BITS
    ]


def change_rows(config: FastVLMConfig, chips: Sequence[Chip], text_tokens: int) -> list[dict[str, str]]:
    """A row a kernel, and a row an idea: by how much it changes the time to first token and of a decoded token."""
    rows = []
    for meaning, graphs in (("without", WITHOUT), ("with", NEXT)):
        for name in graphs:
            row = {"fused": f"{meaning} {name}"}
            for chip in chips:
                change = _changes(config, chip, text_tokens, {name: graphs[name]})[name]
                row[f"{chip.name}: first token, ms"] = f"{change['first_token_s'] * 1e3:+.2f}"
                row[f"{chip.name}: a token at {FEWEST_BITS} bits, µs"] = f"{round(change['token_s'] * 1e6):+d}"
            rows.append(row)
    return rows


def point_rows() -> list[dict[str, str]]:
    """A row a published measurement, with the model's error."""
    return [
        {
            "published": point.what,
            "figure": f"{point.published:g} {point.unit}" + (f" ({point.spread})" if point.spread else ""),
            "predicted": f"{point.predict():.1f} {point.unit}",
            "error in time": "fitted to it" if point.fitted else f"{point.error:+.0%}",
            "source": point.url,
        }
        for point in POINTS
    ]


def measure(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The tables and the result; `command.run`'s form."""
    config = random_config(args.model)
    config = replace(config, vision_config=replace(config.vision_config, image_size=args.resolution))
    chips = CHIPS if args.chip is None else (chip_named(args.chip),)
    scene = f"FastVLM-{args.model.upper()}, {args.resolution} pixels, {args.text_tokens} text tokens, float16"
    parts = [f"{TITLE} (the machine above only computed it): {scene}"]
    if args.chip is None:
        parts.append(_plain_table(overview_rows(config, chips, args.text_tokens)))
    for chip in chips:
        parts += [f"{chip.name}, {TITLE}", _plain_table(stage_rows(config, chip, args.text_tokens))]
        parts.append(_plain_table(decode_rows(config, chip)))
        parts.append(_plain_table(change_rows(config, (chip,), args.text_tokens)))
    result = {
        "predicted": True,
        "note": f"{TITLE}; the machine above only computed it.",
        "model": args.model,
        "resolution": args.resolution,
        "text_tokens": args.text_tokens,
        "chips": {chip.name: predict_chip(config, chip, args.text_tokens) for chip in chips},
    }
    return "\n\n".join(parts), result


def docs_blocks() -> dict[str, str]:
    """The page's generated tables by the name of their marks: FastVLM-0.5B at 1024 pixels."""
    config = random_config("0.5b")
    two = (chip_named("M2"), chip_named("M4 Max"))
    tables = {
        "chips": [
            {
                "chip": chip.name,
                "GPU cores": str(chip.gpu_cores),
                "GB/s": f"{chip.bandwidth.value / 1e9:g}",
                "source of GB/s": f"[{chip.bandwidth.publisher}]({chip.bandwidth.url})",
                "TFLOPS": f"{chip.flops.value / 1e12:g}",
                "source of TFLOPS": f"[{chip.flops.publisher}]({chip.flops.url})",
                "accelerators, TFLOPS": f"{chip.accelerator_flops.value / 1e12:g}" if chip.accelerator_flops else "",
            }
            for chip in CHIPS
        ],
        "overview": overview_rows(config, CHIPS, TEXT_TOKENS),
        **{f"stages {chip.name}": stage_rows(config, chip, TEXT_TOKENS) for chip in two},
        "changes": change_rows(config, (*two, chip_named("M5 Max")), TEXT_TOKENS),
        "points": point_rows(),
    }
    return {name: markdown_table(rows) for name, rows in tables.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: see the top of this file."""
    parser = make_parser("roofline", __doc__)
    parser.add_argument("--model", choices=SIZES, default="0.5b", help="released size (default: 0.5b)")
    parser.add_argument(
        "--resolution", metavar="PIXELS", type=positive_multiple_of(64), default=1024, help="default: 1024"
    )
    parser.add_argument("--chip", metavar="NAME", help=f"one of {', '.join(c.name for c in CHIPS)} (default: all)")
    parser.add_argument(
        "--text-tokens", metavar="N", type=at_least_one, default=TEXT_TOKENS, help=f"of the prompt ({TEXT_TOKENS})"
    )
    parser.add_argument("--docs", metavar="FILE", type=Path, help="only renew the tables of this page")
    args = parser.parse_args(argv)
    if args.docs is None:
        run("roofline", parser, measure, argv)
        return
    try:
        renew(args.docs, docs_blocks())
    except BenchmarkError as error:
        sys.exit(f"roofline: {error}")


def _encode_seconds(config: FastVLMConfig, graph: Graph, chip: Chip) -> float:
    stages = encode_stages(config.vision_config, graph, chip.family)
    return sum(predict(stage, chip).seconds for stage in stages.values())


def _changes(
    config: FastVLMConfig, chip: Chip, text_tokens: int, graphs: dict[str, Graph]
) -> dict[str, dict[str, float]]:
    """name → by how many seconds a graph's first token, and a decoded one at FEWEST_BITS, take longer than the fused's."""

    def seconds(graph: Graph) -> tuple[float, float]:
        first = first_token_seconds(config, graph, chip, text_tokens)
        return first, 1 / decode_tps(config, graph, chip, CONTEXTS[0], FEWEST_BITS)

    first, token = seconds(FUSED)
    changed = {name: seconds(graph) for name, graph in graphs.items()}
    return {name: {"first_token_s": f - first, "token_s": t - token} for name, (f, t) in changed.items()}


def _stage_row(name: str, plain_seconds: float, fused: Prediction) -> dict[str, str]:
    return {
        "stage": name,
        "plain, ms": f"{plain_seconds * 1e3:.2f}",
        "fused, ms": f"{fused.seconds * 1e3:.2f}",
        "plain / fused": f"{plain_seconds / fused.seconds:.2f}",
        "launches": str(fused.launches),
        **{bound: f"{fused.share(bound):.0%}" for bound in BOUNDS},
    }


def _plain_table(rows: Sequence[dict[str, str]]) -> str:
    return format_table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
