"""Counts what this package's GPU kernels move and compute, by running their Metal source in the emulator.

From the repository root:  python -m tests.kernel_counts [--save]

Covers every op of FastVLM-0.5B's catalog at 1024 pixels in float16, in the launch shapes of two families of chips.
Convolutions run on the channels of one threadgroup and attention on one head: threadgroups of other channels and heads do
the same work on other data, so counts are multiplied by their number, exactly. Other ops run in full.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlx_fastvlm.benchmarks.random_model import random_config
from mlx_fastvlm.benchmarks.report import format_table, save_json
from mlx_fastvlm.kernels.catalog import Case, cases
from mlx_fastvlm.kernels.launch_table import default_launch
from tests.metal_emulator import emulated
from tests.metal_emulator.counts import LARGEST, Counts, total

RESULT = Path("benchmarks", "results", "kernel-counts.json")
PROMPT_TOKENS = 280
FAMILIES = ("M2", "M4")  # the first stands for M1 too, the second for M3 and M5: see kernels/launch_table.py


@dataclass(frozen=True)
class Counted:
    """A case with the counts of one call.

    Attributes:
        case: the op in one shape.
        counts: of all its launches.
        launches: how many they are.
        repeated: by how many the counted work was multiplied.
    """

    case: Case
    counts: Counts
    launches: int
    repeated: int


def count(case: Case, family: str, dtype: mx.Dtype = mx.float16) -> Counted:
    """Run a case's kernel in the emulator, in the launch shape of a family of chips ("M1" to "M5"), and count."""
    launch = launch_shape(case, family, dtype)
    part, repeated = one_of_equal_parts(case, launch)
    with emulated(mode="count") as session:
        mx.eval(*part.fused(*part.arrays(dtype), launch=launch))
    counted = [launch.counts for launch in session.launches]
    return Counted(case, multiplied(total(counted), repeated), len(counted), repeated)


def launch_shape(case: Case, family: str, dtype: mx.Dtype = mx.float16) -> dict[str, int]:
    """The launch shape that a family of chips takes without tuning; no array is computed."""
    candidates = case.fused_op.launches(*case.arrays(dtype), **case.options)
    return default_launch(case.op, family, candidates)


def one_of_equal_parts(case: Case, launch: dict[str, int]) -> tuple[Case, int]:
    """The part of a case that one column of threadgroups computes, and how many such parts there are."""
    if case.op in ("depthwise_conv", "depthwise_pair"):
        channels, width = case.shapes[0][-1], 4 * launch["lanes"]
        parts = channels // width if channels % width == 0 else 1
        return replace(case, shapes=tuple(_narrowed(shape, channels, parts) for shape in case.shapes)), parts
    if case.op == "self_attention":
        (batch, tokens, width), head_dim = case.shapes[0], case.options["head_dim"]
        return replace(case, shapes=((batch, tokens, 3 * head_dim),)), width // 3 // head_dim
    return case, 1


def multiplied(counts: Counts, factor: int) -> Counts:
    """The counts of `factor` equal launches side by side in one."""
    return Counts(**{name: n if name in LARGEST else n * factor for name, n in asdict(counts).items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    args = parser.parse_args()
    counted = [
        (family, count(case, family))
        for family in FAMILIES
        for case in cases(random_config("0.5b"), 1024, PROMPT_TOKENS)
        if not case.fused_op.tuned_only
    ]
    header = ["op", "shape", "family", "calls", "launches", "MB unique", "MB per group", "MFLOP"]
    print(format_table(header, [_row(family, result) for family, result in counted]))
    if args.save:
        entries = [_entry(family, result) for family, result in counted]
        save_json(RESULT, {"benchmark": "kernel-counts", "dtype": "float16", "cases": entries})
    print(json.dumps({"cases": len(counted)}))


def _narrowed(shape: tuple[int, ...], channels: int, parts: int) -> tuple[int, ...]:
    """A map, weight or bias of a convolution for `channels` / `parts` of its input channels."""
    if len(shape) == 4 and shape[-1] == channels:
        return (*shape[:-1], channels // parts)
    return (shape[0] // parts, *shape[1:])


def _row(family: str, counted: Counted) -> list[str]:
    counts = counted.counts
    unique = counts.device_bytes_read_unique + counts.device_bytes_written_unique
    per_group = counts.device_bytes_read_per_group + counts.device_bytes_written_per_group
    megabytes = (f"{nbytes / 1e6:.2f}" for nbytes in (unique, per_group))
    case = counted.case
    calls = [str(case.count), str(counted.launches)]
    return [case.op, case.label, family, *calls, *megabytes, f"{counts.flops / 1e6:.1f}"]


def _entry(family: str, counted: Counted) -> dict:
    case = counted.case
    return {
        "op": case.op,
        "shape": case.label,
        "family": family,
        "calls": case.count,
        "launches": counted.launches,
        "multiplied_by": counted.repeated,
        "counts": asdict(counted.counts),
    }


if __name__ == "__main__":
    main()
