"""Resolution: what pictures of any size and shape cost, in positions of the decoder, in the tower, up to the first token.

Each resolution is measured with the picture padded to its square, as FastVLM was trained, and as a rectangle of the
picture's own shape (fit native), in turns, in one process, greedily; a round before the first is not counted. Ratios are
taken within a round. The picture is a 16:9 one, read from a PNG file's bytes in every answer.

  mlx-fastvlm bench resolution
  mlx-fastvlm bench resolution --model apple/FastVLM-0.5B --resolutions 512 1024

The same measurement, and what the performance model predicts for Apple's chips:  mlx-fastvlm info MODEL --resolution
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.errors import FastVLMWarning
from mlx_fastvlm.generate import GenerationResponse, stream_generate
from mlx_fastvlm.loading import load
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.resolution import STEP, Fit, count_rows, native_size, resolutions

from .apple_chips import CHIPS, Chip, chip_named
from .command import DEFAULT_PROMPT, at_least_one, make_parser, positive_multiple_of, progress, run
from .layer_work import FUSED
from .machine import cpu_name
from .picture import draw, png_bytes
from .report import Summary, format_table, plain, ratios
from .roofline import TEXT_TOKENS, first_token_seconds

WIDTH, HEIGHT = 1920, 1080
LIMIT = 0.6  # of the padded square's positions and encode time
_SHARES = (1 / 4, 1 / 2, 3 / 4, 1, 3 / 2, 2)  # of the trained resolution, to be shown
_EXAMPLES = ("M2", "M4 Max")  # predicted for where this machine's chip is none of those


class Choice(NamedTuple):
    """How a picture is shown to the tower."""

    resolution: int
    fit: Fit = "pad"


def measure_choices(
    model: FastVLM,
    processor: Processor,
    choices: Sequence[Choice],
    picture: bytes,
    repeat: int,
    on_answer: Callable[[int, int], None],
) -> dict[Choice, list[GenerationResponse]]:
    """The first token of an answer about a picture, `repeat` times a choice, in turns.

    Args:
        picture: an image file's bytes.
        repeat: counted rounds, after one that is not.
        on_answer: told how many answers are done, and of how many.
    """
    answers: dict[Choice, list[GenerationResponse]] = {choice: [] for choice in choices}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastVLMWarning)  # that these are not the trained size is the point
        for turn in range((repeat + 1) * len(choices)):
            choice = choices[turn % len(choices)]
            options = {"max_tokens": 1, **choice._asdict()}
            (answer,) = stream_generate(model, processor, DEFAULT_PROMPT, picture, **options)
            answers[choice].append(answer)
            on_answer(turn + 1, (repeat + 1) * len(choices))
    return {choice: responses[1:] for choice, responses in answers.items()}


def cost_table(config: FastVLMConfig) -> list[dict[str, Any]]:
    """A row a resolution: the positions that images of some shapes take, and predicted times to the first token.

    Times are seconds of encode, projector and prefill of a padded image and `TEXT_TOKENS` positions of text in float16,
    by chip: this machine's, if the performance model knows it, or two others as examples.
    """
    trained = config.vision_config.image_size
    sides = sorted({max(STEP, round(share * trained / STEP) * STEP) for share in _SHARES} & set(resolutions(trained)))
    rows = []
    for side in sides:
        shaped = replace(config, vision_config=replace(config.vision_config, image_size=side))
        seconds = {chip.name: first_token_seconds(shaped, FUSED, chip, TEXT_TOKENS) for chip in _chips()}
        native = {f"{w}:{h}": count_rows(native_size(w, h, side)) for w, h in ((4, 3), (16, 9))}
        tokens = shaped.vision_config.num_image_tokens
        rows.append({"resolution": side, "tokens": tokens, "native_tokens": native, "predicted_ttft_s": seconds})
    return rows


def add_measured(
    costs: Sequence[dict[str, Any]],
    model: FastVLM,
    processor: Processor,
    repeat: int,
    on_answer: Callable[[int, int], None],
) -> None:
    """Give every row of `cost_table` "measured_ttft_s", the median on this machine with the picture padded."""
    choices = [Choice(row["resolution"]) for row in costs]
    answers = measure_choices(model, processor, choices, default_picture(), repeat, on_answer)
    for row, responses in zip(costs, answers.values(), strict=True):
        row["measured_ttft_s"] = Summary.of([response.ttft for response in responses]).median


def format_costs(costs: Sequence[dict[str, Any]], trained: int) -> str:
    """`cost_table` for people."""
    chips = list(costs[0]["predicted_ttft_s"])
    measured = "measured_ttft_s" in costs[0]
    header = ["resolution", "tokens", *(f"native {shape}" for shape in costs[0]["native_tokens"])]
    header += [f"{chip}, ms" for chip in chips] + ["measured here, ms"] * measured
    rows = []
    for cost in costs:
        seconds = [*cost["predicted_ttft_s"].values(), *([cost["measured_ttft_s"]] if measured else [])]
        name = f"{cost['resolution']}{' (trained)' if cost['resolution'] == trained else ''}"
        tokens = [cost["tokens"], *cost["native_tokens"].values()]
        rows.append([name, *map(str, tokens), *(f"{value * 1e3:,.1f}" for value in seconds)])
    note = (
        "Times to the first token under a chip's name are PREDICTED by a model, not measured: encode, projector and prefill "
        "in float16, fused kernels, picture padded (docs/performance-model.md). Other resolutions than the trained one may "
        "give worse answers."
    )
    return f"{format_table(header, rows)}\n{note}"


def default_picture() -> bytes:
    """A 16:9 picture as a PNG file."""
    return png_bytes(draw(WIDTH, HEIGHT))


def measure(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """See the top of this file."""
    model, processor = load(args.model)
    trained = processor.image_processor.image_size
    sides = args.resolutions or [trained]
    choices = [Choice(side, fit) for side in sides for fit in ("pad", "native")]
    answers = measure_choices(
        model, processor, choices, default_picture(), args.repeat, lambda done, total: progress(f"  {done}/{total}")
    )
    results = {choice: _summarize(choice, responses) for choice, responses in answers.items()}
    for choice, result in results.items():
        padded = results[Choice(choice.resolution)]
        result["tokens_over_padded"] = result["image_tokens"] / padded["image_tokens"]
        for name in ("encode_s", "ttft_s"):
            result[f"{name[:-2]}_over_padded"] = ratios(result[name], padded[name])
    rows = [_row(choice, result) for choice, result in results.items()]
    header = [
        "picture",
        "pixels",
        "tokens",
        "encode ms",
        "prefill ms",
        "ttft ms",
        "min-max",
        "tokens",
        "encode",
        "ttft",
    ]
    return (
        f"{Path(args.model).name}, {WIDTH}x{HEIGHT} picture; the last three over padded\n{format_table(header, rows)}",
        {
            "model": Path(args.model).name,
            "picture": [WIDTH, HEIGHT],
            "trained": trained,
            "limit": LIMIT,
            "choices": [{**choice._asdict(), **plain(result)} for choice, result in results.items()],
        },
    )


def _summarize(choice: Choice, responses: Sequence[GenerationResponse]) -> dict[str, Any]:
    size = native_size(WIDTH, HEIGHT, choice.resolution) if choice.fit == "native" else (choice.resolution,) * 2
    times = {name: Summary.of([response.timings[name] for response in responses]) for name in ("encode", "prefill")}
    return {
        "size": list(size),
        "image_tokens": count_rows(size),
        "prompt_tokens": responses[0].prompt_tokens,
        **{f"{name}_s": summary for name, summary in times.items()},
        "ttft_s": Summary.of([response.ttft for response in responses]),
    }


def _row(choice: Choice, result: dict[str, Any]) -> list[str]:
    height, width = result["size"]
    times = [f"{result[name].median * 1e3:,.1f}" for name in ("encode_s", "prefill_s")]
    shares = [result["tokens_over_padded"], *(result[f"{name}_over_padded"].median for name in ("encode", "ttft"))]
    return [
        f"{choice.fit} {choice.resolution}",
        f"{width}x{height}",
        str(result["image_tokens"]),
        *times,
        *result["ttft_s"].cells(1e3),
        *(f"{share - 1:+.0%}" if choice.fit == "native" else "" for share in shares),
    ]


def _chips() -> list[Chip]:
    """This machine's, or the examples."""
    names = [chip.name for chip in CHIPS if cpu_name() == f"Apple {chip.name}"] or _EXAMPLES
    return [chip_named(name) for name in names]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: see the top of this file."""
    parser = make_parser("resolution", __doc__)
    parser.add_argument("--model", default="demo", help='hub id, folder or "demo" (the default)')
    parser.add_argument(
        "--resolutions", metavar="N", nargs="+", type=positive_multiple_of(STEP), help="default: the trained one"
    )
    parser.add_argument("--repeat", metavar="N", type=at_least_one, default=5, help="counted rounds (5)")
    run("resolution", parser, measure, argv)


if __name__ == "__main__":
    main()
