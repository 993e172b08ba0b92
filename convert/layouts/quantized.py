"""Weights that MLX has quantized, presented as the numbers they stand for.

A quantized `X.weight` is stored as packed 32-bit integers beside `X.scales` and, in affine mode, `X.biases`. config.json
gives group size, bits and mode, for all layers and for single ones. What quantizing lost stays lost.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_fastvlm.convert.tensors import Tensors
from mlx_fastvlm.errors import CheckpointError, ConfigError
from mlx_fastvlm.quantization import MODES, Storage

QUANTIZATION_KEYS = ("quantization", "quantization_config")  # mlx-lm and mlx-vlm write both, with the same content

_SCALES, _WEIGHT, _BIASES = ".scales", ".weight", ".biases"
_PACKED = "U32"
_FLOAT8 = "U8"  # how MLX stores 8-bit floating-point scales, which affine mode does not have


def dequantized(tensors: Tensors, raw_config: dict[str, Any]) -> tuple[Tensors, list[str]]:
    """`tensors` with every quantized weight dequantized when it is read, and what the user should know about it.

    Args:
        tensors: the stored tensors; integers come as stored.
        raw_config: config.json with `quantization` or `quantization_config`, names of layers as they are stored.

    Raises:
        CheckpointError: a quantized weight is incomplete or not packed as config.json says.
        ConfigError: weights are quantized, but config.json does not say how.
    """
    layers = [name.removesuffix(_SCALES) for name in tensors.names() if name.endswith(_SCALES)]
    if not layers:
        return tensors, []
    packings = {f"{layer}{_WEIGHT}": _packing(layer, raw_config) for layer in layers}
    view = Dequantized(tensors, packings)
    kinds = sorted({f"{packing.mode} {packing.bits}-bit" for packing in packings.values()})
    notice = (
        f"{len(layers)} weights were stored quantized ({', '.join(kinds)}) and are dequantized: what quantizing lost is "
        "not restored. Convert the unquantized checkpoint for full quality."
    )
    return view, [notice]


class Dequantized:
    """Tensors, some of them quantized by MLX; `[]` and `rows` dequantize only what is asked for.

    Args:
        tensors: the stored tensors.
        packings: name of a quantized weight → how it is packed.
    """

    def __init__(self, tensors: Tensors, packings: dict[str, Storage]):
        self._tensors = tensors
        self._packings = packings
        self._hidden = {name for weight, packing in packings.items() for name in _companions(weight, packing)}
        for weight, packing in packings.items():
            self._check(weight, packing)

    def names(self) -> list[str]:
        return [name for name in self._tensors.names() if name not in self._hidden]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors and name not in self._hidden

    def __getitem__(self, name: str) -> mx.array:
        if name not in self._packings:
            return self._tensors[name]
        return self._dequantize(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        if name not in self._packings:
            return self._tensors.rows(name, start, stop)
        return self._dequantize(name, start, stop)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._tensors.shape(name)
        if name not in self._packings:
            return shape
        return (*shape[:-1], shape[-1] * 32 // self._packings[name].bits)

    def dtype(self, name: str) -> str:
        """A quantized weight's numbers have the type of its scales; MLX gives the others as bfloat16."""
        if name not in self._packings:
            return self._tensors.dtype(name)
        return self._tensors.dtype(_scales(name)) if self._packings[name].has_biases else "BF16"

    def nbytes(self, name: str) -> int:
        companions = _companions(name, self._packings[name]) if name in self._packings else ()
        return sum(self._tensors.nbytes(part) for part in (name, *companions))

    def _dequantize(self, name: str, start: int, stop: int) -> mx.array:
        packing = self._packings[name]
        packed = self._tensors.rows(name, start, stop)
        assert packed.dtype == mx.uint32, f"{name} came as {packed.dtype}; packed integers must come as stored"
        scales = self._tensors.rows(_scales(name), start, stop)
        biases = self._tensors.rows(_biases(name), start, stop) if packing.has_biases else None
        return mx.dequantize(
            packed,
            scales.astype(mx.float32 if packing.has_biases else mx.uint8),
            biases,
            group_size=packing.group_size,
            bits=packing.bits,
            mode=packing.mode,
        ).astype(mx.float32)

    def _check(self, weight: str, packing: Storage) -> None:
        """Hold the stored types and shapes against config.json, before anything is read."""
        parts = (weight, *_companions(weight, packing))
        missing = [name for name in parts if name not in self._tensors]
        if missing:
            raise CheckpointError(f"{weight} is quantized ({packing.mode}), but {', '.join(missing)} is not stored.")
        (*rows, width), (*_, groups) = self._tensors.shape(weight), self._tensors.shape(_scales(weight))
        if (
            self._tensors.dtype(weight) != _PACKED
            or (self._tensors.dtype(_scales(weight)) == _FLOAT8) == packing.has_biases
            or any(self._tensors.shape(name) != (*rows, groups) for name in parts[1:])
            or width * 32 != groups * packing.group_size * packing.bits
        ):
            stored = ", ".join(
                f"{name} {self._tensors.dtype(name)} {list(self._tensors.shape(name))}" for name in parts
            )
            raise CheckpointError(
                f"{weight} is not quantized as config.json says ({packing.mode}, {packing.bits} bits, groups of "
                f"{packing.group_size}): {stored}."
            )


def _scales(weight: str) -> str:
    return weight.removesuffix(_WEIGHT) + _SCALES


def _biases(weight: str) -> str:
    return weight.removesuffix(_WEIGHT) + _BIASES


def _companions(weight: str, packing: Storage) -> tuple[str, ...]:
    return (_scales(weight), _biases(weight)) if packing.has_biases else (_scales(weight),)


def _packing(layer: str, raw_config: dict[str, Any]) -> Storage:
    """What config.json says about one layer: its own entry, else the entry for all."""
    stated = next((raw_config[key] for key in QUANTIZATION_KEYS if isinstance(raw_config.get(key), dict)), None)
    if stated is None:
        raise ConfigError(
            f"{layer} is stored quantized, but config.json has no 'quantization' that says how. Download it again."
        )
    own = stated.get(layer)
    # A layer's entry of False would mean "not quantized"; its scales say otherwise, and the check of widths decides.
    values = stated | own if isinstance(own, dict) else stated
    group_size, bits, mode = values.get("group_size"), values.get("bits"), values.get("mode", "affine")
    try:
        return Storage(bits, group_size, mode)
    except (ConfigError, TypeError):  # the second for a mode that is a list or an object
        raise ConfigError(
            f"config.json says that {layer} is quantized with group_size {group_size!r}, bits {bits!r} and mode {mode!r}, "
            f"which MLX does not have; its modes are {', '.join(MODES)}."
        ) from None
