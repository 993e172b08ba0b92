"""From the joint q/k/v product to rotated heads: bias, rotary positions and the split, in the layout the cache holds."""

from __future__ import annotations

import functools
import math

import mlx.core as mx
import numpy as np

from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.kernels.fused_op import FusedOp, Launch, random_array
from mlx_fastvlm.kernels.gpu import DTYPES, MOST_GROUPS, GpuKernel

KERNEL = GpuKernel(
    name="rotary_heads",
    inputs=("product", "bias", "offset", "log2_base"),
    outputs=("queries", "keys", "values"),
    source="""
    // product (B, L, (QUERIES + 2 * KEYS) * WIDTH); a thread takes the two numbers of a head that rotate together.
    constexpr int HALF = WIDTH / 2, HEADS = QUERIES + 2 * KEYS;
    const int L = product_shape[1];
    const int pair = int(thread_position_in_grid.x), head = int(thread_position_in_grid.y);
    const int batch = int(threadgroup_position_in_grid.z) / L, position = int(threadgroup_position_in_grid.z) % L;
    if (pair < HALF && head < HEADS) {
        const size_t from = ((size_t(batch) * L + position) * HEADS + head) * WIDTH + pair;
        const float a = float(T(float(product[from]) + float(bias[head * WIDTH + pair])));
        const float b = float(T(float(product[from + HALF]) + float(bias[head * WIDTH + pair + HALF])));
        if (head < QUERIES + KEYS) {
            const float angle = float(offset[batch] + position) * metal::exp2(-(float(pair) / float(HALF)) * log2_base[0]);
            const float c = metal::cos(angle), s = metal::sin(angle);
            const T first = T(a * c - b * s), second = T(a * s + b * c);
            if (head < QUERIES) {
                const size_t to = ((size_t(batch) * QUERIES + head) * L + position) * WIDTH + pair;
                queries[to] = first;
                queries[to + HALF] = second;
            } else {
                const size_t to = ((size_t(batch) * KEYS + head - QUERIES) * L + position) * WIDTH + pair;
                keys[to] = first;
                keys[to + HALF] = second;
            }
        } else {
            const size_t to = ((size_t(batch) * KEYS + head - QUERIES - KEYS) * L + position) * WIDTH + pair;
            values[to] = T(a);
            values[to + HALF] = T(b);
        }
    }
""",
)

Heads = tuple[mx.array, mx.array, mx.array]


def rotary_heads(
    product: mx.array, bias: mx.array, offset: int | mx.array, heads: int, kv_heads: int, base: float
) -> Heads:
    """Queries, keys and values of each head; queries and keys turned by their positions (Su et al., arXiv 2104.09864).

    Args:
        product: (B, L, (heads + 2 · kv_heads) · head_dim), the joint projection without its bias.
        bias: as long as a row of `product`.
        offset: position of the first of the L rows, for all of the batch or (B,) int32 for each.
        heads, kv_heads: of queries; of keys and of values.
        base: of the rotary embedding (theta).

    Returns:
        Queries (B, heads, L, head_dim), keys and values (B, kv_heads, L, head_dim).
    """
    options = {"heads": heads, "kv_heads": kv_heads, "base": base}
    offsets = mx.array([offset] * len(product), mx.int32) if isinstance(offset, int) else offset
    fused = OP.run(product, bias, offsets, **options)
    if fused is not None:
        return fused
    if isinstance(offset, int) and cpu.is_decode_row(product):
        return rotary_heads_cpu(product, bias, offset, **options)
    return _heads(product, bias, offset, **options)


def rotary_heads_metal(
    product: mx.array, bias: mx.array, offset: mx.array, launch: Launch, heads: int, kv_heads: int, base: float
) -> Heads:
    """`rotary_heads` as one Metal kernel, offset (B,) int32; `launch` from `launches`."""
    return _launch(KERNEL.metal, product, bias, offset, launch, heads, kv_heads, base)


def rotary_heads_cuda(
    product: mx.array, bias: mx.array, offset: mx.array, launch: Launch, heads: int, kv_heads: int, base: float
) -> Heads:
    """`rotary_heads` as one CUDA kernel, offset (B,) int32; `launch` from `launches`."""
    return _launch(KERNEL.cuda, product, bias, offset, launch, heads, kv_heads, base)


def rotary_heads_cpu(product: mx.array, bias: mx.array, offset: int, heads: int, kv_heads: int, base: float) -> Heads:
    """`rotary_heads` of one row, at once."""
    mx.eval(product, bias)
    split = (cpu.view(product).reshape(-1) + cpu.view(bias)).reshape(heads + 2 * kv_heads, 1, -1)
    half = split.shape[-1] // 2
    cos, sin = _turns(half, base, offset)
    first, second = split[: heads + kv_heads, :, :half], split[: heads + kv_heads, :, half:]
    rotated = np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    parts = rotated[:heads], rotated[heads:], split[heads + kv_heads :]
    return tuple(mx.array(part[None]) for part in parts)


@functools.lru_cache(maxsize=4)
def _turns(half: int, base: float, position: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of a position's angles, (half,) float32 each: the same for all layers of a step."""
    angles = np.float32(position) * np.exp2(-np.arange(half, dtype=np.float32) / half * np.float32(math.log2(base)))
    return np.cos(angles), np.sin(angles)


def rotary_heads_reference(
    product: mx.array, bias: mx.array, offset: mx.array, heads: int, kv_heads: int, base: float
) -> Heads:
    """`rotary_heads` in plain MLX ops, offset (B,) int32."""
    return _heads(product, bias, offset, heads, kv_heads, base)


def launches(
    product: mx.array, bias: mx.array, offset: mx.array, heads: int, kv_heads: int, base: float
) -> list[Launch]:
    """Launch shapes: heads a threadgroup."""
    fits = min(product.size, bias.size) >= 8 and product.shape[0] * product.shape[1] <= MOST_GROUPS
    if not fits or product.dtype not in DTYPES or bias.dtype != product.dtype:
        return []
    return [{"heads": count} for count in (2, 1, 4, 8)]


def _heads(product: mx.array, bias: mx.array, offset: int | mx.array, heads: int, kv_heads: int, base: float) -> Heads:
    batch, length, width = product.shape
    all_heads = heads + 2 * kv_heads
    split = (product + bias).reshape(batch, length, all_heads, width // all_heads).transpose(0, 2, 1, 3)
    # Queries and keys lie side by side, so one call rotates both.
    rotated = mx.fast.rope(
        split[:, : heads + kv_heads], split.shape[-1], traditional=False, base=base, scale=1.0, offset=offset
    )
    return rotated[:, :heads], rotated[:, heads:], split[:, heads + kv_heads :]


def _sample(product: mx.array, bias: mx.array, offset: mx.array, **options) -> tuple[mx.array, ...]:
    batch = min(len(product), 8)  # MLX declares eight offsets or more in another way than fewer
    rows = random_array((batch, 3, product.shape[-1]), product.dtype, 0)
    return rows, random_array(bias.shape, product.dtype, 1), mx.arange(7, 7 + batch, dtype=mx.int32)


def _launch(run, product, bias, offset, launch: Launch, heads: int, kv_heads: int, base: float) -> Heads:
    batch, length, width = product.shape
    all_heads = heads + 2 * kv_heads
    head_dim = width // all_heads
    queries, keys, values = run(
        [product, bias, offset, mx.array([math.log2(base)], mx.float32)],
        template={"T": product.dtype, "QUERIES": heads, "KEYS": kv_heads, "WIDTH": head_dim},
        groups=(1, -(-all_heads // launch["heads"]), batch * length),
        threadgroup=(-(-head_dim // 64) * 32, launch["heads"], 1),
        output_shapes=[(batch, count, length, head_dim) for count in (heads, kv_heads, kv_heads)],
        output_dtypes=[product.dtype] * 3,
    )
    return queries, keys, values


OP = FusedOp("rotary_heads", rotary_heads_metal, rotary_heads_cuda, rotary_heads_reference, launches, _sample)
