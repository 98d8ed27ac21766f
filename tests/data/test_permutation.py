"""The permutation in NumPy against Grain's function, by which runs have been ordered."""

from __future__ import annotations

import numpy as np
import pytest
from grain.experimental import index_shuffle
from hypothesis import given
from hypothesis import strategies as st

from mot_jax.data.permutation import permuted

POWERS = [2**k + d for k in (2, 8, 11, 12, 14, 15, 16, 17, 18, 24, 32, 33, 40, 62) for d in (-1, 0, 1, 2)]
SIZES = sorted({1, 2, 7, 100, 30_290, 1_000_003, 3**30, *POWERS})


def assert_same(size: int, seed: int, begin: int, end: int) -> None:
    found = permuted(size, seed, begin, end)
    assert found.dtype == np.int64
    assert found.tolist() == [index_shuffle(i, size - 1, seed, 4) for i in range(begin, end)]


@pytest.mark.parametrize("size", SIZES)
def test_places_are_those_of_grain(size: int) -> None:
    for seed in (0, 0x80000000, 0xFFFFFFFF, size % 2**32):
        for begin in (0, size // 3, max(size - 50, 0)):
            assert_same(size, seed, begin, min(begin + 50, size))


@given(st.integers(1, 2**62), st.integers(0, 62), st.integers(0, 2**32 - 1), st.integers(0), st.integers(0, 20))
def test_any_places_are_those_of_grain(size: int, shift: int, seed: int, begin: int, count: int) -> None:
    size = (size >> shift) + 1
    begin %= size
    assert_same(size, seed, begin, min(begin + count, size))


@pytest.mark.parametrize("size", [1, 2, 255, 4095, 4096, 65_536, 65_538, 100_000])
def test_every_place_comes_once(size: int) -> None:
    assert np.array_equal(np.sort(permuted(size, 5, 0, size)), np.arange(size))
