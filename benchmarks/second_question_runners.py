"""The sides of the second-question comparison: options → a function that asks two questions about one picture.

A side holds conversations as its library offers them, and the stopwatch here treats all alike: it runs from the call,
before the picture's file is opened, to the first token. Libraries are imported where they are needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .machine import peak_rss
from .random_model import word_processor
from .runners import Options, open_mlx_vlm

FIRST, SECOND, FRESH = QUESTIONS = ("first", "second", "fresh")

Answer = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """One token of an answer.

    Attributes:
        token: its id.
        text: what it adds.
        ends: whether it only ended the answer and is no part of it.
        prompt_tokens: positions of the prompt, as the library counts them.
        cached_tokens: how many of those the library says it had.
        scores: (vocab,), what the token was drawn from: logits, or their logarithms of probability.
        timings: seconds by stage up to the first token, where the library tells them.
    """

    token: int
    text: str
    ends: bool
    prompt_tokens: int
    cached_tokens: int
    scores: mx.array
    timings: dict[str, float] | None = None


Ask = Callable[[str], Iterator[Step]]  # the next question of a conversation → its answer


class Side(Protocol):
    """One library's conversations."""

    def encoder_runs(self) -> int:
        """How often the vision tower has run."""

    def forget(self) -> None:
        """Drop what earlier conversations left for later ones."""

    def open(self, image: str, max_tokens: int) -> Ask:
        """Begin a conversation about a picture file; later ones may use what it leaves."""

    def from_scratch(self, image: str, said: Sequence[str], max_tokens: int) -> Iterator[Step]:
        """Answer the last one of `said`, questions and answers in turn, with nothing known before."""


def answerer(make_side: Callable[[Options], Side], options: Options) -> Answer:
    """A runner that asks three questions a request, and the first time compares the answers with fresh ones."""
    side = make_side(options)
    compared = False

    def answer(image: str, first: str, second: str, max_tokens: int) -> dict[str, Any]:
        nonlocal compared
        side.forget()
        ask: Ask | None = None

        def opened(question: str) -> Iterator[Step]:
            nonlocal ask
            ask = side.open(image, max_tokens)
            yield from ask(question)

        asked = {FIRST: _timed(side, opened(first))}
        asked[SECOND] = _timed(side, ask(second))
        asked[FRESH] = _timed(side, opened(second))
        if not compared:
            history = {SECOND: [first, asked[FIRST]["text"], second], FRESH: [second]}
            for name, said in history.items():
                asked[name]["scratch"] = _compared(asked[name], side.from_scratch(image, said, max_tokens))
            compared = True
        for measured in asked.values():
            del measured["scores"]
        return {
            **{key: asked[FIRST][key] for key in ("ttft", "ttft_cpu", "tokens")},
            "questions": asked,
            "peak_rss": peak_rss(),
            "device_peak": mx.get_peak_memory(),
        }

    return answer


def _timed(side: Side, steps: Iterator[Step]) -> dict[str, Any]:
    """One answer: the clock starts with this call and nothing of `steps` has run before."""
    runs = side.encoder_runs()
    start, start_cpu = time.perf_counter(), time.process_time()
    taken: list[Step] = []
    for step in steps:
        if not taken:
            ttft, ttft_cpu = time.perf_counter() - start, time.process_time() - start_cpu
        taken.append(step)
    first = taken[0]
    return {
        "ttft": ttft,
        "ttft_cpu": ttft_cpu,
        "seconds": time.perf_counter() - start,
        "timings": first.timings,
        "encoder_runs": side.encoder_runs() - runs,
        "prompt_tokens": first.prompt_tokens,
        "cached_tokens": first.cached_tokens,
        "tokens": [step.token for step in taken if not step.ends],
        "text": "".join(step.text for step in taken),
        "scores": first.scores,
    }


def _compared(measured: dict[str, Any], fresh: Iterator[Step]) -> dict[str, Any]:
    """How an answer stands to the same one from scratch: equal tokens, and the first token's scores."""
    steps = list(fresh)
    scores, expected = np.asarray(measured["scores"]), np.asarray(steps[0].scores)
    return {
        "same_tokens": measured["tokens"] == [step.token for step in steps if not step.ends],
        "scores_differ_by": float(np.abs(scores - expected).max() / np.abs(expected).max()),
    }


class OurSide:
    """This package: `Conversation`, on a converted folder.

    Args:
        options: see `runners.Options`, and "words": whether each word is a token, whatever the folder's tokenizer says.
    """

    def __init__(self, options: Options):
        from mlx_fastvlm import load

        self._model, self._processor = load(options["folder"], dtype=options["dtype"])
        if options["words"]:
            self._processor = word_processor(self._model.config)
        self._tower = watch(self._model.vision_tower, "__call__")
        self._head = watch(self._model.language_model, "logits")
        self.forget()

    def encoder_runs(self) -> int:
        return self._tower.calls

    def forget(self) -> None:
        from mlx_fastvlm import Reuse

        self._reuse = Reuse(self._model, self._processor)

    def open(self, image: str, max_tokens: int) -> Ask:
        from mlx_fastvlm import Conversation

        chat = Conversation(self._model, self._processor, image, reuse=self._reuse, max_tokens=max_tokens)
        return lambda question: self._steps(chat.stream(question))

    def from_scratch(self, image: str, said: Sequence[str], max_tokens: int) -> Iterator[Step]:
        from mlx_fastvlm import stream_generate

        return self._steps(stream_generate(self._model, self._processor, _messages(said), image, max_tokens=max_tokens))

    def _steps(self, responses: Iterator[Any]) -> Iterator[Step]:
        for response in responses:
            yield Step(
                response.token,
                response.text,
                response.token in self._processor.eos_token_ids,
                response.prompt_tokens,
                response.cached_tokens,
                self._head.result[0],
                response.timings,
            )


class MlxVlmSide:
    """mlx-vlm: what its own chat command gives stream_generate, its vision cache and its prompt cache.

    Args:
        options: see `runners.Options`.
        marked: whether the picture stands in the first question, as FastVLM was trained and as its messages allow. Its
            chat command does not mark it, and then it goes into the last question, behind all that was said before.
    """

    def __init__(self, options: Options, marked: bool):
        self._model, self._processor = open_mlx_vlm(options["folder"])
        self._tower = watch(self._model.vision_tower, "__call__")
        self._marked = marked
        self.forget()

    def encoder_runs(self) -> int:
        return self._tower.calls

    def forget(self) -> None:
        from mlx_vlm.vision_cache import VisionFeatureCache

        self._vision_cache = VisionFeatureCache()

    def open(self, image: str, max_tokens: int) -> Ask:
        from mlx_vlm.generate import PromptCacheState

        said: list[str] = []
        caches = {"vision_cache": self._vision_cache, "prompt_cache_state": PromptCacheState()}

        def ask(question: str) -> Iterator[Step]:
            said.append(question)
            pieces = []
            for step in self._steps(image, said, max_tokens, caches):
                pieces.append(step.text)
                yield step
            said.append("".join(pieces))

        return ask

    def from_scratch(self, image: str, said: Sequence[str], max_tokens: int) -> Iterator[Step]:
        return self._steps(image, said, max_tokens, {})

    def _steps(self, image: str, said: Sequence[str], max_tokens: int, caches: dict[str, Any]) -> Iterator[Step]:
        from mlx_vlm import stream_generate
        from mlx_vlm.prompt_utils import apply_chat_template

        messages = [{**message, "content": [_text(message["content"])]} for message in _messages(said)]
        if self._marked:
            messages[0]["content"].insert(0, {"type": "image"})
        framed = apply_chat_template(self._processor, self._model.config, messages, num_images=1)
        for response in stream_generate(
            self._model, self._processor, framed, [image], max_tokens=max_tokens, temperature=0.0, **caches
        ):
            yield Step(
                response.token,
                response.text,
                response.finish_reason is not None,  # the response that ends an answer repeats the last token
                response.prompt_tokens,
                response.cached_tokens,
                response.logprobs,
            )


@dataclass
class Watched:
    """What is known of a method's calls.

    Attributes:
        calls: how many.
        result: of the last one.
    """

    calls: int = 0
    result: Any = None


def watch(module: nn.Module, method: str) -> Watched:
    """Watch one method of one module from here on; other modules of its class are left alone."""
    watched = Watched()
    kind = type(module)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        watched.calls += 1
        watched.result = getattr(kind, method)(self, *args, **kwargs)
        return watched.result

    module.__class__ = type(kind.__name__, (kind,), {method: call})
    return watched


def _messages(said: Sequence[str]) -> list[dict[str, str]]:
    """Questions and answers in turn, the last one a question."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


SECOND_QUESTION_RUNNERS: dict[str, Callable[[Options], Answer]] = {
    "second-question-ours": partial(answerer, OurSide),
    "second-question-mlx-vlm": partial(answerer, partial(MlxVlmSide, marked=False)),
    "second-question-mlx-vlm-marked": partial(answerer, partial(MlxVlmSide, marked=True)),
}
