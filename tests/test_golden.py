"""The whole network against numbers that timm's FastVit and transformers' Qwen2 gave for the same checkpoint.

tests/reference/make_golden.py wrote the numbers; nothing here needs torch.
"""

import hashlib

import mlx.core as mx
import numpy as np
import pytest

from mlx_fastvlm import generate_step, load
from mlx_fastvlm.generate import prefill
from mlx_fastvlm.sampling import make_sampler
from tests.conftest import GOLDEN
from tests.tolerances import FEATURES, LOGITS, relative_error

FORMS = ("inference", "training")
CASES = {"one_image": slice(0, 1), "two_images": slice(0, 2), "text_only": slice(0, 0)}


@pytest.fixture(params=FORMS)
def case(request, converted_folder):
    """(model, golden numbers) for one form of the checkpoint."""
    model, _ = load(converted_folder(request.param), dtype="float32")
    return model, np.load(GOLDEN / f"tiny_{request.param}.npz")


@pytest.mark.parametrize("form", FORMS)
def test_checkpoint_is_the_one_the_reference_saw(form, hub_folder):
    stored = hashlib.sha256((hub_folder(form) / "model.safetensors").read_bytes()).hexdigest()
    assert stored == str(np.load(GOLDEN / f"tiny_{form}.npz")["model_sha256"])


def test_features(case, golden_pixels):
    model, golden = case
    features = model.vision_tower(mx.array(golden_pixels))
    assert relative_error(features, golden["features"]) < FEATURES["float32"]
    assert relative_error(model.project(features), golden["projected"]) < FEATURES["float32"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_features_in_half_precision(dtype, converted_folder, golden_pixels):
    model, _ = load(converted_folder("inference"), dtype=dtype)
    features = model.vision_tower(mx.array(golden_pixels).astype(model.dtype)).astype(mx.float32)
    assert relative_error(features, np.load(GOLDEN / "tiny_inference.npz")["features"]) < FEATURES[dtype]


@pytest.mark.parametrize("name", CASES)
def test_logits(name, case, golden_pixels):
    model, golden = case
    logits = model(golden[f"{name}_ids"].tolist(), _image_rows(model, golden_pixels[CASES[name]]))
    assert relative_error(logits[0], golden[f"{name}_logits"]) < LOGITS["float32"]


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens(name, case, golden_pixels):
    model, golden = case
    found = _greedy(model, golden[f"{name}_ids"].tolist(), golden_pixels[CASES[name]])
    assert found == golden[f"{name}_greedy"].tolist()


def test_another_image_gives_the_other_answer(case, golden_pixels):
    model, golden = case
    found = _greedy(model, golden["one_image_ids"].tolist(), golden_pixels[1:])
    assert found == golden["other_image_greedy"].tolist() != golden["one_image_greedy"].tolist()


def _image_rows(model, pixels):
    return model.encode_images(mx.array(pixels)) if len(pixels) else None


def _greedy(model, input_ids, pixels):
    cache = model.make_cache()
    logits = prefill(model, model.embed(input_ids, _image_rows(model, pixels)), cache)
    return list(generate_step(logits, model, cache, max_tokens=16, sampler=make_sampler()))
