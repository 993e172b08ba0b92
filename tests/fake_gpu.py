"""A GPU that is none: kernels made of plain ops, so that what chooses among kernels can be tested on any machine."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import mlx.core as mx
import pytest

from mlx_fastvlm.kernels import catalog, fused_op, gpu, winners
from mlx_fastvlm.kernels.catalog import Case
from mlx_fastvlm.kernels.chip import this_chip
from mlx_fastvlm.kernels.fused_op import FusedOp

INFO = {"device_name": "Apple M4 Max", "architecture": "applegpu_g16s", "memory_size": 64 * 2**30}
LAUNCHES = [{"size": 8}, {"size": 4}, {"size": 2}]

X = mx.arange(24, dtype=mx.float32).reshape(3, 8)

Body = Callable[[mx.array], mx.array]


def right(x: mx.array) -> mx.array:
    return x * 2


def wrong(x: mx.array) -> mx.array:
    return x * 2.5


def broken(x: mx.array) -> mx.array:
    raise RuntimeError("[metal::Device] Unable to build metal library from source")


class FakeKernel:
    """An op that doubles, with a "kernel" for each launch shape; knows which ran, "plain" for none.

    Attributes:
        bodies: size of the launch shape → what its kernel does.
        ran: every call, in order.
        asked: how often the launch shapes were asked for.
    """

    def __init__(self, bodies: dict[int, Body] | None = None, tuned_only: bool = False) -> None:
        self.bodies = {8: right, 4: right, 2: right} | (bodies or {})
        self.ran: list[int | str] = []
        self.asked = 0
        self.op = FusedOp(
            "double",
            self.kernel,
            self.kernel,
            lambda x: (right(x),),
            self.launches,
            lambda x: (mx.ones((2, 8), x.dtype),),
            tuned_only,
        )

    def launches(self, x: mx.array) -> list[dict[str, int]]:
        self.asked += 1
        return list(LAUNCHES)

    def kernel(self, x: mx.array, launch: dict[str, int]) -> tuple[mx.array]:
        self.ran.append(launch["size"])
        return (self.bodies[launch["size"]](x),)

    def __call__(self, x: mx.array) -> tuple[mx.array]:
        """The dispatcher."""
        fused = self.op.run(x)
        if fused is None:
            self.ran.append("plain")
        return (right(x),) if fused is None else fused

    def case(self, rows: int = 3) -> Case:
        return Case(self.op, f"{rows}x8", 1, ((rows, 8),))


def evaluated(kernel: FakeKernel, x: mx.array) -> tuple[mx.array, list[warnings.WarningMessage]]:
    """The dispatcher's result, and all warnings it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (found,) = kernel(x)
        mx.eval(found)
    return found, caught


def forget_everything() -> None:
    """As a new process starts: nothing chosen, nothing read, no chip known."""
    fused_op.forget_choices()
    this_chip.cache_clear()
    winners._winners.cache_clear()


@pytest.fixture
def fake_gpu(monkeypatch):
    """MLX seems to compute on an M4 Max; returns a maker of FakeKernels that the catalog knows."""
    monkeypatch.setattr(gpu, "backend", lambda: "metal")
    monkeypatch.setattr(mx, "device_info", lambda *device: INFO)
    monkeypatch.setattr(winners, "sources_hash", lambda folder: "these kernels")  # whatever is edited meanwhile
    monkeypatch.delenv("MLX_FASTVLM_KERNELS", raising=False)
    forget_everything()

    def make(bodies: dict[int, Body] | None = None, tuned_only: bool = False) -> FakeKernel:
        kernel = FakeKernel(bodies, tuned_only)
        monkeypatch.setitem(catalog._DISPATCH, "double", kernel)
        return kernel

    yield make
    forget_everything()
