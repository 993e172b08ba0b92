"""Rewrites a hub folder in the other layouts that FastVLM checkpoints come in: same numbers, other names and axes.

Independent of the converter, which generates its names from the config: here every name is translated word by word.
The parity tests compare these names with those of timm, transformers and mlx-vlm. Needs mlx for bfloat16 and quantizing.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

TOWER = "model.vision_tower.vision_tower.model."
Tensors = dict[str, mx.array]

# Where Apple's flat list of modules falls in five stages: 0 stage 1, 1 down, 2 stage 2, … 6 and 9 positions, 10 stage 5.
_STAGE = (0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4)
_TIMM_WORDS = {
    "patch_embed": "stem",
    "conv_exp": "final_conv",
    "rbr_conv": "conv_kxk",
    "rbr_scale": "conv_scale",
    "rbr_skip": "identity",
    "lkb_origin": "large_conv",
    "lkb_reparam": "reparam_conv",
    "pe": "pos_enc",
    "convffn": "mlp",
    "reduce": "fc1",
    "expand": "fc2",
}
_TOKENIZER_FILES = ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")


def read_hub(folder: Path) -> Tensors:
    """The tensors of a hub folder with one file."""
    return mx.load(str(folder / "model.safetensors"))


def timm_name(apple: str) -> str:
    """timm's name of a tower's tensor, both without prefix. CLIP's head has none: see `write_timm_tower`."""
    words = apple.split(".")
    if words[0] == "network":
        part = {"proj": "downsample", "pe": "pos_emb", "reparam_conv": "pos_emb"}.get(words[2], "blocks")
        words = ["stages", str(_STAGE[int(words[1])]), part, *words[2:]]
    words = [_TIMM_WORDS.get(word, word) for word in words]
    return ".".join(words) + (".gamma" if words[-1].startswith("layer_scale") else "")


def write_llava_with_timm_tower(hub: Path, folder: Path) -> Path:
    """What a fine-tune that builds its tower with timm saves."""
    tensors = {}
    for name, array in _without_head(read_hub(hub)).items():
        tower = name.startswith(TOWER)
        tensors[TOWER + timm_name(name.removeprefix(TOWER)) if tower else name] = array
    return _write(folder, hub, tensors, _config(hub))


def write_fast_vlm(
    hub: Path, folder: Path, *, processor: str = "preprocessor_config.json", prefix: str = "model."
) -> Path:
    """transformers' `fast_vlm`.

    Args:
        processor: "preprocessor_config.json" (version 4), "processor_config.json" (version 5) or "" for none.
        prefix: "" for a model saved without its head.
    """
    config, tensors = _config(hub), {}
    for name, array in _without_head(read_hub(hub)).items():
        if name.startswith(TOWER):
            name = f"{prefix}vision_tower.timm_model.{timm_name(name.removeprefix(TOWER))}"
        elif name.startswith("model.mm_projector."):
            _, _, index, part = name.split(".")
            name = f"{prefix}multi_modal_projector.linear_{ {'0': 1, '2': 2}[index] }.{part}"
        elif name.startswith("model."):
            name = f"{prefix}language_model.{name.removeprefix('model.')}"
        if name != "lm_head.weight" or not config["tie_word_embeddings"]:
            tensors[name] = array
    _write(folder, hub, tensors, fast_vlm_config(config))
    side = config["vision_config"]["image_size"]
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "size": {"shortest_edge": side},
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
    }
    if processor:
        nested = {"processor_class": "LlavaProcessor", "image_processor": settings}
        _write_json(folder / processor, settings if processor == "preprocessor_config.json" else nested)
    return folder


def fast_vlm_config(config: dict[str, Any]) -> dict[str, Any]:
    """transformers' config.json for a hub's config.json whose tower is spelled out."""
    text = (
        "hidden_act hidden_size intermediate_size max_position_embeddings num_attention_heads num_hidden_layers "
        "num_key_value_heads rms_norm_eps tie_word_embeddings use_sliding_window vocab_size"
    )
    vision = config["vision_config"]
    arguments = {name: vision[name] for name in ("layers", "embed_dims", "mlp_ratios", "cls_ratio")}
    return {
        "architectures": ["FastVlmForConditionalGeneration"],
        "model_type": "fast_vlm",
        "image_token_index": config["vocab_size"] - 1,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": config["tie_word_embeddings"],
        "text_config": {
            **{name: config[name] for name in text.split()},
            "model_type": "qwen2",
            "layer_types": ["full_attention"] * config["num_hidden_layers"],
            "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
        },
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "hidden_size": config["mm_hidden_size"],
            "model_args": {"inference_mode": True, **arguments},
        },
    }


def write_mlx_vlm(
    hub: Path,
    folder: Path,
    *,
    projector: str = "mm_projector",
    quantization: dict[str, Any] | None = None,
    per_layer: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """An inference-form folder as mlx-vlm's convert writes it.

    Args:
        projector: what the projector's tensors begin with.
        quantization: arguments of mx.quantize for every Linear and embedding whose width they divide.
        per_layer: arguments for single layers, by their name in this layout.
    """
    config, tensors = _config(hub), {}
    for name, array in read_hub(hub).items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.startswith(TOWER):
            name = name.removeprefix(TOWER)
            if array.ndim == 4:
                array = array.transpose(0, 2, 3, 1)
            elif "layer_scale" in name:
                array = array.transpose(1, 2, 0)
            name = "vision_tower.vision_model." + name.replace("patch_embed", "patch_embed.blocks")
        elif name.startswith("model.mm_projector."):
            name = name.replace("model.mm_projector", projector)
        else:
            name = f"language_model.{name}"
        if name != "language_model.lm_head.weight" or not config["tie_word_embeddings"]:
            tensors[name] = array
    return _write_quantized(folder, hub, tensors, config, quantization, per_layer)


def write_apple_export(hub: Path, folder: Path, *, quantization: dict[str, Any] | None = None) -> Path:
    """Apple's export for its app, without the Core ML package that holds the tower."""
    config, tensors = _config(hub), {}
    for name, array in read_hub(hub).items():
        if name.startswith("model.mm_projector."):
            tensors[name.replace("model.mm_projector.", "multi_modal_projector.linear_")] = array
        elif not name.startswith(TOWER) and (name != "lm_head.weight" or not config["tie_word_embeddings"]):
            tensors[f"language_model.{name}"] = array
    return _write_quantized(folder, hub, tensors, config, quantization, None)


def write_timm_tower(hub: Path, folder: Path, *, prefix: str = "", others: Tensors | None = None) -> Path:
    """A tower alone in timm's names, with CLIP's head as timm's classifier and, for CLIP, `others` beside it."""
    tensors = dict(others or {})
    for name, array in read_hub(hub).items():
        if name == f"{TOWER}head.proj":
            tensors[f"{prefix}head.fc.weight"] = array.T
            tensors[f"{prefix}head.fc.bias"] = mx.zeros(array.shape[1])
        elif name.startswith(TOWER):
            tensors[prefix + timm_name(name.removeprefix(TOWER))] = array
    return _write(folder, hub, tensors, {})


def write_apple_tower(hub: Path, folder: Path, *, prefix: str = "", others: Tensors | None = None) -> Path:
    """A tower alone in Apple's names, as MobileCLIP's first version has it under `image_encoder.model.`."""
    tower = {name: array for name, array in read_hub(hub).items() if name.startswith(TOWER)}
    tensors = {prefix + name.removeprefix(TOWER): array for name, array in tower.items()}
    return _write(folder, hub, tensors | (others or {}), {})


def _without_head(tensors: Tensors) -> Tensors:
    return {name: array for name, array in tensors.items() if name != f"{TOWER}head.proj"}


def _config(hub: Path) -> dict[str, Any]:
    return json.loads((hub / "config.json").read_text(encoding="utf-8"))


def _write_quantized(
    folder: Path,
    hub: Path,
    tensors: Tensors,
    config: dict[str, Any],
    quantization: dict[str, Any] | None,
    per_layer: dict[str, dict[str, Any]] | None,
) -> Path:
    if quantization is not None:
        config["quantization"] = config["quantization_config"] = {**quantization, **(per_layer or {})}
        tensors = _quantize(tensors, lambda layer: (per_layer or {}).get(layer, quantization))
    return _write(folder, hub, tensors, config)


def _quantize(tensors: Tensors, how: Callable[[str], dict[str, Any]]) -> Tensors:
    found: Tensors = {}
    for name, array in tensors.items():
        layer, _, part = name.rpartition(".")
        arguments = how(layer)
        if part != "weight" or array.ndim != 2 or array.shape[1] % arguments["group_size"]:
            found[name] = array
            continue
        packed, scales, *biases = mx.quantize(array, **arguments)
        found |= {name: packed, f"{layer}.scales": scales} | {f"{layer}.biases": each for each in biases}
    return found


def _write(folder: Path, hub: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: mx.contiguous(array) for name, array in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), contiguous, {"format": "pt"})
    _write_json(folder / "config.json", config)
    for name in _TOKENIZER_FILES:
        if (hub / name).exists():
            shutil.copyfile(hub / name, folder / name)
    return folder


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
