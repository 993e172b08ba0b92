"""Quantized models: what is stored, what is computed from it, and what calibration gains."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_fastvlm import generate, load
from mlx_fastvlm.cache import KVCache, QuantizedKVCache
from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.convert import convert
from mlx_fastvlm.convert.calibrate import gptq, pack_levels
from mlx_fastvlm.convert.export import export
from mlx_fastvlm.convert.quantize import quantize
from mlx_fastvlm.convert.recipes import RECIPES, choose, parse_storage, plan
from mlx_fastvlm.convert.weights import WeightErrors, unpack
from mlx_fastvlm.errors import CheckpointError, ConfigError, OptionError
from mlx_fastvlm.generate import stream_generate
from mlx_fastvlm.kernels import plain_ops, quantized_linear
from mlx_fastvlm.loading import resolve_model
from mlx_fastvlm.quantization import MODES, PARTS, QuantizationConfig, Storage, part_of
from mlx_fastvlm.safetensors_file import SafetensorsFile
from tests.conftest import GOLDEN
from tests.tolerances import relative_error

PICTURE = GOLDEN / "images" / "landscape.png"
STORAGES = [
    Storage(bits, group_size, mode)
    for mode, (all_bits, group_sizes) in MODES.items()
    for bits in all_bits
    for group_size in group_sizes
]
# The tiny model's rows are 64 wide and less: groups of 32 fit everywhere but in the tower's first stages.
FINE = {"decoder": "4:32", "embeddings": "8:32", "projector": "6:32", "vision_tower": "8:32"}


@pytest.fixture(scope="module")
def quantized(converted_folder, tmp_path_factory):
    """The tiny model with all four parts quantized."""
    recipe = choose("int4", **FINE)
    return quantize(converted_folder("inference"), tmp_path_factory.mktemp("quantized") / "tiny", recipe)


@pytest.mark.parametrize("storage", STORAGES, ids=lambda storage: f"{storage.mode}-{storage.bits}-{storage.group_size}")
@pytest.mark.parametrize("rows", [1, 30])
def test_a_quantized_product_is_the_unpacked_ones(storage, rows):
    x, w = mx.random.normal((rows, 256), key=mx.random.key(0)), mx.random.normal((96, 256), key=mx.random.key(1))
    how = {"group_size": storage.group_size, "bits": storage.bits, "mode": storage.mode}
    weight, scales, *biases = mx.quantize(w, **how)
    wanted = (
        np.array(x, np.float64)
        @ np.array(mx.dequantize(weight, scales, *biases, **how).astype(mx.float32), np.float64).T
    )
    arguments = (x, weight, scales, biases[0] if biases else None, storage.group_size, storage.bits, storage.mode)
    assert relative_error(quantized_linear(*arguments), wanted) < 3e-6
    with plain_ops():
        assert relative_error(quantized_linear(*arguments), wanted) < 3e-6


def test_a_quantized_model_computes_with_what_its_weights_stand_for(quantized, converted_folder, golden_pixels):
    model, processor = load(quantized, dtype="float32")
    plain, _ = load(converted_folder("inference"), dtype="float32")
    stored = SafetensorsFile(quantized / "model.safetensors")
    unpacked = []
    for name, array in tree_flatten(plain.parameters()):
        storage = model.config.quantization.storage(name.removesuffix(".weight")) if array.ndim == 2 else None
        if storage is not None:
            path = name.removesuffix(".weight")
            array = unpack(tuple(stored.read(f"{path}.{part}") for part in ("weight", "scales", "biases")), storage)
        unpacked.append((name, array))
    plain.load_weights(unpacked)
    pixels = mx.array(golden_pixels[:1])
    ids = processor.tokenize("What is this?", 1)
    features = model.encode_images(pixels)
    assert relative_error(features, plain.encode_images(pixels)) < 1e-5
    assert relative_error(model(ids, features), plain(ids, features)) < 1e-5


def test_every_part_is_quantized_as_chosen(quantized):
    stored = SafetensorsFile(quantized / "model.safetensors")
    config = FastVLMConfig.from_folder(quantized).quantization
    packed = {name.removesuffix(".scales") for name in stored.names() if name.endswith(".scales")}
    assert {part_of(path) for path in packed} == set(PARTS)
    for path in packed:
        storage = config.storage(path)
        assert storage == parse_storage(FINE[part_of(path)])
        rows, groups = stored.shape(f"{path}.scales")
        assert stored.shape(f"{path}.weight") == (rows, groups * storage.group_size * storage.bits // 32)
    narrow = [path for path, storage in config.layers.items() if storage is None]
    assert narrow and all(
        stored.shape(f"{path}.weight")[1] % 32 and stored.dtype(f"{path}.weight") == "F32" for path in narrow
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_gives_a_model_that_answers(name, tmp_path):
    folder = quantize(resolve_model("demo"), tmp_path / "model", name)
    model, processor = load(folder)
    answer = generate(model, processor, "Describe this image.", image=PICTURE, max_tokens=4)
    assert isinstance(answer, str) and answer
    record = json.loads((folder / "conversion.json").read_text())["quantization"]
    errors = record["relative_weight_error"]
    assert set(errors) == {part for part, storage in RECIPES[name].parts.items() if storage}
    assert all(0 < error < 0.5 for error in errors.values())
    assert record["bits_per_weight"] < 16


def test_fewer_bits_lose_more_and_take_less(tmp_path):
    sizes, errors = [], []
    for name in ("int8", "int6", "int5", "int4"):
        folder = quantize(resolve_model("demo"), tmp_path / name, name)
        sizes.append((folder / "model.safetensors").stat().st_size)
        errors.append(
            json.loads((folder / "conversion.json").read_text())["quantization"]["relative_weight_error"]["decoder"]
        )
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert errors == sorted(errors) and errors[0] < 0.01


def test_converting_and_quantizing_at_once_is_the_same(hub_folder, converted_folder, quantized, tmp_path):
    recipe = choose("int4", **FINE)
    folder = convert(hub_folder("inference"), tmp_path / "at-once", dtype="float32", recipe=recipe)
    assert (folder / "model.safetensors").stat().st_size == (quantized / "model.safetensors").stat().st_size
    once, twice = (mx.load(str(path / "model.safetensors")) for path in (folder, quantized))
    assert set(once) == set(twice)
    assert all(mx.array_equal(once[name], twice[name]).item() for name in once)


def test_the_help_lists_every_recipe():
    from mlx_fastvlm.cli.models import quantize as command

    lines = [line.split(maxsplit=1) for line in command.__doc__.splitlines()]
    listed = {line[0]: line[1] for line in lines if len(line) == 2 and line[0] in RECIPES}
    assert listed == {recipe.name: recipe.summary for recipe in RECIPES.values()}


def test_the_projector_stays_as_it_is_by_default():
    for recipe in RECIPES.values():
        assert recipe.parts["projector"] is None


def test_sensitive_layers_of_a_mixed_recipe_keep_more_bits():
    config = FastVLMConfig.from_folder(resolve_model("demo"))
    quantization = plan(config, RECIPES["mixed-4-8"])
    last = config.text_config.num_hidden_layers - 1
    assert quantization.storage("language_model.layers.0.mlp.down_proj") == Storage(8, 64)
    assert quantization.storage(f"language_model.layers.{last}.self_attn.qkv_proj") == Storage(8, 64)
    assert quantization.storage("language_model.layers.0.self_attn.o_proj") == Storage(4, 64)


@pytest.mark.parametrize("text", ["9", "4:48", "four", "", "mxfp5", "affine", "4:", "4:32:1", "-4"])
def test_a_choice_that_is_none_is_refused(text):
    with pytest.raises(OptionError, match="no way to quantize"):
        parse_storage(text)


@pytest.mark.parametrize(
    "raw",
    [
        {"group_size": 64, "bits": 4},  # mlx-lm's own layout
        {"recipe": "x", "parts": {"decoder": {"bits": 7, "group_size": 64, "mode": "affine"}}, "layers": {}},
        {"recipe": "x", "parts": {"head": None}, "layers": {}},
        {"recipe": "x", "parts": {"decoder": 4}, "layers": {}},
        [],
    ],
)
def test_a_config_that_is_not_ours_is_refused(raw):
    with pytest.raises(ConfigError, match="uantiz"):
        QuantizationConfig.from_dict(raw)


def test_quantizing_twice_is_refused(quantized, tmp_path):
    with pytest.raises(OptionError, match="quantized already"):
        quantize(quantized, tmp_path / "again", "int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", [choose("mxfp4"), choose("int8", decoder="none")], ids=lambda recipe: recipe.name)
def test_pictures_that_would_calibrate_nothing_are_refused(recipe, tmp_path):
    with pytest.raises(OptionError, match="leave them out"):
        quantize(resolve_model("demo"), tmp_path / "out", recipe, images=[PICTURE])
    assert not list(tmp_path.iterdir())


def test_what_the_groups_do_not_divide_is_said(quantized):
    notices = json.loads((quantized / "conversion.json").read_text())["notices"]
    assert any("layers of decoder could not be quantized in groups of 32" in notice for notice in notices)


def test_errors_of_float16_weights_are_summed_in_float32(tmp_path):
    demo = json.loads((quantize(resolve_model("demo"), tmp_path / "demo", "int4") / "conversion.json").read_text())
    wide = mx.random.normal((2000, 4096), key=mx.random.key(0)).astype(mx.float16) * 8  # squares sum beyond 65504
    found = WeightErrors()
    found.add("language_model.layers.0.mlp.down_proj", wide.astype(mx.float32), wide.astype(mx.float32) * 1.01)
    assert found.relative()["decoder"] == pytest.approx(0.01, rel=1e-3)
    assert all(0 < error < 1 for error in demo["quantization"]["relative_weight_error"].values())


def test_only_the_models_own_files_are_copied(converted_folder, tmp_path):
    model = shutil.copytree(converted_folder("inference"), tmp_path / "model")
    (model / "notes.txt").write_text("mine")
    folder = quantize(model, tmp_path / "out", choose("int8", decoder="8:32"))
    assert not (folder / "notes.txt").exists()
    (model / "LICENSE").symlink_to("/etc/hostname")
    for write in (lambda to: quantize(model, to, "int8"), lambda to: export(model, to, "hub")):
        with pytest.raises(CheckpointError, match="leads out"):
            write(tmp_path / "never")
    (model / "LICENSE").unlink()
    with pytest.raises(OptionError, match="lies in"):
        quantize(model, model / "inside", "int8")


def test_a_recipe_that_changes_nothing_is_refused(converted_folder, tmp_path):
    recipe = choose("int8", decoder="none", embeddings="none", vision_tower="none")
    with pytest.raises(OptionError, match="leaves every layer"):
        quantize(converted_folder("inference"), tmp_path / "same", recipe)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_levels_are_packed_as_mlx_packs_them(bits):
    levels = np.random.default_rng(bits).integers(0, 2**bits, (5, 64), dtype=np.uint8)
    ones, zeros = mx.ones((5, 1)), mx.zeros((5, 1))
    unpacked = mx.dequantize(pack_levels(levels, bits), ones, zeros, group_size=64, bits=bits)
    np.testing.assert_array_equal(np.array(unpacked), levels)


@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_changes_a_layers_outputs_less_than_rounding(bits):
    random = np.random.default_rng(0)
    inputs = random.normal(size=(500, 128)) @ random.normal(size=(128, 128)) * 0.1  # correlated, as activations are
    weight = mx.array(random.normal(size=(64, 128)).astype(np.float32))
    storage = Storage(bits, 64)
    calibrated = unpack(gptq(weight, (inputs.T @ inputs).astype(np.float32), storage, mx.float32), storage)
    rounded = unpack(tuple(mx.quantize(weight, group_size=64, bits=bits)), storage)
    error = [np.linalg.norm(inputs @ (np.array(found) - np.array(weight)).T) for found in (calibrated, rounded)]
    assert error[0] < 0.85 * error[1]


def test_gptq_without_correlation_is_rounding():
    weight = mx.random.normal((32, 128), key=mx.random.key(3))
    storage = Storage(4, 64)
    found = gptq(weight, np.eye(128, dtype=np.float32), storage, mx.float32)
    for array, wanted in zip(found, mx.quantize(weight, group_size=64, bits=4), strict=True):
        assert mx.array_equal(array, wanted).item()


def test_calibration_brings_the_demo_closer(tmp_path):
    demo = resolve_model("demo")
    pictures = sorted((GOLDEN.parent.parent / "examples").glob("*.png"))
    reference, processor = load("demo")
    ids = processor.tokenize("Describe this image.", 1)
    features = reference.encode_images(processor.preprocess(pictures[-1]))
    wanted = reference(ids, features)
    errors = {}
    for name, images in (("rounded", ()), ("calibrated", pictures[:2])):
        folder = quantize(demo, tmp_path / name, choose("int3", embeddings="none", vision_tower="none"), images=images)
        errors[name] = mx.mean(mx.square(load(folder)[0](ids, features) - wanted)).item()
    assert errors["calibrated"] < 0.8 * errors["rounded"]
    record = json.loads((tmp_path / "calibrated" / "conversion.json").read_text())
    assert record["quantization"]["calibration_images"] == 2


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("head_dim", [32, 64])
def test_a_quantized_cache_attends_over_what_it_holds(bits, head_dim):
    quantized_cache, plain_cache = QuantizedKVCache(bits, head_dim), KVCache()
    group_size = min(64, head_dim)
    for step, length in enumerate((300, 1, 1, 5)):
        queries, keys, values = (
            mx.random.normal((1, heads, length, head_dim), key=mx.random.key(10 * step + i))
            for i, heads in enumerate((6, 2, 2))
        )
        held = [
            mx.dequantize(*mx.quantize(x, group_size=group_size, bits=bits), group_size=group_size, bits=bits)
            for x in (keys, values)
        ]
        found = quantized_cache.attend(queries, keys, values, 0.2)
        assert relative_error(found, plain_cache.attend(queries, *held, 0.2)) < 3e-6
        assert quantized_cache.offset == plain_cache.offset


def test_generation_with_a_quantized_cache_stays_close():
    model, processor = load("demo")
    picture = GOLDEN.parent.parent / "examples" / "shapes-two.png"
    answers = [generate(model, processor, "Describe this image.", image=picture, kv_bits=bits) for bits in (None, 8)]
    assert answers[0] == answers[1]


def test_kv_bits_out_of_range_is_one_clear_error(tiny):
    for bits, message in ((7, "kv_bits is 7"), (8, "multiple of 32")):  # the tiny model's heads are 16 wide
        with pytest.raises(OptionError, match=message):
            next(stream_generate(*tiny, "What?", image=PICTURE, kv_bits=bits))
