"""Answering: images and words → tokens → streamed text.

Three rungs, as in mlx-lm: `generate_step` yields tokens from embeddings and knows nothing of text, `stream_generate`
yields text with statistics, `generate` returns the whole answer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_fastvlm.answer import Answer, GenerationResponse, StageClock
from mlx_fastvlm.cache import Cache
from mlx_fastvlm.errors import ContextError, FastVLMWarning
from mlx_fastvlm.image_decoding import ImageSource
from mlx_fastvlm.image_features import encode_pixels, pixel_rows, read_pixels
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.prompt import Message
from mlx_fastvlm.sampling import Sampler
from mlx_fastvlm.token_draw import TokenDraw, make_draw

if TYPE_CHECKING:
    from mlx_fastvlm.reuse import Reuse

SEVERAL_IMAGES = "FastVLM was trained on one image at a time; answers about several may mix them up."


def generate_step(
    prompt_logits: mx.array,
    model: FastVLM,
    cache: list[Cache],
    *,
    max_tokens: int,
    sampler: Sampler,
    works_ahead: bool = True,
) -> Iterator[int]:
    """Yield tokens one by one; on a GPU the next step runs while the caller handles the last token.

    Args:
        prompt_logits: (1, vocab) for the position after the prompt.
        model: decodes.
        cache: holds the prompt; extended in place by the tokens yielded, less the last, plus one on a GPU.
        max_tokens: how many tokens to yield at most.
        sampler: draws a token from logits; it is called once for every token, in order.
        works_ahead: False where the sampler must not draw a token that may not be asked for.
    """
    decoder = model.language_model
    # Working ahead pays where the device computes by itself. Not before the first token: that one is waited for.
    works_ahead = works_ahead and mx.default_device().type == mx.DeviceType.gpu

    def draw(logits: mx.array) -> mx.array:
        token = sampler(logits)
        mx.async_eval(token)
        return token

    def following(token: mx.array) -> mx.array:
        hidden = decoder.hidden_states(decoder.embed_tokens(token[:, None]), cache)
        return draw(decoder.logits(hidden[:, -1]))

    token = draw(prompt_logits)
    for count in range(1, max_tokens + 1):
        upcoming = following(token) if works_ahead and 1 < count < max_tokens else None
        yield token.item()
        if count < max_tokens:
            token = following(token) if upcoming is None else upcoming


def prefill(model: FastVLM, inputs_embeds: mx.array, cache: list[Cache]) -> mx.array:
    """Run the prompt, or what follows the part of it that `cache` holds, through the decoder.

    Args:
        inputs_embeds: (1, L, hidden) as `model.embed` makes them.
        cache: extended in place by L positions.

    Returns:
        (1, vocab) logits for the position after the prompt; the head runs on the last position only.
    """
    hidden = model.language_model.hidden_states(inputs_embeds, cache)
    return model.language_model.logits(hidden[:, -1])


@dataclass
class Prefilled:
    """A prompt that the decoder has seen.

    Attributes:
        logits: (1, vocab) for the position after it.
        cache: its keys and values.
        prompt_tokens: its positions.
        cached_tokens: how many of them were not computed anew.
    """

    logits: mx.array
    cache: list[Cache]
    prompt_tokens: int
    cached_tokens: int = 0


def prefill_prompt(
    model: FastVLM,
    processor: Processor,
    input_ids: Sequence[int],
    images: Sequence[ImageSource],
    options: GenerationOptions,
    clock: StageClock,
) -> Prefilled:
    """Encode the images and run the whole prompt through the decoder, afresh.

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
    image_processor = processor.images_at(options.resolution, options.fit)
    prepared = [read_pixels(image_processor, image, clock) for image in images]
    prompt_tokens = count_positions(input_ids, [pixel_rows(pixels) for pixels in prepared])
    check_context(model, prompt_tokens, options.max_tokens)
    cache = model.make_cache(options.kv_bits)
    features = [encode_pixels(model, pixels, clock) for pixels in prepared]
    logits = prefill(model, model.embed(input_ids, features), cache)
    mx.eval(logits)
    clock.lap("prefill")
    return Prefilled(logits, cache, prompt_tokens)


def stream_generate(
    model: FastVLM,
    processor: Processor,
    prompt: str | Sequence[Message],
    image: ImageSource | Sequence[ImageSource] | None = None,
    *,
    reuse: Reuse | None = None,
    **options,
) -> Iterator[GenerationResponse]:
    """Answer in pieces.

    Args:
        model, processor: from `load`.
        prompt: a question, or messages (see `prompt.build_prompt`).
        image: a path, URL, "-" (standard input), bytes, PIL image or (H, W, 3) uint8 array; or a list of them.
        reuse: what earlier answers of this model computed and this one need not, and keeps what this one computes.
        options: see `options.GenerationOptions`: max_tokens, temp, top_p, top_k, repetition_penalty, seed, stop, system,
            kv_bits, json_schema, choices, logprobs, resolution, fit.

    Yields:
        One response per token; the texts join to what `generate` returns.

    Raises:
        OptionError, ImageError: on the first `next`, before anything is yielded.
    """
    chosen = GenerationOptions(**options)
    if reuse is not None:
        reuse.check_model(model, processor)
    clock = StageClock()
    images = as_list(image)
    if len(images) > 1:
        warnings.warn(SEVERAL_IMAGES, FastVLMWarning, stacklevel=2)
    input_ids = processor.tokenize(prompt, len(images), chosen.system)
    draw = make_draw(processor, chosen)
    clock.lap("tokenize")
    if reuse is None:
        prefilled = prefill_prompt(model, processor, input_ids, images, chosen, clock)
        yield from _answer(model, processor, prefilled, chosen, draw, clock)
        return
    with reuse.prefilled(input_ids, images, chosen, clock) as prefilled:
        for response in _answer(model, processor, prefilled, chosen, draw, clock):
            prefilled.saw(response.token)
            yield response


def generate(
    model: FastVLM,
    processor: Processor,
    prompt: str | Sequence[Message],
    image: ImageSource | Sequence[ImageSource] | None = None,
    *,
    reuse: Reuse | None = None,
    **options,
) -> str:
    """The whole answer as one string; arguments as in `stream_generate`."""
    responses = stream_generate(model, processor, prompt, image, reuse=reuse, **options)
    return "".join(response.text for response in responses)


def as_list(image: ImageSource | Sequence[ImageSource] | None) -> list[ImageSource]:
    """No image, one or several, as a list."""
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]


def count_positions(input_ids: Sequence[int], rows: Sequence[int]) -> int:
    """Positions that the decoder sees: text tokens, and the rows of each image in place of its -200."""
    return len(input_ids) + sum(rows) - len(rows)


def check_context(model: FastVLM, prompt_tokens: int, max_tokens: int) -> None:
    """Raise ContextError if a prompt and its longest answer do not fit into the model's context."""
    limit = model.config.text_config.max_position_embeddings
    if prompt_tokens + max_tokens > limit:
        raise ContextError(
            f"The prompt takes {prompt_tokens} tokens and max_tokens is {max_tokens}; the model's context holds {limit} "
            "in all. Shorten the prompt or lower max_tokens."
        )


def _answer(
    model: FastVLM,
    processor: Processor,
    prefilled: Prefilled,
    options: GenerationOptions,
    draw: TokenDraw,
    clock: StageClock,
) -> Iterator[GenerationResponse]:
    """The responses of one answer."""
    answer = Answer(
        processor,
        options,
        prompt_tokens=prefilled.prompt_tokens,
        cached_tokens=prefilled.cached_tokens,
        clock=clock,
    )
    tokens = generate_step(
        prefilled.logits,
        model,
        prefilled.cache,
        max_tokens=options.max_tokens,
        sampler=draw,
        works_ahead=not options.is_constrained,
    )
    for token in tokens:
        response = answer.add(token, draw.next_logprobs())
        yield response
        if response.finish_reason:
            return
