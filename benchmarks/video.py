"""Video: frames described per second, frames dropped, and whether memory grows.

A generated clip of 256x256 pixels at 30 frames/s: a scene of colored shapes a second, which drifts, so that no frame is
like the one before. Every frame is to be described; none keeps the last one's description.

  file  the clip as a file, over and over: frames wait and are described in batches (`describe_frames`)
  live  the clip as a camera would give it, in real time and over and over: always the newest frame is described, and
        those that come meanwhile are dropped (`describe_newest`)
  live-4  the same, but the newest four, together

Timed after a first run that is not counted; decoding the video is part of it. Resident memory is looked at every few
seconds: what it is in the last tenth of a run stands beside what it was in the second tenth.

  mlx-fastvlm bench video
  mlx-fastvlm bench video --seconds 600
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fastvlm import load
from mlx_fastvlm.loading import DEMO
from mlx_fastvlm.video import ChangeGate, FrameCaption, NewestFrame, Pace, describe_frames, describe_newest, open_video
from mlx_fastvlm.video.frame import Frame
from mlx_fastvlm.video.reader import check_available
from mlx_fastvlm.video.source import parse_source

from .caption_pictures import SIZES, draw_scene
from .command import DEFAULT_PROMPT, at_least_one, make_parser, progress, run
from .machine import resident_bytes
from .report import format_table
from .ttft import resolve_aside

KINDS = ("file", "live", "live-4")
RATE = 30  # frames a second
LEAST_RATE = 15.0  # described a second
MOST_GROWTH = 1.05  # of memory

_CLIP_SECONDS = 20
_DRIFT = 2  # pixels a frame
_WARM_UP = 2.0  # seconds
_SAMPLES = 60  # of memory, in a run


@dataclass(frozen=True)
class Sample:
    """What was held after so many seconds, in bytes: resident, by MLX's arrays, and freed ones that MLX keeps."""

    seconds: float
    described: int
    rss: int
    mlx_active: int
    mlx_cache: int


def measure(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """See the top of this file."""
    check_available()
    progress(f"Preparing {args.model}.")
    model, processor = load(resolve_aside(args.model), dtype=args.dtype)
    options = {"max_tokens": args.max_tokens}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mlx-fastvlm-") as folder:
        clip = _write_clip(Path(folder) / "clip.mp4")

        def from_file(seconds: float) -> dict[str, Any]:
            frames = _until(seconds, _over_and_over(clip))
            captions = describe_frames(model, processor, frames, args.prompt, gate=ChangeGate(0.0), **options)
            return _watch(captions, seconds)

        def live(keep: int, seconds: float) -> dict[str, Any]:
            frames = _in_real_time(_over_and_over(clip))
            newest = NewestFrame(frames, Pace(0.0), str(clip), keep=keep, end=seconds)
            try:
                captions = describe_newest(model, processor, newest, args.prompt, gate=ChangeGate(0.0), **options)
                result = _watch(captions, seconds)
            finally:
                newest.close()
            return result | {"arrived": newest.arrived, "dropped": newest.dropped}

        kinds = {"file": from_file, "live": partial(live, 1), "live-4": partial(live, 4)}
        for name in args.kinds:
            progress(f"{name}: {args.seconds:g} s.")
            kinds[name](_WARM_UP)
            results[name] = kinds[name](args.seconds)
    return _report(results), {
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "prompt": args.prompt,
        "max_tokens": args.max_tokens,
        "clip": {"side": SIZES[0][0], "rate": RATE, "codec": "h264"},
        "least_rate": LEAST_RATE,
        "most_growth": MOST_GROWTH,
        "kinds": results,
    }


def _watch(captions: Iterator[FrameCaption], seconds: float) -> dict[str, Any]:
    """Take all descriptions; what they are like, how long they took, and what was held meanwhile."""
    start, due = time.monotonic(), 0.0
    samples: list[Sample] = []
    latencies: list[float] = []
    described = tokens = 0
    for caption in captions:
        described += 1
        tokens += caption.tokens
        if caption.latency is not None:
            latencies.append(caption.latency)
        passed = time.monotonic() - start
        if passed >= due:
            samples.append(_sample(passed, described))
            due += seconds / _SAMPLES
    passed = time.monotonic() - start
    return {
        "described": described,
        "seconds": passed,
        "described_per_second": described / passed,
        "tokens_per_description": tokens / max(1, described),
        "latency": _spread(latencies),
        "growth": _growth(samples),
        "samples": [asdict(sample) for sample in samples],
    }


def _sample(seconds: float, described: int) -> Sample:
    rss = resident_bytes(os.getpid()) or 0
    return Sample(seconds, described, rss, mx.get_active_memory(), mx.get_cache_memory())


def _spread(latencies: Sequence[float]) -> dict[str, float] | None:
    """Median, 95th percentile and largest, in seconds."""
    if len(latencies) < 2:
        return None
    percentiles = statistics.quantiles(latencies, n=20)
    return {"median": statistics.median(latencies), "p95": percentiles[-1], "max": max(latencies)}


def _growth(samples: Sequence[Sample]) -> float | None:
    """Resident memory of the last tenth over that of the second; None for too few samples."""
    tenth = len(samples) // 10
    if not tenth:
        return None
    early, late = (
        statistics.median(sample.rss for sample in part) for part in (samples[tenth : 2 * tenth], samples[-tenth:])
    )
    return late / early


def _write_clip(path: Path) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height = SIZES[0]
        stream.pix_fmt = "yuv420p"
        for number in range(_CLIP_SECONDS * RATE):
            second, frame = divmod(number, RATE)
            pixels = np.roll(draw_scene(len(SIZES) * second), _DRIFT * frame, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def _over_and_over(clip: Path) -> Iterator[Frame]:
    source = parse_source(str(clip))
    while True:
        with open_video(source) as video:
            yield from video.frames()


def _until(seconds: float, frames: Iterator[Frame]) -> Iterator[Frame]:
    end = time.monotonic() + seconds
    for frame in frames:
        if time.monotonic() >= end:
            return
        yield frame


def _in_real_time(frames: Iterator[Frame]) -> Iterator[Frame]:
    """As a camera gives them: one every 1/30 s, whether somebody takes it or not."""
    due = time.monotonic()
    for frame in frames:
        time.sleep(max(0.0, due - time.monotonic()))
        due += 1 / RATE
        yield frame


def _report(results: dict[str, Any]) -> str:
    header = [
        "",
        "described",
        "frames/s",
        "dropped",
        "latency ms (p95)",
        "RSS MB: second tenth",
        "last tenth",
        "growth",
    ]
    table = format_table(header, [_row(name, result) for name, result in results.items()])
    rates = {name: result["described_per_second"] >= LEAST_RATE for name, result in results.items()}
    growths = {
        name: result["growth"] <= MOST_GROWTH for name, result in results.items() if result["growth"] is not None
    }
    return (
        f"{table}\n"
        f"At least {LEAST_RATE:g} frames/s: {_verdicts(rates)}\n"
        f"Memory at most {MOST_GROWTH:.2f} times: {_verdicts(growths)}"
    )


def _row(name: str, result: dict[str, Any]) -> list[str]:
    latency, rss = result["latency"], [sample["rss"] / 1e6 for sample in result["samples"]]
    tenth = max(1, len(rss) // 10)
    return [
        name,
        f"{result['described']:,}",
        f"{result['described_per_second']:.1f}",
        f"{result['dropped']:,}" if "dropped" in result else "",
        f"{1e3 * latency['median']:.0f} ({1e3 * latency['p95']:.0f})" if latency else "",
        f"{statistics.median(rss[tenth : 2 * tenth] or rss):,.1f}",
        f"{statistics.median(rss[-tenth:]):,.1f}",
        f"{result['growth']:.3f}" if result["growth"] is not None else "",
    ]


def _verdicts(holds: dict[str, bool]) -> str:
    return ", ".join(f"{name} {'yes' if yes else 'NO'}" for name, yes in holds.items()) or "too short to say"


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("video", __doc__)
    parser.add_argument("--model", default=DEMO, help='"demo" (default), a model or checkpoint folder, or a hub id')
    parser.add_argument("--dtype", default="float32", help="type to compute in (float32)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of those above (all)")
    parser.add_argument("--seconds", metavar="N", type=at_least_one, default=30, help="of each kind (30)")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help=f'question ("{DEFAULT_PROMPT}")')
    parser.add_argument("--max-tokens", metavar="N", type=at_least_one, default=64, help="longest description (64)")
    run("video", parser, measure, argv)


if __name__ == "__main__":
    main()
