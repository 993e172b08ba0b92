"""What size of picture the tower is shown: the range to choose from, and the rectangle that keeps a picture's shape.

Knows numbers only. Bringing pictures to these sizes is image_processing's.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from mlx_fastvlm.errors import OptionError

Fit = Literal["pad", "crop", "native", "tiles"]
FITS = get_args(Fit)
Size = tuple[int, int]  # height and width, in pixels

STEP = 64  # FastViTHD halves a picture six times: each 64x64 pixels become one position of the decoder
HIGHEST = 2048

_LOWEST = 256  # of the released models: a quarter of what they were trained on
_SMALLEST_LONG_SIDE = 7 / 8  # of the resolution: what a native size may give up to keep a picture's shape


def resolutions(trained: int) -> range:
    """What can be chosen for a model that was trained at one resolution: 256 to 2048, and less if that is a quarter of it."""
    lowest = max(STEP, trained // 4 // STEP * STEP)
    return range(min(_LOWEST, lowest), HIGHEST + STEP, STEP)


def check_resolution(resolution: Any, allowed: range = range(STEP, HIGHEST + STEP, STEP)) -> None:
    """Raise OptionError, which names what is nearest, unless a resolution is one of those allowed.

    Args:
        resolution: as somebody chose it.
        allowed: `resolutions` of a model; while it is not known, what any model may allow.
    """
    if isinstance(resolution, int) and resolution in allowed:
        return
    lowest, highest = allowed[0], allowed[-1]
    bounds = f"from {lowest} to {highest}" if lowest > STEP else f"up to {highest}"
    message = f"The resolution is {resolution!r}; it must be a multiple of {STEP} {bounds}"
    if not isinstance(resolution, int):
        raise OptionError(f"{message}, in pixels.")
    below = max((each for each in allowed if each < resolution), default=lowest)
    above = min((each for each in allowed if each > resolution), default=highest)
    raise OptionError(f"{message}: {' or '.join(map(str, sorted({below, above})))} is nearest.")


def check_fit(fit: Any) -> None:
    """Raise OptionError unless it is one of `FITS`."""
    if fit not in FITS:
        raise OptionError(f"The fit is {fit!r}; it must be one of {', '.join(FITS)}.")


def native_size(width: int, height: int, resolution: int) -> Size:
    """The rectangle in which the tower sees a picture whole, without padding, about as large as padding would show it.

    Its long side is the resolution or up to an eighth less, its short side whatever multiple of 64 then fits best: of
    all such rectangles the one whose shape is nearest to the picture's, and of equally near ones the largest. So a
    picture of just that size is not changed.

    Args:
        width, height: of the picture.
        resolution: a multiple of 64.
    """
    long, short = max(width, height), min(width, height)
    smallest = math.ceil(resolution * _SMALLEST_LONG_SIDE)
    sides = [(a, b) for a in range(resolution, smallest - 1, -STEP) for b in range(STEP, a + 1, STEP)]
    # The first of equals. Both products are whole numbers, so that an equal shape is exactly equal.
    best_long, best_short = min(sides, key=lambda side: abs(math.log((side[1] * long) / (side[0] * short))))
    return (best_short, best_long) if width >= height else (best_long, best_short)


def count_rows(size: Size) -> int:
    """How many positions of the decoder a picture of this size takes."""
    height, width = size
    return (height // STEP) * (width // STEP)
