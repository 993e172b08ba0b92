"""The peers that need torch, timm and transformers, on tiny models; skipped without them. Run from the repository root."""

from dataclasses import replace

import pytest

from mlx_fastvlm.benchmarks import headline_runners, random_model, runners
from tests.conftest import GOLDEN

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

PICTURE = str(GOLDEN / "images" / "landscape.png")
OPTIONS = {"dtype": "float32", "device": "auto", "blas": "auto", "tiles": 2}


@pytest.fixture
def two_layers(monkeypatch):
    """Decoders of two layers, and LLaVA-OneVision's tower of one."""

    def small(size):
        config = random_model.random_config(size)
        return replace(config, text_config=replace(config.text_config, num_hidden_layers=2, vocab_size=512))

    whole = transformers.LlavaOnevisionConfig

    def one_layer_tower(**fields):
        config = whole(**fields)
        config.vision_config.num_hidden_layers = 1
        return config

    monkeypatch.setattr(headline_runners, "random_config", small)
    monkeypatch.setattr(headline_runners, "RESOLUTION", 128)
    monkeypatch.setattr(transformers, "LlavaOnevisionConfig", one_layer_tower)


def answer(implementation):
    return list(implementation.tokens(PICTURE, "Describe this image.", 6))


def test_pytorch_answers_as_ours(hub_folder, converted_folder):
    ours = answer(runners.load_ours({**OPTIONS, "folder": str(converted_folder("inference"))}))
    theirs = answer(runners.load_torch({**OPTIONS, "folder": str(hub_folder("inference"))}))
    assert len(ours) == 6
    assert theirs == ours


def test_bfloat16_is_what_it_says(hub_folder, monkeypatch):
    asked = []
    monkeypatch.setattr(runners, "load_torch", lambda options: asked.append(options))
    runners.load_torch_bfloat16({**OPTIONS, "folder": str(hub_folder("inference"))})
    assert [options["dtype"] for options in asked] == ["bfloat16"]


@pytest.mark.parametrize(
    ("load", "visual_tokens"),
    [
        (headline_runners.load_ours, 4),
        (headline_runners.load_fastvlm_torch, 4),
        (headline_runners.load_onevision_torch, 2 * 27 * 27 + 27),  # two tiles, and one that ends each row of the grid
    ],
)
def test_sides_of_the_headline_have_the_shapes_they_say(load, visual_tokens, two_layers):
    reply = load(OPTIONS)()
    assert reply["visual_tokens"] == visual_tokens
    assert reply["encode"] + reply["prefill"] == pytest.approx(reply["ttft"])
    assert len(reply["tokens"]) == 1
