"""A picture for those who give none: the same bytes every time, as large as a camera's small format."""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .command import BenchmarkError

WIDTH, HEIGHT = 1280, 960


@contextmanager
def picture_file(given: Path | None) -> Iterator[Path]:
    """The picture to measure with: `given`, or a generated one that lives as long as the context.

    Raises:
        BenchmarkError: `given` is not a file, or may not be read.
    """
    if given is not None:
        if not given.is_file():
            raise BenchmarkError(f"There is no file {given}; give a picture, or leave --image out.")
        if not os.access(given, os.R_OK):
            raise BenchmarkError(f"{given} may not be read; change its permissions or give another picture.")
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="mlx-fastvlm-") as folder:
        path = Path(folder) / "picture.png"
        path.write_bytes(png_bytes(draw(WIDTH, HEIGHT)))
        yield path


def draw(width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: gradients, a disk, fine stripes and some grain."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1)
    disk = (x - width // 3) ** 2 + (y - height // 2) ** 2 < (height // 4) ** 2
    pixels[disk] = (220, 60, 30)
    pixels[(x // 4) % 16 == 0] //= 2
    grain = np.random.Generator(np.random.PCG64(0)).integers(-8, 9, pixels.shape)
    return np.clip(pixels + grain, 0, 255).astype(np.uint8)


def png_bytes(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG file (W3C PNG, sections 5 and 11), without an imaging library."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)  # filter type 0

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows.tobytes(), 6))
        + chunk(b"IEND", b"")
    )
