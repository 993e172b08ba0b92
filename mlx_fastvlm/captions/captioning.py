"""A description of each of many images: read ahead in threads, encoded in batches, answered together, in order.

`caption_images` is the whole of it. Where images come from, and where captions go, is the caller's.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_fastvlm.answer import GenerationResponse
from mlx_fastvlm.batch_generate import BatchGenerator, images_at_once
from mlx_fastvlm.captions.read_ahead import ReadAhead
from mlx_fastvlm.errors import FastVLMError, OptionError
from mlx_fastvlm.image_decoding import ImageSource
from mlx_fastvlm.image_processing import ImageProcessor
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.tiling import TiledPixels

DEFAULT_PROMPT = "Describe this image."
DEFAULT_BATCH_SIZE = 16

_MAX_THREADS = 4  # more read faster than any model here describes
# Images taken and not yet yielded: two batches decode, one waits, one is read, two are finished behind a longer answer.
_BATCHES_AHEAD = 6


@dataclass(frozen=True)
class Caption:
    """What was made of one image.

    Attributes:
        index: its place among the images given, from 0.
        image: as given.
        text: the answer, None if there is none.
        error: why not, in one line; None where there is a text.
        finish_reason: "stop", or "length" where `max_tokens` cut the answer off; None without a text.
        prompt_tokens, generation_tokens: positions of the prompt, image rows included, and of the answer.
    """

    index: int
    image: ImageSource | Callable[[], ImageSource]
    text: str | None
    error: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    generation_tokens: int = 0


def caption_images(
    model: FastVLM,
    processor: Processor,
    images: Iterable[ImageSource | Callable[[], ImageSource]],
    prompt: str = DEFAULT_PROMPT,
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    threads: int | None = None,
    **options,
) -> Iterator[Caption]:
    """Answer one prompt about each of many images, several times as fast as one by one.

    Args:
        model, processor: from `load`.
        images: whatever `generate` takes as an image, or a function that returns such and is called in a reading
            thread. Taken in this thread, and never more than a few batches ahead of what was yielded: memory does not
            grow with their number.
        prompt: the same for all, with at most one `<image>` mark.
        batch_size: answers that begin together where that is faster; twice as many are decoded together. More take more
            memory.
        threads: that read images; None for as many as there are cores, up to 4.
        options: see `GenerationOptions`; all but `kv_bits`. Every text is what `generate` returns with these, but for
            the rounding of sums: a `seed` is each image's own.

    Yields:
        One Caption per image, in order. An image that cannot be read has an error in place of a text.

    Raises:
        OptionError: before any image is taken. Whatever `images` itself raises, or a function among them that is no
            FastVLMError, ends the iteration. Ending it early stops the threads.
    """
    if batch_size < 1:
        raise OptionError(f"batch_size is {batch_size}; expected 1 or more.")
    if threads is not None and threads < 1:
        raise OptionError(f"threads is {threads}; expected 1 or more.")
    chosen = GenerationOptions(**options)
    image_processor = processor.images_at(chosen.resolution, chosen.fit)
    side = image_processor.image_size
    group = min(batch_size, images_at_once((side, side)))
    generator = BatchGenerator(model, processor, max_rows=2 * batch_size, min_group=group)
    input_ids = processor.tokenize(prompt, 1, chosen.system)
    # Asked for and taken back: what cannot be answered is refused now rather than with the first image.
    generator.remove(generator.add_tokens(input_ids, [image_processor.largest()], options=chosen))
    threads = threads or min(_MAX_THREADS, os.cpu_count() or 1)
    work = _Work(generator, input_ids, chosen, ready_to_begin=group)
    return _captions(
        work, images, image_processor, threads, most_read=group + threads, window=_BATCHES_AHEAD * batch_size
    )


def _captions(
    work: _Work, images: Iterable, image_processor: ImageProcessor, threads: int, most_read: int, window: int
) -> Iterator[Caption]:
    """See `caption_images`.

    Args:
        work: begins and finishes answers.
        most_read: images being read, or read and not yet begun, at once.
        window: images taken and not yet yielded, at most.
    """

    def read(image: ImageSource | Callable[[], ImageSource]) -> np.ndarray | TiledPixels:
        return image_processor.prepare(image() if callable(image) else image)

    coming = enumerate(images)
    yielded = 0
    with ReadAhead(read, threads) as reader:

        def read_more() -> None:
            for index, image in itertools.islice(
                coming, min(most_read - reader.pending, yielded + window - work.taken)
            ):
                work.taken = index + 1
                reader.give((index, image), image)

        read_more()
        while reader.pending or work.unfinished:
            while work.has_room and (result := reader.take(wait=not work.generator.decoding)):
                (index, image), pixels = result
                work.begin(index, image, pixels)
                read_more()
            work.step(hurry=not reader.pending)
            while yielded in work.captions:
                yield work.captions.pop(yielded)
                yielded += 1
            read_more()


class _Work:
    """Answers being made, and captions that wait for those before them.

    Attributes:
        taken: how many images were taken.
        captions: finished, by index.
    """

    def __init__(
        self, generator: BatchGenerator, input_ids: Sequence[int], options: GenerationOptions, ready_to_begin: int
    ):
        self.generator = generator
        self.taken = 0
        self.captions: dict[int, Caption] = {}
        self._input_ids, self._options, self._ready_to_begin = input_ids, options, ready_to_begin
        self._answers: dict[int, _Answer] = {}  # by ticket

    @property
    def unfinished(self) -> bool:
        """Whether an answer is being made."""
        return bool(self._answers)

    @property
    def has_room(self) -> bool:
        """Whether another image should be given before the next step: pixels are not to pile up."""
        return self.generator.waiting < self._ready_to_begin

    def begin(self, index: int, image, pixels: np.ndarray | TiledPixels | BaseException) -> None:
        """Have an image answered; what could not be read is finished already. Raises what is no FastVLMError."""
        if isinstance(pixels, BaseException):
            self.captions[index] = _failed(index, image, pixels)
            return
        ticket = self.generator.add_tokens(self._input_ids, [pixels], options=self._options)
        self._answers[ticket] = _Answer(index, image)

    def step(self, hurry: bool) -> None:
        """One token for every answer, see `BatchGenerator.step`. Raises what is no FastVLMError."""
        for ticket, event in self.generator.step(hurry):
            answer = self._answers[ticket]
            if isinstance(event, Exception):
                self.captions[answer.index] = _failed(answer.index, answer.image, event)
                del self._answers[ticket]
                continue
            answer.pieces.append(event.text)
            if event.finish_reason:
                self.captions[answer.index] = answer.caption(event)
                del self._answers[ticket]


@dataclass
class _Answer:
    """An answer being made."""

    index: int
    image: ImageSource | Callable[[], ImageSource]
    pieces: list[str] = field(default_factory=list)

    def caption(self, last: GenerationResponse) -> Caption:
        return Caption(
            self.index,
            self.image,
            "".join(self.pieces),
            finish_reason=last.finish_reason,
            prompt_tokens=last.prompt_tokens,
            generation_tokens=last.generation_tokens,
        )


def _failed(index: int, image: ImageSource | Callable[[], ImageSource], error: BaseException) -> Caption:
    if not isinstance(error, FastVLMError):
        raise error
    return Caption(index, image, None, error=" ".join(str(error).split()))
