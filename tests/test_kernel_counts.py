"""What the kernels move, counted in the emulator: against MLX's own kernels, and against the formulas of the model."""

from __future__ import annotations

import functools

import pytest

from mlx_fastvlm.benchmarks.layer_work import FUSED, decode_step, encode_stages, prefill_stage
from mlx_fastvlm.benchmarks.op_work import (
    Launch,
    Map,
    attention_flops,
    elementwise,
    mlx_depthwise,
    own_depthwise,
    own_depthwise_on_core,
    own_pair,
    own_pair_on_core,
)
from mlx_fastvlm.benchmarks.random_model import random_config
from mlx_fastvlm.kernels.catalog import Case, cases
from tests.kernel_counts import FAMILIES, PROMPT_TOKENS, Counted, count, launch_shape
from tests.metal_emulator import available

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))

CONFIG = random_config("0.5b")
CASES = [case for case in cases(CONFIG, 1024, PROMPT_TOKENS) if not case.fused_op.tuned_only]
HALF = 2  # bytes of float16


@functools.cache
def counted(index: int, family: str) -> Counted:
    return count(CASES[index], family)


def numbered(op: str) -> list:
    """pytest parameters: the catalog's cases of an op."""
    return [pytest.param(i, id=case.label) for i, case in enumerate(CASES) if case.op == op]


each_family = pytest.mark.parametrize("family", FAMILIES)


def map_of(case: Case) -> Map:
    _, side, _, channels = case.shapes[0]
    return Map(side, channels, HALF)


def convolution(case: Case) -> dict[str, int]:
    """kernel, stride and multiplier of a convolution's case."""
    outputs, kernel = case.shapes[1][:2]
    return {"kernel": kernel, "stride": case.options["stride"], "multiplier": outputs // case.shapes[0][-1]}


def unique_bytes(result: Counted) -> int:
    return result.counts.device_bytes_read_unique + result.counts.device_bytes_written_unique


def mlx_depthwise_threadgroup_loads(kernel: int) -> int:
    """Loads from threadgroup memory for one output of MLX's depthwise kernel (see below): one a tap, of one value."""
    return kernel**2


def mlx_depthwise_group_bytes(x: Map, kernel: int, stride: int = 1) -> int:
    """Bytes that the threadgroups of MLX's depthwise kernel read and write if no cache joins what two of them read.

    Its tile is 4 rows × 8 columns × 8 channels; halo positions outside the map are not read. ml-explore/mlx at
    v0.32.1-26-g846d17622, mlx/backend/metal/conv.cpp depthwise_conv_2D_gpu and kernels/conv.metal depthwise_conv_2d.
    """
    out_side = -(-x.side // stride)

    def read_along(tile: int) -> int:
        spans = 0
        for start in range(0, out_side, tile):
            first = start * stride - kernel // 2
            spans += min(x.side, first + tile * stride + kernel - 1) - max(0, first)
        return spans

    reads = read_along(4) * read_along(8) * x.channels
    taps = kernel**2 * x.channels * -(-out_side // 4) * -(-out_side // 8)
    return (reads + taps + out_side**2 * x.channels) * x.itemsize


@each_family
@pytest.mark.parametrize("index", numbered("depthwise_pair"))
def test_the_pair_moves_at_most_55_percent_of_the_two_plain_ops_bytes(index, family):
    result, x = counted(index, family), map_of(CASES[index])
    bias = elementwise("bias", 2 * x.nbytes)  # MLX's convolution has none: the plain op is two launches
    plain = sum(mlx_depthwise(x, kernel).device_bytes + bias.device_bytes for kernel in (3, 7))
    assert unique_bytes(result) <= 0.55 * plain

    # With what neighboring threadgroups both read counted for each, and MLX's convolutions alone:
    plain = sum(mlx_depthwise_group_bytes(x, kernel) for kernel in (3, 7))
    ours = result.counts.device_bytes_read_per_group + result.counts.device_bytes_written_per_group
    assert ours <= 0.55 * plain


@each_family
@pytest.mark.parametrize("index", numbered("depthwise_conv") + numbered("depthwise_pair"))
def test_a_convolution_loads_at_most_a_third_of_mlx_for_an_output(index, family):
    """MLX's kernel loads a staged value and a tap for each multiply-add of an output."""
    result, case = counted(index, family), CASES[index]
    outputs = result.counts.device_bytes_written_unique / HALF
    if case.op == "depthwise_pair":  # as many outputs of 3×3 as of 7×7
        mlx = sum(mlx_depthwise_threadgroup_loads(kernel) for kernel in (3, 7)) / 2
    else:
        mlx = mlx_depthwise_threadgroup_loads(case.shapes[1][1])
    assert result.counts.threadgroup_loads / outputs <= mlx / 3
    loads = result.counts.threadgroup_loads + result.counts.device_loads
    assert loads / outputs <= 2 * mlx / 3


@each_family
@pytest.mark.parametrize("index", numbered("depthwise_conv"))
def test_formula_of_the_convolution(index, family):
    result, case = counted(index, family), CASES[index]
    x, shape, launch = map_of(case), convolution(case), launch_shape(case, family)
    formula = own_depthwise(x, **shape, launch=launch, with_gelu=case.options["gelu"])
    assert unique_bytes(result) == formula.device_bytes
    # The kernel skips rows above and below the map; the formula does not.
    border = 1 - 2 * shape["kernel"] / (x.side // shape["stride"])
    assert border * formula.vector_flops <= result.counts.flops <= 1.15 * formula.vector_flops
    on_core = own_depthwise_on_core(x, **shape, launch=launch)
    loaded = result.counts.device_bytes_read / HALF
    assert border * on_core.device_loads <= loaded <= 1.001 * on_core.device_loads
    staged = result.counts.threadgroup_bytes_read / HALF
    assert border * on_core.threadgroup_loads <= staged <= on_core.threadgroup_loads
    assert result.counts.threadgroup_bytes_written / HALF == on_core.threadgroup_stores


@each_family
@pytest.mark.parametrize("index", numbered("depthwise_pair"))
def test_formula_of_the_pair(index, family):
    result, case = counted(index, family), CASES[index]
    x, launch = map_of(case), launch_shape(case, family)
    formula, on_core = own_pair(x, launch), own_pair_on_core(x, launch)
    assert unique_bytes(result) == formula.device_bytes
    assert result.counts.flops == pytest.approx(formula.vector_flops, rel=0.02)
    assert result.counts.threadgroup_bytes_read / HALF == pytest.approx(on_core.threadgroup_loads, rel=0.02)
    assert result.counts.threadgroup_bytes_written / HALF == pytest.approx(on_core.threadgroup_stores, rel=0.02)
    assert result.counts.device_bytes_read / HALF == pytest.approx(on_core.device_loads, rel=0.1)


@each_family
@pytest.mark.parametrize("index", numbered("self_attention"))
def test_formula_of_attention(index, family):
    result, case = counted(index, family), CASES[index]
    (_, tokens, width), head_dim = case.shapes[0], case.options["head_dim"]
    products, softmax = attention_flops(width // 3 // head_dim, tokens, tokens, head_dim)
    assert unique_bytes(result) == pytest.approx(tokens * width // 3 * 4 * HALF, rel=0.001)
    assert products < result.counts.flops < 1.1 * (products + softmax)


@pytest.mark.parametrize(
    ("op", "named"),
    [("squeeze_excite", ("mean", "linear", "gate")), ("add_rms_norm", ("residual and norm",))]
    + [("rotary_heads", ("bias, rotary positions, split",)), ("swiglu", ("SwiGLU",))],
)
def test_bytes_of_the_other_kernels(op, named):
    """The model's launches of these ops move what the kernels do."""
    stages = {
        "squeeze_excite": encode_stages(CONFIG.vision_config, FUSED)["conv_exp"],
        PROMPT_TOKENS: prefill_stage(CONFIG.text_config, FUSED, PROMPT_TOKENS),
        1: decode_step(CONFIG.text_config, FUSED, PROMPT_TOKENS + 1),
    }
    for index, case in enumerate(CASES):
        if case.op != op:
            continue
        stage = stages["squeeze_excite"] if op == "squeeze_excite" else stages[rows_of(case)]
        launches = [launch for launch in stage if launch.op in named]
        result = counted(index, FAMILIES[0])
        assert len(launches) == case.count * result.launches
        assert mean_bytes(launches) * result.launches == pytest.approx(unique_bytes(result), rel=0.01)


def rows_of(case: Case) -> int:
    """Positions of a decoder op's case."""
    return case.shapes[0][-2]


def mean_bytes(launches: list[Launch]) -> float:
    return sum(launch.device_bytes for launch in launches) / len(launches)
