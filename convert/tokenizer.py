"""Tokenizer files of a hub folder → one tokenizer.json.

FastVLM's hub folders have no tokenizer.json, only Qwen2's vocab.json, merges.txt and added_tokens.json; the `tokenizers`
library builds the same tokenizer from them. Source of the pipeline: transformers' Qwen2 converter (NFC, the split
pattern below, byte-level BPE).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mlx_fastvlm.errors import CheckpointError
from mlx_fastvlm.json_file import read_json_object

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
REQUIRED_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")  # the prompt's frame and the ends of an answer
NOTES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def write_tokenizer(source: Path, destination: Path) -> None:
    """Write tokenizer.json and copy what describes it.

    Raises:
        CheckpointError: files are missing or damaged, or special tokens of the prompt are not in the vocabulary.
    """
    tokenizer = read_tokenizer(source)
    missing = [token for token in REQUIRED_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        raise CheckpointError(f"The tokenizer in {source} lacks {', '.join(missing)}; expected Qwen2's special tokens.")
    tokenizer.save(str(destination / "tokenizer.json"))
    for name in NOTES:
        if (source / name).exists():
            shutil.copyfile(source / name, destination / name)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, from tokenizer.json or from Qwen2's three files."""
    if (folder / "tokenizer.json").exists():
        try:
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception for a damaged file
            raise CheckpointError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
    vocabulary = read_json_object(folder / "vocab.json", CheckpointError)
    try:
        merge_lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no merges.txt; finish the download.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / 'merges.txt'} cannot be read ({error}); download it again.") from None
    merges = [tuple(line.split(" ")) for line in merge_lines if line and not line.startswith("#version")]
    if any(len(merge) != 2 for merge in merges):
        raise CheckpointError(
            f"{folder / 'merges.txt'} is damaged: a line does not hold two pieces. Download it again."
        )
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False))
    except Exception as error:  # merges that are not in the vocabulary
        raise CheckpointError(f"{folder}: vocab.json and merges.txt do not belong together ({error}).") from None
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    _add_tokens(tokenizer, folder)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Append added_tokens.json's entries at the ids it gives; tokenizer_config.json says which are not special."""
    added = read_json_object(folder / "added_tokens.json", CheckpointError)
    if not all(type(token_id) is int for token_id in added.values()):
        raise CheckpointError(f"{folder / 'added_tokens.json'} does not give every token an id; download it again.")
    details = _details(folder)
    for content, token_id in sorted(added.items(), key=lambda item: item[1]):
        flags = details.get(str(token_id), {})
        token = AddedToken(
            content,
            special=flags.get("special", True),
            normalized=flags.get("normalized", False),
            lstrip=flags.get("lstrip", False),
            rstrip=flags.get("rstrip", False),
            single_word=flags.get("single_word", False),
        )
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(content) != token_id:
            raise CheckpointError(
                f"{folder / 'added_tokens.json'} gives {content!r} the id {token_id}, but the vocabulary leads to "
                f"{tokenizer.token_to_id(content)}; the tokenizer files do not belong together."
            )


def _details(folder: Path) -> dict[str, dict[str, Any]]:
    """What tokenizer_config.json says about added tokens, by their ids; {} if there is no such file."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return {}
    details = read_json_object(path, CheckpointError).get("added_tokens_decoder", {})
    if not isinstance(details, dict) or not all(isinstance(flags, dict) for flags in details.values()):
        raise CheckpointError(
            f"{path} is damaged: added_tokens_decoder is not an object of objects. Download it again."
        )
    return details
