"""config.json and generation_config.json of the demo checkpoint, in the fields that LlavaQwen2 uses."""

VISION_CONFIG = {
    "image_size": 256,
    "patch_size": 64,
    "embed_dims": [8, 16, 32, 64, 128],
    "layers": [1, 1, 4, 3, 2],
    "mlp_ratios": [4, 4, 4, 4, 4],
    "cls_ratio": 2.0,
    "head_dim": 32,
}
HIDDEN_SIZE = 128
LAYERS = 4


def model_config(vocab_size: int) -> dict:
    """The demo's config.json; the last three ids of the vocabulary are the special tokens."""
    vision = VISION_CONFIG
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": vocab_size - 3,
        "eos_token_id": vocab_size - 1,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": HIDDEN_SIZE,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "max_position_embeddings": 1024,
        "max_window_layers": LAYERS,
        "mm_hidden_size": int(vision["embed_dims"][-1] * vision["cls_ratio"]),
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"mobileclip_l_{vision['image_size']}",
        "model_type": "llava_qwen2",
        "num_attention_heads": HIDDEN_SIZE // 32,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "tokenizer_model_max_length": 1024,
        "tokenizer_padding_side": "right",
        "torch_dtype": "float32",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
        "vision_config": vision,
    }


def generation_config(config: dict) -> dict:
    return {
        "bos_token_id": config["bos_token_id"],
        "do_sample": False,
        "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
        "pad_token_id": config["bos_token_id"],
    }
