"""What one GPU launch moves and computes, by formula: MLX's own kernels and this package's.

Device bytes count every array once: what a launch reads or writes again is taken to hit a cache. MLX's kernels are those
of ml-explore/mlx at v0.32.1-26-g846d17622 under mlx/backend/metal; its files are named where a formula follows them.
tests/test_kernel_counts.py holds the formulas of this package's kernels against counts of the kernels themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Operations of one elementwise function, counted from its text; an exponential takes as long as 8 operations (32 a cycle
# and core against 256, philipturner/metal-benchmarks@dc2adc6 README.md).
EXP_FLOPS = 8
MLX_ERF_FLOPS = 40  # kernels/erf.h and expm1f.h: a lane takes one branch, its SIMD-group both
GELU_FLOPS = MLX_ERF_FLOPS + 4
SIMD_WIDTH = 32
OWN_GELU_FLOPS = 29  # kernels/gpu.py, as counted


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        op: what it computes.
        device_bytes: read and written, each array once.
        matmul_flops: operations of matrix products that may run on neural accelerators where the GPU has some.
        vector_flops: all other operations; products of simdgroup matrices run on the same arithmetic units.
        on_core_bytes: moved between threads and the core's threadgroup memory or data cache, a value that several threads
            of a SIMD-group load at once counted once; only for convolutions, the ops that wait for it.
    """

    op: str
    device_bytes: float
    matmul_flops: float = 0.0
    vector_flops: float = 0.0
    on_core_bytes: float = 0.0


@dataclass(frozen=True)
class Map:
    """A feature map (1, side, side, channels).

    Attributes:
        side: positions along an edge.
        channels: values a position.
        itemsize: bytes a value.
    """

    side: int
    channels: int
    itemsize: int = 2

    @property
    def positions(self) -> int:
        return self.side**2

    @property
    def size(self) -> int:
        return self.positions * self.channels

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    def with_channels(self, channels: int) -> Map:
        return Map(self.side, channels, self.itemsize)


def elementwise(op: str, *nbytes: float, flops: float = 0.0) -> Launch:
    """A pass over arrays: `nbytes` of each one read or written, `flops` in all."""
    return Launch(op, sum(nbytes), vector_flops=flops)


def gelu(x_bytes: float, itemsize: int) -> Launch:
    """MLX's compiled exact GELU: read, write."""
    return elementwise("GELU", x_bytes, x_bytes, flops=x_bytes / itemsize * GELU_FLOPS)


def linear(
    rows: int, inputs: int, outputs: int, itemsize: int, *, weight_bits: float, bias: bool = False, op: str = "linear"
) -> Launch:
    """A matrix product with a weight (outputs, inputs): GEMM, or GEMV for one row; bias in the same launch (matmul.cpp)."""
    values = rows * (inputs + outputs) + (outputs if bias else 0)
    return Launch(
        op, values * itemsize + inputs * outputs * weight_bits / 8, matmul_flops=2.0 * rows * inputs * outputs
    )


def own_linear(rows: int, inputs: int, outputs: int, itemsize: int, *, then: str) -> Launch:
    """kernels/linear_epilogue.py: product, bias and, as `then` says, "GELU" or "residual" in one launch.

    Its simdgroup matrices run on the ordinary arithmetic, taken to be used as well as MLX's products use it.
    """
    extra, each = (outputs * rows, 1) if then == "residual" else (0, OWN_GELU_FLOPS)
    values = rows * (inputs + outputs) + outputs * (inputs + 1) + extra
    return Launch(
        f"linear and {then}", values * itemsize, vector_flops=2.0 * rows * inputs * outputs + each * rows * outputs
    )


def mlx_depthwise(x: Map, kernel: int, stride: int = 1) -> Launch:
    """MLX's depthwise convolution, one output per channel, without bias.

    conv.cpp depthwise_conv_2D_gpu, kernels/conv.metal depthwise_conv_2d: a threadgroup of 256 threads stages the inputs of
    4 rows × 8 columns × 8 channels; a thread then reads one staged value and one tap for each multiply-add of its one
    output. The four columns of a SIMD-group share their taps.
    """
    out_side = -(-x.side // stride)
    out = Map(out_side, x.channels, x.itemsize)
    rows, columns, lanes = 4, 8, 8
    groups = -(-out_side // rows) * -(-out_side // columns) * (x.channels // lanes)
    staged = (rows * stride + kernel - 1) * (columns * stride + kernel - 1) * lanes
    taps = kernel**2
    return Launch(
        f"depthwise {kernel}×{kernel}",
        x.nbytes + out.nbytes + taps * x.channels * x.itemsize,
        vector_flops=2.0 * taps * out.size,
        on_core_bytes=x.itemsize * (2 * groups * staged + taps * out.size * (1 + 1 / 4)),
    )


def mlx_widening_conv(x: Map, kernel: int, stride: int, multiplier: int) -> Launch:
    """MLX's convolution with `multiplier` outputs per channel, one group a channel, without bias.

    conv.cpp dispatch_conv_2D_gpu: the depthwise kernel wants as many outputs as inputs, so a group becomes an implicit GEMM
    on tiles of 32 positions × 8 outputs × 16 taps, of which `multiplier` outputs and k² taps are wanted. Its scattered reads
    of single channels are counted as if they were dense.
    """
    out = Map(-(-x.side // stride), x.channels * multiplier, x.itemsize)
    tile_rows, tile_outputs, tile_taps = 32, 8, 16
    rows = -(-out.positions // tile_rows) * tile_rows
    taps = -(-(kernel**2) // tile_taps) * tile_taps
    return Launch(
        f"widening depthwise {kernel}×{kernel}",
        x.nbytes + out.nbytes + kernel**2 * out.channels * x.itemsize,
        vector_flops=2.0 * rows * taps * tile_outputs * x.channels,
        on_core_bytes=3.0 * rows * taps * x.channels * x.itemsize,  # read, staged, read back
    )


def mlx_dense_conv(x: Map, kernel: int, stride: int, outputs: int) -> Launch:
    """MLX's convolution of all channels with all, without bias: an implicit GEMM on simdgroup matrices (conv.cpp).

    There is no version of it for the neural accelerators. Three channels are padded to four, taps to multiples of 16.
    """
    out = Map(-(-x.side // stride), outputs, x.itemsize)
    depth = kernel**2 * (4 if x.channels == 3 else x.channels)
    depth = -(-depth // 16) * 16
    weights = kernel**2 * x.channels * outputs * x.itemsize
    return Launch(
        f"convolution {kernel}×{kernel}",
        x.nbytes + out.nbytes + weights,
        vector_flops=2.0 * out.positions * depth * outputs,
    )


@dataclass(frozen=True)
class OnCore:
    """What the threads of one of this package's kernels load and store on the core, in values.

    Attributes:
        threadgroup_loads, threadgroup_stores: through threadgroup memory.
        map_loads: of the input map, through the data cache.
        tap_loads: of taps and biases, through the data cache.
        threads_a_tap: neighbors in a SIMD-group that load the same tap, which then moves once for all of them.
    """

    threadgroup_loads: float
    threadgroup_stores: float
    map_loads: float
    tap_loads: float
    threads_a_tap: float

    @property
    def device_loads(self) -> float:
        """As threads ask for them."""
        return self.map_loads + self.tap_loads

    @property
    def moved(self) -> float:
        """Values that move, a tap once for the threads that share it."""
        return self.threadgroup_loads + self.threadgroup_stores + self.map_loads + self.tap_loads / self.threads_a_tap


def own_depthwise_on_core(x: Map, kernel: int, stride: int, multiplier: int, launch: Mapping[str, int]) -> OnCore:
    """Loads and stores of kernels/depthwise_conv.py with a launch shape, on a map that its tiles divide."""
    out = Map(-(-x.side // stride), x.channels * multiplier, x.itemsize)
    width, tiles, rows, lanes = (launch[name] for name in ("width", "tiles", "rows", "lanes"))
    threads = out.positions / width * x.channels / 4
    segment = kernel * ((width - 1) * stride + kernel) * 4 * threads
    taps = (kernel**2 + 1) * multiplier * 4 * threads
    sharing = min(tiles * rows, max(1, SIMD_WIDTH // lanes))
    if not launch["staged"]:
        return OnCore(0, 0, segment, taps, sharing)
    groups = out.positions / (tiles * width * rows) * x.channels / (4 * lanes)
    tile = ((tiles * width - 1) * stride + kernel) * ((rows - 1) * stride + kernel) * lanes * 4
    return OnCore(segment, groups * tile, groups * tile, taps, sharing)


def own_depthwise(
    x: Map, kernel: int, stride: int, multiplier: int, launch: Mapping[str, int], with_gelu: bool
) -> Launch:
    """kernels/depthwise_conv.py: convolution, bias and, where wanted, GELU in one launch."""
    out = Map(-(-x.side // stride), x.channels * multiplier, x.itemsize)
    weights = (kernel**2 + 1) * out.channels * x.itemsize
    return Launch(
        f"depthwise {kernel}×{kernel}{' and GELU' if with_gelu else ''}",
        x.nbytes + out.nbytes + weights,
        vector_flops=out.size * (2.0 * kernel**2 + (OWN_GELU_FLOPS if with_gelu else 0)),
        on_core_bytes=own_depthwise_on_core(x, kernel, stride, multiplier, launch).moved * x.itemsize,
    )


def own_pair_on_core(x: Map, launch: Mapping[str, int]) -> OnCore:
    """Loads and stores of kernels/depthwise_pair.py with a launch shape, on a map that its tiles divide."""
    lanes, tiles, width, height = (launch[name] for name in ("lanes", "tiles", "width", "height"))
    columns = tiles * width
    inputs, middle = (columns + 8) * (height + 8), (columns + 6) * (height + 6)
    starts = range(0, columns + 6, width)  # of a row's segments of the middle map; the last ends with the staged input
    middle_threads = len(starts) * (height + 6)
    middle_loads = 3 * sum(min(width + 2, columns + 8 - start) for start in starts) * (height + 6)
    threads = columns * height / width
    values = x.positions / (columns * height) * x.channels  # groups · channels of one
    return OnCore(
        threadgroup_loads=values * (middle_loads + threads * 7 * (width + 6)),
        threadgroup_stores=values * (inputs + middle),
        map_loads=values * inputs,
        tap_loads=values * (middle_threads * 10 + threads * 50),
        threads_a_tap=max(1, SIMD_WIDTH // lanes),
    )


def own_pair(x: Map, launch: Mapping[str, int]) -> Launch:
    """kernels/depthwise_pair.py: 3×3 and 7×7 with their biases in one launch, both maps written."""
    columns, height = launch["tiles"] * launch["width"], launch["height"]
    halo = (columns + 6) * (height + 6) / (columns * height)
    return Launch(
        "depthwise 3×3 → 7×7",
        3 * x.nbytes + (10 + 50) * x.channels * x.itemsize,
        vector_flops=2.0 * x.size * (9 * halo + 49),
        on_core_bytes=own_pair_on_core(x, launch).moved * x.itemsize,
    )


def attention_flops(heads: int, queries: int, keys: int, head_dim: int) -> tuple[float, float]:
    """(operations of both matrix products, operations of the softmax) without a mask."""
    scores = float(heads * queries * keys)
    return 4.0 * scores * head_dim, scores * (EXP_FLOPS + 4)


def mlx_unfused_attention(tokens: int, heads: int, head_dim: int, itemsize: int) -> list[Launch]:
    """MLX's fallback where it has no fused kernel, as for heads of 32 (scaled_dot_product_attention.cpp, fast.cpp).

    Scale, scores, softmax, mixing; the last copy brings the heads back side by side.
    """
    values, scores = tokens * heads * head_dim * itemsize, heads * tokens**2 * itemsize
    products, softmax = attention_flops(heads, tokens, tokens, head_dim)
    return [
        elementwise("scale queries", values, values),
        Launch("attention scores", 2 * values + scores, matmul_flops=products / 2),
        elementwise("softmax", scores, scores, flops=softmax),
        Launch("attention mixing", 2 * values + scores, matmul_flops=products / 2),
        elementwise("merge heads", values, values),
    ]


def padded_attention(tokens: int, heads: int, head_dim: int, padded_dim: int, itemsize: int) -> list[Launch]:
    """MLX's fused attention on queries, keys and values filled up with zeros to `padded_dim`: exact, more work."""
    values, padded = (tokens * heads * width * itemsize for width in (head_dim, padded_dim))
    products, softmax = attention_flops(heads, tokens, tokens, padded_dim)
    return [
        elementwise("pad queries, keys and values", 3 * values, 3 * padded),
        Launch("fused attention", 4 * padded, matmul_flops=products, vector_flops=softmax),
        elementwise("merge heads", values, values),
    ]


def own_attention(tokens: int, heads: int, head_dim: int, itemsize: int) -> list[Launch]:
    """One kernel for the heads as they are, reading q/k/v where the projection wrote them."""
    values = tokens * heads * head_dim * itemsize
    products, softmax = attention_flops(heads, tokens, tokens, head_dim)
    return [Launch("fused attention", 4 * values, vector_flops=products + softmax)]


def cached_attention(rows: int, context: int, heads: int, kv_heads: int, head_dim: int, itemsize: int) -> Launch:
    """MLX's fused causal attention of `rows` queries, the last of `context` positions."""
    seen = rows * (context - (rows - 1) / 2)  # query · key pairs
    flops = 4.0 * heads * seen * head_dim
    softmax = heads * seen * (EXP_FLOPS + 4)
    values = 2 * rows * heads * head_dim + 2 * context * kv_heads * head_dim
    return Launch("attention", values * itemsize, matmul_flops=flops, vector_flops=softmax)
