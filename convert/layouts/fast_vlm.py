"""transformers' `fast_vlm`: timm's tower, Llava's names for projector and decoder, and a config of configs.

Source: transformers 5 models/fast_vlm (configuration_fast_vlm.py, modeling_fast_vlm.py) and its conversion script.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_fastvlm.config import MODEL_TYPE, FastVLMConfig, VisionConfig
from mlx_fastvlm.convert.tensors import Tensors
from mlx_fastvlm.errors import ConfigError
from mlx_fastvlm.json_file import read_json_object

from .layout import LM_HEAD, Canonical, Layout, decoder_table, projector_table, renamed, tower_table
from .timm_names import tower_names

NAME = "transformers' fast_vlm (KamilaMila/FastVLM-0.5B)"
# FastVlmModel, saved without its head, has no "model."; transformers loads it all the same.
MARKERS = ("model.vision_tower.", "vision_tower.", "model.language_model.", "language_model.")

_ARCHITECTURE = "fastvit_mci3"
_TOWER_ARGUMENTS = ("embed_dims", "layers", "mlp_ratios", "cls_ratio")  # timm's and ours have the same names
_FIXED = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
_NOT_QWEN2S_OWN = ("model_type", "architectures", "layer_types", "_name_or_path", "transformers_version", "dtype")


def present(tensors: Tensors, raw_config: dict[str, Any], folder: Path) -> Layout:
    """Raises CheckpointError for unknown tensors, ConfigError for a config that is not FastVLM's."""
    processor = _image_processor(folder)
    crops = processor is not None and _crops(processor)
    image_size = VisionConfig.image_size if processor is None else _image_size(processor)
    config = _config(raw_config, image_size, "crop" if crops else "pad")
    notices = []
    if crops:
        notices.append(
            "The checkpoint's image processor cuts the middle square out of a picture, and so does the converted model. "
            "Apple trained FastVLM on padded pictures: convert the hub's checkpoint (apple/FastVLM-…) to pad."
        )
    return Layout(NAME, config, renamed(tensors, _table(FastVLMConfig.from_dict(config)), NAME), notices)


def _table(config: FastVLMConfig) -> dict[str, Canonical]:
    names = {timm: apple for apple, timm in tower_names(config.vision_config).items()}
    table: dict[str, Canonical] = {}
    for model in ("model.", ""):
        # transformers adds "timm_model." itself where a checkpoint lacks it.
        for tower in ("vision_tower.timm_model.", "vision_tower."):
            table |= tower_table(names, model + tower)
        projector = f"{model}multi_modal_projector"
        table |= projector_table(f"{projector}.linear_1", f"{projector}.linear_2")
        table |= decoder_table(config, f"{model}language_model.", LM_HEAD)
    return table


def _config(raw: dict[str, Any], image_size: int, image_aspect_ratio: str) -> dict[str, Any]:
    """config.json in LlavaQwen2's words."""
    text, vision = (_sub_config(raw, name) for name in ("text_config", "vision_config"))
    for name, fixed in _FIXED.items():
        if raw.get(name, fixed) != fixed:
            raise ConfigError(f"config.json says {name} {raw[name]!r}; FastVLM uses {fixed!r}.")
    if text.get("model_type", "qwen2") != "qwen2":
        raise ConfigError(
            f"config.json says text_config.model_type {text['model_type']!r}; FastVLM's decoder is 'qwen2'."
        )
    tower = _tower_arguments(vision)
    config = {name: value for name, value in text.items() if name not in _NOT_QWEN2S_OWN}
    config |= {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": MODEL_TYPE,
        "image_aspect_ratio": image_aspect_ratio,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": f"mobileclip_l_{image_size}",
        # transformers ties when either level says so.
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    }
    if "hidden_size" in vision:
        config["mm_hidden_size"] = vision["hidden_size"]
    if tower:
        config["vision_config"] = tower
    return config


def _sub_config(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    if not isinstance(value, dict):
        raise ConfigError(f"config.json has no {name!r} object; it is incomplete. Download the checkpoint again.")
    return value


def _tower_arguments(vision: dict[str, Any]) -> dict[str, Any]:
    """What differs from fastvit_mci3, in the words of VisionConfig (which are timm's)."""
    architecture = str(vision.get("architecture"))
    if architecture.partition(".")[0] != _ARCHITECTURE:
        raise ConfigError(
            f"config.json says vision_config.architecture {architecture!r}; FastVLM's tower is {_ARCHITECTURE!r}."
        )
    arguments = dict(vision.get("model_args") or {})
    arguments.pop("inference_mode", None)  # the tensors' names tell the form
    unknown = sorted(set(arguments) - set(_TOWER_ARGUMENTS))
    if unknown:
        raise ConfigError(
            f"config.json's vision_config.model_args sets {', '.join(unknown)}; of {_ARCHITECTURE}'s arguments only "
            f"{', '.join(_TOWER_ARGUMENTS)} may differ."
        )
    return arguments


def _image_processor(folder: Path) -> dict[str, Any] | None:
    """The image processor's settings, from where transformers 4 or 5 saves them; None if there are none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        settings = read_json_object(path, ConfigError)
        if name == "processor_config.json":
            settings = settings.get("image_processor")
        if isinstance(settings, dict):
            _refuse_normalization(settings, name)
            return settings
    return None


def _refuse_normalization(settings: dict[str, Any], file_name: str) -> None:
    """FastViTHD takes pixels in [0, 1] as they are; another scale cannot be expressed after conversion."""
    for name, wanted in (("image_mean", 0.0), ("image_std", 1.0)):
        stated = settings.get(name)
        values = stated if isinstance(stated, list) else [stated]  # one number stands for all channels
        if stated is not None and settings.get("do_normalize", True) and any(value != wanted for value in values):
            raise ConfigError(f"{file_name} says {name} {stated}; FastVLM uses {wanted} for every channel.")


def _crops(processor: dict[str, Any]) -> bool:
    """Whether it cuts out the middle. CLIP's processor does unless told otherwise; Llava's own can pad before that."""
    return processor.get("do_center_crop", True) and not processor.get("do_pad", False)


def _image_size(processor: dict[str, Any]) -> int:
    """Side of the square input in pixels; fast_vlm's config.json does not have it."""
    for name in ("crop_size", "size") if processor.get("do_center_crop", True) else ("size",):
        if processor.get(name) is not None:
            return _side(processor[name], name)
    return VisionConfig.image_size


def _side(size: Any, name: str) -> int:
    """The side that an image processor's `size` or `crop_size` means: a number, a square, or the shortest edge."""
    given = (
        [size[key] for key in ("shortest_edge", "height", "width") if key in size] if isinstance(size, dict) else [size]
    )
    if not given or any(type(side) is not int or side <= 0 or side != given[0] for side in given):
        raise ConfigError(
            f"The image processor's {name} is {size!r}; expected the side of a square in pixels, such as "
            f"{VisionConfig.image_size}."
        )
    return given[0]
