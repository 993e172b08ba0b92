"""What a checkpoint says about itself: config.json as typed numbers, or a clear refusal.

Every width, depth and constant of the network comes from here. Fields carry Hugging Face's names.
Reads the hub's LlavaQwen2 config and the one our converter writes (the same, with `vision_config` spelled out).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_fastvlm.errors import ConfigError
from mlx_fastvlm.json_file import read_json_object
from mlx_fastvlm.quantization import QuantizationConfig

MODEL_TYPE = "llava_qwen2"
IMAGE_TOKEN_INDEX = -200  # LLaVA's placeholder id: not a vocabulary entry, replaced by image feature rows
_ATTENTION_STAGES = (3, 4)  # stages 4 and 5 of five mix tokens by self-attention


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the FastViTHD tower (fastvit.py's `fastvithd` in Apple's ml-fastvlm).

    Attributes:
        image_size: side of the square input in pixels, a multiple of `patch_size`.
        patch_size: total downsampling, 64 for five stages behind a stride-4 stem.
        embed_dims: channels of the five stages.
        layers: blocks in each of the five stages.
        mlp_ratios: hidden width of each stage's ConvFFN over its channels.
        cls_ratio: output channels over the last stage's channels.
        head_dim: width of one attention head in stages 4 and 5.
    """

    image_size: int = 1024
    patch_size: int = 64
    embed_dims: tuple[int, ...] = (96, 192, 384, 768, 1536)
    layers: tuple[int, ...] = (2, 12, 24, 4, 2)
    mlp_ratios: tuple[int, ...] = (4, 4, 4, 4, 4)
    cls_ratio: float = 2.0
    head_dim: int = 32

    def __post_init__(self) -> None:
        for name in ("embed_dims", "layers", "mlp_ratios"):
            if len(getattr(self, name)) != 5:
                raise ConfigError(
                    f"vision_config.{name} has {len(getattr(self, name))} entries; FastViTHD has 5 stages."
                )
        if self.patch_size != 64:
            raise ConfigError(f"vision_config.patch_size is {self.patch_size}; FastViTHD downsamples by 64.")
        if self.image_size <= 0 or self.image_size % self.patch_size:
            raise ConfigError(
                f"The image size is {self.image_size}; it must be a positive multiple of {self.patch_size}."
            )
        for stage, (width, following) in enumerate(zip(self.embed_dims, self.embed_dims[1:], strict=False)):
            if following % width:
                raise ConfigError(
                    f"vision_config.embed_dims[{stage + 1}] = {following} is not a multiple of embed_dims[{stage}] = {width}."
                )
        for stage in _ATTENTION_STAGES:
            if self.embed_dims[stage] % self.head_dim:
                raise ConfigError(
                    f"vision_config.embed_dims[{stage}] = {self.embed_dims[stage]} is not a multiple of "
                    f"head_dim {self.head_dim}."
                )

    @property
    def hidden_size(self) -> int:
        """Width of one image feature row (3072 in the released models)."""
        return int(self.embed_dims[-1] * self.cls_ratio)

    @property
    def num_image_tokens(self) -> int:
        """Feature rows for one image of `image_size`."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """Shape of the Qwen2 decoder."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}."
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class FastVLMConfig:
    """A whole model: tower, projector and decoder, plus how the checkpoint was trained to see pictures.

    Attributes:
        image_aspect_ratio: LLaVA's word for how a picture becomes square: "pad" or "crop" (any other value of the hub).
        eos_token_id: ids that end an answer, from config.json.
        quantization: which layers are stored quantized; None if none is.
        image_grid_pinpoints, mm_patch_merge_type: how pictures are tiled where that is asked for (`tiling.Tiling`).
    """

    text_config: TextConfig
    vision_config: VisionConfig
    image_aspect_ratio: str = "pad"
    eos_token_id: tuple[int, ...] = ()
    quantization: QuantizationConfig | None = None
    image_grid_pinpoints: Any = None
    mm_patch_merge_type: Any = "flat"

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> FastVLMConfig:
        """Build from a parsed config.json.

        Raises:
            ConfigError: not FastVLM, or a field is missing or of the wrong kind.
        """
        _refuse_what_is_not_fastvlm(raw)
        vision_config = _read_vision_config(raw)
        text_config = _read_text_config(raw)
        mm_hidden_size = raw.get("mm_hidden_size", vision_config.hidden_size)
        if mm_hidden_size != vision_config.hidden_size:
            raise ConfigError(
                f"config.json says mm_hidden_size {mm_hidden_size}, but its vision tower puts out "
                f"{vision_config.hidden_size} channels."
            )
        eos = raw.get("eos_token_id")
        return cls(
            text_config=text_config,
            vision_config=vision_config,
            image_aspect_ratio="pad" if raw.get("image_aspect_ratio", "pad") == "pad" else "crop",
            eos_token_id=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            quantization=QuantizationConfig.from_dict(raw["quantization"]) if raw.get("quantization") else None,
            image_grid_pinpoints=raw.get("image_grid_pinpoints"),
            mm_patch_merge_type=raw.get("mm_patch_merge_type", "flat"),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> FastVLMConfig:
        """Read `folder`/config.json. Raises ConfigError as `from_dict` does."""
        return cls.from_dict(read_config_dict(folder))


def read_config_dict(folder: Path, origin: Path | None = None) -> dict[str, Any]:
    """Parse `folder`/config.json without interpreting it.

    Args:
        folder: where it is read.
        origin: what messages call the folder, where that is a temporary copy.

    Raises:
        ConfigError: there is no such file, or it is not a JSON object.
    """
    shown = origin or folder
    return read_json_object(
        folder / "config.json",
        ConfigError,
        if_missing=f"{shown} has no config.json, so it is not a model folder.",
        shown=shown / "config.json",
    )


def vision_config_dict(config: VisionConfig) -> dict[str, Any]:
    """`config` as the `vision_config` object of a config.json."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def _refuse_what_is_not_fastvlm(raw: dict[str, Any]) -> None:
    model_type = raw.get("model_type")
    tower = raw.get("mm_vision_tower")
    wanted = (
        f"expected a FastVLM checkpoint in LlavaQwen2 layout (model_type {MODEL_TYPE!r}), such as apple/FastVLM-0.5B."
    )
    if model_type != MODEL_TYPE:
        raise ConfigError(f"config.json says model_type {model_type!r}; {wanted}")
    if not isinstance(tower, str) or not tower.startswith("mobileclip_l"):
        raise ConfigError(
            f"config.json says mm_vision_tower {tower!r}; {wanted[:-1]}, whose tower is 'mobileclip_l_1024'."
        )
    for field, supported in (
        ("mm_projector_type", ("mlp2x_gelu", None)),
        ("hidden_act", ("silu", None)),
        ("use_sliding_window", (False, None)),
        ("rope_scaling", (None,)),
        ("mm_vision_select_feature", ("patch", None)),
        ("mm_use_im_start_end", (False, None)),
        ("mm_use_im_patch_token", (False, None)),
    ):
        if raw.get(field) not in supported:
            raise ConfigError(f"config.json says {field} {raw[field]!r}; FastVLM uses {supported[0]!r}.")


def _read_vision_config(raw: dict[str, Any]) -> VisionConfig:
    given = raw.get("vision_config") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"config.json's vision_config is a {type(given).__name__}; expected an object.")
    side = re.search(r"_(\d+)$", raw["mm_vision_tower"])
    values: dict[str, Any] = {"image_size": int(side[1])} if side else {}
    for name in ("embed_dims", "layers", "mlp_ratios"):
        if name in given:
            if not isinstance(given[name], list):
                raise ConfigError(
                    f"config.json's vision_config.{name} is {given[name]!r}; expected a list of 5 numbers."
                )
            values[name] = tuple(_positive_int(n, f"vision_config.{name}") for n in given[name])
    for name in ("image_size", "patch_size", "head_dim"):
        if name in given:
            values[name] = _positive_int(given[name], f"vision_config.{name}")
    if "cls_ratio" in given:
        values["cls_ratio"] = _positive_float(given["cls_ratio"], "vision_config.cls_ratio")
    return VisionConfig(**values)


def _read_text_config(raw: dict[str, Any]) -> TextConfig:
    # transformers 5 moved rope_theta into rope_parameters; older files have it at the top.
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"config.json's rope_parameters is a {type(rope).__name__}; expected an object.")
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(
            f"config.json asks for rope_type {rope['rope_type']!r}; FastVLM uses plain rotary embeddings."
        )
    sizes = {
        name: _positive_int(_required(raw, name), name)
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
        )
    }
    return TextConfig(
        **sizes,
        rms_norm_eps=_positive_float(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        rope_theta=_positive_float(raw.get("rope_theta", rope.get("rope_theta", 1e6)), "rope_theta"),
        max_position_embeddings=_positive_int(raw.get("max_position_embeddings", 32768), "max_position_embeddings"),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
    )


def _required(raw: dict[str, Any], name: str) -> Any:
    if name not in raw:
        raise ConfigError(f"config.json has no {name!r}; it is incomplete. Download the checkpoint again.")
    return raw[name]


def _positive_int(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigError(f"config.json says {name} = {value!r}; expected a whole number above zero.")
    return value


def _positive_float(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"config.json says {name} = {value!r}; expected a number above zero.")
    return float(value)
