"""Asking a model many questions: each picture encoded and run through the decoder once, answers decoded together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mlx_fastvlm.answer import GenerationResponse, StageClock
from mlx_fastvlm.batch_generate import BatchGenerator
from mlx_fastvlm.errors import FastVLMError
from mlx_fastvlm.evaluation.shared_prompts import Beginning, beginning_of, prefill_rests, split
from mlx_fastvlm.generate import Prefilled, prefill_prompt
from mlx_fastvlm.image_content import recognize
from mlx_fastvlm.image_decoding import ImageSource
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.processor import Processor

DEFAULT_BATCH_SIZE = 16


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Attributes:
        name: what errors call it.
        text: the user's words.
        images: that go with it.
        options: of the answer; all but `kv_bits`.
    """

    name: str
    text: str
    images: Sequence[ImageSource]
    options: GenerationOptions


@dataclass(frozen=True)
class Reply:
    """The answer to a prompt.

    Attributes:
        text: without white space around it.
        tokens: how many it took, the one that ends it included.
        finish_reason: "stop", or "length" where it was cut.
        timings: seconds by stage up to the decoder's first logits, as `GenerationResponse` names them, of a prompt that
            was run alone: the first about its pictures. Empty for the others.
    """

    text: str
    tokens: int
    finish_reason: str
    timings: dict[str, float]


def answer_prompts(
    model: FastVLM, processor: Processor, prompts: Iterable[Prompt], batch_size: int = DEFAULT_BATCH_SIZE
) -> Iterator[Reply]:
    """Answer prompts, each as `generate` would.

    Args:
        model, processor: from `load`.
        prompts: those about the same pictures next to each other, or these are encoded again; as they are where words
            that differ stand before a picture.
        batch_size: answers that begin together; twice as many are decoded together. More take more memory.

    Yields:
        One for each prompt, in order.

    Raises:
        FastVLMError: a picture cannot be read, or a prompt does not fit into the context; the message names the prompt.
    """
    work = _Work(model, processor, batch_size)
    for prompt in prompts:
        work.ask(prompt)
        yield from work.finished()
    work.begin_all()
    while work.answers:
        work.step(hurry=True)
        yield from work.finished()


@dataclass
class _Answer:
    """An answer being made."""

    prompt: Prompt
    timings: dict[str, float] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)
    last: GenerationResponse | None = None

    @property
    def is_finished(self) -> bool:
        return self.last is not None and self.last.finish_reason is not None

    def reply(self) -> Reply:
        text = "".join(self.pieces).strip()
        return Reply(text, self.last.generation_tokens, self.last.finish_reason, self.timings)


class _Work:
    """Answers on their way: prompts that wait to be prefilled together, and answers that are decoded.

    Attributes:
        answers: unfinished ones, and finished ones behind them, in the prompts' order.
    """

    def __init__(self, model: FastVLM, processor: Processor, batch_size: int):
        self._model, self._processor, self._batch_size = model, processor, batch_size
        self._generator = BatchGenerator(model, processor, max_rows=2 * batch_size, min_group=batch_size)
        self._by_ticket: dict[int, _Answer] = {}
        self._seen: tuple[Any, Beginning] | None = None  # what the last prompt that was run alone begins with
        self._waiting: list[tuple[_Answer, Beginning, list[int]]] = []  # with the rest of the prompt
        self.answers: deque[_Answer] = deque()

    def ask(self, prompt: Prompt) -> None:
        """Run a prompt through the decoder, or have it wait for company if its beginning is known. Raises FastVLMError."""
        answer, clock, options = _Answer(prompt), StageClock(), prompt.options
        self.answers.append(answer)
        with _naming(prompt):
            background = self._processor.image_processor.background
            images = [recognize(image, background) for image in prompt.images]
            clock.lap("recognize")
            input_ids = self._processor.tokenize(prompt.text, len(images), options.system)
            clock.lap("tokenize")
            head, rest = split(input_ids)
            known_by = (images, head, options.resolution, options.fit)
            if self._seen is not None and self._seen[0] == known_by:
                self._waiting.append((answer, self._seen[1], rest))
            else:
                opened = [image.open() for image in images]
                prefilled = prefill_prompt(self._model, self._processor, input_ids, opened, options, clock)
                answer.timings = dict(clock.seconds)
                if images:
                    self._seen = known_by, beginning_of(prefilled, rest)
                self._begin(answer, prefilled)
        if len(self._waiting) >= self._batch_size:
            self.begin_all()
        while self._generator.waiting >= self._batch_size:
            self.step()

    def begin_all(self) -> None:
        """Prefill the prompts that wait. Raises FastVLMError."""
        prefilled = prefill_rests(self._model, [(beginning, rest) for _, beginning, rest in self._waiting])
        for (answer, *_), prompt in zip(self._waiting, prefilled, strict=True):
            with _naming(answer.prompt):
                self._begin(answer, prompt)
        self._waiting = []

    def step(self, hurry: bool = False) -> None:
        """One token for every answer; see `BatchGenerator.step`. Raises what an answer could not go on for."""
        for ticket, event in self._generator.step(hurry):
            answer = self._by_ticket[ticket]
            if isinstance(event, Exception):
                raise event
            answer.pieces.append(event.text)
            answer.last = event
            if answer.is_finished:
                del self._by_ticket[ticket]

    def finished(self) -> Iterator[Reply]:
        """Take out the first answers, as far as they are finished."""
        while self.answers and self.answers[0].is_finished:
            yield self.answers.popleft().reply()

    def _begin(self, answer: _Answer, prefilled: Prefilled) -> None:
        clock = StageClock()
        clock.lap("prefill")
        ticket = self._generator.add_prefilled(prefilled, options=answer.prompt.options, clock=clock)
        self._by_ticket[ticket] = answer


@contextmanager
def _naming(prompt: Prompt) -> Iterator[None]:
    """Have errors say which prompt they are about."""
    try:
        yield
    except FastVLMError as error:
        raise type(error)(f"{prompt.name}: {error}") from None
