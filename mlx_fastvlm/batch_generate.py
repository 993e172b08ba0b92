"""Answering many prompts at once, each as it would be answered alone: continuous batching.

Answers of any mix of lengths, images and options are decoded together, one token each a step; a finished one makes room
for the next prompt. Images that wait together are encoded together, prompts of equal length prefilled together.
mlx-lm's BatchGenerator is not used: it takes token ids only, no image rows, and loading it takes 2 s and transformers.
Knows no files and prints nothing: captions/ reads pictures for it.
"""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_fastvlm.answer import Answer, GenerationResponse, StageClock
from mlx_fastvlm.batch_cache import BatchCache
from mlx_fastvlm.blas import one_thread
from mlx_fastvlm.cache import Cache, KVCache
from mlx_fastvlm.errors import FastVLMWarning, OptionError
from mlx_fastvlm.generate import (
    SEVERAL_IMAGES,
    Prefilled,
    as_list,
    check_context,
    count_positions,
    prefill,
)
from mlx_fastvlm.image_decoding import ImageSource
from mlx_fastvlm.image_features import merged_rows, pixel_rows, read_pixels, tiles_of
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.prompt import Message
from mlx_fastvlm.resolution import Size
from mlx_fastvlm.tiling import TiledPixels
from mlx_fastvlm.token_draw import TokenDraw, make_draw

ENCODE_PIXELS = 2**20  # encoded at once: one image of 1024x1024, which gains nothing from company, or 16 of 256x256
PREFILL_POSITIONS = 4096  # prefilled at once, so that memory does not grow with the batch

_SMALL_PRODUCT = 2**24  # multiplications: one core of a CPU takes less time for them than its threads to find together
_FREED_BYTES = 2**30  # more than one encode and prefill leave behind, so that steady work finds its buffers again

Event = tuple[int, GenerationResponse | Exception]  # of the request with this ticket


class BatchGenerator:
    """Decodes up to `max_rows` answers together. Use it from one thread.

    A request is added, gets a ticket, and waits for a place; `step` after `step` takes all answers further. What it
    gets equals `stream_generate` with the same options, but for rounding: sums of a batch are made in another order.

    Args:
        model, processor: from `load`.
        max_rows: answers decoded together at most.
        min_group: while answers are being decoded, new ones wait until so many can begin together. Above 1 this costs
            waiting time and gains throughput, where encoding and prefill are cheaper together.
    """

    def __init__(self, model: FastVLM, processor: Processor, *, max_rows: int = 16, min_group: int = 1):
        if not 1 <= min_group <= max_rows:
            raise OptionError(
                f"max_rows is {max_rows} and min_group {min_group}; expected 1 or more, and min_group up to max_rows."
            )
        self._model, self._processor = model, processor
        self._max_rows, self._min_group = max_rows, min_group
        self._tickets = itertools.count()
        self._waiting: deque[_Request] = deque()
        self._rows: list[_Row] = []  # as in the cache; those that are done leave it with the next step
        self._cache = BatchCache(len(model.language_model.layers))
        self._largest_weight = max(weight.size for _, weight in tree_flatten(model.language_model.parameters()))
        self._has_begun = False  # with the last step answers did

    @property
    def waiting(self) -> int:
        """Requests without a place yet."""
        return len(self._waiting)

    @property
    def decoding(self) -> int:
        """Answers begun and not finished."""
        return sum(not row.done for row in self._rows)

    def add(
        self,
        prompt: str | Sequence[Message],
        image: ImageSource | Sequence[ImageSource] | None = None,
        *,
        options: GenerationOptions | None = None,
    ) -> int:
        """Ask for an answer. Images are read here and now.

        Args:
            prompt, image: as in `stream_generate`.
            options: of this answer; None for the defaults. `kv_bits` cannot be had in a batch.

        Returns:
            The request's ticket.

        Raises:
            OptionError, ImageError: as `stream_generate` would; nothing else is affected.
        """
        options, clock = options or GenerationOptions(), StageClock()
        images = as_list(image)
        if len(images) > 1:
            warnings.warn(SEVERAL_IMAGES, FastVLMWarning, stacklevel=2)
        input_ids = self._processor.tokenize(prompt, len(images), options.system)
        clock.lap("tokenize")
        image_processor = self._processor.images_at(options.resolution, options.fit)
        pixels = [read_pixels(image_processor, image, clock) for image in images]
        return self.add_tokens(input_ids, pixels, options=options, clock=clock)

    def add_tokens(
        self,
        input_ids: Sequence[int],
        pixels: Sequence[np.ndarray | TiledPixels] = (),
        *,
        options: GenerationOptions,
        clock: StageClock | None = None,
    ) -> int:
        """`add` for a prompt that is tokenized and images that are read.

        Args:
            input_ids: -200 at each image.
            pixels: what `ImageProcessor.prepare` makes of each: an (H, W, 3) float32 array, or tiles.
            options: of this answer; resolution and fit are what the pixels say.
            clock: has run since the request came; None starts it now.

        Raises:
            OptionError: prompt and answer do not fit into the context, or the options cannot be followed.
        """
        prompt_tokens = count_positions(input_ids, [pixel_rows(image) for image in pixels])
        check_context(self._model, prompt_tokens, options.max_tokens)
        return self._enqueue(options, clock, None, input_ids=input_ids, pixels=pixels)

    def add_prefilled(
        self, prompt: Prefilled, *, options: GenerationOptions, clock: StageClock, draw: TokenDraw | None = None
    ) -> int:
        """`add` for a prompt that the decoder has seen, for example with what `Reuse` knew of it.

        Args:
            prompt: its caches hold one sequence, not quantized; they are read when the answer begins, never written.
            options: of this answer.
            clock: has run since the request came, with the time of the prefill booked as "prefill".
            draw: made from the options already, as compiling a form takes a while; None makes it here.

        Raises:
            OptionError: the answer does not fit into the context, or the options cannot be followed.
        """
        check_context(self._model, prompt.prompt_tokens, options.max_tokens)
        return self._enqueue(options, clock, draw, prefilled=prompt)

    def remove(self, ticket: int) -> None:
        """Cancel a request wherever it stands; one that is finished or unknown is none."""
        self._waiting = deque(request for request in self._waiting if request.ticket != ticket)
        for row in self._rows:
            row.done |= row.ticket == ticket

    def caches(self, ticket: int) -> list[KVCache]:
        """What the decoder has seen of an answer and its prompt, to be kept for later prompts that begin so.

        Args:
            ticket: of an answer that is being decoded, or whose last token came with the last step.

        Returns:
            A cache for each layer with all positions but that of the last token drawn.

        Raises:
            KeyError: there is no such answer.
        """
        index = next((index for index, row in enumerate(self._rows) if row.ticket == ticket), None)
        if index is None:
            raise KeyError(f"No answer with ticket {ticket} is being decoded.")
        return self._cache.row(index)

    def step(self, hurry: bool = False) -> list[Event]:
        """Let waiting requests begin where there is room, or else take every answer one token further.

        A first token is handed out before others are decoded; between two beginnings the answers go on. Without
        requests the memory of the last ones is freed.

        Args:
            hurry: begin with fewer than `min_group` too, as no others are to be expected.

        Returns:
            (ticket, response) for each token, at most one an answer; `finish_reason` marks an answer's last.
            (ticket, exception) where an answer cannot go on, which ends this one only.
        """
        beginnings = self._begin(self._admitted(1 if hurry else self._min_group))
        self._has_begun = bool(beginnings)
        stay = [index for index, row in enumerate(self._rows) if not row.done]
        if beginnings or len(stay) < len(self._rows):
            self._cache.regroup(stay, [beginning.cache for beginning in beginnings])
        newcomers = [row for beginning in beginnings for row in beginning.rows]
        self._rows = [self._rows[index] for index in stay] + newcomers
        if newcomers:
            _limit_freed_memory()
            return _draw_tokens(newcomers, mx.concatenate([beginning.logits for beginning in beginnings]))
        if not self.decoding:
            return []
        is_small = len(self._rows) * self._largest_weight < _SMALL_PRODUCT
        with one_thread() if is_small else nullcontext():
            return _draw_tokens(self._rows, self._decode())

    def _enqueue(self, options: GenerationOptions, clock: StageClock | None, draw: TokenDraw | None, **prompt) -> int:
        if options.kv_bits is not None:
            raise OptionError("kv_bits cannot be had in a batch: leave it out, or answer one by one.")
        ticket = next(self._tickets)
        draw = draw or make_draw(self._processor, options)
        self._waiting.append(_Request(ticket, options, draw, clock or StageClock(), **prompt))
        return ticket

    def _admitted(self, min_group: int) -> list[_Request]:
        """Requests that begin now, in the order in which they came; while others are decoded, at least so many."""
        decoding = self.decoding
        count = min(self._max_rows - decoding, len(self._waiting))
        if decoding and (count < min_group or self._has_begun):
            return []
        return [self._waiting.popleft() for _ in range(count)]

    def _begin(self, requests: Sequence[_Request]) -> list[_Beginning]:
        """Encode and prefill."""
        for request in requests:
            request.clock.lap("wait")
        fresh = [request for request in requests if request.prefilled is None]
        features = iter(self._encode([image for request in fresh for image in request.pixels]))
        by_length: dict[int, list[tuple[_Request, mx.array]]] = {}
        for request in fresh:
            embeds = self._model.embed(request.input_ids, list(itertools.islice(features, len(request.pixels))))
            by_length.setdefault(embeds.shape[1], []).append((request, embeds))
            request.clock.lap("encode" if request.pixels else "wait")
            request.pixels = ()
        beginnings = [
            self._prefilled(group)
            for length, all_of_length in by_length.items()
            for group in _chunks(all_of_length, PREFILL_POSITIONS // length)
        ]
        return beginnings + [self._continued(request) for request in requests if request.prefilled is not None]

    def _encode(self, pixels: Sequence[np.ndarray | TiledPixels]) -> list[mx.array]:
        """Each image's rows, (N, hidden); tiles are encoded as images are."""
        tiles = [tiles_of(image) for image in pixels]
        rows = iter(encode_together(list(itertools.chain.from_iterable(tiles)), self._model.encode_images))
        return [
            merged_rows(image, mx.stack(list(itertools.islice(rows, len(parts)))))
            for image, parts in zip(pixels, tiles, strict=True)
        ]

    def _prefilled(self, group: Sequence[tuple[_Request, mx.array]]) -> _Beginning:
        """Run prompts of equal length through the decoder."""
        requests, embeds = zip(*group, strict=True)
        for request in requests:
            request.clock.lap("wait")
        cache = self._model.make_cache()
        logits = prefill(self._model, mx.concatenate(embeds), cache)
        mx.eval(logits)
        for request in requests:
            request.clock.lap("prefill")
        return _Beginning([self._row(request, embeds[0].shape[1]) for request in requests], logits, cache)

    def _continued(self, request: _Request) -> _Beginning:
        """What was prefilled elsewhere."""
        prompt = request.prefilled
        return _Beginning([self._row(request, prompt.prompt_tokens, prompt.cached_tokens)], prompt.logits, prompt.cache)

    def _row(self, request: _Request, prompt_tokens: int, cached_tokens: int = 0) -> _Row:
        answer = Answer(
            self._processor,
            request.options,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            clock=request.clock,
        )
        return _Row(request.ticket, answer, request.draw)

    def _decode(self) -> mx.array:
        """(rows, vocab) logits for the position after each row's last token."""
        decoder = self._model.language_model
        tokens = mx.array([[row.token] for row in self._rows])
        hidden = decoder.hidden_states(decoder.embed_tokens(tokens), self._cache.layers)
        return decoder.logits(hidden[:, -1])


def encode_together(pixels: Sequence[np.ndarray], encode: Callable[[mx.array], mx.array]) -> list[mx.array]:
    """What an encoder makes of each of some images; those of one size are encoded together, see `images_at_once`.

    Args:
        pixels: (H, W, 3) each, from `ImageProcessor.to_array`.
        encode: from (B, H, W, 3) to (B, …).
    """
    by_size: dict[Size, list[int]] = {}
    for index, image in enumerate(pixels):
        by_size.setdefault(image.shape[:2], []).append(index)
    features: dict[int, mx.array] = {}
    for size, indices in by_size.items():
        for chunk in _chunks(indices, images_at_once(size)):
            encoded = encode(mx.array(np.stack([pixels[index] for index in chunk])))
            mx.eval(encoded)
            features |= zip(chunk, encoded, strict=True)
    return [features[index] for index in range(len(pixels))]


def images_at_once(size: Size) -> int:
    """How many images of this size are encoded together; more would gain nothing and take memory."""
    height, width = size
    return max(1, ENCODE_PIXELS // (height * width))


@dataclass
class _Request:
    """Waits for a place. Either tokens and pixels are given or what the decoder has seen."""

    ticket: int
    options: GenerationOptions
    draw: TokenDraw
    clock: StageClock
    input_ids: Sequence[int] = ()
    pixels: Sequence[np.ndarray | TiledPixels] = ()
    prefilled: Prefilled | None = None


@dataclass
class _Row:
    """An answer being decoded."""

    ticket: int
    answer: Answer
    draw: TokenDraw
    token: int = 0  # its last
    done: bool = False


@dataclass
class _Beginning:
    """Answers that begin together: equally long prompts, with the logits (rows, vocab) for what follows them."""

    rows: list[_Row]
    logits: mx.array
    cache: list[Cache]


def _draw_tokens(rows: Sequence[_Row], logits: mx.array) -> list[Event]:
    """One token for every row that is not done, from its logits (rows, vocab)."""
    drawn: dict[int, mx.array | Exception] = {}  # of rows that do more than take the likeliest
    for index, row in enumerate(rows):
        if not row.done and not row.draw.is_greedy:
            try:
                drawn[index] = row.draw(logits[index : index + 1])
            except Exception as error:  # whatever an answer's form ran into is that answer's problem alone
                drawn[index] = error
    likeliest = mx.argmax(logits, axis=-1).tolist()
    events: list[Event] = []
    for index, row in enumerate(rows):
        if row.done:
            continue
        token = drawn.get(index, likeliest[index])
        if isinstance(token, Exception):
            row.done = True
            events.append((row.ticket, token))
            continue
        row.token = token if isinstance(token, int) else token.item()
        response = row.answer.add(row.token, row.draw.next_logprobs())
        row.done = response.finish_reason is not None
        events.append((row.ticket, response))
    return events


def _limit_freed_memory() -> None:
    """Give back what MLX keeps of freed memory once it is much: batches of ever new shapes leave buffers of any size."""
    if mx.get_cache_memory() > _FREED_BYTES:
        mx.clear_cache()


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    """At most `size` items at a time, at least one."""
    size = max(1, size)
    for start in range(0, len(items), size):
        yield items[start : start + size]
