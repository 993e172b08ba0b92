"""Adapters in PEFT's layout and the numbers that merging them must give, from the formulas, in float64. Needs numpy.

LoRA: W + s·B·A with s = alpha / r, or alpha / sqrt(r) when rank-stabilized. DoRA: each output row of that, divided by its
length and multiplied by the row's magnitude. An embedding's product is transposed.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

SETTINGS: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "apple/FastVLM-0.5B",
    "r": 4,
    "lora_alpha": 6,
    "lora_dropout": 0.05,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "target_modules": ["q_proj"],
}
# A few tensors of each kind under LlavaQwen2's names: Linear, convolutions, embeddings.
SHAPES = {
    "model.embed_tokens.weight": (11, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.q_proj.bias": (8,),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.1.mlp.up_proj.weight": (12, 8),
    "model.norm.weight": (8,),
    "model.mm_projector.0.weight": (8, 6),
    "model.mm_projector.0.bias": (8,),
    "model.mm_projector.2.weight": (8, 8),
    "model.mm_projector.2.bias": (8,),
    "model.vision_tower.vision_tower.model.network.0.0.convffn.fc1.weight": (10, 5, 1, 1),
    "model.vision_tower.vision_tower.model.patch_embed.0.reparam_conv.weight": (5, 3, 3, 3),
}
LM_HEADS = ("absent", "tied-copy", "untied")


def random_array(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def base_tensors(lm_head: str = "absent") -> dict[str, np.ndarray]:
    """Float32 tensors of SHAPES; the head is "absent", a "tied-copy" of the embeddings, or "untied"."""
    tensors = {name: random_array(seed, *shape) for seed, (name, shape) in enumerate(SHAPES.items())}
    if lm_head != "absent":
        embeddings = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embeddings if lm_head == "tied-copy" else random_array(99, *embeddings.shape)
    return tensors


def write_base(folder: Path, lm_head: str = "absent") -> dict[str, np.ndarray]:
    """Write model.safetensors with `base_tensors`; return them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = base_tensors(lm_head)
    save_file({name: array.copy() for name, array in tensors.items()}, folder / "model.safetensors")
    return tensors


def write_adapter(folder: Path, tensors: dict[str, np.ndarray], **settings: Any) -> Path:
    """Write adapter_config.json and adapter_model.safetensors; `settings` change SETTINGS."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def factors(
    module: str, shape: tuple[int, ...], rank: int = 4, seed: int = 7, infix: str = ""
) -> dict[str, np.ndarray]:
    """Stored name → A and B for a Linear (O, I) or a convolution (O, I, k, k); `infix` is an adapter's name."""
    name = f"base_model.model.{module}"
    return {
        f"{name}.lora_A{infix}.weight": random_array(seed, rank, *shape[1:]),
        f"{name}.lora_B{infix}.weight": random_array(seed + 1, shape[0], rank, *(1,) * (len(shape) - 2)),
    }


def embedding_factors(module: str, shape: tuple[int, int], rank: int = 4, seed: int = 17) -> dict[str, np.ndarray]:
    """Stored name → A and B for an embedding (vocabulary, hidden)."""
    name = f"base_model.model.{module}"
    return {
        f"{name}.lora_embedding_A": random_array(seed, rank, shape[0]),
        f"{name}.lora_embedding_B": random_array(seed + 1, shape[1], rank),
    }


def merged_weight(
    weight: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    *,
    alpha: float,
    rank_stabilized: bool = False,
    magnitude: np.ndarray | None = None,
) -> np.ndarray:
    """(O, I, …) weight with A (r, I, …) and B (O, r, …) merged into it."""
    rank = a.shape[0]
    scale = alpha / (math.sqrt(rank) if rank_stabilized else rank)
    b = b.astype(np.float64).reshape(b.shape[0], rank)
    result = weight.astype(np.float64) + scale * np.einsum("or,r...->o...", b, a.astype(np.float64))
    if magnitude is not None:
        for row, length in zip(result, magnitude, strict=True):
            row *= length / math.sqrt((row**2).sum())
    return result


def merged_embedding(weight: np.ndarray, a: np.ndarray, b: np.ndarray, *, alpha: float) -> np.ndarray:
    """(V, D) embeddings with A (r, V) and B (D, r) merged into them."""
    return weight + alpha / a.shape[0] * np.einsum("dr,rv->vd", b.astype(np.float64), a.astype(np.float64))
