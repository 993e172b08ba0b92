"""The Metal emulator itself: it computes what Metal would, finds seeded bugs, raises no false alarm and counts right."""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_emulator import Counts, EmulationError, available, emulated
from tests.metal_emulator.findings import KINDS
from tests.metal_emulator.seeded_bugs import BUGS, Base, Bug, bases
from tests.metal_emulator.toolchain import CLANG_VARIABLE, find_toolchain
from tests.metal_emulator.translate import rewrite

needs_clang = pytest.mark.skipif(available() is not None, reason=str(available()))
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
NUMPY = {"float32": np.float32, "float16": np.float16}
ORDERS = ("forward", "reversed", 1, 2)
THREAD = "const uint i = thread_position_in_grid.x;\n"


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def launch(source: str, inputs: dict, outputs: dict, *, grid, threadgroup, mode="run", header="", options=None, **call):
    """Runs one kernel in a session of its own: (outputs, session)."""
    order = call.pop("order", "forward")
    workers = call.pop("workers", 1)
    with emulated(mode, order, workers) as session:
        kernel = mx.fast.metal_kernel(
            name="k",
            input_names=list(inputs),
            output_names=list(outputs),
            source=source,
            header=header,
            **(options or {}),
        )
        found = kernel(
            inputs=list(inputs.values()),
            output_shapes=[shape for shape, _ in outputs.values()],
            output_dtypes=[dtype for _, dtype in outputs.values()],
            grid=grid,
            threadgroup=threadgroup,
            **call,
        )
    return found, session


def per_thread(source: str, x: mx.array, dtype: mx.Dtype | None = None, **call) -> mx.array:
    """One output element per input element, 64 threads per threadgroup."""
    outputs = {"out": (x.shape, dtype or x.dtype)}
    call.setdefault("template", [("T", x.dtype)])
    (out,), _ = launch(THREAD + source, {"x": x}, outputs, grid=(x.size, 1, 1), threadgroup=(64, 1, 1), **call)
    return out


# ---- the seeded bugs


def run_base(base: Base, mode: str, order="forward", bug: Bug | None = None) -> set[str]:
    """What is noticed when a base kernel, or one with a bug, is run: kinds of findings, "compile", "numbers"."""
    source, header = base.source, base.header
    for old, new in bug.replace if bug else ():
        assert old in source or old in header, f"{bug.name}: the text to replace is not there: {old}"
        source, header = source.replace(old, new, 1), header.replace(old, new, 1)
    arrays = []
    for name in base.input_names:
        array = mx.array(base.inputs[name])
        arrays.append(array.astype(base.dtype) if array.dtype == mx.float32 and array.size > 1 else array)
    try:
        with emulated(mode, order, timeout=3.0) as session:
            kernel = mx.fast.metal_kernel(
                name=base.name,
                input_names=base.input_names,
                output_names=base.output_names,
                source=source,
                header=header,
                atomic_outputs=base.name == "histogram",
            )
            found = kernel(inputs=arrays, **(base.call | (bug.call if bug else {})))
    except EmulationError:
        return {"compile"}
    noticed = {finding.kind for finding in session.findings}
    wanted = base.reference(
        *(np.array(array if array.dtype == mx.uint32 else array.astype(mx.float32)) for array in arrays)
    )
    right = all(
        np.abs(np.array(ours.astype(mx.float32)) - theirs).max() <= base.tolerance * np.abs(theirs).max()
        for ours, theirs in zip(found, wanted, strict=True)
    )
    return noticed if right or mode == "as" else noticed | {"numbers"}


def mode_for(bug: Bug) -> str:
    """The cheapest mode in which a bug's detector works."""
    detector = bug.detector
    if bug.name == "variable never set" or detector in (
        "lint",
        "address space",
        "implicit conversion",
        "half accumulation",
    ):
        return "as"
    return "run" if detector in ("numbers", "compile", "timeout") else "check"


@needs_clang
@pytest.mark.parametrize("name", bases())
def test_the_kernels_without_bugs_are_right_and_clean(name):
    base = bases()[name]
    for order in ORDERS:
        assert run_base(base, "run", order) == set()
        assert run_base(base, "check", order) == set()
    assert run_base(base, "as") == set()


@needs_clang
def test_seeded_bugs_are_found():
    kernels = bases()
    missed = []
    for bug in BUGS:
        noticed = run_base(kernels[bug.base], mode_for(bug), bug=bug)
        if bug.detector not in noticed:
            missed.append(f"{bug.base}: {bug.name}: wanted {bug.detector!r}, noticed {sorted(noticed) or 'nothing'}")
    assert not missed, f"{len(missed)} of {len(BUGS)} are not found:\n" + "\n".join(missed)


def test_every_detector_is_a_kind_of_finding():
    assert {bug.detector for bug in BUGS} <= {*KINDS, "compile", "numbers"}


@needs_clang
def test_a_race_is_found_in_every_order():
    base = bases()["convolutions"]
    bug = next(bug for bug in BUGS if bug.name == "barrier for device memory only")
    for order in ORDERS:
        assert "race" in run_base(base, "check", order, bug)


@needs_clang
def test_a_finding_names_its_line_and_the_other_access():
    source = """
    threadgroup float tile[32];
    const uint i = thread_index_in_threadgroup;
    tile[i] = x[i];
    out[i] = tile[31 - i];
    """
    _, session = launch(
        source, {"x": mx.zeros(32)}, {"out": ((32,), mx.float32)}, grid=(32, 1, 1), threadgroup=(32, 1, 1), mode="check"
    )
    lines = {finding.line: finding for finding in session.findings if finding.kind == "race"}
    assert lines.keys() <= {4, 5}
    assert any("tile" in finding.message and "the other access: line" in finding.message for finding in lines.values())
    with pytest.raises(AssertionError, match="k line 5: race"):
        session.assert_clean()
    session.assert_clean(allow=("race", "uninitialized read"))


@needs_clang
def test_a_compile_error_points_at_the_line_of_the_source():
    with pytest.raises(EmulationError, match=r"k\.metal:3:10: error: .*undeclared"):
        per_thread("\nout[i] = undeclared;", mx.zeros(64))
    with pytest.raises(EmulationError, match=r"k\.header\.metal:2:\d+: error"):
        per_thread("out[i] = x[i];", mx.zeros(64), header="\nfloat f() { return missing; }\n")


@needs_clang
@pytest.mark.parametrize(
    "source",
    [
        "const int n = 4 * int(i); out[i] = x[i] * T(n);",
        "const auto p = x + i; auto q = p; out[i] = *p * *q;",
        "const device T* p = x, *q = x + 1; out[i] = p[0] * q[0];",
        "thread T v = x[i]; thread T& r = v; out[i] = r * v;",
        "bool both = (i > 1) & (i < 9); T s[2] = {x[i], T(both)}; out[i] = s[i & 1] * s[0];",
        "struct Pair { T a, b; }; Pair p = {x[i], x[i]}; out[i] = p.a * p.b;",
        "const float4 v = float4(1.0, 2, 3.0f, 4); out[i] = T(dot(v, v) * float(x[i]) * 1e-3);",
    ],
)
def test_correct_code_gives_no_finding(source):
    x = mx.ones(64)
    for mode in ("run", "as"):
        outputs = {"out": ((63,), mx.float32)}
        call = dict(grid=(63, 1, 1), threadgroup=(63, 1, 1), template=[("T", mx.float32)])
        _, session = launch(THREAD + source, {"x": x}, outputs, mode=mode, **call)
        session.assert_clean()


# ---- what kernels compute


@needs_clang
@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic_rounds_as_the_type_does(dtype):
    """Each operation is rounded: in half that differs from float arithmetic rounded once."""
    x = mx.array(normal(256)).astype(DTYPES[dtype])
    wanted = x * x * x
    out = per_thread("out[i] = x[i] * x[i] * x[i];", x)
    tolerance = 1e-6 if dtype == "float32" else 0.0
    assert mx.allclose(out.astype(mx.float32), wanted.astype(mx.float32), rtol=tolerance, atol=tolerance)


@needs_clang
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "function",
    "exp exp2 log2 sin cos tanh sqrt rsqrt fabs floor ceil rint trunc precise::exp fast::sin".split(),
)
def test_math_functions(function, dtype):
    x = mx.array(np.abs(normal(128)) + 0.25).astype(DTYPES[dtype])
    plain = function.split("::")[-1]
    numpy = {"rsqrt": lambda v: 1 / np.sqrt(v)}.get(plain) or getattr(np, plain)
    wanted = mx.array(numpy(np.array(x.astype(mx.float32)))).astype(DTYPES[dtype])
    out = per_thread(f"out[i] = metal::{function}(x[i]);", x)
    error = mx.abs(out.astype(mx.float32) - wanted.astype(mx.float32)) / mx.abs(wanted.astype(mx.float32) + 1e-6)
    assert error.max().item() < {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]


@needs_clang
def test_integer_and_select_functions():
    x = mx.array(np.random.default_rng(0).integers(0, 2**31, 64).astype(np.uint32))
    numbers = np.array(x)
    bits = [bin(v).count("1") for v in numbers]
    assert per_thread("out[i] = popcount(x[i]);", x).tolist() == bits
    assert per_thread("out[i] = clz(x[i]);", x).tolist() == [32 - int(v).bit_length() for v in numbers]
    assert per_thread("out[i] = clamp(x[i], 5u, 1000u) + min(x[i], 3u);", x).tolist() == [
        int(np.clip(v, 5, 1000) + min(v, 3)) for v in numbers
    ]
    assert per_thread("out[i] = as_type<uint>(as_type<float>(x[i]));", x).tolist() == numbers.tolist()
    assert per_thread("out[i] = select(1u, 2u, x[i] % 2 == 0);", x).tolist() == [
        2 if v % 2 == 0 else 1 for v in numbers
    ]


@needs_clang
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors(dtype):
    """Loads of four, swizzles, constructors of every form and aliases."""
    x = mx.array(normal(64 * 4)).astype(DTYPES[dtype])
    source = """
    using V = vec<T, 4>;
    const V a = *(const device V*)(x + 4 * i);
    const float4 wide = float4(a);
    const float4 turned = float4(wide.zw, wide.x, wide.y);
    V b = V(T(turned.x), T(turned.y), T(turned.z), T(turned.w));
    b.xy += vec<T, 2>(a.x);
    *(device V*)(out + 4 * i) = b;
    """
    outputs = {"out": (x.shape, x.dtype)}
    (out,), session = launch(
        THREAD + source,
        {"x": x},
        outputs,
        grid=(64, 1, 1),
        threadgroup=(32, 1, 1),
        template=[("T", x.dtype)],
        mode="check",
    )
    session.assert_clean()
    rows = x.reshape(64, 4)
    wanted = mx.concatenate([rows[:, 2:] + rows[:, :1], rows[:, :2]], axis=1)
    assert mx.array_equal(out.reshape(64, 4), wanted)


SIMDGROUP = {
    "simd_sum(v)": lambda v: np.repeat(v.sum(1, keepdims=True), 32, 1),
    "simd_max(v)": lambda v: np.repeat(v.max(1, keepdims=True), 32, 1),
    "simd_min(v)": lambda v: np.repeat(v.min(1, keepdims=True), 32, 1),
    "simd_prefix_inclusive_sum(v)": lambda v: np.cumsum(v, 1),
    "simd_prefix_exclusive_sum(v)": lambda v: np.cumsum(v, 1) - v,
    "simd_shuffle(v, ushort(5))": lambda v: np.repeat(v[:, 5:6], 32, 1),
    "simd_shuffle_xor(v, ushort(3))": lambda v: v[:, np.arange(32) ^ 3],
    "simd_shuffle_down(v, ushort(4))": lambda v: np.concatenate([v[:, 4:], v[:, 28:]], 1),
    "simd_shuffle_up(v, ushort(4))": lambda v: np.concatenate([v[:, :4], v[:, :28]], 1),
    "simd_shuffle_rotate_down(v, ushort(4))": lambda v: np.roll(v, -4, 1),
    "simd_shuffle_and_fill_up(v, T(9), ushort(2))": lambda v: np.concatenate([np.full((4, 2), 9), v[:, :30]], 1),
    "simd_broadcast_first(v)": lambda v: np.repeat(v[:, :1], 32, 1),
    "T(simd_any(v > T(2)))": lambda v: np.repeat((v > 2).any(1, keepdims=True), 32, 1),
    "T(simd_all(v < T(2)))": lambda v: np.repeat((v < 2).all(1, keepdims=True), 32, 1),
    "T(popcount(uint(uint64_t(simd_ballot(v > T(0))))))": lambda v: np.repeat((v > 0).sum(1, keepdims=True), 32, 1),
}


@needs_clang
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_simdgroup_functions(dtype):
    """All of them in one kernel, on whole numbers so that sums are exact in half."""
    numbers = np.random.default_rng(1).integers(-4, 4, 128).astype(NUMPY[dtype])
    body = "const T v = x[i];\n" + "".join(f"out[{n} * 128 + i] = {call};\n" for n, call in enumerate(SIMDGROUP))
    shape = (len(SIMDGROUP), 128)
    (out,), session = launch(
        THREAD + body,
        {"x": mx.array(numbers)},
        {"out": (shape, DTYPES[dtype])},
        grid=(128, 1, 1),
        threadgroup=(64, 1, 1),
        template=[("T", DTYPES[dtype])],
        order=3,
    )
    session.assert_clean()
    for row, (call, function) in zip(np.array(out), SIMDGROUP.items(), strict=True):
        assert np.array_equal(row.reshape(4, 32), function(numbers.reshape(4, 32))), call


@needs_clang
@pytest.mark.parametrize("mode", ["run", "check"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_simdgroup_matrix(dtype, mode):
    """C = A · B by 8×8 tiles straight from device memory, elements changed through thread_elements()."""
    source = """
    const int column = threadgroup_position_in_grid.x, row = threadgroup_position_in_grid.y;
    simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (int k = 0; k < K; k += 8) {
        simdgroup_matrix<T, 8, 8> a, b;
        simdgroup_load(a, A + row * 8 * K + k, K);
        simdgroup_load(b, B + k * N + column * 8, N);
        simdgroup_multiply_accumulate(sum, a, b, sum);
    }
    sum.thread_elements() *= 2.0f;
    simdgroup_store(sum, C + row * 8 * N + column * 8, N);
    """
    a, b = mx.array(normal(16, 24)).astype(DTYPES[dtype]), mx.array(normal(24, 8, seed=1)).astype(DTYPES[dtype])
    (out,), session = launch(
        source,
        {"A": a, "B": b},
        {"C": ((16, 8), mx.float32)},
        grid=(32, 2, 1),
        threadgroup=(32, 1, 1),
        template=[("T", DTYPES[dtype]), ("K", 24), ("N", 8)],
        mode=mode,
    )
    session.assert_clean()
    assert mx.allclose(out, 2 * (a.astype(mx.float32) @ b.astype(mx.float32)), rtol=1e-5, atol=1e-5)


@needs_clang
def test_inputs_of_every_kind():
    """0-d (a reference), few elements (constant), many (device), shapes, strides and Python numbers."""
    source = THREAD + "out[i] = x[i] * scale + few[1] + offset + float(x_shape[0] + int(x_strides[0]) + x_ndim);"
    inputs = {"x": mx.arange(64, dtype=mx.float32), "scale": mx.array(2.0), "few": mx.array([1.0, 7.0]), "offset": 0.5}
    for mode in ("run", "check"):
        (out,), session = launch(
            source, inputs, {"out": ((64,), mx.float32)}, grid=(64, 1, 1), threadgroup=(32, 1, 1), mode=mode
        )
        session.assert_clean()
        assert mx.array_equal(out, inputs["x"] * 2 + 7.5 + (64 + 1 + 1))


@needs_clang
@pytest.mark.parametrize("contiguous", [True, False])
def test_strided_inputs(contiguous):
    """A transposed array is copied, or passed as it lies with its strides."""
    x = mx.arange(6 * 4, dtype=mx.float32).reshape(6, 4).T
    mx.eval(x)
    source = (
        "const uint3 p = thread_position_in_grid;\nout[p.y * 6 + p.x] = x[p.y * x_strides[0] + p.x * x_strides[1]];"
    )
    (out,), session = launch(
        source,
        {"x": x},
        {"out": ((4, 6), mx.float32)},
        grid=(6, 4, 1),
        threadgroup=(6, 4, 1),
        mode="check",
        options={"ensure_row_contiguous": contiguous},
    )
    session.assert_clean()
    assert mx.array_equal(out, x)


@needs_clang
def test_edge_threadgroups_are_trimmed():
    """Metal launches exactly the grid's threads; the last threadgroup is smaller."""
    source = THREAD + "out[i] = float(threads_per_threadgroup.x * 100 + simdgroups_per_threadgroup);"
    (out,), session = launch(
        source,
        {"x": mx.zeros(8)},
        {"out": ((70,), mx.float32)},
        grid=(70, 1, 1),
        threadgroup=(64, 1, 1),
        mode="check",
    )
    session.assert_clean()
    assert out.tolist() == [6402.0] * 64 + [601.0] * 6


@needs_clang
def test_orders_and_workers_do_not_change_a_correct_result():
    source = bases()["add_norm"]
    arrays = [mx.array(source.inputs[name]) for name in source.input_names]
    call = source.call | {"template": [("T", mx.float32), ("NT", 128)], "output_dtypes": [mx.float32] * 2}
    results = []
    for order, workers in [*((order, 1) for order in ORDERS), ("forward", 2)]:
        with emulated("run", order, workers):
            kernel = mx.fast.metal_kernel(
                name="k", input_names=source.input_names, output_names=source.output_names, source=source.source
            )
            results.append(kernel(inputs=arrays, **call)[1])
    assert all(mx.array_equal(results[0], other) for other in results[1:])


@needs_clang
def test_atomics_add_up_with_several_workers():
    add = "atomic_fetch_add_explicit(&out[0], x[i], memory_order_relaxed);"
    source = THREAD + f"for (int k = 0; k < 200; ++k) {add}"
    x = mx.array(np.ones(4096, np.float32))
    (out,), _ = launch(
        source,
        {"x": x},
        {"out": ((1,), mx.float32)},
        grid=(4096, 1, 1),
        threadgroup=(64, 1, 1),
        workers=2,
        init_value=0,
        options={"atomic_outputs": True},
    )
    assert out.item() == 200 * 4096


# ---- counts


def counted(source: str, inputs: dict, outputs: dict, **call) -> Counts:
    _, session = launch(source, inputs, outputs, mode="count", **call)
    return session.launches[0].counts


@needs_clang
@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_of_an_elementwise_kernel(dtype):
    kind, size = DTYPES[dtype], DTYPES[dtype].size
    x, y = (mx.array(normal(256, seed=n)).astype(kind) for n in (0, 1))
    counts = counted(
        THREAD + "out[i] = T(float(x[i]) * float(y[i]) + 1.5f);",
        {"x": x, "y": y},
        {"out": ((256,), kind)},
        grid=(256, 1, 1),
        threadgroup=(64, 1, 1),
        template=[("T", kind)],
    )
    assert (counts.threads, counts.threadgroups, counts.barriers) == (256, 4, 0)
    assert (counts.device_loads, counts.device_stores) == (512, 256)
    assert (counts.device_bytes_read, counts.device_bytes_written) == (512 * size, 256 * size)
    assert (counts.device_bytes_read_unique, counts.device_bytes_written_unique) == (512 * size, 256 * size)
    assert (counts.flops, counts.special) == (512, 0), "a multiplication and an addition per thread"


@needs_clang
@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic_in_every_type_is_counted(dtype):
    """In bfloat too, which the CPU computes by way of float: conversions are not counted."""
    counts = counted(
        THREAD + "T v = x[i]; v = v * v; v = v + x[i]; out[i] = v / T(3);",
        {"x": mx.array(normal(64)).astype(DTYPES[dtype])},
        {"out": ((64,), DTYPES[dtype])},
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        template=[("T", DTYPES[dtype])],
    )
    assert (counts.flops, counts.special) == (64 * 3, 0)


@needs_clang
def test_counts_of_shared_reads():
    """Every thread reads all 64 inputs: 64 times the bytes, each threadgroup's distinct bytes once, each byte once."""
    x = mx.array(normal(64))
    counts = counted(
        THREAD + "float sum = 0; for (int k = 0; k < 64; ++k) sum += x[k]; out[i] = sum;",
        {"x": x},
        {"out": ((128,), mx.float32)},
        grid=(128, 1, 1),
        threadgroup=(32, 1, 1),
    )
    assert counts.device_bytes_read == 128 * 64 * 4
    assert counts.device_bytes_read_per_group == 4 * 64 * 4
    assert counts.device_bytes_read_unique == 64 * 4
    assert counts.device_bytes_written_per_group == counts.device_bytes_written_unique == 128 * 4
    assert counts.flops == 128 * 64


@needs_clang
def test_counts_of_vectors_fma_and_special_functions():
    source = """
    const float4 a = *(const device float4*)(x + 4 * i);
    const float4 b = fma(a, a, a);
    *(device float4*)(out + 4 * i) = float4(metal::exp(b.x), metal::rsqrt(b.y), b.z, metal::max(b.w, 0.5f));
    """
    counts = counted(
        THREAD + source,
        {"x": mx.array(normal(256))},
        {"out": ((256,), mx.float32)},
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
    )
    assert (counts.device_loads, counts.device_bytes_read) == (64, 1024), "one load of four per thread"
    assert (counts.device_stores, counts.device_bytes_written) == (64, 1024)
    assert (counts.flops, counts.special) == (64 * 9, 64 * 2), "4 fused multiply-adds, a maximum; exp and rsqrt"


@needs_clang
def test_counts_of_threadgroup_memory_barriers_and_simdgroups():
    source = """
    threadgroup float tile[64];
    const uint t = thread_index_in_threadgroup;
    tile[t] = x[i] * eps[0];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = simd_sum(tile[63 - t] + tile[t ^ 1]);
    """
    counts = counted(
        THREAD + source,
        {"x": mx.array(normal(256)), "eps": mx.array([2.0])},
        {"out": ((256,), mx.float32)},
        grid=(256, 1, 1),
        threadgroup=(64, 1, 1),
    )
    assert (counts.threadgroup_loads, counts.threadgroup_stores) == (512, 256)
    assert (counts.threadgroup_bytes_read, counts.threadgroup_bytes_written) == (2048, 1024)
    assert (counts.constant_loads, counts.constant_bytes_read) == (256, 1024)
    assert (counts.barriers, counts.threadgroups, counts.threadgroup_memory) == (4, 4, 256)
    assert counts.simdgroup_operations == 8, "one per simdgroup"
    assert counts.flops == 512, "a multiplication and an addition; what simd_sum does inside is not counted"


@needs_clang
def test_counts_of_a_matrix_product():
    base = bases()["matmul"]
    arrays = [mx.array(base.inputs[name]).astype(base.dtype) for name in base.input_names]
    with emulated("count") as session:
        kernel = mx.fast.metal_kernel(
            name="k", input_names=base.input_names, output_names=base.output_names, source=base.source
        )
        kernel(inputs=arrays, **base.call)
        kernel(inputs=arrays, **base.call)
    counts = session.launches[0].counts
    assert counts.flops == 2 * 32 * 40 * 24
    assert counts.device_bytes_read == 2 * (3 * 32 * 40 + 4 * 40 * 24), "A once per column of tiles, B once per row"
    assert counts.device_bytes_read_unique == 2 * (32 * 40 + 40 * 24)
    assert counts.barriers == 12 * 5 * 2
    both = session.counts
    assert both.flops == 2 * counts.flops
    assert both.threadgroup_memory == counts.threadgroup_memory == 256


@needs_clang
def test_counts_follow_the_executed_branches():
    source = THREAD + "float v = x[i]; if (i < 16) for (int k = 0; k < int(i); ++k) v = v * 0.5f + 1.0f; out[i] = v;"
    counts = counted(
        source, {"x": mx.array(normal(64))}, {"out": ((64,), mx.float32)}, grid=(64, 1, 1), threadgroup=(64, 1, 1)
    )
    assert counts.flops == 2 * sum(range(16))


# ---- sessions


@needs_clang
def test_mlx_is_replaced_only_while_entered():
    real, is_available = mx.fast.metal_kernel, mx.metal.is_available
    with emulated(metal_available=True):
        assert mx.fast.metal_kernel is not real
        assert mx.metal.is_available()
    assert mx.fast.metal_kernel is real
    assert mx.metal.is_available is is_available
    with emulated():
        assert mx.metal.is_available() == is_available()
    with pytest.raises(ZeroDivisionError), emulated():
        raise ZeroDivisionError
    assert mx.fast.metal_kernel is real


@needs_clang
def test_a_kernel_made_in_one_session_runs_in_the_next_and_in_none():
    call = dict(output_shapes=[(8,)], output_dtypes=[mx.float32], grid=(8, 1, 1), threadgroup=(8, 1, 1))
    with emulated():
        kernel = mx.fast.metal_kernel(name="k", input_names=["x"], output_names=["o"], source=THREAD + "o[i] = x[i];")
    with emulated("check") as session:
        kernel(inputs=[mx.ones(8)], **call)
        assert kernel(inputs=[mx.ones(8)], **call)[0].tolist() == [1.0] * 8
    assert [launch.name for launch in session.launches] == ["k", "k"]
    assert session.launches[0].grid == (8, 1, 1)
    assert "[[kernel]] void" in session.launches[0].source
    with pytest.raises(EmulationError, match="outside"):
        kernel(inputs=[mx.ones(8)], **call)


@needs_clang
def test_tracing_is_refused():
    @functools.partial(mx.compile)
    def traced(x):
        return per_thread("out[i] = x[i];", x)

    with pytest.raises(EmulationError, match="while MLX traces"):
        traced(mx.ones(64))


@needs_clang
def test_static_mode_returns_zeros_and_does_not_run():
    x = mx.ones(64)
    (out,), session = launch(
        THREAD + "out[i + 1000000000] = x[i];",
        {"x": x},
        {"out": ((64,), mx.float32)},
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        mode="as",
    )
    assert out.tolist() == [0.0] * 64
    session.assert_clean()


@needs_clang
def test_a_crash_is_a_finding():
    _, session = launch(
        THREAD + "out[i + 100000000000] = x[i];",
        {"x": mx.ones(64)},
        {"out": ((64,), mx.float32)},
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
    )
    assert [(finding.kind, finding.line) for finding in session.findings] == [("crash", 2)]


@needs_clang
def test_calls_that_mlx_rejects_are_reported():
    with pytest.raises(EmulationError, match="MLX rejects the call of kernel k"):
        launch(
            "",
            {"x": mx.ones(8)},
            {"out": ((8,), mx.float32)},
            grid=(8, 1, 1),
            threadgroup=(8, 1, 1),
            template=[("T", "x")],
        )
    with pytest.raises(ValueError, match="mode 'fast' is none of"), emulated("fast"):
        pass
    with pytest.raises(ValueError, match="order 'sideways'"), emulated(order="sideways"):
        pass


@needs_clang
def test_prebuild_compiles_for_later_sessions(tmp_path, monkeypatch):
    unique = f"out[i] = x[i] + {np.random.default_rng().integers(1, 10**9)}.0f;"
    with emulated("run", prebuild=("check", "as")):
        kernel = mx.fast.metal_kernel(name="prebuilt", input_names=["x"], output_names=["out"], source=THREAD + unique)
        call = dict(output_shapes=[(64,)], output_dtypes=[mx.float32], grid=(64, 1, 1), threadgroup=(64, 1, 1))
        kernel(inputs=[mx.ones(64)], **call)
    with emulated("check") as session:
        kernel(inputs=[mx.ones(64)], **call)
    session.assert_clean()


def test_without_clang_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setenv(CLANG_VARIABLE, "/nowhere/clang++")
    find_toolchain.cache_clear()
    try:
        reason = available()
        assert reason is None or "\n" not in reason
        assert "apt-get install clang" in str(reason) or "runs on Linux" in str(reason)
        with pytest.raises(EmulationError), emulated():
            pass
    finally:
        monkeypatch.undo()
        find_toolchain.cache_clear()


# ---- translation


@pytest.mark.parametrize(
    ("metal", "cpp"),
    [
        ("float x = 1.5 + 2e-3 + 1.0f + 3 + 0x1e5;", "float x = 1.5f + 2e-3f + 1.0f + 3 + 0x1e5;"),
        ("float4(a) + metal::float2(x, y)", "msl_make_vec<float, 4>(a) + metal::msl_make_vec<float, 2>(x, y)"),
        ("vec<T, 4>(a); vec<T, 4> b;", "msl_make_vec<T, 4>(a); vec<T, 4> b;"),
        ("using V = vec<T, 4>; V(x)", "using V = vec<T, 4>; msl_make<V>(x)"),
        ("device T* x [[buffer(0)]]; int a[b[0]];", "device T* x ; int a[b[0]];"),
        ("void f(threadgroup float* p, threadgroup T& q);", "void f(threadgroup float* p, threadgroup T& q);"),
        (
            "threadgroup float a[4], b[N + 1][8];",
            'float (&a)[4] = ::msl::threadgroup_variable<float [4]>("a", 1); '
            'float (&b)[N + 1][8] = ::msl::threadgroup_variable<float [N + 1][8]>("b", 2);',
        ),
        ("// threadgroup float a[1.5];\n", "// threadgroup float a[1.5];\n"),
        ("#include <metal_simdgroup>\nint x;", "\nint x;"),
    ],
)
def test_translation(metal, cpp):
    assert rewrite(metal) == cpp


def test_translation_keeps_line_numbers():
    source = "threadgroup float tile[4]\n  [8];\n/* two\nlines */ float x = 1.0;\n[[kernel]]\nvoid f();\n"
    assert rewrite(source).count("\n") == source.count("\n")
    assert rewrite(source).split("\n")[3] == "lines */ float x = 1.0f;"
