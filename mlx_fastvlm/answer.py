"""An answer in the making: tokens → text with statistics, for one answer at a time and for batches alike."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_fastvlm.logprobs import TokenLogprobs
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.processor import Processor


@dataclass
class GenerationResponse:
    """One step of a streamed answer. Times are seconds, rates per second.

    Attributes:
        text: what this step adds to the answer; often empty while a character or a stop string may be incomplete.
        token: the token behind it.
        prompt_tokens: positions the decoder saw before the answer, image rows included.
        cached_tokens: how many of those were known from earlier answers and not computed again.
        prompt_tps: positions computed over the time of the prefill.
        generation_tokens: tokens of the answer so far, the one that ends it included.
        generation_tps: tokens after the first, over the time since the first.
        ttft: from the image's bytes (or the prompt, if there is no image) to the first token.
        peak_memory: most memory MLX has held, in GB (10⁹ bytes).
        finish_reason: "stop" or "length" on the last response, None before.
        timings: seconds by stage up to the first token: tokenize, decode, resize, encode, project (with images),
            prefill, first_token; with `reuse`, recognize (images) too. In a batch there is wait, for a place and for the
            others' prefill, and encode is the whole group's, projection included. A stage that was not needed is not
            there. They add up to ttft.
        logprobs: of the token, where the options ask for them.
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
    cached_tokens: int = 0
    logprobs: TokenLogprobs | None = None


class StageClock:
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
        """Seconds since it was made."""
        return time.perf_counter() - self._start


class Answer:
    """Turns the tokens of one answer into responses.

    Args:
        processor: of the model that answers.
        options: for the longest answer and the stop strings.
        prompt_tokens: positions of the prompt.
        cached_tokens: how many of them were not computed anew.
        clock: has run since the request came, with the time of the prefill booked.
    """

    def __init__(
        self,
        processor: Processor,
        options: GenerationOptions,
        *,
        prompt_tokens: int,
        clock: StageClock,
        cached_tokens: int = 0,
    ):
        self._processor = processor
        self._text = processor.text_stream(options.stop)
        self._max_tokens = options.max_tokens
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = cached_tokens
        self._clock = clock
        self._count = 0
        self._ttft = 0.0

    def add(self, token: int, logprobs: TokenLogprobs | None = None) -> GenerationResponse:
        """The response for the next token; its `finish_reason` says whether it is the last one to add."""
        self._count += 1
        if self._count == 1:
            self._clock.lap("first_token")
            self._ttft = self._clock.total()
        ended = token in self._processor.eos_token_ids
        text = "" if ended else self._text.add(token)
        is_last = self._count == self._max_tokens
        finish_reason = "stop" if ended or self._text.stopped else "length" if is_last else None
        if finish_reason:
            text += self._text.finish()
        return GenerationResponse(
            text=text,
            token=token,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            prompt_tps=(self._prompt_tokens - self._cached_tokens) / self._clock.seconds["prefill"],
            generation_tokens=self._count,
            generation_tps=(self._count - 1) / max(self._clock.total() - self._ttft, 1e-9),
            ttft=self._ttft,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish_reason,
            timings=dict(self._clock.seconds),
            logprobs=logprobs,
        )
