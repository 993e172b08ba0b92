"""`verify` and the model card: a sound folder passes, every kind of damage is found, the license is passed on."""

import json
import shutil

import mlx.core as mx
import pytest

from mlx_fastvlm.convert import convert
from mlx_fastvlm.convert.model_card import render_card, write_card
from mlx_fastvlm.convert.quantize import quantize
from mlx_fastvlm.convert.recipes import choose
from mlx_fastvlm.convert.verify import verify
from mlx_fastvlm.errors import CheckpointError
from mlx_fastvlm.loading import resolve_model


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


def edit_record(folder, **changes):
    path = folder / "conversion.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_sound_model_passes_and_its_folds_are_checked_again(model):
    found = verify(model)
    assert found.problems == []
    assert set(found.checks) == {"checksums", "weights", "fast paths", "folds"}
    assert "parts equal the source's" in found.checks["folds"]  # the source is a folder that is still there


def test_without_the_source_the_rest_is_checked(model):
    edit_record(model, source="apple/FastVLM-0.5B")
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
    (model / "extra.txt").write_text("new")
    (problem,) = verify(model).problems
    assert "tokenizer.json is changed" in problem
    assert "preprocessor_config.json is missing" in problem
    assert "extra.txt is new" in problem


def test_a_number_that_is_none_is_named(model):
    name = "vision_tower.conv_exp.se.expand.bias"

    def spoil(tensors):
        tensors[name][3] = float("nan")

    rewrite(model, spoil)
    assert any(name in problem and "NaN" in problem for problem in verify(model).problems)


def test_weights_that_are_not_what_the_source_folds_to_are_named(model):
    name = "vision_tower.network.0.0.convffn.conv.weight"
    rewrite(model, lambda tensors: tensors.update({name: tensors[name] * 1.01}))
    problems = verify(model).problems
    assert any("checksums" not in problem and name in problem and "folds to" in problem for problem in problems)


def test_another_checkpoint_is_not_its_source(model, hub_folder):
    assert any("folds to" in problem for problem in verify(model, hub_folder("inference")).problems)


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
