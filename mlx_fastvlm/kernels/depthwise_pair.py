"""RepMixer's 3×3 followed by ConvFFN's 7×7, both depthwise, in one pass: the map between them is written, not read back.

On a GPU a threadgroup holds the input tile and the middle tile of CV·4 channels in its memory and computes the middle's
halo of three again for itself. The middle map is rounded to the type of the arrays before the 7×7 reads it, as if it had
been stored: the results are those of the two ops one after the other.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_fastvlm.kernels.depthwise_conv import depthwise_conv, depthwise_conv_reference, taps_of
from mlx_fastvlm.kernels.fused_op import FusedOp, Launch, random_array
from mlx_fastvlm.kernels.gpu import THREADGROUP_BYTES, GpuKernel, vector_loads

KERNEL = GpuKernel(
    name="depthwise_pair",
    inputs=("x", "taps3", "bias3", "taps7", "bias7"),
    outputs=("mixed", "out"),
    source="""
    // taps3 (9, C), taps7 (49, C); a threadgroup covers CV*4 channels, XT*TW columns and TH rows. Threads (CV, XT, YT).
    constexpr int WIDTH = XT * TW, THREADS = CV * XT * YT;
    constexpr int MID_W = WIDTH + 6, MID_H = TH + 6, IN_W = WIDTH + 8, IN_H = TH + 8;
    constexpr int MID_TILES = (MID_W + TW - 1) / TW;
    threadgroup vec<T, 4> inputs[IN_H * IN_W * CV];
    threadgroup vec<T, 4> middle[MID_H * MID_W * CV];

    const int H = x_shape[1], W = x_shape[2], C = x_shape[3];
    const int row_groups = (H + TH - 1) / TH;
    const int first_row = (int(threadgroup_position_in_grid.z) % row_groups) * TH;
    const int first_column = int(threadgroup_position_in_grid.y) * WIDTH;
    const int first_channel = int(threadgroup_position_in_grid.x) * CV * 4;
    const size_t image = size_t(int(threadgroup_position_in_grid.z) / row_groups) * H * W * C;
    const int thread_index = int(thread_index_in_threadgroup);

    for (int i = thread_index; i < IN_H * IN_W * CV; i += THREADS) {
        const int c = first_channel + i % CV * 4;
        const int ix = first_column - 4 + i / CV % IN_W, iy = first_row - 4 + i / CV / IN_W;
        const bool inside = ix >= 0 && ix < W && iy >= 0 && iy < H && c < C;
        inputs[i] = inside ? *(const device vec<T, 4>*)(x + image + (size_t(iy) * W + ix) * C + c) : vec<T, 4>(T(0));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    for (int i = thread_index; i < MID_H * MID_TILES * CV; i += THREADS) {
        const int lane = i % CV, start = i / CV % MID_TILES * TW, my = i / CV / MID_TILES;
        const int c = first_channel + lane * 4, iy = first_row - 3 + my;
        if (c < C) {
            float4 sums[TW];
            #pragma unroll
            for (int t = 0; t < TW; ++t) {
                sums[t] = float4(*(const device vec<T, 4>*)(bias3 + c));
            }
            #pragma unroll
            for (int ky = 0; ky < 3; ++ky) {
                float4 segment[TW + 2];
                #pragma unroll
                for (int i = 0; i < TW + 2; ++i) {
                    const bool held = start + i < IN_W;         // the last tile may end past the middle map
                    segment[i] = held ? float4(inputs[((my + ky) * IN_W + start + i) * CV + lane]) : float4(0.0f);
                }
                #pragma unroll
                for (int kx = 0; kx < 3; ++kx) {
                    const float4 tap = float4(*(const device vec<T, 4>*)(taps3 + (ky * 3 + kx) * C + c));
                    #pragma unroll
                    for (int t = 0; t < TW; ++t) {
                        sums[t] += tap * segment[t + kx];
                    }
                }
            }
            #pragma unroll
            for (int t = 0; t < TW; ++t) {
                const int mx = start + t, ix = first_column - 3 + mx;
                if (mx < MID_W) {
                    const bool inside = ix >= 0 && ix < W && iy >= 0 && iy < H;
                    const vec<T, 4> value = inside ? narrow4<T>(sums[t]) : vec<T, 4>(T(0));
                    middle[(my * MID_W + mx) * CV + lane] = value;
                    if (inside && mx >= 3 && mx < WIDTH + 3 && my >= 3 && my < TH + 3) {
                        *(device vec<T, 4>*)(mixed + image + (size_t(iy) * W + ix) * C + c) = value;
                    }
                }
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const int lane = int(thread_position_in_threadgroup.x), c = first_channel + lane * 4;
    const int start = int(thread_position_in_threadgroup.y) * TW;
    for (int y = int(thread_position_in_threadgroup.z); y < TH; y += YT) {
        if (c < C && first_row + y < H && first_column + start < W) {
            float4 sums[TW];
            #pragma unroll
            for (int t = 0; t < TW; ++t) {
                sums[t] = float4(*(const device vec<T, 4>*)(bias7 + c));
            }
            for (int ky = 0; ky < 7; ++ky) {
                float4 segment[TW + 6];
                #pragma unroll
                for (int i = 0; i < TW + 6; ++i) {
                    segment[i] = float4(middle[((y + ky) * MID_W + start + i) * CV + lane]);
                }
                #pragma unroll
                for (int kx = 0; kx < 7; ++kx) {
                    const float4 tap = float4(*(const device vec<T, 4>*)(taps7 + (ky * 7 + kx) * C + c));
                    #pragma unroll
                    for (int t = 0; t < TW; ++t) {
                        sums[t] += tap * segment[t + kx];
                    }
                }
            }
            #pragma unroll
            for (int t = 0; t < TW; ++t) {
                const int ix = first_column + start + t;
                if (ix < W) {
                    *(device vec<T, 4>*)(out + image + (size_t(first_row + y) * W + ix) * C + c) = narrow4<T>(sums[t]);
                }
            }
        }
    }
""",
)

Weights = tuple[mx.array, mx.array]  # weight (C, k, k, 1), bias (C,)


def depthwise_pair(x: mx.array, first: Weights, second: Weights) -> tuple[mx.array, mx.array]:
    """Two depthwise convolutions in a row, 'same' padding, stride 1.

    Args:
        x: (B, H, W, C).
        first: weight (C, 3, 3, 1) and bias (C,).
        second: weight (C, 7, 7, 1) and bias (C,).

    Returns:
        The first convolution of x and the second of that, each (B, H, W, C).
    """
    fused = OP.run(x, *first, *second)
    if fused is not None:
        return fused
    mixed = depthwise_conv(x, *first)
    return mixed, depthwise_conv(mixed, *second)


def depthwise_pair_metal(
    x: mx.array, weight3: mx.array, bias3: mx.array, weight7: mx.array, bias7: mx.array, launch: Launch
) -> tuple[mx.array, mx.array]:
    """`depthwise_pair` as one Metal kernel; `launch` from `launches`."""
    return _launch(KERNEL.metal, x, weight3, bias3, weight7, bias7, launch)


def depthwise_pair_cuda(
    x: mx.array, weight3: mx.array, bias3: mx.array, weight7: mx.array, bias7: mx.array, launch: Launch
) -> tuple[mx.array, mx.array]:
    """`depthwise_pair` as one CUDA kernel; `launch` from `launches`."""
    return _launch(KERNEL.cuda, x, weight3, bias3, weight7, bias7, launch)


def depthwise_pair_reference(
    x: mx.array, weight3: mx.array, bias3: mx.array, weight7: mx.array, bias7: mx.array
) -> tuple[mx.array, mx.array]:
    """`depthwise_pair` in plain MLX ops."""
    mixed = depthwise_conv_reference(x, weight3, bias3)
    return mixed, depthwise_conv_reference(mixed, weight7, bias7)


def launches(x: mx.array, weight3: mx.array, bias3: mx.array, weight7: mx.array, bias7: mx.array) -> list[Launch]:
    """Launch shapes: lanes of four channels, column tiles of `width` outputs, rows of the tile, rows of threads."""
    fits = (weight3.shape[1], weight7.shape[1]) == (3, 7) and weight3.dtype == weight7.dtype == x.dtype
    if not fits or not vector_loads(x, bias3, bias7):
        return []
    shapes = []
    for lanes, tiles, width, height, rows in (
        (2, 4, 8, 16, 16), (2, 4, 4, 16, 16), (4, 4, 4, 16, 16), (4, 4, 4, 8, 8), (1, 8, 4, 32, 16), (1, 8, 4, 16, 16),
        (2, 4, 4, 8, 8), (8, 2, 4, 8, 8),
    ):  # fmt: skip
        columns = tiles * width
        tiles_bytes = ((columns + 8) * (height + 8) + (columns + 6) * (height + 6)) * lanes * 4 * x.dtype.size
        if tiles_bytes <= THREADGROUP_BYTES:
            shapes.append({"lanes": lanes, "tiles": tiles, "width": width, "height": height, "rows": rows})
    return shapes


def _sample(x: mx.array, *weights: mx.array) -> tuple[mx.array, ...]:
    channels = min(x.shape[-1], 24)
    shapes = ((1, 19, 21, channels), (channels, 3, 3, 1), (channels,), (channels, 7, 7, 1), (channels,))
    return tuple(random_array(shape, x.dtype, seed) for seed, shape in enumerate(shapes))


def _launch(run, x, weight3, bias3, weight7, bias7, launch: Launch) -> tuple[mx.array, mx.array]:
    batch, height, width, channels = x.shape
    lanes, tiles, columns = launch["lanes"], launch["tiles"], launch["tiles"] * launch["width"]
    mixed, out = run(
        [x, taps_of(weight3), bias3, taps_of(weight7), bias7],
        template={
            "T": x.dtype, "CV": lanes, "XT": tiles, "TW": launch["width"], "TH": launch["height"], "YT": launch["rows"],
        },
        groups=(-(-channels // (4 * lanes)), -(-width // columns), batch * -(-height // launch["height"])),
        threadgroup=(lanes, tiles, launch["rows"]),
        output_shapes=[x.shape, x.shape],
        output_dtypes=[x.dtype, x.dtype],
    )  # fmt: skip
    return mixed, out


OP = FusedOp("depthwise_pair", depthwise_pair_metal, depthwise_pair_cuda, depthwise_pair_reference, launches, _sample)
