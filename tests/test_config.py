"""config.json: numbers read as given, everything that is not FastVLM refused with what was found."""

import re

import pytest

from mlx_fastvlm.config import FastVLMConfig, vision_config_dict
from mlx_fastvlm.errors import ConfigError
from tests.reference.presets import preset


@pytest.mark.parametrize(
    "name, hidden, layers, kv_heads, vocab, tied, rows",
    [
        ("0.5b", 896, 24, 2, 151936, True, 256),
        ("1.5b", 1536, 28, 2, 151936, True, 256),
        ("7b", 3584, 28, 4, 152128, False, 256),
        ("tiny", 64, 2, 2, 512, True, 16),
    ],
)
def test_released_sizes(name, hidden, layers, kv_heads, vocab, tied, rows):
    config = FastVLMConfig.from_dict(preset(name))
    text = config.text_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_key_value_heads) == (hidden, layers, kv_heads)
    assert (text.vocab_size, text.tie_word_embeddings) == (vocab, tied)
    assert config.vision_config.num_image_tokens == rows


def test_the_tower_of_the_hub_is_apples_standard_size():
    vision = FastVLMConfig.from_dict(preset("0.5b")).vision_config
    assert vision.embed_dims == (96, 192, 384, 768, 1536)
    assert vision.layers == (2, 12, 24, 4, 2)
    assert (vision.image_size, vision.hidden_size) == (1024, 3072)


def test_the_image_size_is_the_number_in_the_towers_name():
    raw = preset("0.5b") | {"mm_vision_tower": "mobileclip_l_384"}
    assert FastVLMConfig.from_dict(raw).vision_config.image_size == 384


def test_a_written_vision_config_reads_back():
    vision = FastVLMConfig.from_dict(preset("tiny")).vision_config
    raw = preset("tiny") | {"vision_config": vision_config_dict(vision)}
    assert FastVLMConfig.from_dict(raw).vision_config == vision


def test_rope_theta_is_found_where_transformers_5_puts_it():
    raw = preset("tiny")
    del raw["rope_theta"]
    assert FastVLMConfig.from_dict(raw | {"rope_parameters": {"rope_theta": 5e5}}).text_config.rope_theta == 5e5


@pytest.mark.parametrize(
    "change, text",
    [
        ({"model_type": "qwen2_vl"}, "model_type 'qwen2_vl'"),
        ({"model_type": None}, "model_type None"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14"}, "openai/clip-vit-large-patch14"),
        ({"mm_vision_tower": None}, "mm_vision_tower None"),
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size 1024"),
        ({"hidden_size": "896"}, "hidden_size = '896'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"vocab_size": True}, "vocab_size = True"),
        ({"num_attention_heads": 5}, "multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"vision_config": 3}, "vision_config is a int"),
        ({"vision_config": {"embed_dims": [8, 16]}}, "2 entries"),
        ({"vision_config": {"embed_dims": 8}}, "embed_dims is 8"),
        ({"vision_config": {"image_size": 100}}, "multiple of 64"),
        ({"vision_config": {"embed_dims": [96, 192, 384, 768, 800]}}, "not a multiple"),
        ({"vision_config": {"embed_dims": [1, 2, 4, 8, 16]}}, "head_dim"),
    ],
)
def test_what_is_not_fastvlm_is_refused(change, text):
    raw = preset("0.5b") | change
    with pytest.raises(ConfigError, match=re.escape(text)):
        FastVLMConfig.from_dict(raw)


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_key_value_heads"])
def test_a_missing_number_is_named(name):
    raw = preset("0.5b")
    del raw[name]
    with pytest.raises(ConfigError, match=name):
        FastVLMConfig.from_dict(raw)


@pytest.mark.parametrize("content, text", [(None, "no config.json"), ("{", "cannot be read"), ("[1]", "JSON list")])
def test_an_unreadable_file_is_refused(content, text, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=text):
        FastVLMConfig.from_folder(tmp_path)


def test_end_tokens_may_be_one_or_several():
    assert FastVLMConfig.from_dict(preset("tiny") | {"eos_token_id": 7}).eos_token_id == (7,)
    assert FastVLMConfig.from_dict(preset("tiny") | {"eos_token_id": [7, 8]}).eos_token_id == (7, 8)
