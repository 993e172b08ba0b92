"""A model's tokens as bytes, in the form the grammar library wants; made once for each processor.

What may follow in an answer is `constraint`'s matter.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from mlx_fastvlm.errors import OptionError

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from tokenizers import Tokenizer

    from mlx_fastvlm.processor import Processor


class TokenTable:
    """Which bytes the tokens of one model stand for.

    Args:
        tokenizer: the model's tokenizer.
        eos_token_ids: ids that end an answer.

    Attributes:
        vocabulary: the grammar library's form of it.
        is_text: (tokens,) bool, True for tokens that are text and not marks such as <|im_start|>.
        ends: ids that end an answer.

    Raises:
        OptionError: the tokenizer is of a kind whose tokens are not known as bytes.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: frozenset[int]):
        from llguidance import LLTokenizer

        try:
            self.vocabulary: LLTokenizer = LLTokenizer(_without_normalizer(tokenizer))
        except Exception as error:  # the library has no class of its own for what it refuses
            raise OptionError(
                f"Answers in a given form need a byte-level tokenizer; this model's is not ({error})."
            ) from None
        size = self.vocabulary.vocab_size
        self.ends = sorted(token for token in eos_token_ids if 0 <= token < size)
        self.is_text = np.ones(size, dtype=bool)
        self.is_text[[*tokenizer.get_added_tokens_decoder(), *self.ends]] = False

    def bytes_of(self, token: int) -> bytes:
        """What a text token adds to the answer."""
        return self.vocabulary.decode_bytes([token])

    def spell(self, text: bytes) -> list[int] | None:
        """Tokens that stand for `text`, few of them; None if the vocabulary has none for some byte."""
        for pieces in ([text], [bytes([byte]) for byte in text]):
            tokens = [token for piece in pieces for token in self.vocabulary.tokenize_bytes(piece)]
            if self.vocabulary.decode_bytes(tokens) == text and self.is_text[tokens].all():
                return tokens
        return None


def _without_normalizer(tokenizer: Tokenizer) -> str:
    """A tokenizer as JSON. Normalizing is for text that is read: text that must be written is written as it is."""
    content = json.loads(tokenizer.to_str())
    content["normalizer"] = None
    return json.dumps(content)


_tables: WeakKeyDictionary[Processor, TokenTable] = WeakKeyDictionary()
_making = threading.Lock()


def token_table(processor: Processor) -> TokenTable:
    """The table of a processor's tokens, made on first use (over a second for Qwen's). Raises OptionError."""
    with _making:
        if processor not in _tables:
            _tables[processor] = TokenTable(processor.tokenizer, processor.eos_token_ids)
        return _tables[processor]
