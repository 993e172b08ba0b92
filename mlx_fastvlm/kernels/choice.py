"""Which version of an op runs: what all dispatchers ask, and the one setting that turns every fast version off."""

from __future__ import annotations

import os
from collections.abc import Callable

import mlx.core as mx

KERNELS_VARIABLE = "MLX_FASTVLM_KERNELS"

Elementwise = Callable[[mx.array], mx.array]


def reference_only() -> bool:
    """Whether MLX_FASTVLM_KERNELS=reference asks for plain MLX ops everywhere, on every device."""
    return os.environ.get(KERNELS_VARIABLE) == "reference"


def fused_on_gpu(plain: Elementwise, compiled: Elementwise) -> Elementwise:
    """`compiled`, one kernel, on a GPU; `plain` elsewhere: on a CPU MLX would call a C++ compiler, seconds a kernel."""
    return plain if reference_only() or mx.default_device().type == mx.DeviceType.cpu else compiled
