"""Calibration: rounding the decoder's weights so that its outputs on one's own pictures change least (GPTQ).

Each weight matrix is quantized column by column; what rounding a column costs is made up for in the columns to come,
along the inputs that the layer really sees. The layers are done in order, each on the outputs of the quantized ones
before it. Source: GPTQ, arXiv 2210.17323, algorithm 1. mlx-lm's implementation quantizes whole text models with one
number of bits and holds all layers' statistics at once, which suits neither pictures nor recipes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.generate import generate_step, prefill
from mlx_fastvlm.loading import OnProgress
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.quantization import QuantizationConfig, Storage
from mlx_fastvlm.sampling import make_sampler

from .weights import Packed, pack, unpack

PROMPTS = ("Describe this image.",)
ANSWER_TOKENS = 64  # of the model's own answer, which it will write again and again
_DAMPING = 0.01  # of the mean of the diagonal, added to it: keeps the inverse finite (GPTQ, section 3.3)


def calibrate(
    model: FastVLM,
    processor: Processor,
    images: Sequence[Path],
    quantization: QuantizationConfig,
    dtype: mx.Dtype,
    prompts: Sequence[str] = PROMPTS,
    on_progress: OnProgress | None = None,
) -> dict[str, Packed]:
    """Quantize the decoder's layers on pictures.

    Args:
        model: in float32; its decoder's weights are replaced by what they round to.
        processor: the model's.
        images: pictures like those the model will be asked about; some 16 to 64.
        quantization: how each layer will be stored; only affine ones of the decoder's layers are calibrated.
        dtype: type of the groups' scales and biases.
        prompts: questions like those that will be asked; every picture is asked all of them.
        on_progress: told how many images and layers are done.

    Returns:
        Path of a layer → its packed weight, scales and biases.
    """
    layers = model.language_model.layers
    total = len(images) + len(layers)

    def done(count: int) -> None:
        if on_progress:
            on_progress("Calibrating", count, total)

    states = []
    for count, image in enumerate(images, start=1):
        features = model.encode_images(processor.preprocess(image))
        states += [_sample(model, processor, features, prompt) for prompt in prompts]
        done(count)
    packed: dict[str, Packed] = {}
    for index, layer in enumerate(layers):
        caches = [model.make_cache()[index] for _ in states]
        linears = _linears(f"language_model.layers.{index}", quantization)
        with _Watched(layer, linears) as watched:
            mx.eval([layer(x, cache) for x, cache in zip(states, caches, strict=True)])
        for path, (name, storage) in linears.items():
            module = _module(layer, name)
            packed[path] = gptq(module.weight, watched.squares[name], storage, dtype)
            module.weight = unpack(packed[path], storage)
        caches = [model.make_cache()[index] for _ in states]
        states = [layer(x, cache) for x, cache in zip(states, caches, strict=True)]
        mx.eval(states, *packed.values())
        done(len(images) + index + 1)
    return packed


def gptq(weight: mx.array, squares: np.ndarray, storage: Storage, dtype: mx.Dtype) -> Packed:
    """Quantize one matrix in affine mode.

    Args:
        weight: (O, C).
        squares: (C, C), the sum of x xᵀ over the layer's inputs x.
        storage: bits and group size, affine.
        dtype: type of scales and biases.

    Returns:
        Packed weight, scales and biases, as `mx.quantize` lays them out.
    """
    rows = np.array(weight.astype(mx.float32))
    inverse = _upper_factor_of_inverse(squares)
    levels = np.empty(rows.shape, np.uint8)
    scales, biases = [], []
    size = storage.group_size
    for first in range(0, rows.shape[1], size):
        group = slice(first, first + size)
        # The group's own grid, laid over the weights as the columns before have left them.
        _, scale, bias = pack(mx.array(rows[:, group]), storage, dtype)
        scales.append(scale)
        biases.append(bias)
        step, origin = (np.array(array.astype(mx.float32))[:, 0] for array in (scale, bias))
        errors = np.empty((len(rows), size), np.float32)
        for offset in range(size):
            column = first + offset
            levels[:, column], rounded = _round(rows[:, column], step, origin, storage.bits)
            errors[:, offset] = (rows[:, column] - rounded) / inverse[column, column]
            rest = slice(column, first + size)
            rows[:, rest] -= np.outer(errors[:, offset], inverse[column, rest])
        rows[:, first + size :] -= errors @ inverse[group, first + size :]
    return pack_levels(levels, storage.bits), mx.concatenate(scales, axis=1), mx.concatenate(biases, axis=1)


def pack_levels(levels: np.ndarray, bits: int) -> mx.array:
    """(O, C) whole numbers below 2**bits → (O, C · bits / 32) uint32: one stream of bits a row, lowest bit first."""
    stream = np.unpackbits(levels[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(stream.reshape(len(levels), -1), axis=1, bitorder="little")
    return mx.array(packed.view("<u4"))


def _round(column: np.ndarray, step: np.ndarray, origin: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest level of each weight in its group's grid, and the value it stands for."""
    safe = np.where(step == 0, 1, step)  # a group of equal weights has no step
    level = np.clip(np.rint((column - origin) / safe), 0, 2**bits - 1)
    return level.astype(np.uint8), level * step + origin


def _upper_factor_of_inverse(squares: np.ndarray) -> np.ndarray:
    """U with Uᵀ U = (squares + damping)⁻¹, upper triangular: what algorithm 1 needs of the Hessian."""
    damped = squares.astype(np.float64)
    diagonal = np.einsum("ii->i", damped)  # a view
    diagonal[diagonal == 0] = 1.0  # an input that is always zero: its column may be anything
    diagonal += _DAMPING * diagonal.mean()
    inverse = np.linalg.inv(damped)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)


def _sample(model: FastVLM, processor: Processor, features: mx.array, prompt: str) -> mx.array:
    """Embeddings (1, L, hidden) of a picture, a question and the model's own answer."""
    ids = processor.tokenize(prompt, 1)
    embeddings = model.embed(ids, features)
    cache = model.make_cache()
    answer = []
    logits = prefill(model, embeddings, cache)
    for token in generate_step(logits, model, cache, max_tokens=ANSWER_TOKENS, sampler=make_sampler()):
        if token in processor.eos_token_ids:
            break
        answer.append(token)
    if answer:
        embeddings = mx.concatenate([embeddings, model.embed(answer)], axis=1)
    mx.eval(embeddings)
    return embeddings


def calibrated_layers(config: FastVLMConfig, quantization: QuantizationConfig) -> list[str]:
    """Paths of the decoder's layers that calibration quantizes."""
    depth = config.text_config.num_hidden_layers
    return [path for index in range(depth) for path in _linears(f"language_model.layers.{index}", quantization)]


def _linears(prefix: str, quantization: QuantizationConfig) -> dict[str, tuple[str, Storage]]:
    """Full path → (path within the layer, storage) of the matrices of one layer to calibrate."""
    found = {}
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        storage = quantization.storage(f"{prefix}.{name}")
        if storage is not None and storage.mode == "affine":
            found[f"{prefix}.{name}"] = (name, storage)
    return found


def _module(layer: nn.Module, name: str) -> nn.Module:
    for part in name.split("."):
        layer = layer[part]
    return layer


class _Watched:
    """While entered, sums x xᵀ over the inputs of a layer's matrices.

    Attributes:
        squares: path within the layer → (C, C) float32.
    """

    def __init__(self, layer: nn.Module, linears: dict[str, tuple[str, Storage]]):
        self.squares: dict[str, np.ndarray] = {}
        self._places = []
        for name, _ in linears.values():
            parent, _, leaf = name.rpartition(".")
            self._places.append((_module(layer, parent), leaf, name))

    def __enter__(self) -> _Watched:
        for parent, leaf, name in self._places:
            parent[leaf] = _Recorder(parent[leaf], name, self.squares)
        return self

    def __exit__(self, *error: object) -> None:
        for parent, leaf, _ in self._places:
            parent[leaf] = parent[leaf].module


class _Recorder(nn.Module):
    """A Linear layer that keeps the second moments of what it is given."""

    def __init__(self, module: nn.Module, name: str, squares: dict[str, np.ndarray]):
        super().__init__()
        self.module = module
        self._name, self._squares = name, squares

    def __call__(self, x: mx.array) -> mx.array:
        inputs = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        self._squares[self._name] = self._squares.get(self._name, 0) + inputs.T @ inputs
        return self.module(x)
