import math

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from mot_jax.benchmark.study.statistics import (
    compare,
    crossing,
    holm,
    horizon,
    horizons_left,
    loss_at,
    next_horizon,
    rate_span,
    summary,
    time_ratio,
)

INF = math.inf
CURVE = [(10, 4.0), (20, 3.0), (30, 2.0), (40, 2.5)]


@pytest.mark.parametrize(
    ("target", "step"), [(5.0, 10), (4.0, 10), (3.0, 20), (2.75, 22.5), (2.0, 30), (1.9, INF), (3.5, 15), (INF, INF)]
)
def test_a_curve_crosses_the_target_between_two_evaluations(target, step):
    assert crossing(CURVE, target) == step


def test_a_curve_without_finite_losses_before_crosses_at_an_evaluation():
    assert crossing([(10, INF), (20, 1.0)], 2.0) == 20
    assert crossing([], 2.0) == INF


@pytest.mark.parametrize(
    ("step", "loss"), [(10, 4.0), (12.5, 3.75), (30, 2.0), (39, 2.45), (40, 2.5), (99, 2.5), (5, INF)]
)
def test_losses_between_evaluations_are_interpolated(step, loss):
    assert loss_at(CURVE, step) == pytest.approx(loss)


@given(st.integers(0, 8))
def test_bisection_finds_the_shortest_schedule_in_three_trainings(number_that_miss):
    """Schedules from the shortest: the first ones miss the target. 8: all of them."""
    shares = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    final = {share: 2.0 if index < number_that_miss else 1.0 for index, share in enumerate(shares)}
    losses = {1.0: final[1.0]}
    while left := horizons_left(shares, losses, 1.5):
        share = next_horizon(left)
        assert share not in losses
        losses[share] = final[share]
    assert len(losses) <= 4
    assert horizon(losses, 1.5) == ([*shares, INF][number_that_miss])
    assert horizon(losses, INF) == INF and not horizons_left(shares, {1.0: INF}, INF)


def test_the_paired_test_of_three_differences_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), 2 degrees of freedom, for which P(|t| > x) is known."""
    comparison = compare({1: 2.0, 2: 4.0, 3: 6.0}, {1: 1.0, 2: 2.0, 3: 3.0})
    t = 2 * math.sqrt(3)
    assert comparison.difference == 2
    assert comparison.p == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert comparison.high == pytest.approx(2 + 4.302653 / math.sqrt(3), rel=1e-6)
    assert comparison.low == pytest.approx(2 - 4.302653 / math.sqrt(3), rel=1e-6)


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=2, max_size=8))
def test_pairs_are_those_of_equal_seeds(pairs):
    sample = {seed: float(pair[0]) for seed, pair in enumerate(pairs)}
    reference = {seed: float(pair[1]) for seed, pair in reversed([*enumerate(pairs)])} | {99: 0.0}
    differences = [a - b for a, b in pairs]
    comparison = compare(sample, reference)
    assert comparison.difference == pytest.approx(sum(differences) / len(differences))
    if len(set(differences)) > 1:
        assert comparison.p == pytest.approx(scipy.stats.ttest_1samp(differences, 0).pvalue)


@pytest.mark.parametrize(
    ("sample", "reference", "reason"),
    [
        ({1: 1.0}, {1: 2.0}, "1 seed; the test needs 2"),
        ({}, {1: 2.0}, "0 seeds; the test needs 2"),
        ({1: INF, 2: 1.0, 3: 1.0}, {1: 2.0, 2: 2.0, 3: INF}, "2 of 3 seeds miss"),
        ({1: 1.0, 2: 2.0}, {1: 1.5, 2: 2.5}, "all differences are equal"),
    ],
)
def test_a_test_that_cannot_be_made_has_a_reason(sample, reference, reason):
    comparison = compare(sample, reference)
    assert comparison.p is None and comparison.reason == reason


def test_the_ratio_of_two_times_has_an_interval_over_sittings():
    """The speed changes from one to the next. Logarithms of log 1.2 - 0.1, 0 and + 0.1; t of 2 degrees of freedom."""
    speeds, shifts = (1.0, 2.0, 0.5), (-0.1, 0.0, 0.1)
    base = [[speed, speed, 9.0] for speed in speeds]
    sittings = [[1.2 * speed * math.exp(shift)] * 4 for speed, shift in zip(speeds, shifts, strict=True)]
    ratio, interval = time_ratio(sittings, base)
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert ratio == pytest.approx(1.2)
    assert interval == pytest.approx((1.2 * math.exp(-half), 1.2 * math.exp(half)))
    assert time_ratio(sittings[1:2], base[1:2]) == (pytest.approx(1.2), None)


def test_holm_multiplies_by_the_number_of_hypotheses_that_are_left():
    p_values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert holm(p_values) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.4, "b": 0.9}) == pytest.approx({"a": 0.8, "b": 0.9})
    assert holm({}) == {}


def test_a_test_that_was_not_made_counts_in_the_correction():
    assert holm({"a": 0.01, "b": None, "c": None}) == {"a": pytest.approx(0.03), "b": None, "c": None}


def test_a_miss_is_never_left_out_of_a_summary():
    assert summary({1: 3.0, 2: INF, 3: 1.0}) == {"reached": 2, "of": 3, "median": 3.0}
    assert summary({1: 3.0, 2: INF})["median"] == INF
    assert summary({1: 3.0, 2: 1.0}) == {"reached": 2, "of": 2, "median": 2.0, "mean": 2.0, "sd": math.sqrt(2)}


@pytest.mark.parametrize(
    ("losses", "low", "high", "open_below", "open_above"),
    [
        ({1.0: 2.8, 2.0: 2.0, 4.0: 2.1, 8.0: 3.0}, "inside", 4.0, False, False),  # 2.1 is the limit
        ({1.0: 2.09, 2.0: 2.0, 4.0: 2.05}, 1.0, 4.0, True, True),
        ({1.0: 2.05, 2.0: 2.0, 4.0: INF}, 1.0, 2.0, True, False),
        ({0.5: 2.0, 1.0: INF, 2.0: 1.9, 4.0: 1.9, 8.0: INF, 16.0: 1.95}, 2.0, 4.0, False, False),
        ({1.0: INF, 2.0: 2.0}, 2.0, 2.0, False, True),  # the best rate is at an end of the grid
        ({1.0: INF, 2.0: INF}, None, None, False, False),
        ({}, None, None, False, False),
    ],
)
def test_the_span_of_rates_ends_where_the_loss_is_five_percent_above_the_lowest(
    losses, low, high, open_below, open_above
):
    span = rate_span(losses, 0.05)
    assert 1.0 < span.low < 2.0 if low == "inside" else span.low == pytest.approx(low)
    assert span.high == pytest.approx(high)
    assert (span.open_below, span.open_above) == (open_below, open_above)


def test_the_span_of_a_parabola_is_its_own():
    """The loss 2 + x^2 / 5 of x, the binary logarithm of the rate, is 2.1 at the square root of a half; nearly."""
    span = rate_span({2.0**x: 2 + x**2 / 5 for x in (-2, -1, 0, 1, 2)}, 0.05)
    assert math.log2(span.high) == pytest.approx(0.5**0.5, rel=0.1) == -math.log2(span.low)
