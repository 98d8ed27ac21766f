"""The permutation of an epoch is a bijection for every size, random, and accessed at random."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mot_jax.data.permutation import permuted

NEAR_POWERS_OF_4 = [4**k + 1 + d for k in range(1, 11) for d in (-2, -1, 0, 1, 2)]


def is_permutation(elements: np.ndarray) -> bool:
    return np.array_equal(np.sort(elements), np.arange(len(elements)))


def test_every_size_up_to_2000_is_a_bijection() -> None:
    assert all(is_permutation(permuted(size, (size, 1), 0, size)) for size in range(1, 2001))


@pytest.mark.parametrize("size", NEAR_POWERS_OF_4)
def test_sizes_near_powers_of_4_are_bijections(size: int) -> None:
    """The sizes 1 + 4^k from 4^8 + 1 on are those for which Grain's `index_shuffle` is not a bijection."""
    for seed in (0, 5):
        assert is_permutation(permuted(size, (seed,), 0, size))


@given(st.integers(1, 2**62), st.integers(0, 62), st.integers(0, 2**63), st.integers(0), st.integers(0, 20))
def test_elements_depend_only_on_size_seed_and_place(size: int, shift: int, seed: int, begin: int, count: int) -> None:
    size = max(size >> shift, 1)
    begin %= size
    end = min(begin + count, size)
    elements = permuted(size, (seed,), begin, end)
    assert elements.dtype == np.int64 and elements.shape == (end - begin,)
    assert ((elements >= 0) & (elements < size)).all() and len(set(elements.tolist())) == len(elements)
    assert elements.tolist() == [permuted(size, (seed,), i, i + 1)[0] for i in range(begin, end)]


def test_seeds_and_epochs_give_different_permutations() -> None:
    permutations = [permuted(1000, seed, 0, 1000) for seed in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for i, first in enumerate(permutations):
        assert (first == np.arange(1000)).mean() < 0.02
        for second in permutations[i + 1 :]:
            assert (first == second).mean() < 0.02


@pytest.mark.parametrize("size", [2, 5, 17, 100])
def test_first_elements_are_uniform(size: int) -> None:
    """The statistic of the chi-squared test, in units of its expectation, over the first elements for 3,000 seeds."""
    counts = np.bincount([permuted(size, (seed, 0), 0, 1)[0] for seed in range(3000)], minlength=size)
    expected = 3000 / size
    assert ((counts - expected) ** 2 / expected).sum() / (size - 1) < 4


def test_the_permutation_is_fixed() -> None:
    assert permuted(10, (7, 0), 0, 10).tolist() == FIXED


FIXED = [5, 4, 2, 1, 9, 8, 7, 0, 3, 6]
