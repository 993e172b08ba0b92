"""Which version of an op may run: one setting, for the process or for a block of code, that all dispatchers ask.

  auto       the fastest version for this device that has proven itself (the default)
  off        MLX's own ops, its fused ones included; none of this package's kernels or compiled loops
  reference  plain MLX ops: each op as its definition has it

MLX_FASTVLM_KERNELS sets it for the process, `kernel_mode` for a block.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx

from mlx_fastvlm.errors import OptionError

KERNELS_VARIABLE = "MLX_FASTVLM_KERNELS"
MODES = ("auto", "off", "reference")

Elementwise = Callable[[mx.array], mx.array]

_mode: ContextVar[str | None] = ContextVar("mlx_fastvlm_kernel_mode", default=None)


def current_mode() -> str:
    """ "auto", "off" or "reference". Raises OptionError if the environment variable says anything else."""
    return _mode.get() or _checked(os.environ.get(KERNELS_VARIABLE) or "auto", KERNELS_VARIABLE)


def kernels_allowed() -> bool:
    """Whether this package's own kernels and loops may run."""
    return current_mode() == "auto"


def reference_only() -> bool:
    """Whether each op is to run as its definition has it."""
    return current_mode() == "reference"


@contextmanager
def kernel_mode(mode: str) -> Iterator[None]:
    """While entered, this thread computes in `mode`, whatever the environment says.

    Raises:
        OptionError: `mode` is none of MODES.
    """
    token = _mode.set(_checked(mode, "The kernel mode"))
    try:
        yield
    finally:
        _mode.reset(token)


def plain_ops():
    """`kernel_mode("reference")`: what a fast result is compared with."""
    return kernel_mode("reference")


def fused_on_gpu(plain: Elementwise, compiled: Elementwise) -> Elementwise:
    """`compiled`, one kernel, on a GPU; `plain` elsewhere: on a CPU MLX would call a C++ compiler, seconds a kernel."""
    return plain if reference_only() or mx.default_device().type == mx.DeviceType.cpu else compiled


def _checked(mode: str, name: str) -> str:
    if mode not in MODES:
        raise OptionError(f"{name} is {mode!r}; expected one of {', '.join(MODES)}.")
    return mode
