"""Initial values: standard deviation, truncation and dtype of every distribution."""

import jax
import numpy as np
import pytest

from mot_jax.config import InitConfig
from mot_jax.nn.initializers import draw

FAN_IN, SHAPE = 16, (200, 200)
STD = (0.1 / FAN_IN) ** 0.5
# The standard deviation of a normal truncated at two standard deviations is 0.8796 of the untruncated one; at
# b = 0.2 / STD = 2.53 it is 0.9558.
EXPECTED = {
    "paper": (InitConfig(), 0.9558 * STD, 0.2),
    "two sigma": (InitConfig(cut=None), 0.8796 * STD, 2 * STD),
    "normal": (InitConfig("normal"), STD, np.inf),
    "uniform": (InitConfig("uniform"), STD, 3**0.5 * STD),
}


@pytest.mark.parametrize("case", EXPECTED)
@pytest.mark.parametrize("multiplier", [1.0, 3.0])
def test_statistics(case, multiplier):
    """40,000 draws: the mean is within 5 of its standard errors, the standard deviation within 2 %."""
    init, std, bound = EXPECTED[case]
    value = np.asarray(draw(jax.random.key(0), SHAPE, FAN_IN, init, "float32", multiplier)) / multiplier
    assert abs(value.mean()) < 5 * std / value.size**0.5
    assert value.std() == pytest.approx(std, rel=0.02)
    assert abs(value).max() <= bound * (1 + 1e-6)
    if np.isfinite(bound):
        assert abs(value).max() > 0.95 * bound


def test_bfloat16_values_are_rounded_float32_values():
    wide, narrow = (draw(jax.random.key(0), SHAPE, FAN_IN, InitConfig(), dtype) for dtype in ("float32", "bfloat16"))
    np.testing.assert_array_equal(wide.astype("bfloat16"), narrow)


@pytest.mark.parametrize("distribution", ["truncated_normal", "normal", "uniform"])
def test_scale_zero_is_zero(distribution):
    assert not draw(jax.random.key(0), (4, 4), 4, InitConfig(distribution, scale=0.0), "float32").any()
