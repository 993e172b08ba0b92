"""Linear layers and embeddings, plain and quantized: one call for all, whatever the weight is stored as."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_fastvlm.kernels import gelu as gelu_op
from mlx_fastvlm.kernels import linear, linear_gelu, quantized_linear, quantized_swiglu
from mlx_fastvlm.quantization import QuantizationConfig, Storage


class Linear(nn.Linear):
    """x @ weightᵀ + bias through the kernels, weight (O, C)."""

    def __call__(self, x: mx.array, gelu: bool = False) -> mx.array:
        """(..., C) → (..., O), through exact GELU if asked."""
        bias = self.bias if "bias" in self else None
        return linear_gelu(x, self.weight, bias) if gelu else linear(x, self.weight, bias)

    def product(self, x: mx.array) -> mx.array:
        """(..., C) → (..., O) without the bias."""
        return linear(x, self.weight)


class QuantizedLinear(nn.Module):
    """A Linear layer whose weight stays quantized in memory.

    Args:
        output_dims, input_dims: O and C.
        storage: how the weight is quantized.
        bias: whether there is one.
    """

    def __init__(self, output_dims: int, input_dims: int, storage: Storage, bias: bool):
        super().__init__()
        _hold_packed(self, output_dims, input_dims, storage)
        if bias:
            self.bias = mx.zeros((output_dims,))

    def __call__(self, x: mx.array, gelu: bool = False) -> mx.array:
        """(..., C) → (..., O), through exact GELU if asked."""
        y = self.product(x)
        if "bias" in self:
            y = y + self.bias
        return gelu_op(y) if gelu else y

    def product(self, x: mx.array) -> mx.array:
        """(..., C) → (..., O) without the bias."""
        return quantized_linear(x, *_unpacked(self))

    def swiglu(self, x: mx.array) -> mx.array:
        """(..., C) → (..., O / 2): SwiGLU of this layer's output, of a stacked gate/up projection without bias."""
        return quantized_swiglu(x, *_unpacked(self))


class Embedding(nn.Embedding):
    """A table of rows that can also serve as the output head."""

    def as_linear(self, x: mx.array) -> mx.array:
        """(..., C) → (..., rows of the table)."""
        return linear(x, self.weight)


class QuantizedEmbedding(nn.Module):
    """An Embedding whose table stays quantized in memory.

    Args:
        rows, width: of the table.
        storage: how it is quantized.
    """

    def __init__(self, rows: int, width: int, storage: Storage):
        super().__init__()
        _hold_packed(self, rows, width, storage)

    def __call__(self, ids: mx.array) -> mx.array:
        """(...) ids → (..., width), in bfloat16 for the float formats, which it holds exactly."""
        weight, scales, biases, group_size, bits, mode = _unpacked(self)
        biases = None if biases is None else biases[ids]
        return mx.dequantize(weight[ids], scales[ids], biases, group_size=group_size, bits=bits, mode=mode)

    def as_linear(self, x: mx.array) -> mx.array:
        """(..., width) → (..., rows of the table)."""
        return quantized_linear(x, *_unpacked(self))


def product_and_bias(layer: nn.Module, x: mx.array) -> tuple[mx.array, mx.array]:
    """A layer's output in two parts, for an op that adds the bias itself; a bias of zeros where it cannot be parted."""
    if isinstance(layer, Linear | QuantizedLinear) and "bias" in layer:
        return layer.product(x), layer.bias
    y = layer(x)
    return y, mx.zeros(y.shape[-1:], y.dtype)


def quantizable_layers(model: nn.Module) -> list[tuple[str, Linear | Embedding]]:
    """Path and module of every layer that can be stored quantized."""
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return [(path, module) for path, module in leaves if isinstance(module, Linear | Embedding)]


def quantize_layers(model: nn.Module, config: QuantizationConfig) -> None:
    """Put quantized layers in the places that `config` names; their weights are still to be loaded."""
    replaced = []
    for path, module in quantizable_layers(model):
        storage = config.storage(path)
        if storage is None:
            continue
        rows, width = module.weight.shape
        if isinstance(module, Linear):
            replaced.append((path, QuantizedLinear(rows, width, storage, "bias" in module)))
        else:
            replaced.append((path, QuantizedEmbedding(rows, width, storage)))

    model.update_modules(tree_unflatten(replaced))


def _hold_packed(module: nn.Module, rows: int, width: int, storage: Storage) -> None:
    """Give a module the arrays of a quantized (rows, width) matrix, as MLX lays them out, and their description."""
    groups = (rows, width // storage.group_size)
    module.weight = mx.zeros((rows, width * storage.bits // 32), mx.uint32)
    module.scales = mx.zeros(groups, mx.float32 if storage.has_biases else mx.uint8)
    if storage.has_biases:
        module.biases = mx.zeros(groups)
    module._storage = storage


def _unpacked(module: nn.Module) -> tuple[mx.array, mx.array, mx.array | None, int, int, str]:
    storage = module._storage
    biases = module.biases if storage.has_biases else None
    return module.weight, module.scales, biases, storage.group_size, storage.bits, storage.mode
