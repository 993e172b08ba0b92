"""Kernels: each op as the user gets it, against the same op without this package's kernels, on the present device.

The ops and shapes are those of one encode, one prefill and one decoded token of a model (kernels/catalog.py). Both
versions run in turns in every round on the same random arrays; speed-ups are taken within a round. "off" is what MLX
itself offers, its fused ops included; "reference" is each op as its definition has it. The error is the largest
difference to the reference over the reference's largest value. Where no kernel of ours runs, both are the same and the
speed-up is about 1. "x count" is what the model's calls of the op save together.

  mlx-fastvlm bench kernels
  mlx-fastvlm bench kernels --size 0.5b --dtype float16 --save kernels-0.5b
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.kernels.catalog import Case, cases
from mlx_fastvlm.kernels.choice import kernel_mode
from mlx_fastvlm.kernels.timing import time_in_turns
from mlx_fastvlm.loading import DEMO, DTYPES, compute_dtype, resolve_model

from .command import at_least_one, make_parser, positive_multiple_of, progress, run
from .machine import use_blas
from .random_model import SIZES, random_config
from .report import Summary, format_table, plain, ratios

_TEXT_TOKENS = 24  # "Describe this image." in its template
_SECONDS = 0.1  # for both versions of an op in one round, about


def measure(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """See the top of this file."""
    use_blas("auto")
    config = FastVLMConfig.from_folder(resolve_model(DEMO)) if args.size == DEMO else random_config(args.size)
    resolution = args.resolution or config.vision_config.image_size
    prompt_tokens = args.prompt_tokens or (resolution // config.vision_config.patch_size) ** 2 + _TEXT_TOKENS
    dtype = compute_dtype(mx.float16, args.dtype)
    measured = []
    for case in cases(config, resolution, prompt_tokens):
        progress(f"{case.op} {case.label}")
        measured.append(measure_case(case, dtype, args.against, args.repeat))
    kind = str(dtype).removeprefix("mlx.core.")
    title = f"{args.size}, {resolution} px, {prompt_tokens} tokens, {kind}: ms a call"
    return _report(title, args.against, measured), {
        "size": args.size,
        "resolution": resolution,
        "prompt_tokens": prompt_tokens,
        "dtype": kind,
        "against": args.against,
        "ops": [plain(case) for case in measured],
    }


def measure_case(case: Case, dtype: mx.Dtype, against: str, rounds: int) -> dict[str, Any]:
    """One op in one shape: error to the reference, and seconds a call in both modes, a sample a round.

    Args:
        case: the op.
        dtype: of its arrays.
        against: the mode it is compared with, "off" or "reference".
        rounds: in each of which both modes are timed in turns.
    """
    arrays = case.arrays(dtype)
    mx.eval(arrays)
    error = max_relative_error(run_in("auto", case, arrays), run_in("reference", case, arrays))

    def ours() -> Sequence[mx.array]:
        with kernel_mode("auto"):
            return case.run(*arrays)

    def theirs() -> Sequence[mx.array]:
        with kernel_mode(against):
            return case.run(*arrays)

    # On a CPU this package's loops compute at once, while the graph is built.
    lazy = mx.default_device().type == mx.DeviceType.gpu
    pairs = [time_in_turns([ours, theirs], _SECONDS, lazy) for _ in range(rounds)]
    fast, slow = (Summary.of(seconds) for seconds in zip(*pairs, strict=True))
    return {
        "op": case.op,
        "label": case.label,
        "count": case.count,
        "ours_s": fast,
        "against_s": slow,
        "speed_up": ratios(slow, fast),
        "max_relative_error": error,
    }


def run_in(mode: str, case: Case, arrays: Sequence[mx.array]) -> Sequence[mx.array]:
    """The op's evaluated results in a kernel mode."""
    with kernel_mode(mode):
        results = case.run(*arrays)
        mx.eval(results)
    return results


def max_relative_error(results: Sequence[mx.array], reference: Sequence[mx.array]) -> float:
    """Largest difference over the reference's largest absolute value, the worst of all results; NaN stays NaN."""
    errors = []
    for one, other in zip(results, reference, strict=True):
        one, other = one.astype(mx.float32), other.astype(mx.float32)
        errors.append((mx.abs(one - other).max() / mx.maximum(mx.abs(other).max(), 1e-30)).item())
    return max(errors, key=lambda error: (error != error, error))


def _report(title: str, against: str, measured: Sequence[dict[str, Any]]) -> str:
    header = [title, "ours", "min-max", against, "min-max", "speed-up", "min-max", "count", "saved x count", "error"]
    rows = [
        [
            f"{case['op']} {case['label']}",
            *case["ours_s"].cells(1e3, digits=3),
            *case["against_s"].cells(1e3, digits=3),
            *case["speed_up"].cells(digits=2),
            str(case["count"]),
            f"{_saved(case) * 1e3:,.2f}",
            f"{case['max_relative_error']:.1e}",
        ]
        for case in measured
    ]
    ours = sum(case["count"] * case["ours_s"].median for case in measured)
    theirs = sum(case["count"] * case["against_s"].median for case in measured)
    return (
        f"{format_table(header, rows)}\nAll, x count: {ours * 1e3:,.1f} ms against {theirs * 1e3:,.1f} ms, "
        f"{theirs / ours:.2f} times. Matrix products and what else has no kernel are not in it."
    )


def _saved(case: dict[str, Any]) -> float:
    return case["count"] * (case["against_s"].median - case["ours_s"].median)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("kernels", __doc__)
    parser.add_argument("--size", choices=(DEMO, *SIZES), default=DEMO, help="whose shapes (demo)")
    parser.add_argument("--resolution", metavar="R", type=positive_multiple_of(64), help="pixels (the model's)")
    parser.add_argument(
        "--prompt-tokens", metavar="N", type=at_least_one, help=f"of the prefill (the image's rows and {_TEXT_TOKENS})"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type (float16; float32 on a CPU)")
    parser.add_argument("--against", choices=("off", "reference"), default="off", help="what to compare with (off)")
    parser.add_argument("--repeat", metavar="N", type=at_least_one, default=5, help="rounds (5)")
    run("kernels", parser, measure, argv)


if __name__ == "__main__":
    main()
