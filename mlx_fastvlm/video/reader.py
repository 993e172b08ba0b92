"""Opening a video source with PyAV, and its frames in order with their times.

PyAV rather than OpenCV: it gives every frame's own time stamp, 10-bit color, alpha and what the stream says of itself,
reads cameras and screens through FFmpeg's devices, takes half the space, and comes out with every FFmpeg.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from fractions import Fraction
from types import ModuleType
from typing import TYPE_CHECKING

from mlx_fastvlm.errors import OptionError, VideoError
from mlx_fastvlm.video.frame import Frame
from mlx_fastvlm.video.source import Source

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

_MICROSECONDS = 1_000_000  # of a container's times
_ODD_SIZE = 16  # times a pixel may be as wide as high; more is damage
_SHORT_BY = 1.0  # seconds that frames may end before the end that the file states, and
_SHORT_SHARE = 0.05  # the share of it
_SEEK_MARGINS = (0.0, 10.0)  # seconds
_FALLBACK_RATE = Fraction(25)  # frames a second of a stream without times
_STARTS_OVER = 1.0  # seconds by which times fall back where they start over; by less where they are damaged


def check_available() -> None:
    """Raises OptionError where the extra is not installed."""
    _av()


def open_video(source: Source) -> Video:
    """Open a source; to be closed, or used in a `with` statement.

    Raises:
        VideoError: it does not exist, is no video, has no picture, or may not be read.
        OptionError: PyAV is not installed, or has no such device.
    """
    av = _av()
    if source.format is not None and source.format not in {
        name for formats in av.formats_available for name in formats.split(",")
    }:
        raise OptionError(f"{source.name} cannot be watched: the installed PyAV has no {source.format} device.")
    try:
        container = av.open(
            source.location,
            format=source.format,
            options=dict(source.options),
            metadata_errors="replace",
            timeout=source.timeout,
        )
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(_why_not_open(source, error)) from None
    try:
        return Video(source, container, _picture_stream(av, source, container))
    except BaseException:
        container.close()
        raise


class Video:
    """An open source.

    Attributes:
        source: what it is.
        duration: seconds; None for a live source, or where the file does not say.
        is_live: whether frames come in their own time and do not wait.
        warnings: what was wrong with the frames read so far, in one line each.
    """

    def __init__(self, source: Source, container: InputContainer, stream: VideoStream):
        self.source = source
        self.warnings: list[str] = []
        self._container, self._stream = container, stream
        self._is_used = self._starts_over = False
        self._start = (container.start_time or 0) / _MICROSECONDS
        self.duration = None if source.is_live else _duration(container, stream)
        self.is_live = self.duration is None if source.is_live is None else source.is_live
        stream.thread_type = "SLICE" if self.is_live else "AUTO"  # frames decoded in threads come late

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Let the source go."""
        if not self._is_used:
            self._container.close()

    def leave_open(self) -> None:
        """Have `close` do nothing: a thread still waits for a frame, and ends with the process."""
        self._is_used = True

    def frames(self, start: float = 0.0, end: float | None = None) -> Iterator[Frame]:
        """The frames shown from `start` on and before `end`, in seconds. Of a live source all, as they come.

        Damaged parts are left out and said in `warnings`, as is a file that ends early. Where a file's times start over,
        as in recordings that were joined, they go on one frame after the last, which is said too.

        Raises:
            VideoError: there is no frame at all.
        """
        if self.is_live:
            start, end = 0.0, None
        last = None
        for frame in self._from(start):
            last = frame.time
            if end is not None and frame.time >= end:
                return
            if frame.time >= start:
                yield frame
        if last is None:
            why = self.warnings[-1].rstrip(".") if self.warnings else "it is empty or cut off"
            raise VideoError(f"{self.source.name} has a video stream but no frame that can be decoded: {why}.")
        self._check_whole(last)

    def _from(self, start: float) -> Iterator[Frame]:
        """Every frame that can be decoded, from one at or before `start` on, as far as the file can be searched."""
        for margin in _SEEK_MARGINS:  # in some formats a search ends behind what it was for
            if start <= margin or self.duration is None:  # without a length it has no index, and perhaps no times
                break
            if start >= self.duration:  # times that start over have led there
                break
            self._seek(start - margin)
            decoded = self._decoded()
            first = next(decoded, None)
            if first is not None and first.time <= start:
                yield first
                yield from decoded
                return
        if start > 0 and self.duration is not None:
            self._seek(-self._start)
        yield from self._decoded()

    def _decoded(self) -> Iterator[Frame]:
        """Every frame that can be decoded."""
        import av

        step = float(1 / (self._stream.average_rate or _FALLBACK_RATE))
        damaged, frame_time, offset, has_begun = 0, -step, -self._start, False
        aspect = self._pixel_aspect()
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                pictures = packet.decode()
            except EOFError:
                break
            except av.InvalidDataError:
                damaged += 1
                continue
            except (av.FFmpegError, OSError) as error:
                self.warnings.append(f"{self.source.name} broke off ({_reason_of(error)}).")
                break
            for picture in pictures:
                if picture.is_corrupt:
                    damaged += has_begun  # before that, it lacks what came before the place where reading began
                    continue
                time = frame_time + step if picture.time is None else picture.time + offset
                if has_begun and not self.is_live and time < frame_time - _STARTS_OVER:
                    self._note_start_over(frame_time)
                    offset += frame_time + step - time
                    time = frame_time + step
                frame_time, has_begun = time, True
                yield Frame(picture, max(0.0, round(frame_time, 6)), aspect)
        if damaged:
            parts = "1 damaged part was" if damaged == 1 else f"{damaged} damaged parts were"
            self.warnings.append(f"{parts} left out of {self.source.name}.")

    def _seek(self, time: float) -> None:
        """To a frame from which that time can be decoded; where the file cannot be searched, to nowhere."""
        import av

        try:
            self._container.seek(int((time + self._start) * _MICROSECONDS))
        except (av.FFmpegError, OSError):
            return

    def _note_start_over(self, time: float) -> None:
        if not self._starts_over:
            self.warnings.append(
                f"The times of {self.source.name} start over after {time:.1f} s: later ones are counted on from there."
            )
        self._starts_over = True

    def _pixel_aspect(self) -> Fraction | None:
        aspect = self._stream.sample_aspect_ratio
        return aspect if aspect and 1 / _ODD_SIZE < aspect < _ODD_SIZE else None

    def _check_whole(self, last: float) -> None:
        """Note a file that ends long before it says."""
        if self.duration and last < self.duration - max(_SHORT_BY, _SHORT_SHARE * self.duration):
            self.warnings.append(
                f"{self.source.name} ends at {last:.1f} s though it should have {self.duration:.1f} s: it may be cut off."
            )


def _av() -> ModuleType:
    try:
        import av  # here, because it is an extra
    except ImportError:
        raise OptionError("Videos need the av package: run `pip install 'mlx-fastvlm[video]'`.") from None
    return av


def _picture_stream(av: ModuleType, source: Source, container: InputContainer) -> VideoStream:
    """The first stream that moves. Raises VideoError if there is none."""
    form = container.format.name
    if form == "image2" or form.endswith("_pipe"):
        raise VideoError(f"{source.name} is a picture, not a video: ask `mlx-fastvlm describe` about it.")
    covers = av.stream.Disposition.attached_pic
    stream = next((stream for stream in container.streams.video if not stream.disposition & covers), None)
    if stream is None or form == "tty":  # as which FFmpeg takes any text
        found = "holds only sound" if container.streams.audio else "is empty, text, or cut off"
        raise VideoError(f"{source.name} has no video stream: it {found}.")
    if stream.codec_context is None:
        raise VideoError(f"{source.name} is in a format that the installed PyAV cannot decode.")
    return stream


def _duration(container: InputContainer, stream: VideoStream) -> float | None:
    """When the last frame ends, in seconds from the container's start; None if the file does not say."""
    if stream.duration:
        late = 0.0  # by which the pictures begin after the sound
        if stream.start_time is not None and container.start_time is not None:
            late = float(stream.start_time * stream.time_base) - container.start_time / _MICROSECONDS
        return float(stream.duration * stream.time_base) + max(0.0, late)
    return container.duration / _MICROSECONDS if container.duration else None


def _why_not_open(source: Source, error: Exception) -> str:
    """One line on what is wrong and what to do."""
    reason = _reason_of(error)
    if source.kind == "file":
        if isinstance(error, FileNotFoundError):
            return f"{source.name} does not exist."
        if isinstance(error, ValueError):  # FFmpeg's "invalid data" among them
            return f"{source.name} is not a video, or its beginning or index is missing ({reason})."
        return f"{source.name} cannot be read ({reason})."
    if source.kind == "camera" and isinstance(error, FileNotFoundError):
        return f"There is no {source.name}: connect it, or give another number."
    if source.kind in ("camera", "screen"):
        allowed = (
            "allow the terminal to use it in System Settings, Privacy & Security"
            if sys.platform == "darwin"
            else "look whether it is there, whether you may read it, and whether another program uses it"
        )
        return f"The {source.name} cannot be opened ({reason}): {allowed}."
    return f"{source.name} cannot be opened ({reason})."


def _reason_of(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
