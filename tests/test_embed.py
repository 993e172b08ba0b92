"""Pictures as vectors: what they are, that they do not depend on company, and the command that writes them to files."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_fastvlm import generate, load
from mlx_fastvlm.convert import convert
from mlx_fastvlm.convert.checkpoint import Checkpoint
from mlx_fastvlm.convert.quantize import quantize
from mlx_fastvlm.convert.verify import verify
from mlx_fastvlm.embedding import embed_images, embed_pixels
from mlx_fastvlm.embedding_file import EmbeddingFile
from mlx_fastvlm.errors import CheckpointError, OptionError
from mlx_fastvlm.model_info import describe_model, format_model_info
from tests.demo_pictures import draw
from tests.reference.layouts import write_timm_tower
from tests.tolerances import relative_error

HEAD = "model.vision_tower.vision_tower.model.head.proj"
LIMIT = 1e-5


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture
def photos(tmp_path):
    """Pictures of several shapes in order of their names, and one that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in (1, 2, 3):
        draw(folder / f"{number}.png", number)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 260, 3), np.uint8)).save(folder / "4.png")
    (folder / "5.png").write_text("no picture")
    return folder


# What the vectors are


@pytest.mark.parametrize("form", ["inference", "training"])
def test_clip_vectors_are_the_checkpoints_own_projection(form, hub_folder, converted_folder, golden_pixels):
    model, _ = load(converted_folder(form), dtype="float32")
    head = Checkpoint(hub_folder(form))[HEAD]
    pixels = mx.array(golden_pixels)
    wanted = model.vision_tower(pixels).mean(axis=1) @ head
    assert relative_error(embed_pixels(model, pixels), wanted) < LIMIT
    lengths = mx.linalg.norm(embed_pixels(model, pixels, normalize=True), axis=-1)
    assert np.allclose(np.array(lengths), 1, atol=1e-6)


def test_pooled_is_the_mean_of_tokens(demo):
    model, _ = demo
    pixels = mx.random.uniform(shape=(2, 128, 192, 3), key=mx.random.key(1))
    tokens = embed_pixels(model, pixels, "tokens")
    assert tokens.shape == (2, 6, 256)
    assert relative_error(tokens, model.vision_tower(pixels.astype(model.dtype))) < LIMIT
    assert relative_error(embed_pixels(model, pixels, "pooled"), np.array(tokens).mean(axis=1)) < LIMIT


def test_a_model_without_the_head_says_so(demo):
    with pytest.raises(OptionError, match='has no CLIP head.*"pooled" or "tokens"'):
        embed_images(*demo, [])
    with pytest.raises(OptionError, match="must be one of clip, pooled, tokens"):
        embed_images(*demo, [], features="words")


@pytest.mark.filterwarnings("ignore:This model was trained mainly on square images")
def test_many_images_give_what_each_gives_alone_in_order(demo, photos):
    model, processor = demo
    paths = sorted(photos.glob("*.png"))
    images = [*paths[:3], lambda: paths[3], paths[4], Image.open(paths[0])]
    for fit in ("pad", "native"):
        found = list(embed_images(model, processor, iter(images * 4), features="pooled", fit=fit))
        assert [each.index for each in found] == list(range(24))
        for each in found:
            assert each.image is images[each.index % 6]
            if each.index % 6 == 4:
                assert each.vector is None and "5.png is text" in each.error
                continue
            source = paths[3] if callable(each.image) else each.image
            alone = embed_pixels(model, processor.images_at(None, fit).preprocess(source), "pooled")[0]
            assert each.error is None and relative_error(each.vector, alone) < LIMIT


def test_a_function_that_fails_ends_the_iteration(demo):
    def broken():
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        list(embed_images(*demo, [broken], features="pooled"))


def test_images_are_taken_as_they_are_needed(demo):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield np.full((64, 64, 3), taken % 256, np.uint8)

    made = embed_images(*demo, endless(), features="pooled", threads=2)
    for _ in range(40):
        next(made)
    made.close()
    assert taken < 40 + 3 * 16 + 2


# The head on its way through the conversion


def test_answering_neither_reads_nor_holds_the_head(converted_folder):
    model, processor = load(converted_folder("inference"))
    stored = mx.load(str(converted_folder("inference") / "model.safetensors"))
    assert not [name for name in stored if "head" in name and "lm_head" not in name]
    generate(model, processor, "What is this?", np.zeros((64, 64, 3), np.uint8), max_tokens=2)
    assert "clip_head" not in model.parameters() and "weight" not in vars(model.clip_head)
    embed_pixels(model, mx.zeros((1, 64, 64, 3)))
    assert "weight" in vars(model.clip_head)


def test_info_says_whether_there_is_one(converted_folder):
    from mlx_fastvlm.loading import resolve_model

    facts = describe_model(converted_folder("inference"))
    assert facts["clip_head"] == 24 and "256 → 24" in format_model_info(facts)
    assert describe_model(resolve_model("demo"))["clip_head"] is None


def test_the_head_is_verified_and_kept_in_smaller_models(hub_folder, tmp_path):
    ours = convert(hub_folder("inference"), tmp_path / "ours")
    assert verify(ours).problems == []
    small = quantize(ours, tmp_path / "small", "int8")
    assert (small / "clip_head.safetensors").read_bytes() == (ours / "clip_head.safetensors").read_bytes()
    other = shutil.copytree(ours, tmp_path / "other")
    weights = mx.load(str(other / "clip_head.safetensors"))
    mx.save_safetensors(str(other / "clip_head.safetensors"), {"proj": weights["proj"] + 1})
    record = json.loads((other / "conversion.json").read_text())
    del record["sha256"]
    (other / "conversion.json").write_text(json.dumps(record))
    assert "CLIP's head is not that of" in verify(other, hub_folder("inference")).problems[0]


def test_a_towers_own_head_comes_with_it(hub_folder, converted_folder, tmp_path):
    tower = write_timm_tower(hub_folder("training"), tmp_path / "tower", prefix="", others={})
    ours = convert(hub_folder("inference"), tmp_path / "ours", vision_tower=tower, dtype="float32")
    found, wanted = (load(folder)[0].clip_head.weight for folder in (ours, converted_folder("training")))
    assert mx.array_equal(found, wanted).item()


def with_head(hub, folder, tensors):
    """A copy of a checkpoint with other tensors in place of its head."""
    shutil.copytree(hub, folder)
    stored = mx.load(str(folder / "model.safetensors"))
    del stored[HEAD]
    mx.save_safetensors(str(folder / "model.safetensors"), stored | tensors)
    return folder


def test_what_is_no_head_of_clip_is_dropped(hub_folder, tmp_path):
    classifier = HEAD.replace("proj", "weight")
    bias = HEAD.replace("proj", "bias")
    cases = {
        "zeros": {HEAD: mx.zeros((256, 768))},
        "classifier": {classifier: mx.ones((10, 256)), bias: mx.ones((10,))},
        "none": {},
    }
    for name, tensors in cases.items():
        ours = convert(with_head(hub_folder("inference"), tmp_path / name, tensors), tmp_path / f"ours-{name}")
        assert not (ours / "clip_head.safetensors").exists()
        dropped = json.loads((ours / "conversion.json").read_text())["dropped"]
        assert dropped.get("a head that is not CLIP's", 0) == len(tensors), name


def test_a_damaged_head_is_refused(hub_folder, tmp_path):
    for name, head, message in (
        ("narrow", mx.ones((7, 24)), "does not fit a tower of 256 features"),
        ("infinite", mx.full((256, 24), float("inf")), "holds NaN or infinity"),
    ):
        source = with_head(hub_folder("inference"), tmp_path / name, {HEAD: head})
        with pytest.raises(CheckpointError, match=message):
            convert(source, tmp_path / "never")


def test_a_head_of_another_tower_is_refused(converted_folder, tmp_path):
    folder = shutil.copytree(converted_folder("inference"), tmp_path / "copy")
    mx.save_safetensors(str(folder / "clip_head.safetensors"), {"proj": mx.ones((7, 3))})
    model, _ = load(folder)
    with pytest.raises(CheckpointError, match="width 7.*convert the model again"):
        embed_pixels(model, mx.zeros((1, 64, 64, 3)))
    (folder / "clip_head.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        embed_pixels(load(folder)[0], mx.zeros((1, 64, 64, 3)))


# Files


class Shown:
    """A picture as the files need it."""

    path, page = "a.png", None


def test_vectors_are_what_numpy_reads(tmp_path):
    rows = np.random.default_rng(0).random((1001, 3, 5), dtype=np.float32)
    output = EmbeddingFile(tmp_path / "out.npy", {"model": "m"})
    for row in rows:
        output.add(Shown, row)
    assert not (tmp_path / "out.npy").exists()
    output.finish()
    output.close()
    assert np.array_equal(np.load(tmp_path / "out.npy"), rows)
    assert np.load(tmp_path / "out.npy", mmap_mode="r")[1000, 2, 4] == rows[1000, 2, 4]
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1001
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.npy"]


def test_what_is_there_stays_until_the_end(tmp_path):
    path = tmp_path / "out.npy"
    np.save(path, np.zeros(3))
    with pytest.raises(OptionError, match="exists: give another --out, or --overwrite"):
        EmbeddingFile(path, {})
    output = EmbeddingFile(path, {}, overwrite=True)
    output.add(Shown, np.ones(2, np.float32))
    with pytest.raises(OptionError, match="being written by another run"):
        EmbeddingFile(path, {}, overwrite=True)
    output.close()
    assert np.array_equal(np.load(path), np.zeros(3))
    assert [file.name for file in tmp_path.iterdir()] == ["out.npy"]
    with pytest.raises(OptionError, match=r"ends with \.npy"):
        EmbeddingFile(tmp_path / "out.csv", {})
    with pytest.raises(OptionError, match="give another --out"):
        EmbeddingFile(tmp_path / "missing" / "out.npy", {})


def test_another_run_begins_before_or_after_the_end_and_never_in_between(tmp_path, monkeypatch):
    path = tmp_path / "out.npy"
    replace = os.replace

    def replace_and_look(*names):
        with pytest.raises(OptionError, match="being written by another run"):
            EmbeddingFile(path, {}, overwrite=True)
        replace(*names)

    first = EmbeddingFile(path, {})
    first.add(Shown, np.zeros(2, np.float32))
    monkeypatch.setattr("mlx_fastvlm.embedding_file.os.replace", replace_and_look)
    first.finish()
    monkeypatch.undo()
    second = EmbeddingFile(path, {}, overwrite=True)
    first.close()
    second.add(Shown, np.ones(2, np.float32))
    second.finish()
    second.close()
    assert np.array_equal(np.load(path), np.ones((1, 2)))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl", "out.npy"]


# The command


@pytest.fixture
def run(command_line, monkeypatch, demo, tmp_path):
    """Run the command in this process with a demo model that is loaded once: arguments → (exit code, stdout, stderr)."""
    monkeypatch.setattr("mlx_fastvlm.cli.embed.load_model", lambda *args: demo)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: command_line("embed", *arguments, "--model", "demo")


def test_a_folder_becomes_an_array_and_a_list(run, photos, demo):
    code, out, errors = run("photos", "--features", "pooled", "--normalize", "--out", "all.npy")
    assert code == 0 and out == ""
    assert "Bad: " in errors and "5.png is text" in errors and "4 rows in all.npy" in errors and "1 bad" in errors
    vectors = np.load("all.npy")
    lines = [json.loads(line) for line in Path("all.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == [f"photos/{number}.png" for number in (1, 2, 3, 4)]
    assert lines[0] | {"path": ""} == {
        "path": "",
        "model": "demo",
        "features": "pooled",
        "options": {"normalize": True},
    }
    model, processor = demo
    for vector, line in zip(vectors, lines, strict=True):
        alone = embed_pixels(model, processor.preprocess(line["path"]), "pooled", normalize=True)[0]
        assert relative_error(vector, alone) < LIMIT


def test_tokens_need_one_size(run, photos):
    assert run("photos/1.png", "--features", "tokens", "--resolution", "128")[0] == 0
    assert np.load("features.npy").shape == (1, 4, 256)
    code, _, errors = run("photos", "--features", "tokens", "--fit", "native", "--overwrite")
    assert code == 1 and "leave out --fit native" in errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos"], "has no CLIP head"),
        ([], "No picture is given"),
        (["photos/9.png"], "There is no file or folder photos/9.png"),
        (["photos", "--out", "all.txt"], "ends with .npy"),
        (["photos", "--resolution", "100"], "multiple of 64"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(run, photos, tmp_path, arguments, message):
    code, _, errors = run(*arguments)
    assert code == 1 and message in errors and len(errors.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir() if file.name != "cache"] == ["photos"]


def test_bad_pictures_can_fail_the_command(run, photos):
    assert run("photos", "--features", "pooled", "--fail-on-bad")[0] == 1
    assert len(np.load("features.npy")) == 4


def test_only_bad_pictures_give_an_empty_array(run, photos):
    code, _, errors = run("photos/5.png", "--features", "pooled")
    assert code == 0 and "0 rows" in errors
    assert len(np.load("features.npy")) == 0 and Path("features.jsonl").read_text() == ""
