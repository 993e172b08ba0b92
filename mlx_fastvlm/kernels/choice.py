"""Which version of an op runs: what all dispatchers ask, and the one setting that turns every fast version off."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx

KERNELS_VARIABLE = "MLX_FASTVLM_KERNELS"

Elementwise = Callable[[mx.array], mx.array]


_plain: ContextVar[bool] = ContextVar("mlx_fastvlm_plain_ops", default=False)


def reference_only() -> bool:
    """Whether plain MLX ops run everywhere: in `plain_ops`, or when MLX_FASTVLM_KERNELS=reference asks for them."""
    return _plain.get() or os.environ.get(KERNELS_VARIABLE) == "reference"


@contextmanager
def plain_ops() -> Iterator[None]:
    """While entered, this thread computes with plain MLX ops, so that a fast result can be compared."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def fused_on_gpu(plain: Elementwise, compiled: Elementwise) -> Elementwise:
    """`compiled`, one kernel, on a GPU; `plain` elsewhere: on a CPU MLX would call a C++ compiler, seconds a kernel."""
    return plain if reference_only() or mx.default_device().type == mx.DeviceType.cpu else compiled
