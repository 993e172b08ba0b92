"""From one image to the rows that the decoder sees, with the time of each stage."""

from __future__ import annotations

import mlx.core as mx

from mlx_fastvlm.answer import StageClock
from mlx_fastvlm.image_processing import ImageSource, open_image
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.processor import Processor


def image_features(model: FastVLM, processor: Processor, image: ImageSource, clock: StageClock) -> mx.array:
    """An image's rows, (N, hidden), with decode, resize, encode and project booked on `clock`. Raises ImageError."""
    picture = open_image(image, background=processor.image_processor.background)
    clock.lap("decode")
    pixel_values = processor.image_processor.preprocess(picture)
    clock.lap("resize")
    features = model.vision_tower(pixel_values.astype(model.dtype))
    mx.eval(features)
    clock.lap("encode")
    projected = model.project(features)
    mx.eval(projected)
    clock.lap("project")
    return projected[0]


def image_rows(model: FastVLM, processor: Processor) -> int:
    """How many positions of the decoder an image takes."""
    return (processor.image_processor.image_size // model.config.vision_config.patch_size) ** 2
