"""From frames to descriptions, each frame judged by itself: of files all, of live sources the newest.

A frame that hardly differs from the last one described keeps that one's description.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_fastvlm.batch_generate import BatchGenerator
from mlx_fastvlm.captions.captioning import DEFAULT_BATCH_SIZE, DEFAULT_PROMPT, Caption, caption_images
from mlx_fastvlm.errors import FastVLMError, ImageError
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.video.choice import ChangeGate
from mlx_fastvlm.video.frame import Frame
from mlx_fastvlm.video.newest import NewestFrame

_STILL_FRAMES = 200  # in a row: what was taken before them is described rather than wait for a full batch


@dataclass(frozen=True)
class FrameCaption:
    """What was made of one frame.

    Attributes:
        time: in seconds, see `Frame`.
        text: the description; None if there is an error.
        error: why there is none, in one line; None where there is a text.
        finish_reason: "stop", or "length" where max_tokens cut the description off; None without a text.
        tokens: of the description.
        change: from the last frame that was described, see `choice.change_between`; None for the first.
        reused: whether text, error and tokens are that frame's, since the change is below the threshold.
        latency: of a live source, seconds from the frame's arrival to its description; else None.
        dropped: of a live source, frames since the last row that were due and gave way to newer ones; else None.
    """

    time: float
    text: str | None
    error: str | None = None
    finish_reason: str | None = None
    tokens: int = 0
    change: float | None = None
    reused: bool = False
    latency: float | None = None
    dropped: int | None = None


def describe_frames(
    model: FastVLM,
    processor: Processor,
    frames: Iterable[Frame],
    prompt: str = DEFAULT_PROMPT,
    *,
    gate: ChangeGate,
    skip_unchanged: bool = False,
    last: FrameCaption | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    **options,
) -> Iterator[FrameCaption]:
    """Describe frames that wait, as those of a file do.

    Args:
        model, processor: from `load`.
        frames: in order; taken in this thread and a few batches ahead of what was yielded.
        prompt: the same for all.
        gate: says which frames are described.
        skip_unchanged: whether to leave the others out, rather than to yield them with the last one's description.
        last: what was made of the gate's reference frame, if it has one.
        batch_size, options: see `caption_images`.

    Yields:
        One FrameCaption per frame, or per new frame, in order.

    Raises:
        OptionError: before any frame is taken.
    """
    coming, has_ended = iter(frames), False
    looked: deque[FrameCaption] = deque()  # taken and not yet yielded, in order, without what the model says

    def new_pictures() -> Iterator[_PixelsOnce]:
        """Until the frames end or stand still."""
        nonlocal has_ended
        still = 0
        for frame in coming:
            look = gate.look(frame)
            still = 0 if look.is_new else still + 1
            if look.is_new or not skip_unchanged:
                looked.append(FrameCaption(frame.time, None, change=look.change, reused=not look.is_new))
            if look.is_new:
                yield _PixelsOnce(frame)
            if still == _STILL_FRAMES:
                return
        has_ended = True

    def begin() -> Iterator[Caption]:
        return caption_images(model, processor, new_pictures(), prompt, batch_size=batch_size, **options)

    def described(captions: Iterator[Caption], last: FrameCaption | None) -> Iterator[FrameCaption]:
        last = yield from _in_order(looked, captions, last)
        while not has_ended:
            last = yield from _in_order(looked, begin(), last)

    return described(begin(), last)


def describe_newest(
    model: FastVLM,
    processor: Processor,
    newest: NewestFrame,
    prompt: str = DEFAULT_PROMPT,
    *,
    gate: ChangeGate,
    skip_unchanged: bool = False,
    **options,
) -> Iterator[FrameCaption]:
    """Describe frames that do not wait: always the newest, and those that came meanwhile are dropped.

    Args:
        model, processor, prompt, gate, skip_unchanged: as for `describe_frames`.
        newest: where frames are taken from until they end; left open. What it gives at once is described together.
        options: see `GenerationOptions`; all but `kv_bits`.

    Yields:
        One FrameCaption per frame taken, or per new frame, as soon as it is made.

    Raises:
        OptionError: an option is out of range. For what else see `NewestFrame.take`.
    """
    chosen = GenerationOptions(**options)
    generator = BatchGenerator(model, processor)
    last: FrameCaption | None = None
    dropped = 0
    while frames := newest.take():
        looks = [(frame, gate.look(frame)) for frame in frames]
        described = iter(_describe_now(generator, [frame for frame, look in looks if look.is_new], prompt, chosen))
        for frame, look in looks:
            if look.is_new:
                last = next(described)
            elif skip_unchanged:
                continue
            so_far = newest.dropped
            yield dataclasses.replace(
                last,
                time=frame.time,
                change=look.change,
                reused=not look.is_new,
                latency=newest.now - frame.time,
                dropped=so_far - dropped,
            )
            dropped = so_far


class _PixelsOnce:
    """A frame's pixels, which can be had once: the frame is let go with them, as captions keep hold of this."""

    def __init__(self, frame: Frame):
        self._frame: Frame | None = frame

    def __call__(self) -> np.ndarray:
        frame, self._frame = self._frame, None
        return frame.pixels()


def _in_order(
    looked: deque[FrameCaption], captions: Iterator[Caption], last: FrameCaption | None
) -> Generator[FrameCaption, None, FrameCaption | None]:
    """Each frame as soon as the caption that it needs is there. Returns the last one that was described."""
    for caption in captions:
        yield from _reused(looked, last)
        last = _filled(looked.popleft(), caption)
        yield last
        yield from _reused(looked, last)
    yield from _reused(looked, last)
    return last


def _reused(looked: deque[FrameCaption], last: FrameCaption | None) -> Iterator[FrameCaption]:
    """Those at the front that keep the last description."""
    while looked and looked[0].reused:
        frame = looked.popleft()
        yield dataclasses.replace(last, time=frame.time, change=frame.change, reused=True)


def _filled(frame: FrameCaption, caption: Caption) -> FrameCaption:
    return dataclasses.replace(
        frame,
        text=caption.text,
        error=caption.error,
        finish_reason=caption.finish_reason,
        tokens=caption.generation_tokens,
    )


def _describe_now(
    generator: BatchGenerator, frames: Sequence[Frame], prompt: str, options: GenerationOptions
) -> list[FrameCaption]:
    """Describe frames together, now. What is wrong with a frame is its error, and no other's."""
    made = [FrameCaption(frame.time, "") for frame in frames]
    places: dict[int, int] = {}  # by ticket
    for place, frame in enumerate(frames):
        try:
            places[generator.add(prompt, frame.pixels(), options=options)] = place
        except ImageError as error:
            made[place] = _failed(frame, error)
    while generator.waiting or generator.decoding:
        for ticket, event in generator.step(hurry=True):
            place = places[ticket]
            if isinstance(event, Exception):
                made[place] = _failed(frames[place], event)
            else:
                made[place] = dataclasses.replace(
                    made[place],
                    text=made[place].text + event.text,
                    finish_reason=event.finish_reason,
                    tokens=event.generation_tokens,
                )
    return made


def _failed(frame: Frame, error: Exception) -> FrameCaption:
    if not isinstance(error, FastVLMError):
        raise error
    return FrameCaption(frame.time, None, error=" ".join(str(error).split()))
