"""What is taken of a hub repository, told from its list of files; and that a download made before needs no network."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects

from mlx_fastvlm.checkpoint_files import wanted_files
from mlx_fastvlm.errors import HubError
from mlx_fastvlm.hub import download_checkpoint, is_hub_id

COMMIT = "c0ffee" + "0" * 34
TEXTS = ["config.json", "tokenizer_config.json", "vocab.json", "merges.txt", "LICENSE", "ACKNOWLEDGEMENTS", "README.md"]
PACKAGE = ["fastvithd.mlpackage/Manifest.json", "fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin"]
# name → (needed, left where it is)
REPOSITORIES = {
    "a checkpoint": (["model.safetensors", *TEXTS], [".gitattributes", "acc_vs_latency_qwen-2.png"]),
    "shards": (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], []),
    "both formats": (["model.safetensors", "config.json"], ["pytorch_model.bin", "consolidated.pth"]),
    "PyTorch's format": (["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"], ["consolidated.pth"]),
    "PyTorch's oldest": (["model.pth", "config.json"], ["model.onnx"]),
    "Apple's export": (["model.safetensors", *PACKAGE, *TEXTS], ["images/example.png"]),
    "LoRA of LLaVA's trainer": (
        ["adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin", "config.json"],
        ["adapter_model.bin", "training_args.bin", "optimizer.pt", "rng_state_0.pth", "trainer_state.json"],
    ),
    "LoRA in PyTorch's format": (["adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"], []),
    "a projector": (["mm_projector.bin", "config.json"], []),
    "steps of a training": (
        ["model.safetensors", "config.json"],
        ["checkpoint-500/model.safetensors", "checkpoint-500/config.json", "checkpoint-500/x.mlpackage/weight.bin"],
    ),
    "names with the marks of patterns": (["model[1].safetensors"], ["model1.bin"]),
}


@pytest.mark.parametrize("case", REPOSITORIES)
def test_what_is_needed_of_a_repository(case):
    needed, others = REPOSITORIES[case]
    assert sorted(wanted_files([*others, *needed])) == sorted(needed)


@pytest.mark.parametrize("case", REPOSITORIES)
def test_a_download_takes_exactly_that(case, monkeypatch, tmp_path):
    needed, others = REPOSITORIES[case]
    listed = [SimpleNamespace(rfilename=name) for name in [*needed, *others]]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=listed))
    taken = []

    def snapshot_download(hub_id, revision, allow_patterns):
        taken.extend(filter_repo_objects([*needed, *others], allow_patterns=allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert download_checkpoint("owner/name") == tmp_path
    assert sorted(taken) == sorted(needed)


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """(files there, files listed or None) → the snapshot of owner/name in a hub cache without network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def make(present, listed):
        repository = tmp_path / "cache" / "models--owner--name"
        snapshot = repository / "snapshots" / COMMIT
        for name in present:
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_bytes(b"content")
        for folder in ("refs", "trees"):
            (repository / folder).mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        if listed is not None:
            files = {name: {"size": 7, "blob_id": "0" * 40} for name in listed}
            (repository / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": files}))
        return snapshot

    return make


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
@pytest.mark.parametrize("is_listed", [True, False], ids=["listed", "of an earlier huggingface_hub"])
@pytest.mark.parametrize("case", REPOSITORIES)
def test_what_was_downloaded_before_needs_no_network(case, cached, revision, is_listed):
    needed, others = REPOSITORIES[case]
    snapshot = cached(needed, [*needed, *others] if is_listed else None)
    assert download_checkpoint("owner/name", revision) == snapshot


@pytest.mark.skipif(
    not hasattr(huggingface_hub, "get_cached_repo_tree"), reason="this huggingface_hub keeps no list of a repository"
)
@pytest.mark.parametrize("lost", ["non_lora_trainables.bin", "fastvithd.mlpackage/Manifest.json"])
def test_half_a_download_is_not_used(cached, lost):
    needed = ["adapter_config.json", "adapter_model.safetensors"]
    cached(needed, [*needed, lost])
    with pytest.raises(HubError, match="neither in the cache nor can it be downloaded"):
        download_checkpoint("owner/name")


@pytest.mark.parametrize(
    "error, text",
    [
        (hub_errors.GatedRepoError, "needs permission"),
        (hub_errors.RevisionNotFoundError, "no revision 'main'"),
        (hub_errors.RepositoryNotFoundError, "There is no model owner/name"),
        (ConnectionError, "neither in the cache nor can it be downloaded"),
    ],
)
def test_what_the_hub_refuses(error, text, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def refuse(*_, **__):
        if error is ConnectionError:
            raise error("no network")
        raise error("refused", response=SimpleNamespace(headers={}, request=None, status_code=404))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(HubError, match=text):
        download_checkpoint("owner/name", "main")


def test_errors_that_are_bugs_keep_their_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def fail(*_, **__):
        raise KeyError("bug")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(KeyError):
        download_checkpoint("owner/name")


@pytest.mark.parametrize("name", ["apple/FastVLM-0.5B", "a/b", "owner/model.v2"])
def test_hub_ids(name):
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name",
    [
        "z/nope.zip",
        "z/Nope.ZIP",
        "z/model.safetensors",
        "z/a.bin",
        "z/a.pth",
        "z/a.pt",
        "z/config.json",
        "a",
        "a/b/c",
        "",
    ],
)
def test_files_and_paths_are_no_hub_ids(name):
    assert not is_hub_id(name)
