"""Intervals and tests, against published values and against what repeated drawing shows."""

import itertools
import math
import random

import pytest

from mlx_fastvlm.evaluation.uncertainty import bootstrap, estimate, is_binary, mcnemar, sign_flips, wilson


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_has_the_published_values(right, count, low, high):
    found = wilson(right, count)
    assert (found.value, found.low, found.high) == pytest.approx((right / count, low, high), abs=5e-5)


def test_all_right_is_not_certainly_all_right():
    found = wilson(600, 600)
    assert found.value == found.high == 1 and 0.99 < found.low < 1


@pytest.mark.parametrize("count", [1, 10, 13, 30, 2500, 12578])
def test_a_share_lies_in_its_interval(count):
    for right in (0, 1, count - 1, count):
        found = wilson(right, count)
        assert 0 <= found.low <= found.value <= found.high <= 1


def test_scores_of_0_and_1_have_wilsons_interval_and_others_a_bootstraps():
    assert estimate([1, 0, 1.0]).method == "Wilson" and estimate([1, 0, 0.3]).method == "bootstrap"
    assert is_binary([0.0, 1]) and not is_binary([0.5])


def test_the_bootstrap_is_the_normal_interval_where_there_are_many():
    drawn = random.Random(0)
    scores = [drawn.choice([0, 0.3, 0.6, 0.9, 1]) for _ in range(2000)]
    mean = sum(scores) / len(scores)
    half = 1.96 * math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores) / len(scores))
    found = bootstrap(scores)
    assert found.value == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), rel=0.01)
    assert found == bootstrap(scores)  # the same every time


def test_the_bootstrap_holds_the_truth_about_19_times_of_20():
    drawn = random.Random(1)
    truth = (0 + 0.3 + 1) / 3
    held = 0
    for _ in range(100):
        found = bootstrap([drawn.choice([0, 0.3, 1]) for _ in range(100)])
        held += found.low <= truth <= found.high
    assert 88 <= held <= 99


@pytest.mark.parametrize(
    ("first", "second", "p_value"),
    [(0, 0, 1), (5, 5, 1), (0, 5, 2 / 32), (1, 9, 2 * 11 / 1024), (9, 1, 2 * 11 / 1024), (3, 4, 1)],
)
def test_mcnemar_is_the_binomial_test(first, second, p_value):
    assert mcnemar(first, second) == pytest.approx(p_value)


def test_sign_flips_count_what_all_flips_would():
    differences = [0.3, 0.3, -0.6, 0.9, 0.0, 1.0, 0.1, 0.7]
    flipped = [
        sum(sign * value for sign, value in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    exact = sum(abs(total) >= abs(sum(differences)) - 1e-9 for total in flipped) / len(flipped)
    assert sign_flips(differences) == pytest.approx(exact, abs=0.01)


def test_no_difference_is_no_difference():
    assert sign_flips([0.0, 0.0]) == 1
