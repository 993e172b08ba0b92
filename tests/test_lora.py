"""Adapters: merged weights equal the formulas, a tied head stays what it was in training, and nothing is ignored."""

import json

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_fastvlm.convert import convert
from mlx_fastvlm.convert.checkpoint import Checkpoint
from mlx_fastvlm.convert.lora import is_adapter, merged, read_adapter
from mlx_fastvlm.errors import CheckpointError
from tests.reference.adapters import (
    SHAPES,
    embedding_factors,
    factors,
    merged_embedding,
    merged_weight,
    random_array,
    write_adapter,
    write_base,
)
from tests.reference.hub_checkpoint import write_hub_checkpoint

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
FC1 = "model.vision_tower.vision_tower.model.network.0.0.convffn.fc1"
STEM = "model.vision_tower.vision_tower.model.patch_embed.0.reparam_conv"


@pytest.fixture
def base(tmp_path):
    """(arrays, Checkpoint) of a small base without a head of its own."""
    return write_base(tmp_path / "base"), Checkpoint(tmp_path / "base")


def check(view, name, expected):
    """The whole tensor and its blocks of rows."""
    np.testing.assert_allclose(np.array(view[name]), expected, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(np.array(view.rows(name, 3, 5)), expected[3:5], rtol=2e-6, atol=2e-6)
    assert view.shape(name) == expected.shape
    assert view[name].dtype == mx.float32


@pytest.mark.parametrize("module", [Q, UP, FC1, STEM])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("infix", ["", ".default"])
def test_merging_is_the_formula(base, tmp_path, module, dora, rank_stabilized, infix):
    arrays, tensors = base
    weight = arrays[f"{module}.weight"]
    stored = factors(module, weight.shape, infix=infix)
    a, b = stored.values()
    magnitude = None
    if dora:
        magnitude = np.abs(random_array(3, len(weight))) + 0.5
        shape = (1, -1, 1, 1) if weight.ndim == 4 else (-1,)  # as PEFT stores it for a convolution
        stored[f"base_model.model.{module}.lora_magnitude_vector{infix}"] = magnitude.reshape(shape)
    folder = write_adapter(tmp_path / "adapter", stored, use_dora=dora, use_rslora=rank_stabilized)
    view = merged(tensors, read_adapter(folder))
    expected = merged_weight(weight, a, b, alpha=6, rank_stabilized=rank_stabilized, magnitude=magnitude)
    assert np.abs(expected - weight).max() > 0.1
    check(view, f"{module}.weight", expected)


def test_everything_else_is_the_bases(base, tmp_path):
    arrays, tensors = base
    view = merged(tensors, read_adapter(write_adapter(tmp_path / "adapter", factors(Q, (8, 8)))))
    assert view.names() == tensors.names()
    for name in set(arrays) - {f"{Q}.weight"}:
        assert np.array_equal(np.array(view[name]), arrays[name])
        assert (view.shape(name), view.nbytes(name)) == (arrays[name].shape, arrays[name].nbytes)
    assert "nothing" not in view


def test_patterns_give_modules_their_own_rank_and_alpha(base, tmp_path):
    arrays, tensors = base
    other = "model.layers.1.mlp.up_proj"
    stored = factors(UP, (12, 8), rank=2) | factors(other, (12, 8), rank=3, seed=30) | factors(Q, (8, 8), seed=40)
    patterns = {"rank_pattern": {"layers.0.mlp.up_proj": 2, "layers\\.1\\..*": 3}, "alpha_pattern": {"up_proj": 5}}
    view = merged(tensors, read_adapter(write_adapter(tmp_path / "adapter", stored, **patterns)))
    for module, alpha in ((UP, 5), (other, 5), (Q, 6)):
        a, b = (stored[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        check(view, f"{module}.weight", merged_weight(arrays[f"{module}.weight"], a, b, alpha=alpha))


def test_trained_copies_and_biases_replace_the_bases(base, tmp_path):
    _, tensors = base
    stored = {
        "base_model.model.model.mm_projector.0.weight": random_array(1, 8, 6),
        f"base_model.model.{Q}.base_layer.bias": random_array(2, 8),
        "base_model.model.model.norm.modules_to_save.default.weight": random_array(3, 8),
    }
    view = merged(tensors, read_adapter(write_adapter(tmp_path / "adapter", stored, bias="all")))
    for name, array in zip(
        ("model.mm_projector.0.weight", f"{Q}.bias", "model.norm.weight"), stored.values(), strict=True
    ):
        assert np.array_equal(np.array(view[name]), array)


@pytest.mark.parametrize("lm_head", ["absent", "tied-copy"])
def test_a_tied_head_is_what_it_was_in_training(tmp_path, lm_head):
    embeddings = write_base(tmp_path / "base", lm_head)[EMBEDDINGS]
    tensors = Checkpoint(tmp_path / "base")
    on_embeddings = embedding_factors("model.embed_tokens", (11, 8))
    changed = merged_embedding(embeddings, *on_embeddings.values(), alpha=6)
    on_head = factors("lm_head", (11, 8))
    changed_head = merged_weight(embeddings, *on_head.values(), alpha=6)
    copy = {"base_model.model.model.embed_tokens.weight": random_array(5, 11, 8)}
    cases = {
        "LoRA on the embeddings": (on_embeddings, {}, changed, embeddings),
        "LoRA on both": (on_embeddings | on_head, {}, changed, changed_head),
        "LoRA on the head": (on_head, {}, embeddings, changed_head),
        "a trained copy": (copy, {"modules_to_save": ["embed_tokens"]}, *copy.values(), embeddings),
    }
    for name, (stored, settings, wanted, wanted_head) in cases.items():
        view = merged(tensors, read_adapter(write_adapter(tmp_path / name, stored, **settings)))
        check(view, EMBEDDINGS, wanted)
        check(view, HEAD, wanted_head)
        assert view.names().count(HEAD) == 1
    tying = merged(tensors, read_adapter(write_adapter(tmp_path / "tying", on_embeddings, ensure_weight_tying=True)))
    check(tying, EMBEDDINGS, changed)
    assert HEAD not in tying and HEAD not in tying.names()


def test_an_untied_head_keeps_its_own_weight(tmp_path):
    arrays = write_base(tmp_path / "base", "untied")
    stored = factors("lm_head", (11, 8)) | embedding_factors("model.embed_tokens", (11, 8))
    view = merged(Checkpoint(tmp_path / "base"), read_adapter(write_adapter(tmp_path / "adapter", stored)))
    a, b, *_ = stored.values()
    check(view, HEAD, merged_weight(arrays[HEAD], a, b, alpha=6))


@pytest.mark.parametrize(
    "stored, name",
    [
        ("base_model.model.model.language_model.layers.0.self_attn.q_proj", f"{Q}.weight"),
        ("base_model.model.language_model.model.layers.0.self_attn.q_proj", f"{Q}.weight"),
        ("base_model.model.model.multi_modal_projector.linear_2", "model.mm_projector.2.weight"),
        ("base_model.model.tower.blocks.0.fc1", f"{FC1}.weight"),
        ("base_model.model.layers.0.self_attn.q_proj", f"{Q}.weight"),
    ],
)
def test_names_of_other_layouts(base, tmp_path, stored, name):
    arrays, tensors = base
    parts = {
        f"{stored}.{key.rpartition('.lora_')[1][1:]}{key.rpartition('.lora_')[2]}": array
        for key, array in factors("x", arrays[name].shape).items()
    }
    view = merged(
        tensors,
        read_adapter(write_adapter(tmp_path / "adapter", parts)),
        aliases={"tower.blocks.0.fc1.weight": f"{FC1}.weight"},
    )
    check(view, name, merged_weight(arrays[name], *parts.values(), alpha=6))


def damaged(change):
    def write(folder):
        write_adapter(folder, factors(Q, (8, 8)))
        stored = load_file(folder / "adapter_model.safetensors")
        change(stored)
        save_file(stored, folder / "adapter_model.safetensors")
        return folder

    return write


A, B = (f"base_model.model.{Q}.lora_{part}.weight" for part in "AB")
BAD_TENSORS = {
    "unknown module": (lambda t: t.update(factors("model.layers.7.self_attn.q_proj", (8, 8))), "layers.7.self_attn"),
    "unknown tensor": (lambda t: t.update({"base_model.model.model.extra": random_array(0, 3)}), "model.extra"),
    "no A": (lambda t: t.pop(A), "lacks lora_A of"),
    "no B": (lambda t: t.pop(B), "lacks lora_B of"),
    "nothing": (lambda t: t.clear(), "holds no tensors"),
    "A misfits": (lambda t: t.update({A: random_array(0, 4, 9)}), r"lora_A.weight has shape \[4, 9\]"),
    "another rank": (lambda t: t.update({A: random_array(0, 5, 8)}), r"expected \[4, 8\]"),
    "B misfits": (lambda t: t.update({B: random_array(0, 9, 4)}), r"lora_B.weight has shape \[9, 4\]"),
    "replacement misfits": (
        lambda t: t.update({"base_model.model.model.norm.weight": random_array(0, 9)}),
        "norm.weight",
    ),
    "magnitude without DoRA": (
        lambda t: t.update({f"base_model.model.{Q}.lora_magnitude_vector": random_array(0, 8)}),
        "lora_magnitude_vector",
    ),
    "bias in LoRA": (
        lambda t: t.update({f"base_model.model.{Q}.lora_B.bias": random_array(0, 8)}),
        "a bias inside LoRA",
    ),
    "integers": (lambda t: t.update({A: np.ones((4, 8), np.int32)}), "expected floating point"),
    "two adapters": (lambda t: t.update(factors(Q, (8, 8), infix=".other")), "twice"),
    "one module by two names": (
        lambda t: t.update(factors("model.language_model.layers.0.self_attn.q_proj", (8, 8))),
        "under two names",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(base, tmp_path, case):
    change, text = BAD_TENSORS[case]
    with pytest.raises(CheckpointError, match=text):
        merged(base[1], read_adapter(damaged(change)(tmp_path / "adapter")))


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"r": 0}, "r = 0"),
        ({"r": True}, "r = True"),
        ({"lora_alpha": "8"}, "lora_alpha = '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"lora_alpha": 10**400}, "lora_alpha = 1000"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"something_new": {"x": 1}}, "something_new"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {"(": 4}}, "no pattern"),
        ({"use_dora": True}, "lora_magnitude_vector"),
    ],
)
def test_unsupported_settings_are_refused(tmp_path, settings, text):
    with pytest.raises(CheckpointError, match=text):
        read_adapter(write_adapter(tmp_path / "adapter", factors(Q, (8, 8)), **settings))


def test_dora_on_embeddings_is_refused(tmp_path):
    stored = embedding_factors("model.embed_tokens", (11, 8))
    with pytest.raises(CheckpointError, match="DoRA on the embeddings"):
        read_adapter(write_adapter(tmp_path / "adapter", stored, use_dora=True))


def test_missing_and_broken_files(tmp_path):
    folder = write_adapter(tmp_path / "adapter", factors(Q, (8, 8)))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no adapter_model.safetensors"):
        read_adapter(folder)
    for text, reason in (("{", "cannot be read as JSON"), ("[]", "expected an object"), ("{}", "peft_type")):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=reason):
            read_adapter(folder)
    with pytest.raises(CheckpointError, match="expected an adapter"):
        read_adapter(tmp_path)


def test_settings_behind_a_link_are_not_read(tmp_path):
    folder = write_adapter(tmp_path / "adapter", factors(Q, (8, 8)))
    (folder / "adapter_config.json").rename(tmp_path / "elsewhere.json")
    (folder / "adapter_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="leads out"):
        read_adapter(folder)


def test_adapters_are_told_from_models(tmp_path):
    assert is_adapter(write_adapter(tmp_path / "adapter", factors(Q, (8, 8))))
    write_base(tmp_path / "model")
    (tmp_path / "model" / "mm_projector.bin").touch()  # LLaVA leaves it beside a whole model too
    assert not is_adapter(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert is_adapter(tmp_path / "model")


class TestTrainerFiles:
    """LLaVA's .bin files, which need PyTorch to be read."""

    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch")

    @pytest.mark.parametrize("prefix", ["base_model.model.model.", "base_model.model.", "model.", ""])
    def test_what_was_trained_beside_lora_replaces_the_base(self, torch, base, tmp_path, prefix):
        _, tensors = base
        new = {
            name: random_array(50 + i, *SHAPES[f"model.mm_projector.{name}"])
            for i, name in enumerate(("0.weight", "2.bias"))
        }
        folder = write_adapter(tmp_path / "adapter", factors(Q, (8, 8)))
        stored = {f"{prefix}mm_projector.{name}": torch.from_numpy(array) for name, array in new.items()}
        torch.save(stored, folder / "non_lora_trainables.bin")
        view = merged(tensors, read_adapter(folder))
        for name, array in new.items():
            assert np.array_equal(np.array(view[f"model.mm_projector.{name}"]), array)

    @pytest.mark.parametrize("lm_head", ["absent", "tied-copy"])
    def test_a_tied_head_follows_embeddings_that_were_trained_themselves(self, torch, tmp_path, lm_head):
        write_base(tmp_path / "base", lm_head)
        new = random_array(5, 11, 8)
        on_head = factors("lm_head", (11, 8))
        for name, stored in {"alone": factors(Q, (8, 8)), "with LoRA on the head": on_head}.items():
            folder = write_adapter(tmp_path / name, stored)
            trained = {"base_model.model.model.embed_tokens.weight": torch.from_numpy(new)}
            torch.save(trained, folder / "non_lora_trainables.bin")
            view = merged(Checkpoint(tmp_path / "base"), read_adapter(folder))
            check(view, EMBEDDINGS, new)
            if stored is on_head:
                check(view, HEAD, merged_weight(new, *on_head.values(), alpha=6))
            else:
                assert HEAD not in view and HEAD not in view.names()

    def test_a_projector_alone(self, torch, base, tmp_path):
        new = torch.from_numpy(random_array(1, 8, 6))
        torch.save({"model.mm_projector.0.weight": new.bfloat16()}, tmp_path / "mm_projector.bin")
        adapter = read_adapter(tmp_path)
        assert adapter.base_model_name_or_path is None
        view = merged(base[1], adapter)
        assert np.array_equal(np.array(view["model.mm_projector.0.weight"]), new.bfloat16().float().numpy())
        assert view.dtype("model.mm_projector.0.weight") == "F32"  # the base's, not the adapter's

    def test_adapter_weights_as_bin(self, torch, base, tmp_path):
        stored = factors(Q, (8, 8))
        folder = write_adapter(tmp_path / "adapter", stored)
        (folder / "adapter_model.safetensors").unlink()
        torch.save({name: torch.from_numpy(array) for name, array in stored.items()}, folder / "adapter_model.bin")
        view = merged(base[1], read_adapter(folder))
        check(view, f"{Q}.weight", merged_weight(base[0][f"{Q}.weight"], *stored.values(), alpha=6))

    def test_the_same_tensor_in_two_files_must_be_equal(self, torch, base, tmp_path):
        name = "base_model.model.model.mm_projector.0.bias"
        array = random_array(1, 8)
        folder = write_adapter(tmp_path / "adapter", {name: array})
        torch.save({name: torch.from_numpy(array)}, folder / "non_lora_trainables.bin")
        assert np.array_equal(np.array(merged(base[1], read_adapter(folder))["model.mm_projector.0.bias"]), array)
        torch.save({name: torch.from_numpy(array + 1)}, folder / "non_lora_trainables.bin")
        with pytest.raises(CheckpointError, match="two different tensors"):
            read_adapter(folder)

    def test_code_in_a_trainers_file_is_not_run(self, torch, tmp_path):
        folder = write_adapter(tmp_path / "adapter", factors(Q, (8, 8)))
        proof = tmp_path / "ran"

        class Payload:
            def __reduce__(self):
                return (proof.touch, ())

        torch.save({"base_model.model.model.norm.weight": Payload()}, folder / "non_lora_trainables.bin")
        with pytest.raises(CheckpointError, match="cannot be read safely"):
            read_adapter(folder)
        assert not proof.exists()


def test_settings_are_kept_for_the_record(tmp_path):
    adapter = read_adapter(write_adapter(tmp_path / "adapter", factors(Q, (8, 8))))
    assert adapter.base_model_name_or_path == "apple/FastVLM-0.5B"
    assert adapter.settings == json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter.ranks == {f"base_model.model.{Q}": 4}


def test_an_adapter_converts_to_what_its_merged_base_does(tmp_path):
    base = write_hub_checkpoint(tmp_path / "base", config="tiny", dtype="float32")
    arrays = load_file(base / "model.safetensors")
    stored = {}
    for module in (Q, "model.layers.1.mlp.down_proj", "model.mm_projector.2", FC1):
        found = factors(module, arrays[f"{module}.weight"].shape)
        arrays[f"{module}.weight"] = merged_weight(arrays[f"{module}.weight"], *found.values(), alpha=6).astype("f4")
        stored |= found
    adapter = write_adapter(tmp_path / "adapter", stored, base_model_name_or_path=str(base))
    (tmp_path / "merged").mkdir()
    for path in base.iterdir():
        (tmp_path / "merged" / path.name).write_bytes(path.read_bytes())
    save_file(arrays, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    expected = mx.load(str(convert(tmp_path / "merged", tmp_path / "expected") / "model.safetensors"))
    for given in (None, base):
        found = mx.load(str(convert(adapter, tmp_path / f"found-{given is None}", base=given) / "model.safetensors"))
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(np.array(found[name]), np.array(array), rtol=1e-5, atol=1e-6, err_msg=name)
