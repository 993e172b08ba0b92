"""Pictures for those who give none: shapes and textures drawn with numpy, the same ones every time.

They make a comparison possible without any file, and no more than that: what counts is how a model does on the
pictures it will see, so the report says which ones were used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlx_fastvlm.benchmarks.picture import png_bytes
from mlx_fastvlm.errors import ImageError, OptionError
from mlx_fastvlm.image_decoding import open_image

OnSkip = Callable[[Path, str], None]  # (a file that is no picture after all, why)

NUM_GENERATED = 8
_SIZES = ((512, 512), (640, 480), (480, 640), (512, 512))  # width, height
_COLORS = np.array(
    [(215, 40, 40), (30, 80, 220), (30, 150, 60), (240, 200, 30), (20, 20, 20), (130, 130, 130)], np.uint8
)
# Names of files that Pillow reads without plugins; anything else in a folder is left alone.
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def write_generated(folder: Path, count: int) -> list[Path]:
    """Write the first `count` (at most NUM_GENERATED) generated pictures as PNG files; returns their paths."""
    paths = []
    for index in range(min(count, NUM_GENERATED)):
        paths.append(folder / f"generated-{index}.png")
        paths[-1].write_bytes(png_bytes(draw(index)))
    return paths


def draw(index: int) -> np.ndarray:
    """Picture number `index` as (height, width, 3) uint8: shapes if even, a texture if odd."""
    random = np.random.Generator(np.random.PCG64(index))
    width, height = _SIZES[index // 2 % len(_SIZES)]
    return (_shapes if index % 2 == 0 else _texture)(random, width, height)


def find_images(folder: Path, count: int, on_skip: OnSkip | None = None) -> list[Path]:
    """The first `count` pictures of a folder, by name; those that cannot be decoded are left out.

    Args:
        folder: where to look; folders inside it are not searched.
        count: 1 or more.
        on_skip: told of each file that is left out, and why.

    Raises:
        OptionError: it is not a folder, or holds no picture that can be decoded.
    """
    if not folder.is_dir():
        raise OptionError(f"{folder} is not a folder; give one with pictures, or leave --images out.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not paths:
        raise OptionError(f"{folder} holds no pictures ({', '.join(_SUFFIXES)}); give a folder that does.")
    found: list[Path] = []
    reasons = []
    for path in paths:
        if len(found) == count:
            break
        try:
            open_image(path)
        except ImageError as error:
            reasons.append(str(error))
            if on_skip:
                on_skip(path, reasons[-1])
        else:
            found.append(path)
    if not found:
        raise OptionError(f"{folder} holds no picture that can be decoded: {reasons[0]}")
    return found


def _shapes(random: np.random.Generator, width: int, height: int) -> np.ndarray:
    """One to three shapes of one color each on a light ground."""
    pixels = np.full((height, width, 3), random.integers(225, 256, 3), np.uint8)
    y, x = np.mgrid[0:height, 0:width]
    colors = random.permutation(_COLORS)
    side = min(width, height)
    for number in range(random.integers(1, 4)):
        radius = random.integers(side // 12, side // 5)
        center_x, center_y = (random.integers(radius, length - radius) for length in (width, height))
        inside: Callable[[np.ndarray, np.ndarray], np.ndarray] = (_disk, _square, _triangle)[random.integers(3)]
        pixels[inside((x - center_x) / radius, (y - center_y) / radius)] = colors[number]
    return pixels


def _disk(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x**2 + y**2 < 1


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) < 1


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (y < 1) & (2 * abs(x) - 1 < y)


def _texture(random: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Waves of many lengths and directions, weaker the shorter they are: contrast at every scale, as photographs have."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.zeros((height, width, 3))
    for wavelength in 2.0 ** np.arange(2, 10):
        direction, *phases = random.uniform(0, 2 * np.pi, 4)
        wave = 2 * np.pi / wavelength * (x * np.cos(direction) + y * np.sin(direction))
        pixels += np.sqrt(wavelength) * np.sin(wave[..., None] + phases)
    pixels += random.normal(0, 1, pixels.shape)
    return np.clip(127 + pixels * (110 / abs(pixels).max()), 0, 255).astype(np.uint8)
