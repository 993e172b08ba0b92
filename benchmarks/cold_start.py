"""Cold start: from the start of a process to the first character of an answer.

Measured on the installed command, as a user runs it:
  describe  `mlx-fastvlm describe IMAGE` from exec to the first character on stdout, and to the exit
  import    `import mlx_fastvlm` in a fresh interpreter less a bare interpreter, taken in turns
  modules   which heavy packages `describe` has loaded by its end: there should be none

Files are in the system's cache: one run before the first is not counted.

  mlx-fastvlm bench cold-start
  mlx-fastvlm bench cold-start --model ./converted --image photo.jpg --repeat 15 --save
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .child import code_command
from .command import BenchmarkError, add_picture, at_least_one, installed_command, make_parser, progress, run
from .picture import picture_file
from .report import Summary, format_table

HEAVY_MODULES = ("torch", "transformers", "mlx_lm", "huggingface_hub", "httpx")
_LIST_MODULES = """
import json, sys
from mlx_fastvlm.cli import main
heavy, sys.argv = json.loads(sys.argv[1]), ["mlx-fastvlm", *sys.argv[2:]]
try:
    main()
finally:
    print(json.dumps([name for name in heavy if name in sys.modules]))
"""


def measure(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """See the top of this file."""
    with picture_file(args.image) as picture:
        describe = ["describe", str(picture), "--model", args.model, "--max-tokens", str(args.max_tokens)]
        command = [str(installed_command()), *describe]
        progress("One run that is not counted, then the others.")
        time_answer(command)
        answers = [time_answer(command) for _ in range(args.repeat)]
        modules = loaded_modules(describe)
    imports, bare = import_times(args.repeat)

    first, last = (Summary.of(times) for times in zip(*answers, strict=True))
    rows = [
        ["process start to first character, ms", *first.cells(1e3)],
        ["process start to exit, ms", *last.cells(1e3)],
        ["import mlx_fastvlm, less a bare interpreter, ms", *imports.cells(1e3)],
        ["bare interpreter, ms", *bare.cells(1e3)],
    ]
    table = format_table([f"cold start, model {Path(args.model).name}", "median", "min-max"], rows)
    return f"{table}\nHeavy modules loaded by describe: {', '.join(modules) or 'none'}", {
        "model": Path(args.model).name,
        "max_tokens": args.max_tokens,
        "first_character_s": first.to_dict(),
        "exit_s": last.to_dict(),
        "import_s": imports.to_dict(),
        "bare_interpreter_s": bare.to_dict(),
        "heavy_modules": modules,
    }


def time_answer(command: Sequence[str]) -> tuple[float, float]:
    """Seconds from before exec to the first byte on stdout, and to the exit.

    Raises:
        BenchmarkError: the command fails or says nothing.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        try:
            answer = process.stdout.read(1)
            first = time.perf_counter() - start
            rest, complaints = process.communicate()
        except BaseException:
            process.kill()
            raise
    last = time.perf_counter() - start
    complaint = complaints.decode(errors="replace")
    if process.returncode != 0:
        reason = complaint.strip().splitlines()[-1] if complaint.strip() else f"exit code {process.returncode}"
        raise BenchmarkError(f"describe failed: {reason}")
    if not (answer + rest).strip():  # the line's end comes in any case
        raise BenchmarkError("describe said nothing; ask for more tokens.")
    return first, last


def import_times(repeat: int) -> tuple[Summary, Summary]:
    """(import less bare interpreter, bare interpreter) in seconds, one of each in turn."""
    pairs = [(_time_python("import mlx_fastvlm"), _time_python("pass")) for _ in range(repeat)]
    return Summary.of([full - bare for full, bare in pairs]), Summary.of([bare for _, bare in pairs])


def loaded_modules(arguments: Sequence[str]) -> list[str]:
    """Which of HEAVY_MODULES are loaded when the command line with these arguments is done."""
    command = code_command(_LIST_MODULES, json.dumps(HEAVY_MODULES), *arguments)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchmarkError(f"describe failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _time_python(code: str) -> float:
    start = time.perf_counter()
    subprocess.run(code_command(code), check=True)
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("cold_start", __doc__)
    parser.add_argument("--model", default="demo", help='"demo" (default), a model folder or a hub id')
    add_picture(parser)
    parser.add_argument("--max-tokens", metavar="N", type=at_least_one, default=16, help="length of the answer (16)")
    parser.add_argument("--repeat", metavar="N", type=at_least_one, default=9, help="counted runs (9)")
    run("cold_start", parser, measure, argv)


if __name__ == "__main__":
    main()
