"""How sure a figure is: 95% intervals of mean scores, and tests of whether two runs differ by more than chance.

Questions are taken as independent of each other; several about one picture are not quite, so that intervals are a little
too narrow where a set has many such. Whatever is drawn at random is drawn with a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000

_Z = 1.959963984540054  # standard deviations to either side that hold 95% of a normal distribution
_DRAWN_AT_ONCE = 2**22  # numbers, 32 MB
_ROUNDING = 1e-9  # what sums in another order may differ by


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval.

    Attributes:
        value, low, high: the mean and the interval's ends.
        method: how the interval was made: "Wilson" or "bootstrap".
    """

    value: float
    low: float
    high: float
    method: str


def estimate(scores: Sequence[float]) -> Estimate:
    """The mean of scores from 0 to 1: with Wilson's interval where all are 0 or 1, else with a bootstrap's."""
    return wilson(round(sum(scores)), len(scores)) if is_binary(scores) else bootstrap(scores)


def is_binary(scores: Sequence[float]) -> bool:
    """Whether every score is 0 or 1."""
    return all(score in (0, 1) for score in scores)


def wilson(right: int, count: int) -> Estimate:
    """Wilson's score interval of a proportion (JASA 22, 1927, p. 209)."""
    share, spread = right / count, _Z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    # Rounding could leave the share out of its own interval at 0 and 1.
    return Estimate(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)), "Wilson")


def bootstrap(scores: Sequence[float]) -> Estimate:
    """The percentile bootstrap interval of a mean, over RESAMPLES resamples.

    Equal scores are drawn together: how often each value comes up in a resample is multinomial.
    """
    values, counts = np.unique(np.asarray(scores, dtype=np.float64), return_counts=True)
    total, generator = len(scores), np.random.default_rng(0)
    means = np.concatenate(
        [generator.multinomial(total, counts / total, size=size) @ values for size in _portions(len(values))]
    )
    low, high = np.quantile(means / total, [0.025, 0.975])
    return Estimate(float(np.mean(scores)), float(low), float(high), "bootstrap")


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value of McNemar's test: chance would split so many differences at least so unevenly.

    Args:
        only_first, only_second: questions that only this run answered rightly.
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)


def sign_flips(differences: Sequence[float]) -> float:
    """The two-sided p-value of a paired permutation test: the share of RESAMPLES random changes of the signs, with the
    signs as they are counted among them, that bring the sum at least as far from 0."""
    sizes, counts = np.unique(np.abs(np.asarray(differences, dtype=np.float64)), return_counts=True)
    generator = np.random.default_rng(0)
    drawn = [
        (2 * generator.binomial(counts, 0.5, size=(size, len(sizes))) - counts) @ sizes
        for size in _portions(len(sizes))
    ]
    observed = abs(math.fsum(differences))
    as_far = int(np.sum(np.abs(np.concatenate(drawn)) >= observed - _ROUNDING))
    return (as_far + 1) / (RESAMPLES + 1)


def _portions(width: int) -> list[int]:
    """RESAMPLES in portions, none with more rows of `width` numbers than are drawn at once."""
    most = max(1, _DRAWN_AT_ONCE // width)
    return [min(most, RESAMPLES - start) for start in range(0, RESAMPLES, most)]
