"""A small byte-level BPE with Qwen2's normalizer and pre-tokenizer, and its hub-style files."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from training import prompts

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (prompts.END_OF_TEXT, prompts.START, prompts.END)
VOCAB_SIZE = 576
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _pipeline(model: BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(corpus: list[str], folder: Path) -> None:
    """Learn merges from the corpus and write the tokenizer's files into the folder."""
    learned = _pipeline(BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = VOCAB_SIZE - len(SPECIAL_TOKENS)
    learned.train_from_iterator(corpus, BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    folder.mkdir(parents=True, exist_ok=True)
    learned.model.save(str(folder))
    size = learned.get_vocab_size()
    added = {token: size + index for index, token in enumerate(SPECIAL_TOKENS)}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): {"content": token, **plain} for token, index in added.items()},
        "additional_special_tokens": [prompts.START, prompts.END],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": prompts.END,
        "errors": "replace",
        "model_max_length": 1024,
        "pad_token": prompts.END_OF_TEXT,
        "padding_side": "right",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    special = {
        "additional_special_tokens": [prompts.START, prompts.END],
        "eos_token": prompts.END,
        "pad_token": prompts.END_OF_TEXT,
    }
    for name, content in (
        ("added_tokens.json", added),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a hub-style folder, from vocab.json, merges.txt and added_tokens.json."""
    tokenizer = _pipeline(BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    added = json.loads((folder / "added_tokens.json").read_text())
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in sorted(added, key=added.get)])
    for token, index in added.items():
        if tokenizer.token_to_id(token) != index:
            raise ValueError(f"{token} became {tokenizer.token_to_id(token)}, added_tokens.json says {index}")
    return tokenizer
