"""The drop-in: while a session is entered, mx.fast.metal_kernel makes kernels that run on the CPU."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import mlx.core as mx

from tests.metal_emulator import counts as counting_results
from tests.metal_emulator import findings as finding_results
from tests.metal_emulator.capture import CapturedKernel, capture
from tests.metal_emulator.compiler import build, toolchain
from tests.metal_emulator.counts import Counts
from tests.metal_emulator.errors import EmulationError
from tests.metal_emulator.findings import Finding, describe
from tests.metal_emulator.launch import Buffer, input_buffers, output_buffers, run
from tests.metal_emulator.lint import lint
from tests.metal_emulator.static_checks import static_findings

MODES = ("run", "check", "count", "as")
ORDERS = ("forward", "reversed")
MOST_THREADS = 1024

_real_metal_kernel = mx.fast.metal_kernel
_sessions: list[Session] = []


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        name: the name given to metal_kernel.
        source: the whole MSL that MLX generated.
        grid: threads in x, y, z.
        threadgroup: threads per threadgroup in x, y, z.
        seconds: time in the kernel, without compiling and without starting the process; 0 in mode "as".
        findings: what is wrong with it.
        counts: in mode "count", else None.
    """

    name: str
    source: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    seconds: float
    findings: list[Finding]
    counts: Counts | None


@dataclass
class Session:
    """What happened while an `emulated` block was entered.

    Attributes:
        mode: "run", "check", "count" or "as".
        order: "forward", "reversed" or a seed.
        workers: threadgroups that run at the same time in mode "run".
        timeout: seconds for one launch.
        prebuild: modes that kernels are compiled for in the background.
        launches: one per launch, in order.
    """

    mode: str
    order: str | int
    workers: int
    timeout: float
    prebuild: tuple[str, ...]
    launches: list[Launch] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        """The findings of all launches."""
        return [finding for launch in self.launches for finding in launch.findings]

    @property
    def counts(self) -> Counts:
        """The counts of all launches added up (mode "count")."""
        return counting_results.total(launch.counts for launch in self.launches if launch.counts)

    def assert_clean(self, allow: tuple[str, ...] = ()) -> None:
        """Raises AssertionError that lists the findings, if there are any of a kind not in `allow`."""
        found = [finding for finding in self.findings if finding.kind not in allow]
        if found:
            raise AssertionError(f"{len(found)} findings:\n{describe(found)}")


@contextlib.contextmanager
def emulated(
    mode: str = "run",
    order: str | int = "forward",
    workers: int = 1,
    *,
    metal_available: bool = False,
    timeout: float = 300.0,
    prebuild: tuple[str, ...] = (),
) -> Iterator[Session]:
    """Runs custom Metal kernels on the CPU while entered.

    Args:
        mode: "run" (fast), "check" (races, bounds, uninitialized memory; small shapes), "count" (traffic and arithmetic) or
            "as" (no run: address spaces and other static checks; outputs are zeros).
        order: the order in which threads and threadgroups run: "forward", "reversed" or a seed.
        workers: threadgroups that run at the same time in mode "run".
        metal_available: whether mx.metal.is_available() says yes while entered.
        timeout: seconds after which a launch is stopped and reported.
        prebuild: modes to compile every kernel for in the background, for sessions that follow.

    Yields:
        The session, filled launch by launch.

    Raises:
        EmulationError: no usable clang, a kernel that does not compile, or a call that cannot be emulated.
        ValueError: an unknown mode or order.
    """
    for name in (mode, *prebuild):
        if name not in MODES:
            raise ValueError(f"mode {name!r} is none of {', '.join(MODES)}")
    if not isinstance(order, int) and order not in ORDERS:
        raise ValueError(f"order {order!r} is neither {' nor '.join(ORDERS)} nor an integer seed")
    toolchain()
    session = Session(mode, order, workers, timeout, prebuild)
    replaced = mx.fast.metal_kernel, mx.metal.is_available
    _sessions.append(session)
    mx.fast.metal_kernel = emulated_metal_kernel
    if metal_available:
        mx.metal.is_available = lambda: True
    try:
        yield session
    finally:
        mx.fast.metal_kernel, mx.metal.is_available = replaced
        _sessions.remove(session)


def emulated_metal_kernel(
    name: str,
    input_names: list[str],
    output_names: list[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    **options,
) -> EmulatedKernel:
    """Takes mx.fast.metal_kernel's place; the same arguments."""
    real = _real_metal_kernel(
        name=name,
        input_names=list(input_names),
        output_names=list(output_names),
        source=source,
        header=header,
        ensure_row_contiguous=ensure_row_contiguous,
        atomic_outputs=atomic_outputs,
        **options,
    )
    return EmulatedKernel(real, name, list(input_names), list(output_names), header)


@dataclass
class EmulatedKernel:
    """A kernel that runs in whichever session is entered when it is called."""

    real: object
    name: str
    input_names: list[str]
    output_names: list[str]
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
        """Runs the kernel now; the arguments of a kernel made by mx.fast.metal_kernel (stream is ignored)."""
        if not _sessions:
            raise EmulationError(
                f"kernel {self.name} was made by the emulator and is called outside `with emulated(...)`"
            )
        session = _sessions[-1]
        arrays = self._evaluated(inputs)
        call = dict(grid=grid, threadgroup=threadgroup, output_shapes=output_shapes, output_dtypes=output_dtypes)
        call |= dict(template=template) if template else {}
        call |= dict(init_value=init_value) if init_value is not None else {}
        kernel = capture(self.real, name=self.name, header=self.header, inputs=arrays, **call)
        if verbose:
            print(kernel.source)
        for mode in session.prebuild:
            _background().submit(_prepare, kernel, mode)
        if session.mode == "as":
            session.launches.append(_launch(kernel, 0.0, lint(kernel) + static_findings(kernel), None))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        buffers = input_buffers(kernel, self.input_names, arrays)
        buffers += output_buffers(self.output_names, output_shapes, output_dtypes, init_value)
        return _execute(session, kernel, buffers, output_shapes, output_dtypes)

    def _evaluated(self, inputs: list) -> list[mx.array]:
        arrays = [value if isinstance(value, mx.array) else mx.array(value) for value in inputs]
        try:
            mx.eval(arrays)
        except (ValueError, RuntimeError) as error:
            raise EmulationError(
                f"kernel {self.name} is called while MLX traces (mx.compile, mx.vmap, mx.export): the emulator needs the "
                f"inputs' values; call the function untraced, or set MLX_DISABLE_COMPILE=1 ({error})"
            ) from error
        return arrays


@functools.cache
def _background() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


def _prepare(kernel: CapturedKernel, mode: str) -> None:
    """Puts the kernel's build for a mode into the cache. A kernel that does not compile is reported when it is run."""
    with contextlib.suppress(EmulationError):
        static_findings(kernel) if mode == "as" else build(kernel, mode)


def _execute(
    session: Session, kernel: CapturedKernel, buffers: list[Buffer], shapes: list, dtypes: list[mx.Dtype]
) -> list[mx.array]:
    """Builds and runs a kernel and notes the launch in the session."""
    program = build(kernel, session.mode)
    outcome = run(program, kernel, buffers, shapes, dtypes, session.order, session.workers, session.timeout)
    report = outcome.report
    found = lint(kernel) + finding_results.from_report(report["findings"], kernel.name, str(program), toolchain())
    counts = counting_results.from_report(report, threads=math.prod(kernel.grid)) if report["counts"] else None
    session.launches.append(_launch(kernel, report["seconds"], found, counts))
    return outcome.outputs


def _launch(kernel: CapturedKernel, seconds: float, findings: list[Finding], counts: Counts | None) -> Launch:
    return Launch(kernel.name, kernel.source, kernel.grid, kernel.threadgroup, seconds, findings, counts)
