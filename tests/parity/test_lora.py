"""Adapters written by the peft library, merged by us and by peft's own merge_and_unload."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="install the extra 'parity'")
transformers = pytest.importorskip("transformers", reason="install the extra 'parity'")
peft = pytest.importorskip("peft", reason="install the extra 'parity'")

from mlx_fastvlm.convert.checkpoint import Checkpoint
from mlx_fastvlm.convert.lora import merged, read_adapter

DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "plain": {"target_modules": DECODER},
    "all linear layers": {"target_modules": "all-linear"},
    "rank-stabilized": {"target_modules": DECODER, "use_rslora": True},
    "DoRA": {"target_modules": DECODER, "use_dora": True},
    "rank-stabilized DoRA": {"target_modules": DECODER, "use_dora": True, "use_rslora": True},
    "patterns": {
        "target_modules": DECODER,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 8, "model.layers.0.mlp.up_proj": 3},
        "alpha_pattern": {"v_proj": 32, "^model.layers.1.self_attn.o_proj": 1},
    },
    "trained copies": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "embeddings and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "biases": {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
    "biases of LoRA's modules": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
}


def tiny_qwen2(tied):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.Qwen2ForCausalLM(config).float().eval()


def adapted(model, **settings):
    """The model with an adapter whose weights are all random, as if it were trained."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, lora_dropout=0.1, **settings)
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                factor = 1 + 0.1 * torch.rand_like(parameter) if "magnitude" in name else 0.2
                parameter.mul_(factor).add_(0.05 * torch.randn_like(parameter))
    return wrapped


@pytest.mark.parametrize("as_bin", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_merged_as_by_peft(tmp_path, case, as_bin):
    model = tiny_qwen2(tied=False)
    model.save_pretrained(tmp_path / "base")
    wrapped = adapted(model, **CASES[case])
    if as_bin:
        torch.save(peft.get_peft_model_state_dict(wrapped), tmp_path / "adapter_model.bin")
        wrapped.peft_config["default"].save_pretrained(tmp_path)
    else:
        wrapped.save_pretrained(tmp_path)
    base = Checkpoint(tmp_path / "base")
    view = merged(base, read_adapter(tmp_path))
    expected = wrapped.merge_and_unload().state_dict()
    assert sorted(view.names()) == sorted(expected)
    changed = 0
    for name, tensor in expected.items():
        np.testing.assert_allclose(np.array(view[name]), tensor.numpy(), rtol=1e-6, atol=1e-6, err_msg=name)
        changed += not np.array_equal(tensor.numpy(), np.array(base[name]))
    assert changed >= 2


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_a_tied_model_answers_as_the_adapted_one(tmp_path, settings):
    """Against the unmerged model: merging in PEFT changes both of two tied tensors."""
    model = tiny_qwen2(tied=True)
    model.save_pretrained(tmp_path / "base")
    wrapped = adapted(model, **settings)
    wrapped.save_pretrained(tmp_path)
    ids = torch.arange(48)[None]
    with torch.no_grad():
        expected = wrapped(ids).logits
        base_logits = tiny_qwen2(tied=True)(ids).logits
    view = merged(Checkpoint(tmp_path / "base"), read_adapter(tmp_path))
    state = {name: torch.from_numpy(np.array(view[name])) for name in view.names()}
    untied = tiny_qwen2(tied=False)
    untied.load_state_dict({"lm_head.weight": state["model.embed_tokens.weight"], **state})
    with torch.no_grad():
        found = untied(ids).logits
    assert (expected - base_logits).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
