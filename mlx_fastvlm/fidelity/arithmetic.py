"""The arithmetic of a comparison, on numpy arrays: knows features, log-probabilities and tokens, but no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mlx_fastvlm.fidelity.results import Answers, Cosine, NextToken

_ROWS = 16  # positions at a time: in float64, a row of 150,000 tokens takes 1.2 MB


def row_cosines(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Cosine similarity of matching rows.

    Args:
        reference, candidate: (N, width).

    Returns:
        (N,) float64 in [-1, 1]; where one row is zero: 1 if both are, else 0.
    """
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    products, norms = (a * b).sum(axis=1), (a * a).sum(axis=1) * (b * b).sum(axis=1)
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    cosines = np.divide(products, np.sqrt(norms), out=both_zero.astype(np.float64), where=norms > 0)
    return np.clip(cosines, -1, 1)


def summarize_cosines(cosines: Iterable[np.ndarray]) -> Cosine:
    """Mean and worst over the rows of all images."""
    rows = np.concatenate(list(cosines))
    return Cosine(mean=float(rows.mean()), worst=float(rows.min()))


def kl_divergences(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """KL(reference ‖ candidate) of each position.

    Args:
        reference, candidate: (T, vocab) natural log-probabilities.

    Returns:
        (T,) float64 in nats, 0 or more: rounding may leave a negative trifle, which becomes 0.
    """
    divergences = np.empty(len(reference))
    for start in range(0, len(reference), _ROWS):
        rows = slice(start, start + _ROWS)
        p = reference[rows].astype(np.float64)
        divergences[rows] = (np.exp(p) * (p - candidate[rows])).sum(axis=1)
    return np.maximum(divergences, 0)


class NextTokenTally:
    """Collects the positions of one answer after the other; only one number a position is kept."""

    def __init__(self) -> None:
        self._divergences: list[np.ndarray] = []
        self._agreements: list[np.ndarray] = []
        self._reference_logprobs: list[np.ndarray] = []
        self._candidate_logprobs: list[np.ndarray] = []

    def add(self, reference: np.ndarray, candidate: np.ndarray, answer: Sequence[int]) -> None:
        """Add an answer's positions.

        Args:
            reference, candidate: (T, vocab) log-probabilities, row i for the token that follows answer[:i].
            answer: the T tokens.
        """
        rows = np.arange(len(answer))
        self._divergences.append(kl_divergences(reference, candidate))
        self._agreements.append(reference.argmax(axis=1) == candidate.argmax(axis=1))
        self._reference_logprobs.append(reference[rows, answer])
        self._candidate_logprobs.append(candidate[rows, answer])

    def summarize(self) -> NextToken:
        """Everything added so far; each position counts alike."""
        divergences = np.concatenate(self._divergences)
        return NextToken(
            positions=len(divergences),
            kl_mean=float(divergences.mean()),
            kl_median=float(np.median(divergences)),
            kl_max=float(divergences.max()),
            top1_agreement=float(np.concatenate(self._agreements).mean()),
            reference_perplexity=_perplexity(self._reference_logprobs),
            candidate_perplexity=_perplexity(self._candidate_logprobs),
        )


def first_divergence(reference: Sequence[int], candidate: Sequence[int]) -> int | None:
    """Index of the first token that differs; None if the answers are the same. An answer that has ended differs too."""
    common = next((i for i, (a, b) in enumerate(zip(reference, candidate, strict=False)) if a != b), None)
    if common is None and len(reference) != len(candidate):
        return min(len(reference), len(candidate))
    return common


def compare_answers(pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Answers:
    """(reference's tokens, candidate's tokens) of every question → where they part."""
    return Answers(tuple(first_divergence(reference, candidate) for reference, candidate in pairs))


def _perplexity(logprobs: Sequence[np.ndarray]) -> float:
    return float(np.exp(-np.concatenate(logprobs).astype(np.float64).mean()))
