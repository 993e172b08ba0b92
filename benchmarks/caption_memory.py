"""Caption memory: whether memory grows while thousands of pictures are captioned.

Generated pictures, no two alike and in many sizes, are captioned by one process, whose resident memory is looked at as
it goes. What it holds after all of them stands beside what it held after a tenth: each figure is the median over the
last tenth of the pictures up to there.

  --through command  the installed `mlx-fastvlm caption FOLDER --out FILE`, watched from outside (default)
  --through python   a loop over `caption_images`, which also tells what MLX holds

After Ctrl-C, or where the process fails, what was seen until then is shown.

  mlx-fastvlm bench caption-memory
  mlx-fastvlm bench caption-memory --images 2000 --through python
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_fastvlm.loading import DEMO

from .caption_pictures import write_pictures
from .child import module_command
from .command import BenchmarkError, at_least_one, installed_command, make_parser, progress, run
from .machine import resident_bytes
from .report import format_table
from .ttft import resolve_aside

LIMIT = 1.05  # of the memory after a tenth of the pictures
_TENTHS = (1, 2, 5, 10)  # of the pictures: the rows of the table
_BYTES = ("rss", "mlx_active", "mlx_cache")
_POLL_SECONDS = 0.05
_MOST_SAMPLES = 500  # asked of the loop, and kept in the result
_LEAST_IMAGES = 100  # growth is not to be seen in fewer


@dataclass(frozen=True)
class Sample:
    """What was held when so many pictures were captioned, in bytes.

    Attributes:
        done: pictures.
        rss: resident in the process.
        mlx_active, mlx_cache: what MLX's arrays take, and what it keeps of freed ones; None from outside.
    """

    done: int
    rss: int
    mlx_active: int | None = None
    mlx_cache: int | None = None


def measure(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """See the top of this file."""
    if args.images < _LEAST_IMAGES:
        raise BenchmarkError(f"--images is {args.images}; growth shows in {_LEAST_IMAGES} pictures or more.")
    progress(f"Preparing {args.model}.")
    model = resolve_aside(args.model)
    samples: list[Sample] = []
    cut_short: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mlx-fastvlm-") as folder:
        pictures = _pictures(Path(folder, "pictures"), args.images)
        start = time.perf_counter()
        try:
            with closing(_THROUGH[args.through](model, pictures, args)) as coming:
                for sample in coming:
                    _tell(sample, samples[-1].done if samples else 0, args.images)
                    samples.append(sample)
            _check_all_done(samples, args.images)
        except (KeyboardInterrupt, BenchmarkError) as error:
            if not samples:
                raise
            cut_short = {"interrupted": True} if isinstance(error, KeyboardInterrupt) else {"error": str(error)}
        seconds = time.perf_counter() - start
    growth = growth_of(samples)
    return _report(samples, growth, seconds), {
        "model": Path(args.model).name,
        "through": args.through,
        "images": args.images,
        "seconds": seconds,
        "limit": LIMIT,
        "growth": growth,
        "within_limit": growth is not None and growth <= LIMIT,
        "held": {done: asdict(held(samples, done)) for done in _marks(samples)},
        "samples": [asdict(sample) for sample in _thinned(samples)],
        **cut_short,
    }


def held(samples: Sequence[Sample], done: int) -> Sample:
    """What was held around `done` pictures: medians over the last tenth of the samples up to there."""
    window = [sample for sample in samples if 0.9 * done < sample.done <= done]

    def median(values: Sequence[int | None]) -> int | None:
        return None if None in values else int(statistics.median(values))

    return Sample(done, *(median([getattr(sample, name) for sample in window]) for name in _BYTES))


def growth_of(samples: Sequence[Sample]) -> float | None:
    """Memory at the end over that after a tenth of the pictures; None where they are too few to tell."""
    marks = _marks(samples)
    return held(samples, marks[-1]).rss / held(samples, marks[0]).rss if len(marks) > 1 else None


def _marks(samples: Sequence[Sample]) -> list[int]:
    """The tenths of what was captioned at which there are samples."""
    last = samples[-1].done
    marks = dict.fromkeys(last * tenth // 10 for tenth in _TENTHS)
    return [done for done in marks if any(0.9 * done < sample.done <= done for sample in samples)]


def _pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number, _ in enumerate(write_pictures(folder, count), start=1):
        if number % 1000 == 0 or number == count:
            progress(f"{number:,} of {count:,} pictures written.")
    return folder


def _tell(sample: Sample, told: int, images: int) -> None:
    step = max(1, images // 20)
    if sample.done // step > told // step:
        progress(f"{sample.done:,} of {images:,}: {sample.rss / 1e6:,.1f} MB")


def _check_all_done(samples: Sequence[Sample], images: int) -> None:
    done = samples[-1].done if samples else 0
    if done != images:
        raise BenchmarkError(f"{done} of {images} pictures have a caption.")


def _watch_command(model: Path, pictures: Path, args: argparse.Namespace) -> Iterator[Sample]:
    """The command line, watched from outside: its rows are counted as they are written."""
    out = pictures.parent / "captions.jsonl"
    command = [str(installed_command()), "caption", str(pictures), "--out", str(out), "--model", str(model)]
    command += ["--batch-size", str(args.batch_size)]
    rows, last = _RowCount(out), Sample(0, 0)
    with tempfile.TemporaryFile() as words, subprocess.Popen(command, stdout=words, stderr=words) as process:
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                sample = Sample(rows.update(), resident_bytes(process.pid) or last.rss)
                if sample.done > last.done:
                    last = sample
                    yield sample
            if process.returncode:
                words.seek(0)
                raise BenchmarkError(_why(process.returncode, words.read().decode(errors="replace")))
            if rows.update() > last.done:
                yield Sample(rows.update(), last.rss)
        finally:
            process.kill()


class _RowCount:
    """Lines of a file that grows."""

    def __init__(self, path: Path):
        self._path, self._read, self._rows = path, 0, 0

    def update(self) -> int:
        """How many there are now."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            return 0
        self._read += len(new)
        self._rows += new.count(b"\n")
        return self._rows


def _ask_python(model: Path, pictures: Path, args: argparse.Namespace) -> Iterator[Sample]:
    """`caption_images` in a process of its own, which tells what it holds."""
    request = json.dumps([str(model), str(pictures), args.batch_size, max(1, args.images // _MOST_SAMPLES)])
    command = module_command("mlx_fastvlm.benchmarks.caption_memory_child", request)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                reply = json.loads(line)
                if "error" in reply:
                    raise BenchmarkError(reply["error"])
                yield Sample(**reply)
            if process.wait():
                raise BenchmarkError(_why(process.returncode, "its own words are above"))
        finally:
            process.kill()


_THROUGH: dict[str, Callable[[Path, Path, argparse.Namespace], Iterator[Sample]]] = {
    "command": _watch_command,
    "python": _ask_python,
}


def _why(returncode: int, words: str) -> str:
    """Why the captioning process failed, given what it said last."""
    if returncode == -signal.SIGKILL:
        return "The captioning process was killed, probably for want of memory."
    lines = words.strip().splitlines() or [f"exit code {returncode}"]
    return f"Captioning failed: {lines[-1]}"


def _thinned(samples: Sequence[Sample]) -> Sequence[Sample]:
    """At most so many as a result should hold, evenly, the last one among them."""
    step = -(-len(samples) // _MOST_SAMPLES)
    return samples[::-1][::step][::-1]


def _report(samples: Sequence[Sample], growth: float | None, seconds: float) -> str:
    header = ["pictures", "resident MB", "MLX's arrays", "MLX's freed"]
    rows = [[f"{done:,}", *_cells(held(samples, done))] for done in _marks(samples)]
    text = format_table(header, rows)
    done = samples[-1].done
    text += f"\n{done:,} pictures in {seconds:,.0f} s, {done / seconds:.1f} a second, start and loading included."
    if growth is None:
        return f"{text}\nToo few pictures to see growth."
    word = "within" if growth <= LIMIT else "NOT within"
    return (
        f"{text}\nAfter all of them {growth:.3f} times what it was after a tenth: {word} the limit, {LIMIT:.2f} times."
    )


def _cells(sample: Sample) -> list[str]:
    values = [getattr(sample, name) for name in _BYTES]
    return ["" if value is None else f"{value / 1e6:,.1f}" for value in values]


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("caption_memory", __doc__)
    parser.add_argument("--model", default=DEMO, help='"demo" (default), a model or checkpoint folder, or a hub id')
    parser.add_argument("--images", metavar="N", type=at_least_one, default=10000, help="pictures (10000)")
    parser.add_argument("--through", choices=_THROUGH, default="command", help="the command or Python (command)")
    parser.add_argument("--batch-size", metavar="N", type=at_least_one, default=16, help="as caption has it (16)")
    run("caption_memory", parser, measure, argv)


if __name__ == "__main__":
    main()
