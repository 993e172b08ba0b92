"""The references test themselves, so that a failing parity test accuses the runtime.

The first group needs numpy only; the others skip without torch, timm and transformers, or without Qwen's vocabulary.
"""

import hashlib
import json
import struct
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from .hub_checkpoint import write_hub_checkpoint
from .presets import preset, tower_size
from .qwen_tokenizer import SKIP_REASON, qwen_tokenizer_json, write_qwen2_vocabulary
from .tensor_layout import checkpoint_tensors, tower_tensors
from .tiny_tokenizer import TOKENIZER_FILES

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def read_header(path: Path) -> dict[str, dict]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__")
    return header


@pytest.mark.parametrize("form", ["inference", "training"])
def test_checkpoint_bytes_are_those_of_the_golden_run(tmp_path: Path, form: str) -> None:
    golden = np.load(GOLDEN / f"tiny_{form}.npz", allow_pickle=False)
    folder = write_hub_checkpoint(tmp_path, form=form, seed=int(golden["seed"]))
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == str(golden["model_sha256"])


def test_folder_holds_exactly_the_hub_files(tmp_path: Path) -> None:
    write_hub_checkpoint(tmp_path)
    expected = {"config.json", "generation_config.json", "model.safetensors", *TOKENIZER_FILES}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_shards_hold_the_same_tensors_as_one_file(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    whole = safetensors.load_file(write_hub_checkpoint(tmp_path / "one", dtype="float16") / "model.safetensors")
    folder = write_hub_checkpoint(tmp_path / "three", dtype="float16", shards=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert set(index["weight_map"]) == set(whole)
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(safetensors.load_file(folder / file)[name], whole[name])
    assert all(np.all(values != 0) for values in whole.values())


@pytest.mark.parametrize(("lm_head", "stored", "tied"), [("absent", 0, 1), ("tied-copy", 1, 1), ("untied", 1, 0)])
def test_lm_head_choices(tmp_path: Path, lm_head: str, stored: int, tied: int) -> None:
    folder = write_hub_checkpoint(tmp_path, lm_head=lm_head)
    assert ("lm_head.weight" in read_header(folder / "model.safetensors")) == bool(stored)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] == bool(tied)


def test_full_size_layouts_have_the_published_parameter_counts() -> None:
    tower = sum(tensor.size for tensor in tower_tensors(tower_size(preset("0.5b")), "inference"))
    assert round(tower / 1e6) == 125
    stored = sum(tensor.size for tensor in checkpoint_tensors(preset("0.5b"), "inference", "tied-copy"))
    assert round(stored * 2 / 1e9, 2) == 1.52
    stored = sum(tensor.size for tensor in checkpoint_tensors(preset("7b"), "inference", "untied"))
    assert round(stored * 2 / 1e9, 1) == 15.5


@pytest.mark.parametrize("form", ["inference", "training"])
def test_torch_reference_reproduces_the_golden_features(tmp_path: Path, form: str) -> None:
    torch_reference = _import_torch_reference()
    golden = np.load(GOLDEN / f"tiny_{form}.npz", allow_pickle=False)
    pixels = np.load(GOLDEN / "pixels.npz")["pixels"].astype(np.float32).transpose(0, 3, 1, 2) / np.float32(255)
    model = torch_reference.load_reference(write_hub_checkpoint(tmp_path, form=form, seed=int(golden["seed"])))
    features = model.image_features(pixels).numpy()
    np.testing.assert_allclose(features, golden["features"], atol=2e-5 * np.abs(features).max(), rtol=0)
    if form == "training":
        folded = model.reparameterize().image_features(pixels).numpy()
        np.testing.assert_allclose(folded, features, atol=1e-5 * np.abs(features).max(), rtol=0)


def test_torch_reference_refuses_a_missing_tensor() -> None:
    torch_reference = _import_torch_reference()
    import torch

    size = tower_size(preset("tiny"))
    state = {tensor.name: torch.ones(tensor.shape) for tensor in tower_tensors(size, "inference")}
    torch_reference.load_tower(size, state)
    del state["network.6.reparam_conv.bias"]
    with pytest.raises(RuntimeError, match=r"pos_emb\.reparam_conv\.bias"):
        torch_reference.load_tower(size, state)


def test_qwen2_true_vocabulary_in_three_implementations(tmp_path: Path) -> None:
    source = qwen_tokenizer_json()
    if source is None:
        pytest.skip(SKIP_REASON)
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("regex")
    from .golden_text import STRINGS
    from .python_bpe import PythonBPE

    folder = write_qwen2_vocabulary(source, tmp_path)
    fast = transformers.Qwen2Tokenizer.from_pretrained(folder)
    original = tokenizers.Tokenizer.from_file(str(source))
    python = PythonBPE(folder)
    for text in STRINGS:
        ids = fast(text).input_ids
        assert ids == original.encode(text, add_special_tokens=False).ids == python.encode(text), text
    assert fast("<|im_end|><|endoftext|>").input_ids == [151645, 151643]


def _import_torch_reference() -> ModuleType:
    for name in ("torch", "timm", "transformers"):
        pytest.importorskip(name)
    from . import torch_reference

    return torch_reference
