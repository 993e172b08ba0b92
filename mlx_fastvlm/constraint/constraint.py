"""Answers in a given form: which tokens may come next, so that an answer is one of some choices or follows a schema.

The grammars are llguidance's: it says which tokens may follow. What it does not know is that an answer has a longest
length. Here a short ending is kept at hand at every point, and a token is allowed only if an ending still fits behind
it: so the answer is whole when its tokens run out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_fastvlm.constraint.answer_grammar import (
    END_BYTE,
    FIRST_EFFORT,
    Grammar,
    byte_vocabulary,
    choices_grammar,
    schema_grammar,
)
from mlx_fastvlm.constraint.shortest_ending import Place
from mlx_fastvlm.constraint.token_table import TokenTable, token_table
from mlx_fastvlm.errors import OptionError

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from mlx_fastvlm.processor import Processor

# When tokens may run out, only so many of the likeliest are looked at, down to a thousandth of the likeliest's chance.
_LOOKED_AT = 32
_LEAST_CHANCE = float(np.log(1e-3))

_TRIAL_EFFORT = 100  # points that a search for an ending behind a token may go on from
_TRIALS = 4  # such searches for one token of the answer
_REMEMBERED = 16  # endings found lately, which often serve again: trying one takes 2 µs


class _Ending(NamedTuple):
    """Text after which the answer may end, and the tokens for it."""

    text: bytes
    tokens: list[int]


def make_constraint(
    processor: Processor,
    *,
    json_schema: Mapping[str, Any] | str | bool | None = None,
    choices: Sequence[str] | None = None,
    max_tokens: int,
) -> Constraint | None:
    """The form of one answer.

    Args:
        processor: whose tokens the answer is made of.
        json_schema: a JSON schema, as an object or its text, that the answer follows; True for any JSON object.
        choices: the answer is exactly one of these.
        max_tokens: longest answer, the token that ends it included.

    Returns:
        A constraint for one answer, or None if no form is asked for (None or False).

    Raises:
        OptionError: both are given, a form is malformed or cannot be followed or written with the model's tokens, or
            its shortest answer takes more than `max_tokens`.
    """
    if choices is None and json_schema in (None, False):
        return None
    if choices is not None and json_schema not in (None, False):
        raise OptionError("Both json_schema and choices are given; give one of them.")
    # The form is judged before the table is made, which takes long.
    grammar = schema_grammar(json_schema) if choices is None else choices_grammar(choices)
    table = token_table(processor)
    for choice in choices or ():
        if table.spell(choice.encode()) is None:
            raise OptionError(f"The model's vocabulary has no tokens for the choice {choice!r}; choose other words.")
    return Constraint(table, grammar, max_tokens)


class Constraint:
    """Which tokens may come next in one answer. For each token: `restrict`, then `accept` what was drawn.

    As long as the tokens left suffice to end the answer from any point, the grammar alone decides. Then, and always
    where no bound is known, a token is allowed if a way to end behind it is found; only likely tokens are looked at.

    Args:
        table: the model's tokens.
        grammar: what answers are allowed.
        max_tokens: longest answer, the token that ends it included.

    Raises:
        OptionError: the shortest answer takes more tokens than that, or none is found.
    """

    def __init__(self, table: TokenTable, grammar: Grammar, max_tokens: int):
        self._table = table
        self._name = grammar.name
        self._search = grammar.search
        self._ending_bound = grammar.ending_bound
        self._left = max_tokens  # tokens still to be drawn
        self._tokens = grammar.matcher(table.vocabulary)
        self._bytes = grammar.matcher(byte_vocabulary())  # the same point in the answer, in steps of bytes
        self._place = Place()
        self._found_lately: deque[_Ending] = deque(maxlen=_REMEMBERED)
        self._trials = _TRIALS
        self._tried: dict[int, _Ending] = {}  # endings behind tokens that may be drawn now
        self._ending = None if grammar.shortest_answer is None else self._remember(grammar.shortest_answer)
        if self._ending is None:
            raise OptionError(
                f"{grammar.name} cannot be followed: no answer was found in a bounded search. Ask for less: shorter "
                "text, fewer items or properties, simpler patterns."
            )
        needed = len(self._ending.tokens) + 1
        if needed > max_tokens:
            raise OptionError(
                f"{grammar.name} cannot be followed in {max_tokens} tokens: the shortest answer takes about {needed}. "
                "Raise max_tokens."
            )

    def restrict(self, logits: mx.array) -> mx.array:
        """(1, vocab) logits → the same, with -inf on every token that may not follow.

        Raises:
            OptionError: the grammar library gave up in the middle of an answer, and no ending was known. Not seen.
        """
        ample = self._left - 2 >= self._ending_bound  # this token and the one that ends the answer besides
        allowed = self._legal() if ample else self._affordable(np.asarray(logits.astype(mx.float32)).reshape(-1))
        width = logits.shape[-1]
        mask = np.zeros(width, dtype=bool)
        mask[: allowed.size] = allowed[:width]
        return mx.where(mx.array(mask), logits, -mx.inf)

    def accept(self, token: int) -> None:
        """Take the token drawn, in order; one that ends the answer changes nothing."""
        if token in self._table.ends:
            return
        text = self._table.bytes_of(token)
        ending, self._ending, self._tried = self._ending, self._tried.get(token), {}
        if self._ending is None and ending is not None and ending.tokens[:1] == [token]:
            self._ending = _Ending(ending.text[len(text) :], ending.tokens[1:])
        self._left -= 1
        self._trials = _TRIALS
        self._tokens.consume_token(token)
        self._bytes.consume_tokens(list(text))
        self._place = self._place.after(text)

    def _legal(self) -> np.ndarray:
        """(tokens,) bool: what the grammar allows, whatever it costs."""
        bitmask = self._tokens.compute_bitmask()
        if self._tokens.is_error():  # a limit on its work was met: what is left is the ending at hand
            return self._only(self._ending_at_hand())
        bits = np.unpackbits(np.frombuffer(bitmask, np.uint8), bitorder="little")
        allowed = bits[: self._table.is_text.size].view(bool) & self._table.is_text
        allowed[self._table.ends] = self._tokens.is_accepting()
        return allowed

    def _affordable(self, logits: np.ndarray) -> np.ndarray:
        """(tokens,) bool: the likeliest tokens that leave room for an ending, or the first token of the shortest."""
        legal = self._legal()
        allowed = np.zeros_like(legal)
        allowed[self._table.ends] = legal[self._table.ends]
        for token in _likeliest(logits, legal):
            ending = None if allowed[token] else self._ending_after(token)
            if ending is not None:
                self._tried[token] = ending
                allowed[token] = True
        return allowed if allowed.any() else self._only(self._ending_at_hand())

    def _ending_after(self, token: int) -> _Ending | None:
        """An ending that fits behind a token which the grammar allows, if one is found."""
        text = self._table.bytes_of(token)
        at_hand = self._ending_at_hand()
        if at_hand is not None:
            rest = at_hand.text[len(text) :]
            if at_hand.tokens[:1] == [token]:
                return _Ending(rest, at_hand.tokens[1:])
            if _may_end(self._bytes, text + rest):  # the token stands in place of as much of the ending
                self._remember(rest)
        for ending in self._found_lately:
            if self._fits(ending) and _may_end(self._bytes, text + ending.text):
                return ending
        if self._trials == 0:
            return None
        self._trials -= 1
        matcher = self._bytes.deep_copy()
        matcher.consume_tokens(list(text))
        found = self._search.short(matcher, self._place.after(text), _TRIAL_EFFORT)
        ending = None if found is None else self._remember(found)
        return ending if ending is not None and self._fits(ending) else None

    def _fits(self, ending: _Ending) -> bool:
        """Whether there is room for it behind the next token, and for the token that ends the answer."""
        return len(ending.tokens) <= self._left - 2

    def _ending_at_hand(self) -> _Ending | None:
        """A short ending from here; it is not known at first after steps with tokens to spare."""
        if self._ending is None:
            found = self._search.shortest(self._bytes, self._place, FIRST_EFFORT)
            self._ending = None if found is None else self._remember(found)
        return self._ending

    def _remember(self, text: bytes) -> _Ending | None:
        """An ending to try again; None if the vocabulary cannot write it."""
        tokens = self._table.spell(text)
        if tokens is None:
            return None
        ending = _Ending(text, tokens)
        if ending in self._found_lately:
            self._found_lately.remove(ending)
        self._found_lately.appendleft(ending)
        return ending

    def _only(self, ending: _Ending | None) -> np.ndarray:
        """(tokens,) bool: the next token of an ending, or the ends once there is none."""
        if ending is None:
            raise OptionError(f"{self._name} became too intricate to follow in this answer; make it simpler.")
        allowed = np.zeros_like(self._table.is_text)
        allowed[ending.tokens[:1] or self._table.ends] = True
        return allowed


def _may_end(matcher: LLMatcher, text: bytes) -> bool:
    """Whether the answer may end after `text`, at least one byte, from where the matcher of bytes is."""
    tokens = [*text, END_BYTE]
    return matcher.validate_tokens(tokens) == len(tokens)


def _likeliest(logits: np.ndarray, legal: np.ndarray) -> list[int]:
    """The legal tokens worth looking at, the likeliest first."""
    scores = np.where(legal[: logits.size], logits[: legal.size], -np.inf)
    tokens = np.flatnonzero(scores > scores.max() + _LEAST_CHANCE)
    return tokens[np.argsort(-scores[tokens])[:_LOOKED_AT]].tolist()
