"""Choosing bits: named recipes, a choice of one's own for each part, and which layers are left as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.errors import ConfigError, OptionError
from mlx_fastvlm.layers import quantizable_layers
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.quantization import MODES, PARTS, QuantizationConfig, Storage

_DEFAULT_GROUP = 64


@dataclass(frozen=True)
class Recipe:
    """Bits by part of the model.

    Attributes:
        name: what `--quantize` calls it.
        summary: one line for --help and the docs.
        parts: part (see quantization.PARTS) → storage, or None to leave it as it is.
        sensitive: storage of the decoder layers whose errors cost most: the output of attention's values (q/k/v) and
            of the MLP (down_proj) in the first and last eighth of the layers. None gives them their part's.
    """

    name: str
    summary: str
    parts: Mapping[str, Storage | None]
    sensitive: Storage | None = None


def _recipe(
    name: str, summary: str, decoder: str, embeddings: str, vision_tower: str, sensitive: str = "none"
) -> Recipe:
    parts = {"decoder": decoder, "embeddings": embeddings, "projector": "none", "vision_tower": vision_tower}
    read = {part: parse_storage(text) for part, text in parts.items()}
    return Recipe(name, summary, read, parse_storage(sensitive))


def parse_storage(text: str) -> Storage | None:
    """Read a choice for one part: "8", "4:32" (bits and group size), "mxfp8", "mxfp4", "nvfp4" or "none".

    Raises:
        OptionError: it is none of these.
    """
    if text == "none":
        return None
    if text in MODES and text != "affine":
        (bits,), (group_size,) = MODES[text]
        return Storage(bits, group_size, text)
    bits, colon, group_size = text.partition(":")
    try:
        return Storage(int(bits), int(group_size) if colon else _DEFAULT_GROUP)
    except (ValueError, ConfigError):
        raise OptionError(
            f"{text!r} is no way to quantize; expected 2, 3, 4, 5, 6 or 8 bits, with a group size of 32, 64 or 128 "
            "behind a colon if not 64 (4:32), or mxfp8, mxfp4, nvfp4, none."
        ) from None


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _recipe("int8", "8 bits everywhere but the projector", "8", "8", "8"),
        _recipe("int6", "6 bits in the decoder, 8 in embeddings and tower", "6", "8", "8"),
        _recipe("int5", "5 bits in the decoder, 8 in embeddings and tower", "5", "8", "8"),
        _recipe("int4", "4 bits in the decoder, 8 in embeddings and tower", "4", "8", "8"),
        _recipe("mixed-4-8", "int4 with the decoder's sensitive layers at 8 bits", "4", "8", "8", sensitive="8"),
        _recipe("int4-all", "4 bits everywhere but the projector", "4", "4", "4"),
        _recipe("int3", "3 bits in the decoder, groups of 32; 6 in the embeddings", "3:32", "6", "8"),
        _recipe("int2", "2 bits in the decoder, groups of 32; for experiments", "2:32", "6", "8"),
        # Measured on the demo model: mxfp8 costs the tower 30 times what 8 affine bits do, at the same size.
        _recipe("mxfp8", "microscaling float of 8 bits in the decoder, int8 elsewhere", "mxfp8", "8", "8"),
        _recipe("mxfp4", "microscaling float of 4 bits in the decoder, int8 elsewhere", "mxfp4", "8", "8"),
        _recipe("nvfp4", "NVIDIA's float of 4 bits in the decoder, int8 elsewhere", "nvfp4", "8", "8"),
    )
}


def choose(name: str, **parts: str | None) -> Recipe:
    """A recipe by name, some of its parts chosen otherwise.

    Args:
        name: one of RECIPES.
        parts: part → `parse_storage` text; None keeps the recipe's choice.

    Raises:
        OptionError: there is no such recipe, or a choice is not understood.
    """
    if name not in RECIPES:
        raise OptionError(f"There is no recipe {name!r}; choose one of {', '.join(RECIPES)}.")
    own = {part: text for part, text in parts.items() if text is not None}
    if not own:
        return RECIPES[name]
    assert set(own) <= set(PARTS)
    recipe = RECIPES[name]
    spelled = ", ".join(f"{part} {text}" for part, text in sorted(own.items()))
    chosen = dict(recipe.parts) | {part: parse_storage(text) for part, text in own.items()}
    return replace(recipe, name=f"{name} ({spelled})", parts=chosen)


def plan(config: FastVLMConfig, recipe: Recipe) -> QuantizationConfig:
    """What a recipe means for one model: every layer that is not stored as its part is named.

    Raises:
        OptionError: nothing at all would be quantized.
    """
    quantization = QuantizationConfig(recipe.name, dict(recipe.parts), {})
    depth = config.text_config.num_hidden_layers
    edge = max(1, depth // 8)
    quantized = []
    for path, module in quantizable_layers(FastVLM(replace(config, quantization=None))):
        storage = quantization.storage(path)
        if storage and recipe.sensitive and _is_sensitive(path, edge, depth):
            storage = quantization.layers[path] = recipe.sensitive
        # Rows that groups do not divide evenly stay as they are: the tower's first stage, 96 wide, in groups of 64.
        if storage and module.weight.shape[1] % storage.group_size:
            storage = quantization.layers[path] = None
        if storage:
            quantized.append(path)
    if not quantized:
        raise OptionError(f"Recipe {recipe.name} leaves every layer of this model as it is.")
    return quantization


def _is_sensitive(path: str, edge: int, depth: int) -> bool:
    parts = path.split(".")
    if parts[:2] != ["language_model", "layers"] or parts[-1] not in ("qkv_proj", "down_proj"):
        return False
    return int(parts[2]) < edge or int(parts[2]) >= depth - edge
