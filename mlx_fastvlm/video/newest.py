"""Keeping up with a live source: a thread reads it, and whoever takes frames gets the newest."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterable

from mlx_fastvlm.errors import VideoError
from mlx_fastvlm.video.choice import Pace
from mlx_fastvlm.video.frame import Frame

SILENCE = 30.0  # seconds without any frame after which a source counts as dead

_PATIENCE = 1.0  # seconds that closing waits for the read under way


class NewestFrame:
    """Holds the last frame that came and was due, or the last few. One that gives way to newer ones is dropped.

    Args:
        frames: read in a thread, at once and without pause. Their times are replaced by those at which they came, in
            seconds since the first was waited for.
        pace: which of them are due.
        name: of the source, for messages.
        keep: frames held at most.
        end: seconds after which reading ends; None for never.
        silence: seconds without a frame after which the source counts as dead.

    Attributes:
        arrived: frames that came.
        dropped: frames that were due and not taken in time.
    """

    def __init__(
        self,
        frames: Iterable[Frame],
        pace: Pace,
        name: str,
        *,
        keep: int = 1,
        end: float | None = None,
        silence: float = SILENCE,
    ):
        self.arrived = 0
        self.dropped = 0
        self._name, self._end, self._silence = name, end, silence
        self._newest: deque[Frame] = deque(maxlen=keep)
        self._error: BaseException | None = None
        self._ended = False
        self._closed = False
        self._start = self._heard = time.monotonic()
        self._changed = threading.Condition()
        self._thread = threading.Thread(
            target=self._read, args=(frames, pace), name="mlx_fastvlm_newest_frame", daemon=True
        )
        self._thread.start()

    @property
    def now(self) -> float:
        """Seconds since the first frame was waited for."""
        return time.monotonic() - self._start

    def take(self) -> list[Frame]:
        """The newest frames that were not taken, at least one and in order; none when the source has ended.

        Raises:
            VideoError: nothing came for `silence` seconds, or until `end`. Whatever reading raised is raised here.
        """
        with self._changed:
            while not self._newest:
                if self._error is not None:
                    raise self._error
                to_end = math.inf if self._end is None else self._end - self.now
                if self._ended or (to_end <= 0 and self.arrived):
                    break
                silent = time.monotonic() - self._heard
                left = min(self._silence - silent, to_end)
                if left <= 0:
                    raise VideoError(f"No frame came from {self._name} for {silent:.0f} s.")
                self._changed.wait(left)
            frames = list(self._newest)
            self._newest.clear()
            return frames

    def close(self) -> bool:
        """End the thread. Returns False if it still waits for a frame, so that the source cannot be closed."""
        with self._changed:
            self._closed = True
        self._thread.join(_PATIENCE)
        return not self._thread.is_alive()

    def _read(self, frames: Iterable[Frame], pace: Pace) -> None:
        error: BaseException | None = None
        try:
            for frame in frames:
                if self._closed or (self._end is not None and self.now >= self._end):
                    break
                self._put(frame, pace)
        except BaseException as caught:  # whatever it is, it is the taker's to judge
            error = caught
        with self._changed:
            self._error, self._ended = error, True
            self._changed.notify()

    def _put(self, frame: Frame, pace: Pace) -> None:
        with self._changed:
            self._heard = time.monotonic()
            self.arrived += 1
            frame.time = self.now
            if pace.admits(frame.time):
                self.dropped += len(self._newest) == self._newest.maxlen
                self._newest.append(frame)
                self._changed.notify()
