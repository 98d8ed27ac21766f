"""Which windows share a batch: pure index arithmetic on NumPy arrays, no I/O.

Two windows of one document must not share a group: the later one shows the earlier one its future, which no causal
mask sees. So the shuffle cares about groups, not about windows alone.

`documents`, int32 [n, 2], is the first and last document that each of n windows touches; both columns never decrease.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from mot_jax.data.permutation import permuted
from mot_jax.errors import UserError

BLOCK_GROUPS = 512
_ABSENT = np.iinfo(np.int32).max


class Order:
    """An endless order of windows, one example after another, made of blocks of groups.

    Blocks of about `BLOCK_GROUPS` groups are dealt like cards: a block's windows are sorted, so that those of one
    document lie together, and handed out one to each group in turn. A document with no more windows in a block than the
    block has groups never meets itself.

    Random access, the same on every machine: an example depends on the arguments and its number alone. Memory is that
    of a few blocks. Raises UserError if the windows do not fill one group.
    """

    def __init__(self, documents: np.ndarray, group_size: int, seed: int):
        self.documents = documents
        self.group_size = group_size
        self.seed = seed
        if len(documents) < group_size:
            raise UserError(
                f"data.shuffle_group_size = {group_size}: the corpus has {len(documents)} windows, too few for one group; "
                f"try a group size of {max(len(documents), 1)} or a shorter model.context_length"
            )
        self._block = functools.lru_cache(maxsize=4)(self._deal)

    def window_ids(self, start: int, stop: int) -> np.ndarray:
        """The windows of examples start .. stop - 1, counted from the very first: int64 [stop - start]."""
        first, last = start // self.group_size, -(-stop // self.group_size)
        parts, group = [np.zeros((0, self.group_size), np.int64)], first
        while group < last:
            key, begin = self._find(group)
            parts.append(self._block(*key)[group - begin : last - begin])
            group += len(parts[-1])
        return np.concatenate(parts).reshape(-1)[start - first * self.group_size :][: stop - start]

    def _find(self, group: int) -> tuple[tuple[int, int], int]:
        """The block that holds a group, and its first group."""
        raise NotImplementedError

    def _cards(self, epoch: int, block: int) -> np.ndarray:
        """The windows of a block in any order: int64 [groups * group_size]."""
        raise NotImplementedError

    def _deal(self, epoch: int, block: int) -> np.ndarray:
        """The windows of one block: int64 [groups, group_size], read-only."""
        groups = np.sort(self._cards(epoch, block)).reshape(self.group_size, -1).T
        # Places within a group, and groups within the block, by the ranks of random numbers: NumPy promises the raw
        # bits of a generator for ever, but not what its `permutation` makes of them.
        bits = np.random.Philox(np.random.SeedSequence((self.seed, epoch, block)))
        places = np.argsort(bits.random_raw(groups.size).reshape(groups.shape), axis=1, kind="stable")
        groups = np.take_along_axis(groups, places, axis=1)
        groups = groups[np.argsort(bits.random_raw(len(groups)), kind="stable")]
        groups.flags.writeable = False
        return groups


class TrainingOrder(Order):
    """The windows of one corpus: each epoch is a new seeded permutation of all n, cut to whole groups."""

    def __init__(self, documents: np.ndarray, group_size: int, seed: int):
        super().__init__(documents, group_size, seed)
        self.groups_per_epoch = len(documents) // group_size
        self._blocks = max(1, self.groups_per_epoch // BLOCK_GROUPS)

    def _find(self, group: int) -> tuple[tuple[int, int], int]:
        epoch, within = divmod(group, self.groups_per_epoch)
        block = ((within + 1) * self._blocks - 1) // self.groups_per_epoch
        return (epoch, block), group - within + self._begin(block)

    def _begin(self, block: int) -> int:
        """The groups of an epoch before `block`; sizes of blocks differ by at most one."""
        return block * self.groups_per_epoch // self._blocks

    def _cards(self, epoch: int, block: int) -> np.ndarray:
        begin, end = (self._begin(b) * self.group_size for b in (block, block + 1))
        return _permuted(len(self.documents), (self.seed, epoch), begin, end)


class MixtureOrder(Order):
    """The windows of several corpora in proportion to `weights`, each out of its own endless shuffled epochs.

    documents: of all windows, corpus after corpus. sizes: how many windows each corpus has. weights: in any unit.

    Every example belongs to one corpus by exact arithmetic: of the first n, corpus c has its share of n to within the
    number of corpora. A block takes the next windows of each corpus' epochs, and at most about one epoch of any.
    """

    def __init__(
        self, documents: np.ndarray, sizes: Sequence[int], weights: Sequence[float], group_size: int, seed: int
    ):
        super().__init__(documents, group_size, seed)
        exact = [Fraction(weight) for weight in weights]
        unit = math.lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * unit) for weight in exact]
        self._sizes = sizes
        epochs = [size * sum(self._weights) // weight for size, weight in zip(sizes, self._weights, strict=True)]
        self._block_groups = max(1, min(BLOCK_GROUPS, min(epochs) // group_size))

    def _find(self, group: int) -> tuple[tuple[int, int], int]:
        block = group // self._block_groups
        return (0, block), block * self._block_groups

    def _shares(self, count: int) -> list[int]:
        """How many of the first `count` examples each corpus has.

        The first corpus takes its share, the next one its share of what is left, and so on: no number ever falls when
        `count` grows, and together they are `count`.
        """
        shares, rest = [], sum(self._weights)
        for weight in self._weights:
            shares.append(count * weight // rest)
            count, rest = count - shares[-1], rest - weight
        return shares

    def _cards(self, epoch: int, block: int) -> np.ndarray:
        begins, ends = (self._shares(b * self._block_groups * self.group_size) for b in (block, block + 1))
        cards, offset = [], 0
        for corpus, (size, begin, end) in enumerate(zip(self._sizes, begins, ends, strict=True)):
            while begin < end:
                of_corpus, first = divmod(begin, size)
                last = min(first + end - begin, size)
                cards.append(offset + _permuted(size, (self.seed, of_corpus, corpus + 1), first, last))
                begin += last - first
            offset += size
        return np.concatenate(cards)


def _permuted(size: int, seed: tuple[int, ...], begin: int, end: int) -> np.ndarray:
    """Places begin .. end - 1 of a seeded permutation of `size` windows: int64 [end - begin]."""
    return permuted(size, int(np.random.SeedSequence(seed).generate_state(1)[0]), begin, end)


def shared_document_pairs(documents: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Which groups hold two windows that share a document.

    documents: int32 [n, 2]; ids: int [groups, G], -1 for an absent row -> bool [groups].
    """
    absent = ids < 0
    touched = documents[np.where(absent, 0, ids)]
    first = np.where(absent, _ABSENT, touched[..., 0])
    last = np.where(absent, -1, touched[..., 1])
    by_first = np.argsort(first, axis=1, kind="stable")
    first, last = np.take_along_axis(first, by_first, axis=1), np.take_along_axis(last, by_first, axis=1)
    reached = np.maximum.accumulate(last, axis=1)
    return np.any(first[:, 1:] <= reached[:, :-1], axis=1)


def validation_order(documents: np.ndarray, group_size: int) -> np.ndarray:
    """Every window once, in a fixed order, no two windows of a group sharing a document.

    documents: int32 [n, 2] -> int64 [groups, group_size], -1 for an empty place. The windows are dealt to the groups in
    turn; there are as many groups as the document with the most windows needs, and at least n / group_size.
    """
    n = len(documents)
    first, last = np.ascontiguousarray(documents[:, 0]), documents[:, 1]
    # Dealt to K groups, a window meets the K-th after it; that one must begin behind the window's last document.
    needed = int((np.searchsorted(first, last, side="right") - np.arange(n)).max(initial=1))
    groups = max(-(-n // group_size), needed)
    order = np.full((group_size, groups), -1, np.int64)
    order.reshape(-1)[:n] = np.arange(n)
    assert not shared_document_pairs(documents, order.T).any()
    return np.ascontiguousarray(order.T)


def filled_share(documents: np.ndarray, group_size: int) -> float:
    """Of the places in the groups of `validation_order`, those that hold a window; 1 is full groups."""
    return len(documents) / validation_order(documents, group_size).size
