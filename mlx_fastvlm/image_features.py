"""From one image to the rows that the decoder sees, with the time of each stage."""

from __future__ import annotations

import mlx.core as mx

from mlx_fastvlm.answer import StageClock
from mlx_fastvlm.image_content import ImageContent
from mlx_fastvlm.image_processing import ImageProcessor, ImageSource, open_image
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.resolution import count_rows


def image_features(model: FastVLM, image_processor: ImageProcessor, image: ImageSource, clock: StageClock) -> mx.array:
    """An image's rows, (N, hidden), with decode, resize, encode and project booked on `clock`. Raises ImageError."""
    return encode_pixels(model, read_pixels(image_processor, image, clock), clock)


def read_pixels(image_processor: ImageProcessor, image: ImageSource, clock: StageClock) -> mx.array:
    """An image's pixel values, (1, H, W, 3), with decode and resize booked on `clock`. Raises ImageError."""
    picture = open_image(image, background=image_processor.background)
    clock.lap("decode")
    pixel_values = image_processor.preprocess(picture)
    clock.lap("resize")
    return pixel_values


def encode_pixels(model: FastVLM, pixel_values: mx.array, clock: StageClock) -> mx.array:
    """The rows, (N, hidden), of one image's pixel values, with encode and project booked on `clock`."""
    features = model.vision_tower(pixel_values.astype(model.dtype))
    mx.eval(features)
    clock.lap("encode")
    projected = model.project(features)
    mx.eval(projected)
    clock.lap("project")
    return projected[0]


def image_rows(image: ImageContent, image_processor: ImageProcessor) -> int:
    """How many positions of the decoder an image takes. Its file is looked into only where that depends on its shape.

    The processor is one without `auto`, see `ImageProcessor.chosen_for`.
    """
    return count_rows(image_processor.fixed_size or image_processor.size_of(*image.size))
