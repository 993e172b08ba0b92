"""Every fast version of an op against plain MLX ops, on the device MLX computes on here.

On a GPU each kernel runs in each of its launch shapes. On a CPU, which has none, what the dispatchers take there does:
loops for large arrays, plain ops for the rest. A model's shapes come from the caller, as the catalog's cases.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fastvlm.kernels import cpu, gpu
from mlx_fastvlm.kernels.catalog import (
    ADD_RMS_NORM,
    DEPTHWISE_CONV,
    DEPTHWISE_PAIR,
    LINEAR_EPILOGUE,
    QUANTIZED_SWIGLU,
    ROTARY_HEADS,
    SELF_ATTENTION,
    SQUEEZE_EXCITE,
    SWIGLU,
    Case,
    distinct,
)
from mlx_fastvlm.kernels.causal_attention import causal_attention
from mlx_fastvlm.kernels.chip import gpu_cores, this_chip
from mlx_fastvlm.kernels.choice import kernel_mode
from mlx_fastvlm.kernels.feed_forward import feed_forward
from mlx_fastvlm.kernels.fused_op import chosen_launch, failure, largest_error, random_array, rounding, without_kernel
from mlx_fastvlm.kernels.gelu import gelu
from mlx_fastvlm.kernels.launch_table import Launch
from mlx_fastvlm.kernels.linear import linear
from mlx_fastvlm.kernels.linear_epilogue import linear_gelu
from mlx_fastvlm.kernels.stem_conv import stem_conv
from mlx_fastvlm.kernels.swiglu_feed_forward import swiglu_feed_forward
from mlx_fastvlm.kernels.timing import time_in_turns
from mlx_fastvlm.kernels.winners import dtype_name

_TIMING_SECONDS = 0.1  # of one op in one shape, both versions

Run = Callable[[], Sequence[mx.array]]


@dataclass(frozen=True)
class Check:
    """One fast version in one shape.

    Attributes:
        op, shape, dtype: what was run; the shape in words.
        launch: the kernel's launch shape; None for what a dispatcher takes, whatever that is.
        error: largest difference over the reference's largest value; None if there is no result, or no number.
        problem: why it fails; None if it passes.
        plain_seconds, seconds: per call, of plain ops and of the fast version; None where not timed.
    """

    op: str
    shape: str
    dtype: str
    launch: Launch | None
    error: float | None
    problem: str | None
    plain_seconds: float | None = None
    seconds: float | None = None

    @property
    def speedup(self) -> float | None:
        """Of the fast version over plain ops; None where not timed."""
        return self.plain_seconds / self.seconds if self.seconds else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def selftest(
    cases: Sequence[Case],
    dtypes: Sequence[mx.Dtype],
    quick: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[Check]:
    """Check ops one after the other, whatever MLX_FASTVLM_KERNELS says.

    Args:
        cases: ops with kernels, in shapes; of those that agree in both, one is checked. Other ops have theirs here.
        dtypes: types to check.
        quick: only the launch shape that is chosen here, not every one.
        on_progress: told what is done of what there is to do.
    """
    where = gpu.backend()
    unlike = distinct(cases)
    todo: list[Callable[[], Sequence[Check]]] = []
    for dtype in dtypes:
        if where is None:
            todo += [partial(_check_case_on_cpu, case, dtype) for case in unlike]
        else:
            todo += [partial(_check_kernel, case, dtype, where, quick) for case in unlike]
        todo += [partial(_check_dispatched, op, shape, run, dtype) for op, shape, run in _other_ops(dtype)]
    for done, check in enumerate(todo):
        if on_progress:
            on_progress("checking", done, len(todo))
        with kernel_mode("auto"):
            checks = check()
        yield from checks
    if on_progress:
        on_progress("checking", len(todo), len(todo))


def ragged_cases() -> list[Case]:
    """Shapes no model has: odd sides, few channels, several images, no multiple of any tile."""
    return [*_ragged_maps((1, 5, 3, 12)), *_ragged_maps((2, 33, 37, 20)), *_ragged_rows()]


def _ragged_maps(shape: tuple[int, ...]) -> Iterator[Case]:
    """Tower ops on a map (B, H, W, C)."""
    channels = shape[-1]
    for kernel, stride, multiplier, with_gelu in ((3, 1, 1, False), (7, 1, 1, False), (3, 2, 1, True), (7, 2, 2, True)):
        outputs = channels * multiplier
        label = f"ragged {kernel}x{kernel}/{stride} x{multiplier} {_size(shape)}"
        options = {"stride": stride, "gelu": with_gelu}
        yield Case(DEPTHWISE_CONV, label, 1, (shape, (outputs, kernel, kernel, 1), (outputs,)), options=options)
    weights = ((channels, 3, 3, 1), (channels,), (channels, 7, 7, 1), (channels,))
    yield Case(DEPTHWISE_PAIR, f"ragged {_size(shape)}", 1, (shape, *weights))
    positions = (shape[0], shape[1] * shape[2], channels)
    weights = ((5, channels), (5,), (channels, 5), (channels,))
    yield Case(SQUEEZE_EXCITE, f"ragged {_size(positions)}", 1, (positions, *weights))


def _ragged_rows() -> Iterator[Case]:
    """Ops on tokens."""
    for shape in ((1, 1, 96), (2, 77, 192)):
        yield Case(SELF_ATTENTION, f"ragged {_size(shape)}", 1, (shape,), options={"head_dim": 32})
    yield Case(ADD_RMS_NORM, "ragged 3x900", 1, ((3, 900), (3, 900), (900,)), options={"eps": 1e-6})
    heads = {"heads": 3, "kv_heads": 1, "base": 1e4}
    yield Case(ROTARY_HEADS, "ragged 2x5x100", 1, ((2, 5, 100), (100,)), offsets=(33, 2), options=heads)
    yield Case(SWIGLU, "ragged 3x72", 1, ((3, 72),))
    weights = ((76, 44), (76,))
    for residual, extra in ((False, (76,)), (True, (70, 76))):
        label = f"ragged 70x44 to 76, {'residual' if residual else 'GELU'}"
        options = {"gelu": not residual, "residual": residual}
        yield Case(LINEAR_EPILOGUE, label, 1, ((70, 44), *weights, extra), options=options)
    for bits in (4, 8):
        options = {"group_size": 32, "bits": bits}
        yield Case(QUANTIZED_SWIGLU, f"ragged 3x576 to 74, {bits} bits", 1, ((3, 576), (74, 576)), options=options)


def environment() -> dict[str, Any]:
    """The machine and the libraries, for a report. May start a program that counts GPU cores."""
    chip = this_chip()
    return {
        "chip": asdict(chip),
        "backend": gpu.backend() or "cpu",
        "gpu_cores": gpu_cores(),
        "cpu_loops": cpu.missing() or "in use",
        "system": platform.platform(),
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "numpy": np.__version__,
    }


def _check_kernel(case: Case, dtype: mx.Dtype, where: str, quick: bool) -> list[Check]:
    """A kernel in all its launch shapes, or in the chosen one; that one is timed."""
    arrays = case.arrays(dtype)
    mx.eval(*arrays)
    chosen = chosen_launch(case.fused_op, where, arrays, case.options)
    launches = case.fused_op.candidates(where, arrays, case.options)
    if quick:
        launches = [chosen] if chosen else launches[:1]
    return [_check_launch(case, arrays, where, launch, timed=launch == chosen) for launch in launches]


def _check_launch(case: Case, arrays: Sequence[mx.array], where: str, launch: Launch, timed: bool) -> Check:
    checked = partial(Check, case.op, case.label, dtype_name(arrays[0].dtype), launch)
    op, options = case.fused_op, case.options
    problem = failure(op, where, launch, op.sample(*arrays, **options), options)
    if problem is not None:
        return checked(None, f"on small ragged arrays: {problem}")
    problem = failure(op, where, launch, arrays, options, compare=False)
    if problem is not None:
        return checked(None, problem)
    found = case.fused(*arrays, launch=launch, where=where)
    error, problem = _compare(found, op.reference(*arrays, **options))
    if not timed:
        return checked(error, problem)

    def plain() -> Sequence[mx.array]:
        with without_kernel(case.op):
            return case.run(*arrays)

    return checked(error, problem, *time_in_turns([plain, partial(case.run, *arrays)], _TIMING_SECONDS))


def _check_case_on_cpu(case: Case, dtype: mx.Dtype) -> list[Check]:
    arrays = case.arrays(dtype)
    mx.eval(*arrays)
    return _check_dispatched(case.op, case.label, partial(case.run, *arrays), dtype)


def _check_dispatched(op: str, shape: str, run: Run, dtype: mx.Dtype) -> list[Check]:
    """What a dispatcher takes here against what it takes in the mode "reference"."""

    def plain() -> Sequence[mx.array]:
        with kernel_mode("reference"):
            return run()

    error, problem = _compare(run(), plain())
    seconds = time_in_turns([plain, run], _TIMING_SECONDS, lazy=gpu.backend() is not None)
    return [Check(op, shape, dtype_name(dtype), None, error, problem, *seconds)]


def _other_ops(dtype: mx.Dtype) -> Iterator[tuple[str, str, Run]]:
    """Ops without GPU kernels of their own: MLX's there, loops on a CPU. (op, shape in words, call)."""

    def normal(*shape: int, fan_in: int = 1) -> mx.array:
        array = (random_array(shape, mx.float32, len(shape) + shape[-1]) * fan_in**-0.5).astype(dtype)
        mx.eval(array)
        return array

    x, residual, image, row = normal(512, 768), normal(512, 768), normal(8, 256, 768), normal(1, 768)
    widen = (normal(3072, 768, fan_in=768), normal(3072))
    narrow = (normal(768, 3072, fan_in=3072), normal(768))
    yield "gelu", "8x256x768", lambda: (gelu(image),)
    yield "linear_gelu", "512x768 to 3072", lambda: (linear_gelu(x, *widen),)
    yield "feed_forward", "512x768 by 3072", lambda: (feed_forward(x, widen, narrow, residual),)
    yield "linear", "1x768 to 3072", lambda: (linear(row, *widen),)
    halves = narrow[0][:, :1536]
    yield "swiglu_feed_forward", "512x768 by 1536", lambda: (swiglu_feed_forward(x, widen[0], halves),)
    pixels, stem = normal(1, 256, 256, 3), (normal(96, 3, 3, 3, fan_in=27), normal(96))
    yield "stem_conv", "256x256x3 to 96", lambda: (stem_conv(pixels, *stem),)
    queries, keys, values = normal(1, 14, 256, 64), normal(1, 2, 288, 64), normal(1, 2, 288, 64)
    yield "causal_attention", "256 of 288", lambda: (causal_attention(queries, keys, values, 64**-0.5),)


def _compare(found: Sequence[mx.array], wanted: Sequence[mx.array]) -> tuple[float | None, str | None]:
    """(largest error, what is wrong)."""
    for a, b in zip(found, wanted, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return None, f"its result is {a.dtype} {a.shape}; expected {b.dtype} {b.shape}"
    error = float(np.max([largest_error(a, b) for a, b in zip(found, wanted, strict=True)]))
    if np.isnan(error):
        return None, "its result is not a number in places where plain operations' is one"
    limit = rounding(wanted[0].dtype)
    return error, None if error < limit else f"its error is {error:.1e}; rounding explains {limit:.0e}"


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
