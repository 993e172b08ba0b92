"""The runtime's model.safetensors, written block by block: every parameter cast, or quantized, on its way through."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.errors import CheckpointError
from mlx_fastvlm.loading import OnProgress
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.quantization import QuantizationConfig, Storage, part_of

from .reparameterize import AnySite, StackSite
from .tensors import Tensors, row_blocks
from .writer import SafetensorsWriter, Spec

Block = tuple[str, int, mx.array]  # runtime parameter, first row, float32 rows
Packed = tuple[mx.array, ...]  # packed weight, scales and, in affine mode, biases
PACKED_PARTS = ("weight", "scales", "biases")
SUFFIX = ".weight"


@dataclass
class WeightErrors:
    """How far quantized weights are from what they were, by part of the model."""

    _squares: dict[str, list[float]] = field(default_factory=dict)

    def add(self, path: str, rows: mx.array, unpacked: mx.array) -> None:
        """Book rows of the layer at `path`, before and after."""
        sums = self._squares.setdefault(part_of(path), [0.0, 0.0])
        sums[0] += mx.sum(mx.square(unpacked - rows)).item()
        sums[1] += mx.sum(mx.square(rows)).item()

    def relative(self) -> dict[str, float]:
        """Part → root mean square error over the weights' root mean square."""
        return {part: math.sqrt(error / max(size, 1e-30)) for part, (error, size) in self._squares.items()}


def parameter_shapes(config: FastVLMConfig) -> dict[str, tuple[int, ...]]:
    """Runtime parameter name → shape before any quantization, from the model itself."""
    model = FastVLM(replace(config, quantization=None))
    return {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}


def stored_specs(
    shapes: Mapping[str, tuple[int, ...]], dtype: mx.Dtype, quantization: QuantizationConfig | None
) -> dict[str, Spec]:
    """What the file will hold: name → shape and type, quantized layers as their packed arrays."""
    specs: dict[str, Spec] = {}
    for name, shape in shapes.items():
        storage = storage_of(name, shape, quantization)
        if storage is None:
            specs[name] = (shape, dtype)
            continue
        path, (rows, width) = name.removesuffix(SUFFIX), shape
        groups = (rows, width // storage.group_size)
        specs[name] = ((rows, width * storage.bits // 32), mx.uint32)
        specs[f"{path}.scales"] = (groups, dtype if storage.has_biases else mx.uint8)
        if storage.has_biases:
            specs[f"{path}.biases"] = (groups, dtype)
    return specs


def storage_of(name: str, shape: tuple[int, ...], quantization: QuantizationConfig | None) -> Storage | None:
    """How the parameter `name` is quantized; only matrices are."""
    if quantization is None or len(shape) != 2 or not name.endswith(SUFFIX):
        return None
    return quantization.storage(name.removesuffix(SUFFIX))


def site_blocks(
    found: Iterable[AnySite], tensors: Tensors, on_progress: OnProgress | None, what: str = "Converting"
) -> Iterator[Block]:
    """Every site folded, in order; what is only copied or stacked passes by blocks of rows. `what` is for progress."""
    found = list(found)
    total = sum(tensors.nbytes(name) for site in found for name in site.sources(tensors))
    done = 0
    for site in found:
        if isinstance(site, StackSite):
            first = 0
            for name in site.names:
                for start, rows in row_blocks(tensors, name):
                    yield site.target, first + start, rows
                first += tensors.shape(name)[0]
        else:
            for name, array in site.fold(tensors).items():
                yield name, 0, array
        done += sum(tensors.nbytes(name) for name in site.sources(tensors))
        if on_progress:
            on_progress(what, done, total)


def write_weights(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    blocks: Iterable[Block],
    dtype: mx.Dtype,
    quantization: QuantizationConfig | None = None,
    calibrated: Mapping[str, Packed] | None = None,
) -> WeightErrors:
    """Write all parameters.

    Args:
        path: the new file.
        shapes: runtime parameter → shape, unquantized.
        blocks: all rows of all parameters.
        dtype: type of what is not quantized, and of scales and biases in affine mode.
        quantization: which layers to quantize.
        calibrated: layer → what calibration has packed already; its blocks only count for the errors.

    Returns:
        What quantization lost.

    Raises:
        CheckpointError: a weight is NaN or infinite, or too large for float16.
    """
    calibrated = calibrated or {}
    errors = WeightErrors()
    with SafetensorsWriter(path, stored_specs(shapes, dtype, quantization), {"format": "mlx"}) as writer:
        for name, start, rows in blocks:
            if not mx.all(mx.isfinite(rows)).item():
                raise CheckpointError(f"{name} holds NaN or infinity from row {start} on; the checkpoint is damaged.")
            storage = storage_of(name, shapes[name], quantization)
            if storage is None:
                writer.write(name, rows, start)
                continue
            layer = name.removesuffix(SUFFIX)
            if layer in calibrated:
                packed = tuple(array[start : start + len(rows)] for array in calibrated[layer])
            else:
                packed = pack(rows, storage, dtype)
            for part, array in zip(PACKED_PARTS, packed, strict=False):
                writer.write(f"{layer}.{part}", array, start)
            errors.add(layer, rows, unpack(packed, storage))
    return errors


def pack(rows: mx.array, storage: Storage, dtype: mx.Dtype) -> Packed:
    """Quantize rows by rounding to nearest; the groups' numbers are of `dtype` in affine mode."""
    # In the type the groups' numbers will have: the weights are then rounded to the very grid that is stored.
    rows = rows.astype(dtype)
    return tuple(mx.quantize(rows, group_size=storage.group_size, bits=storage.bits, mode=storage.mode))


def unpack(packed: Packed, storage: Storage) -> mx.array:
    """The float32 rows that packed ones stand for."""
    weight, scales, *biases = packed
    how = {"group_size": storage.group_size, "bits": storage.bits, "mode": storage.mode}
    return mx.dequantize(weight, scales, *biases, **how).astype(mx.float32)
