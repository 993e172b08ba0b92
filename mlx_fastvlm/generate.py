"""Answering: images and words → tokens → streamed text.

Three rungs, as in mlx-lm: `generate_step` yields tokens from embeddings and knows nothing of text, `stream_generate`
yields text with statistics, `generate` returns the whole answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_fastvlm.cache import KV_BITS, Cache
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.image_processing import ImageSource, open_image
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.prompt import Message
from mlx_fastvlm.sampling import Sampler, make_sampler, penalize_repetition

DEFAULT_MAX_TOKENS = 256


@dataclass
class GenerationResponse:
    """One step of a streamed answer. Times are seconds, rates per second.

    Attributes:
        text: what this step adds to the answer; often empty while a character or a stop string may be incomplete.
        token: the token behind it.
        prompt_tokens: positions the decoder saw before the answer, image rows included.
        prompt_tps: prompt_tokens over the time of the prefill.
        generation_tokens: tokens of the answer so far, the one that ends it included.
        generation_tps: tokens after the first, over the time since the first.
        ttft: from the image's bytes (or the prompt, if there is no image) to the first token.
        peak_memory: most memory MLX has held, in GB (10⁹ bytes).
        finish_reason: "stop" or "length" on the last response, None before.
        timings: seconds by stage up to the first token: decode, resize, encode, project (with images), tokenize,
            prefill, first_token. They add up to ttft.
    """

    text: str
    token: int
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    ttft: float
    peak_memory: float
    finish_reason: str | None = None
    timings: dict[str, float] = field(default_factory=dict)


def generate_step(
    prompt_logits: mx.array,
    model: FastVLM,
    cache: list[Cache],
    *,
    max_tokens: int,
    sampler: Sampler,
    repetition_penalty: float = 1.0,
) -> Iterator[int]:
    """Yield tokens one by one; on a GPU the next step runs while the caller handles the last token.

    Args:
        prompt_logits: (1, vocab) for the position after the prompt.
        model: decodes.
        cache: holds the prompt; extended in place by the tokens yielded, less the last, plus one on a GPU.
        max_tokens: how many tokens to yield at most.
        sampler: draws a token from logits.
        repetition_penalty: above 1 makes tokens of this answer less likely to return.
    """
    decoder = model.language_model
    # Working ahead pays where the device computes by itself. Not before the first token: that one is waited for.
    works_ahead = mx.default_device().type == mx.DeviceType.gpu
    generated: mx.array | None = None

    def draw(logits: mx.array) -> mx.array:
        nonlocal generated
        if generated is not None:
            logits = penalize_repetition(logits, generated, repetition_penalty)
        token = sampler(logits)
        if repetition_penalty != 1.0:
            generated = token[:, None] if generated is None else mx.concatenate([generated, token[:, None]], axis=1)
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
    """Run the prompt through the decoder.

    Args:
        inputs_embeds: (1, L, hidden) as `model.embed` makes them.
        cache: extended in place by L positions.

    Returns:
        (1, vocab) logits for the position after the prompt; the head runs on the last position only.
    """
    hidden = model.language_model.hidden_states(inputs_embeds, cache)
    return model.language_model.logits(hidden[:, -1])


def stream_generate(
    model: FastVLM,
    processor: Processor,
    prompt: str | Sequence[Message],
    image: ImageSource | Sequence[ImageSource] | None = None,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    temp: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    system: str | None = None,
    kv_bits: int | None = None,
) -> Iterator[GenerationResponse]:
    """Answer in pieces.

    Args:
        model, processor: from `load`.
        prompt: a question, or messages (see `prompt.build_prompt`).
        image: a path, URL, "-" (standard input), bytes, PIL image or (H, W, 3) uint8 array; or a list of them.
        max_tokens: longest answer in tokens.
        temp, top_p, top_k, seed: see `sampling.make_sampler`.
        repetition_penalty: 1 changes nothing; above 1 discourages tokens of this answer from returning.
        stop: strings that end the answer; they are not part of it.
        system: system line in place of the default.
        kv_bits: 2, 3, 4, 5, 6 or 8 to hold keys and values quantized, for less memory in long contexts.

    Yields:
        One response per token; the texts join to what `generate` returns.

    Raises:
        OptionError, ImageError: on the first `next`, before anything is yielded.
    """
    check_options(
        max_tokens=max_tokens,
        temp=temp,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        kv_bits=kv_bits,
    )
    sampler = make_sampler(temp, top_p, top_k, seed)
    if isinstance(stop, str):
        stop = [stop]
    cache = model.make_cache(kv_bits)
    clock = _StageClock()
    features = _image_features(model, processor, _as_list(image), clock)
    input_ids = processor.tokenize(prompt, len(features), system)
    clock.lap("tokenize")

    inputs_embeds = model.embed(input_ids, features)
    prompt_tokens = inputs_embeds.shape[1]
    _check_context(model, prompt_tokens, max_tokens)
    logits = prefill(model, inputs_embeds, cache)
    mx.eval(logits)
    clock.lap("prefill")

    text_stream = processor.text_stream(stop)
    tokens = generate_step(
        logits, model, cache, max_tokens=max_tokens, sampler=sampler, repetition_penalty=repetition_penalty
    )
    for count, token in enumerate(tokens, start=1):
        if count == 1:
            clock.lap("first_token")
            ttft = clock.total()
        ended = token in processor.eos_token_ids
        text = "" if ended else text_stream.add(token)
        finish_reason = "stop" if ended or text_stream.stopped else "length" if count == max_tokens else None
        if finish_reason:
            text += text_stream.finish()
        yield GenerationResponse(
            text=text,
            token=token,
            prompt_tokens=prompt_tokens,
            prompt_tps=prompt_tokens / clock.seconds["prefill"],
            generation_tokens=count,
            generation_tps=(count - 1) / max(clock.total() - ttft, 1e-9),
            ttft=ttft,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish_reason,
            timings=dict(clock.seconds),
        )
        if finish_reason:
            return


def generate(
    model: FastVLM,
    processor: Processor,
    prompt: str | Sequence[Message],
    image: ImageSource | Sequence[ImageSource] | None = None,
    **options,
) -> str:
    """The whole answer as one string; arguments as in `stream_generate`."""
    return "".join(response.text for response in stream_generate(model, processor, prompt, image, **options))


def check_options(
    *,
    max_tokens: int,
    temp: float,
    top_p: float,
    top_k: int,
    repetition_penalty: float,
    seed: int | None,
    kv_bits: int | None = None,
) -> None:
    """Refuse numbers out of range, before a model is loaded for them. Raises OptionError."""
    make_sampler(temp, top_p, top_k, seed)
    if max_tokens < 1:
        raise OptionError(f"max_tokens is {max_tokens}; expected 1 or more.")
    if not 0 < repetition_penalty < float("inf"):
        raise OptionError(f"repetition_penalty is {repetition_penalty}; expected a value above 0.")
    if kv_bits is not None and kv_bits not in KV_BITS:
        raise OptionError(f"kv_bits is {kv_bits}; expected one of {', '.join(map(str, KV_BITS))}.")


class _StageClock:
    """Seconds spent in named stages since it was made."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """Book the time since the last lap to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def total(self) -> float:
        return time.perf_counter() - self._start


def _image_features(
    model: FastVLM, processor: Processor, images: Sequence[ImageSource], clock: _StageClock
) -> list[mx.array]:
    """Each image's rows, (N, hidden), with the stages booked on `clock`."""
    features = []
    for image in images:
        picture = open_image(image, background=processor.image_processor.background)
        clock.lap("decode")
        pixel_values = processor.image_processor.preprocess(picture)
        clock.lap("resize")
        rows = model.vision_tower(pixel_values.astype(model.dtype))
        mx.eval(rows)
        clock.lap("encode")
        projected = model.project(rows)
        mx.eval(projected)
        clock.lap("project")
        features.append(projected[0])
    return features


def _as_list(image: ImageSource | Sequence[ImageSource] | None) -> list[ImageSource]:
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]


def _check_context(model: FastVLM, prompt_tokens: int, max_tokens: int) -> None:
    limit = model.config.text_config.max_position_embeddings
    if prompt_tokens + max_tokens > limit:
        raise OptionError(
            f"The prompt takes {prompt_tokens} tokens and max_tokens is {max_tokens}; the model's context holds {limit} "
            "in all. Shorten the prompt or lower max_tokens."
        )
