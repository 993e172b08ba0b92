"""How the Linear layers and embeddings of a quantized model are stored: config.json's `quantization`, as typed values.

Written by the converter, read by the runtime; choosing bits is the converter's matter (convert/quantize.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mlx_fastvlm.errors import ConfigError

# Quantized weights' modes in MLX: mode → (bits it has, group sizes it has).
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp8": ((8,), (32,)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
}

# part of the model → prefixes of its layers; the decoder is what is left of language_model.
PARTS: dict[str, tuple[str, ...]] = {
    "vision_tower": ("vision_tower.",),
    "projector": ("mm_projector.",),
    "embeddings": ("language_model.embed_tokens", "language_model.lm_head"),
    "decoder": ("language_model.",),
}


@dataclass(frozen=True)
class Storage:
    """How one weight is quantized.

    Attributes:
        bits: per weight.
        group_size: weights along a row that share a scale.
        mode: "affine" (scale and bias in the model's type per group), "mxfp8", "mxfp4" or "nvfp4" (a byte per group).
    """

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"Quantization mode is {self.mode!r}; expected one of {', '.join(MODES)}.")
        for name, value, known in zip(
            ("bits", "group_size"), (self.bits, self.group_size), MODES[self.mode], strict=True
        ):
            if type(value) is not int or value not in known:
                wanted = ", ".join(map(str, known))
                raise ConfigError(f"Quantization {name} is {value!r}; {self.mode} has {wanted}.")

    @property
    def has_biases(self) -> bool:
        """Whether groups have a bias besides their scale."""
        return self.mode == "affine"

    @property
    def bits_per_weight(self) -> float:
        """What a weight takes with its share of the group's numbers, 16 bits each in affine mode, 8 in the others."""
        return self.bits + (32 if self.has_biases else 8) / self.group_size

    def __str__(self) -> str:
        return f"{self.bits} bits, groups of {self.group_size}" if self.mode == "affine" else self.mode


@dataclass(frozen=True)
class QuantizationConfig:
    """Which layers are quantized, and how.

    Attributes:
        recipe: the name it was chosen by.
        parts: part of the model → its layers' storage; None or absent leaves them as they are.
        layers: full path of a layer → its own storage, in place of its part's.
    """

    recipe: str
    parts: dict[str, Storage | None]
    layers: dict[str, Storage | None]

    @classmethod
    def from_dict(cls, raw: Any) -> QuantizationConfig:
        """Read config.json's `quantization`. Raises ConfigError if it is not what the converter writes."""
        try:
            parts = {part: _read(raw["parts"][part]) for part in raw["parts"]}
            layers = {path: _read(stored) for path, stored in raw["layers"].items()}
            recipe = raw["recipe"]
        except (TypeError, KeyError, AttributeError, ValueError):
            raise ConfigError(
                "config.json's quantization is not as mlx-fastvlm writes it; convert the model again."
            ) from None
        if not set(parts) <= set(PARTS):
            raise ConfigError(f"config.json quantizes {', '.join(parts)}; expected parts of {', '.join(PARTS)}.")
        return cls(recipe, parts, layers)

    def to_dict(self) -> dict[str, Any]:
        """The value of config.json's `quantization`."""
        return asdict(self)

    def storage(self, path: str) -> Storage | None:
        """How the layer at `path` (a module, without ".weight") is stored; None if not quantized."""
        if path in self.layers:
            return self.layers[path]
        return self.parts.get(part_of(path))


def part_of(path: str) -> str:
    """The part of the model a layer belongs to, one of PARTS."""
    return next(part for part, prefixes in PARTS.items() if path.startswith(prefixes))


def _read(stored: Any) -> Storage | None:
    return None if stored is None else Storage(**stored)
