"""What the benchmarks' command lines share: common options, the order of output, errors as one line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx_fastvlm.errors import FastVLMError

from .machine import describe_machine, machine_line
from .report import save_json

DEFAULT_PROMPT = "Describe this image."

Measure = Callable[[argparse.Namespace], tuple[str, dict[str, Any]]]  # → (table, result)


class BenchmarkError(FastVLMError):
    """A measurement cannot be taken, or would not mean what it says."""


def make_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help is the benchmark's docstring, with the options every benchmark has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m mlx_fastvlm.benchmarks.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--save",
        metavar="NAME",
        nargs="?",
        const=name,
        help=f"also write benchmarks/results/NAME.json under the current folder (NAME: {name})",
    )
    return parser


def add_picture(parser: argparse.ArgumentParser) -> None:
    """--image, which every benchmark that answers a question has."""
    parser.add_argument("--image", metavar="FILE", type=Path, help="picture (default: a generated 1280x960 PNG)")


def at_least_one(text: str) -> int:
    """argparse type of counts."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("expected 1 or more")
    return number


def installed_command() -> Path:
    """The `mlx-fastvlm` of this environment. Raises BenchmarkError if the package is not installed."""
    command = Path(sys.executable).parent / "mlx-fastvlm"
    if not command.exists():
        raise BenchmarkError(f"There is no {command}; install the package (pip install -e .) in this environment.")
    return command


def run(name: str, parser: argparse.ArgumentParser, measure: Measure, argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print the table and, last, one JSON line; save it if asked. Leaves through SystemExit."""
    args = parser.parse_args(argv)
    try:
        machine = describe_machine()
        table, result = measure(args)
        result = {"benchmark": name, "machine": machine, **result}
        print(f"{machine_line(machine)}\n\n{table}\n")
        if args.save:
            path = Path("benchmarks", "results", f"{args.save}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            save_json(path, result)
            print(f"Saved: {path}")
        print(json.dumps(result, ensure_ascii=False))
    except FastVLMError as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)


def progress(text: str) -> None:
    """One line on stderr about what is going on."""
    print(text, file=sys.stderr, flush=True)
