"""A seeded permutation of any size, any part of which is found by itself, many places at once.

The block cipher Simon (Beaulieu et al. 2013, eprint 2013/404) permutes all numbers of so many bits, and a place that it
sends past the size is sent on until it is inside. With four rounds and its keys this is bit for bit `index_shuffle` of
`grain.experimental`, which has ordered every run so far, a place a call and thirty times as dear.
"""

from __future__ import annotations

import math

import numpy as np


def permuted(size: int, seed: int, begin: int, end: int) -> np.ndarray:
    """Where begin .. end - 1 are sent by the permutation of 0 .. size - 1 with this seed, uint32: int64 [end - begin].

    Like Grain's it is none for sizes of 1 + 4^k from 2^16 on: the last place is sent where the first is.
    """
    # Half the cipher's bits: at least 8, and enough for the last place.
    half = max(8, -(-math.ceil(math.log2(max(size - 1, 1))) // 2))
    keys = _keys(seed)
    places = _encrypted(np.arange(begin, end, dtype=np.uint64), half, keys)
    if size < 2**12:  # most are sent on, some by thousands of steps: a table of 2^16 steps, whose length doubles
        everywhere = np.arange(2**16, dtype=np.uint64)
        steps = np.where(everywhere < size, everywhere, _encrypted(everywhere, half, keys))
        while (places >= size).any():
            places = steps[places]
            steps = steps[steps]
    while (outside := np.flatnonzero(places >= size)).size:
        places[outside] = _encrypted(places[outside], half, keys)
    return places.astype(np.int64)


def _encrypted(x: np.ndarray, half: int, keys: list[int]) -> np.ndarray:
    """Numbers of 2 `half` bits, uint64: a round of the cipher with each of an even number of keys."""
    mask = np.uint64((1 << half) - 1)
    left: np.ndarray = x >> half & mask
    right: np.ndarray = x & mask
    for key in keys:
        twice, octuple = right << 1 | right >> half - 1, right << 8 | right >> half - 8
        left, right = right, left ^ (twice & octuple ^ (right << 2 | right >> half - 2) ^ key) & mask
    return left << half | right


def _keys(seed: int) -> list[int]:
    """Four keys of 32 bits: what `std::seed_seq{seed}` generates, by the formulas of the C++ standard."""
    keys = [0x8B8B8B8B] * 4
    for k in range(8):
        here, there, beyond, before = (keys[(k + i) % 4] for i in (0, 1, 2, 3))
        if k < 4:
            mixed = here ^ there ^ before
            first = 1664525 * (mixed ^ mixed >> 27)
            second = first + (1, 1 + seed, 2, 3)[k]
            there, beyond = there + first, beyond + second
        else:
            mixed = here + there + before & 0xFFFFFFFF
            first = 1566083941 * (mixed ^ mixed >> 27)
            second = first - k % 4
            there, beyond = there ^ first, beyond ^ second
        for i, value in enumerate((second, there, beyond)):
            keys[(k + i) % 4] = value & 0xFFFFFFFF
    return keys
