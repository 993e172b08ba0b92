"""Every fast version against its plain reference: all shapes a tower has, ragged edges, batches, large values.

The CPU versions are tested where the extra `cpu` is installed. They are called directly: the dispatchers take them only
for large arrays, which tests/parity exercises at full width.
"""

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_fastvlm import blas
from mlx_fastvlm.kernels import cpu, linear
from mlx_fastvlm.kernels.add_rms_norm import add_rms_norm_cpu, add_rms_norm_reference
from mlx_fastvlm.kernels.causal_attention import causal_attention_cpu, causal_attention_reference
from mlx_fastvlm.kernels.choice import KERNELS_VARIABLE
from mlx_fastvlm.kernels.cpu_depthwise import depthwise_conv_cpu
from mlx_fastvlm.kernels.depthwise_conv import depthwise_conv_reference
from mlx_fastvlm.kernels.feed_forward import feed_forward_cpu, feed_forward_reference
from mlx_fastvlm.kernels.gelu import gelu_cpu, gelu_reference
from mlx_fastvlm.kernels.linear import linear_cpu, linear_reference
from mlx_fastvlm.kernels.quantized_linear import quantized_linear_cpu, quantized_linear_reference
from mlx_fastvlm.kernels.rotary_heads import rotary_heads_cpu, rotary_heads_reference
from mlx_fastvlm.kernels.self_attention import self_attention_cpu, self_attention_reference
from mlx_fastvlm.kernels.stem_conv import stem_conv_cpu, stem_conv_reference
from mlx_fastvlm.kernels.swiglu import swiglu_cpu, swiglu_reference
from mlx_fastvlm.kernels.swiglu_feed_forward import swiglu_feed_forward_cpu, swiglu_feed_forward_reference
from tests.tolerances import KERNELS, relative_error

needs_cpu_extra = pytest.mark.skipif(cpu.missing() is not None, reason="install the extra 'cpu'")


def random(*shape, seed=0, scale=1.0):
    return mx.random.normal(shape, key=mx.random.key(seed)) * scale


@needs_cpu_extra
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(
    "kernel, stride, multiplier", [(3, 1, 1), (7, 1, 1), (3, 2, 1), (7, 2, 2), (3, 1, 2)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("shape", [(1, 16, 16, 32), (2, 9, 13, 5), (1, 2, 3, 7), (1, 1, 1, 1), (3, 8, 8, 96)], ids=str)
def test_depthwise_conv(shape, kernel, stride, multiplier, gelu):
    channels = shape[-1] * multiplier
    x, weight, bias = random(*shape), random(channels, kernel, kernel, 1, seed=1), random(channels, seed=2)
    found = depthwise_conv_cpu(x, weight, bias, stride, gelu)
    assert relative_error(found, depthwise_conv_reference(x, weight, bias, stride, gelu)) < KERNELS["float32"]


@needs_cpu_extra
@pytest.mark.parametrize("shape", [(1, 64, 64, 3), (2, 34, 22, 3), (1, 2, 2, 5)], ids=str)
def test_stem_conv(shape):
    x, weight, bias = random(*shape), random(20, 3, 3, shape[-1], seed=1), random(20, seed=2)
    assert relative_error(stem_conv_cpu(x, weight, bias), stem_conv_reference(x, weight, bias)) < KERNELS["float32"]


def stored(dtype, *shape, seed):
    """A weight in `dtype` whose products with normal numbers are of order one."""
    return random(*shape, seed=seed, scale=shape[-1] ** -0.5).astype(getattr(mx, dtype))


@needs_cpu_extra
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, 16, 255, 1000])
@pytest.mark.parametrize("channels, hidden", [(24, 96), (8, 300), (5, 7), (300, 40)])
def test_feed_forward_and_linear(rows, channels, hidden, dtype):
    x, residual = random(rows, channels), random(rows, channels, seed=1)
    fc1 = stored(dtype, hidden, channels, seed=2), random(hidden, seed=3)
    fc2 = stored(dtype, channels, hidden, seed=4), random(channels, seed=5)
    found = feed_forward_cpu(x, fc1, fc2, residual)
    assert relative_error(found, feed_forward_reference(x, fc1, fc2, residual)) < KERNELS["float32"]
    plain = linear_reference(x, *fc1)
    assert relative_error(linear_cpu(x, *fc1), plain) < KERNELS["float32"]
    assert relative_error(linear_cpu(x, fc1[0]), linear_reference(x, fc1[0])) < KERNELS["float32"]
    assert relative_error(linear_cpu(x, *fc1, gelu=True), gelu_reference(plain)) < KERNELS["float32"]


@needs_cpu_extra
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 33, 600])
@pytest.mark.parametrize("channels, hidden", [(24, 96), (5, 7), (40, 300)])
def test_swiglu_feed_forward(rows, channels, hidden, dtype):
    x = random(1, rows, channels)
    gate_up, down = stored(dtype, 2 * hidden, channels, seed=1), stored(dtype, channels, hidden, seed=2)
    found = swiglu_feed_forward_cpu(x, gate_up, down)
    assert relative_error(found, swiglu_feed_forward_reference(x, gate_up, down)) < KERNELS["float32"]


@needs_cpu_extra
def test_a_weight_in_bfloat16_gives_what_the_same_numbers_in_float32_give():
    x, weight = random(1, 40), stored("bfloat16", 300, 40, seed=1)
    for rows in (x, mx.concatenate([x] * 20)):
        assert np.array_equal(linear_cpu(rows, weight), linear_cpu(rows, weight.astype(mx.float32)))


@needs_cpu_extra
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_quantized_linear(rows, group_size, bits):
    x, packed = random(rows, 256), mx.quantize(stored("float32", 70, 256, seed=1), group_size, bits)
    found = quantized_linear_cpu(x, *packed, bits)
    wanted = quantized_linear_reference(x, *packed, group_size, bits, "affine")
    assert relative_error(found, wanted) < KERNELS["float32"]


@needs_cpu_extra
@pytest.mark.parametrize("length, positions", [(1, 1), (1, 300), (7, 7), (300, 300), (20, 600)])
@pytest.mark.parametrize("batch, heads, kv_heads", [(1, 4, 2), (2, 3, 1)])
def test_causal_attention(batch, heads, kv_heads, length, positions):
    queries = random(batch, heads, length, 32)
    # As a cache gives them: a part of longer arrays.
    keys, values = (random(batch, kv_heads, positions + 9, 32, seed=seed)[..., :positions, :] for seed in (1, 2))
    found = causal_attention_cpu(queries, keys, values, 32**-0.5)
    wanted = causal_attention_reference(queries, keys, values, 32**-0.5)
    assert relative_error(found, wanted) < KERNELS["float32"]


@pytest.mark.parametrize(
    "attend", [pytest.param(causal_attention_cpu, marks=needs_cpu_extra), causal_attention_reference]
)
@pytest.mark.parametrize("length", [1, 7, 200])
def test_causal_attention_without_what_stands_before_a_sequence(attend, length):
    queries, positions, padding = random(3, 4, length, 32), length + 100, [0, 100, 37]
    keys, values = (random(3, 2, positions, 32, seed=seed) for seed in (1, 2))
    found = attend(queries, keys, values, 32**-0.5, mx.array(padding, mx.int32))
    for row, begin in enumerate(padding):
        alone = (array[row : row + 1, :, begin:] for array in (keys, values))
        wanted = causal_attention_reference(queries[row : row + 1], *alone, 32**-0.5)
        assert relative_error(found[row : row + 1], wanted) < KERNELS["float32"]


@needs_cpu_extra
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_gelu(scale):
    x = random(7, 33, 5, scale=scale)
    assert relative_error(gelu_cpu(x), gelu_reference(x)) < KERNELS["float32"]


@needs_cpu_extra
def test_gelu_of_infinity_and_nan_shows_itself():
    found = np.array(gelu_cpu(mx.array([[float("inf"), float("nan"), 0.0]])))[0]
    assert found[0] == np.inf and np.isnan(found[1]) and found[2] == 0


@needs_cpu_extra
@pytest.mark.parametrize("batch, tokens, heads", [(1, 16, 2), (2, 257, 3), (1, 600, 1)])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_self_attention(batch, tokens, heads, scale):
    qkv = random(batch, tokens, 3 * heads * 32, scale=scale)
    # Scores grow with the square of the scale, and exp turns their absolute rounding into a relative one.
    limit = KERNELS["float32"] * max(1.0, scale**2 / 4)
    assert relative_error(self_attention_cpu(qkv, 32), self_attention_reference(qkv, 32)) < limit


@needs_cpu_extra
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_swiglu(scale):
    gate_up = random(2, 77, 2 * 19, scale=scale)
    assert relative_error(swiglu_cpu(gate_up), swiglu_reference(gate_up)) < KERNELS["float32"]


@needs_cpu_extra
@pytest.mark.parametrize("bias", [False, True])
def test_one_row(bias):
    x, weight, offset = random(1, 1, 70), random(1001, 70, seed=1), random(1001, seed=2) if bias else None
    assert relative_error(linear_cpu(x, weight, offset), linear_reference(x, weight, offset)) < KERNELS["float32"]


@needs_cpu_extra
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_a_decode_rows_addition_and_norm(scale):
    x, residual, weight = random(1, 1, 896, scale=scale), random(1, 1, 896, seed=1), random(896, seed=2)
    found, wanted = (op(x, residual, weight, 1e-6) for op in (add_rms_norm_cpu, add_rms_norm_reference))
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) < KERNELS["float32"]


@needs_cpu_extra
@pytest.mark.parametrize("offset", [0, 37, 1000])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(14, 2, 64), (3, 1, 24), (6, 2, 128)])
def test_a_decode_rows_heads(offset, heads, kv_heads, head_dim):
    width = (heads + 2 * kv_heads) * head_dim
    product, bias = random(1, 1, width), random(width, seed=1)
    options = {"heads": heads, "kv_heads": kv_heads, "base": 1e6}
    wanted = rotary_heads_reference(product, bias, mx.array([offset], mx.int32), **options)
    # Angles grow with the position, and so does the rounding of an angle of float32.
    limit = KERNELS["float32"] * max(1, offset / 20)
    for a, b in zip(rotary_heads_cpu(product, bias, offset, **options), wanted, strict=True):
        assert relative_error(a, b) < limit


@needs_cpu_extra
def test_views_of_larger_arrays_are_read_right():
    x = random(2, 12, 12, 8)[:, 1:-1, ::2]
    weight, bias = random(8, 3, 3, 1, seed=1), random(8, seed=2)
    assert (
        relative_error(depthwise_conv_cpu(x, weight, bias), depthwise_conv_reference(x, weight, bias))
        < KERNELS["float32"]
    )


@needs_cpu_extra
def test_large_arrays_take_the_fast_version_and_one_setting_turns_it_off(monkeypatch):
    calls = []
    module = sys.modules["mlx_fastvlm.kernels.linear"]  # the package's own `linear` is the function
    monkeypatch.setattr(module, "linear_cpu", lambda *args: calls.append(args) or linear_reference(*args))
    x, weight = random(1, 1024), random(1024, 1024)
    linear(x, weight)
    assert len(calls) == 1
    linear(x.astype(mx.float16), weight.astype(mx.float16))
    linear(x, weight[:4])
    monkeypatch.setenv(KERNELS_VARIABLE, "reference")
    linear(x, weight)
    assert len(calls) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux wheels have the slow BLAS")
@needs_cpu_extra
def test_matrix_products_stay_right_on_openblas():
    assert blas.use_openblas() == "openblas" and blas.in_use()
    a, b, c = np.random.default_rng(0).normal(size=(3, 2, 65, 65)).astype(np.float32)
    left, right, add = (mx.array(part) for part in (a, b, c))
    wanted = a.astype(np.float64) @ b
    for found in (left @ right, (left.transpose(0, 2, 1).transpose(0, 2, 1)) @ right, mx.addmm(add, left, right) - add):
        assert relative_error(found, wanted) < KERNELS["float32"]
    transposed = left @ right.transpose(0, 2, 1)
    assert relative_error(transposed, a.astype(np.float64) @ b.transpose(0, 2, 1)) < KERNELS["float32"]
    assert relative_error(left[:, ::2] @ right[:, :, 3:40], wanted[:, ::2, 3:40]) < KERNELS["float32"]


def test_the_blas_can_be_left_alone():
    script = "from mlx_fastvlm import blas; print(blas.use_openblas()); print(blas.in_use())"
    environment = {**os.environ, "MLX_FASTVLM_BLAS": "off"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines() == ["off: MLX_FASTVLM_BLAS=off", "False"]
