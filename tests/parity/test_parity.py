"""Random checkpoints in the hub's exact layout through the real converter, against timm's FastVit and transformers' Qwen2.

Unlike the golden tests, the reference runs here and now: also at Apple's widths, with the tower's full depth and at the
full 1024 pixels, where the CPU's fast versions of the ops are taken.
"""

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("timm", reason="install the extra 'parity'")
pytest.importorskip("torch", reason="install the extra 'parity'")

from mlx_fastvlm import generate_step, load
from mlx_fastvlm.convert import convert
from mlx_fastvlm.generate import prefill
from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.loading import on_slow_cpu
from mlx_fastvlm.sampling import make_sampler
from tests.reference.hub_checkpoint import write_hub_checkpoint
from tests.reference.presets import preset
from tests.reference.torch_reference import load_reference
from tests.tolerances import FEATURES, LOGITS, relative_error

# The released models at full width; fewer decoder layers, a smaller vocabulary and a smaller picture keep it to seconds.
SHORTENED = {"num_hidden_layers": 3, "vocab_size": 2048, "mm_vision_tower": "mobileclip_l_256"}
CASES = {
    "tiny, inference form": ("tiny", {}, "inference"),
    "tiny, training form": ("tiny", {}, "training"),
    "0.5B widths, inference form": ("0.5b", SHORTENED, "inference"),
    "0.5B widths, training form": ("0.5b", SHORTENED, "training"),
    "0.5B widths, 1024 pixels": ("0.5b", SHORTENED | {"mm_vision_tower": "mobileclip_l_1024"}, "inference"),
    "1.5B widths": ("1.5b", SHORTENED | {"num_hidden_layers": 2}, "inference"),
    "7B widths, untied": ("7b", SHORTENED | {"num_hidden_layers": 1}, "inference"),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(our model, reference, pixel values (2, R, R, 3), prompt ids with one image)."""
    name, changes, form = CASES[request.param]
    if "1024" in request.param and on_slow_cpu() and cpu.missing() is not None:
        pytest.skip("takes minutes on this CPU: install the extra 'cpu'")
    folder = tmp_path_factory.mktemp("parity")
    source = write_hub_checkpoint(folder / "hub", config=preset(name) | changes, form=form, dtype="float32")
    model, processor = load(convert(source, folder / "converted"), dtype="float32")
    side = model.config.vision_config.image_size
    pixels = np.random.default_rng(7).random((2, side, side, 3), dtype=np.float32)
    ids = processor.tokenize("What is in this picture?", num_images=1)
    return model, load_reference(source), pixels, ids


def nchw(pixels):
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def test_features(case):
    model, reference, pixels, _ = case
    wanted = reference.image_features(nchw(pixels))
    features = model.vision_tower(mx.array(pixels))
    assert relative_error(features, wanted) < FEATURES["float32"]
    assert relative_error(model.project(features), reference.project(wanted)) < FEATURES["float32"]


def test_logits(case):
    model, reference, pixels, ids = case
    logits = model(ids, model.encode_images(mx.array(pixels[:1])))
    assert relative_error(logits, reference.logits(ids, nchw(pixels[:1]))) < LOGITS["float32"]


def test_sixteen_greedy_tokens(case):
    model, reference, pixels, ids = case
    cache = model.make_cache()
    logits = prefill(model, model.embed(ids, model.encode_images(mx.array(pixels[:1]))), cache)
    found = list(generate_step(logits, model, cache, max_tokens=16, sampler=make_sampler()))
    assert found == list(reference.greedy(ids, nchw(pixels[:1]), 16))
