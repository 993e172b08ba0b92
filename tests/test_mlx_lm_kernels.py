"""mlx_lm's own Metal kernels, unchanged, in the emulator: right, and without a false alarm.

They were written for Apple GPUs by others, so they show that the emulator runs MSL as it is written and not only as this
project writes it. Needs mlx-lm and clang; skipped without.
"""

from __future__ import annotations

import importlib
import itertools
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from tests.metal_emulator import available, emulated

pytest.importorskip("mlx_lm", reason="the false-alarm guard of the Metal emulator needs mlx-lm")
pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Largest difference over the reference's largest value; the references are computed in float32 from the same inputs.
TOLERANCE = {"float32": 3e-5, "float16": 3e-3, "bfloat16": 1e-2}
MODES = ("run", "check", "as")
# gated_delta's masked variant lets all 32 lanes of a simdgroup store the same 0: a race, and a harmless one.
HARMLESS = ("same-value race",)
SEEDS = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def mlx_lm_with_emulated_kernels():
    """mlx_lm makes its kernels when it is imported, some only where Metal is available: imported again for both reasons."""
    for name in ("mlx_lm.kernels", "mlx_lm.models.ssm", "mlx_lm.models.gated_delta"):
        importlib.import_module(name)
    with emulated(metal_available=True):
        reload_kernels()
    yield
    reload_kernels()


def reload_kernels():
    inside = sorted(name for name in sys.modules if name.startswith("mlx_lm.kernels."))
    for name in [*inside, "mlx_lm.kernels", "mlx_lm.models.ssm", "mlx_lm.models.gated_delta"]:
        importlib.reload(sys.modules[name])


def random(*shape, dtype=mx.float32, scale=1.0):
    numbers = np.random.default_rng(next(SEEDS)).standard_normal(shape).astype(np.float32)
    return mx.array(numbers * np.float32(scale)).astype(dtype)


def as_float32(*arrays):
    return [array.astype(mx.float32) for array in arrays]


def relative_error(found, wanted) -> float:
    found, wanted = (np.array(array.astype(mx.float32)) for array in (found, wanted))
    return float(np.abs(found - wanted).max() / (np.abs(wanted).max() + 1e-9))


def check_in_every_mode(compute, reference, dtype: str, harmless: tuple[str, ...] = ()):
    wanted = reference()
    for mode in MODES:
        with emulated(mode, metal_available=True) as session:
            found = compute()
        assert session.launches, "no Metal kernel was called"
        session.assert_clean(allow=harmless)
        if mode == "as":
            continue
        for ours, theirs in zip(found, wanted, strict=True):
            assert relative_error(ours, theirs) < TOLERANCE[dtype], mode


@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm(dtype):
    from mlx_lm.kernels import qk_norm

    x = random(3, 2 * 6 * 64, dtype=DTYPES[dtype])

    def reference():
        heads = x.astype(mx.float32)[:, : 6 * 64].reshape(3, 6, 64)
        normed = mx.fast.rms_norm(heads, None, 1e-6)
        return [normed[:, :4] * 0.5, normed[:, 4:]]

    check_in_every_mode(
        lambda: qk_norm(x, n_heads=4, n_kv_heads=2, head_dim=64, eps=1e-6, query_scale=0.5), reference, dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm_rope(dtype):
    from mlx_lm.kernels import qk_norm, qk_norm_rope

    x = random(2, 5, 2 * 3 * 40, dtype=DTYPES[dtype])
    sizes = dict(n_heads=2, n_kv_heads=1, head_dim=40, eps=1e-6, query_scale=0.5)

    def reference():
        with emulated(metal_available=True):
            normed = qk_norm(x, **sizes)
        rotated = [
            mx.fast.rope(
                heads.astype(mx.float32).swapaxes(1, 2), 40, traditional=True, base=10000.0, scale=1.0, offset=7
            ).swapaxes(1, 2)
            for heads in normed
        ]
        return rotated

    check_in_every_mode(lambda: qk_norm_rope(x, **sizes, rope_base=10000.0, offset=7), reference, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_post_expert_norm_combine(dtype):
    from mlx_lm.kernels import post_expert_norm_combine

    experts, weights = random(5, 3, 200, dtype=DTYPES[dtype]), random(5, 3, dtype=DTYPES[dtype])
    norm_weight = random(200, dtype=DTYPES[dtype])

    def reference():
        normed = mx.fast.rms_norm(experts.astype(mx.float32) * norm_weight.astype(mx.float32), None, 1e-5)
        return [(normed * weights.astype(mx.float32)[..., None]).sum(-2)]

    check_in_every_mode(
        lambda: [post_expert_norm_combine(experts, weights, norm_weight=norm_weight, eps=1e-5)], reference, dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_add_norm(dtype):
    from mlx_lm.kernels import norm_add_norm

    branch, post_weight = random(5, 512, dtype=DTYPES[dtype]), random(512, dtype=DTYPES[dtype])
    stream, alpha, beta = random(5, 512), random(512), random(512)
    norm = nn.RMSNorm(512)

    def reference():
        normed = mx.fast.rms_norm(branch.astype(mx.float32) * post_weight.astype(mx.float32), None, 1e-6)
        added = alpha * stream + beta * normed
        return [added, mx.fast.rms_norm(added, norm.weight, norm.eps)]

    check_in_every_mode(
        lambda: norm_add_norm(
            branch, stream, alpha=alpha, beta=beta, post_weight=post_weight, post_eps=1e-6, next_norm=norm
        ),
        reference,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_sigmoid_gate(dtype):
    from mlx_lm.kernels import rms_norm_sigmoid_gate

    x, gate = random(2, 4, 5, 80, dtype=DTYPES[dtype]), random(2, 5, 320, dtype=DTYPES[dtype])

    def reference():
        normed = mx.fast.rms_norm(x.astype(mx.float32), None, 1e-5).transpose(0, 2, 1, 3).reshape(2, 5, 320)
        return [normed * mx.sigmoid(gate.astype(mx.float32))]

    check_in_every_mode(lambda: [rms_norm_sigmoid_gate(x, gate, eps=1e-5)], reference, dtype)


def test_expert_routing():
    from mlx_lm.kernels import expert_routing

    logits, bias = random(7, 96), random(96, scale=0.1)

    def reference():
        scores = mx.sigmoid(logits * 1.5)
        chosen = mx.argsort(-(scores + bias), axis=-1)[:, :4]
        weights = mx.take_along_axis(scores, chosen, -1)
        return [chosen, weights / (weights.sum(-1, keepdims=True) + 1e-9) * 2.0]

    check_in_every_mode(
        lambda: expert_routing(logits, bias, top_k=4, multiplier=1.5, score_eps=1e-9, route_scale=2.0),
        reference,
        "float32",
    )


def gated_delta_inputs(dtype):
    batch, steps, key_heads, value_heads, key_size, value_size = 1, 6, 2, 4, 128, 16
    queries = random(batch, steps, key_heads, key_size, dtype=dtype, scale=0.1)
    keys = random(batch, steps, key_heads, key_size, dtype=dtype, scale=0.1)
    values = random(batch, steps, value_heads, value_size, dtype=dtype)
    decay = mx.sigmoid(random(batch, steps, value_heads))
    beta = mx.sigmoid(random(batch, steps, value_heads, dtype=dtype))
    state = random(batch, value_heads, value_size, key_size, scale=0.1)
    return queries, keys, values, decay, beta, state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["gated_delta_kernel_unpacked", "gated_delta_kernel", "gated_delta_kernel_xtree"])
def test_gated_delta(variant, dtype):
    from mlx_lm.models import gated_delta

    inputs = gated_delta_inputs(DTYPES[dtype])
    check_in_every_mode(
        lambda: getattr(gated_delta, variant)(*inputs),
        lambda: gated_delta.gated_delta_ops(*as_float32(*inputs)),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_delta_with_a_mask(dtype):
    from mlx_lm.models import gated_delta

    inputs = gated_delta_inputs(DTYPES[dtype])
    mask = mx.array(np.random.default_rng(0).random((1, 6)) > 0.3)
    # Only the state: y of a masked step is 0 in the kernel and whatever it computes in the reference.
    check_in_every_mode(
        lambda: gated_delta.gated_delta_kernel(*inputs, mask)[1:],
        lambda: gated_delta.gated_delta_ops(*as_float32(*inputs), mask)[1:],
        dtype,
        HARMLESS,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_ssm_update(dtype):
    from mlx_lm.models import ssm

    kind = DTYPES[dtype]
    heads, size, state_size = 4, 16, 64
    hidden, log_a = random(2, 1, heads, size, dtype=kind), random(heads)
    b, c = random(2, 1, 2, state_size, dtype=kind), random(2, 1, 2, state_size, dtype=kind)
    d, dt, dt_bias = random(heads, dtype=kind), random(2, 1, heads, dtype=kind), random(heads, dtype=kind)
    state = random(2, heads, size, state_size, dtype=kind)

    def reference():
        x, a, b_, c_, d_, dt_, bias, old = as_float32(hidden, log_a, b, c, d, dt, dt_bias, state)
        step = ssm.compute_dt(dt_, bias, (0.0, 100.0))[:, 0]
        decay = mx.exp(-mx.exp(a) * step)
        b_, c_ = mx.repeat(b_[:, 0], 2, 1), mx.repeat(c_[:, 0], 2, 1)
        new = old * decay[..., None, None] + (x[:, 0] * step[..., None])[..., None] * b_[:, :, None]
        return [((new * c_[:, :, None]).sum(-1) + x[:, 0] * d_[:, None])[:, None], new]

    check_in_every_mode(
        lambda: ssm.ssm_update_kernel(hidden, log_a, b, c, d, dt, dt_bias, state, (0.0, 100.0)), reference, dtype
    )
