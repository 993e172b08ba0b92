"""config.json contents of the FastVLM checkpoints, and of a tiny model with the same structure.

The released sizes follow the config.json fields of apple/FastVLM-{0.5B,1.5B,7B}. `vision_config` is this project's
extension: it is present only when the tower has another size than Apple's.
"""

import copy
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]

_SHARED: Config = {
    "architectures": ["LlavaQwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "llava_qwen.LlavaConfig",
        "AutoModelForCausalLM": "llava_qwen.LlavaQwen2ForCausalLM",
    },
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "mm_hidden_size": 3072,
    "mm_patch_merge_type": "flat",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "mobileclip_l_1024",
    "model_type": "llava_qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tokenizer_model_max_length": 8192,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.3",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": True,
    "use_cache": True,
    "use_mm_proj": True,
    "use_sliding_window": False,
}

_PRESETS: dict[str, Config] = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "max_window_layers": 28,
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": 152128,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "max_window_layers": 2,
        "mm_hidden_size": 256,
        "mm_vision_tower": "mobileclip_l_256",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "tokenizer_model_max_length": 512,
        "vision_config": {
            "image_size": 256,
            "patch_size": 64,
            "embed_dims": [8, 16, 32, 64, 128],
            "layers": [1, 2, 2, 1, 1],
            "mlp_ratios": [4, 4, 4, 4, 4],
            "cls_ratio": 2.0,
            "head_dim": 32,
            "projection_dim": 24,
        },
        "vocab_size": 512,
    },
}

PRESETS = tuple(_PRESETS)


def preset(name: str) -> Config:
    """A fresh copy of the named config.json: "0.5b", "1.5b", "7b" or "tiny"."""
    if name not in _PRESETS:
        raise ValueError(f"unknown preset {name!r}; expected one of {PRESETS}")
    return copy.deepcopy({**_SHARED, **_PRESETS[name]})


@dataclass(frozen=True)
class TowerSize:
    """Widths and depths of one FastViTHD tower. `projection_dim` is the width of CLIP's unused head.

    Each width must be a multiple of the one before (downsampling is depthwise), and the last two of `head_dim`.
    """

    image_size: int
    embed_dims: tuple[int, ...] = (96, 192, 384, 768, 1536)
    layers: tuple[int, ...] = (2, 12, 24, 4, 2)
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4, 4)
    cls_ratio: float = 2.0
    head_dim: int = 32
    projection_dim: int = 768
    patch_size: int = 64

    @property
    def feature_dim(self) -> int:
        """Channels of the image feature (3072 in the released models)."""
        return int(self.embed_dims[-1] * self.cls_ratio)

    @property
    def squeeze_dim(self) -> int:
        """Inner width of the squeeze-excite block (ml-fastvlm@592b4ad mci.py SEBlock, ratio 1/16)."""
        return int(self.feature_dim * 0.0625)


def tower_size(config: Config) -> TowerSize:
    """The tower a config.json describes; without `vision_config` it is FastViTHD's standard size."""
    named = int(config["mm_vision_tower"].rsplit("_", 1)[-1])
    fields = dict(config.get("vision_config") or {})
    for key in ("embed_dims", "layers", "mlp_ratios"):
        if key in fields:
            fields[key] = tuple(fields[key])
    return TowerSize(**{"image_size": named, **fields})
