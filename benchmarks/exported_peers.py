"""What the benchmarks share that give a peer our model: their options, and the start of all who take part.

`peers` goes the other way: there everyone reads one checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlx_fastvlm.loading import DEMO, DTYPES

from .command import BenchmarkError, at_least_one, progress
from .peer_folders import export_to_mlx_vlm
from .peers import OURS
from .runner_process import RunnerProcess, Unavailable

_MLX_VLM = "mlx-vlm"


def add_options(parser: argparse.ArgumentParser, peers: tuple[str, ...], default: tuple[str, ...]) -> None:
    """Model, peers, type, device, BLAS, folder, rounds."""
    parser.add_argument(
        "model", nargs="?", default=DEMO, help='"demo" (default), a model or checkpoint folder, or a hub id'
    )
    parser.add_argument("--peers", nargs="*", choices=peers, default=default, help=f"whom ({' '.join(default)})")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type that all compute in (float32)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="MLX's default, or the CPU (auto)")
    parser.add_argument("--peer-python", metavar="PATH", default=sys.executable, help="has mlx-vlm and this package")
    parser.add_argument("--blas", choices=("auto", "off"), default="auto", help="of all (auto)")
    parser.add_argument("--work", metavar="FOLDER", type=Path, help="keep what is exported here for the next time")
    parser.add_argument("--repeat", metavar="N", type=at_least_one, default=5, help="counted rounds (5)")
    parser.add_argument(
        "--slow-repeat", metavar="N", type=at_least_one, default=1, help="counted rounds of peers on a CPU (1)"
    )


def start_all(
    kind: str,
    ours: tuple[str, ...],
    model: Path,
    work: Path,
    stack: ExitStack,
    args: argparse.Namespace,
    skipped: dict[str, str],
    **options: Any,
) -> dict[str, RunnerProcess]:
    """Load everyone, each in a process of its own.

    Args:
        kind: the benchmark, as its runners' names begin.
        ours: this package's sides.
        model: converted folder.
        work: where it is exported to for mlx-vlm.
        stack: ends the processes.
        args: of `add_options`.
        skipped: filled with peers that cannot run here, name → reason.
        options: more for the runners.

    Raises:
        BenchmarkError: one of ours cannot run.
    """
    runners = {}
    for name in (*ours, *args.peers):
        progress(f"Loading {name}.")
        try:
            runners[name] = stack.enter_context(_start(kind, name, model, work, args, options))
        except (Unavailable, BenchmarkError) as error:
            if name.startswith(OURS):
                raise BenchmarkError(str(error)) from None
            skipped[name] = str(error)
            progress(f"Skipping {name}: {error}")
    return runners


def _start(
    kind: str, name: str, model: Path, work: Path, args: argparse.Namespace, more: Mapping[str, Any]
) -> RunnerProcess:
    """One side, loading. Raises Unavailable: a library is missing, or the interpreter is."""
    python, folder = sys.executable, model
    if name.startswith(_MLX_VLM):
        python = args.peer_python
        folder = export_to_mlx_vlm(model, work / f"{model.name}-{args.dtype}-{_MLX_VLM}", args.dtype)
    options = {"folder": str(folder.resolve()), "dtype": args.dtype, "device": args.device, "blas": args.blas, **more}
    return RunnerProcess(f"{kind}-{name}", python, options)
