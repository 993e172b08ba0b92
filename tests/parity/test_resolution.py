"""Squares and rectangles of any size through the real converter and tower, against timm's FastVit and transformers' Qwen2."""

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("timm", reason="install the extra 'parity'")
pytest.importorskip("torch", reason="install the extra 'parity'")

from mlx_fastvlm import generate_step, load
from mlx_fastvlm.convert import convert
from mlx_fastvlm.generate import prefill
from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.kernels.choice import plain_ops
from mlx_fastvlm.loading import on_slow_cpu
from mlx_fastvlm.sampling import make_sampler
from tests.parity.test_parity import SHORTENED, nchw
from tests.reference.hub_checkpoint import write_hub_checkpoint
from tests.reference.presets import preset
from tests.reference.torch_reference import load_reference
from tests.tolerances import FEATURES, LOGITS, relative_error

SIZES = {
    "tiny": [(64, 64), (64, 448), (192, 320), (320, 128), (384, 384), (512, 512), (704, 64)],
    "0.5b": [(64, 128), (192, 320), (320, 192), (512, 512), (576, 1024), (1024, 64)],
}
ANSWERED = [(192, 320), (576, 1024)]  # at Apple's widths
FULL_WIDTH_LIMIT = 512 * 512  # pixels that take minutes at Apple's widths without the extra 'cpu'
PLAIN_LIMIT = 192 * 64  # pixels that plain ops take seconds for at Apple's widths


@pytest.fixture(scope="module", params=SIZES)
def models(request, tmp_path_factory):
    """(name, our model, its processor, reference)."""
    folder = tmp_path_factory.mktemp("parity")
    changes = {} if request.param == "tiny" else SHORTENED
    source = write_hub_checkpoint(
        folder / "hub", config=preset(request.param) | changes, form="inference", dtype="float32"
    )
    model, processor = load(convert(source, folder / "converted"), dtype="float32")
    return request.param, model, processor, load_reference(source)


@pytest.fixture(params=range(max(map(len, SIZES.values()))))
def case(request, models):
    """(our model, its processor, reference, pixel values (2, H, W, 3)), H and W one of the model's sizes."""
    name, model, processor, reference = models
    if request.param >= len(SIZES[name]):
        pytest.skip("no further size")
    height, width = SIZES[name][request.param]
    if name != "tiny" and height * width > FULL_WIDTH_LIMIT and on_slow_cpu() and cpu.missing() is not None:
        pytest.skip("takes minutes on this CPU: install the extra 'cpu'")
    return model, processor, reference, np.random.default_rng(7).random((2, height, width, 3), dtype=np.float32)


def test_features(case):
    """Row by row, so that the order of positions is the reference's too; in a batch and alone, fast and plain."""
    model, _, reference, pixels = case
    wanted = reference.image_features(nchw(pixels))
    features = model.vision_tower(mx.array(pixels))
    assert relative_error(features, wanted) < FEATURES["float32"]
    assert relative_error(model.project(features), reference.project(wanted)) < FEATURES["float32"]
    assert relative_error(model.vision_tower(mx.array(pixels[1:])), wanted[1:]) < FEATURES["float32"]
    full_width = model.config.vision_config.hidden_size == 3072
    if pixels[0].size <= 3 * (PLAIN_LIMIT if full_width else FULL_WIDTH_LIMIT):
        with plain_ops():
            assert relative_error(model.vision_tower(mx.array(pixels[:1])), wanted[:1]) < FEATURES["float32"]


def test_logits_and_sixteen_greedy_tokens(case):
    model, processor, reference, pixels = case
    if model.config.vision_config.hidden_size == 3072 and pixels.shape[1:3] not in ANSWERED:
        pytest.skip("the decoder's part is the same for all sizes, and slow at Apple's widths")
    ids = processor.tokenize("What is in this picture?", num_images=1)
    rows = model.encode_images(mx.array(pixels[:1]))
    assert relative_error(model(ids, rows), reference.logits(ids, nchw(pixels[:1]))) < LOGITS["float32"]
    cache = model.make_cache()
    logits = prefill(model, model.embed(ids, rows), cache)
    found = list(generate_step(logits, model, cache, max_tokens=16, sampler=make_sampler()))
    assert found == list(reference.greedy(ids, nchw(pixels[:1]), 16))
