"""Hub → ours → hub and back again: equal bit by bit where nothing was folded, within rounding where it was."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_fastvlm import generate, generate_step, load
from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.convert import convert
from mlx_fastvlm.convert.checkpoint import Checkpoint
from mlx_fastvlm.convert.exchange import convert_to
from mlx_fastvlm.convert.export import _config_for, export
from mlx_fastvlm.convert.key_map import sites
from mlx_fastvlm.convert.tokenizer import read_tokenizer
from mlx_fastvlm.convert.unfold import CLIP_HEAD, Unfolded, mlx_vlm_tensors
from mlx_fastvlm.errors import CheckpointError, OptionError
from mlx_fastvlm.generate import prefill
from mlx_fastvlm.sampling import make_sampler
from tests.reference.hub_checkpoint import write_hub_checkpoint
from tests.tolerances import relative_error

FORMS = ("inference", "training")
PICTURE = Path(__file__).parent.parent / "examples" / "shapes-two.png"

# What conversion folds: these come back folded, and everything else as it was.
FOLDED = re.compile(r".*\.(convffn\.(conv\..*|fc2\.\w+)|token_mixer\.proj\.\w+|layer_scale(_\d)?)")


def weights(folder):
    return mx.load(str(folder / "model.safetensors"))


def assert_same_weights(found, wanted):
    found, wanted = weights(found), weights(wanted)
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        assert mx.array_equal(found[name], array).item(), name


@pytest.fixture(scope="module")
def bfloat16_folder(hub_folder, tmp_path_factory):
    """The tiny inference-form checkpoint, converted in its own type."""
    return convert(hub_folder("inference"), tmp_path_factory.mktemp("bfloat16") / "ours")


@pytest.fixture(scope="module")
def exported(bfloat16_folder):
    """… and exported again."""
    return export(bfloat16_folder, bfloat16_folder.parent / "hub", "hub")


def test_what_was_not_folded_comes_back_bit_by_bit(exported, hub_folder):
    found, wanted = Checkpoint(exported), Checkpoint(hub_folder("inference"))
    assert set(wanted.names()) - set(found.names()) == {"lm_head.weight"}  # tied: config.json says so
    assert not set(found.names()) - set(wanted.names())
    unfolded = [name for name in found.names() if not FOLDED.fullmatch(name)]
    assert len(unfolded) > 80
    for name in found.names():
        assert (found.shape(name), found.dtype(name)) == (wanted.shape(name), wanted.dtype(name)), name
        if name in unfolded:
            assert mx.array_equal(found[name], wanted[name]).item(), name


@pytest.mark.parametrize("form", FORMS)
def test_what_was_folded_computes_the_same(form, converted_folder, hub_folder, tmp_path):
    found, wanted = (
        Checkpoint(export(converted_folder(form), tmp_path / "hub", "hub")),
        Checkpoint(hub_folder(form)),
    )
    for site in sites(FastVLMConfig.from_folder(hub_folder(form))):
        for name, array in site.fold(wanted).items():
            assert relative_error(site.fold(found)[name], array) < 1e-6, name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_there_and_back_changes_no_bit(dtype, hub_folder, tmp_path):
    ours = convert(hub_folder("training"), tmp_path / "ours", dtype=dtype)
    again = convert(export(ours, tmp_path / "hub", "hub"), tmp_path / "again")
    assert_same_weights(again, ours)


def test_an_exported_model_gives_the_same_answer(converted_folder, golden_pixels, tmp_path):
    hub = export(converted_folder("inference"), tmp_path / "hub", "hub")

    def answer(folder):
        model, processor = load(folder, dtype="float32")
        ids = processor.tokenize("What is in this picture?", num_images=1)
        cache = model.make_cache()
        logits = prefill(model, model.embed(ids, model.encode_images(mx.array(golden_pixels[:1]))), cache)
        return list(generate_step(logits, model, cache, max_tokens=16, sampler=make_sampler()))

    assert answer(hub) == answer(converted_folder("inference"))


def test_the_config_is_in_the_hubs_words(exported, hub_folder):
    found, wanted = (json.loads((folder / "config.json").read_text()) for folder in (exported, hub_folder("inference")))
    assert "mlx_fastvlm" not in found
    del wanted["vision_config"]["projection_dim"]  # the converter does not know CLIP's head
    assert found == wanted


def test_a_standard_tower_needs_no_vision_config(bfloat16_folder):
    for side, is_kept in ((256, False), (512, True)):
        raw = json.loads((bfloat16_folder / "config.json").read_text()) | {"mm_hidden_size": 3072}
        raw["vision_config"] = {"image_size": side}
        config = FastVLMConfig.from_dict(raw)
        assert ("vision_config" in _config_for("hub", raw, config, "bfloat16")) is is_kept


def test_shards_are_small_and_indexed(bfloat16_folder, exported, tmp_path):
    limit = 200_000
    sharded = export(bfloat16_folder, tmp_path / "sharded", "hub", max_shard_bytes=limit)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    found, wanted = Checkpoint(sharded), Checkpoint(exported)
    assert set(found.names()) == set(wanted.names()) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(found.nbytes(name) for name in found.names())
    for name in files:
        held = [tensor for tensor, file in index["weight_map"].items() if file == name]
        assert sum(found.nbytes(tensor) for tensor in held) <= limit
        assert all(mx.array_equal(found[tensor], wanted[tensor]).item() for tensor in held)


def test_an_untied_head_is_exported(tmp_path):
    source = write_hub_checkpoint(tmp_path / "source", config="tiny", lm_head="untied")
    hub = export(convert(source, tmp_path / "ours"), tmp_path / "hub", "hub")
    assert mx.array_equal(Checkpoint(hub)["lm_head.weight"], Checkpoint(source)["lm_head.weight"]).item()


def test_a_missing_clip_head_is_said_not_made_up(bfloat16_folder, exported, tmp_path):
    headless = shutil.copytree(bfloat16_folder, tmp_path / "headless")
    (headless / "clip_head.safetensors").unlink()
    without = export(headless, tmp_path / "without", "hub")
    assert CLIP_HEAD in Checkpoint(exported) and CLIP_HEAD not in Checkpoint(without)
    (notice,) = json.loads((without / "export.json").read_text())["notices"]
    assert "head.proj is left out" in notice
    assert json.loads((exported / "export.json").read_text())["notices"] == []


def test_the_tokenizer_is_the_hubs_file_set(exported, hub_folder, tmp_path):
    source = hub_folder("inference")
    for name in ("vocab.json", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads((exported / name).read_text()) == json.loads((source / name).read_text()), name
    assert (exported / "merges.txt").read_text() == (source / "merges.txt").read_text()
    slow = shutil.copytree(exported, tmp_path / "slow")
    (slow / "tokenizer.json").unlink()
    text = "What is written? 你好 <|im_end|>"
    assert read_tokenizer(slow).encode(text).ids == read_tokenizer(exported).encode(text).ids


def test_license_and_origin_travel_along(hub_folder, tmp_path):
    source = shutil.copytree(hub_folder("inference"), tmp_path / "source")
    (source / "LICENSE").write_text("terms")
    (source / "ACKNOWLEDGEMENTS").write_text("thanks")
    hub = export(convert(source, tmp_path / "ours"), tmp_path / "hub", "hub", dtype="float16")
    assert (hub / "LICENSE").read_text() == "terms" and (hub / "ACKNOWLEDGEMENTS").read_text() == "thanks"
    record = json.loads((hub / "export.json").read_text())
    assert record["source"] == source.name and record["layout"] == "hub" and record["dtype"] == "float16"
    assert json.loads((hub / "config.json").read_text())["torch_dtype"] == "float16"
    assert Checkpoint(hub).dtype("model.norm.weight") == "F16"
    assert Checkpoint(hub).dtype(next(n for n in Checkpoint(hub).names() if n.endswith("batches_tracked"))) == "I64"


def test_mlx_vlm_gets_its_own_names_and_shapes(bfloat16_folder, hub_folder):
    """What mlx-vlm's `sanitize` makes of the hub's folder is what we write, so that it has nothing left to do."""
    config, stored = FastVLMConfig.from_folder(bfloat16_folder), Checkpoint(bfloat16_folder)
    found = Unfolded(stored, mlx_vlm_tensors(config, {name: stored.shape(name) for name in stored.names()}))
    wanted, tower = {}, "model.vision_tower.vision_tower.model."
    source = Checkpoint(hub_folder("inference"))
    for name in source.names():
        array, is_folded = source[name], FOLDED.fullmatch(name)
        if array.ndim == 4:
            array = array.transpose(0, 2, 3, 1)
        elif "layer_scale" in name:
            array = array.transpose(1, 2, 0)
        if name.startswith(tower):
            name = "vision_tower.vision_model." + name.removeprefix(tower)
            name = name.replace("patch_embed.", "patch_embed.blocks.")
        elif "mm_projector" in name:
            name = name.removeprefix("model.")
        else:
            name = "language_model." + name
        if not name.endswith("num_batches_tracked") and "lm_head" not in name:
            wanted[name] = (array, is_folded)
    head = "vision_tower.vision_model.head.proj"
    wanted[head] = (mx.zeros((256, 768)), False)
    assert set(found.names()) == set(wanted)
    for name, (array, is_folded) in wanted.items():
        assert found.shape(name) == tuple(array.shape) == tuple(found[name].shape), name
        assert is_folded or mx.array_equal(found[name], array).item(), name


def test_what_cannot_be_exported_is_refused(bfloat16_folder, hub_folder, tmp_path):
    def refused(match, error, folder=bfloat16_folder, layout="hub", **options):
        with pytest.raises(error, match=match):
            export(folder, tmp_path / "never", layout, **options)
        assert not (tmp_path / "never").exists() and not list(tmp_path.glob(".never*"))

    refused("not a converted model", CheckpointError, folder=hub_folder("inference"))
    refused("not a converted model", CheckpointError, folder=tmp_path / "nothing")
    refused("expected one of hub, mlx-vlm", OptionError, layout="onnx")
    refused("expected one of float32", OptionError, dtype="int8")
    refused("one vision tower.*layout hub", OptionError, layout="mlx-vlm")

    quantized = shutil.copytree(bfloat16_folder, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization": {"bits": 4, "group_size": 64}}))
    refused("quantized.*export the model it was", CheckpointError, folder=quantized)

    damaged = shutil.copytree(bfloat16_folder, tmp_path / "damaged")
    (damaged / "config.json").write_text(json.dumps(config | {"intermediate_size": 88}))
    refused("does not fit its config.json.*gate_up_proj|down_proj", CheckpointError, folder=damaged)


def test_an_interrupted_export_leaves_nothing(bfloat16_folder, tmp_path):
    def interrupt(what, done, total):
        assert what == "Exporting" and done <= total
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(bfloat16_folder, tmp_path / "hub", "hub", on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_when_asked(bfloat16_folder, tmp_path):
    hub = export(bfloat16_folder, tmp_path / "hub", "hub")
    with pytest.raises(OptionError, match="--force"):
        export(bfloat16_folder, hub, "hub")
    export(bfloat16_folder, hub, "hub", dtype="float32", force=True)
    assert Checkpoint(hub).dtype("model.norm.weight") == "F32"


def test_what_the_user_should_know_comes_along(tmp_path):
    source = write_hub_checkpoint(tmp_path / "hub", config="tiny", lm_head="absent")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    folder = convert_to("hub", source, tmp_path / "back")
    record = json.loads((folder / "export.json").read_text())
    assert any("no lm_head is stored" in notice for notice in record["notices"])
    assert record["source"] == "hub" and "no lm_head is stored" in (folder / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"hub", "back"}


def test_the_demo_can_be_exported(tmp_path):
    folder = convert_to("hub", "demo", tmp_path / "demo-hub")
    answers = [generate(*load(model), "Describe this image.", image=PICTURE) for model in ("demo", folder)]
    assert answers[0] == answers[1]


def test_room_for_both_copies_is_needed_at_once(hub_folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    size = (hub_folder("inference") / "model.safetensors").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(1.5 * size)))
    with pytest.raises(CheckpointError, match="are needed"):
        convert_to("hub", hub_folder("inference"), tmp_path / "back")
    assert not list(tmp_path.iterdir())
