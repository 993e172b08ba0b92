"""One answer's draws: what its form allows, then the repetition penalty, then the sampler."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_fastvlm.logprobs import PendingLogprobs, TokenLogprobs
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.sampling import make_sampler, penalize_repetition

if TYPE_CHECKING:
    from mlx_fastvlm.constraint import Constraint
    from mlx_fastvlm.processor import Processor


class TokenDraw:
    """Draws the tokens of one answer, in order; it is a `Sampler` for batches of one.

    Args:
        options: how to draw.
        constraint: which tokens may follow, for an answer in a given form.

    Attributes:
        is_greedy: whether it does no more than take the likeliest token.
    """

    def __init__(self, options: GenerationOptions, constraint: Constraint | None = None):
        self._sampler = make_sampler(options.temp, options.top_p, options.top_k, options.seed)
        self._penalty = options.repetition_penalty
        self._top_logprobs = options.logprobs
        self._constraint = constraint
        self._last: mx.array | None = None  # (1,) the token drawn last
        self._drawn: mx.array | None = None  # (1, tokens so far), for the penalty
        self._logprobs: deque[PendingLogprobs] = deque()  # of tokens drawn, not asked for yet
        self.is_greedy = options.temp == 0 and self._penalty == 1 and constraint is None and options.logprobs is None

    def __call__(self, logits: mx.array) -> mx.array:
        """(1, vocab) logits for the position after the last token drawn → (1,) token id, being computed."""
        own = logits
        if self._constraint is not None:
            if self._last is not None:
                self._constraint.accept(self._last.item())
            logits = self._constraint.restrict(logits)
        if self._penalty != 1:
            logits = self._penalized(logits)
        self._last = self._sampler(logits)
        mx.async_eval(self._last)
        if self._top_logprobs is not None:
            self._logprobs.append(PendingLogprobs(own, self._last, self._top_logprobs))
        return self._last

    def next_logprobs(self) -> TokenLogprobs | None:
        """Of the next token in the order in which they were drawn; None where the options ask for none."""
        return self._logprobs.popleft().read() if self._top_logprobs is not None else None

    def _penalized(self, logits: mx.array) -> mx.array:
        if self._last is None:
            return logits
        last = self._last[:, None]
        self._drawn = last if self._drawn is None else mx.concatenate([self._drawn, last], axis=1)
        return penalize_repetition(logits, self._drawn, self._penalty)


def make_draw(processor: Processor, options: GenerationOptions) -> TokenDraw:
    """The draws that `options` ask for. Raises OptionError if the form cannot be followed by this model."""
    if not options.is_constrained:
        return TokenDraw(options)
    from mlx_fastvlm.constraint import make_constraint  # its library is needed for such answers only

    constraint = make_constraint(
        processor, json_schema=options.json_schema, choices=options.choices, max_tokens=options.max_tokens
    )
    return TokenDraw(options, constraint)
