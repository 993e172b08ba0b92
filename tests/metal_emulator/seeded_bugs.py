"""Kernels with mistakes put in on purpose, to measure what the emulator finds: six correct kernels, and changes to their text.

Data only; tests/test_metal_emulator.py runs it. Every bug names the detector that must see it:
    a kind of finding (findings.KINDS) of mode "check" or "as", or
    "compile"   clang rejects the kernel,
    "numbers"   the result is wrong in one of several thread orders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass(frozen=True)
class Base:
    """A correct kernel with one call of it.

    Attributes:
        input_names, output_names, source, header: as metal_kernel takes them.
        inputs: name → numpy array, float arrays as float32.
        dtype: what float inputs and outputs are converted to (template T).
        call: the other arguments of the kernel's call.
        reference: the outputs from the inputs as float32.
        tolerance: largest difference over the reference's largest value.
    """

    name: str
    input_names: list[str]
    output_names: list[str]
    source: str
    inputs: dict[str, np.ndarray]
    dtype: mx.Dtype
    call: dict
    reference: Callable[..., list[np.ndarray]]
    tolerance: float
    header: str = ""


@dataclass(frozen=True)
class Bug:
    """A change to a base kernel.

    Attributes:
        name: what is wrong, in words.
        base: the kernel's name.
        detector: what must see it; see the module's docstring.
        replace: (old, new) texts of the source; every old text must be there.
        call: arguments of the call that differ.
    """

    name: str
    base: str
    detector: str
    replace: tuple[tuple[str, str], ...] = ()
    call: dict = field(default_factory=dict)


def numbers(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Normal random numbers, float32."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


# ---- two depthwise 3×3 convolutions in one pass, NHWC, the first one's result in threadgroup memory


CONVOLUTIONS = """
    constexpr int IW = TW + 4, IH = TH + 4, MW = TW + 2, MH = TH + 2;
    threadgroup float tile[IH][IW][CB];
    threadgroup float middle[MH][MW][CB];
    const int H = x_shape[1], W = x_shape[2], C = x_shape[3];
    const int tiles_down = (H + TH - 1) / TH;
    const int c0 = threadgroup_position_in_grid.x * CB;
    const int x0 = threadgroup_position_in_grid.y * TW;
    const int y0 = (threadgroup_position_in_grid.z % tiles_down) * TH;
    const int b = threadgroup_position_in_grid.z / tiles_down;
    constexpr int THREADS = CB * TW * TH;
    for (int i = thread_index_in_threadgroup; i < IH * IW * CB; i += THREADS) {
        const int c = i % CB, col = i / CB % IW, row = i / CB / IW;
        const int gx = x0 + col - 2, gy = y0 + row - 2;
        const bool inside = gx >= 0 && gx < W && gy >= 0 && gy < H && c0 + c < C;
        tile[row][col][c] = inside ? float(x[((b * H + gy) * W + gx) * C + c0 + c]) : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = thread_index_in_threadgroup; i < MH * MW * CB; i += THREADS) {
        const int c = i % CB, col = i / CB % MW, row = i / CB / MW;
        const int gx = x0 + col - 1, gy = y0 + row - 1;
        float sum = 0;
        if (gx >= 0 && gx < W && gy >= 0 && gy < H && c0 + c < C) {
            for (int ky = 0; ky < 3; ++ky)
                for (int kx = 0; kx < 3; ++kx)
                    sum += tile[row + ky][col + kx][c] * float(w[(c0 + c) * 9 + ky * 3 + kx]);
        }
        middle[row][col][c] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int c = thread_position_in_threadgroup.x;
    const int ox = thread_position_in_threadgroup.y, oy = thread_position_in_threadgroup.z;
    if (x0 + ox < W && y0 + oy < H && c0 + c < C) {
        float sum = float(bias[c0 + c]);
        for (int ky = 0; ky < 3; ++ky)
            for (int kx = 0; kx < 3; ++kx)
                sum += middle[oy + ky][ox + kx][c] * float(v[(c0 + c) * 9 + ky * 3 + kx]);
        out[((b * H + y0 + oy) * W + x0 + ox) * C + c0 + c] = T(sum);
    }
"""


def depthwise(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """3×3, stride 1, zero padding; x (B, H, W, C), w (C, 3, 3)."""
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        padded[:, ky : ky + height, kx : kx + width] * w[:, ky, kx] for ky in range(3) for kx in range(3)
    )  # fmt: skip


# ---- h = x + r, y = h / rms(h) · w, one row per threadgroup


ADD_NORM = """
    threadgroup float partial[32];
    const int D = x_shape[1];
    const int row = threadgroup_position_in_grid.y;
    const device T* xr = x + row * D;
    const device T* rr = r + row * D;
    device T* hr = h + row * D;
    device T* yr = y + row * D;
    const int start = thread_index_in_threadgroup * 4;
    float squares = 0;
    for (int i = start; i < D; i += 4 * NT) {
        vec<T, 4> value = *(const device vec<T, 4>*)(xr + i) + *(const device vec<T, 4>*)(rr + i);
        *(device vec<T, 4>*)(hr + i) = value;
        float4 wide = float4(value);
        squares += dot(wide, wide);
    }
    squares = simd_sum(squares);
    if (thread_index_in_simdgroup == 0) partial[simdgroup_index_in_threadgroup] = squares;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    squares = simd_sum(thread_index_in_simdgroup < NT / 32 ? partial[thread_index_in_simdgroup] : 0.0f);
    const float scale = metal::rsqrt(squares / D + eps[0]);
    for (int i = start; i < D; i += 4 * NT) {
        float4 wide = float4(*(device vec<T, 4>*)(hr + i)) * scale * float4(*(const device vec<T, 4>*)(w + i));
        *(device vec<T, 4>*)(yr + i) = vec<T, 4>(wide);
    }
"""


def add_norm(x, r, w, eps):
    h = x + r
    return [h, h / np.sqrt((h * h).mean(-1, keepdims=True) + eps[0]) * w]


# ---- C = A · B with simdgroup_matrix, A and B staged in threadgroup memory


MATMUL = """
    threadgroup T left[8 * 8];
    threadgroup T right[8 * 8];
    const int K = A_shape[1], N = B_shape[1];
    const int column = threadgroup_position_in_grid.x * 8, row = threadgroup_position_in_grid.y * 8;
    const int lane = thread_index_in_threadgroup;
    simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (int k = 0; k < K; k += 8) {
        for (int i = lane; i < 64; i += 32) {
            left[i] = A[(row + i / 8) * K + k + i % 8];
            right[i] = B[(k + i / 8) * N + column + i % 8];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        simdgroup_matrix<T, 8, 8> a, b;
        simdgroup_load(a, left, 8);
        simdgroup_load(b, right, 8);
        simdgroup_multiply_accumulate(sum, a, b, sum);
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    simdgroup_store(sum, C + row * N + column, N);
"""


# ---- how often each of 16 values occurs: counted per threadgroup, added up with device atomics


HISTOGRAM = """
    threadgroup atomic_uint counts[16];
    const uint lane = thread_index_in_threadgroup;
    if (lane < 16) atomic_store_explicit(&counts[lane], 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int n = values_shape[0];
    const int i = thread_position_in_grid.x;
    if (i < n) atomic_fetch_add_explicit(&counts[values[i]], 1u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lane < 16) {
        const uint count = atomic_load_explicit(&counts[lane], memory_order_relaxed);
        atomic_fetch_add_explicit(&total[lane], count, memory_order_relaxed);
    }
"""


# ---- transpose through a padded tile


TRANSPOSE = """
    threadgroup T tile[16][17];
    const int rows = x_shape[0], columns = x_shape[1];
    const int tx = thread_position_in_threadgroup.x, ty = thread_position_in_threadgroup.y;
    const int column = threadgroup_position_in_grid.x * 16 + tx, row = threadgroup_position_in_grid.y * 16 + ty;
    if (row < rows && column < columns) tile[ty][tx] = x[row * columns + column];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int to_row = threadgroup_position_in_grid.x * 16 + ty, to_column = threadgroup_position_in_grid.y * 16 + tx;
    if (to_row < columns && to_column < rows) out[to_row * rows + to_column] = tile[tx][ty];
"""


# ---- running sums along rows, one simdgroup per row, with a helper in the header


SCAN_HEADER = """
inline float last_lane(float value) { return simd_shuffle(value, ushort(31)); }
inline void store(device float* to, int i, float value, int n) { if (i < n) to[i] = value; }
"""
SCAN = """
    const int n = x_shape[1];
    const int row = thread_position_in_grid.y;
    const int lane = thread_index_in_simdgroup;
    float carried = 0;
    for (int start = 0; start < n; start += 32) {
        const int i = start + lane;
        const float value = i < n ? x[row * n + i] : 0.0f;
        const float sum = simd_prefix_inclusive_sum(value) + carried;
        store(out + row * n, i, sum, n);
        carried = last_lane(sum);
    }
"""


def bases() -> dict[str, Base]:
    """The correct kernels by name, on small shapes with ragged edges."""
    image = {
        "x": numbers(0, 1, 13, 10, 12),
        "w": numbers(1, 12, 3, 3),
        "v": numbers(2, 12, 3, 3),
        "bias": numbers(3, 12),
    }
    rows = {"x": numbers(4, 4, 768), "r": numbers(5, 4, 768), "w": numbers(6, 768), "eps": np.float32([1e-5])}
    matrices = {"A": numbers(7, 32, 40), "B": numbers(8, 40, 24)}
    drawn = np.random.default_rng(9).integers(0, 16, 300).astype(np.uint32)
    half, single = mx.float16, mx.float32
    return {
        base.name: base
        for base in (
            Base(
                "convolutions", ["x", "w", "v", "bias"], ["out"], CONVOLUTIONS, image, half,
                dict(template=[("T", half), ("CB", 8), ("TW", 4), ("TH", 8)], grid=(16, 12, 16), threadgroup=(8, 4, 8),
                     output_shapes=[(1, 13, 10, 12)], output_dtypes=[half]),
                lambda x, w, v, bias: [depthwise(depthwise(x, w), v) + bias], 4e-3,
            ),
            Base(
                "add_norm", ["x", "r", "w", "eps"], ["h", "y"], ADD_NORM, rows, half,
                dict(template=[("T", half), ("NT", 128)], grid=(128, 4, 1), threadgroup=(128, 1, 1),
                     output_shapes=[(4, 768)] * 2, output_dtypes=[half] * 2),
                add_norm, 4e-3,
            ),
            Base(
                "matmul", ["A", "B"], ["C"], MATMUL, matrices, half,
                dict(template=[("T", half)], grid=(32 * 3, 4, 1), threadgroup=(32, 1, 1), output_shapes=[(32, 24)],
                     output_dtypes=[single]),
                lambda a, b: [a @ b], 1e-5,
            ),
            Base(
                "histogram", ["values"], ["total"], HISTOGRAM, {"values": drawn}, single,
                dict(grid=(320, 1, 1), threadgroup=(64, 1, 1), output_shapes=[(16,)], output_dtypes=[mx.uint32],
                     init_value=0),
                lambda values: [np.bincount(values, minlength=16).astype(np.float32)], 0.0,
            ),
            Base(
                "transpose", ["x"], ["out"], TRANSPOSE, {"x": numbers(10, 20, 40)}, single,
                dict(template=[("T", single)], grid=(48, 32, 1), threadgroup=(16, 16, 1), output_shapes=[(40, 20)],
                     output_dtypes=[single]),
                lambda x: [x.T], 0.0,
            ),
            Base(
                "scan", ["x"], ["out"], SCAN, {"x": numbers(11, 6, 77)}, single,
                dict(grid=(32, 6, 1), threadgroup=(32, 2, 1), output_shapes=[(6, 77)], output_dtypes=[single]),
                lambda x: [np.cumsum(x, -1)], 1e-5, SCAN_HEADER,
            ),
        )
    }  # fmt: skip


def before_barrier(text: str, which: int, base: str) -> tuple[str, str]:
    """Replaces the barrier number `which` (0 or 1) of a base that has two by `text`."""
    source = {"convolutions": CONVOLUTIONS, "matmul": MATMUL, "histogram": HISTOGRAM}[base]
    start = source.index(BARRIER)
    if which:
        start = source.index(BARRIER, start + 1)
    # The line before tells the two apart.
    line_start = source.rindex("\n", 0, source.rindex("\n", 0, start))
    old = source[line_start : start + len(BARRIER)]
    return old, old[: -len(BARRIER)] + text


DEVICE_BARRIER = "threadgroup_barrier(mem_flags::mem_device);"
NO_FLAGS = "threadgroup_barrier(mem_flags::mem_none);"
FIRST_GUARD = "gx >= 0 && gx < W && gy >= 0 && gy < H && c0 + c < C;"
OUT_GUARD = "if (x0 + ox < W && y0 + oy < H && c0 + c < C) {"
NORM_LOOP = "for (int i = start; i < D; i += 4 * NT) {\n        vec"
HERE = "constexpr int THREADS"

BUGS = [
    # Barriers and races.
    Bug("first barrier missing", "convolutions", "race", (before_barrier("", 0, "convolutions"),)),
    Bug("second barrier missing", "convolutions", "race", (before_barrier("", 1, "convolutions"),)),
    Bug("barrier for device memory only", "convolutions", "race", (before_barrier(DEVICE_BARRIER, 0, "convolutions"),)),
    Bug("barrier without flags", "convolutions", "race", (before_barrier(NO_FLAGS, 1, "convolutions"),)),
    Bug("simdgroup barrier where threads of several simdgroups share", "convolutions", "race",
        (before_barrier("simdgroup_barrier(mem_flags::mem_threadgroup);", 0, "convolutions"),)),
    Bug("barrier missing in a reduction", "add_norm", "race", ((BARRIER, ""),)),
    Bug("every lane stores the simdgroup's sum", "add_norm", "same-value race",
        (("if (thread_index_in_simdgroup == 0) partial", "partial"),)),
    Bug("last lane stores before it has the sum", "add_norm", "numbers",
        (("squares = simd_sum(squares);\n    if (thread_index_in_simdgroup == 0)",
          "if (thread_index_in_simdgroup == 31)"),)),
    Bug("tile overwritten while others read it", "matmul", "race", (before_barrier("", 1, "matmul"),)),
    Bug("barrier missing in a transpose", "transpose", "race", ((BARRIER, ""),)),
    Bug("plain addition instead of an atomic one, threadgroup memory", "histogram", "race",
        (("threadgroup atomic_uint counts[16];", "threadgroup uint counts[16];"),
         ("atomic_store_explicit(&counts[lane], 0u, memory_order_relaxed);", "counts[lane] = 0u;"),
         ("atomic_fetch_add_explicit(&counts[values[i]], 1u, memory_order_relaxed);", "counts[values[i]] += 1u;"),
         ("atomic_load_explicit(&counts[lane], memory_order_relaxed)", "counts[lane]"))),
    Bug("plain addition between threadgroups", "histogram", "race",
        (("atomic_fetch_add_explicit(&total[lane], count, memory_order_relaxed);",
          "((device uint*)total)[lane] += count;"),)),
    Bug("counts cleared without a barrier", "histogram", "uninitialized read", (before_barrier("", 0, "histogram"),)),
    Bug("two threadgroups write the same rows", "transpose", "race",
        (("const int to_row = threadgroup_position_in_grid.x * 16 + ty,",
          "const int to_row = threadgroup_position_in_grid.x / 2 * 16 + ty,"),)),
    Bug("every row's sums stored in the first", "scan", "race", (("store(out + row * n,", "store(out,"),)),
    # Divergence.
    Bug("barrier in divergent flow", "convolutions", "divergent barrier",
        (before_barrier("if (thread_position_in_threadgroup.x < 4) { " + BARRIER + " }", 0, "convolutions"),)),
    Bug("early return before a barrier", "convolutions", "divergent barrier",
        (before_barrier("if (x0 + int(thread_position_in_threadgroup.y) >= W) return; " + BARRIER, 0, "convolutions"),)),
    Bug("barrier in a loop with different lengths", "histogram", "divergent barrier",
        (("if (i < n) atomic", "for (int k = 0; k < int(lane % 3); ++k) " + BARRIER + "\n    if (i < n) atomic"),)),
    Bug("simd_sum in divergent flow", "add_norm", "divergent simdgroup",
        (("squares = simd_sum(squares);", "if (thread_index_in_simdgroup < 16) squares = simd_sum(squares);"),)),
    Bug("different simdgroup functions in two branches", "add_norm", "divergent simdgroup",
        (("squares = simd_sum(squares);",
          "if (thread_index_in_simdgroup < 16) squares = simd_sum(squares);\n else squares = simd_max(squares);"),)),
    Bug("lanes leave a loop with a simdgroup function", "scan", "inactive lane",
        (("const float value = i < n ? x[row * n + i] : 0.0f;", "if (i >= n) break;\n const float value = x[row * n + i];"),)),
    Bug("shuffle from a lane that does not exist", "scan", "inactive lane", (), dict(threadgroup=(16, 1, 1), grid=(16, 6, 1))),
    # Bounds.
    Bug("no guard on the right edge of the input", "convolutions", "out of bounds",
        ((FIRST_GUARD, "gx >= 0 && gx < W && gy >= 0 && c0 + c < C;"),)),
    Bug("no guard on the left and top edge", "convolutions", "out of bounds",
        ((FIRST_GUARD, "gx < W && gy < H && c0 + c < C;"),)),
    Bug("no guard on channels", "convolutions", "out of bounds", ((OUT_GUARD, "if (x0 + ox < W && y0 + oy < H) {"),)),
    Bug("no guard on the output's width", "convolutions", "race", ((OUT_GUARD, "if (y0 + oy < H && c0 + c < C) {"),)),
    Bug("tile one row short", "convolutions", "out of bounds", (("tile[IH][IW][CB]", "tile[IH - 1][IW][CB]"),)),
    Bug("tile one column short", "convolutions", "undefined behavior",
        (("middle[MH][MW][CB]", "middle[MH][MW - 1][CB]"),)),
    Bug("vector past the end of the row", "add_norm", "out of bounds",
        ((NORM_LOOP, "for (int i = start; i < D + 4; i += 4 * NT) {\n        vec"),)),
    Bug("wrong stride of the weights", "convolutions", "numbers", (("float(v[(c0 + c) * 9", "float(v[(c0 + c) * 8"),)),
    Bug("index without a guard in the last threadgroup", "histogram", "out of bounds", (("if (i < n) atomic", "atomic"),)),
    Bug("one element past the rows", "scan", "out of bounds", (("if (i < n) to[i] = value;", "if (i <= n) to[i] = value;"),)),
    Bug("private array too short", "add_norm", "undefined behavior",
        (("float squares = 0;", "float squares = 0; float kept[4];"),
         ("squares += dot(wide, wide);", "kept[i / (4 * NT) * 4] = dot(wide, wide); squares += kept[i / (4 * NT) * 4];"))),
    Bug("read of a constant past its end", "add_norm", "out of bounds", (("+ eps[0]", "+ eps[0] + 0 * eps[1]"),)),
    Bug("16-bit index overflows", "convolutions", "undefined behavior",
        (("out[((b * H + y0 + oy) * W + x0 + ox) * C + c0 + c] = T(sum);",
          "const char at = ((b * H + y0 + oy) * W + x0 + ox) * C + c0 + c;\n out[uchar(at)] = T(sum);"),)),
    Bug("int overflow in an index", "scan", "undefined behavior",
        (("const int row = thread_position_in_grid.y;",
          "const int row = thread_position_in_grid.y;\n const int far = (row + 1) * 1000000000;"),
         ("store(out + row * n, i, sum, n);", "store(out + row * n, i, far == 7 ? 0.0f : sum, n);"))),
    # Memory that was never written.
    Bug("uninitialized threadgroup memory read", "add_norm", "uninitialized read",
        (("thread_index_in_simdgroup < NT / 32 ? partial[thread_index_in_simdgroup] : 0.0f",
          "partial[thread_index_in_simdgroup]"),)),
    Bug("edge of the tile not filled", "convolutions", "uninitialized read",
        (("tile[row][col][c] = inside ?", "if (inside) tile[row][col][c] = inside ?"),)),
    Bug("output read before it is written", "transpose", "uninitialized read",
        (("= tile[tx][ty];", "+= tile[tx][ty];"),)),
    Bug("variable never set", "convolutions", "uninitialized read",
        (("float sum = float(bias[c0 + c]);", "float sum;"),)),
    Bug("output not cleared", "histogram", "uninitialized read", (), dict(init_value=None)),
    Bug("grid too small", "convolutions", "unwritten output", (), dict(grid=(16, 8, 16))),
    Bug("rows skipped", "scan", "unwritten output", (), dict(grid=(32, 4, 1))),
    # Launches.
    Bug("grid's axes swapped", "transpose", "unwritten output", (), dict(grid=(32, 48, 1))),
    Bug("more than 32 KB of threadgroup memory", "convolutions", "threadgroup memory", (),
        dict(template=[("T", mx.float16), ("CB", 128), ("TW", 4), ("TH", 2)], grid=(128, 12, 14), threadgroup=(128, 4, 2))),
    Bug("more than 1024 threads", "convolutions", "thread count", (),
        dict(template=[("T", mx.float16), ("CB", 8), ("TW", 16), ("TH", 16)], grid=(16, 16, 16), threadgroup=(8, 16, 16))),
    Bug("wrong first value", "histogram", "numbers", (), dict(init_value=1)),
    # Vectors and matrices.
    Bug("misaligned vector", "add_norm", "misaligned",
        ((NORM_LOOP, "for (int i = start + 1; i < D - 4; i += 4 * NT) {\n        vec"),)),
    Bug("wrong element of a vector", "add_norm", "numbers",
        (("float4 wide = float4(value);", "float4 wide = float4(value.xyz, value.x);"),)),
    Bug("vector constructor with too few components", "add_norm", "compile",
        (("float4 wide = float4(value);", "float4 wide = float4(value.xy, value.x);"),)),
    Bug("matrix loaded transposed", "matmul", "numbers",
        (("simdgroup_load(b, right, 8);", "simdgroup_load(b, right, 8, ulong2(0), true);"),)),
    Bug("matrix read past the tile", "matmul", "out of bounds",
        (("simdgroup_load(b, right, 8);", "simdgroup_load(b, right, 9);"),)),
    Bug("matrix product in divergent flow", "matmul", "divergent simdgroup",
        (("simdgroup_multiply_accumulate(sum, a, b, sum);",
          "if (lane != 5) simdgroup_multiply_accumulate(sum, a, b, sum);"),)),
    Bug("matrix sum not cleared", "matmul", "numbers",
        (("make_filled_simdgroup_matrix<float, 8, 8>(0.0f)", "make_filled_simdgroup_matrix<float, 8, 8>(1.0f)"),)),
    # Arithmetic.
    Bug("sum kept in half", "add_norm", "half accumulation", (("float squares = 0;", "half squares = 0;"),)),
    Bug("half sum in a convolution", "convolutions", "half accumulation",
        (("float sum = float(bias[c0 + c]);", "half sum = half(bias[c0 + c]);"),)),
    Bug("wrong sign of the halo", "convolutions", "numbers", (("x0 + col - 2", "x0 + col - 1"),)),
    # The language.
    Bug("write to an input", "convolutions", "compile", ((HERE, "x[0] = T(0);\n    " + HERE),)),
    Bug("write to an input through a cast", "convolutions", "write to input",
        ((HERE, "((device T*)x)[0] = T(0);\n    " + HERE),)),
    Bug("threadgroup pointer as device pointer", "convolutions", "address space",
        ((HERE, "device float* p = &tile[0][0][0]; (void)p;\n    " + HERE),)),
    Bug("device pointer given to a threadgroup load", "matmul", "address space",
        (("simdgroup_load(a, left, 8);", "const threadgroup T* p = A; simdgroup_load(a, p, 8);"),)),
    Bug("constant passed as device", "add_norm", "address space",
        (("float squares = 0;", "const device float* p = eps; float squares = 0; (void)p;"),)),
    Bug("pointer without an address space", "convolutions", "lint", ((HERE, "const T* p = x; (void)p;\n    " + HERE),)),
    Bug("double", "convolutions", "lint", (("float sum = 0;", "double sum = 0;"),)),
    Bug("function that MSL lacks", "add_norm", "compile", (("metal::rsqrt(squares / D + eps[0])", "erf(squares / D + eps[0])"),)),
    Bug("C++ library", "add_norm", "lint", (("metal::rsqrt(squares / D", "1.0f / std::decay_t<float>(squares / D"),)),
    Bug("header of the C++ library", "scan", "lint",
        (("inline float last_lane", "#include <cmath>\ninline float last_lane"),)),
    Bug("lambda expression", "add_norm", "lint",
        (("const float scale = metal::rsqrt(squares / D + eps[0]);",
          "auto inverse = [&](float v) { return metal::rsqrt(v); };\n const float scale = inverse(squares / D + eps[0]);"),)),
    Bug("initialized threadgroup variable", "scan", "lint",
        (("float carried = 0;", "threadgroup float unused = 0; float carried = 0;"),)),
    Bug("implicit conversion to bfloat", "add_norm", "implicit conversion",
        (("float squares = 0;", "bfloat b = 1.0f; float squares = 0; (void)b;"),)),
    Bug("wrong member of a position", "transpose", "compile",
        (("ty = thread_position_in_threadgroup.y;", "ty = thread_position_in_threadgroup.yy;"),)),
    Bug("builtin hidden in the header", "scan", "compile",
        (("const int lane = thread_index_in_simdgroup;", "const int lane = MY_LANE;"),
         ("inline float last_lane", "#define MY_LANE thread_index_in_simdgroup\ninline float last_lane"))),
    Bug("endless loop", "scan", "timeout", (("start += 32", "start += 0"),)),
]  # fmt: skip
