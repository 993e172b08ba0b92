"""Which version of an op runs: the mode, the chip, the launch table, and what happens to a kernel that fails."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.kernels import add_rms_norm, gpu, kernel_mode, rotary_heads, squeeze_excite, swiglu
from mlx_fastvlm.kernels.catalog import FUSED_OPS
from mlx_fastvlm.kernels.chip import APPLE_FAMILIES, Chip, cores_in, this_chip
from mlx_fastvlm.kernels.choice import KERNELS_VARIABLE, current_mode, kernels_allowed, reference_only
from mlx_fastvlm.kernels.fused_op import random_array, without_kernel
from mlx_fastvlm.kernels.launch_table import PLAIN, PREFERRED, default_launch
from tests.fake_gpu import X, broken, evaluated, forget_everything, right, wrong
from tests.kernel_shapes import CASES, case_name


@pytest.mark.parametrize(
    "info, family, tier",
    [
        ({"device_name": "Apple M1", "architecture": "applegpu_g13g"}, "M1", "base"),
        ({"device_name": "Apple M2 Pro", "architecture": "applegpu_g14s"}, "M2", "Pro"),
        ({"device_name": "Apple M3 Ultra", "architecture": "applegpu_g15d"}, "M3", "Ultra"),
        ({"device_name": "Apple M4 Max", "architecture": "applegpu_g16s"}, "M4", "Max"),
        ({"device_name": "Apple M5", "architecture": "applegpu_g17g"}, "M5", "base"),
        ({"device_name": "Apple M9 Max", "architecture": "applegpu_g21s"}, "M5", "Max"),
        ({"device_name": "Apple GPU", "architecture": "applegpu_g15s"}, "M3", "Max"),
        ({"device_name": "Apple GPU", "architecture": "applegpu_g30g"}, "M5", "base"),
        ({"device_name": "Apple GPU", "architecture": "applegpu_g9p"}, "M1", None),
        ({"device_name": "Apple Paravirtual device", "architecture": "none"}, "M1", None),
        ({}, "M1", None),
    ],
    ids=str,
)
def test_apple_chips_are_told_apart(info, family, tier):
    chip = Chip.from_device_info(info, "metal")
    assert (chip.family, chip.tier) == (family, tier)


def test_other_devices():
    h100 = {"device_name": "NVIDIA H100 80GB HBM3", "architecture": "sm_90", "total_memory": 80 * 2**30}
    assert Chip.from_device_info(h100, "cuda") == Chip("NVIDIA H100 80GB HBM3", "sm_90", "cuda", None, 80 * 2**30)
    cpu = Chip.from_device_info({"device_name": "AMD EPYC", "architecture": "x86_64"}, None)
    assert (cpu.family, cpu.tier, cpu.memory) == (None, None, None)


def test_memory_is_in_bytes(fake_gpu):
    assert this_chip().memory == 64 * 2**30


def test_cores_are_read_from_the_registry():
    assert cores_in('  | {\n  "gpu-core-count" = 40\n  "model" = "Apple M4 Max"') == 40
    assert cores_in("") is None


def test_every_family_has_its_table_and_every_entry_its_op():
    assert set(PREFERRED) == {*APPLE_FAMILIES, "cuda"}
    assert {op for table in PREFERRED.values() for op in table} <= {op.name for op in FUSED_OPS}


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=str)
def test_preferred_launch_shapes_are_ones_the_kernels_offer(dtype):
    """For FastVLM-0.5B's shapes; an entry that no kernel offers would silently be the op's own choice."""
    ops = {op.name: op for op in FUSED_OPS}
    x, weight, bias = random_array((1, 32, 32, 96), dtype, 0), mx.zeros((96, 7, 7, 1), dtype), mx.zeros((96,), dtype)
    offered = {
        "depthwise_conv": ops["depthwise_conv"].launches(x, weight, bias, stride=1, gelu=False),
        "self_attention": ops["self_attention"].launches(mx.zeros((1, 64, 288), dtype), head_dim=32),
    }
    for family, table in PREFERRED.items():
        for op, preferred in table.items():
            assert default_launch(op, family, offered[op]) == preferred[0]


def test_the_table_may_prefer_plain_ops(fake_gpu, monkeypatch):
    monkeypatch.setitem(PREFERRED["M4"], "double", (PLAIN,))
    double = fake_gpu()
    double(X)
    monkeypatch.setitem(PREFERRED["M4"], "double", ({"size": 2},))
    forget_everything()
    double(X)
    assert double.ran == ["plain", 2, 2]


def test_a_preferred_launch_shape_that_is_not_offered_is_passed_over():
    candidates = [{"threads": 64, "queries": 1, "block": 8}, {"threads": 32, "queries": 1, "block": 8}]
    assert default_launch("self_attention", "M1", candidates) == candidates[0]
    assert default_launch("unheard_of", None, candidates) == candidates[0]


def test_the_mode_comes_from_the_block_then_the_environment(monkeypatch):
    monkeypatch.setenv(KERNELS_VARIABLE, "off")
    assert current_mode() == "off" and not kernels_allowed() and not reference_only()
    with kernel_mode("reference"):
        assert reference_only() and not kernels_allowed()
        with kernel_mode("auto"):
            assert kernels_allowed()
        assert current_mode() == "reference"
    assert current_mode() == "off"
    monkeypatch.delenv(KERNELS_VARIABLE)
    assert current_mode() == "auto"


def test_unknown_modes_are_refused(monkeypatch):
    with pytest.raises(OptionError, match="'fast'.*auto, off, reference"), kernel_mode("fast"):
        pass
    monkeypatch.setenv(KERNELS_VARIABLE, "1")
    with pytest.raises(OptionError, match=f"{KERNELS_VARIABLE} is '1'"):
        current_mode()


def test_the_first_launch_shape_runs_once_it_has_been_checked(fake_gpu):
    double = fake_gpu()
    found, caught = evaluated(double, X)
    assert double.ran == [8, 8] and not caught  # on the sample, then on X
    assert mx.array_equal(found, X * 2)
    double(X)
    assert double.asked == 1  # chosen once
    double(X[:2])
    assert double.ran == [8, 8, 8, 8]  # no second check, for other shapes neither


@pytest.mark.parametrize("mode", ["off", "reference"])
def test_one_setting_turns_all_kernels_off(fake_gpu, mode):
    double = fake_gpu()
    with kernel_mode(mode):
        double(X)
    assert double.ran == ["plain"]
    double(X)
    assert double.ran[-1] == 8


def test_one_kernel_can_be_left_out(fake_gpu):
    double = fake_gpu()
    with without_kernel("double"):
        double(X)
    with without_kernel("another"):
        double(X)
    assert double.ran == ["plain", 8, 8]


def test_a_kernel_that_is_hard_to_gain_with_waits_for_tuning(fake_gpu):
    double = fake_gpu(tuned_only=True)
    double(X)
    assert double.ran == ["plain"]


def test_an_op_may_have_a_kernel_for_one_backend_only(fake_gpu, monkeypatch):
    double = fake_gpu()
    double.op = replace(double.op, cuda=None)
    double(X)
    monkeypatch.setattr(gpu, "backend", lambda: "cuda")
    double(X)
    assert double.ran == [8, 8, "plain"]


def test_types_without_kernels_take_plain_ops(fake_gpu):
    double = fake_gpu()
    double(X.astype(mx.int32))
    assert double.ran == ["plain"]


@pytest.mark.parametrize("body, reason", [(wrong, "its result is wrong"), (broken, "Unable to build metal library")])
def test_a_kernel_that_fails_gives_way_to_plain_ops_with_one_warning(fake_gpu, body, reason):
    double = fake_gpu({8: body})
    found, caught = evaluated(double, X)
    assert mx.array_equal(found, X * 2)
    assert [warning.category for warning in caught] == [RuntimeWarning]
    message = str(caught[0].message)
    assert "double" in message and reason in message and "mlx-fastvlm selftest" in message
    for x in (X, X[:1], mx.concatenate([X, X])):
        found, caught = evaluated(double, x)
        assert mx.array_equal(found, x * 2) and not caught
    found, caught = evaluated(double, X.astype(mx.float16))  # another kernel, checked for itself
    assert mx.array_equal(found, (X * 2).astype(mx.float16)) and not caught
    assert double.ran.count(8) == 2  # on the samples only


def test_a_launch_that_mlx_refuses_gives_way_too(fake_gpu):
    def refused(x):
        raise ValueError("Thread group size (2048) is greater than the maximum allowed threads per threadgroup (1024).")

    found, caught = evaluated(fake_gpu({8: refused}), X)
    assert mx.array_equal(found, X * 2) and len(caught) == 1


def test_a_bug_in_a_kernels_python_is_not_hidden(fake_gpu):
    def buggy(x):
        raise TypeError("launch() missing an argument")

    with pytest.raises(TypeError):
        fake_gpu({8: buggy})(X)


@pytest.mark.parametrize(
    "transform",
    [mx.compile, mx.vmap, lambda function: lambda x: mx.jvp(function, [x], [mx.ones_like(x)])[0][0]],
    ids=["compile", "vmap", "jvp"],
)
def test_the_check_may_happen_while_a_function_is_transformed(fake_gpu, transform):
    double = fake_gpu()
    assert mx.array_equal(transform(lambda x: double(x)[0])(X), X * 2)
    assert double.ran == [8, 8]


def test_threads_that_meet_a_kernel_for_the_first_time_check_it_once(fake_gpu):
    def slow(x):
        time.sleep(0.02)
        return right(x)

    double = fake_gpu({8: slow})
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: double(X)[0].tolist(), range(8)))
    assert found == [(X * 2).tolist()] * 8
    assert double.ran == [8] * 9


def test_plain_ops_on_a_gpu_may_round_float32_more(fake_gpu):
    """MLX's products in TF32, its rope's cosine: the kernel is the one that is right."""
    double = fake_gpu({8: lambda x: x * 2.002})
    _, caught = evaluated(double, X)
    assert double.ran == [8, 8] and not caught
    forget_everything()
    double = fake_gpu({8: lambda x: x * 2.02})
    _, caught = evaluated(double, X)
    assert double.ran == [8, "plain"] and len(caught) == 1


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_arrays_of_unlike_types_are_left_to_plain_ops(case):
    """The body reads all by one type; the check before the first use, whose arrays are all of one, would not notice."""
    arrays = case.arrays(mx.float16)
    assert case.fused_op.launches(*arrays, **case.options)
    floating = [index for index, array in enumerate(arrays) if mx.issubdtype(array.dtype, mx.floating)]
    for index in floating if len(floating) > 1 else ():
        mixed = (*arrays[:index], arrays[index].astype(mx.float32), *arrays[index + 1 :])
        assert case.fused_op.launches(*mixed, **case.options) == [], index


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_arrays_of_nothing_are_left_to_plain_ops(case):
    first, *others = case.arrays(mx.float16)
    assert case.fused_op.launches(first[:0], *others, **case.options) == []


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_a_check_on_the_sample_compiles_the_kernel_that_the_call_will_run(case, monkeypatch):
    compiled = []

    def recorder(name, **_):
        def launch(*, inputs, template, threadgroup, output_shapes, output_dtypes, **_):
            compiled.append((name, template, threadgroup, [array.dtype for array in inputs]))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    monkeypatch.setattr(mx.fast, "metal_kernel", recorder)
    arrays = case.arrays(mx.float16)
    for launch in case.fused_op.launches(*arrays, **case.options):
        compiled.clear()
        case.fused(*arrays, launch=launch)
        by_call = list(compiled)
        compiled.clear()
        case.fused(*case.fused_op.sample(*arrays, **case.options), launch=launch)
        assert compiled == by_call


def test_shapes_that_a_kernel_is_not_for_are_left_to_plain_ops():
    ops = {op.name: op for op in FUSED_OPS}
    for bits, rows, fits in ((4, 4, True), (8, 4, True), (4, 5, False), (6, 4, False), (3, 4, False)):
        packed = mx.quantize(mx.ones((8, 64)), group_size=64, bits=bits)
        launches = ops["quantized_swiglu"].launches(mx.ones((rows, 64)), *packed, group_size=64, bits=bits)
        assert bool(launches) == fits
    assert ops["swiglu"].launches(mx.ones((3, 12))) == []  # the up half would begin between two fours
    weight, bias = mx.ones((8, 8)), mx.ones((8,))
    for rows, fits in ((64, True), (63, False)):
        launches = ops["linear_epilogue"].launches(mx.ones((rows, 8)), weight, bias, bias, gelu=True, residual=False)
        assert bool(launches) == fits


def test_more_rows_than_cudas_grids_have_are_left_to_plain_ops():
    ops = {op.name: op for op in FUSED_OPS}
    options = {"heads": 1, "kv_heads": 1, "base": 1e4}
    for rows, fits in ((gpu.MOST_GROUPS, True), (gpu.MOST_GROUPS + 1, False)):
        assert bool(ops["swiglu"].launches(mx.zeros((rows, 8)))) == fits
        product, bias, offset = mx.zeros((1, rows, 24)), mx.zeros((24,)), mx.array([0])
        assert bool(ops["rotary_heads"].launches(product, bias, offset, **options)) == fits


def test_an_op_of_no_rows_has_none():
    empty, wide = mx.zeros((2, 0, 8)), (mx.zeros((4, 8)), mx.zeros((4,)))
    assert swiglu(empty).shape == (2, 0, 4)
    assert [array.shape for array in add_rms_norm(empty, empty, mx.ones((8,)), 1e-6)] == [empty.shape] * 2
    assert squeeze_excite(mx.zeros((0, 3, 3, 8)), wide, (mx.zeros((8, 4)), mx.zeros((8,)))).shape == (0, 3, 3, 8)
    heads = rotary_heads(mx.zeros((1, 0, 24)), mx.zeros((24,)), 0, heads=1, kv_heads=1, base=1e4)
    assert [array.shape for array in heads] == [(1, 1, 0, 8)] * 3
