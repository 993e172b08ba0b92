"""A run over one video: has its frames described, takes each description to where it belongs, and says what became of
them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fastvlm.captions.captioning import DEFAULT_BATCH_SIZE
from mlx_fastvlm.captions.rows import Recipe
from mlx_fastvlm.cli.options import given_settings
from mlx_fastvlm.cli.terminal import DType, counting, load_model, say, tell
from mlx_fastvlm.errors import OptionError, VideoError
from mlx_fastvlm.video.choice import REUSE_BELOW, SCENE_CHANGE, ChangeGate, Pace
from mlx_fastvlm.video.cues import clock
from mlx_fastvlm.video.describing import FrameCaption, describe_frames, describe_newest
from mlx_fastvlm.video.frame import Frame
from mlx_fastvlm.video.newest import NewestFrame
from mlx_fastvlm.video.output import Format, OutputFile, Printed, make_format
from mlx_fastvlm.video.reader import Video, open_video
from mlx_fastvlm.video.rows import FrameRow
from mlx_fastvlm.video.source import Source, parse_source

if TYPE_CHECKING:
    from mlx_fastvlm.model import FastVLM
    from mlx_fastvlm.processor import Processor

DEFAULT_EVERY = 1.0  # seconds, of a file

_SHOWN_AT_LEAST = 0.04  # seconds, of a last frame of unknown length
_SAME_TIME = 1e-6  # seconds: what rows keep of a time


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is asked for.

    Attributes:
        source: see `parse_source`.
        model, dtype, revision: as the command line has them.
        question: the same for all frames.
        options: of `GenerationOptions`.
        out, form: file and format; None for standard output, and for what the file's suffix says.
        overwrite: whether the file may be replaced.
        every: seconds between frames; None for `DEFAULT_EVERY`, or for every frame of a live source or with `on_change`.
        on_change: whether only frames that differ from the last one described get a row.
        threshold: by which they must differ, see `ChangeGate`; None for the default.
        start, end: seconds of the video; of a live source `end` counts from now.
        batch_size: frames described together at most; None for 16 of a file, 1 of a live source.
        summary: whether to say at the end what became of the frames.

    Raises:
        OptionError: a value is out of range, or two exclude each other.
    """

    source: str
    model: str
    question: str
    options: Mapping[str, Any]
    dtype: DType | None = None
    revision: str | None = None
    out: Path | None = None
    form: str | None = None
    overwrite: bool = False
    every: float | None = None
    on_change: bool = False
    threshold: float | None = None
    start: float = 0.0
    end: float | None = None
    batch_size: int | None = None
    summary: bool = True

    def __post_init__(self) -> None:
        if self.end is not None and self.end <= self.start:
            raise OptionError(f"--end is {self.end:g} s and --start {self.start:g} s; --end must be later.")
        self.gate()
        self.recipe(is_live=False)

    def interval(self, is_live: bool) -> float:
        """Seconds between the frames that are looked at; 0 for every frame."""
        if self.every is not None:
            return self.every
        return 0.0 if is_live or self.on_change else DEFAULT_EVERY

    def gate(self) -> ChangeGate:
        """What says which frames are described."""
        default = SCENE_CHANGE if self.on_change else REUSE_BELOW
        return ChangeGate(default if self.threshold is None else self.threshold)

    def recipe(self, is_live: bool) -> Recipe:
        """What rows say of how they were made."""
        how = {
            "dtype": self.dtype and self.dtype.value,
            "revision": self.revision,
            "every": self.interval(is_live),
            "on_change": self.on_change or None,
            "threshold": self.threshold,
        }
        return Recipe(self.model, self.question, given_settings(self.options, how))


def run_watch(asked: Watch) -> None:
    """Do what is asked for.

    Raises:
        FastVLMError: what the user can mend.
        KeyboardInterrupt: after Ctrl-C, with the output whole.
    """
    source = parse_source(asked.source)
    form = make_format(asked.form, asked.out)
    with open_video(source) as video:
        _check_start(asked, video)
        recipe = asked.recipe(video.is_live)
        with closing(_open_output(asked, form, video, recipe)) as output:
            _check_first(asked, source, output)
            model, processor = load_model(asked.model, asked.dtype, asked.revision)
            run = _Run(asked, video, output, recipe)
            try:
                (run.live if video.is_live else run.file)(model, processor)
            except KeyboardInterrupt:
                tell(f"\n{run.summary()}{_how_to_go_on(output, asked.overwrite)}")
                raise
    for warning in video.warnings:
        tell(f"Note: {warning}")
    if asked.summary:
        tell(run.summary())


class _Run:
    """Takes rows to the output and keeps account of them.

    Args:
        asked: what is asked for.
        video: open.
        output: where rows go.
        recipe: what they are made with.
    """

    def __init__(self, asked: Watch, video: Video, output: Printed | OutputFile, recipe: Recipe):
        self._asked, self._video, self._output, self._recipe = asked, video, output, recipe
        self._every = asked.interval(video.is_live)
        self._gate = asked.gate()
        self._rows = self._reused = self._bad = 0
        self._last_time = asked.start
        self._seconds = 0.0
        self._newest: NewestFrame | None = None
        self._latencies = self._longest = 0.0

    def file(self, model: FastVLM, processor: Processor) -> None:
        """Describe the frames of a file; of one that an earlier run began with, those that are left."""
        asked, output = self._asked, self._output
        with self._progress() as on_time:
            captions = describe_frames(
                model,
                processor,
                self._chosen_frames(on_time),
                asked.question,
                gate=self._gate,
                skip_unchanged=asked.on_change,
                last=output.last_new,
                batch_size=asked.batch_size or DEFAULT_BATCH_SIZE,
                **asked.options,
            )
            self._take(captions)
        if not self._rows and output.last is None:
            raise VideoError(f"No frame of {self._video.source.name} lies between --start and --end.")

    def live(self, model: FastVLM, processor: Processor) -> None:
        """Describe the newest frames of a live source again and again, until it or the time asked for ends."""
        asked, pace = self._asked, Pace(self._every)
        self._newest = NewestFrame(
            self._video.frames(), pace, self._video.source.name, keep=asked.batch_size or 1, end=asked.end
        )
        try:
            captions = describe_newest(
                model,
                processor,
                self._newest,
                asked.question,
                gate=self._gate,
                skip_unchanged=asked.on_change,
                **asked.options,
            )
            self._take(captions)
        finally:
            if not self._newest.close():
                self._video.leave_open()

    def summary(self) -> str:
        """One line on what became of the frames."""
        described = self._rows - self._reused
        same = self._gate.looked - self._gate.new if self._asked.on_change else self._reused
        rate = f" ({(described + same) / self._seconds:.1f}/s)" if self._seconds else ""
        unchanged = f"{same} had not changed"
        bad = f", {self._bad} bad" if self._bad else ""
        if self._newest is None:
            return f"{described + same} frames: {described} described, {unchanged}{bad}; {self._seconds:.1f} s{rate}."
        mean = self._latencies / max(1, self._rows)
        return (
            f"{self._newest.arrived} frames came: {described} described, {unchanged}{bad}, {self._newest.dropped} dropped"
            f"{rate}. From frame to description {1e3 * mean:.0f} ms on average, {1e3 * self._longest:.0f} ms at most."
        )

    def _take(self, captions: Iterator[FrameCaption]) -> None:
        """Take all rows to the output, which is whole whatever ends this."""
        start, is_done = time.monotonic(), False
        try:
            with closing(captions):
                for frame in captions:
                    self._seconds = time.monotonic() - start
                    self._add(frame)
            is_done = True
        finally:
            self._output.finish(self._end(is_done))

    def _add(self, frame: FrameCaption) -> None:
        at = None
        if frame.latency is not None:
            at = (datetime.now(timezone.utc) - timedelta(seconds=frame.latency)).isoformat(timespec="milliseconds")
            self._latencies += frame.latency
            self._longest = max(self._longest, frame.latency)
        self._output.add(FrameRow(self._video.source.name, frame, self._recipe, at))
        self._rows += 1
        self._reused += frame.reused
        self._last_time = frame.time
        if frame.error and not frame.reused:
            self._bad += 1
            tell(f"Bad: {clock(round(1000 * frame.time))}  {frame.error}")

    def _end(self, is_done: bool) -> float:
        """When the last frame is shown no longer, in seconds of the video."""
        if self._newest is not None:
            return self._newest.now
        if is_done and self._video.duration is not None:
            end = min(self._video.duration, self._asked.end or math.inf)
        else:
            end = self._last_time + self._every
        return max(end, self._last_time + _SHOWN_AT_LEAST)

    def _chosen_frames(self, on_time: Callable[[float], None]) -> Iterator[Frame]:
        """Frames at the pace asked for; of those that have rows already only what later ones are compared with."""
        done, described = self._output.last, self._output.last_new
        pace = Pace(self._every, self._asked.start)
        if done is not None:
            pace.admits(done.time)
        for frame in self._video.frames(described.time if described else self._asked.start, self._asked.end):
            if described is not None and abs(frame.time - described.time) < _SAME_TIME:
                self._gate.compare_with(frame)
            is_left = frame.time >= self._asked.start and (done is None or frame.time > done.time + _SAME_TIME)
            if is_left and pace.admits(frame.time):
                on_time(frame.time)
                yield frame

    @contextmanager
    def _progress(self) -> Iterator[Callable[[float], None]]:
        """A bar over the video's seconds, where these are known and nothing else is written to the terminal."""
        begin = self._output.last.time if self._output.last else self._asked.start
        end = min(self._video.duration or math.inf, self._asked.end or math.inf)
        if end == math.inf:
            yield lambda time: None
            return
        shown = self._asked.out is not None or not sys.stdout.isatty()
        with counting(max(1, math.ceil(end - begin)), "s of video", visible=shown) as report:
            yield lambda time: report(int(time - begin), self._bad)


def _open_output(asked: Watch, form: Format, video: Video, recipe: Recipe) -> Printed | OutputFile:
    if asked.out is None:
        return Printed(form, _print)
    return OutputFile(
        asked.out, form, video.source.name, recipe, can_resume=not video.is_live, overwrite=asked.overwrite
    )


def _check_start(asked: Watch, video: Video) -> None:
    if video.is_live and asked.start:
        raise OptionError(f"{video.source.name} is live and has no --start; --end counts from now.")
    if video.duration is not None and asked.start >= video.duration:
        raise OptionError(f"--start is {asked.start:g} s, but {video.source.name} ends at {video.duration:.1f} s.")


def _check_first(asked: Watch, source: Source, output: Printed | OutputFile) -> None:
    """Raises OptionError if frames before the output's first row are asked for, which could not be put there."""
    if output.first is None or asked.start >= output.first.time:
        return
    begin = output.first.time
    with open_video(source) as video, closing(video.frames(asked.start)) as frames:
        earliest = next(frames, None)
    if earliest is not None and earliest.time < begin - _SAME_TIME:
        raise OptionError(
            f"{asked.out} begins at {begin:g} s and cannot be gone on with from {asked.start:g} s: "
            "give the --start that it was made with, another --out, or --overwrite."
        )


def _how_to_go_on(output: Printed | OutputFile, overwrite: bool) -> str:
    command = "The same command without --overwrite" if overwrite else "The same command"
    return f" {command} goes on from there." if output.can_resume else ""


def _print(text: str) -> None:
    say(text, end="")
