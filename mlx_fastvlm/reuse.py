"""What answers leave for later ones: image rows by content, keys and values by what the decoder saw.

A second question on a picture runs neither the encoder nor the picture's rows through the decoder; the answer is the one
that a fresh start gives.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_fastvlm.answer import StageClock
from mlx_fastvlm.config import IMAGE_TOKEN_INDEX
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.feature_cache import FeatureCache, rows_name
from mlx_fastvlm.generate import Prefilled, check_context, prefill
from mlx_fastvlm.image_content import ImageContent, recognize
from mlx_fastvlm.image_decoding import ImageSource, open_image
from mlx_fastvlm.image_features import image_rows
from mlx_fastvlm.image_processing import ImageProcessor
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.prefix_cache import Position, PrefixCache
from mlx_fastvlm.processor import Processor

MAX_FEATURE_BYTES = 2**28  # some 290 pictures of 256 rows for the 0.5B in float32
MAX_PREFIX_BYTES = 2**29  # some 21,000 positions of the 0.5B in float32

_MOST_CHOSEN = 4096  # images whose resolution is remembered


@dataclass
class ReusablePrompt(Prefilled):
    """A prompt that the decoder has seen, and that grows by the answer.

    Attributes:
        positions: what the decoder saw, the answer so far included.
    """

    positions: list[Position] = field(default_factory=list)

    def saw(self, token: int) -> None:
        """Note the next token of the answer."""
        self.positions.append(token)


class Reuse:
    """The memory that the answers of one model share. Give it to `generate`, or let a `Conversation` make one.

    Use it, and everything that shares it, from one thread at a time.

    Args:
        model, processor: from `load`. The constant beginning of every prompt is run through the decoder here.
        max_feature_bytes: for image rows.
        max_prefix_bytes: for keys and values.
        folder: keeps image rows for later processes too.
    """

    def __init__(
        self,
        model: FastVLM,
        processor: Processor,
        *,
        max_feature_bytes: int = MAX_FEATURE_BYTES,
        max_prefix_bytes: int = MAX_PREFIX_BYTES,
        folder: str | os.PathLike[str] | None = None,
    ):
        self.model = model
        self.processor = processor
        self.features = FeatureCache(model, max_feature_bytes, folder)
        self.prefixes = PrefixCache(max_prefix_bytes)
        self._chosen: OrderedDict[str, ImageProcessor] = OrderedDict()  # by content, where it decides; oldest first
        self._prefill_beginning()

    def check_model(self, model: FastVLM, processor: Processor) -> None:
        """Raise OptionError if answers of another model are to be made with it: what it holds is worth nothing to them."""
        if model is not self.model or processor is not self.processor:
            raise OptionError("This Reuse was made with another model or processor; make one for each that is loaded.")

    @contextmanager
    def prefilled(
        self, input_ids: Sequence[int], images: Sequence[ImageSource], options: GenerationOptions, clock: StageClock
    ) -> Iterator[ReusablePrompt]:
        """A prompt ready to be answered; what the decoder has seen when the block ends, however it does, is kept.

        Args:
            input_ids: with -200 at each image.
            images: in the order of those.
            options: for the size of images, the context's limit and the kind of cache.
            clock: stages are booked on it.

        Raises:
            ContextError: prompt and answer do not fit into the context.
            ImageError: an image cannot be read.
            OptionError: the size of images cannot be had.
        """
        prompt = self._prefill(input_ids, images, options, clock)
        in_doubt = 1  # positions: Ctrl-C may leave the last one half written
        try:
            yield prompt
            in_doubt = 0
        except GeneratorExit:  # the answer was not wanted to its end
            in_doubt = 0
            raise
        finally:
            # The decoder has not seen the last token drawn; on a GPU it may have seen one that was not asked for.
            seen = min([len(prompt.positions), *(layer.offset for layer in prompt.cache)])
            self.prefixes.keep(prompt.positions[: seen - in_doubt], prompt.cache, options.kv_bits)

    def prefill(
        self, input_ids: Sequence[int], images: Sequence[ImageSource], options: GenerationOptions
    ) -> StageClock:
        """Run the beginning of a prompt through the decoder and keep it. Returns the stages' times; raises as `prefilled`."""
        clock = StageClock()
        with self.prefilled(input_ids, images, options, clock):
            pass
        return clock

    def chosen_for(self, image: ImageContent, image_processor: ImageProcessor) -> ImageProcessor:
        """`ImageProcessor.chosen_for`, which looks at an image once. Raises ImageError."""
        if image_processor.auto is None:
            return image_processor
        name = rows_name(image, image_processor)
        if name not in self._chosen:
            picture = open_image(image.open(), background=image_processor.background)
            self._chosen[name] = image_processor.chosen_for(picture)
            if len(self._chosen) > _MOST_CHOSEN:
                self._chosen.popitem(last=False)
        return self._chosen[name]

    def _prefill(
        self, input_ids: Sequence[int], images: Sequence[ImageSource], options: GenerationOptions, clock: StageClock
    ) -> ReusablePrompt:
        image_processor = self.processor.images_at(options.resolution, options.fit)
        contents = [recognize(image, image_processor.background) for image in images]
        prepared = [self.chosen_for(content, image_processor) for content in contents]
        rows = [image_rows(content, chosen) for content, chosen in zip(contents, prepared, strict=True)]
        names = [rows_name(content, chosen) for content, chosen in zip(contents, prepared, strict=True)]
        clock.lap("recognize")
        positions = _positions(input_ids, names, rows)
        check_context(self.model, len(positions), options.max_tokens)
        cache, known = self.prefixes.longest(positions, options.kv_bits)
        if cache is None:
            cache = self.model.make_cache(options.kv_bits)
        rest, num_images, rows_known = _rest_of(input_ids, rows, known)
        needed = list(zip(contents, prepared, strict=True))[len(contents) - num_images :]
        features = [self.features.rows(content, chosen, clock) for content, chosen in needed]
        if rows_known:
            features[0] = features[0][rows_known:]
        logits = prefill(self.model, self.model.embed(rest, features), cache)
        mx.eval(logits)
        clock.lap("prefill")
        return ReusablePrompt(logits, cache, len(positions), known, positions)

    def _prefill_beginning(self) -> None:
        """Hold what every prompt with the default system line begins with, for good."""
        ids = self.processor.tokenize("", 1)
        beginning = ids[: ids.index(IMAGE_TOKEN_INDEX)]
        cache = self.model.make_cache()
        prefill(self.model, self.model.embed(beginning), cache)
        self.prefixes.keep(beginning, cache, pinned=True)


def _positions(input_ids: Sequence[int], names: Sequence[str], rows: Sequence[int]) -> list[Position]:
    """What the decoder sees, position by position.

    Args:
        input_ids: with -200 at each image.
        names, rows: what each image's rows are known by, and how many they are.
    """
    images = iter(zip(names, rows, strict=True))
    positions: list[Position] = []
    for token in input_ids:
        name, count = next(images) if token == IMAGE_TOKEN_INDEX else (token, 1)
        positions += [name] * count
    return positions


def _rest_of(input_ids: Sequence[int], rows: Sequence[int], known: int) -> tuple[list[int], int, int]:
    """What is left of a prompt whose first `known` positions the decoder has seen.

    Args:
        input_ids: with -200 at each image.
        rows: positions of each image.
        known: fewer than the prompt has.

    Returns:
        The ids from the first one on that is not fully known, the images among them, and the rows known of the first.
    """
    position, widths = 0, iter(rows)
    for i, token in enumerate(input_ids):
        width = next(widths) if token == IMAGE_TOKEN_INDEX else 1
        if position + width > known:
            rest = list(input_ids[i:])
            return rest, rest.count(IMAGE_TOKEN_INDEX), known - position
        position += width
    raise ValueError(f"{known} positions are known of a prompt of {position}.")
