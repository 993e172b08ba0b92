"""From a name to a model: folders, the cache, the hub's absence, damaged conversions."""

import json
import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_fastvlm import load
from mlx_fastvlm.convert import convert
from mlx_fastvlm.errors import CheckpointError, ConfigError, FastVLMError, HubError, OptionError
from mlx_fastvlm.kernels import cpu, plain_ops
from mlx_fastvlm.loading import cache_folder, resolve_model
from tests.reference.adapters import factors, write_adapter
from tests.reference.hub_checkpoint import write_hub_checkpoint
from tests.tolerances import LOGITS, relative_error


def test_a_local_checkpoint_is_converted_once_into_the_cache(hub_folder):
    reports = []
    first = resolve_model(hub_folder("inference"), on_progress=lambda *report: reports.append(report))
    assert first.is_relative_to(cache_folder())
    assert reports
    reports.clear()
    assert resolve_model(hub_folder("inference"), on_progress=lambda *report: reports.append(report)) == first
    assert reports == []


def test_a_checkpoint_that_changes_is_converted_anew(tmp_path):
    source = write_hub_checkpoint(tmp_path / "hub", config="tiny", seed=1)
    first = resolve_model(source)
    os.utime(source / "model.safetensors", ns=(1, 1))
    assert resolve_model(source) != first


def test_a_note_beside_the_weights_changes_nothing_and_old_conversions_go(tmp_path):
    source = write_hub_checkpoint(tmp_path / "hub", config="tiny", seed=1)
    first = resolve_model(source)
    (source / "notes.md").write_text("mine")
    (source / "broken link").symlink_to(tmp_path / "nowhere")
    assert resolve_model(source) == first
    os.utime(source / "model.safetensors", ns=(1, 1))
    second = resolve_model(source)
    assert list(first.parent.iterdir()) == [second] != [first]


def touch(path):
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_an_adapter_whose_base_changes_is_converted_anew(tmp_path, packed):
    base = write_hub_checkpoint(tmp_path / "base", config="tiny", seed=1)
    stored = factors("model.layers.0.self_attn.q_proj", (64, 64))
    source = write_adapter(tmp_path / "adapter", stored, base_model_name_or_path=str(base))
    if packed:
        source = shutil.make_archive(str(tmp_path / "adapter"), "zip", tmp_path, "adapter")
    first = resolve_model(source)
    assert resolve_model(source) == first
    touch(base / "model.safetensors")
    assert resolve_model(source) != first


def test_a_core_ml_package_that_changes_is_converted_anew(tmp_path):
    source = write_hub_checkpoint(tmp_path / "hub", config="tiny", seed=1)
    weights = source / "fastvithd.mlpackage" / "Data" / "weight.bin"
    weights.parent.mkdir(parents=True)
    weights.touch()
    first = resolve_model(source)
    touch(weights)
    assert resolve_model(source) != first


@pytest.mark.parametrize("files", [["mm_projector.bin"], ["mm_projector.bin", "config.json"]])
def test_a_projector_alone_says_how_it_is_merged(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match="only a projector.*mlx-fastvlm convert .* --base"):
        resolve_model(tmp_path)


def test_a_zip_in_capitals(hub_folder, tmp_path):
    packed = shutil.make_archive(str(tmp_path / "MODEL"), "zip", hub_folder("inference"))
    shutil.move(packed, tmp_path / "MODEL.ZIP")
    assert (resolve_model(tmp_path / "MODEL.ZIP") / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["hub", "local"])
def test_a_conversion_that_fails_leaves_no_folders(tmp_path, monkeypatch, name):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    monkeypatch.setattr("mlx_fastvlm.loading.download_checkpoint", lambda hub_id, revision: tmp_path / "source")
    with pytest.raises(FastVLMError):
        resolve_model("owner/name" if name == "hub" else tmp_path / "source")
    assert not (tmp_path / "cache").exists()


def test_a_conversion_that_fails_leaves_what_was_there(tmp_path, hub_folder):
    first = resolve_model(hub_folder("inference"))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    with pytest.raises(FastVLMError):
        resolve_model(tmp_path / "source")
    assert list(cache_folder().glob("*/*")) == [first.parent] and first.is_dir()


def test_a_revision_does_not_lead_out_of_the_cache(converted_folder):
    with pytest.raises(HubError):
        resolve_model("apple/FastVLM-0.5B", str(converted_folder("inference")))


def test_a_hub_model_seen_before_needs_no_network(converted_folder):
    home = cache_folder() / "hub" / "apple--FastVLM-0.5B"
    shutil.copytree(converted_folder("inference"), home / "abc123")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc123")
    assert resolve_model("apple/FastVLM-0.5B") == home / "abc123"
    assert resolve_model("apple/FastVLM-0.5B", "abc123") == home / "abc123"


def test_a_hub_download_is_converted_and_remembered(hub_folder, tmp_path, monkeypatch):
    snapshot = shutil.copytree(hub_folder("inference"), tmp_path / "snapshots" / "c0ffee")
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: apple-amlr\n---\n")
    (snapshot / "LICENSE").write_text("terms")
    monkeypatch.setattr("mlx_fastvlm.loading.download_checkpoint", lambda hub_id, revision: snapshot)
    folder = resolve_model("apple/FastVLM-0.5B")
    record = json.loads((folder / "conversion.json").read_text())
    assert (record["source"], record["revision"], record["license"]) == ("apple/FastVLM-0.5B", "c0ffee", "apple-amlr")
    assert (folder / "LICENSE").read_text() == "terms"

    monkeypatch.setattr("mlx_fastvlm.loading.download_checkpoint", None)
    assert resolve_model("apple/FastVLM-0.5B") == folder


def test_an_unreachable_hub_is_one_clear_error():
    with pytest.raises(HubError, match="neither in the cache nor can it be downloaded.*--model demo"):
        resolve_model("apple/FastVLM-0.5B")


@pytest.mark.parametrize(
    "name, options, error, text",
    [
        ("no/such/folder", {}, CheckpointError, "no folder"),
        ("nothing", {}, CheckpointError, "no folder"),
        ("", {}, CheckpointError, "name is empty"),
        ("z/nope.zip", {}, CheckpointError, "no folder"),
        ("a" * 300, {}, CheckpointError, "cannot be a path"),
        ("~no-such-user-here/x", {}, CheckpointError, "no folder|cannot be a path"),
        ("foo/bar--baz", {}, HubError, "not a valid hub id"),
        (__file__, {}, CheckpointError, "is a file"),
        (".", {"revision": "main"}, OptionError, "revision"),
        ("demo", {"dtype": "int4"}, OptionError, "int4"),
    ],
)
def test_wrong_names_and_options(name, options, error, text):
    with pytest.raises(error, match=text):
        load(name, **options)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ConfigError, match="no config.json"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_damaged_conversion_says_to_convert_again(name, damage, converted_folder, tmp_path):
    folder = shutil.copytree(converted_folder("inference"), tmp_path / "model")
    data = (folder / name).read_bytes()
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(b"" if damage == "empty" else data[: len(data) // 2])
    with pytest.raises(FastVLMError, match="convert"):
        load(folder)


def test_weights_of_another_model_are_refused(converted_folder, tmp_path):
    folder = shutil.copytree(converted_folder("inference"), tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match="does not fit"):
        load(folder)


def test_a_newer_format_is_refused(converted_folder, tmp_path):
    folder = shutil.copytree(converted_folder("inference"), tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"mlx_fastvlm": {"format": 99}}))
    with pytest.raises(CheckpointError, match="format 99"):
        load(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_type_asked_for_is_the_type_computed_in(dtype, converted_folder):
    model, _ = load(converted_folder("inference"), dtype=dtype)
    assert model.dtype == getattr(mx, dtype)


@pytest.fixture
def every_model_is_large(monkeypatch):
    """As for a model of hundreds of megabytes, the compiled loops are loaded."""
    monkeypatch.setattr("mlx_fastvlm.loading.LARGE_MODEL_BYTES", 0)


@pytest.mark.skipif(cpu.missing() is not None, reason="install the extra 'cpu'")
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_matrices_that_bfloat16_holds_stay_in_it_and_change_nothing(stored, hub_folder, tmp_path, every_model_is_large):
    folder = convert(hub_folder("inference"), tmp_path / "model", dtype=stored)
    model, _ = load(folder, dtype="float32")
    with plain_ops():
        plain, _ = load(folder, dtype="float32")
    layer = model.language_model.layers[0]
    # The checkpoint is bfloat16: its decoder is as it was, while folding made new numbers of the tower's.
    assert layer.mlp.down_proj.weight.dtype == model.language_model.embed_tokens.weight.dtype == mx.bfloat16
    assert layer.self_attn.qkv_proj.bias.dtype == model.dtype == mx.float32
    assert plain.language_model.layers[0].mlp.down_proj.weight.dtype == mx.float32
    kept = dict(tree_flatten(model.parameters()))
    for name, weight in tree_flatten(plain.parameters()):
        assert np.array_equal(kept[name].astype(mx.float32), weight), name
    ids = [1, 5, 9, 3]
    assert relative_error(model(ids), plain(ids)) < LOGITS["float32"]


@pytest.mark.skipif(cpu.missing() is not None, reason="install the extra 'cpu'")
def test_matrices_that_bfloat16_does_not_hold_are_not_rounded(hub_folder, tmp_path, every_model_is_large):
    folder = convert(hub_folder("inference"), tmp_path / "model", dtype="float16")
    weights = mx.load(str(folder / "model.safetensors"))
    name = "language_model.layers.0.mlp.down_proj.weight"
    weights = {key: array.astype(mx.float32) for key, array in weights.items()}
    weights[name][-1, -1] = 1 + 2**-20
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    model, _ = load(folder, dtype="float32")
    assert model.language_model.layers[0].mlp.down_proj.weight[-1, -1].item() == 1 + 2**-20


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(hub_folder, tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setenv("MLX_FASTVLM_CACHE", str(tmp_path / "locked" / "cache"))
    with pytest.raises(HubError, match="MLX_FASTVLM_CACHE"):
        resolve_model(hub_folder("inference"))


def test_a_cache_that_is_a_file(hub_folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_FASTVLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(HubError, match="MLX_FASTVLM_CACHE"):
        resolve_model(hub_folder("inference"))
    with pytest.raises(HubError, match="MLX_FASTVLM_CACHE"):
        resolve_model("apple/FastVLM-0.5B")
