"""Which frames are looked at, and which of these differ enough from the last one described."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.video.frame import THUMBNAIL_SIDE, Frame

REUSE_BELOW = 0.02  # by which frames of a still scene differ, compressed or from a camera, and nothing that moves
SCENE_CHANGE = 0.1

_TILES = 16  # along each side; a change is as large as that of the tile that changed most
_ROUNDING = 0.002  # seconds: containers round times to a thousandth, and 1/30 is none


class Pace:
    """Lets the first frame at or after every multiple of an interval pass.

    The multiples are of the video, not of what was watched of it, so that a later run that begins in between takes the
    same frames.

    Args:
        every: seconds; 0 lets all frames pass.
        origin: seconds at which the first interval begins.

    Raises:
        OptionError: the interval is negative or not finite.
    """

    def __init__(self, every: float, origin: float = 0.0):
        if not 0 <= every < math.inf:
            raise OptionError(f"The time between frames is {every} s; expected 0 or more.")
        self._every, self._origin = every, origin
        self._next = -math.inf

    def admits(self, time: float) -> bool:
        """Whether the frame of this time passes; asked about frames in order."""
        if time + _ROUNDING < self._next:
            return False
        if self._every:
            passed = math.floor((time + _ROUNDING - self._origin) / self._every)
            self._next = self._origin + (passed + 1) * self._every
        return True


@dataclass(frozen=True)
class Look:
    """How a frame compares with the last one described.

    Attributes:
        change: 0 … 1, see `change_between`; None for the first frame.
        is_new: whether the frame is to be described.
    """

    change: float | None
    is_new: bool


class ChangeGate:
    """Compares every frame with the last one that was new: slow changes add up until they are seen.

    Args:
        threshold: a frame is new if it differs by so much or more, see `change_between`. At 0 every frame is.

    Attributes:
        looked, new: numbers of frames.

    Raises:
        OptionError: the threshold is not within 0 … 1.
    """

    def __init__(self, threshold: float):
        if not 0 <= threshold <= 1:
            raise OptionError(f"The threshold is {threshold}; expected a value from 0 to 1.")
        self.looked = self.new = 0
        self._threshold = threshold
        self._reference: np.ndarray | None = None

    def compare_with(self, frame: Frame) -> None:
        """Take a frame for the last new one: of an earlier run that this one goes on with."""
        self._reference = frame.thumbnail

    def look(self, frame: Frame) -> Look:
        """Compare a frame, and take it for the one to compare with if it is new."""
        change = None if self._reference is None else change_between(self._reference, frame.thumbnail)
        is_new = change is None or change >= self._threshold
        self.looked += 1
        if is_new:
            self.new += 1
            self._reference = frame.thumbnail
        return Look(change, is_new)


def change_between(first: np.ndarray, second: np.ndarray) -> float:
    """How much two pictures differ where they differ most.

    Args:
        first, second: thumbnails, (128, 128, 3) uint8.

    Returns:
        0 … 1: of 16x16 tiles, the mean absolute difference of the one that changed most; 1 is from black to white.
        A small thing that moves counts as much as a large one, and noise, which is everywhere alike, for little.
    """
    difference = np.abs(first.astype(np.int16) - second)
    size = THUMBNAIL_SIDE // _TILES
    tiles = difference.reshape(_TILES, size, _TILES, size, 3).mean(axis=(1, 3, 4))
    return float(tiles.max()) / 255
