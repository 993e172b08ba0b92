"""Conversion: how long a checkpoint takes and how much memory, against a limit that must not grow with the model.

Runs the installed `mlx-fastvlm convert` in a process of its own into a folder that is deleted afterwards, and reads
that process's peak resident memory from the system.

  python -m tests.reference.hub_checkpoint random-7b --config 7b --shards 4      (from the repository root)
  python -m mlx_fastvlm.benchmarks.conversion random-7b --save conversion-7b
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_fastvlm.loading import DTYPES

from .command import BenchmarkError, at_least_one, installed_command, make_parser, progress, run
from .machine import child_rss_bytes
from .report import Summary, format_table

LIMIT_GB = 4.0


def measure(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """See the top of this file."""
    if not args.checkpoint.is_dir():
        raise BenchmarkError(f"{args.checkpoint} is not a folder; give a checkpoint in the hub's layout.")
    stored = sum(path.stat().st_size for path in args.checkpoint.glob("*.safetensors"))
    runs = []
    for turn in range(args.repeat):
        runs.append(time_conversion(args.checkpoint, args.dtype, args.quantize, args.work))
        progress(f"{turn + 1}/{args.repeat}: {runs[-1][0]:.1f} s, {runs[-1][1] / 1e9:.2f} GB")
    seconds, peaks = (Summary.of(values) for values in zip(*runs, strict=True))
    verdict = "within" if peaks.high < LIMIT_GB * 1e9 else "ABOVE"
    rows = [["time, s", *seconds.cells(digits=2)], ["peak memory, GB", *peaks.cells(1e-9, digits=2)]]
    recipe = f" -q {args.quantize}" if args.quantize else ""
    title = f"convert {args.checkpoint.resolve().name}{recipe}, {stored / 1e9:.2f} GB stored"
    table = format_table([title, "median", "min-max"], rows)
    return f"{table}\nPeak memory is {verdict} the limit of {LIMIT_GB:g} GB.", {
        "checkpoint": args.checkpoint.resolve().name,
        "dtype": args.dtype,
        "quantize": args.quantize,
        "stored_bytes": stored,
        "seconds": seconds.to_dict(),
        "peak_rss_bytes": peaks.to_dict(),
        "limit_bytes": int(LIMIT_GB * 1e9),
        "within_limit": peaks.high < LIMIT_GB * 1e9,
    }


def time_conversion(
    checkpoint: Path, dtype: str | None, recipe: str | None = None, work: Path | None = None
) -> tuple[float, int]:
    """(seconds, peak resident bytes) of one conversion by the command line.

    Args:
        checkpoint: folder in the hub's layout.
        dtype: type to store; None keeps the checkpoint's.
        recipe: how to quantize on the way; None does not.
        work: folder with room for the result; None is the system's temporary folder.

    Raises:
        BenchmarkError: the conversion fails; its own message is repeated.
    """
    if work is not None and not work.is_dir():
        raise BenchmarkError(f"{work} is not a folder; make it first.")
    with tempfile.TemporaryDirectory(prefix="mlx-fastvlm-", dir=work) as folder, tempfile.TemporaryFile() as complaints:
        command = [str(installed_command()), "convert", str(checkpoint), str(Path(folder) / "converted")]
        command += ["--dtype", dtype] if dtype else []
        command += ["--quantize", recipe] if recipe else []
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=complaints)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            complaints.seek(0)
            lines = complaints.read().decode(errors="replace").strip().splitlines()
            raise BenchmarkError(f"convert failed: {lines[-1] if lines else f'exit code {process.returncode}'}")
    # Linux counts from this process's own size at the fork, some 0.1 GB: below what any real checkpoint needs.
    return seconds, child_rss_bytes(usage)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("conversion", __doc__)
    parser.add_argument("checkpoint", metavar="FOLDER", type=Path, help="checkpoint in the hub's layout")
    parser.add_argument("--dtype", choices=DTYPES, help="type to store (default: the checkpoint's)")
    parser.add_argument("--quantize", metavar="RECIPE", help="quantize on the way (default: no)")
    parser.add_argument("--work", metavar="FOLDER", type=Path, help="where the results go until they are deleted")
    parser.add_argument("--repeat", metavar="N", type=at_least_one, default=1, help="conversions (1)")
    run("conversion", parser, measure, argv)


if __name__ == "__main__":
    main()
