"""The forms that answers can be asked for in, as grammars: a JSON schema, or one of some choices.

The grammar library, llguidance, is loaded when a form is asked for. Following a grammar is `constraint`'s matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from mlx_fastvlm.constraint.json_schema import ending_bound, keyword_values, narrow, parse_schema
from mlx_fastvlm.constraint.shortest_ending import EndingSearch, Place
from mlx_fastvlm.errors import OptionError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CHOICE_BYTES = 2**18  # all choices together
END_BYTE = 256  # the token behind the 256 bytes that ends an answer

# Points a search may go on from (about 100 µs each): for an ending that must be found, and for a pattern's example.
FIRST_EFFORT = 2000
_EXAMPLE_EFFORT = 200

# Formats in which free text is followed by something certain, which a search does not find by itself.
_FORMAT_EXAMPLES = {"email": "a@a.a", "uri": "a:a"}

_KEPT = 16  # grammars, for answers to come: a batch asks for the same form again and again


@dataclass(frozen=True)
class Grammar:
    """A form of answers.

    Attributes:
        text: in the grammar library's notation.
        name: what messages call it, at the beginning of a sentence.
        search: finds short endings of such answers.
        ending_bound: bytes that suffice to end an answer from any point of it; infinity if no bound is known.
    """

    text: str
    name: str
    search: EndingSearch
    ending_bound: float

    def matcher(self, vocabulary: LLTokenizer) -> LLMatcher:
        """What follows the grammar, at the beginning of an answer. Raises OptionError if it cannot be followed."""
        return _matcher(vocabulary, self.text, self.name)

    @cached_property
    def shortest_answer(self) -> bytes | None:
        """A shortest answer, or None if the search found none within its effort."""
        return self.search.shortest(self.matcher(byte_vocabulary()), Place(), FIRST_EFFORT)


def schema_grammar(json_schema: Mapping[str, Any] | str | bool) -> Grammar:
    """Answers that are compact JSON and follow a schema.

    Free whitespace is nothing but a way for a small model to spend its tokens.

    Raises:
        OptionError: the schema is malformed or cannot be followed.
    """
    return _schema_grammar(json.dumps(parse_schema(json_schema)))


@lru_cache(_KEPT)
def _schema_grammar(text: str) -> Grammar:
    name = "The JSON schema"
    schema = json.loads(text)
    _matcher(byte_vocabulary(), _compact_json(schema), name)  # judges the schema: what follows may trust its form
    narrow(schema)
    examples = [_example(pattern) for pattern in sorted(keyword_values(schema, "pattern"))]
    examples += [_FORMAT_EXAMPLES.get(name, "") for name in sorted(keyword_values(schema, "format"))]
    words = [word for example in examples for word in _ends_of(example)]
    return Grammar(_compact_json(schema), name, EndingSearch(words, is_json=True), ending_bound(schema))


def choices_grammar(choices: Sequence[str]) -> Grammar:
    """Answers that are one of `choices`. Raises OptionError if they are not strings to choose from."""
    _check_choices(choices)
    return _choices_grammar(tuple(choices))


@lru_cache(_KEPT)
def _choices_grammar(choices: tuple[str, ...]) -> Grammar:
    from llguidance import LLMatcher

    words = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    grammar = LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {words}")
    longest = max(len(choice.encode()) for choice in choices)
    return Grammar(grammar, "The choices", EndingSearch([], is_json=False), longest)


@cache
def byte_vocabulary() -> LLTokenizer:
    """A vocabulary whose tokens are the 256 bytes, and END_BYTE."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()), slices=[])


class _Bytes:
    """What the grammar library asks of a tokenizer, for tokens that are bytes."""

    eos_token_id = END_BYTE
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (END_BYTE,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def _compact_json(schema: dict[str, Any]) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})


def _example(pattern: str) -> str:
    """A short text that a pattern asks for; nothing if none is found."""
    from llguidance import LLMatcher

    # What may be anything may be nothing. If that breaks the pattern, there is one suggestion less for the search.
    core = pattern.removeprefix("^").removesuffix("$").replace(".*", "").replace(".+", ".")
    try:
        matcher = _matcher(byte_vocabulary(), LLMatcher.grammar_from_regex(core), "The pattern")
    except OptionError:
        return ""
    found = EndingSearch([], is_json=False).shortest(matcher, Place(), _EXAMPLE_EFFORT) or b""
    return found.decode(errors="ignore")


def _ends_of(example: str) -> list[bytes]:
    """A text and every end of it, as written between the quotes of JSON."""
    text = json.dumps(example, ensure_ascii=False)[1:-1].encode()
    return [text[start:] for start in range(len(text))]


def _check_choices(choices: Sequence[str]) -> None:
    if isinstance(choices, str | Mapping) or not all(isinstance(choice, str) for choice in choices):
        raise OptionError(f"choices is {choices!r}; expected a list of strings.")
    if not choices:
        raise OptionError("choices is empty; expected one string or more.")
    if "" in choices:
        raise OptionError("One of the choices is empty; an answer has at least one character.")
    if any("\ud800" <= letter <= "\udfff" for choice in choices for letter in choice):
        raise OptionError("One of the choices is not valid Unicode text.")
    if sum(len(choice.encode()) for choice in choices) > MAX_CHOICE_BYTES:
        raise OptionError(f"The choices have more than {MAX_CHOICE_BYTES // 1024} KB; give fewer or shorter ones.")
    seen = set()
    for choice in choices:
        if choice in seen:
            raise OptionError(f"The choice {choice!r} is given twice.")
        seen.add(choice)


def _matcher(vocabulary: LLTokenizer, grammar: str, name: str) -> LLMatcher:
    """Raises OptionError if the library cannot follow the grammar within its limits."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)  # states take 1-2 kB each
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    matcher.compute_bitmask()
    if matcher.is_error():
        raise OptionError(f"{name} cannot be followed: {_one_line(matcher.get_error())}.")
    return matcher


def _one_line(error: str) -> str:
    """The library's message without its dumps of states and the marks under a pattern."""
    lines = [line.strip() for line in error.partition("\n<")[0].splitlines()]
    return " ".join(line for line in lines if line.strip("^"))[:300].rstrip(".")
