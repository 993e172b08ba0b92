"""Qwen2's tokenization in plain Python, as a second opinion on transformers (whose Rust core the runtime shares).

Special tokens are cut out first, the rest is NFC-normalized, split by Qwen2's pattern, and every piece is merged by
rank. Slow on purpose: it follows the definition and nothing else.
"""

import json
import unicodedata
from pathlib import Path

import regex

from .tiny_tokenizer import byte_alphabet

# The pattern published with Qwen2 (transformers tokenization_qwen2.py, PRETOKENIZE_REGEX).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PythonBPE:
    """A tokenizer read from vocab.json, merges.txt and added_tokens.json."""

    def __init__(self, folder: Path) -> None:
        self.vocab: dict[str, int] = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        self.specials: dict[str, int] = json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        pairs = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; special tokens inside it are recognized."""
        cut = "|".join(regex.escape(token) for token in sorted(self.specials, key=len, reverse=True))
        ids: list[int] = []
        for part in regex.split(f"({cut})", text):
            if part in self.specials:
                ids.append(self.specials[part])
                continue
            for piece in regex.findall(PATTERN, unicodedata.normalize("NFC", part)):
                ids += [self.vocab[token] for token in self._merge(piece)]
        return ids

    def _merge(self, piece: str) -> list[str]:
        tokens = [byte_alphabet()[byte] for byte in piece.encode("utf-8")]
        while len(tokens) > 1:
            worst = len(self.ranks)
            ranks = [self.ranks.get(pair, worst) for pair in zip(tokens, tokens[1:], strict=False)]
            best = min(ranks)
            if best == worst:
                break
            at = ranks.index(best)
            tokens[at : at + 2] = [tokens[at] + tokens[at + 1]]
        return tokens
