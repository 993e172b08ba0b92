"""Runs MLX custom Metal kernels on the CPU, checks them and counts what they do. Test-only; needs no GPU and no Mac.

    from tests.metal_emulator import available, emulated

    with emulated(mode="check") as session:
        y = some_function_that_calls_metal_kernels(x)     # mx.fast.metal_kernel is replaced while entered
    session.assert_clean()

The kernel is the text that MLX itself generates for the GPU, compiled with clang. Every GPU thread is a fiber; barriers and
simdgroups behave as on the GPU; real MLX arrays go in and come out. README.md says what is found and what is not.
"""

from __future__ import annotations

from tests.metal_emulator.counts import Counts
from tests.metal_emulator.emulated import Launch, Session, emulated
from tests.metal_emulator.errors import EmulationError
from tests.metal_emulator.findings import Finding
from tests.metal_emulator.toolchain import find_toolchain

__all__ = ["Counts", "EmulationError", "Finding", "Launch", "Session", "available", "emulated"]


def available() -> str | None:
    """None if kernels can be emulated here, else one line: why not and what to install."""
    found = find_toolchain()
    return found if isinstance(found, str) else None
