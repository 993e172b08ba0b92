"""Prompts and their ids, against transformers' chat template and tokenizer (golden) and LLaVA's rules."""

import json

import pytest

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.prompt import build_prompt
from tests.conftest import GOLDEN

TOKENIZATION = json.loads((GOLDEN / "tokenization.json").read_text(encoding="utf-8"))


def test_the_default_prompt_is_the_one_fastvlm_was_trained_on():
    assert build_prompt("What is it?", num_images=1) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("case", TOKENIZATION["strings"], ids=lambda case: ascii(case["text"])[:24])
def test_strings_tokenize_as_in_transformers(tiny, case):
    _, processor = tiny
    ids = processor.tokenizer.encode(case["text"], add_special_tokens=False).ids
    assert ids == case["ids"]
    assert processor.tokenizer.decode(ids, skip_special_tokens=False) == case["decoded"]


@pytest.mark.parametrize("name", TOKENIZATION["prompts"])
def test_conversations_become_the_template_and_ids_of_transformers(tiny, name):
    _, processor = tiny
    case = TOKENIZATION["prompts"][name]
    num_images = case["prompt"].count("<image>")
    assert build_prompt(case["messages"], num_images) == case["prompt"]
    assert processor.tokenize(case["messages"], num_images) == case["ids"]


def test_content_parts_become_marks_in_their_order():
    parts = [{"type": "text", "text": "Left: "}, {"type": "image"}, {"type": "text", "text": "What?"}]
    assert "user\nLeft: <image>\nWhat?<|im_end|>" in build_prompt([{"role": "user", "content": parts}], num_images=1)


def test_images_without_marks_come_first():
    assert "user\n<image>\n<image>\nCompare." in build_prompt("Compare.", num_images=2)


@pytest.mark.parametrize(
    "prompt, num_images, system, text",
    [
        ("<image> and <image>", 1, None, "marks in the prompt, 2, and of images, 1"),
        ("see <image>", 0, None, "marks in the prompt, 1, and of images, 0"),
        ([{"role": "robot", "content": "hi"}], 0, None, "robot"),
        ([{"role": "user", "content": 3}], 0, None, "content is int"),
        ([{"role": "user", "content": [{"type": "audio"}]}], 0, None, "audio"),
        ([{"role": "assistant", "content": "hi"}], 1, None, "no user message"),
        ([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], 0, "c", "system"),
    ],
)
def test_malformed_conversations_are_refused(prompt, num_images, system, text):
    with pytest.raises(OptionError, match=text):
        build_prompt(prompt, num_images, system)
