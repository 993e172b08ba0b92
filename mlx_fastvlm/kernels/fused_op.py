"""An op with GPU kernels: its versions, the launch shapes to choose from, and the choice.

The order of the choice: the mode (choice.py), the device, what `mlx-fastvlm tune` found (winners.py), the table for the
chip's generation (launch_table.py), the op's own order. A launch shape is run on small arrays before it is used; what
does not compile or is wrong is left out, with one warning for the op, and plain MLX ops take its place.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fastvlm.kernels import gpu
from mlx_fastvlm.kernels.chip import this_chip
from mlx_fastvlm.kernels.choice import kernels_allowed
from mlx_fastvlm.kernels.gpu import DTYPES
from mlx_fastvlm.kernels.launch_table import PLAIN, Launch, default_launch
from mlx_fastvlm.kernels.winners import Call, find_winner

Arrays = Sequence[mx.array]

_MOST_CHOICES = 4096  # remembered; every length of a prompt is a call of its own


@dataclass(frozen=True)
class FusedOp:
    """What dispatchers, tuning, self-test and the kernel tests need to know of an op.

    Attributes:
        name: of the op and its file.
        metal, cuda: (*arrays, launch=..., **options) → tuple of arrays: one launch, or a few. None: not on that backend.
        reference: (*arrays, **options) → tuple of arrays by plain ops.
        launches: (*arrays, **options) → launch shapes to choose from, the likeliest first; none where the kernel cannot
            run. Looks at shapes and types only.
        sample: (*arrays, **options) → small arrays on which a launch shape is checked before it is used; they compile to
            the same kernel. Looks at shapes and types only.
        tuned_only: run the kernel only where `mlx-fastvlm tune` has found it faster: plain ops are hard to beat.
    """

    name: str
    metal: Callable[..., tuple[mx.array, ...]] | None
    cuda: Callable[..., tuple[mx.array, ...]] | None
    reference: Callable[..., tuple[mx.array, ...]]
    launches: Callable[..., list[Launch]]
    sample: Callable[..., tuple[mx.array, ...]]
    tuned_only: bool = False

    def on(self, where: str) -> Callable[..., tuple[mx.array, ...]] | None:
        """The kernel of a backend, "metal" or "cuda", if it has one."""
        return self.metal if where == "metal" else self.cuda

    def candidates(self, where: str, arrays: Arrays, options: dict[str, Any]) -> list[Launch]:
        """The launch shapes to choose from on a backend, the likeliest first; none where the kernel cannot run."""
        if self.on(where) is None or arrays[0].dtype not in DTYPES:
            return []
        return self.launches(*arrays, **options)

    def run(self, *arrays: mx.array, **options: Any) -> tuple[mx.array, ...] | None:
        """The result by the kernel that is best here, or None where plain ops are to be taken.

        The first call of a kind checks its launch shape, which evaluates arrays of its own. That is allowed inside
        mx.compile and the like too, as those arrays are none of the function's. A kernel itself has no gradient and no
        vmap, as MLX's custom kernels have none: the mode "off" has.
        """
        where = gpu.backend()
        if where is None or not kernels_allowed() or self.name in _left_out.get():
            return None
        launch = chosen_launch(self, where, arrays, options)
        return None if launch is None else self.on(where)(*arrays, launch=launch, **options)


_left_out: ContextVar[frozenset[str]] = ContextVar("mlx_fastvlm_left_out", default=frozenset())


@contextmanager
def without_kernel(name: str) -> Iterator[None]:
    """While entered, this thread runs the op called `name` without its kernel; all others are chosen as ever."""
    token = _left_out.set(_left_out.get() | {name})
    try:
        yield
    finally:
        _left_out.reset(token)


_choosing = threading.RLock()  # one thread compiles and checks, the others wait for what it finds
_choices: dict[tuple, Launch | None] = {}
_verdicts: dict[tuple, bool] = {}
_warned: set[tuple[str, str]] = set()


def chosen_launch(op: FusedOp, where: str, arrays: Arrays, options: dict[str, Any]) -> Launch | None:
    """The launch shape for this call, or None for plain ops. Found out once a call; a look-up from then on."""
    key = (op.name, where, *((array.shape, array.dtype) for array in arrays), *options.items())
    try:
        return _choices[key]
    except KeyError:
        pass
    with _choosing:
        if len(_choices) >= _MOST_CHOICES:
            _choices.clear()
        launch = _choices[key] = _choose(op, where, arrays, options)
    return launch


def forget_choices() -> None:
    """Choose, and check, everything anew: after tuning, and between tests."""
    _choices.clear()
    _verdicts.clear()
    _warned.clear()


def _choose(op: FusedOp, where: str, arrays: Arrays, options: dict[str, Any]) -> Launch | None:
    candidates = op.candidates(where, arrays, options)
    if not candidates:
        return None
    winner = find_winner(Call.of(op.name, arrays, options))
    tuned = winner == PLAIN or winner in candidates
    if op.tuned_only and not tuned:
        return None
    launch = winner if tuned else default_launch(op.name, this_chip().family, candidates)
    if launch == PLAIN:
        return None
    return launch if proven(op, where, launch, op.sample(*arrays, **options), options, compare=not tuned) else None


def proven(
    op: FusedOp, where: str, launch: Launch, arrays: Arrays, options: dict[str, Any], compare: bool = True
) -> bool:
    """Whether a launch shape compiles and agrees with plain ops on `arrays`: found out once, one warning per op if not.

    `compare` False leaves the comparison out, for what tuning has compared on this machine; the kernel must still run.
    """
    kernel = (op.name, where, *sorted(launch.items()), *sorted(options.items()))
    key = (*kernel, *((array.shape, array.dtype) for array in arrays))
    if key not in _verdicts:
        reason = failure(op, where, launch, arrays, options, compare)
        _verdicts[key] = reason is None
        if reason is not None and (op.name, where) not in _warned:
            _warned.add((op.name, where))
            warnings.warn(
                f"The {where} kernel {op.name} {launch} is not used on this machine: {reason}. "
                "Plain MLX ops take its place. Please report it with the output of: mlx-fastvlm selftest",
                RuntimeWarning,
                stacklevel=2,
            )
    return _verdicts[key]


def failure(
    op: FusedOp, where: str, launch: Launch, arrays: Arrays, options: dict[str, Any], compare: bool = True
) -> str | None:
    """Why a launch shape cannot be used, found by running it on `arrays`; None if it agrees with plain ops."""
    try:
        found = op.on(where)(*arrays, launch=launch, **options)
        mx.eval(*found)
    except (RuntimeError, ValueError) as error:  # MLX's, for what does not compile, and for what cannot be launched
        return " ".join(str(error).split())[:200]
    return None if not compare or agrees(found, op.reference(*arrays, **options)) else "its result is wrong"


# Largest difference over the reference's largest value that rounding explains: bits of the type, order of summation.
ROUNDING = {mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}
# On a GPU the reference is the coarser one: float32 products in TF32 (unless MLX_ENABLE_TF32=0; float16's mantissa) on
# CUDA and the M5, rope by Metal's fast cosine, 1e-4 off.
_GPU_FLOAT32 = 4e-3


def rounding(dtype: mx.Dtype) -> float:
    """How far a result may be from its reference, both computed where MLX computes by default."""
    return _GPU_FLOAT32 if dtype == mx.float32 and gpu.backend() else ROUNDING[dtype]


def agrees(found: Arrays, wanted: Arrays) -> bool:
    """Whether a kernel's result is its reference's but for rounding."""
    return all(
        a.shape == b.shape and a.dtype == b.dtype and largest_error(a, b) < rounding(a.dtype)
        for a, b in zip(found, wanted, strict=True)
    )


def largest_error(found: mx.array, wanted: mx.array) -> float:
    """max |found − wanted| / max |wanted|; NaN if either has one."""
    found, wanted = (np.asarray(array.astype(mx.float32)) for array in (found, wanted))
    return float(np.abs(found - wanted).max() / max(float(np.abs(wanted).max()), 1e-30))


def random_array(shape: tuple[int, ...], dtype: mx.Dtype, seed: int) -> mx.array:
    """Normal numbers, the same for the same seed."""
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
