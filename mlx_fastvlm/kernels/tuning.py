"""Finding the fastest launch shape of each kernel on this machine, the op without its kernel among the contenders.

What the shapes are is the catalog's matter, where the winners are kept that of winners.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_fastvlm.kernels import gpu
from mlx_fastvlm.kernels.catalog import Case, distinct
from mlx_fastvlm.kernels.choice import kernel_mode
from mlx_fastvlm.kernels.fused_op import failure, forget_choices, without_kernel
from mlx_fastvlm.kernels.launch_table import PLAIN, Launch
from mlx_fastvlm.kernels.timing import time_in_turns
from mlx_fastvlm.kernels.winners import Call, Winner, keep_winner

DEFAULT_SECONDS = 0.5  # of timing, for all contenders of one op together


@dataclass(frozen=True)
class Tuned:
    """What was found out about one op in one shape.

    Attributes:
        call: what the winner is for.
        label: the shape in words.
        plain_seconds: of the op without its kernel: of MLX's ops, or of this package's other kernels in its place.
        seconds: launch shape → time, for those that are right.
        rejected: launch shape → why it was not timed.
    """

    call: Call
    label: str
    plain_seconds: float
    seconds: Sequence[tuple[Launch, float]]
    rejected: Sequence[tuple[Launch, str]]

    @property
    def winner(self) -> Winner:
        """The fastest launch shape, or PLAIN."""
        launch, seconds = min(self.seconds, key=lambda pair: pair[1], default=(PLAIN, self.plain_seconds))
        return launch if seconds < self.plain_seconds else PLAIN

    @property
    def best_seconds(self) -> float:
        """Of the winner."""
        return min([self.plain_seconds, *(seconds for _, seconds in self.seconds)])


def tune(
    cases: Sequence[Case],
    dtypes: Sequence[mx.Dtype],
    seconds: float = DEFAULT_SECONDS,
    keep: bool = True,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[Tuned]:
    """Tune ops for the GPU that MLX computes on, one after the other.

    Args:
        cases: ops and shapes; of those that agree in both, the first is tuned.
        dtypes: types to tune each for.
        seconds: how long to time the contenders of one op.
        keep: write each winner to the cache folder as soon as it is known, so that what was found before an
            interruption stays.
        on_progress: told what is done of what there is to do.

    Raises:
        OptionError: the cache folder cannot be written.
    """
    where = gpu.backend()
    assert where is not None, "there is no GPU to tune for"
    todo = [(case, dtype) for dtype in dtypes for case in distinct(cases)]
    for done, (case, dtype) in enumerate(todo):
        if on_progress:
            on_progress("tuning", done, len(todo))
        tuned = tune_case(case, dtype, where, seconds)
        if tuned is None:
            continue
        if keep:
            keep_winner(tuned.call, tuned.winner)
            forget_choices()
        yield tuned
    if on_progress:
        on_progress("tuning", len(todo), len(todo))


def tune_case(case: Case, dtype: mx.Dtype, where: str, seconds: float) -> Tuned | None:
    """Check every launch shape, then time those that are right against the op without its kernel.

    None if the kernel cannot run in this shape.
    """
    arrays = case.arrays(dtype)
    mx.eval(*arrays)
    launches = case.fused_op.candidates(where, arrays, case.options)
    if not launches:
        return None
    # Ragged arrays as well: the winner also serves sizes that this one stands for.
    sample = case.fused_op.sample(*arrays, **case.options)

    def problem(launch: Launch) -> str | None:
        op, options = case.fused_op, case.options
        return failure(op, where, launch, sample, options) or failure(op, where, launch, arrays, options)

    verdicts = [(launch, problem(launch)) for launch in launches]
    right = [launch for launch, reason in verdicts if reason is None]

    def without() -> Sequence[mx.array]:
        with kernel_mode("auto"), without_kernel(case.op):
            return case.run(*arrays)

    def by_kernel(launch: Launch) -> Callable[[], Sequence[mx.array]]:
        return lambda: case.fused(*arrays, launch=launch, where=where)

    plain_seconds, *kernel_seconds = time_in_turns([without, *map(by_kernel, right)], seconds)
    return Tuned(
        Call.of(case.op, arrays, case.options),
        case.label,
        plain_seconds,
        list(zip(right, kernel_seconds, strict=True)),
        [(launch, reason) for launch, reason in verdicts if reason is not None],
    )
