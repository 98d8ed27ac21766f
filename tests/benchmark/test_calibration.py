"""Calibration of the modeled times: known factors are found, and those that cannot be are marked."""

import numpy as np
import pytest

from mot_jax.benchmark.calibration import calibrate, fit

FACTORS = {"products": 1.4, "elementwise": 1.1, "attention": 2.5, "collectives": 3.0}


def programs(count: int, noise: float = 0.0) -> tuple[list[dict[str, float]], list[float]]:
    """Programs of a microsecond to a second, of which each class takes a random part, and their times."""
    random = np.random.default_rng(0)
    sizes, parts = 10 ** random.uniform(-6, 0, count), random.dirichlet(np.ones(len(FACTORS)), count)
    modeled = [dict(zip(FACTORS, map(float, row), strict=True)) for row in sizes[:, None] * parts]
    times = [sum(FACTORS[name] * seconds for name, seconds in row.items()) for row in modeled]
    return modeled, [seconds * (1 + noise * random.standard_normal()) for seconds in times]


def test_known_factors_are_found():
    factors = fit(*programs(20))
    assert {name: factor.factor for name, factor in factors.items()} == pytest.approx(FACTORS, rel=0.02)
    assert all(factor.resolution > 0.98 and factor.share > 0.4 for factor in factors.values())
    noisy = fit(*programs(200, noise=0.05))
    assert {name: factor.factor for name, factor in noisy.items()} == pytest.approx(FACTORS, rel=0.1)


def test_a_single_class_has_the_ratio_of_its_times():
    """By hand: 4 / 2 and 8 / 4, whatever the other programs' sizes."""
    (factor,) = fit([{"products": 2.0}, {"products": 4e-6}], [4.0, 8e-6]).values()
    assert factor.factor == pytest.approx(2.0) and factor.share == 1.0


def test_a_class_that_the_measurements_do_not_determine_has_the_overall_ratio():
    """Two classes in the same proportion in every program, and one that takes a thousandth."""
    modeled = [{"products": s, "elementwise": s, "library": 2e-3 * s} for s in (1.0, 2.0, 3.0)]
    factors = fit(modeled, [3.0, 6.0, 9.0])
    assert [factor.factor for factor in factors.values()] == pytest.approx([1.5] * 3, rel=1e-2)
    assert factors["library"].resolution < 0.01 and factors["products"].resolution == pytest.approx(0.5, abs=0.01)


def test_rows_state_the_ratio_before_and_after():
    modeled, measured = programs(12)
    rows = [
        {"name": str(i), "modeled_s": m, "measured_s": t}
        for i, (m, t) in enumerate(zip(modeled, measured, strict=True))
    ]
    table, factors = calibrate([*rows, {"name": "empty", "modeled_s": {}, "measured_s": 1.0}])
    assert len(table) == 12 and set(factors) == set(FACTORS)
    for row, m, t in zip(table, modeled, measured, strict=True):
        assert row["ratio"] == pytest.approx(t / sum(m.values())) and row["calibrated_ratio"] == pytest.approx(
            1, abs=0.02
        )
    assert calibrate([]) == ([], {})


def test_a_class_whose_factor_would_not_be_positive_has_the_overall_ratio():
    """The second program is faster than the first, which it contains. Overall: the median of 2 / 1 and 1 / 2."""
    factors = fit([{"products": 1.0}, {"products": 1.0, "elementwise": 1.0}], [2.0, 1.0])
    assert factors["elementwise"].factor == 1.25 and factors["elementwise"].resolution == 0
    assert factors["products"].factor > 0 and factors["products"].resolution > 0.99
    assert fit([{}], [1.0]) == {}
