"""Captions at the scale of a cluster: a callable class for Ray Data's `map_batches`.

Reading, distributing, retrying and writing are Ray's. Nothing of Ray is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_fastvlm.captions.captioning import DEFAULT_BATCH_SIZE, DEFAULT_PROMPT, caption_images
from mlx_fastvlm.captions.picture_files import Picture
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.image_decoding import ImageSource
from mlx_fastvlm.loading import DEFAULT_MODEL, load
from mlx_fastvlm.options import GenerationOptions

if TYPE_CHECKING:
    from mlx_fastvlm.model import FastVLM
    from mlx_fastvlm.processor import Processor


class CaptionBatches:
    """Adds captions to batches of images. Ray makes one in each actor, where it loads the model once.

        dataset.map_batches(
            CaptionBatches,
            fn_constructor_kwargs={"model": "demo", "column": "path"},
            batch_size=64,
            compute=ray.data.ActorPoolStrategy(size=2),
        )

    Args:
        model: hub id, folder or "demo", as `load` takes it; reachable from every node.
        prompt: the question asked about every image.
        column: holds the images: paths and http(s) URLs, the bytes of image files (`ray.data.read_binary_files`), or
            uint8 arrays (H, W, C) (`ray.data.read_images`).
        output: name of the column of captions; empty text where there is none.
        error: name of the column that says, in one line, why there is no caption; empty text where there is one.
        batch_size: images captioned at once. Ray's own batch_size should be a few times that, for them to overlap.
        threads: that read images; None for as many as there are cores, up to 4.
        dtype, revision: as `load` takes them.
        options: as `generate` takes them.

    Raises:
        OptionError: an option is out of range, or two columns have one name.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        prompt: str = DEFAULT_PROMPT,
        *,
        column: str = "path",
        output: str = "caption",
        error: str = "error",
        batch_size: int = DEFAULT_BATCH_SIZE,
        threads: int | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        **options: Any,
    ):
        GenerationOptions(**options)
        if len({column, output, error}) < 3:
            raise OptionError(f"The columns {column}, {output} and {error} need three different names.")
        self._prompt, self._options = prompt, {"batch_size": batch_size, "threads": threads, **options}
        self._column, self._output, self._error = column, output, error
        self._model = {"model": model, "dtype": dtype, "revision": revision}

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with two more columns.

        Args:
            batch: a column name → array of B values, as Ray has it with batch_format="numpy".

        Raises:
            OptionError: the column of images is missing.
            FastVLMError: the model cannot be loaded.
        """
        if self._column not in batch:
            raise OptionError(f"The batch has no column {self._column!r}; it has {', '.join(batch)}.")
        images = [_image(value) for value in batch[self._column]]
        captions = list(caption_images(*self._loaded, images, self._prompt, **self._options))
        return {
            **batch,
            # Text in every row, never None: a block of nothing but None would have another type than the others.
            self._output: np.array([caption.text or "" for caption in captions], dtype=object),
            self._error: np.array([caption.error or "" for caption in captions], dtype=object),
        }

    @cached_property
    def _loaded(self) -> tuple[FastVLM, Processor]:
        return load(**self._model)

    def __getstate__(self) -> dict[str, Any]:
        """Without the model, which every actor loads for itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_loaded"}


def _image(value: object) -> ImageSource:
    """What `open_image` takes; of a text, the file or URL that it names."""
    return Picture(value).source if isinstance(value, str) else value
