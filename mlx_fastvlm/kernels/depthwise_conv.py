"""Depthwise convolution, NHWC, with bias and an optional exact GELU behind it.

On a GPU a thread computes four input channels of TW neighboring outputs of a row, in registers: each tap is read once
for TW outputs, and the row segment they share once for all. `staged` copies the input tile of a threadgroup into its
memory first; without, rows are read through the cache. Two outputs per channel are four channels' eight outputs.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.kernels.cpu_depthwise import depthwise_conv_cpu
from mlx_fastvlm.kernels.derived import once_per_array
from mlx_fastvlm.kernels.fused_op import FusedOp, Launch, random_array
from mlx_fastvlm.kernels.gelu import fused_gelu, gelu_reference
from mlx_fastvlm.kernels.gpu import THREADGROUP_BYTES, GpuKernel, vector_loads

KERNEL = GpuKernel(
    name="depthwise_conv",
    inputs=("x", "taps", "bias"),
    outputs=("out",),
    source="""
    // taps (K*K, C*M); a threadgroup covers CV*4 input channels, XT*TW columns and YT rows of the output.
    constexpr int PAD = K / 2;
    constexpr int SPAN = (TW - 1) * STRIDE + K;             // input columns behind one thread's outputs
    constexpr int TILE_W = (XT * TW - 1) * STRIDE + K;
    constexpr int TILE_H = (YT - 1) * STRIDE + K;
    threadgroup vec<T, 4> tile[STAGED ? TILE_H * TILE_W * CV : 1];

    const int H = x_shape[1], W = x_shape[2], C = x_shape[3], O = C * M;
    const int OH = (H + STRIDE - 1) / STRIDE, OW = (W + STRIDE - 1) / STRIDE;
    const int row_groups = (OH + YT - 1) / YT;
    const int image = int(threadgroup_position_in_grid.z) / row_groups;
    const int first_row = (int(threadgroup_position_in_grid.z) % row_groups) * YT;
    const int first_column = int(threadgroup_position_in_grid.y) * XT * TW;
    const int first_channel = int(threadgroup_position_in_grid.x) * CV * 4;
    const int lane = int(thread_position_in_threadgroup.x);
    const int channel = first_channel + lane * 4;
    const int row = first_row + int(thread_position_in_threadgroup.z);
    const int column = first_column + int(thread_position_in_threadgroup.y) * TW;
    const device T* source = x + size_t(image) * H * W * C;

    if (STAGED) {
        const int top = first_row * STRIDE - PAD, left = first_column * STRIDE - PAD;
        for (int i = int(thread_index_in_threadgroup); i < TILE_H * TILE_W * CV; i += CV * XT * YT) {
            const int c = first_channel + i % CV * 4, ix = left + i / CV % TILE_W, iy = top + i / CV / TILE_W;
            const bool inside = ix >= 0 && ix < W && iy >= 0 && iy < H && c < C;
            tile[i] = inside ? *(const device vec<T, 4>*)(source + (size_t(iy) * W + ix) * C + c) : vec<T, 4>(T(0));
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (channel < C && row < OH && column < OW) {
        float4 sums[TW][M];
        #pragma unroll
        for (int m = 0; m < M; ++m) {
            const float4 start = float4(*(const device vec<T, 4>*)(bias + channel * M + 4 * m));
            #pragma unroll
            for (int t = 0; t < TW; ++t) {
                sums[t][m] = start;
            }
        }
        for (int ky = 0; ky < K; ++ky) {
            const int iy = row * STRIDE + ky - PAD;
            if (iy < 0 || iy >= H) {
                continue;
            }
            float4 segment[SPAN];
            #pragma unroll
            for (int i = 0; i < SPAN; ++i) {
                const int ix = column * STRIDE + i - PAD;
                if (STAGED) {
                    const int ty = int(thread_position_in_threadgroup.z) * STRIDE + ky;
                    const int tx = int(thread_position_in_threadgroup.y) * TW * STRIDE + i;
                    segment[i] = float4(tile[(ty * TILE_W + tx) * CV + lane]);
                } else if (ix >= 0 && ix < W) {
                    segment[i] = float4(*(const device vec<T, 4>*)(source + (size_t(iy) * W + ix) * C + channel));
                } else {
                    segment[i] = float4(0.0f);
                }
            }
            #pragma unroll
            for (int kx = 0; kx < K; ++kx) {
                #pragma unroll
                for (int m = 0; m < M; ++m) {
                    const device T* at = taps + (ky * K + kx) * O + channel * M + 4 * m;
                    const float4 tap = float4(*(const device vec<T, 4>*)at);
                    #pragma unroll
                    for (int t = 0; t < TW; ++t) {
                        const float4 v = segment[t * STRIDE + kx];
                        if (M == 1) {
                            sums[t][m] += tap * v;
                        } else if (m == 0) {
                            sums[t][m] += tap * float4(v.x, v.x, v.y, v.y);
                        } else {
                            sums[t][m] += tap * float4(v.z, v.z, v.w, v.w);
                        }
                    }
                }
            }
        }
        #pragma unroll
        for (int t = 0; t < TW; ++t) {
            if (column + t < OW) {
                device T* to = out + ((size_t(image) * OH + row) * OW + column + t) * O + channel * M;
                #pragma unroll
                for (int m = 0; m < M; ++m) {
                    const float4 result = GELU ? exact_gelu4(sums[t][m]) : sums[t][m];
                    *(device vec<T, 4>*)(to + 4 * m) = narrow4<T>(result);
                }
            }
        }
    }
""",
)


def depthwise_conv(x: mx.array, weight: mx.array, bias: mx.array, stride: int = 1, gelu: bool = False) -> mx.array:
    """Convolve each channel with its own kernel(s), 'same' padding; output channel o reads input o // multiplier.

    Args:
        x: (B, H, W, C).
        weight: (C · multiplier, k, k, 1), k odd.
        bias: (C · multiplier,).
        stride: 1 or 2.
        gelu: apply exact GELU to the result.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), C · multiplier).
    """
    # Eight taps of MLX's loop take as long as one of the elementwise functions that `suits` counts.
    if cpu.suits(x, x.size * weight.shape[1] ** 2 // 8):
        return depthwise_conv_cpu(x, weight, bias, stride, gelu)
    fused = OP.run(x, weight, bias, stride=stride, gelu=gelu)
    if fused is not None:
        return fused[0]
    y = depthwise_conv_reference(x, weight, bias, stride)
    return fused_gelu(y) if gelu else y


def depthwise_conv_metal(
    x: mx.array, weight: mx.array, bias: mx.array, launch: Launch, stride: int = 1, gelu: bool = False
) -> tuple[mx.array]:
    """`depthwise_conv` as one Metal kernel; `launch` from `launches`."""
    return _launch(KERNEL.metal, x, weight, bias, launch, stride, gelu)


def depthwise_conv_cuda(
    x: mx.array, weight: mx.array, bias: mx.array, launch: Launch, stride: int = 1, gelu: bool = False
) -> tuple[mx.array]:
    """`depthwise_conv` as one CUDA kernel; `launch` from `launches`."""
    return _launch(KERNEL.cuda, x, weight, bias, launch, stride, gelu)


def depthwise_conv_reference(
    x: mx.array, weight: mx.array, bias: mx.array, stride: int = 1, gelu: bool = False
) -> mx.array:
    """`depthwise_conv` in plain MLX ops."""
    y = mx.conv2d(x, weight, stride=stride, padding=weight.shape[1] // 2, groups=x.shape[-1]) + bias
    return gelu_reference(y) if gelu else y


@once_per_array
def taps_of(weight: mx.array) -> mx.array:
    """(O, k, k, 1) → (k·k, O), so that neighboring channels' taps lie side by side."""
    return mx.contiguous(weight.reshape(weight.shape[0], -1).T)


def launches(x: mx.array, weight: mx.array, bias: mx.array, stride: int = 1, gelu: bool = False) -> list[Launch]:
    """Launch shapes: lanes of four channels, column tiles and rows a threadgroup, outputs a thread, staged or not."""
    multiplier = weight.shape[0] // x.shape[-1]
    if multiplier not in (1, 2) or weight.dtype != x.dtype or not vector_loads(x, bias):
        return []
    kernel = weight.shape[1]
    shapes = []
    for staged, lanes, tiles, rows, width in (
        (0, 8, 2, 8, 8), (0, 8, 4, 8, 4), (0, 16, 2, 4, 4), (0, 32, 1, 8, 4), (1, 4, 4, 16, 4), (1, 8, 4, 8, 4),
        (1, 4, 2, 16, 8), (1, 2, 8, 16, 4), (1, 2, 4, 8, 4),
    ):  # fmt: skip
        tile = ((tiles * width - 1) * stride + kernel) * ((rows - 1) * stride + kernel) * lanes * 4 * x.dtype.size
        if width * multiplier <= 8 and (not staged or tile <= THREADGROUP_BYTES):
            shapes.append({"staged": staged, "lanes": lanes, "tiles": tiles, "rows": rows, "width": width})
    return shapes


def _sample(x: mx.array, weight: mx.array, bias: mx.array, **options) -> tuple[mx.array, ...]:
    channels, multiplier, kernel = min(x.shape[-1], 40), weight.shape[0] // x.shape[-1], weight.shape[1]
    shapes = ((1, 19, 21, channels), (channels * multiplier, kernel, kernel, 1), (channels * multiplier,))
    return tuple(random_array(shape, x.dtype, seed) for seed, shape in enumerate(shapes))


def _launch(run, x: mx.array, weight: mx.array, bias: mx.array, launch: Launch, stride: int, gelu: bool):
    batch, height, width, channels = x.shape
    shape = (batch, -(-height // stride), -(-width // stride), weight.shape[0])
    lanes, tiles, rows = launch["lanes"], launch["tiles"], launch["rows"]
    return tuple(
        run(
            [x, taps_of(weight), bias],
            template={
                "T": x.dtype, "K": weight.shape[1], "STRIDE": stride, "M": weight.shape[0] // channels, "GELU": gelu,
                "STAGED": bool(launch["staged"]), "CV": lanes, "XT": tiles, "YT": rows, "TW": launch["width"],
            },
            groups=(-(-channels // (4 * lanes)), -(-shape[2] // (tiles * launch["width"])), batch * -(-shape[1] // rows)),
            threadgroup=(lanes, tiles, rows),
            output_shapes=[shape],
            output_dtypes=[x.dtype],
        )
    )  # fmt: skip


OP = FusedOp(
    "depthwise_conv",
    depthwise_conv_metal,
    depthwise_conv_cuda,
    lambda *arrays, **options: (depthwise_conv_reference(*arrays, **options),),
    launches,
    _sample,
)
