"""Runs a built kernel: writes the job, starts the program in a process of its own, reads outputs and report.

A process of its own because a kernel may crash or never end; the caller's survives.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from tests.metal_emulator.capture import CapturedKernel
from tests.metal_emulator.errors import EmulationError

JOB_VERSION = 1
CONSTANT, INPUT, OUTPUT = 0, 1, 2  # runtime/memory.h: Space
ORDERS = {"forward": 0, "reversed": 1}
SEEDED = 2
THREADGROUP_MEMORY = 32 << 10  # bytes, on every Apple GPU so far
SHARED_MEMORY = Path("/dev/shm")

NUMPY = {
    mx.bool_: np.bool_,
    mx.uint8: np.uint8,
    mx.uint16: np.uint16,
    mx.uint32: np.uint32,
    mx.uint64: np.uint64,
    mx.int8: np.int8,
    mx.int16: np.int16,
    mx.int32: np.int32,
    mx.int64: np.int64,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,  # its bits: numpy has no bfloat16
    mx.float32: np.float32,
    mx.complex64: np.complex64,
}


@dataclass(frozen=True)
class Buffer:
    """One buffer of a launch: its bytes, or for an output without a first value its size."""

    name: str
    space: int
    element_bytes: int
    size: int
    content: bytes | None


@dataclass(frozen=True)
class Outcome:
    """What the program left: arrays and its report (seconds, counts, findings, ...)."""

    outputs: list[mx.array]
    report: dict


def to_numpy(array: mx.array) -> np.ndarray:
    """The array's elements; bfloat16 as its bits."""
    if array.dtype not in NUMPY:
        raise EmulationError(f"Metal kernels have no {array.dtype}")
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def from_numpy(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The inverse of to_numpy."""
    return mx.array(array).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(array)


def row_contiguous_strides(shape: tuple[int, ...]) -> list[int]:
    """Strides in elements of an array without gaps, last axis fastest."""
    strides, size = [], 1
    for length in reversed(shape):
        strides.insert(0, size)
        size *= length
    return strides


def input_buffers(kernel: CapturedKernel, names: list[str], inputs: list[mx.array]) -> list[Buffer]:
    """The buffers of the inputs, with shapes and strides where the kernel asks for them, in MLX's order.

    Raises:
        EmulationError: an input of a dtype that Metal lacks.
    """
    spaces = {parameter.name: parameter.space for parameter in kernel.parameters}
    buffers = []
    for name, array, (shape, strides, dimensions) in zip(names, inputs, kernel.shape_infos, strict=True):
        elements, steps = strided_elements(array, kernel.row_contiguous)
        space = INPUT if spaces[name] == "device" else CONSTANT
        buffers.append(Buffer(name, space, elements.itemsize, elements.nbytes, elements.tobytes()))
        if array.ndim == 0:
            continue
        if shape:
            buffers.append(_numbers(f"{name}_shape", "i", array.shape))
        if strides:
            buffers.append(_numbers(f"{name}_strides", "q", steps))
        if dimensions:
            buffers.append(_numbers(f"{name}_ndim", "i", [array.ndim]))
    return buffers


def strided_elements(array: mx.array, row_contiguous: bool) -> tuple[np.ndarray, list[int]]:
    """The memory behind an input and its strides in elements.

    Without `row_contiguous` MLX passes an array as it lies; elements between those of the array are zeros here.

    Raises:
        EmulationError: a negative stride.
    """
    elements = to_numpy(array)
    contiguous = row_contiguous_strides(array.shape)
    if row_contiguous or not array.size:
        return np.ascontiguousarray(elements), contiguous
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    steps = [step // elements.itemsize for step in memoryview(bits).strides or ()]
    if any(step < 0 for step in steps):
        raise EmulationError("an input with negative strides cannot be emulated; pass a copy")
    last = sum((length - 1) * step for length, step in zip(array.shape, steps, strict=True))
    memory = np.zeros(last + 1, elements.dtype)
    view = np.lib.stride_tricks.as_strided(memory, array.shape, [step * elements.itemsize for step in steps])
    view[...] = elements
    return memory, steps


def output_buffers(names: list[str], shapes: list, dtypes: list[mx.Dtype], init_value: float | None) -> list[Buffer]:
    """The buffers of the outputs; without `init_value` their memory is uninitialized."""
    buffers = []
    for name, shape, dtype in zip(names, shapes, dtypes, strict=True):
        if dtype not in NUMPY:
            raise EmulationError(f"Metal kernels have no {dtype}")
        element = np.dtype(NUMPY[dtype]).itemsize
        content = None if init_value is None else to_numpy(mx.full(shape, init_value, dtype)).tobytes()
        buffers.append(Buffer(name, OUTPUT, element, int(np.prod(shape, dtype=np.int64)) * element, content))
    return buffers


def job(kernel: CapturedKernel, buffers: list[Buffer], order: str | int, workers: int) -> bytes:
    """The job file that runtime/main.cpp reads."""
    kind, seed = (ORDERS[order], 0) if isinstance(order, str) else (SEEDED, order)
    head = struct.pack("<I3I3I", JOB_VERSION, *kernel.grid, *kernel.threadgroup)
    head += struct.pack("<4I", kind, seed & 0xFFFFFFFF, workers, THREADGROUP_MEMORY)
    head += struct.pack("<IQ", len(buffers), sum(buffer.size for buffer in buffers))
    parts = [head]
    for buffer in buffers:
        name = buffer.name.encode()
        known = int(buffer.content is not None)
        parts.append(struct.pack("<2IQ2I", buffer.space, known, buffer.size, buffer.element_bytes, len(name)))
        parts.append(name)
        parts.append(buffer.content or b"")
    return b"".join(parts)


def run(
    program: Path,
    kernel: CapturedKernel,
    buffers: list[Buffer],
    shapes: list,
    dtypes: list[mx.Dtype],
    order: str | int,
    workers: int,
    timeout: float,
) -> Outcome:
    """Runs the program once.

    Args:
        program: what compiler.build made.
        kernel: what it was made of.
        buffers: inputs, then outputs, in the order of the signature.
        shapes: of the outputs.
        dtypes: of the outputs.
        order: "forward", "reversed" or a seed: the order in which threads and threadgroups run.
        workers: threadgroups that run at the same time (mode "run").
        timeout: seconds after which the program is stopped; the report then has a finding of kind "timeout".

    Raises:
        EmulationError: the program ended without a report.
    """
    shared = SHARED_MEMORY if SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared, prefix="metal-emulator-") as folder:
        paths = [Path(folder) / name for name in ("job", "outputs", "report")]
        paths[0].write_bytes(job(kernel, buffers, order, workers))
        try:
            ended = subprocess.run([program, *paths], capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return Outcome([mx.zeros(s, d) for s, d in zip(shapes, dtypes, strict=True)], _timeout_report(timeout))
        if not paths[2].exists():
            raise EmulationError(
                f"the emulator ended without a report (exit status {ended.returncode}): {ended.stderr.strip()[:2000]}"
            )
        report = json.loads(paths[2].read_text())
        return Outcome(_read_outputs(paths[1].read_bytes(), shapes, dtypes), report)


def _numbers(name: str, kind: str, values) -> Buffer:
    content = struct.pack(f"<{len(values)}{kind}", *values)
    return Buffer(name, CONSTANT, struct.calcsize(kind), len(content), content)


def _read_outputs(content: bytes, shapes: list, dtypes: list[mx.Dtype]) -> list[mx.array]:
    outputs, start = [], 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        count = int(np.prod(shape, dtype=np.int64))
        elements = np.frombuffer(content, NUMPY[dtype], count, start).reshape(shape)
        outputs.append(from_numpy(elements, dtype))
        start += elements.nbytes
    return outputs


def _timeout_report(seconds: float) -> dict:
    finding = {"kind": "timeout", "message": f"still running after {seconds:g} s", "pc": 0, "other_pc": 0}
    finding |= {"file": "", "line": 0, "count": 1}
    return {
        "seconds": seconds,
        "counts": None,
        "barriers": 0,
        "threadgroups": 0,
        "threadgroup_memory": 0,
        "findings": [finding],
    }
