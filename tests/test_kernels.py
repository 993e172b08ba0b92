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
from mlx_fastvlm.kernels.choice import KERNELS_VARIABLE
from mlx_fastvlm.kernels.depthwise_conv import depthwise_conv_cpu, depthwise_conv_reference
from mlx_fastvlm.kernels.feed_forward import feed_forward_cpu, feed_forward_reference
from mlx_fastvlm.kernels.gelu import gelu_cpu, gelu_reference, linear_gelu_cpu
from mlx_fastvlm.kernels.linear import linear_cpu, linear_reference
from mlx_fastvlm.kernels.self_attention import self_attention_cpu, self_attention_reference
from mlx_fastvlm.kernels.swiglu import swiglu_cpu, swiglu_reference
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
@pytest.mark.parametrize("rows", [1, 3, 255, 256, 1000])
def test_feed_forward_and_linear_gelu(rows):
    x, residual = random(rows, 24), random(rows, 24, seed=1)
    fc1, fc2 = (random(96, 24, seed=2), random(96, seed=3)), (random(24, 96, seed=4), random(24, seed=5))
    found = feed_forward_cpu(x, fc1, fc2, residual)
    assert relative_error(found, feed_forward_reference(x, fc1, fc2, residual)) < KERNELS["float32"]
    assert relative_error(linear_gelu_cpu(x, *fc1), gelu_reference(x @ fc1[0].T + fc1[1])) < KERNELS["float32"]


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
    linear(x, weight[:8])
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
