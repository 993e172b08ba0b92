"""Compiles the CUDA side of the project's kernels with NVRTC, NVIDIA's compiler library. Test-only; needs no GPU.

    from tests.cuda_twin import available, compiled_for_cuda

    with compiled_for_cuda() as session:
        y = some_function_that_calls_cuda_kernels(...)    # mx.fast.cuda_kernel is replaced while entered
    session.launches[0].ptx

Shows that a body is valid CUDA with the types and template arguments of the call; nothing is run and outputs are zeros.
"""

from __future__ import annotations

from tests.cuda_twin.nvrtc import CudaCompileError, compile_to_ptx, find_nvrtc
from tests.cuda_twin.session import CudaLaunch, CudaSession, compiled_for_cuda
from tests.cuda_twin.source import cuda_source

__all__ = [
    "CudaCompileError",
    "CudaLaunch",
    "CudaSession",
    "available",
    "compile_to_ptx",
    "compiled_for_cuda",
    "cuda_source",
]


def available() -> str | None:
    """None if CUDA sources can be compiled here, else one line: why not and what to install."""
    found = find_nvrtc()
    return found if isinstance(found, str) else None
