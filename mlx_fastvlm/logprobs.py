"""How likely the model itself held a token: before temperature, penalty and the form of an answer."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

MAX_TOP = 20  # alternatives that may be asked for, as at OpenAI


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities under the model's own distribution.

    Attributes:
        token: of the token drawn.
        top: the likeliest tokens with theirs, likeliest first; the token drawn need not be among them.
    """

    token: float
    top: tuple[tuple[int, float], ...]


class PendingLogprobs:
    """A token's `TokenLogprobs`, computed when they are read.

    Args:
        logits: (1, vocab) that the token was drawn from, as the model made them.
        token: (1,) the token drawn.
        top: how many of the likeliest tokens are wanted.
    """

    def __init__(self, logits: mx.array, token: mx.array, top: int):
        logprobs = logits.astype(mx.float32)
        logprobs = logprobs - mx.logsumexp(logprobs, axis=-1, keepdims=True)
        self._token = mx.take_along_axis(logprobs, token[:, None], axis=-1)
        # With one token besides, which is dropped: a partition needs something on both sides.
        self._ids = mx.argpartition(-logprobs, top, axis=-1)[:, :top]
        self._top = mx.take_along_axis(logprobs, self._ids, axis=-1)

    def read(self) -> TokenLogprobs:
        """The numbers themselves."""
        mx.eval(self._token, self._ids, self._top)
        ids, top = np.asarray(self._ids)[0], np.asarray(self._top)[0]
        order = np.lexsort((ids, -top))
        return TokenLogprobs(self._token.item(), tuple((int(ids[i]), float(top[i])) for i in order))
