"""Qwen2's true vocabulary in the hub's file set, through our converter, against transformers' Qwen2 tokenizer.

The vocabulary is not in the repository: QWEN_TOKENIZER_JSON names it (see tests/reference/qwen_tokenizer.py).
"""

import pytest

transformers = pytest.importorskip("transformers", reason="install the extra 'parity'")

from mlx_fastvlm.convert.tokenizer import read_tokenizer
from mlx_fastvlm.prompt import build_prompt, tokenize_prompt
from tests.reference.golden_text import CONVERSATIONS, STRINGS
from tests.reference.qwen_tokenizer import SKIP_REASON, qwen_tokenizer_json, write_qwen2_vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    source = qwen_tokenizer_json()
    if source is None:
        pytest.skip(SKIP_REASON)
    return write_qwen2_vocabulary(source, tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def both(folder):
    return read_tokenizer(folder), transformers.Qwen2Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", STRINGS, ids=lambda text: ascii(text)[:24])
def test_strings(text, both):
    ours, reference = both
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == reference(text).input_ids
    assert ours.decode(ids, skip_special_tokens=False) == reference.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(name, both):
    ours, reference = both
    prompt = reference.apply_chat_template(CONVERSATIONS[name], tokenize=False, add_generation_prompt=True)
    assert build_prompt(CONVERSATIONS[name], prompt.count("<image>")) == prompt
    pieces = [reference(piece).input_ids for piece in prompt.split("<image>")]
    joined = [token for i, piece in enumerate(pieces) for token in ([-200] * (i > 0) + piece)]
    assert tokenize_prompt(ours, prompt) == joined
