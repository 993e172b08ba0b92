"""The drop-in: while a session is entered, mx.fast.cuda_kernel makes kernels that are compiled and not run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import mlx.core as mx

from tests.cuda_twin.nvrtc import DEFAULT_ARCHITECTURE, CudaCompileError, compile_to_ptx, find_nvrtc
from tests.cuda_twin.source import cuda_source

MOST_THREADS = 1024

_sessions: list[CudaSession] = []


@dataclass(frozen=True)
class CudaLaunch:
    """One call of a kernel: its generated source, the PTX and how it would be launched."""

    name: str
    source: str
    ptx: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]


@dataclass
class CudaSession:
    """The calls made while entered, in order."""

    architecture: str
    launches: list[CudaLaunch] = field(default_factory=list)
    compiled: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def compiled_for_cuda(architecture: str = DEFAULT_ARCHITECTURE) -> Iterator[CudaSession]:
    """Compiles every custom CUDA kernel that is called while entered; outputs are zeros.

    Args:
        architecture: such as "sm_80" or "sm_90".

    Yields:
        The session, filled call by call.

    Raises:
        CudaCompileError: no NVRTC, or a kernel that does not compile.
    """
    found = find_nvrtc()
    if isinstance(found, str):
        raise CudaCompileError(found)
    session = CudaSession(architecture)
    replaced = mx.fast.cuda_kernel
    _sessions.append(session)
    mx.fast.cuda_kernel = compiling_cuda_kernel
    try:
        yield session
    finally:
        mx.fast.cuda_kernel = replaced
        _sessions.remove(session)


def compiling_cuda_kernel(
    name: str,
    input_names: list[str],
    output_names: list[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    shared_memory: int = 0,
) -> CompilingKernel:
    """Takes mx.fast.cuda_kernel's place; the same arguments."""
    return CompilingKernel(name, list(input_names), list(output_names), source, header)


@dataclass
class CompilingKernel:
    """A kernel that is compiled when it is called."""

    name: str
    input_names: list[str]
    output_names: list[str]
    source: str
    header: str

    def __call__(
        self,
        *,
        inputs: list,
        output_shapes: list,
        output_dtypes: list[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: list | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: object = None,
    ) -> list[mx.array]:
        """Compiles the kernel; the arguments of a kernel made by mx.fast.cuda_kernel."""
        if not _sessions:
            raise CudaCompileError(f"kernel {self.name} is called outside `with compiled_for_cuda(...)`")
        session = _sessions[-1]
        arrays = [value if isinstance(value, mx.array) else mx.array(value) for value in inputs]
        text = cuda_source(
            self.name, self.input_names, self.output_names, self.source, self.header, arrays, output_dtypes, template
        )
        if verbose:
            print(text)
        if threadgroup[0] * threadgroup[1] * threadgroup[2] > MOST_THREADS:
            raise CudaCompileError(f"kernel {self.name}: a block of {threadgroup} threads; CUDA allows {MOST_THREADS}")
        if text not in session.compiled:
            session.compiled[text] = compile_to_ptx(text, session.architecture)
        launch = CudaLaunch(self.name, text, session.compiled[text], tuple(grid), tuple(threadgroup))
        session.launches.append(launch)
        return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
