"""Pictures as vectors, for search and research: CLIP's where the checkpoint kept its head, or the tower's own features.

Pictures are read ahead in threads and encoded in batches, in order. Where vectors go is the caller's.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import mlx.core as mx
import numpy as np

from mlx_fastvlm.auto_resolution import AutoResolution
from mlx_fastvlm.batch_generate import encode_together, images_at_once
from mlx_fastvlm.captions.read_ahead import ReadAhead
from mlx_fastvlm.errors import FastVLMError, OptionError
from mlx_fastvlm.image_decoding import ImageSource
from mlx_fastvlm.image_processing import ImageProcessor
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.resolution import Fit

Features = Literal["clip", "pooled", "tokens"]
FEATURES = get_args(Features)

_MAX_THREADS = 8
_SHAPES = 4  # batches read before any is encoded, where pictures differ in size: so that each finds its like
_SHORTEST = 1e-12  # of a vector that is scaled to unit length


@dataclass(frozen=True)
class Embedding:
    """What was made of one image.

    Attributes:
        index: its place among the images given, from 0.
        image: as given.
        vector: float32, see `embed_images`; None if there is an error.
        error: why the image cannot be read, in one line; None where there is a vector.
    """

    index: int
    image: ImageSource | Callable[[], ImageSource]
    vector: np.ndarray | None
    error: str | None = None


def embed_images(
    model: FastVLM,
    processor: Processor,
    images: Iterable[ImageSource | Callable[[], ImageSource]],
    *,
    features: Features = "clip",
    normalize: bool = False,
    resolution: int | Literal["auto"] | AutoResolution | None = None,
    fit: Fit | None = None,
    threads: int | None = None,
) -> Iterator[Embedding]:
    """The vector of each of many images.

    Args:
        model, processor: from `load`.
        images: whatever `generate` takes as an image, or a function that returns such and is called in a reading
            thread. Taken in this thread, and few batches ahead of what was yielded.
        features: "clip" for the features averaged over all positions and mapped by CLIP's head, (width of CLIP,), 768
            in the released models; "pooled" for the average itself, (width of the tower,), 3072; "tokens" for all
            positions, (H/64 · W/64, width of the tower), row-major.
        normalize: scale every vector to length 1, so that a dot product is the cosine of the angle between two.
        resolution, fit: see `GenerationOptions`.
        threads: that read images; None for as many as there are cores, up to 8.

    Yields:
        One Embedding per image, in order. An image that cannot be read has an error in place of a vector.

    Raises:
        OptionError: before any image is taken; also where `features` is "clip" and the model has no such head.
        Whatever `images` itself raises, or a function among them that is no FastVLMError, ends the iteration.
    """
    check_features(model, features)
    if threads is not None and threads < 1:
        raise OptionError(f"threads is {threads}; expected 1 or more.")
    if fit == "tiles":
        raise OptionError("A picture in tiles has no one vector: choose another fit.")
    image_processor = processor.images_at(resolution, fit)
    threads = threads or min(_MAX_THREADS, os.cpu_count() or 1)
    return _embeddings(
        images, image_processor, lambda pixels: embed_pixels(model, pixels, features, normalize=normalize), threads
    )


def embed_pixels(
    model: FastVLM, pixel_values: mx.array, features: Features = "clip", *, normalize: bool = False
) -> mx.array:
    """The vectors of images that are prepared.

    Args:
        model: from `load`.
        pixel_values: (B, H, W, 3) in [0, 1], H and W multiples of 64.
        features, normalize: see `embed_images`.

    Returns:
        (B, width), or (B, H/64 · W/64, width) for "tokens"; float32 whatever the model computes in.

    Raises:
        OptionError: the model has no such features.
    """
    check_features(model, features)
    vectors = model.vision_tower(pixel_values.astype(model.dtype)).astype(mx.float32)
    if features != "tokens":
        vectors = mx.mean(vectors, axis=1)
    if features == "clip":
        vectors = model.clip_head(vectors)
    if normalize:
        vectors /= mx.maximum(mx.linalg.norm(vectors, axis=-1, keepdims=True), _SHORTEST)
    return vectors


def check_features(model: FastVLM, features: str) -> None:
    """Raise OptionError unless these features are known, and the model has what they need."""
    if features not in FEATURES:
        raise OptionError(f"The features are {features!r}; they must be one of {', '.join(FEATURES)}.")
    if features == "clip" and model.clip_head is None:
        raise OptionError(
            "This model has no CLIP head: its checkpoint has none, or an older release converted it (then convert it "
            'again). Take the tower\'s features instead: "pooled" or "tokens".'
        )


def _embeddings(
    images: Iterable, image_processor: ImageProcessor, embed: Callable[[mx.array], mx.array], threads: int
) -> Iterator[Embedding]:
    """See `embed_images`; `embed` is from (B, H, W, 3) to (B, …)."""
    side = image_processor.image_size
    batch = images_at_once((side, side)) * (1 if image_processor.fixed_size else _SHAPES)

    def read(image: ImageSource | Callable[[], ImageSource]) -> np.ndarray:
        return image_processor.to_array(image() if callable(image) else image)

    coming = enumerate(images)
    sources: dict[int, ImageSource | Callable[[], ImageSource]] = {}  # taken and not yet yielded, by index
    pixels: dict[int, np.ndarray | BaseException] = {}  # of those, what was read
    with ReadAhead(read, threads) as reader:
        while True:
            for index, image in itertools.islice(coming, 2 * batch + threads - len(sources)):
                sources[index] = image
                reader.give(index, image)
            indices = list(itertools.islice(sources, batch))
            if not indices:
                return
            while not all(index in pixels for index in indices):
                pixels.update([reader.take(wait=True)])
            results = [pixels.pop(index) for index in indices]
            vectors = iter(encode_together([result for result in results if isinstance(result, np.ndarray)], embed))
            for index, result in zip(indices, results, strict=True):
                image = sources.pop(index)
                if isinstance(result, np.ndarray):
                    yield Embedding(index, image, np.array(next(vectors)))
                elif isinstance(result, FastVLMError):
                    yield Embedding(index, image, None, error=" ".join(str(result).split()))
                else:
                    raise result
