"""Sampling rules, each against a plain computation of its definition."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.sampling import keep_top_k, keep_top_p, make_sampler, penalize_repetition

LOGITS = mx.array([[1.0, 3.0, -2.0, 0.5, 2.0, -1.0]])


def kept(logits):
    return set(np.flatnonzero(np.isfinite(np.array(logits[0]))).tolist())


def test_greedy_takes_the_largest():
    assert make_sampler()(LOGITS).tolist() == [1]


@pytest.mark.parametrize("k, tokens", [(1, {1}), (2, {1, 4}), (3, {0, 1, 4}), (6, {0, 1, 2, 3, 4, 5})])
def test_top_k_keeps_the_k_likeliest(k, tokens):
    assert kept(keep_top_k(LOGITS, k)) == tokens


@pytest.mark.parametrize("p", [0.05, 0.5, 0.7, 0.85, 0.95, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    probabilities = np.array(mx.softmax(LOGITS, axis=-1)[0])
    order = np.argsort(-probabilities)
    needed = 1 + int(np.searchsorted(np.cumsum(probabilities[order]), p))
    result = keep_top_p(LOGITS, p)
    assert kept(result) == set(order[:needed].tolist())
    for token in kept(result):
        assert result[0, token].item() == LOGITS[0, token].item()


def test_repetition_penalty_divides_positive_and_multiplies_negative():
    out = penalize_repetition(LOGITS, mx.array([[1, 2, 1]]), 2.0)
    np.testing.assert_allclose(np.array(out[0]), [1.0, 1.5, -4.0, 0.5, 2.0, -1.0])


def test_a_seed_repeats_draws_and_another_seed_does_not():
    flat = mx.zeros((1, 500))

    def draws(seed):
        sampler = make_sampler(temp=1.0, seed=seed)
        return [sampler(flat).item() for _ in range(8)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert len(set(draws(3))) > 1


def test_draws_follow_the_temperature():
    logits = mx.array([[0.0, 1.0]])
    sampler = make_sampler(temp=0.5, seed=0)
    share = sum(sampler(logits).item() for _ in range(600)) / 600
    assert abs(share - 1 / (1 + np.exp(-2.0))) < 0.05  # three standard errors


@pytest.mark.parametrize(
    "options, text",
    [
        ({"temp": -1}, "temp"),
        ({"temp": float("nan")}, "temp"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_values_out_of_range_are_refused(options, text):
    with pytest.raises(OptionError, match=text):
        make_sampler(**options)
