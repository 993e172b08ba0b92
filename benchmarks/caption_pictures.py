"""Pictures to caption: up to three colored shapes on a plain background, in many sizes; the same bytes every time.

The demo model was trained on such scenes, so that its captions mean something and differ in length.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .picture import png_bytes

SIZES = ((256, 256), (320, 240), (240, 320), (400, 300), (192, 256), (512, 384), (180, 180), (288, 216))  # (W, H)
_COLORS = ((220, 30, 30), (30, 150, 50), (30, 60, 220), (250, 215, 30), (250, 130, 20), (140, 40, 170), (15, 15, 15))
_BACKGROUNDS = ((255, 255, 255), (205, 205, 205), (195, 220, 245), (250, 215, 220))
_RADII = (0.068, 0.11)  # of the longer side: small and large


def write_pictures(folder: Path, count: int) -> Iterator[Path]:
    """Write `count` PNG files into `folder`, one when it is asked for, and yield their paths; no two are alike."""
    for number in range(count):
        path = folder / f"{number:06}.png"
        path.write_bytes(png_bytes(draw_scene(number)))
        yield path


def draw_scene(number: int) -> np.ndarray:
    """Scene `number`, (H, W, 3) uint8: one to three shapes, each in a cell of its own of a 3x3 grid."""
    random = np.random.Generator(np.random.PCG64(number))
    width, height = SIZES[number % len(SIZES)]
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = _BACKGROUNDS[random.integers(len(_BACKGROUNDS))]
    for cell in random.choice(9, random.integers(1, 4), replace=False):
        center = ((cell % 3 + 0.5 + random.uniform(-0.1, 0.1)) / 3, (cell // 3 + 0.5 + random.uniform(-0.1, 0.1)) / 3)
        radius = _RADII[random.integers(2)] * max(width, height)
        inside = _SHAPES[random.integers(len(_SHAPES))]
        y, x = np.mgrid[0:height, 0:width]
        pixels[inside((x - center[0] * width) / radius, (y - center[1] * height) / radius)] = _COLORS[
            random.integers(len(_COLORS))
        ]
    return pixels


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x**2 + y**2 < 1


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) < 0.9


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (y < 0.85) & (2 * abs(x) < y + 1)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.minimum(abs(x), abs(y)) < 0.33) & (np.maximum(abs(x), abs(y)) < 1)


_SHAPES = (_circle, _square, _triangle, _cross)  # a mask of what is inside, from coordinates in radii
