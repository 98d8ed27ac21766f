"""A seeded permutation of any size with random access: any range of its elements is computed without the others.

Earlier versions used the algorithm of `index_shuffle` of `grain.experimental` (the block cipher Simon, and cycle
walking), which is not a bijection for sizes of 1 + 4^k from 2^16 on: the last of the 65,537 places of 1 + 4^8 is sent
where the first is, so that one window was used twice in an epoch and another one never. Its cipher has
ceil(log2(n - 1)) bits for n places, rounded up to an even number. For n = 1 + 4^k these are 2k bits, and the last place
needs one more. It is an off-by-one error in the width of the domain: the cipher is evaluated outside of the numbers
that it permutes. Here the width is the bit length of n - 1, and the tests count the elements for every n up to 2,000
and around each power of 4 up to 4^10.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ROUNDS, _ROUNDS_OF_FEW_BITS = 6, 16  # up to 5 bits, fewer rounds would be visibly less random


def permuted(size: int, seed: Sequence[int], begin: int, end: int) -> np.ndarray:
    """Elements begin .. end - 1 of a permutation of 0 .. size - 1: int64 [end - begin].

    A Feistel network permutes all numbers below 2^b, where b is the number of bits of size - 1, whatever its round
    function (Luby and Rackoff 1988, doi.org/10.1137/0217022). A result of `size` or more is encrypted again until it is
    below (cycle walking; Black and Rogaway 2002, doi.org/10.1007/3-540-45760-7_9). This is a bijection for every size,
    and takes less than two encryptions per element on average (four where size is 1).

    Args:
        size: At least 1, at most 2^62.
        seed: Non-negative integers, the entropy of a `np.random.SeedSequence`.
    """
    bits = max(2, (size - 1).bit_length())
    rounds = _ROUNDS if bits > 5 else _ROUNDS_OF_FEW_BITS
    keys = np.random.SeedSequence(seed).generate_state(rounds, np.uint64)
    elements = _encrypt(np.arange(begin, end, dtype=np.uint64), bits, keys)
    outside = np.flatnonzero(elements >= size)
    while outside.size:
        encrypted = _encrypt(elements[outside], bits, keys)
        elements[outside] = encrypted
        outside = outside[encrypted >= size]
    return elements.astype(np.int64)


def _encrypt(x: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """Permute numbers of `bits` bits, uint64. Each round changes one half of the bits by a function of the other."""
    low_bits = bits // 2
    low, high = x & np.uint64((1 << low_bits) - 1), x >> np.uint64(low_bits)
    for i in range(0, len(keys), 2):
        high ^= _mix(low + keys[i]) >> np.uint64(64 - bits + low_bits)
        low ^= _mix(high + keys[i + 1]) >> np.uint64(64 - low_bits)
    return high << np.uint64(low_bits) | low


def _mix(x: np.ndarray) -> np.ndarray:
    """The first steps of SplitMix64's finalizer (Steele et al. 2014, doi.org/10.1145/2660193.2660195), modulo 2^64.

    Every bit of x affects the upper bits of the result, which are used.
    """
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    return (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
