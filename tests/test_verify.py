"""`verify` and the model card: a sound folder passes, every kind of damage is found, the license is passed on."""

import json
import shutil

import mlx.core as mx
import pytest

from mlx_fastvlm.convert import convert
from mlx_fastvlm.convert.model_card import render_card, write_card
from mlx_fastvlm.convert.quantize import quantize
from mlx_fastvlm.convert.recipes import choose
from mlx_fastvlm.convert.record import checksums, model_files
from mlx_fastvlm.convert.verify import verify
from mlx_fastvlm.convert.weights import site_blocks
from mlx_fastvlm.errors import CheckpointError
from mlx_fastvlm.loading import resolve_model
from tests.conftest import GOLDEN


@pytest.fixture
def model(converted_folder, tmp_path):
    """A copy of the tiny converted model that a test may damage."""
    return shutil.copytree(converted_folder("training"), tmp_path / "model")


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = dict(mx.load(str(path)))
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(path), tensors)


def seal(folder):
    """Make the record's checksums those of the files as they are now."""
    edit_record(folder, sha256=checksums(folder, model_files(folder)))


def edit_record(folder, **changes):
    path = folder / "conversion.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_sound_model_passes_and_its_folds_are_checked_again(model):
    found = verify(model)
    assert found.problems == []
    assert set(found.checks) == {"checksums", "weights", "fast paths", "folds"}
    assert "parts equal the source's" in found.checks["folds"]  # the source is a folder that is still there


def test_without_the_source_the_rest_is_checked(model):
    edit_record(model, origin=None)
    found = verify(model)
    assert found.problems == [] and "--source" in found.checks["folds"]


def test_the_embedded_model_is_sound():
    assert verify(resolve_model("demo")).problems == []


def test_a_quantized_model_is_sound(model, tmp_path):
    folder = quantize(model, tmp_path / "quantized", choose("int8", decoder="8:32", embeddings="8:32"))
    assert verify(folder).problems == []


def test_a_changed_file_is_named(model):
    (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text() + " ")
    (model / "preprocessor_config.json").unlink()
    (model / ".DS_Store").write_text("a file manager's")
    (problem,) = verify(model).problems
    assert "tokenizer.json is changed" in problem
    assert "preprocessor_config.json is missing" in problem
    assert "DS_Store" not in problem


def test_a_number_that_is_none_is_named(model):
    name = "vision_tower.conv_exp.se.expand.bias"

    def spoil(tensors):
        tensors[name][3] = float("nan")

    rewrite(model, spoil)
    assert any(name in problem and "NaN" in problem for problem in verify(model).problems)


def test_weights_that_are_not_what_the_source_folds_to_are_named(model):
    name = "vision_tower.network.0.0.convffn.conv.weight"
    rewrite(model, lambda tensors: tensors.update({name: tensors[name] * 1.01}))
    seal(model)
    (problem,) = verify(model).problems
    assert name in problem and "folds to" in problem


def test_a_quantized_weight_that_is_not_what_the_source_rounds_to_is_named(model, tmp_path):
    folder = quantize(model, tmp_path / "quantized", choose("int8", decoder="8:32", embeddings="8:32"))
    name = "language_model.layers.0.self_attn.qkv_proj.weight"

    def flip(tensors):
        tensors[name][0, 0] ^= 0x80  # the highest bit of a weight

    rewrite(folder, flip)
    seal(folder)
    (problem,) = verify(folder).problems
    assert name in problem


def test_the_source_is_found_from_wherever_one_stands(model, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "parameters are what they fold to" in verify("../model").checks["folds"]


def test_a_model_with_another_tower_is_checked_against_that(hub_folder, tmp_path):
    prefix = "model.vision_tower.vision_tower.model."
    tensors = mx.load(str(hub_folder("training") / "model.safetensors"))
    tower = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
    mx.save_safetensors(str(tmp_path / "tower.safetensors"), tower)
    folder = convert(hub_folder("inference"), tmp_path / "out", vision_tower=tmp_path / "tower.safetensors")
    found = verify(folder)
    assert found.problems == [] and "what they fold to" in found.checks["folds"]
    (tmp_path / "tower.safetensors").unlink()
    assert "--vision-tower" in verify(folder).checks["folds"]
    mx.save_safetensors(str(tmp_path / "moved.safetensors"), tower)
    assert "what they fold to" in verify(folder, vision_tower=tmp_path / "moved.safetensors").checks["folds"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("recipe", [None, choose("int4", decoder="4:32"), choose("mxfp4"), choose("nvfp4")])
def test_another_devices_last_bit_is_no_damage(dtype, recipe, hub_folder, tmp_path, monkeypatch):
    folder = convert(hub_folder("training"), tmp_path / "out", dtype=dtype, recipe=recipe)

    def another_device(*arguments):
        for name, start, rows in site_blocks(*arguments):
            noise = mx.random.normal(rows.shape, key=mx.random.key(start)) * 6e-8
            yield name, start, rows * (1 + noise)

    monkeypatch.setattr("mlx_fastvlm.convert.verify.site_blocks", another_device)
    assert verify(folder).problems == []


def test_another_checkpoint_is_not_its_source(model, hub_folder):
    assert any("folds to" in problem for problem in verify(model, hub_folder("inference")).problems)


def test_calibrated_layers_are_said_to_be_left_out(tmp_path):
    pictures = [GOLDEN / "images" / "square.png"]
    folder = quantize(resolve_model("demo"), tmp_path / "q", choose("int4", vision_tower="none"), images=pictures)
    edit_record(folder, origin=None)
    assert verify(folder).problems == []


def test_a_folder_that_was_not_converted_is_refused(hub_folder):
    with pytest.raises(CheckpointError, match="conversion.json"):
        verify(hub_folder("inference"))


def test_the_card_states_the_source_the_changes_and_the_license(hub_folder, tmp_path):
    checkpoint = shutil.copytree(hub_folder("training"), tmp_path / "checkpoint")
    (checkpoint / "README.md").write_text("---\nlicense: other\nlicense_name: apple-amlr\n---\n")
    (checkpoint / "LICENSE").write_text("Research only.")
    folder = convert(
        checkpoint, tmp_path / "out", source_name="apple/FastVLM-0.5B", recipe=choose("int8", decoder="8:32")
    )
    card = (folder / "README.md").read_text()
    header, body = card.split("---\n", 2)[1:]
    assert "base_model: apple/FastVLM-0.5B\n" in header
    assert "license_name: apple-amlr\nlicense_link: LICENSE\n" in header
    assert "Apple Machine Learning Research Model is licensed under" in body
    assert "14 layer scales" in body and "int8 (decoder 8:32)" in body
    assert (folder / "LICENSE").read_text() == "Research only."


def test_the_card_of_an_unknown_license_claims_none(model):
    card = render_card(model, "model")
    assert "license: unknown" in card and "Apple Machine Learning" not in card


def test_a_card_can_be_written_again_without_breaking_the_checksums(model):
    write_card(model, "renamed")
    assert "# renamed" in (model / "README.md").read_text()
    assert verify(model).problems == []


@pytest.mark.parametrize("name", ["apple/mine", "ckpts/my-model"])
def test_a_local_folder_is_nobodys_base_model(name, hub_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hub_folder("inference"), tmp_path / name)
    card = (convert(name, "out") / "README.md").read_text()
    assert "base_model" not in card and "apple-amlr" not in card
    assert str(tmp_path) not in card and f"Source: {name.split('/')[1]}\n" in card


def test_apples_license_is_known_by_its_text(hub_folder, tmp_path):
    checkpoint = shutil.copytree(hub_folder("inference"), tmp_path / "checkpoint")
    (checkpoint / "LICENSE").write_text("Disclaimer: IMPORTANT: This Apple Machine Learning Research Model is …")
    folder = convert(checkpoint, tmp_path / "out")
    assert json.loads((folder / "conversion.json").read_text())["license"] == "apple-amlr"
    assert "license_name: apple-amlr" in (folder / "README.md").read_text()


@pytest.mark.parametrize("content", ["[]", "{}", '{"sha256": [1]}', "[" * 200_000, "nonsense"])
def test_a_damaged_record_is_one_clear_error(content, model):
    (model / "conversion.json").write_text(content)
    with pytest.raises(CheckpointError, match="conversion.json"):
        verify(model)


def test_apples_zips_are_known_by_their_name(hub_folder, tmp_path):
    source = shutil.copytree(hub_folder("inference"), tmp_path / "llava-fastvithd_0.5b_stage3")
    card = (convert(source, tmp_path / "out") / "README.md").read_text()
    assert "license_name: apple-amlr" in card and "Apple Machine Learning Research Model is licensed under" in card


def test_a_snapshot_of_the_hubs_cache_says_where_it_is_from(hub_folder, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    source = tmp_path / "models--apple--FastVLM-0.5B" / "snapshots" / commit
    shutil.copytree(hub_folder("inference"), source)
    record = json.loads((convert(source, tmp_path / "out") / "conversion.json").read_text())
    assert (record["source"], record["base_model"], record["revision"]) == ("apple/FastVLM-0.5B",) * 2 + (commit,)
