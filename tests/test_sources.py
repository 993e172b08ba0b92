"""Where tensors come from: zips read in place, links, PyTorch's files and lying headers, none of which may do harm."""

import json
import os
import pickle
import shutil
import stat
import struct
import zipfile

import mlx.core as mx
import numpy as np
import pytest

from mlx_fastvlm.config import read_config_dict
from mlx_fastvlm.convert import archive, convert
from mlx_fastvlm.convert.archive import check_inside, open_source
from mlx_fastvlm.convert.checkpoint import Checkpoint
from mlx_fastvlm.errors import CheckpointError, ConfigError, FastVLMError
from mlx_fastvlm.safetensors_file import SafetensorsFile
from tests.reference.adapters import random_array, write_base

ZEROS = b"\0" * 2**22


@pytest.fixture
def folder(tmp_path):
    """A small checkpoint folder."""
    write_base(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llava_qwen2"}')
    return tmp_path / "model"


def pack(path, entries, compression=zipfile.ZIP_STORED):
    """A zip of (name or ZipInfo, content)."""
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in entries:
            packed.writestr(name, content, None if isinstance(name, zipfile.ZipInfo) else compression)
    return path


def pack_folder(path, folder, top="", compression=zipfile.ZIP_STORED):
    return pack(path, [(f"{top}{file.name}", file.read_bytes()) for file in sorted(folder.iterdir())], compression)


def entry(name, mode=stat.S_IFREG | 0o644):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16  # Unix
    return info


def hidden(parent):
    return [path for path in parent.iterdir() if path.name.startswith(".")]


def same(found, expected):
    assert sorted(found.names()) == sorted(expected.names())
    for name in expected.names():
        assert mx.array_equal(found[name], expected[name])
        assert (found.shape(name), found.dtype(name)) == (expected.shape(name), expected.dtype(name))


def test_a_folder_is_used_as_it_is(folder, tmp_path):
    with open_source(folder, tmp_path / "out") as source:
        assert source.path == source.origin == folder
        same(Checkpoint(source), Checkpoint(folder))
    assert not hidden(tmp_path)


@pytest.mark.parametrize("top", ["", "llava-fastvithd_0.5b_stage3/"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_the_folder_it_holds(folder, tmp_path, top, compression):
    path = pack_folder(tmp_path / "model.zip", folder, top, compression)
    with zipfile.ZipFile(path, "a") as packed:
        packed.writestr(f"__MACOSX/{top}._config.json", b"litter")
        packed.writestr(f"{top}.DS_Store", b"litter")
        packed.writestr(f"{top}training_args.bin", b"not read")
        if top:
            packed.writestr(f"{top}checkpoint-500/optimizer.pt", b"not read")
    with open_source(path, tmp_path / "out") as source:
        assert source.origin == path and source.holds("model.safetensors")
        assert json.loads((source.path / "config.json").read_text()) == {"model_type": "llava_qwen2"}
        same(Checkpoint(source), Checkpoint(folder))
        on_disk = {file.name for file in source.path.iterdir()}
        assert on_disk == {"config.json"} | ({"model.safetensors"} if compression == zipfile.ZIP_DEFLATED else set())
        temporary = source.path
    assert not temporary.exists() and not hidden(tmp_path)


def test_a_zip_converts_to_what_its_folder_does(hub_folder, converted_folder, tmp_path):
    path = pack_folder(tmp_path / "model.zip", hub_folder("inference"), "llava-fastvithd/")
    found = convert(path, tmp_path / "out", dtype="float32")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (found / name).read_bytes() == (converted_folder("inference") / name).read_bytes()
    assert not hidden(tmp_path)


def test_rows_of_a_zip(folder, tmp_path):
    with open_source(pack_folder(tmp_path / "model.zip", folder), tmp_path / "out") as source:
        rows = Checkpoint(source).rows("model.embed_tokens.weight", 2, 5)
    assert mx.array_equal(rows, Checkpoint(folder)["model.embed_tokens.weight"][2:5])


def test_an_index_inside_a_zip(folder, tmp_path):
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    tensors = {name: random_array(i, 3) for i, name in enumerate("ab")}
    (folder / "model.safetensors").unlink()
    for name, shard in zip(tensors, names, strict=True):
        mx.save_safetensors(str(folder / shard), {name: mx.array(tensors[name])})
    index = {"weight_map": dict(zip(tensors, names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_source(pack_folder(tmp_path / "model.zip", folder, "top/"), tmp_path / "out") as source:
        checkpoint = Checkpoint(source)
        for name, array in tensors.items():
            assert np.array_equal(np.array(checkpoint[name]), array)


def test_a_core_ml_package_keeps_its_folders(folder, tmp_path):
    path = pack_folder(tmp_path / "model.zip", folder, "top/")
    inside = "fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    with zipfile.ZipFile(path, "a") as packed:
        packed.writestr(f"top/{inside}", b"weights")
    with open_source(path, tmp_path / "out") as source:
        assert (source.path / inside).read_bytes() == b"weights"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_unpacked_is_left_behind(folder, tmp_path, error):
    path = pack_folder(tmp_path / "model.zip", folder, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(error), open_source(path, tmp_path / "out") as source:
        assert source.path.is_dir()
        raise error
    assert not hidden(tmp_path)


UNSAFE = {
    "zip slip": ("../evil.json", "leads out"),
    "zip slip further in": ("top/../../evil.json", "leads out"),
    "zip slip for Windows": ("..\\evil.json", "leads out"),
    "absolute": ("/tmp/evil.json", "absolute"),
    "absolute for Windows": ("C:/evil.json", "absolute"),
    "drive letter": ("C:evil.json", "absolute"),
    "backslashes": ("top\\config.json", "not a plain path"),
    "stream of Windows": ("config.json:evil", "not a plain path"),
    "link": (entry("evil", stat.S_IFLNK | 0o777), "a link or a special file"),
    "pipe": (entry("evil", stat.S_IFIFO | 0o644), "a link or a special file"),
    "the same but for case": ("CONFIG.json", "is there twice"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_unsafe_entries_are_refused_before_anything_is_written(folder, tmp_path, case):
    name, text = UNSAFE[case]
    path = pack_folder(tmp_path / "model.zip", folder)
    with zipfile.ZipFile(path, "a") as packed:
        packed.writestr(name, "/etc/passwd")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=text), open_source(path, tmp_path / "out"):
        pass
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(folder, tmp_path):
    path = pack(tmp_path / "model.zip", [("config.json", "{}"), ("config.json", "{}")])
    with pytest.raises(CheckpointError, match="is there twice"), open_source(path, tmp_path / "out"):
        pass


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "merges.txt"])
def test_zip_bombs_are_refused(tmp_path, name):
    path = pack(tmp_path / "model.zip", [(name, ZEROS)], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < len(ZEROS) / 500
    with pytest.raises(CheckpointError, match="zip bombs"), open_source(path, tmp_path / "out"):
        pass


def rewrite_directory(path, **fields):
    """Change numbers of the first entry in a zip's directory, leaving its local header as it is."""
    offsets = {"compressed": 20, "size": 24, "start": 42}
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    for name, value in fields.items():
        struct.pack_into("<I", data, at + offsets[name], value)
    path.write_bytes(data)


@pytest.mark.parametrize("size", [50, 150, 2**20])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_size_that_an_entry_does_not_have(tmp_path, size, compression):
    path = pack(tmp_path / "model.zip", [("config.json", bytes(range(100)))], compression)
    rewrite_directory(path, size=size)
    with pytest.raises(CheckpointError, match="damaged|does not have"), open_source(path, tmp_path / "out"):
        pass
    assert not hidden(tmp_path)


@pytest.mark.parametrize("change", [{"compressed": 2**20, "size": 2**20}, {"start": 1}, {"size": 99}])
def test_weights_whose_place_is_a_lie(folder, tmp_path, change):
    (folder / "config.json").unlink()
    path = pack_folder(tmp_path / "model.zip", folder)
    rewrite_directory(path, **change)
    with pytest.raises(CheckpointError, match="damaged"), open_source(path, tmp_path / "out"):
        pass


@pytest.mark.parametrize("name", ["a.json", "model.safetensors"])
def test_an_entry_whose_own_header_reaches_into_the_next(folder, tmp_path, name):
    weights = (folder / "model.safetensors").read_bytes()
    path = pack(tmp_path / "model.zip", [("a.json", b"{}"), ("model.safetensors", weights), ("z.json", b"{}")])
    data = bytearray(path.read_bytes())
    start = data.index(name.encode()) - 30
    struct.pack_into("<H", data, start + 28, 60_000)  # the length of the extra field, which the directory does not have
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} overlaps what follows it"), open_source(path, tmp_path / "out"):
        pass


def test_weights_that_differ_from_their_checksum(folder, tmp_path):
    path = pack_folder(tmp_path / "model.zip", folder)
    data = bytearray(path.read_bytes())
    at = data.index((folder / "model.safetensors").read_bytes()[-64:])
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not have its checksum"), open_source(path, tmp_path / "out"):
        pass
    assert not hidden(tmp_path)


def test_the_checksum_says_how_far_it_is(folder, tmp_path):
    reports = []
    path = pack_folder(tmp_path / "model.zip", folder)
    with open_source(path, tmp_path / "out", lambda *report: reports.append(report)):
        size = (folder / "model.safetensors").stat().st_size
        assert reports[-1] == ("Checking the zip", size, size)


def test_a_file_that_shrinks_while_it_is_read(folder):
    checkpoint = Checkpoint(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 8)
    with pytest.raises(CheckpointError, match="has become shorter"):
        for name in checkpoint.names():
            checkpoint[name]


def test_a_folder_that_cannot_be_read(folder, tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(folder), "iterdir", denied)
    with pytest.raises(CheckpointError, match="model cannot be read"), open_source(folder, tmp_path / "out"):
        pass


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "vocab.json", "added_tokens.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("content", ["[" * 200_000, "[]", '"', "\udcff"])
def test_damaged_json_is_one_clear_error(hub_folder, tmp_path, name, content):
    source = shutil.copytree(hub_folder("inference"), tmp_path / "source")
    (source / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(FastVLMError, match=f"{name} (cannot be read as JSON|holds a JSON list)"):
        convert(source, tmp_path / "out")


def test_json_without_an_end_is_not_read(folder, monkeypatch):
    monkeypatch.setattr("mlx_fastvlm.json_file.MAX_BYTES", 10)
    with pytest.raises(ConfigError, match="cannot be read as JSON .it has more than"):
        read_config_dict(folder)


@pytest.mark.parametrize(
    "name, content, text",
    [
        ("added_tokens.json", {"<|im_start|>": "one"}, "does not give every token an id"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": 2}}, "added_tokens_decoder"),
        (
            "config.json",
            {"model_type": "llava_qwen2", "mm_vision_tower": "mobileclip_l_1024", "rope_parameters": [1]},
            "rope",
        ),
    ],
)
def test_json_of_another_form(hub_folder, tmp_path, name, content, text):
    source = shutil.copytree(hub_folder("inference"), tmp_path / "source")
    (source / name).write_text(json.dumps(content))
    with pytest.raises(FastVLMError, match=text):
        convert(source, tmp_path / "out")


def test_messages_about_a_zip_name_the_zip(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    with open_source(pack_folder(tmp_path / "model.zip", folder), tmp_path / "out") as source:
        with pytest.raises(CheckpointError, match=r"model\.zip/model\.safetensors\.index\.json"):
            Checkpoint(source)
        (source.path / "config.json").unlink()
        with pytest.raises(ConfigError, match=r"model\.zip has no config\.json"):
            read_config_dict(source.path, source.origin)


def test_entries_that_share_their_bytes(tmp_path):
    path = pack(tmp_path / "model.zip", [("a.json", b"{}"), ("b.json", b"{}")])
    data = bytearray(path.read_bytes())
    second = data.rindex(b"PK\x01\x02")
    struct.pack_into("<I", data, second + 42, 0)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="overlaps"), open_source(path, tmp_path / "out"):
        pass


def test_limits(folder, tmp_path, monkeypatch):
    path = pack_folder(tmp_path / "model.zip", folder)
    for limit, value, text in (
        ("MAX_MEMBERS", 1, "entries"),
        ("MAX_SMALL_FILE", 10, "config.json has"),
        ("MAX_SMALL_TOTAL", 10, "besides its weights"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(archive, limit, value)
            with pytest.raises(CheckpointError, match=text), open_source(path, tmp_path / "out"):
                pass


def test_a_full_disk_is_noticed_before_unpacking(folder, tmp_path, monkeypatch):
    path = pack_folder(tmp_path / "model.zip", folder, compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1, 1))
    with pytest.raises(CheckpointError, match=r"needs 17 MB .* has 0 MB free"), open_source(path, tmp_path / "out"):
        pass
    assert not hidden(tmp_path)


def test_sources_that_are_none(folder, tmp_path):
    for name in ("text.zip", "text.txt"):
        (tmp_path / name).write_text("no zip")
    (tmp_path / "empty.ZIP").touch()
    two = pack(tmp_path / "two.zip", [("a/config.json", "{}"), ("b/config.json", "{}")])
    cut = tmp_path / "cut.zip"
    cut.write_bytes(pack_folder(tmp_path / "model.zip", folder).read_bytes()[:-100])
    for path, text in (
        (tmp_path / "text.txt", "neither a folder nor a zip"),
        (tmp_path / "nothing.zip", "neither a folder nor a zip"),
        (tmp_path / "text.zip", "damaged, so it is no zip file; download it again"),
        (tmp_path / "empty.ZIP", "empty, cut off or damaged"),
        (cut, "cut off or damaged"),
        (two, "several folders"),
    ):
        with pytest.raises(CheckpointError, match=text), open_source(path, tmp_path / "out"):
            pass


def test_an_encrypted_zip_is_refused(tmp_path):
    path = pack(tmp_path / "model.zip", [("config.json", b"{}")])
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="encrypted"), open_source(path, tmp_path / "out"):
        pass


def raw_safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_SAFETENSORS = {
    "nothing": b"",
    "half a length": b"\0\0\0",
    "a header of 2^63 bytes": raw_safetensors({}, length=2**63),
    "a header of 2^40 bytes": raw_safetensors({}, length=2**40),
    "a header longer than the file": raw_safetensors({}, length=1000),
    "no JSON": raw_safetensors(b"{nope"),
    "no UTF-8": raw_safetensors(b'{"\xff": 1}'),
    "a list": raw_safetensors([]),
    "an entry that is none": raw_safetensors({"a": 3}),
    "an entry without a shape": raw_safetensors({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "an unknown type": raw_safetensors({"a": tensor(dtype="F31")}, bytes(8)),
    "a negative size": raw_safetensors({"a": tensor((-2, -1))}, bytes(8)),
    "a fractional size": raw_safetensors({"a": tensor((2.0,))}, bytes(8)),
    "a shape larger than its bytes": raw_safetensors({"a": tensor((2**40,))}, bytes(8)),
    "a shape that overflows": raw_safetensors({"a": tensor((2**62, 4, 2))}, bytes(8)),
    "the end before the start": raw_safetensors({"a": tensor((2,), (8, 0))}, bytes(8)),
    "bytes behind the end": raw_safetensors({"a": tensor((2**20,), (0, 2**22))}, bytes(8)),
    "overlapping tensors": raw_safetensors({"a": tensor(), "b": tensor((2,), (4, 12))}, bytes(12)),
    "twice the same bytes": raw_safetensors({"a": tensor(), "b": tensor()}, bytes(8)),
    "a hole": raw_safetensors({"a": tensor(), "b": tensor((2,), (16, 24))}, bytes(24)),
    "cut off": raw_safetensors({"a": tensor()}, bytes(7)),
    "bytes too many": raw_safetensors({"a": tensor()}, bytes(9)),
    "a name twice": raw_safetensors(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
}


@pytest.mark.parametrize("in_zip", [False, True])
@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_a_lying_header_is_refused(tmp_path, case, in_zip):
    content = BAD_SAFETENSORS[case]
    if in_zip:  # with plenty of other bytes behind it, which it must not reach
        path = pack(tmp_path / "model.zip", [("model.safetensors", content), ("config.json", bytes(2**16))])
    else:
        path = tmp_path / "model"
        path.mkdir()
        (path / "model.safetensors").write_bytes(content)
    with open_source(path, tmp_path / "out") as source, pytest.raises(CheckpointError, match="cut off or damaged"):
        Checkpoint(source)


def test_a_sound_file_inside_another(tmp_path):
    content = raw_safetensors({"__metadata__": {"a": "b"}, "x": tensor()}, struct.pack("<2f", 3, 4))
    (tmp_path / "outer").write_bytes(b"before" + content + b"behind")
    file = SafetensorsFile(tmp_path / "outer", 6, len(content))
    assert file.names() == ["x"]
    assert file.read("x").tolist() == [3, 4] and file.rows("x", 1, 2).tolist() == [4]


class TestLinks:
    """Symlinks in a checkpoint folder."""

    @pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
    def test_out_of_the_folder(self, folder, tmp_path, name):
        (folder / "model.safetensors").rename(tmp_path / "elsewhere")
        (folder / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
            Checkpoint(folder)

    def test_within_the_folder(self, folder):
        expected = Checkpoint(folder).names()
        (folder / "model.safetensors").rename(folder / "weights")
        (folder / "model.safetensors").symlink_to("weights")
        assert Checkpoint(folder).names() == expected

    def test_to_the_folder_itself(self, folder, tmp_path):
        (tmp_path / "short").symlink_to(folder)
        assert Checkpoint(tmp_path / "short").names() == Checkpoint(folder).names()

    def test_of_the_hub_cache(self, folder, tmp_path):
        repository = tmp_path / "models--apple--FastVLM-0.5B"
        snapshot = repository / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir()
        (folder / "model.safetensors").rename(repository / "blobs" / "abc")
        (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
        assert "model.norm.weight" in Checkpoint(snapshot)

    @pytest.mark.parametrize(
        "target", ["../../../models--other--model/blobs/abc", "../../refs/abc", "../../blobs/deeper/abc"]
    )
    def test_of_the_hub_cache_to_another_place(self, folder, tmp_path, target):
        snapshot = tmp_path / "models--apple--FastVLM-0.5B" / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / target).resolve().parent.mkdir(parents=True)
        (folder / "model.safetensors").rename((snapshot / target).resolve())
        (snapshot / "model.safetensors").symlink_to(target)
        with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
            Checkpoint(snapshot)

    def test_in_a_circle(self, folder):
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to("config.json")
        with pytest.raises(CheckpointError, match="cannot be followed|leads out"):
            check_inside(folder, folder / "config.json")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
    def test_a_pipe_is_not_waited_for(self, folder):
        os.mkfifo(folder / "LICENSE")
        with pytest.raises(CheckpointError, match="not a regular file"):
            check_inside(folder, folder / "LICENSE")

    def test_what_is_not_there_is_no_matter(self, folder):
        assert check_inside(folder, folder / "absent") == folder / "absent"
        with pytest.raises(CheckpointError, match="leads out"):
            check_inside(folder, folder / ".." / "absent")


def test_one_file_as_a_source(folder, tmp_path):
    (tmp_path / "model" / "other.safetensors").write_bytes(b"not looked at")
    same(Checkpoint.from_file(folder / "model.safetensors"), Checkpoint(folder))
    for name, text in (
        ("model.onnx", "not a weight file"),
        ("gone.safetensors", "is missing"),
        ("gone.pt", "is missing"),
    ):
        with pytest.raises(CheckpointError, match=text):
            Checkpoint.from_file(folder / name)


def test_trainer_state_is_not_taken_for_weights(folder):
    (folder / "model.safetensors").rename(folder / "tuned.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        (folder / name).write_bytes(b"not read")
    assert "model.norm.weight" in Checkpoint(folder)
    (folder / "tuned.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        Checkpoint(folder)


class TestTorchFiles:
    """.bin, .pth and .pt; skipped without PyTorch."""

    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch")

    @pytest.fixture
    def tensors(self, torch):
        weight = torch.from_numpy(random_array(0, 6, 4))
        return {
            "whole": weight,
            "tied": weight,
            "transposed": weight.t(),
            "view": weight[2:5, 1:3],
            "strided": torch.from_numpy(random_array(1, 6, 8))[::2, ::3],
            "parameter": torch.nn.Parameter(torch.ones(5)),
            "bfloat16": torch.from_numpy(random_array(2, 5, 3)).bfloat16(),
            "float16": torch.from_numpy(random_array(3, 5)).half(),
            "float64": torch.from_numpy(random_array(4, 5)).double(),
            "num_batches_tracked": torch.tensor(1234),
            "empty": torch.zeros(0, 3),
        }

    @pytest.mark.parametrize("suffix", [".bin", ".pth", ".pt"])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_every_tensor_is_what_was_saved(self, torch, tensors, tmp_path, suffix, zipped):
        path = tmp_path / f"pytorch_model{suffix}"
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
        checkpoint = Checkpoint(tmp_path)
        assert checkpoint.names() == list(tensors)
        for name, expected in tensors.items():
            array = expected.detach().float().numpy()
            assert np.array_equal(np.array(checkpoint[name]), array), name
            assert (checkpoint.shape(name), checkpoint.nbytes(name)) == (array.shape, expected.nbytes)
            if array.ndim and len(array) > 2:
                assert np.array_equal(np.array(checkpoint.rows(name, 1, 3)), array[1:3]), name
        assert [
            checkpoint.dtype(name) for name in ("whole", "bfloat16", "float16", "float64", "num_batches_tracked")
        ] == [*("F32", "BF16", "F16", "F64", "I64")]

    def test_an_old_pytorch_that_does_not_tell_places(self, torch, tensors, tmp_path, monkeypatch):
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        monkeypatch.setattr("mlx_fastvlm.convert.torch_file._storage", lambda tensor: None)
        checkpoint = Checkpoint(tmp_path)
        for name, expected in tensors.items():
            assert np.array_equal(np.array(checkpoint[name]), expected.detach().float().numpy())

    def test_opening_does_not_read_the_tensors(self, torch, tmp_path):
        path = tmp_path / "pytorch_model.bin"
        torch.save({"weight": torch.zeros(1000)}, path)
        checkpoint = Checkpoint(tmp_path)
        data = path.read_bytes()
        at = data.index(bytes(4000))
        with path.open("r+b") as file:
            file.seek(at)
            file.write(np.ones(1000, np.float32).tobytes())
        # Were the numbers held since opening, they would be the old ones.
        assert mx.array_equal(checkpoint["weight"], mx.ones(1000))

    @pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "module"])
    def test_weights_in_a_trainers_record(self, torch, tmp_path, wrapper):
        record = {wrapper: {"model.norm.weight": torch.ones(3)}, "epoch": 7, "optimizer": {"state": {0: torch.ones(2)}}}
        torch.save(record, tmp_path / "tower.pth")
        checkpoint = Checkpoint.from_file(tmp_path / "tower.pth")
        assert checkpoint.names() == ["model.norm.weight"]

    @pytest.mark.parametrize("zipped", [True, False])
    def test_records_that_hold_no_weights(self, torch, tmp_path, zipped):
        one = {"a": torch.ones(1)}
        for record, text in (
            ([torch.ones(1)], "plain dictionary"),
            ({"epoch": 3}, "plain dictionary"),
            ({"state_dict": {"a": 3}}, "plain dictionary"),
            ({"model": one, "state_dict": one}, "expected one model"),
            ({"a": torch.ones(2).to_sparse()}, "dense|cannot be read safely"),
            ({"a": torch.ones(2, dtype=torch.complex64)}, "dense"),
        ):
            torch.save(record, tmp_path / "tower.pth", _use_new_zipfile_serialization=zipped)
            with pytest.raises(CheckpointError, match=text):
                Checkpoint.from_file(tmp_path / "tower.pth")

    @pytest.mark.parametrize("zipped", [True, False])
    def test_code_in_a_file_is_not_run(self, torch, tmp_path, zipped):
        proof = tmp_path / "ran"

        class Payload:
            def __reduce__(self):
                return (proof.touch, ())

        torch.save({"weight": Payload()}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match="cannot be read safely"):
            Checkpoint(tmp_path)
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
        with pytest.raises(CheckpointError, match="cannot be read safely"):
            Checkpoint(tmp_path)
        assert not proof.exists()

    def test_a_record_shorter_than_its_tensor(self, torch, tmp_path):
        torch.save({"weight": torch.ones(1000), "other": torch.ones(2000)}, tmp_path / "whole.bin")
        with zipfile.ZipFile(tmp_path / "whole.bin") as whole:
            parts = [(name, whole.read(name)) for name in whole.namelist()]
        short = [(name, content[:100] if name.endswith("data/0") else content) for name, content in parts]
        # Without its marks of format and alignment, PyTorch looks places up instead of computing them.
        short = [(name, content) for name, content in short if "/." not in name]
        pack(tmp_path / "pytorch_model.bin", short)
        with pytest.raises(CheckpointError, match="does not fit its record|cannot be read"):
            Checkpoint(tmp_path)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_repeated_elements_claim_no_memory(self, torch, tmp_path, zipped):
        torch.save({"weight": torch.ones(1).expand(2**40)}, tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match="does not fit its record"):
            Checkpoint(tmp_path)

    def test_damaged_files(self, torch, tmp_path):
        path = tmp_path / "pytorch_model.bin"
        torch.save({"weight": torch.ones(1000)}, path)
        whole = path.read_bytes()
        with zipfile.ZipFile(path) as packed:
            parts = [(name, packed.read(name)) for name in packed.namelist()]
        path.write_bytes(whole[:-500])
        with pytest.raises(CheckpointError, match="cannot be read|damaged"):
            Checkpoint(tmp_path)
        pack(path, parts, zipfile.ZIP_DEFLATED)
        with pytest.raises(CheckpointError, match="is compressed"):
            Checkpoint(tmp_path)

    def test_weights_of_pytorch_in_a_zip(self, torch, tensors, tmp_path):
        (tmp_path / "model").mkdir()
        torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
        with open_source(pack_folder(tmp_path / "model.zip", tmp_path / "model"), tmp_path / "out") as source:
            same(Checkpoint(source), Checkpoint(tmp_path / "model"))
        assert not hidden(tmp_path)
