"""From one image to the rows that the decoder sees, with the time of each stage."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_fastvlm.answer import StageClock
from mlx_fastvlm.image_content import ImageContent
from mlx_fastvlm.image_decoding import ImageSource, open_image
from mlx_fastvlm.image_processing import ImageProcessor
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.resolution import count_rows
from mlx_fastvlm.tiling import TiledPixels


def image_features(model: FastVLM, image_processor: ImageProcessor, image: ImageSource, clock: StageClock) -> mx.array:
    """An image's rows, (N, hidden), with decode, resize, encode and project booked on `clock`. Raises ImageError."""
    return encode_pixels(model, read_pixels(image_processor, image, clock), clock)


def read_pixels(image_processor: ImageProcessor, image: ImageSource, clock: StageClock) -> np.ndarray | TiledPixels:
    """What `ImageProcessor.prepare` makes of an image, with decode and resize booked on `clock`. Raises ImageError."""
    picture = open_image(image, background=image_processor.background)
    clock.lap("decode")
    pixels = image_processor.prepare(picture)
    clock.lap("resize")
    return pixels


def encode_pixels(model: FastVLM, pixels: np.ndarray | TiledPixels, clock: StageClock) -> mx.array:
    """The rows, (N, hidden), of one prepared image, with encode and project booked on `clock`."""
    features = []
    for tile in tiles_of(pixels):  # one by one: together they gain nothing where they are large
        features.append(model.vision_tower(mx.array(tile[None]).astype(model.dtype)))
        mx.eval(features[-1])
    clock.lap("encode")
    rows = merged_rows(pixels, model.project(mx.concatenate(features)))
    mx.eval(rows)
    clock.lap("project")
    return rows


def tiles_of(pixels: np.ndarray | TiledPixels) -> list[np.ndarray]:
    """The arrays, (H, W, 3) each, that the tower sees of a prepared image: one, unless it is cut."""
    return list(pixels.tiles) if isinstance(pixels, TiledPixels) else [pixels]


def merged_rows(pixels: np.ndarray | TiledPixels, rows: mx.array) -> mx.array:
    """What the tower made of `tiles_of`, (arrays, rows of each, C), as the rows of the whole image, (N, C)."""
    return pixels.layout.merged(rows) if isinstance(pixels, TiledPixels) else rows[0]


def pixel_rows(pixels: np.ndarray | TiledPixels) -> int:
    """How many positions of the decoder a prepared image takes."""
    return pixels.layout.rows if isinstance(pixels, TiledPixels) else count_rows(pixels.shape[:2])


def image_rows(image: ImageContent, image_processor: ImageProcessor) -> int:
    """How many positions of the decoder an image takes. Its file is looked into only where that depends on its shape.

    The processor is one without `auto`, see `ImageProcessor.chosen_for`.
    """
    size = image_processor.fixed_size
    return count_rows(size) if size else image_processor.count_rows(*image.size)
