"""The layouts' names and numbers are those of timm, transformers and mlx-vlm themselves, whichever are installed."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_fastvlm.config import FastVLMConfig, VisionConfig
from mlx_fastvlm.convert.checkpoint import Checkpoint
from mlx_fastvlm.convert.key_map import sites
from mlx_fastvlm.convert.layouts import recognize
from mlx_fastvlm.convert.layouts.timm_names import tower_names
from mlx_fastvlm.model import FastVLM
from tests.reference import layouts as write
from tests.reference.presets import tower_size
from tests.tolerances import FEATURES, LOGITS, relative_error

FORMS = ("inference", "training")
IMAGE = -200


def read_layout(folder):
    return recognize(Checkpoint(folder), json.loads((folder / "config.json").read_text()), folder)


def our_model(layout):
    """The runtime's model with a layout's tensors folded in float32."""
    config = FastVLMConfig.from_dict(layout.config)
    model = FastVLM(config)
    folded = [pair for site in sites(config) for pair in site.fold(layout.tensors).items()]
    model.load_weights(folded, strict=True)
    return model


def hub_config(folder):
    return json.loads((folder / "config.json").read_text())


# timm


@pytest.mark.parametrize("form", FORMS)
def test_timm_has_the_writers_names(hub_folder, form, tmp_path):
    pytest.importorskip("timm", reason="install the extra 'parity'")
    from tests.reference.torch_reference import build_tower

    hub = hub_folder(form)
    tower = build_tower(tower_size(hub_config(hub)), inference_mode=form == "inference")
    written = Checkpoint(write.write_timm_tower(hub, tmp_path / "tower"))
    wanted = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    assert {name: written.shape(name) for name in written.names()} == wanted


@pytest.mark.parametrize("inference_mode", [True, False])
def test_every_name_of_fastvit_mci3_is_known(inference_mode):
    timm = pytest.importorskip("timm", reason="install the extra 'parity'")
    torch = pytest.importorskip("torch", reason="install the extra 'parity'")
    with torch.device("meta"):
        tower = timm.create_model("fastvit_mci3", inference_mode=inference_mode)
    assert set(tower.state_dict()) <= set(tower_names(VisionConfig()).values())


# transformers


@pytest.mark.parametrize("form", FORMS)
def test_transformers_fast_vlm(hub_folder, form, tmp_path):
    """It loads what the writer wrote, saves what `recognize` reads, and computes what our model does."""
    transformers = pytest.importorskip("transformers", reason="install the extra 'parity'")
    torch = pytest.importorskip("torch", reason="install the extra 'parity'")
    pytest.importorskip("timm", reason="install the extra 'parity'")
    hub = hub_folder(form)
    written = write.write_fast_vlm(hub, tmp_path / "written")
    edit_inference_mode(written, form == "inference")
    theirs, info = transformers.FastVlmForConditionalGeneration.from_pretrained(
        written, dtype=torch.float32, output_loading_info=True
    )
    assert {kind: found for kind, found in info.items() if found} == {}
    theirs = theirs.eval()
    theirs.save_pretrained(tmp_path / "saved")
    assert_same_tensors(read_layout(tmp_path / "saved"), read_layout(written))

    ours = our_model(read_layout(written))
    side = ours.config.vision_config.image_size
    pixels = np.random.default_rng(5).random((1, side, side, 3), dtype=np.float32)
    torch_pixels = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    image = theirs.config.image_token_index
    before, after = [3, 14, 15], [92, 65, 35]
    num_rows = ours.config.vision_config.num_image_tokens
    with torch.inference_mode():
        features = theirs.model.vision_tower(torch_pixels).last_hidden_state.flatten(2).transpose(1, 2)
        ids = torch.tensor([before + [image] * num_rows + after])
        logits = theirs(input_ids=ids, pixel_values=torch_pixels).logits
    assert relative_error(ours.vision_tower(mx.array(pixels)), features) < FEATURES["float32"]
    found = ours([*before, IMAGE, *after], ours.encode_images(mx.array(pixels)))
    assert relative_error(found, logits) < LOGITS["float32"]


def edit_inference_mode(folder, inference_mode):
    config = hub_config(folder)
    config["vision_config"]["model_args"]["inference_mode"] = inference_mode
    (folder / "config.json").write_text(json.dumps(config))


def assert_same_tensors(found, wanted):
    config = FastVLMConfig.from_dict(found.config)
    for name in (name for site in sites(config) for name in site.sources(wanted.tensors)):
        assert mx.array_equal(found.tensors[name], wanted.tensors[name]).item(), name


# mlx-vlm


@pytest.fixture
def their_mlx_model(hub_folder):
    """mlx-vlm's model of the tiny hub checkpoint, through its own translation of names."""
    theirs = pytest.importorskip("mlx_vlm.models.fastvlm", reason="pip install mlx-vlm")
    config_module = pytest.importorskip("mlx_vlm.models.fastvlm.config")
    hub = hub_folder("inference")
    raw = hub_config(hub)
    config = theirs.ModelConfig.from_dict(dict(raw))
    config.text_config = config_module.TextConfig.from_dict(raw)
    config.vision_config = config_module.VisionConfig.from_dict(raw["vision_config"])
    for name in ("layers", "embed_dims", "mlp_ratios"):  # constants of the class, which our tiny tower needs otherwise
        setattr(config.vision_config, name, raw["vision_config"][name])
    model = theirs.Model(config)
    weights = model.sanitize(write.read_hub(hub))
    weights = model.vision_tower.sanitize(weights)
    weights = model.language_model.sanitize(weights)
    model.load_weights(list(weights.items()), strict=True)
    return model


def assert_same_file(folder, model):
    written = mx.load(str(folder / "model.safetensors"))
    theirs = dict(tree_flatten(model.parameters()))
    assert set(written) == set(theirs)
    for name, array in theirs.items():
        assert written[name].dtype == array.dtype, name
        assert mx.array_equal(written[name], array).item(), name


def test_mlx_vlm_has_the_writers_tensors(hub_folder, their_mlx_model, tmp_path):
    assert_same_file(write.write_mlx_vlm(hub_folder("inference"), tmp_path / "f"), their_mlx_model)


@pytest.mark.parametrize(
    "quantization",
    [
        {"group_size": 64, "bits": 4, "mode": "affine"},
        {"group_size": 32, "bits": 8, "mode": "affine"},
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    ],
    ids=lambda each: f"{each['mode']}-{each['bits']}",
)
def test_mlx_vlm_quantizes_as_the_writer(hub_folder, their_mlx_model, quantization, tmp_path):
    quantize_model = pytest.importorskip("mlx_vlm.quant_utils", reason="pip install mlx-vlm").quantize_model
    folder = write.write_mlx_vlm(hub_folder("inference"), tmp_path / "f", quantization=quantization)
    model, config = quantize_model(their_mlx_model, {}, **quantization)
    assert config["quantization"] == hub_config(folder)["quantization"]
    assert_same_file(folder, model)
