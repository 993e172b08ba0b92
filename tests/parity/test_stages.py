"""The maps of every stage and the pooled features, against timm's FastVit: its intermediates, hooks and head."""

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("timm", reason="install the extra 'parity'")
torch = pytest.importorskip("torch", reason="install the extra 'parity'")

from mlx_fastvlm import load
from mlx_fastvlm.convert import convert
from mlx_fastvlm.embedding import embed_pixels
from mlx_fastvlm.kernels.choice import plain_ops
from tests.parity.test_parity import SHORTENED, nchw
from tests.reference.hub_checkpoint import write_hub_checkpoint
from tests.reference.presets import preset
from tests.reference.torch_reference import load_reference
from tests.tolerances import FEATURES, relative_error

CASES = {
    "tiny": ("tiny", {}, "inference"),
    "tiny, training": ("tiny", {}, "training"),
    "0.5B": ("0.5b", SHORTENED, "inference"),
}
SIZES = [(256, 256), (128, 320), (192, 64)]
FULL_WIDTH = 3072
PLAIN_LIMIT = 3 * 192 * 64  # values of an image that plain ops take seconds for at Apple's widths


@pytest.fixture(scope="module", params=CASES)
def models(request, tmp_path_factory):
    """(our model, timm's tower with CLIP's head)."""
    name, changes, form = CASES[request.param]
    folder = tmp_path_factory.mktemp("stages")
    source = write_hub_checkpoint(folder / "hub", config=preset(name) | changes, form=form, dtype="float32")
    model, _ = load(convert(source, folder / "converted"), dtype="float32")
    return model, load_reference(source).tower


@pytest.fixture(params=SIZES, ids=str)
def pixels(request):
    return np.random.default_rng(7).random((2, *request.param, 3), dtype=np.float32)


def reference_maps(tower, pixels):
    """Name → (B, H, W, C), from timm's own intermediates and hooks on the two modules that these leave out."""
    maps = {}
    hooks = [
        getattr(tower, name).register_forward_hook(
            lambda module, inputs, output, name=name: maps.update({name: output})
        )
        for name in ("stem", "final_conv")
    ]
    with torch.inference_mode():
        final, stages = tower.forward_intermediates(torch.from_numpy(nchw(pixels)))
    for hook in hooks:
        hook.remove()
    assert torch.equal(final, maps["final_conv"])
    maps |= {f"stages.{number}": stage for number, stage in enumerate(stages)}
    return {name: array.permute(0, 2, 3, 1).numpy() for name, array in maps.items()}


def test_the_map_of_every_stage(models, pixels):
    model, tower = models
    if model.config.vision_config.hidden_size == FULL_WIDTH and pixels[0].size > PLAIN_LIMIT:
        pytest.skip("at Apple's widths one rectangle shows what the tiny model shows for every size")
    wanted = reference_maps(tower, pixels)
    found = model.vision_tower(mx.array(pixels), return_stages=True)
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert relative_error(found[name], array) < FEATURES["float32"], name
    with plain_ops():
        plain = model.vision_tower(mx.array(pixels[:1]), return_stages=True)
    for name, array in wanted.items():
        assert relative_error(plain[name], array[:1]) < FEATURES["float32"], name


def test_pooled_features_and_clips_head(models, pixels):
    model, tower = models
    with torch.inference_mode():
        final = tower.forward_features(torch.from_numpy(nchw(pixels)))
        pooled, clip = tower.forward_head(final, pre_logits=True), tower.forward_head(final)
    assert relative_error(embed_pixels(model, mx.array(pixels), "pooled"), pooled.numpy()) < FEATURES["float32"]
    assert relative_error(embed_pixels(model, mx.array(pixels), "clip"), clip.numpy()) < FEATURES["float32"]
    unit = torch.nn.functional.normalize(clip, dim=-1).numpy()
    assert relative_error(embed_pixels(model, mx.array(pixels), "clip", normalize=True), unit) < FEATURES["float32"]
