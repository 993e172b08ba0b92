"""The vision tower out of fastvithd.mlpackage, which is where Apple's exports (FastVLM-0.5B-fp16, …) keep it.

The package holds a graph of operations and the constants they read. Core ML's compiler names most constants after the
parameters they were; some it folds and renames: a BatchNorm into the 7×7 before it, a layer scale into fc2, the norm's
weight and bias into a batch_norm of their own. Those are found by what they are connected to, never by their shape, and
presented as `unfold` does: folded, beside an identity.

The graph is read with coremltools, on any system; the numbers straight from weight.bin, when they are asked for. Checked
with packages that coremltools 8.2 (Apple's) and 9.0 made of towers in Apple's module structure.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fastvlm.config import FastVLMConfig, VisionConfig
from mlx_fastvlm.errors import CheckpointError

from .key_map import tower_sites
from .layouts.apple_export import exported_checkpoint
from .reparameterize import ConvBatchNormSite, ConvSite, ScaledLinearSite
from .tensors import Tensors
from .unfold import IDENTITY_BATCH_NORM

_SUFFIXES = ("", "_to_fp16")  # the second where the package computes in float16
_MOVES = ("reshape", "transpose", "cast")  # operations that carry numbers on as they are
_BLOB_SENTINEL, _BLOB_HEADER = 0xDEADBEEF, struct.Struct("<IIQQ")  # sentinel, type, bytes, offset of the data
_MODEL_FOLDER = Path("Data") / "com.apple.CoreML"
# What a graph that breaks every rule may lead to while it is walked: a wrong size or encoding, a missing output, a circle.
_DAMAGE = (ValueError, LookupError, ArithmeticError, AttributeError, RecursionError, OSError)


def read_tower(mlpackage: Path, config: dict[str, Any]) -> Tensors:
    """The tower of a Core ML package under LlavaQwen2's names.

    Args:
        mlpackage: the folder fastvithd.mlpackage.
        config: the model's config.json in LlavaQwen2's words.

    Returns:
        Everything that `key_map.tower_sites` asks for, in inference form; numbers are read when they are asked for.

    Raises:
        CheckpointError: coremltools is not installed, or the package does not hold this tower; the message names the
            checkpoint to convert instead.
    """
    whole = FastVLMConfig.from_dict(config)
    instead = exported_checkpoint(whole.text_config.hidden_size)
    try:
        return _CoreMLTower(dict(_tower_tensors(_Program(mlpackage), whole.vision_config)))
    except (_UnexpectedGraph, *_DAMAGE) as error:
        raise CheckpointError(
            f"{mlpackage} does not hold FastViTHD as Apple exports it ({error}); convert {instead} instead."
        ) from None
    except ImportError as error:
        raise CheckpointError(
            f"{mlpackage} needs coremltools ({error}): pip install 'mlx-fastvlm[coreml]', or convert {instead} instead."
        ) from None


class _UnexpectedGraph(Exception):
    """The graph is not the one that Apple's export gives; says where."""


@dataclass(frozen=True)
class _Constant:
    """A constant of the graph; `read` gives rows start … stop − 1."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], np.ndarray]

    @classmethod
    def full(cls, shape: tuple[int, ...], value: float, dtype: str) -> _Constant:
        return cls(shape, dtype, lambda start, stop: np.full((stop - start, *shape[1:]), value, np.float32))

    def array(self) -> np.ndarray:
        return self.read(0, self.shape[0])


class _CoreMLTower:
    """`Tensors` over constants of a package."""

    def __init__(self, constants: dict[str, _Constant]):
        self._constants = constants

    def names(self) -> list[str]:
        return list(self._constants)

    def __contains__(self, name: str) -> bool:
        return name in self._constants

    def __getitem__(self, name: str) -> mx.array:
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        rows = self._constants[name].read(start, stop).astype(np.float32)
        return mx.array(rows.reshape(stop - start, *self.shape(name)[1:]))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._constants[name].shape

    def dtype(self, name: str) -> str:
        return self._constants[name].dtype

    def nbytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * (2 if self.dtype(name) == "F16" else 4)


class _Program:
    """The graph of a package: which operation puts a value out, and which read it."""

    def __init__(self, mlpackage: Path):
        self._folder = mlpackage / _MODEL_FOLDER
        operations = _read_operations(self._folder / "model.mlmodel")
        self._producer = {output.name: operation for operation in operations for output in operation.outputs}
        self._consumers: dict[str, list[Any]] = {}
        self._by_weight: dict[str, Any] = {}
        for operation in operations:
            for key, argument in operation.inputs.items():
                for name in (value.name for value in argument.arguments):
                    self._consumers.setdefault(name, []).append(operation)
                    if key == "weight":
                        self._by_weight[name] = operation

    def reader(self, parameter: str) -> Any:
        """The convolution or Linear whose weight is this parameter of LlavaQwen2."""
        # Apple exports the module that holds `vision_tower.model`, and dots become underscores.
        name = parameter.removeprefix("model.vision_tower.").replace(".", "_")
        for suffix in _SUFFIXES:
            if name + suffix in self._by_weight:
                return self._by_weight[name + suffix]
        raise _UnexpectedGraph(f"no operation reads {name}")

    def before(self, operation: Any) -> Any:
        """What computes an operation's input."""
        found = self._producer.get(_argument(operation, "x"))
        if found is None:
            raise _UnexpectedGraph(f"nothing computes the input of {_name(operation)}")
        return self.before(found) if found.type in _MOVES else found

    def after(self, operation: Any) -> Any:
        """What an operation's output goes into."""
        found = self._consumers.get(_name(operation), [])
        if len(found) != 1:
            raise _UnexpectedGraph(f"{len(found)} operations read {_name(operation)}, one was expected")
        return self.after(found[0]) if found[0].type in _MOVES else found[0]

    def constant(self, operation: Any, key: str) -> _Constant:
        """The constant that an operation reads as `key`."""
        found = self._producer.get(_argument(operation, key))
        if found is None or found.type != "const":
            kind = found.type if found is not None else "nothing"
            raise _UnexpectedGraph(f"{key} of {_name(operation)} is {kind}, a constant was expected")
        return _read_constant(found, self._folder)

    def factor(self, multiplication: Any) -> _Constant:
        """The constant side of a multiplication."""
        for key in ("x", "y"):
            found = self._producer.get(_argument(multiplication, key))
            if found is not None and found.type == "const":
                return _read_constant(found, self._folder)
        raise _UnexpectedGraph(f"{_name(multiplication)} multiplies by no constant")


def _tower_tensors(program: _Program, config: VisionConfig) -> Iterator[tuple[str, _Constant]]:
    """LlavaQwen2 name → constant, site by site."""
    for site in tower_sites(config):
        if isinstance(site, ConvBatchNormSite):
            yield from _batch_norm_tensors(program, site)
        elif isinstance(site, ConvSite):
            prefix = f"{site.source}.{site.folded_name}"
            yield from _weight_and_bias(program, program.reader(f"{prefix}.weight"), prefix)
        elif isinstance(site, ScaledLinearSite):
            yield from _scaled_linear_tensors(program, site)
        elif site.names[0].endswith(".qkv.weight"):
            yield from _attention_tensors(program, site.names[0])
        # The norm's weight and bias are found from qkv, which reads what it puts out.


def _weight_and_bias(program: _Program, operation: Any, prefix: str) -> Iterator[tuple[str, _Constant]]:
    for part in ("weight", "bias"):
        yield f"{prefix}.{part}", program.constant(operation, part)


def _batch_norm_tensors(program: _Program, site: ConvBatchNormSite) -> Iterator[tuple[str, _Constant]]:
    """The 7×7 before fc1: with its BatchNorm inside it, or before one of its own."""
    found = program.before(program.reader(f"{site.source}.fc1.weight"))
    norm = f"{site.source}.conv.bn"
    if found.type == "batch_norm":
        parts = {"weight": "gamma", "bias": "beta", "running_mean": "mean", "running_var": "variance"}
        yield from ((f"{norm}.{name}", program.constant(found, key)) for name, key in parts.items())
        found = program.before(found)
    else:
        bias = program.constant(found, "bias")
        yield f"{norm}.bias", bias
        for name, value in IDENTITY_BATCH_NORM.items():
            yield f"{norm}.{name}", _Constant.full(bias.shape, value, bias.dtype)
    yield f"{site.source}.conv.conv.weight", program.constant(found, "weight")


def _scaled_linear_tensors(program: _Program, site: ScaledLinearSite) -> Iterator[tuple[str, _Constant]]:
    """A Linear, and its layer scale: inside it, or multiplied by afterwards."""
    if site.source.endswith(".convffn.fc2"):
        activation = program.after(program.reader(f"{site.source[:-1]}1.weight"))
        operation = program.after(activation)
    else:
        operation = program.reader(f"{site.source}.weight")
    yield from _weight_and_bias(program, operation, site.source)
    if site.layer_scale is None:
        return
    following, bias = program.after(operation), program.constant(operation, "bias")
    shape = (bias.shape[0], 1, 1)
    if following.type == "mul":
        yield site.layer_scale, replace(program.factor(following), shape=shape)
    elif following.type == "add":
        yield site.layer_scale, _Constant.full(shape, 1.0, bias.dtype)
    else:
        raise _UnexpectedGraph(f"{site.source} goes into {following.type}; mul or add was expected")


def _attention_tensors(program: _Program, weight: str) -> Iterator[tuple[str, _Constant]]:
    """qkv, and the norm before it, which has become a batch_norm that only scales and shifts."""
    qkv = program.reader(weight)
    yield weight, program.constant(qkv, "weight")
    norm = program.before(qkv)
    expected = {"mean": 0.0, "variance": 1.0}
    if norm.type != "batch_norm" or any(
        (program.constant(norm, key).array() != v).any() for key, v in expected.items()
    ):
        raise _UnexpectedGraph(f"the norm before {weight} is {norm.type}; a batch_norm that only scales was expected")
    if "bias" in qkv.inputs and program.constant(qkv, "bias").array().any():
        raise _UnexpectedGraph(f"{weight} comes with a bias, which FastViTHD does not have")
    prefix = weight.removesuffix("token_mixer.qkv.weight")
    yield f"{prefix}norm.weight", program.constant(norm, "gamma")
    yield f"{prefix}norm.bias", program.constant(norm, "beta")


def _read_operations(model: Path) -> list[Any]:
    """The operations of a package's one function, by coremltools' protobuf classes. Raises ImportError without them."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)  # off macOS it warns that models cannot be run, which nobody wants here
    try:
        import coremltools

        function = coremltools.utils.load_spec(str(model)).mlProgram.functions["main"]
        return list(function.block_specializations[function.opset].operations)
    except ImportError:
        raise
    except Exception as error:  # protobuf and coremltools raise many kinds for a damaged file
        raise _UnexpectedGraph(f"{model.name} cannot be read: {str(error).strip() or type(error).__name__}") from None
    finally:
        logger.setLevel(level)


def _name(operation: Any) -> str:
    return operation.outputs[0].name


def _argument(operation: Any, key: str) -> str | None:
    """What an operation reads as `key`, by name."""
    arguments = operation.inputs[key].arguments if key in operation.inputs else ()
    return arguments[0].name if len(arguments) == 1 else None


def _read_constant(operation: Any, folder: Path) -> _Constant:
    value = operation.attributes["val"]
    tensor = value.type.tensorType
    shape = tuple(int(dimension.constant.size) for dimension in tensor.dimensions)
    kind = type(tensor).DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number[tensor.dataType].name
    kinds = {"FLOAT16": ("F16", np.float16), "FLOAT32": ("F32", np.float32)}
    if kind not in kinds or not shape:
        raise _UnexpectedGraph(f"{_name(operation)} is {kind} {list(shape)}; float numbers were expected")
    dtype, raw_type = kinds[kind]
    if value.WhichOneof("value") == "blobFileValue":
        blob = value.blobFileValue
        path, offset = _find_blob(folder, blob.fileName, blob.offset, math.prod(shape) * np.dtype(raw_type).itemsize)
        return _Constant(shape, dtype, partial(_read_blob, path, offset, np.dtype(raw_type), shape))
    stored = value.immediateValue.tensor
    if dtype == "F16":  # protobuf has no float16: short constants travel as bytes
        array = np.frombuffer(stored.bytes.values, np.float16).reshape(shape)
    else:
        array = np.array(stored.floats.values, np.float32).reshape(shape)
    return _Constant(shape, dtype, lambda start, stop: array[start:stop])


def _find_blob(folder: Path, file_name: str, offset: int, size: int) -> tuple[Path, int]:
    """Where a constant's numbers lie: the blob's own header says it once more, and must agree."""
    path = folder / file_name.removeprefix("@model_path/")
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        raise _UnexpectedGraph(f"{file_name} is not a file of the package")
    with path.open("rb") as file:
        file.seek(offset)
        header = file.read(_BLOB_HEADER.size)
    sentinel, _, stored_size, start = _BLOB_HEADER.unpack(header) if len(header) == _BLOB_HEADER.size else (0, 0, 0, 0)
    if sentinel != _BLOB_SENTINEL or stored_size != size or start + size > path.stat().st_size:
        raise _UnexpectedGraph(f"{path.name} is cut off or damaged")
    return path, start


def _read_blob(path: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
    width = math.prod(shape[1:])
    rows = np.fromfile(path, dtype, count=(stop - start) * width, offset=offset + start * width * dtype.itemsize)
    return rows.reshape(stop - start, *shape[1:])
