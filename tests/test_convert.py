"""The converter: exact folds, strict names, honest records, and nothing left behind by a failure."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_fastvlm import load
from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.convert import convert
from mlx_fastvlm.convert.checkpoint import Checkpoint
from mlx_fastvlm.convert.key_map import sites, tower_sites
from mlx_fastvlm.convert.reparameterize import ConvSite
from mlx_fastvlm.convert.self_check import self_check
from mlx_fastvlm.convert.tokenizer import read_tokenizer
from mlx_fastvlm.convert.writer import SafetensorsWriter
from mlx_fastvlm.errors import CheckpointError, FastVLMError, OptionError
from mlx_fastvlm.safetensors_file import SafetensorsFile
from tests.conftest import golden_seed
from tests.reference.hub_checkpoint import write_hub_checkpoint
from tests.tolerances import FEATURES, relative_error

FORMS = ("inference", "training")


@pytest.fixture
def checkpoint(hub_folder, tmp_path):
    """A copy of the tiny inference-form checkpoint that a test may damage."""
    return shutil.copytree(hub_folder("inference"), tmp_path / "checkpoint")


def rewrite(folder, change):
    """Apply `change` to the dictionary of a checkpoint's tensors."""
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("form", FORMS)
def test_every_fold_equals_the_branches_it_replaces(form, hub_folder):
    checkpoint = Checkpoint(hub_folder(form))
    config = FastVLMConfig.from_folder(hub_folder(form))
    found = [site for site in tower_sites(config.vision_config) if isinstance(site, ConvSite)]
    assert any(site.is_training_form(checkpoint) for site in found)
    for site in found:
        x = mx.random.normal((2, 12, 10, site.conv.in_channels), key=mx.random.key(1))
        kernel, bias = site.kernel_and_bias(checkpoint)
        assert relative_error(site.conv(x, kernel) + bias, site.plain(checkpoint, x)) < 5e-6, site.target


def test_the_self_check_notices_a_wrong_fold(hub_folder, monkeypatch):
    checkpoint = Checkpoint(hub_folder("training"))
    found = sites(FastVLMConfig.from_folder(hub_folder("training")))
    assert self_check(found, checkpoint).max_relative_error < 1e-5
    monkeypatch.setattr(
        "mlx_fastvlm.convert.reparameterize._scale_and_shift",
        lambda tensors, prefix: (tensors[f"{prefix}.weight"], tensors[f"{prefix}.bias"]),
    )
    with pytest.raises(CheckpointError, match="Folding"):
        self_check(found, checkpoint)


def test_a_folder_has_what_the_runtime_and_people_need(converted_folder):
    folder = converted_folder("training")
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
        "conversion.json",
    } <= names
    record = json.loads((folder / "conversion.json").read_text())
    assert record["dtype"] == "float32"
    assert record["folded"]["batch_norms"] == 49
    assert record["folded"]["layer_scales"] == 14
    assert 0 < record["self_check"]["max_relative_error"] < 1e-5
    assert record["dropped"] == {
        "BatchNorm's training counter": 49,
        "equal to the embeddings, to which it is tied": 1,
    }


@pytest.mark.parametrize(
    "dtype, stored", [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32"), (None, "BF16")]
)
def test_weights_are_stored_in_the_type_asked_for(dtype, stored, hub_folder, converted_folder, tmp_path):
    folder = convert(hub_folder("inference"), tmp_path / "out", dtype=dtype)
    weights = SafetensorsFile(folder / "model.safetensors")
    assert {weights.dtype(name) for name in weights.names()} == {stored}
    exact = SafetensorsFile(converted_folder("inference") / "model.safetensors")
    limit = {"F16": 2**-11, "BF16": 2**-8, "F32": 0}[stored]
    for name in exact.names():
        wanted = np.array(exact.read(name))
        np.testing.assert_allclose(np.array(weights.read(name).astype(mx.float32)), wanted, rtol=limit, atol=1e-7)


@pytest.mark.parametrize("options", [{"shards": 3}, {"dtype": "float16"}, {"lm_head": "absent"}])
def test_other_ways_to_store_the_same_model(options, converted_folder, golden_pixels, tmp_path):
    source = write_hub_checkpoint(tmp_path / "hub", config="tiny", seed=golden_seed("inference"), **options)
    model, _ = load(convert(source, tmp_path / "out", dtype="float32"))
    reference, _ = load(converted_folder("inference"))
    pixels = mx.array(golden_pixels[:1])
    limit = FEATURES["float16" if "dtype" in options else "float32"]
    assert relative_error(model.encode_images(pixels), reference.encode_images(pixels)) < 6 * limit


def test_an_untied_head_is_used(tmp_path):
    source = write_hub_checkpoint(tmp_path / "hub", config="tiny", lm_head="untied")
    model, _ = load(convert(source, tmp_path / "out"))
    assert not model.config.text_config.tie_word_embeddings
    head = model.language_model.lm_head.weight
    assert not mx.allclose(head, model.language_model.embed_tokens.weight)
    assert (
        relative_error(
            model([3, 4]), model.language_model.hidden_states(model.embed([3, 4]), model.make_cache()) @ head.T
        )
        < 1e-5
    )


def test_a_head_that_differs_is_kept_whatever_the_config_says(checkpoint, tmp_path):
    rewrite(checkpoint, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] * 2}))
    folder = convert(checkpoint, tmp_path / "out")
    assert "language_model.lm_head.weight" in SafetensorsFile(folder / "model.safetensors")
    assert "tie_word_embeddings" in json.loads((folder / "conversion.json").read_text())["notices"][0]
    assert not FastVLMConfig.from_folder(folder).text_config.tie_word_embeddings


def test_a_head_that_is_not_stored_is_tied_whatever_the_config_says(checkpoint, tmp_path):
    rewrite(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))
    edit_json(checkpoint / "config.json", tie_word_embeddings=False)
    folder = convert(checkpoint, tmp_path / "out")
    assert "no lm_head" in json.loads((folder / "conversion.json").read_text())["notices"][0]
    assert FastVLMConfig.from_folder(folder).text_config.tie_word_embeddings


@pytest.mark.parametrize(
    "card, license",
    [
        ("---\nlicense: other\nlicense_name: apple-amlr\n---\n", "apple-amlr"),
        ("---\nlicense: 'mit'\n---\nlicense: none of this\n", "mit"),
        ("license: nothing, this is no front matter\n", "not stated by the source"),
    ],
)
def test_the_license_is_what_the_model_card_states(card, license, checkpoint, tmp_path):
    (checkpoint / "README.md").write_text(card)
    folder = convert(checkpoint, tmp_path / "out")
    assert json.loads((folder / "conversion.json").read_text())["license"] == license


def test_torch_weights_are_read(hub_folder, converted_folder, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    source = shutil.copytree(hub_folder("inference"), tmp_path / "hub")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    folder = convert(source, tmp_path / "out", dtype="float32")
    assert (folder / "model.safetensors").read_bytes() == (
        converted_folder("inference") / "model.safetensors"
    ).read_bytes()


def test_code_in_a_torch_file_is_never_run(checkpoint, tmp_path):
    torch = pytest.importorskip("torch")

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (checkpoint / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload()}, checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        convert(checkpoint, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_values_too_large_for_float16_are_refused(checkpoint, tmp_path):
    rewrite(checkpoint, lambda tensors: tensors.update({NORM: tensors[NORM] * 1e6}))
    with pytest.raises(CheckpointError, match="float16"):
        convert(checkpoint, tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    convert(checkpoint, tmp_path / "out", dtype="bfloat16")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_noticed():
    with (
        pytest.raises(OSError) as caught,
        SafetensorsWriter(Path("/dev/full"), {"x": ((4,), mx.float32)}, {}) as writer,
    ):
        writer.write("x", mx.zeros(4))
    assert caught.value.errno == errno.ENOSPC


NORM = "model.norm.weight"
DEEP = "model.vision_tower.vision_tower.model.network.4.1.convffn.conv.bn.running_var"
BREAKAGES = {
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop(NORM)), f"missing: {NORM}"),
    "missing tower tensor": (lambda f: rewrite(f, lambda t: t.pop(DEEP)), f"missing: {DEEP}"),
    "unknown tensor": (lambda f: rewrite(f, lambda t: t.update({"model.extra": mx.zeros(1)})), "unknown: model.extra"),
    "wrong shape": (lambda f: rewrite(f, lambda t: t.update({NORM: mx.zeros(3)})), f"{NORM} \\[3\\]"),
    "wrong inner shape": (
        lambda f: rewrite(f, lambda t: t.update({DEEP: mx.ones(3)})),
        f"{DEEP} \\[3\\]",
    ),
    "NaN": (lambda f: rewrite(f, lambda t: t.update({DEEP: t[DEEP] * float("nan")})), "Folding"),
    "cut off": (lambda f: _cut(f / "model.safetensors"), "cut off"),
    "not safetensors": (lambda f: (f / "model.safetensors").write_text("hello"), "damaged"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "other depth": (lambda f: edit_json(f / "config.json", num_hidden_layers=3), "missing: model.layers.2"),
    "other width": (lambda f: edit_json(f / "config.json", intermediate_size=100), "shapes do not fit"),
    "other model": (lambda f: edit_json(f / "config.json", model_type="qwen2"), "model_type 'qwen2'"),
    "no vocabulary": (lambda f: (f / "vocab.json").unlink(), "no vocab.json"),
    "no merges": (lambda f: (f / "merges.txt").unlink(), "no merges.txt"),
    "broken merges": (lambda f: (f / "merges.txt").write_text("a b c\n"), "merges.txt"),
    "foreign merges": (lambda f: (f / "merges.txt").write_text("zq xj\n"), "do not belong together"),
    "broken vocabulary": (lambda f: (f / "vocab.json").write_text("{"), "vocab.json"),
    "other token ids": (
        lambda f: edit_json(f / "added_tokens.json", **{"<|im_end|>": 9999}),
        "<|im_end|>".replace("|", "\\|"),
    ),
    "no added tokens": (lambda f: (f / "added_tokens.json").write_text("{}"), "lacks"),
}


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_damaged_checkpoint_is_refused_and_leaves_nothing(name, checkpoint, tmp_path):
    damage, text = BREAKAGES[name]
    damage(checkpoint)
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(FastVLMError, match=text):
        convert(checkpoint, place / "out")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    "name, text", [("../model.safetensors", "not a file of its own folder"), ("gone.safetensors", "lacks the shard")]
)
def test_an_index_must_stay_in_its_folder(name, text, checkpoint, tmp_path):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: name}}))
    with pytest.raises(CheckpointError, match=text):
        convert(checkpoint, tmp_path / "out")


def test_an_existing_model_is_replaced_only_by_force(hub_folder, tmp_path):
    folder = convert(hub_folder("inference"), tmp_path / "out", dtype="float16")
    with pytest.raises(OptionError, match="--force"):
        convert(hub_folder("inference"), folder, dtype="float32")
    assert json.loads((folder / "conversion.json").read_text())["dtype"] == "float16"
    convert(hub_folder("inference"), folder, dtype="float32", force=True)
    assert json.loads((folder / "conversion.json").read_text())["dtype"] == "float32"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_exchange_keeps_the_old_model(hub_folder, tmp_path, monkeypatch):
    folder = convert(hub_folder("inference"), tmp_path / "out")
    before = (folder / "conversion.json").read_text()
    rename = Path.rename

    def fail_for_new(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert(hub_folder("inference"), folder, force=True)
    assert (folder / "conversion.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_through_a_link_replaces_what_it_points_to(hub_folder, tmp_path):
    folder = convert(hub_folder("inference"), tmp_path / "out", dtype="float16")
    (tmp_path / "link").symlink_to(folder)
    convert(hub_folder("inference"), tmp_path / "link", dtype="float32", force=True)
    assert json.loads((folder / "conversion.json").read_text())["dtype"] == "float32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_force_does_not_delete_what_is_not_a_model(hub_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(OptionError, match="not a converted model"):
        convert(hub_folder("inference"), tmp_path / "out", force=True)
    assert (tmp_path / "out" / "thesis.txt").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing(error, hub_folder, tmp_path):
    def interrupt(what, done, total):
        if done > total / 2:
            raise error

    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        convert(hub_folder("inference"), tmp_path / "out", on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_up_to_all_bytes(hub_folder, tmp_path):
    reports = []
    convert(hub_folder("inference"), tmp_path / "out", on_progress=lambda *report: reports.append(report))
    assert {what for what, _, _ in reports} == {"Converting", "Checksums"}
    for stage in ("Converting", "Checksums"):
        done = [report[1:] for report in reports if report[0] == stage]
        assert done == sorted(done)
        assert done[-1][0] == done[-1][1] > 0


def test_a_hub_tokenizer_json_is_used_as_it_is(checkpoint):
    built = read_tokenizer(checkpoint)
    built.save(str(checkpoint / "tokenizer.json"))
    (checkpoint / "vocab.json").unlink()
    assert read_tokenizer(checkpoint).to_str() == built.to_str()


def test_a_converted_folder_is_not_converted_again(converted_folder, tmp_path):
    with pytest.raises(CheckpointError, match="converted already"):
        convert(converted_folder("inference"), tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.mm_projector.0.bias"])
def test_a_number_that_is_none_stops_the_conversion(name, value, checkpoint, tmp_path):
    def spoil(tensors):
        tensors[name] = mx.where(mx.arange(tensors[name].shape[-1]) == 3, value, tensors[name])

    rewrite(checkpoint, spoil)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        convert(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_force_does_not_delete_what_it_did_not_make(hub_folder, tmp_path):
    folder = convert(hub_folder("inference"), tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OptionError, match="notes.txt"):
        convert(hub_folder("inference"), tmp_path / "out", force=True)
    (folder / "notes.txt").unlink()
    convert(hub_folder("training"), tmp_path / "out", force=True)


def test_an_empty_folder_may_be_filled(hub_folder, tmp_path):
    (tmp_path / "out").mkdir()
    assert (convert(hub_folder("inference"), tmp_path / "out") / "model.safetensors").exists()


def test_a_destination_inside_the_source_is_refused(checkpoint):
    with pytest.raises(OptionError, match="lies in"):
        convert(checkpoint, checkpoint / "out")
    assert not (checkpoint / "out").exists()


def test_what_a_killed_conversion_left_is_removed(hub_folder, tmp_path):
    convert(hub_folder("inference"), tmp_path / "out")
    for name, age in (
        (".out.0000000a.partial", 90_000),
        (".out.0000000b.partial", 60),
        (".out.0000000c.old", 60),
        (".outer.0000000d.partial", 90_000),
    ):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    convert(hub_folder("inference"), tmp_path / "out", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.0000000b.partial", ".outer.0000000d.partial"}


def test_a_disk_without_room_is_known_before_anything_is_written(hub_folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    with pytest.raises(CheckpointError, match="10 MB free"):
        convert(hub_folder("inference"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
