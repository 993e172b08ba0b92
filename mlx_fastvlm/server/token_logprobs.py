"""Log-probabilities in OpenAI's form: each token as text and as bytes, beside the text it is part of."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_fastvlm.answer import GenerationResponse
from mlx_fastvlm.constraint.token_table import TokenTable, token_table
from mlx_fastvlm.processor import Processor


@dataclass(frozen=True)
class _Entry:
    """A token that waits for its text to go out, which may be held back; counted in characters of the answer."""

    start: int
    end: int
    content: dict[str, Any]


class TokenTexts:
    """How the tokens of one model are written.

    Args:
        processor: of the model.

    Raises:
        OptionError: its tokens are not known as bytes.
    """

    def __init__(self, processor: Processor):
        self._table: TokenTable = token_table(processor)
        self._name: Callable[[int], str | None] = processor.tokenizer.id_to_token

    def bytes_of(self, token: int) -> bytes | None:
        """What a token adds to an answer; None for a mark such as <|im_end|>, and for one that the model never learned."""
        is_text = token < len(self._table.is_text) and self._table.is_text[token]
        return self._table.bytes_of(token) if is_text else None

    def written(self, token: int, logprob: float) -> dict[str, Any]:
        """A token with its log-probability. What is no whole character alone is written as \\x and hexadecimal digits."""
        text = self.bytes_of(token)
        return {
            "token": (self._name(token) or "") if text is None else text.decode("utf-8", "backslashreplace"),
            "logprob": logprob,
            "bytes": None if text is None else list(text),
        }


class LogprobsForm:
    """The log-probabilities of one answer, token by token.

    A token is written with the text that it ends in, so that what a client has of both agrees. Tokens that add nothing
    to the text are left out at its end: the mark that ends an answer, and what a stop string cuts off.

    Args:
        texts: of the model that answers.
    """

    def __init__(self, texts: TokenTexts):
        self._texts = texts
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._drawn = self._sent = 0  # characters
        self._waiting: deque[_Entry] = deque()

    def of(self, response: GenerationResponse) -> list[dict[str, Any]]:
        """The entries of OpenAI's `content` that belong to what one response adds to the text."""
        if response.logprobs is not None:
            self._waiting.append(self._entry(response))
        self._sent += len(response.text)
        if response.finish_reason is not None:
            return [entry.content for entry in self._waiting if entry.start < self._sent]
        entries = []
        while response.text and self._waiting and self._waiting[0].end <= self._sent:
            entries.append(self._waiting.popleft().content)
        return entries

    def _entry(self, response: GenerationResponse) -> _Entry:
        start = self._drawn
        self._drawn += len(self._characters.decode(self._texts.bytes_of(response.token) or b""))
        logprobs = response.logprobs
        content = self._texts.written(response.token, logprobs.token)
        content["top_logprobs"] = [self._texts.written(token, logprob) for token, logprob in logprobs.top]
        return _Entry(start, self._drawn, content)
