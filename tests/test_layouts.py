"""Every layout gives the tensors of the hub's checkpoint it was written from, and what does not fit is refused."""

import json
import sys
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_fastvlm import load
from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.convert import convert
from mlx_fastvlm.convert.checkpoint import Checkpoint
from mlx_fastvlm.convert.key_map import TOWER, check_names, sites, tower_sites
from mlx_fastvlm.convert.layouts import LAYOUTS, recognize, tower_alone
from mlx_fastvlm.convert.tensors import Renamed, Stored
from mlx_fastvlm.errors import CheckpointError, ConfigError
from tests.reference import layouts as write
from tests.reference.hub_checkpoint import write_hub_checkpoint
from tests.tolerances import relative_error

FORMS = ("inference", "training")


def read_layout(folder):
    return recognize(Checkpoint(folder), json.loads((folder / "config.json").read_text()), folder)


@pytest.fixture(scope="module")
def untied_hub(tmp_path_factory):
    return write_hub_checkpoint(tmp_path_factory.mktemp("untied") / "hub", lm_head="untied", seed=3)


@pytest.fixture
def tower_of_hub(monkeypatch):
    """hub → the Core ML reader answers with that hub's tower."""

    def stand_in(hub):
        def read_tower(package, config):
            checkpoint = Checkpoint(hub)
            names = [name for name in checkpoint.names() if name.startswith(TOWER)]
            return Renamed(checkpoint, {name: Stored(name) for name in names})

        monkeypatch.setitem(sys.modules, "mlx_fastvlm.convert.coreml", SimpleNamespace(read_tower=read_tower))

    return stand_in


def assert_same_tensors(found, wanted, needed):
    assert needed
    for name in needed:
        assert found.shape(name) == wanted.shape(name), name
        assert found.dtype(name) == wanted.dtype(name), name
        assert found.nbytes(name) == wanted.nbytes(name), name
        assert found[name].dtype == mx.float32
        assert mx.array_equal(found[name], wanted[name]).item(), name


def assert_same_checkpoint(folder, hub):
    """The layout of `folder` has what the model needs, equal to the hub's; the rest is dropped for a reason."""
    layout, checkpoint = read_layout(folder), Checkpoint(hub)
    config = FastVLMConfig.from_dict(layout.config)
    wanted = FastVLMConfig.from_folder(hub)
    assert (config.text_config, config.vision_config) == (wanted.text_config, wanted.vision_config)
    needed = sites(config)
    check_names(needed, set(layout.tensors.names()) - {"lm_head.weight"} | untied_head(config), layout.tensors)
    names = [name for site in needed for name in site.sources(checkpoint)]
    assert names == [name for site in needed for name in site.sources(layout.tensors)]
    assert_same_tensors(layout.tensors, checkpoint, names)
    for name in names:
        rows = min(3, checkpoint.shape(name)[0])
        assert mx.array_equal(layout.tensors.rows(name, 1, rows), checkpoint[name][1:rows]).item(), name
    return layout


def untied_head(config):
    return set() if config.text_config.tie_word_embeddings else {"lm_head.weight"}


# Layouts that hold both forms


@pytest.mark.parametrize("form", FORMS)
def test_hub_is_presented_as_it_is(hub_folder, form):
    checkpoint = Checkpoint(hub_folder(form))
    raw = json.loads((hub_folder(form) / "config.json").read_text())
    layout = recognize(checkpoint, raw, hub_folder(form))
    assert layout.tensors is checkpoint
    assert (layout.config, layout.notices) == (raw, [])


@pytest.mark.parametrize("form", FORMS)
def test_llava_with_timm_tower(hub_folder, form, tmp_path):
    layout = assert_same_checkpoint(
        write.write_llava_with_timm_tower(hub_folder(form), tmp_path / "f"), hub_folder(form)
    )
    assert layout.config["image_aspect_ratio"] == "pad"


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("form", FORMS)
def test_fast_vlm(hub_folder, form, prefix, tmp_path):
    folder = write.write_fast_vlm(hub_folder(form), tmp_path / "f", prefix=prefix)
    assert_same_checkpoint(folder, hub_folder(form))


def test_fast_vlm_untied(untied_hub, tmp_path):
    layout = assert_same_checkpoint(write.write_fast_vlm(untied_hub, tmp_path / "f"), untied_hub)
    assert layout.config["tie_word_embeddings"] is False


@pytest.mark.parametrize("level", ["top", "text_config"])
def test_fast_vlm_is_tied_if_either_level_says_so(hub_folder, level, tmp_path):
    folder = write.write_fast_vlm(hub_folder("inference"), tmp_path / "f")
    raw = json.loads((folder / "config.json").read_text())
    del (raw["text_config"] if level == "top" else raw)["tie_word_embeddings"]
    assert recognize(Checkpoint(folder), raw, folder).config["tie_word_embeddings"] is True


@pytest.mark.parametrize("processor", ["preprocessor_config.json", "processor_config.json"])
def test_fast_vlm_crops_as_its_processor_does(hub_folder, processor, tmp_path):
    layout = read_layout(write.write_fast_vlm(hub_folder("inference"), tmp_path / "f", processor=processor))
    config = FastVLMConfig.from_dict(layout.config)
    assert (config.image_aspect_ratio, config.vision_config.image_size) == ("crop", 256)
    assert "cuts the middle square" in layout.notices[0]


def test_fast_vlm_without_processor_is_padded_at_1024(hub_folder, tmp_path):
    layout = read_layout(write.write_fast_vlm(hub_folder("inference"), tmp_path / "f", processor=""))
    config = FastVLMConfig.from_dict(layout.config)
    assert (config.image_aspect_ratio, config.vision_config.image_size, layout.notices) == ("pad", 1024, [])


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"do_pad": True}, ("pad", 256)),
        ({"do_center_crop": False, "crop_size": {"height": 224, "width": 224}}, ("pad", 256)),
        ({"size": {"height": 512, "width": 512}, "crop_size": None}, ("crop", 512)),
        ({"size": 512, "crop_size": 512}, ("crop", 512)),
        ({"size": 512, "do_center_crop": False}, ("pad", 512)),
        ({"image_mean": 0.0, "image_std": 1}, ("crop", 256)),
        ({"image_mean": [0.5, 0.5, 0.5], "do_normalize": False}, ("crop", 256)),
    ],
)
def test_fast_vlm_with_another_processor(hub_folder, settings, wanted, tmp_path):
    folder = write.write_fast_vlm(hub_folder("inference"), tmp_path / "f")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    config = FastVLMConfig.from_dict(read_layout(folder).config)
    assert (config.image_aspect_ratio, config.vision_config.image_size) == wanted


def edit(*path, value):
    """A change of one field, given by its path in the config."""

    def change(raw):
        for name in path[:-1]:
            raw = raw[name]
        raw[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "other tower": (edit("vision_config", "architecture", value="fastvit_mci4"), "'fastvit_mci4'"),
        "other tower options": (edit("vision_config", "model_args", value={"se_downsamples": [1]}), "se_downsamples"),
        "other decoder": (edit("text_config", "model_type", value="llama"), "'llama'"),
        "other activation": (edit("projector_hidden_act", value="relu"), "projector_hidden_act 'relu'"),
        "no text config": (edit("text_config", value=None), "no 'text_config'"),
        "scaled rotary": (edit("text_config", "rope_parameters", value={"rope_type": "yarn"}), "'yarn'"),
        "other width": (edit("vision_config", "hidden_size", value=512), "mm_hidden_size 512"),
    }.values(),
)
def test_fast_vlm_config_of_another_model(hub_folder, change, message, tmp_path):
    folder = write.write_fast_vlm(hub_folder("inference"), tmp_path / "f")
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    with pytest.raises(ConfigError, match=message):
        recognize(Checkpoint(folder), raw, folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean"),
        ({"image_mean": 0.5}, "image_mean 0.5"),
        ({"image_std": "1"}, "image_std 1"),
        ({"crop_size": {"height": 512, "width": 256}}, "crop_size"),
        ({"crop_size": None, "size": {"longest_edge": 512}}, "size is .*longest_edge"),
        ({"crop_size": [512, 512]}, "crop_size"),
        ({"crop_size": True}, "crop_size"),
        ({"crop_size": -64}, "crop_size"),
    ],
)
def test_fast_vlm_with_an_unfit_processor(hub_folder, settings, message, tmp_path):
    folder = write.write_fast_vlm(hub_folder("inference"), tmp_path / "f")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ConfigError, match=message):
        read_layout(folder)


def test_fast_vlm_with_a_damaged_processor(hub_folder, tmp_path):
    folder = write.write_fast_vlm(hub_folder("inference"), tmp_path / "f")
    (folder / "preprocessor_config.json").write_text("[" * 200_000)
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_layout(folder)


# MLX's layouts


@pytest.mark.parametrize("projector", ["mm_projector", "mm_projector.layers"])
def test_mlx_vlm(hub_folder, projector, tmp_path):
    folder = write.write_mlx_vlm(hub_folder("inference"), tmp_path / "f", projector=projector)
    assert assert_same_checkpoint(folder, hub_folder("inference")).notices == []


def test_mlx_vlm_untied(untied_hub, tmp_path):
    assert_same_checkpoint(write.write_mlx_vlm(untied_hub, tmp_path / "f"), untied_hub)


def test_apple_export(hub_folder, tower_of_hub, tmp_path):
    hub = hub_folder("inference")
    tower_of_hub(hub)
    folder = write.write_apple_export(hub, tmp_path / "f")
    (folder / "fastvithd.mlpackage").mkdir()
    assert_same_checkpoint(folder, hub)


def test_apple_export_without_its_tower(hub_folder, tmp_path):
    folder = write.write_apple_export(hub_folder("inference"), tmp_path / "f")
    with pytest.raises(CheckpointError, match="no Core ML package.*the checkpoint it was exported from"):
        read_layout(folder)


def test_apple_export_names_the_checkpoint_to_convert_instead(tmp_path):
    hub = write_hub_checkpoint(tmp_path / "hub", config=small_model_of_width_896())
    folder = write.write_apple_export(hub, tmp_path / "f")
    with pytest.raises(CheckpointError, match=r"Convert apple/FastVLM-0\.5B instead"):
        read_layout(folder)


def small_model_of_width_896():
    from tests.reference.presets import preset

    return preset("tiny") | {"hidden_size": 896, "num_hidden_layers": 1, "num_attention_heads": 14}


# Quantized weights

QUANTIZATIONS = [
    *({"group_size": 32, "bits": bits, "mode": "affine"} for bits in (2, 3, 4, 5, 6, 8)),
    {"group_size": 64, "bits": 4},  # mlx-lm left the mode out when there was only one
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
]


def dequantized(array, **arguments):
    """What MLX makes of a weight by quantizing and dequantizing it, in float32."""
    packed, scales, *biases = mx.quantize(array, **arguments)
    biases = [each.astype(mx.float32) for each in biases]
    scales = scales.astype(mx.float32) if biases else scales
    return mx.dequantize(packed, scales, *biases, **arguments).astype(mx.float32)


@pytest.mark.parametrize("arguments", QUANTIZATIONS, ids=lambda a: f"{a.get('mode', 'default')}-{a['bits']}")
def test_quantized_mlx_vlm(hub_folder, arguments, tmp_path):
    hub = hub_folder("inference")
    tensors, stored = (
        read_layout(write.write_mlx_vlm(hub, tmp_path / "f", quantization=arguments)).tensors,
        write.read_hub(hub),
    )
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.mm_projector.0.weight"):
        wanted = dequantized(stored[name], **arguments)
        assert not mx.array_equal(wanted, stored[name].astype(mx.float32)).item()  # it is quantized indeed
        assert mx.array_equal(tensors[name], wanted).item(), name
        assert mx.array_equal(tensors.rows(name, 3, 9), wanted[3:9]).item(), name
        assert tensors.shape(name) == stored[name].shape
        assert (tensors[name].dtype, tensors.dtype(name)) == (mx.float32, "BF16")
        assert tensors.nbytes(name) < stored[name].nbytes  # the packed bytes are what reading moves
    check_names(sites(FastVLMConfig.from_folder(hub)), tensors.names(), tensors)


def test_quantized_layers_of_their_own(hub_folder, tmp_path):
    hub, stored = hub_folder("inference"), write.read_hub(hub_folder("inference"))
    eight, four = {"group_size": 64, "bits": 8, "mode": "affine"}, {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    per_layer = {"language_model.model.layers.0.mlp.up_proj": four}
    layout = read_layout(write.write_mlx_vlm(hub, tmp_path / "f", quantization=eight, per_layer=per_layer))
    for name, arguments in (("model.layers.0.mlp.up_proj.weight", four), ("model.layers.1.mlp.up_proj.weight", eight)):
        assert mx.array_equal(layout.tensors[name], dequantized(stored[name], **arguments)).item()
    assert "affine 8-bit, mxfp4 4-bit" in layout.notices[0]
    assert "what quantizing lost is not restored" in layout.notices[0]
    assert not {"quantization", "quantization_config"} & layout.config.keys()


def test_quantized_apple_export(hub_folder, tower_of_hub, tmp_path):
    hub = hub_folder("inference")
    tower_of_hub(hub)
    folder = write.write_apple_export(hub, tmp_path / "f", quantization={"group_size": 64, "bits": 8})
    (folder / "fastvithd.mlpackage").mkdir()
    layout, name = read_layout(folder), "model.layers.0.self_attn.o_proj.weight"
    wanted = dequantized(write.read_hub(hub)[name], group_size=64, bits=8)
    assert mx.array_equal(layout.tensors[name], wanted).item()
    assert "affine 8-bit" in layout.notices[0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (edit("quantization", "bits", value=8), CheckpointError, r"not quantized as config.json says \(affine, 8 bits"),
        (edit("quantization", "bits", value=7), ConfigError, "bits 7"),
        (edit("quantization", "mode", value="new"), ConfigError, "mode 'new'"),
        (edit("quantization", "mode", value=["affine"]), ConfigError, "mode"),
        (edit("quantization", "mode", value="mxfp4"), CheckpointError, "mxfp4, 4 bits.*BF16"),
        (edit("quantization", "group_size", value=None), ConfigError, "group_size None"),
        (lambda raw: (raw.pop("quantization"), raw.pop("quantization_config")), ConfigError, "no 'quantization'"),
    ],
)
def test_quantized_otherwise_than_stated(hub_folder, change, error, message, tmp_path):
    quantization = {"group_size": 32, "bits": 4, "mode": "affine"}
    folder = write.write_mlx_vlm(hub_folder("inference"), tmp_path / "f", quantization=quantization)
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    with pytest.raises(error, match=message):
        recognize(Checkpoint(folder), raw, folder)


def test_quantized_without_biases(hub_folder, tmp_path):
    quantization = {"group_size": 64, "bits": 4, "mode": "affine"}
    folder = write.write_mlx_vlm(hub_folder("inference"), tmp_path / "f", quantization=quantization)
    rewrite(folder, lambda tensors: tensors.pop("mm_projector.0.biases"))
    with pytest.raises(CheckpointError, match=r"mm_projector\.0\.biases is not stored"):
        read_layout(folder)


# What is not known


def rewrite(folder, change):
    tensors = mx.load(str(folder / "model.safetensors"))
    change(tensors)
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


def test_unknown_model_type(hub_folder):
    with pytest.raises(CheckpointError, match="model_type 'llava'") as caught:
        recognize(Checkpoint(hub_folder("inference")), {"model_type": "llava"}, hub_folder("inference"))
    assert all(known.name in str(caught.value) for known in LAYOUTS)


def test_names_of_no_layout(hub_folder, tmp_path):
    folder = write.write_timm_tower(hub_folder("inference"), tmp_path / "f")
    raw = json.loads((hub_folder("inference") / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"final_conv\.reparam_conv\.bias.*no layout known.*mlx-vlm"):
        recognize(Checkpoint(folder), raw, folder)


@pytest.mark.parametrize("extra", ["stages.0.blocks.0.extra", "stages.3.blocks.1.norm.weight", "head.fc2.weight"])
@pytest.mark.parametrize(
    ("writer", "prefix"),
    [
        (write.write_llava_with_timm_tower, write.TOWER),
        (write.write_fast_vlm, "model.vision_tower.timm_model."),
        (write.write_mlx_vlm, "vision_tower.vision_model."),
    ],
)
def test_unknown_tensor_is_named_as_it_is_stored(hub_folder, writer, prefix, extra, tmp_path):
    folder = writer(hub_folder("inference"), tmp_path / "f")
    rewrite(folder, lambda tensors: tensors.update({prefix + extra: mx.zeros(2)}))
    with pytest.raises(CheckpointError, match=(prefix + extra).replace(".", r"\.")):
        read_layout(folder)


def test_the_same_tensor_twice(hub_folder, tmp_path):
    folder = write.write_mlx_vlm(hub_folder("inference"), tmp_path / "f")
    rewrite(folder, lambda tensors: tensors.update({"mm_projector.layers.0.bias": tensors["mm_projector.0.bias"]}))
    with pytest.raises(CheckpointError, match=r"mm_projector\.0\.bias.*are the same tensor"):
        read_layout(folder)


# A tower alone

CLIP_TEXT = {"logit_scale": mx.array(4.6), "text_encoder.embedding_layer.weight": mx.zeros((4, 4))}
OPEN_CLIP_TEXT = {"logit_scale": mx.array(4.6), "logit_bias": mx.array(0.0), "text.ln_final.weight": mx.zeros(4)}
PARALLEL_TEXT = {f"module.{name}": array for name, array in OPEN_CLIP_TEXT.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("writer", "prefix", "others"),
    [
        (write.write_timm_tower, "", {}),
        (write.write_timm_tower, "timm_model.", {}),
        (write.write_timm_tower, "visual.trunk.", OPEN_CLIP_TEXT),
        (write.write_timm_tower, "module.visual.trunk.", PARALLEL_TEXT),
        (write.write_timm_tower, "image_encoder.model.", CLIP_TEXT),
        (write.write_apple_tower, "", {}),
        (write.write_apple_tower, "model.", {}),
        (write.write_apple_tower, "image_encoder.model.", CLIP_TEXT),
    ],
)
def test_tower_alone(hub_folder, form, writer, prefix, others, tmp_path):
    hub = Checkpoint(hub_folder(form))
    config = FastVLMConfig.from_folder(hub_folder(form)).vision_config
    tower = tower_alone(Checkpoint(writer(hub_folder(form), tmp_path / "f", prefix=prefix, others=others)), config)
    needed = tower_sites(config)
    dropped = check_names(needed, tower.names(), tower)
    assert "a head that is not CLIP's" in dropped.values()  # the kept one is `preflight`'s concern
    assert_same_tensors(tower, hub, [name for site in needed for name in site.sources(hub)])


def smaller_tower(raw):
    raw["vision_config"]["layers"] = [1, 2, 1, 1, 1]


def deeper_tower(raw):
    raw["vision_config"]["layers"] = [1, 2, 2, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (smaller_tower, r"unknown: stages\.2\.blocks\.1\."),
        (deeper_tower, r"missing: network\.10\.1\."),
    ],
)
def test_tower_of_another_size(hub_folder, change, message, tmp_path):
    raw = json.loads((hub_folder("inference") / "config.json").read_text())
    change(raw)
    checkpoint = Checkpoint(write.write_timm_tower(hub_folder("inference"), tmp_path / "f"))
    with pytest.raises(CheckpointError, match=message):
        tower_alone(checkpoint, FastVLMConfig.from_dict(raw).vision_config)


def test_tower_with_a_branch_that_fastvithd_lacks(hub_folder, tmp_path):
    folder = write.write_timm_tower(hub_folder("training"), tmp_path / "f")
    rewrite(folder, lambda tensors: tensors.update({"stem.0.conv_scale.conv.weight": mx.zeros((8, 3, 1, 1))}))
    with pytest.raises(CheckpointError, match=r"unknown: stem\.0\.conv_scale\.conv\.weight"):
        tower_alone(Checkpoint(folder), FastVLMConfig.from_folder(hub_folder("training")).vision_config)


def test_no_tower_at_all(hub_folder, tmp_path):
    folder = write.write_apple_export(hub_folder("inference"), tmp_path / "f")
    with pytest.raises(CheckpointError, match="no FastViTHD tower"):
        tower_alone(Checkpoint(folder), FastVLMConfig.from_folder(hub_folder("inference")).vision_config)


END_TO_END = {
    "fast_vlm": write.write_fast_vlm,
    "mlx-vlm": write.write_mlx_vlm,
    "timm's tower": write.write_llava_with_timm_tower,
}


@pytest.mark.parametrize("name", END_TO_END)
def test_the_converted_model_is_the_hubs_whatever_the_layout(name, hub_folder, tmp_path):
    folder = END_TO_END[name](hub_folder("inference"), tmp_path / "other")
    found = mx.load(str(convert(folder, tmp_path / "found") / "model.safetensors"))
    wanted = mx.load(str(convert(hub_folder("inference"), tmp_path / "wanted") / "model.safetensors"))
    assert set(found) == set(wanted)
    for tensor, array in wanted.items():
        assert found[tensor].dtype == array.dtype and mx.array_equal(found[tensor], array).item(), tensor


def test_a_quantized_mlx_vlm_folder_converts_and_answers(hub_folder, tmp_path):
    how = {"group_size": 32, "bits": 8}
    folder = write.write_mlx_vlm(hub_folder("inference"), tmp_path / "other", quantization=how)
    converted = convert(folder, tmp_path / "found")
    assert "quantization" not in json.loads((converted / "config.json").read_text())
    found, wanted = (load(path)[0]([5, 6, 7]) for path in (converted, hub_folder("inference")))
    assert relative_error(found, wanted) < 0.1
