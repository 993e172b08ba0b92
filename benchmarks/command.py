"""What the benchmarks' command lines share: common options, the order of output, errors as one line."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mlx_fastvlm.errors import FastVLMError

from . import COMMANDS
from .machine import describe_machine, load_average, machine_line
from .report import save_json

DEFAULT_PROMPT = "Describe this image."

Measure = Callable[[argparse.Namespace], tuple[str, dict[str, Any]]]  # → (table, result)


class BenchmarkError(FastVLMError):
    """A measurement cannot be taken, or would not mean what it says."""


class _Parser(argparse.ArgumentParser):
    """argparse with the command line's manners: a wrong option is one line on stderr and exit code 1."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: {message}. See: {self.prog} --help\n")


def make_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help is the benchmark's docstring, with the options every benchmark has."""
    command = name.replace("_", "-")
    parser = _Parser(
        prog=f"mlx-fastvlm bench {command}" if command in COMMANDS else f"python -m mlx_fastvlm.benchmarks.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--save",
        metavar="NAME",
        nargs="?",
        const=name,
        type=_result_name,
        help=f"also write benchmarks/results/NAME.json under the current folder (NAME: {name})",
    )
    return parser


def _result_name(text: str) -> str:
    """argparse type of --save."""
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError("expected a plain name: letters, digits, dots, dashes")
    return text


def add_picture(parser: argparse.ArgumentParser) -> None:
    """--image, which every benchmark that answers a question has."""
    parser.add_argument("--image", metavar="FILE", type=Path, help="picture (default: a generated 1280x960 PNG)")


def at_least_one(text: str) -> int:
    """argparse type of counts."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("expected 1 or more")
    return number


def zero_or_more(text: str) -> int:
    """argparse type of counts that may be none."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("expected 0 or more")
    return number


def positive_multiple_of(step: int) -> Callable[[str], int]:
    """argparse type of sizes that come in steps."""

    def size(text: str) -> int:
        number = int(text)
        if number < step or number % step:
            raise argparse.ArgumentTypeError(f"expected a positive multiple of {step}")
        return number

    return size


def installed_command() -> Path:
    """The `mlx-fastvlm` of this environment. Raises BenchmarkError if the package is not installed."""
    command = Path(sys.executable).parent / "mlx-fastvlm"
    if not command.exists():
        raise BenchmarkError(f"There is no {command}; install the package (pip install -e .) in this environment.")
    return command


def run(name: str, parser: argparse.ArgumentParser, measure: Measure, argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print the table and, last, one JSON line; save it if asked.

    What `measure` hands back with "interrupted": True was cut short by Ctrl-C, with "error": message by something else:
    it is shown, but not saved.
    Leaves through SystemExit: 1 for what the user can mend, 130 after Ctrl-C.
    """
    args = parser.parse_args(argv)
    try:
        path = Path("benchmarks", "results", f"{args.save}.json") if args.save else None
        if path is not None:
            _check_place(path)
        machine = describe_machine()
        table, result = measure(args)
        machine["load_average_after"] = load_average()
        result = {"benchmark": name, "machine": machine, **result}
        print(f"{machine_line(machine)}\n\n{table}\n")
        interrupted, error = result.get("interrupted", False), result.get("error")
        if path is not None and not interrupted and error is None:
            error = _save(path, result)
        print(json.dumps(result, ensure_ascii=False), flush=True)
        if interrupted:
            raise KeyboardInterrupt
        if error is not None:
            raise BenchmarkError(error)
    except FastVLMError as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)


def _check_place(path: Path) -> None:
    """Refuse a result that could not be saved, before anything is measured for it; makes no folder yet."""
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise BenchmarkError(
            f"{path} cannot be saved: {place} takes no files; go to another folder or leave --save out."
        )


def _save(path: Path, result: dict[str, Any]) -> str | None:
    """Write the result. Returns None, or why it could not be written: what was measured is to be shown all the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_json(path, result)
    except OSError as error:
        return f"{path} cannot be saved ({error.strerror or error}); the result is in the JSON line."
    print(f"Saved: {path}")
    return None


def progress(text: str) -> None:
    """One line on stderr about what is going on."""
    print(text, file=sys.stderr, flush=True)
