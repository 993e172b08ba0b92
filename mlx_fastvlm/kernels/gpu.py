"""Custom GPU kernels: one body for Metal and CUDA, compiled by MLX at its first launch.

A body is plain Metal Shading Language; `cuda_dialect` lets CUDA read it. What a body may use, so that both compilers and
the tests' emulator agree:
  - Metal's builtins spelled out in the body, not in a helper: MLX looks for their names to declare them;
  - `threadgroup` for tiles only; loads and stores of four channels through `vec<T, 4>`;
  - arithmetic in float; every store guarded; whole threadgroups; no return before a barrier;
  - no `if constexpr`, no `erf`: Metal's language is C++14 and has no error function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_fastvlm.kernels.cuda_dialect import CUDA_DIALECT

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
THREADGROUP_BYTES = 32768  # of memory that a threadgroup may hold, on every Apple GPU
MOST_GROUPS = 65535  # of a launch along y and z: CUDA's limit
Template = dict[str, int | bool | mx.Dtype]
Size = tuple[int, int, int]

# Helpers for bodies of both languages. The error function is Eigen's rational minimax (`generic_fast_erf_float`), 5e-7.
_HELPERS = """
inline float exact_gelu(float x) {
    const float z = metal::min(metal::max(x * 0.7071067811865476f, -3.832506856900711f), 3.832506856900711f);
    const float t = z * z;
    float p = 0.00022905065861350646f;
    p = p * t + 0.0034082910107109506f;
    p = p * t + 0.050955695062380861f;
    p = p * t + 0.18520832239976145f;
    p = p * t + 1.128379143519084f;
    float q = -1.1791602954361697e-7f;
    q = q * t + 0.000023547966471313185f;
    q = q * t + 0.0010179625278914885f;
    q = q * t + 0.014070470171167667f;
    q = q * t + 0.11098505178285362f;
    q = q * t + 0.49746925110067538f;
    q = q * t + 1.0f;
    const float half_x = 0.5f * x;
    return half_x + half_x * (z * p / q);
}
inline float4 exact_gelu4(float4 v) {
    return float4(exact_gelu(v.x), exact_gelu(v.y), exact_gelu(v.z), exact_gelu(v.w));
}
template <typename T>
inline vec<T, 4> narrow4(float4 v) {
    return vec<T, 4>(T(v.x), T(v.y), T(v.z), T(v.w));
}
"""
_CUDA_HEADER = CUDA_DIALECT + "namespace mlx::core::cu {" + _HELPERS + "}\n"


@dataclass(frozen=True)
class GpuKernel:
    """A kernel body with the names of its arrays.

    Attributes:
        name: shown by profilers and in compile errors.
        inputs, outputs: names by which the body knows its arrays. The body sees `<input>_shape` where it asks for it.
        source: the body, see the top of this file.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str

    def metal(self, arrays: Sequence[mx.array], **launch) -> list[mx.array]:
        """Launch on Metal; `launch` as in `_launch`."""
        return _launch(_built(mx.fast.metal_kernel, _HELPERS, self), arrays, **launch)

    def cuda(self, arrays: Sequence[mx.array], **launch) -> list[mx.array]:
        """Launch on CUDA; `launch` as in `_launch`."""
        return _launch(_built(mx.fast.cuda_kernel, _CUDA_HEADER, self), arrays, **launch)


def backend() -> str | None:
    """ "metal" or "cuda" if MLX computes on such a GPU by default, else None."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return None
    return "metal" if mx.metal.is_available() else "cuda"


def vector_loads(*arrays: mx.array) -> bool:
    """Whether bodies may read these arrays by fours: one type, which they know, rows of a multiple of four, not tiny.

    MLX passes arrays of fewer than eight elements in Metal's constant space, which has other pointers.
    """
    dtype = arrays[0].dtype
    return dtype in DTYPES and all(a.dtype == dtype and a.shape[-1] % 4 == 0 and a.size >= 8 for a in arrays)


def as_rows(x: mx.array) -> mx.array:
    """(..., C) → (rows, C)."""
    return x.reshape(-1, x.shape[-1])


def _launch(
    kernel: Callable[..., list[mx.array]],
    arrays: Sequence[mx.array],
    *,
    template: Template,
    groups: Size,
    threadgroup: Size,
    output_shapes: Sequence[tuple[int, ...]],
    output_dtypes: Sequence[mx.Dtype],
) -> list[mx.array]:
    """One launch of `groups` whole threadgroups of `threadgroup` threads."""
    return kernel(
        inputs=list(arrays),
        template=list(template.items()),
        grid=tuple(count * size for count, size in zip(groups, threadgroup, strict=True)),
        threadgroup=threadgroup,
        output_shapes=list(output_shapes),
        output_dtypes=list(output_dtypes),
    )


@functools.cache
def _built(make: Callable, header: str, kernel: GpuKernel) -> Callable[..., list[mx.array]]:
    """MLX's kernel object; it compiles one kernel for every set of types and template arguments."""
    return make(
        name=f"fastvlm_{kernel.name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.source,
        header=header,
    )
