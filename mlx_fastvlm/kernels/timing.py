"""How long GPU work takes: several versions of an op in turns, medians, above the noise of the clock."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from time import perf_counter

import mlx.core as mx

Run = Callable[[], Sequence[mx.array]]

_SAMPLE_SECONDS = 0.004  # one sample; waiting for a GPU once costs some 0.1 ms, which its calls share
_MAX_CALLS = 200  # of one sample
_MAX_BYTES = 2**29  # of one sample's results, which all exist until its end
_ROUNDS = (3, 50)  # at least, at most


def time_in_turns(runs: Sequence[Run], seconds: float, lazy: bool = True) -> list[float]:
    """Seconds per call of each of `runs`: the median over rounds, in each of which every run is sampled once.

    A sample makes several calls and then waits for all, so that what is timed is the work and not the wait. No call
    needs another's result, so a GPU may overlap small ones, as it cannot in a model. Everything is warm: the same inputs
    are read again and again, from caches as far as they fit.

    Args:
        runs: each makes one call and returns its arrays.
        seconds: for all runs together, about; three rounds are made in any case.
        lazy: the calls only build a graph, and only evaluating it is timed, as Python's share is none where a graph is
            built once and run often (mx.compile). False times the calls too, for ops that compute at once.
    """
    calls = [_calls_per_sample(run, lazy) for run in runs]
    samples: list[list[float]] = [[] for _ in runs]
    least, most = _ROUNDS
    start = perf_counter()
    for made in range(most):
        if made >= least and perf_counter() - start >= seconds:
            break
        for run, count, taken in zip(runs, calls, samples, strict=True):
            taken.append(_sample(run, count, lazy))
    return [statistics.median(taken) for taken in samples]


def _sample(run: Run, calls: int, lazy: bool) -> float:
    """Seconds per call of one sample."""
    start = perf_counter()
    results = [run() for _ in range(calls)]
    if lazy:
        start = perf_counter()
    mx.eval(results)
    return (perf_counter() - start) / calls


def _calls_per_sample(run: Run, lazy: bool) -> int:
    """How many calls fill a sample; makes some calls to find out, which warm up whatever there is to warm."""
    results = run()
    mx.eval(results)
    if _sample(run, 1, lazy) >= _SAMPLE_SECONDS:
        return 1
    room = _MAX_BYTES // max(1, sum(array.nbytes for array in results))
    limit = max(1, min(_MAX_CALLS, room))
    rough = max(_sample(run, min(limit, 8), lazy), 1e-9)
    return max(1, min(limit, int(_SAMPLE_SECONDS / rough)))
