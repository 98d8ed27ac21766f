"""The statistics of a study, as functions of losses by step and by seed.

A loss that is missing, since the run has diverged, and a target that is never reached are infinite; none is omitted.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Curve = Sequence[tuple[float, float]]  # (step, loss) of each evaluation, by step
SIGNIFICANCE = 0.05
_CONFIDENCE = 0.95


# --- reaching a loss --------------------------------------------------------------------------------------------------


def crossing(curve: Curve, target: float) -> float:
    """Return the step at which a curve first reaches the target; infinity if it does not.

    Between two evaluations the loss is interpolated linearly. Where the curve is convex, it is below that line, so that
    the step is not too early. An infinite target, of a run that diverged, is none: no curve reaches it.
    """
    before: tuple[float, float] | None = None
    for step, loss in curve:
        if loss <= target < math.inf:
            if before is None or not math.isfinite(before[1]):
                return step
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = step, loss
    return math.inf


def loss_at(curve: Curve, step: float) -> float:
    """Return the loss at a step, interpolated linearly between evaluations.

    After the last evaluation it is the last loss. Before the first one it is unknown, hence infinite.
    """
    before: tuple[float, float] | None = None
    for next_step, loss in curve:
        if next_step >= step:
            if next_step == step:
                return loss
            if before is None:
                return math.inf
            return before[1] + (step - before[0]) * (loss - before[1]) / (next_step - before[0])
        before = next_step, loss
    return math.inf if before is None else before[1]


def horizon(losses: Mapping[float, float], target: float) -> float:
    """Return the shortest schedule whose final loss reaches the target, from final losses by the share of the steps.

    Infinity if none reaches it, as with an infinite target.
    """
    return min((share for share, loss in losses.items() if loss <= target < math.inf), default=math.inf)


def horizons_left(shares: Sequence[float], losses: Mapping[float, float], target: float) -> list[float]:
    """Return the schedules that are not trained yet and can be the shortest that reaches the target.

    A longer schedule is assumed not to end with a higher loss.

    Args:
        shares: of the steps, increasing; the last one is 1 and has been trained.
        losses: final losses so far, by share.
        target: the loss to reach.
    """
    reached = horizon(losses, target)
    if math.isinf(reached):
        return []
    missed = max((share for share, loss in losses.items() if loss > target and share < reached), default=0.0)
    return [share for share in shares if missed < share < reached]


def next_horizon(left: Sequence[float]) -> float:
    """Return the schedule to train next in a bisection of those that are left."""
    return left[len(left) // 2]


# --- learning rates ---------------------------------------------------------------------------------------------------


class RateSpan(NamedTuple):
    """The learning rates around the best one whose final loss is close to the best.

    Attributes:
        low, high: its ends; None if there is no finite loss.
        open_below, open_above: the grid ends inside of it, so that it is at least this long.
    """

    low: float | None = None
    high: float | None = None
    open_below: bool = False
    open_above: bool = False


def rate_span(losses: Mapping[float, float], tolerance: float) -> RateSpan:
    """Return the span of rates whose loss is at most (1 + tolerance) times the lowest one.

    Between the rates of the grid, the loss is interpolated over the logarithm of the rate by a monotone cubic, which is
    flat at the best rate (Fritsch and Carlson). Before a rate that diverged, the span ends at the last one that did
    not.

    Args:
        losses: final losses by learning rate; infinite for a run that diverged.
        tolerance: 0.01 for one percent.
    """
    best = min(losses, key=lambda rate: losses[rate], default=math.nan)
    if math.isinf(losses.get(best, math.inf)):
        return RateSpan()
    diverged = [rate for rate, loss in losses.items() if math.isinf(loss)]
    below, above = (
        max((r for r in diverged if r < best), default=0.0),
        min((r for r in diverged if r > best), default=math.inf),
    )
    rates = sorted(rate for rate in losses if below < rate < above)
    ends: list[float] = []
    if len(rates) > 1:
        from scipy.interpolate import PchipInterpolator  # here, as below

        limit = losses[best] * (1 + tolerance)
        curve = PchipInterpolator([math.log(rate) for rate in rates], [losses[rate] - limit for rate in rates])
        ends = [math.exp(root) for root in curve.roots(extrapolate=False) if math.isfinite(root)]
    low = max((end for end in ends if end < best), default=None)
    high = min((end for end in ends if end > best), default=None)
    return RateSpan(
        rates[0] if low is None else low,
        rates[-1] if high is None else high,
        low is None and rates[0] == min(losses),
        high is None and rates[-1] == max(losses),
    )


# --- comparing losses of several seeds --------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """A paired comparison of two samples.

    Attributes:
        difference: mean of the differences, the sample minus the reference; None if it is not finite.
        low, high: bounds of its confidence interval of 95 %.
        p: of the paired two-sided t-test; None if there is no test.
        reason: why there is no test; empty otherwise.
    """

    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    reason: str = ""


def compare(sample: Mapping[int, float], reference: Mapping[int, float]) -> Comparison:
    """Compare two samples with the same seeds by a paired two-sided t-test.

    There is no test with fewer than two seeds, nor if a value is infinite.
    """
    seeds = sorted(sample.keys() & reference.keys())
    differences = [sample[seed] - reference[seed] for seed in seeds]
    missed = sum(not (math.isfinite(sample[seed]) and math.isfinite(reference[seed])) for seed in seeds)
    if missed:
        return Comparison(reason=f"{missed} of {len(seeds)} seeds miss")
    if len(seeds) < 2:
        return Comparison(
            next(iter(differences), None), reason=f"{len(seeds)} seed{'s' * (len(seeds) != 1)}; the test needs 2"
        )
    mean = statistics.fmean(differences)
    if min(differences) == max(differences):  # the variance is 0, and so is the denominator of t
        return Comparison(mean, mean, mean, reason="all differences are equal")
    import scipy.stats  # here, since it takes more than a second, and only reports have tests

    test = scipy.stats.ttest_rel([sample[seed] for seed in seeds], [reference[seed] for seed in seeds])
    interval = test.confidence_interval(_CONFIDENCE)
    return Comparison(mean, float(interval.low), float(interval.high), float(test.pvalue))


def time_ratio(
    sample: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]
) -> tuple[float, tuple[float, float] | None]:
    """Return the ratio of two times from the seconds of each round by sitting, and its interval of 95 %.

    It is the geometric mean over the sittings of the ratio of the medians. The interval is that of a t distribution
    over their logarithms; one sitting has none.
    """
    logs = [{i: math.log(statistics.median(s)) for i, s in enumerate(sittings)} for sittings in (sample, reference)]
    test = compare(*logs)
    assert test.difference is not None
    interval = None if test.low is None or test.high is None else (math.exp(test.low), math.exp(test.high))
    return math.exp(test.difference), interval


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Correct p-values of several tests by Holm's method.

    A test that could not be made counts as one of them, with p = 1, and stays None.
    """
    corrected: dict[str, float | None] = {}
    largest = 0.0
    ordered = sorted(p_values.items(), key=lambda item: 1.0 if item[1] is None else item[1])
    for index, (name, p) in enumerate(ordered):
        if p is not None:
            largest = max(largest, min(1.0, (len(ordered) - index) * p))
        corrected[name] = None if p is None else largest
    return {name: corrected[name] for name in p_values}


def summary(values: Mapping[int, float]) -> dict[str, float | int]:
    """Return `reached`, the number of finite values, `of` all, their `median`, and `mean` and `sd` if all are finite.

    The median is of all values, so that it is infinite if half of them are. The standard deviation needs two values.
    """
    finite = [value for value in values.values() if math.isfinite(value)]
    figures: dict[str, float | int] = {"reached": len(finite), "of": len(values)}
    figures["median"] = statistics.median(values.values()) if values else math.inf
    if finite and len(finite) == len(values):
        figures["mean"] = statistics.fmean(finite)
        if len(finite) > 1:
            figures["sd"] = statistics.stdev(finite)
    return figures
