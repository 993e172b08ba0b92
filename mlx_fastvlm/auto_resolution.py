"""Resolution by content: how much detail a picture holds, and which resolution suffices for so much.

The thresholds come from a file that `mlx-fastvlm calibrate-resolution` writes, beside the model or wherever it is told to.
Finding them is resolution_calibration's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.json_file import read_json_object
from mlx_fastvlm.resolution import STEP, check_resolution, resolutions

FILE_NAME = "auto_resolution.json"  # in a model's folder
AUTO = "auto"

_SHARES = (1 / 4, 1 / 2, 3 / 4)  # of the trained resolution: what is tried instead of it
# Guesses, on the safe side: nearly flat, blurred or enlarged pictures only. No released model was at hand to find better.
_GUESSED_DETAIL = (0.0001, 0.0005, 0.002)
_FLAT = 1.0  # variance, of values up to 255, below which a picture holds nothing but noise


@dataclass(frozen=True)
class AutoResolution:
    """Chooses a resolution for a picture by its detail.

    Attributes:
        trained: for what exceeds all thresholds.
        steps: (resolution, most detail that it suffices for), both rising; others are not used.
        calibrated: whether the thresholds were found with answers of the model, not guessed.
    """

    trained: int
    steps: tuple[tuple[int, float], ...]
    calibrated: bool = True

    def __str__(self) -> str:
        return " ".join([AUTO, *(f"{resolution}<={detail:g}" for resolution, detail in self.steps)])

    @classmethod
    def guessed(cls, trained: int) -> AutoResolution:
        """For a model without a calibration."""
        return cls(trained, tuple(zip(candidates(trained), _GUESSED_DETAIL, strict=False)), calibrated=False)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> AutoResolution:
        """Read what `to_dict` gave. Raises OptionError if that is not what the file holds."""
        path = Path(os.path.expanduser(path))
        advice = "mlx-fastvlm calibrate-resolution writes such files"
        content = read_json_object(path, OptionError, if_missing=f"There is no file {path}; {advice}.")
        try:
            trained, steps = content["trained"], [(step["resolution"], step["max_detail"]) for step in content["steps"]]
            _check(trained, steps)
        except (KeyError, TypeError, ValueError) as error:
            raise OptionError(f"{path} holds no thresholds of resolutions ({error}); {advice}.") from None
        return cls(trained, tuple((resolution, float(detail)) for resolution, detail in steps))

    def to_dict(self) -> dict[str, Any]:
        """As JSON: the content of a file."""
        steps = [{"resolution": resolution, "max_detail": detail} for resolution, detail in self.steps]
        return {"trained": self.trained, "steps": steps}

    def choose(self, picture: Image.Image) -> int:
        """The resolution for an RGB picture."""
        return self.choose_for(measure_detail(picture, self.trained))

    def choose_for(self, detail: float) -> int:
        """The resolution for what `measure_detail` found."""
        return next((resolution for resolution, most in self.steps if detail <= most), self.trained)


def candidates(trained: int) -> list[int]:
    """The resolutions below the trained one that a choice is made from, rising."""
    sides = {max(STEP, round(share * trained / STEP) * STEP) for share in _SHARES}
    return sorted(side for side in sides if side in resolutions(trained) and side < trained)


def measure_detail(picture: Image.Image, trained: int) -> float:
    """The share of a picture's contrast that is lost when it is shown at a quarter of the trained resolution.

    Compared with half of it, which takes a quarter of the time and finds the same: what is as fine as the full
    resolution, such as the edges of letters, has traces there. 0 is a flat or blurred picture, 0.1 a page of text.

    Args:
        picture: RGB.
        trained: side of the square that the tower was trained on.

    Returns:
        Variance over variance, over all pixels and channels.
    """
    scale = trained / 2 / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    smaller = tuple(max(1, round(side / 2)) for side in size)
    shown = picture.resize(size, Image.Resampling.BICUBIC)
    blurred = shown.resize(smaller, Image.Resampling.BOX).resize(size, Image.Resampling.BICUBIC)
    pixels, coarse = (np.asarray(image, np.float32) for image in (shown, blurred))
    contrast = float(pixels.var(axis=(0, 1)).sum())
    if contrast < _FLAT:
        return 0.0
    return float(np.square(pixels - coarse).sum(axis=2).mean()) / contrast


def _check(trained: int, steps: Sequence[tuple[int, float]]) -> None:
    """Raise ValueError unless resolutions rise below the trained one, and thresholds with them."""
    for resolution in (trained, *(resolution for resolution, _ in steps)):
        try:
            check_resolution(resolution)
        except OptionError as error:
            raise ValueError(str(error).rstrip(".")) from None
    sides, details = [*(resolution for resolution, _ in steps), trained], [detail for _, detail in steps]
    if sides != sorted(set(sides)):
        raise ValueError(f"the resolutions are {sides}; they must rise up to the trained one")
    if details != sorted(details) or any(detail < 0 for detail in details):
        raise ValueError(f"the thresholds are {details}; they must be 0 or more and rise with the resolution")
