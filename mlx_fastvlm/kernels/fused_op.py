"""An op with GPU kernels: its versions, the launch shapes to choose from, and the choice."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fastvlm.kernels.choice import kernels_allowed
from mlx_fastvlm.kernels.gpu import DTYPES, backend

Launch = dict[str, int]  # a kernel's launch shape: names and meaning are the op's own
Arrays = Sequence[mx.array]


@dataclass(frozen=True)
class FusedOp:
    """What dispatchers, tuning, self-test and the kernel tests need to know of an op.

    Attributes:
        name: of the op and its file.
        metal, cuda: (*arrays, launch=..., **options) → tuple of arrays: one launch, or a few.
        reference: (*arrays, **options) → tuple of arrays by plain ops.
        launches: (*arrays, **options) → launch shapes to choose from, the likeliest first; none where the kernel cannot
            run. Looks at shapes and types only.
        sample: (*arrays, **options) → small arrays on which a launch shape is checked before it is used; they compile to
            the same kernel. Looks at shapes and types only.
    """

    name: str
    metal: Callable[..., tuple[mx.array, ...]]
    cuda: Callable[..., tuple[mx.array, ...]]
    reference: Callable[..., tuple[mx.array, ...]]
    launches: Callable[..., list[Launch]]
    sample: Callable[..., tuple[mx.array, ...]]

    def on(self, where: str) -> Callable[..., tuple[mx.array, ...]]:
        """The kernel of a backend, "metal" or "cuda"."""
        return self.metal if where == "metal" else self.cuda

    def run(self, *arrays: mx.array, **options: Any) -> tuple[mx.array, ...] | None:
        """The result by the kernel that is best here, or None where plain ops are to be taken."""
        where = backend()
        if where is None or not kernels_allowed() or arrays[0].dtype not in DTYPES:
            return None
        candidates = self.launches(*arrays, **options)
        if not candidates:
            return None
        launch = candidates[0]
        if not proven(self, where, launch, self.sample(*arrays, **options), options):
            return None
        return self.on(where)(*arrays, launch=launch, **options)


def agrees(found: Arrays, wanted: Arrays) -> bool:
    """Whether a kernel's result is its reference's but for rounding."""
    return all(
        a.shape == b.shape and a.dtype == b.dtype and largest_error(a, b) < ROUNDING[a.dtype]
        for a, b in zip(found, wanted, strict=True)
    )


# Largest difference over the reference's largest value that rounding explains: bits of the type, order of summation.
ROUNDING = {mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}


def largest_error(found: mx.array, wanted: mx.array) -> float:
    """max |found − wanted| / max |wanted|; NaN if either has one."""
    found, wanted = (np.asarray(array.astype(mx.float32)) for array in (found, wanted))
    return float(np.abs(found - wanted).max() / max(float(np.abs(wanted).max()), 1e-30))


def random_array(shape: tuple[int, ...], dtype: mx.Dtype, seed: int) -> mx.array:
    """Normal numbers, the same for the same seed."""
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


_verdicts: dict[tuple, bool] = {}


def proven(op: FusedOp, where: str, launch: Launch, arrays: Arrays, options: dict[str, Any]) -> bool:
    """Whether a launch shape compiles and agrees with plain ops on `arrays`: found out once, with one warning if not."""
    kernel = (op.name, where, *sorted(launch.items()), *sorted(options.items()))
    key = (*kernel, *((array.shape, array.dtype) for array in arrays))
    if key not in _verdicts:
        reason = failure(op, where, launch, arrays, options)
        _verdicts[key] = reason is None
        if reason is not None:
            warnings.warn(
                f"The {where} kernel {op.name} {launch} is not used on this machine: {reason}. "
                "Plain MLX ops take its place. Please report it with the output of: mlx-fastvlm selftest",
                RuntimeWarning,
                stacklevel=2,
            )
    return _verdicts[key]


def failure(op: FusedOp, where: str, launch: Launch, arrays: Arrays, options: dict[str, Any]) -> str | None:
    """Why a launch shape cannot be used, found by running it on `arrays`; None if it agrees with plain ops."""
    try:
        found = op.on(where)(*arrays, launch=launch, **options)
        mx.eval(*found)
    except RuntimeError as error:  # what MLX raises for a kernel that does not compile or launch
        return " ".join(str(error).split())[:200]
    return None if agrees(found, op.reference(*arrays, **options)) else "its result is wrong"
