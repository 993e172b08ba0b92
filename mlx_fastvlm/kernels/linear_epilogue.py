"""A Linear layer of many rows with what follows it in the same kernel: GELU, or the residual addition.

Metal only, by the matrix instructions of a simdgroup. MLX's own matrix product is hard to beat, so this one runs only
where `mlx-fastvlm tune` has found it faster than the product followed by a kernel that reads and writes it once more.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.kernels.fused_op import FusedOp, Launch, random_array
from mlx_fastvlm.kernels.gelu import fused_gelu, gelu_reference
from mlx_fastvlm.kernels.gpu import GpuKernel, as_rows, vector_loads
from mlx_fastvlm.kernels.linear import linear, linear_cpu

_MIN_ROWS = 64  # fewer are a matrix-vector product's work

KERNEL = GpuKernel(
    name="linear_epilogue",
    inputs=("x", "weight", "bias", "residual"),
    outputs=("out",),
    source="""
    // x (R, C), weight (O, C), bias (O), residual (R, O) or unused. A threadgroup computes BM rows of BN outputs with
    // WM x WN simdgroups; tiles of BK inputs pass through its memory in type U, the sums stay in registers as float.
    constexpr int THREADS = WM * WN * 32, PITCH = BK + 16 / int(sizeof(U));
    constexpr int TM = BM / WM / 8, TN = BN / WN / 8;       // 8x8 blocks of one simdgroup
    threadgroup U left[BM * PITCH];
    threadgroup U right[BN * PITCH];
    threadgroup float strip[WM * WN * 64 * TN];             // eight rows of a simdgroup's outputs

    const int R = x_shape[0], C = x_shape[1], O = weight_shape[0];
    const int first_row = int(threadgroup_position_in_grid.y) * BM;
    const int first_output = int(threadgroup_position_in_grid.x) * BN;
    const int part = int(simdgroup_index_in_threadgroup), lane = int(thread_index_in_simdgroup);
    const int row_part = part / WN * TM * 8, output_part = part % WN * TN * 8;
    const int thread_index = int(thread_index_in_threadgroup);

    simdgroup_matrix<float, 8, 8> sums[TM][TN];
    #pragma unroll
    for (int i = 0; i < TM; ++i) {
        #pragma unroll
        for (int j = 0; j < TN; ++j) {
            sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
    }
    for (int start = 0; start < C; start += BK) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int i = thread_index; i < (BM + BN) * BK / 4; i += THREADS) {
            const int line = i / (BK / 4), c = i % (BK / 4) * 4;
            const bool of_x = line < BM;
            const int row = of_x ? first_row + line : first_output + line - BM;
            float4 v = float4(0.0f);
            if (start + c < C && row < (of_x ? R : O)) {
                const device T* from = (of_x ? x : weight) + size_t(row) * C + start + c;
                v = float4(*(const device vec<T, 4>*)from);
            }
            threadgroup U* to = (of_x ? left + line * PITCH : right + (line - BM) * PITCH) + c;
            to[0] = U(v.x);
            to[1] = U(v.y);
            to[2] = U(v.z);
            to[3] = U(v.w);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        #pragma unroll
        for (int k = 0; k < BK; k += 8) {
            simdgroup_matrix<U, 8, 8> rows[TM], outputs[TN];
            #pragma unroll
            for (int i = 0; i < TM; ++i) {
                simdgroup_load(rows[i], left + (row_part + i * 8) * PITCH + k, PITCH);
            }
            #pragma unroll
            for (int j = 0; j < TN; ++j) {
                simdgroup_load(outputs[j], right + (output_part + j * 8) * PITCH + k, PITCH, ulong2(0, 0), true);
            }
            #pragma unroll
            for (int i = 0; i < TM; ++i) {
                #pragma unroll
                for (int j = 0; j < TN; ++j) {
                    simdgroup_multiply_accumulate(sums[i][j], rows[i], outputs[j], sums[i][j]);
                }
            }
        }
    }
    threadgroup float* mine = strip + part * 64 * TN;
    #pragma unroll
    for (int i = 0; i < TM; ++i) {
        #pragma unroll
        for (int j = 0; j < TN; ++j) {
            simdgroup_store(sums[i][j], mine + j * 8, TN * 8);
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
        for (int e = lane * 4; e < 64 * TN; e += 128) {
            const int row = first_row + row_part + i * 8 + e / (TN * 8);
            const int output = first_output + output_part + e % (TN * 8);
            if (row < R && output < O) {
                const float4 sum = float4(mine[e], mine[e + 1], mine[e + 2], mine[e + 3]);
                float4 v = sum + float4(*(const device vec<T, 4>*)(bias + output));
                if (GELU) {
                    v = exact_gelu4(v);
                }
                if (RESIDUAL) {
                    v = v + float4(*(const device vec<T, 4>*)(residual + size_t(row) * O + output));
                }
                *(device vec<T, 4>*)(out + size_t(row) * O + output) = narrow4<T>(v);
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }
""",
)


def linear_gelu(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """GELU of a Linear layer: x (..., C), weight (O, C), bias (O,) → (..., O)."""
    if cpu.suits(x, x.size // weight.shape[1] * weight.shape[0]):
        return linear_cpu(x, weight, bias, gelu=True)
    fused = OP.run(as_rows(x), weight, bias, bias, gelu=True, residual=False)
    return fused_gelu(linear(x, weight, bias)) if fused is None else fused[0].reshape(*x.shape[:-1], -1)


def linear_add(x: mx.array, weight: mx.array, bias: mx.array, residual: mx.array) -> mx.array:
    """A Linear layer added to something: x (..., C), weight (O, C), bias (O,), residual (..., O) → (..., O)."""
    fused = OP.run(as_rows(x), weight, bias, as_rows(residual), gelu=False, residual=True)
    return residual + linear(x, weight, bias) if fused is None else fused[0].reshape(residual.shape)


def linear_epilogue_metal(
    x: mx.array, weight: mx.array, bias: mx.array, extra: mx.array, launch: Launch, gelu: bool, residual: bool
) -> tuple[mx.array]:
    """A Linear layer of (R, C) as one Metal kernel; `extra` is the residual, or any array; `launch` from `launches`."""
    rows, outputs = x.shape[0], weight.shape[0]
    tile = {"BM": launch["rows"], "BN": launch["outputs"], "BK": launch["inputs"]}
    parts = {"WM": launch["row_parts"], "WN": launch["output_parts"]}
    stored = mx.float16 if x.dtype == mx.float16 else mx.float32
    (out,) = KERNEL.metal(
        [x, weight, bias, extra],
        template={"T": x.dtype, "U": stored, "GELU": gelu, "RESIDUAL": residual, **tile, **parts},
        groups=(-(-outputs // tile["BN"]), -(-rows // tile["BM"]), 1),
        threadgroup=(32 * parts["WM"] * parts["WN"], 1, 1),
        output_shapes=[(rows, outputs)],
        output_dtypes=[x.dtype],
    )
    return (out,)


def linear_epilogue_reference(
    x: mx.array, weight: mx.array, bias: mx.array, extra: mx.array, gelu: bool, residual: bool
) -> tuple[mx.array]:
    """A Linear layer of (R, C) in plain MLX ops, with GELU behind it or added to `extra`."""
    y = mx.addmm(bias, x, weight.T)
    y = gelu_reference(y) if gelu else y
    return (extra + y if residual else y,)


def launches(
    x: mx.array, weight: mx.array, bias: mx.array, extra: mx.array, gelu: bool, residual: bool
) -> list[Launch]:
    """Launch shapes: rows, outputs and inputs of a tile, simdgroups among which its rows and outputs are parted."""
    if x.shape[0] < _MIN_ROWS or not vector_loads(x, weight, bias, extra):
        return []
    names = ("rows", "outputs", "inputs", "row_parts", "output_parts")
    shapes = ((64, 64, 16, 2, 2), (64, 64, 32, 2, 2), (64, 32, 32, 2, 2), (32, 64, 16, 1, 2), (128, 64, 16, 4, 2))
    return [dict(zip(names, shape, strict=True)) for shape in shapes]


def _sample(x: mx.array, weight: mx.array, bias: mx.array, extra: mx.array, **options) -> tuple[mx.array, ...]:
    inputs, outputs = min(x.shape[1], 44), min(weight.shape[0], 76)
    shapes = ((70, inputs), (outputs, inputs), (outputs,), (70, outputs) if options["residual"] else (outputs,))
    return tuple(random_array(shape, x.dtype, seed) for seed, shape in enumerate(shapes))


OP = FusedOp(
    "linear_epilogue", linear_epilogue_metal, None, linear_epilogue_reference, launches, _sample, tuned_only=True
)
