"""The order of the windows, such that the sequences of a group come from different documents.

The layer mixes the tokens at one position of all sequences of a group. If two windows of one document shared a group,
the later window would show its text, which is the future of the earlier one, to the earlier one: a leak that no causal
mask prevents. So groups are shuffled such that this happens only for documents with more windows than there are groups
to distribute them to; training logs the share of such groups (`shared_document_share`).

This module is index arithmetic on NumPy arrays, without I/O. `documents`, int32 [n, 2], is the first and the last
document of each of n windows; both columns are non-decreasing.
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
ORDER_VERSION = "2"  # of the training order, in data.json; 1 was Grain's permutation
_EMPTY = np.iinfo(np.int32).max


class Order:
    """An infinite, seeded order of windows, which consists of blocks of groups.

    A block has about `BLOCK_GROUPS` groups. Its windows are sorted, so that windows of one document are adjacent, and
    then assigned to the groups of the block in turn. Hence a document with at most as many windows in a block as the
    block has groups is never twice in a group.

    Access is random: example i depends only on the arguments and i, and is the same on every machine. Memory is bounded
    by a few blocks.

    Raises:
        UserError: There are fewer windows than `group_size`.
    """

    def __init__(self, documents: np.ndarray, group_size: int, seed: int):
        self.documents = documents
        self.group_size = group_size
        self.seed = seed
        if len(documents) < group_size:
            raise UserError(
                f"data.shuffle_group_size = {group_size}: must be at most the {len(documents)} windows of the corpus; "
                f"try {max(len(documents), 1)} or a shorter model.context_length"
            )
        self._groups = functools.lru_cache(maxsize=4)(self._form_groups)

    def window_ids(self, start: int, stop: int) -> np.ndarray:
        """The windows of examples start .. stop - 1, counted from the start of training: int64 [stop - start]."""
        first, last = start // self.group_size, -(-stop // self.group_size)
        parts, group = [np.zeros((0, self.group_size), np.int64)], first
        while group < last:
            block, begin = self._locate_block(group)
            parts.append(self._groups(*block)[group - begin : last - begin])
            group += len(parts[-1])
        return np.concatenate(parts).reshape(-1)[start - first * self.group_size :][: stop - start]

    def _locate_block(self, group: int) -> tuple[tuple[int, int], int]:
        """((epoch, block), first group of the block) of the block that contains `group`."""
        raise NotImplementedError

    def _block_windows(self, epoch: int, block: int) -> np.ndarray:
        """The windows of a block, in any order: int64 [groups * group_size]."""
        raise NotImplementedError

    def _form_groups(self, epoch: int, block: int) -> np.ndarray:
        """The groups of a block: int64 [groups, group_size], read-only."""
        groups = np.sort(self._block_windows(epoch, block)).reshape(self.group_size, -1).T
        # Shuffle the members of each group and the groups of the block by sorting random numbers: NumPy guarantees that
        # the raw bits of a generator never change, but not its `permutation`.
        bits = np.random.Philox(np.random.SeedSequence((self.seed, epoch, block)))
        members = np.argsort(bits.random_raw(groups.size).reshape(groups.shape), axis=1, kind="stable")
        groups = np.take_along_axis(groups, members, axis=1)
        groups = groups[np.argsort(bits.random_raw(len(groups)), kind="stable")]
        groups.flags.writeable = False
        return groups


class TrainingOrder(Order):
    """The order of one corpus: each epoch is a new seeded permutation of all n windows, truncated to whole groups."""

    def __init__(self, documents: np.ndarray, group_size: int, seed: int):
        super().__init__(documents, group_size, seed)
        self.groups_per_epoch = len(documents) // group_size
        self._blocks = max(1, self.groups_per_epoch // BLOCK_GROUPS)

    def _locate_block(self, group: int) -> tuple[tuple[int, int], int]:
        epoch, within = divmod(group, self.groups_per_epoch)
        block = ((within + 1) * self._blocks - 1) // self.groups_per_epoch
        return (epoch, block), group - within + self._first_group(block)

    def _first_group(self, block: int) -> int:
        """The number of groups of an epoch before `block`; block sizes differ by at most one."""
        return block * self.groups_per_epoch // self._blocks

    def _block_windows(self, epoch: int, block: int) -> np.ndarray:
        begin, end = (self._first_group(b) * self.group_size for b in (block, block + 1))
        return permuted(len(self.documents), (self.seed, epoch), begin, end)


class MixtureOrder(Order):
    """The order of several corpora in proportion to `weights`, each with its own infinite sequence of shuffled epochs.

    The corpus of every example is determined by exact arithmetic: of the first n examples, each corpus has its share of
    n, with an error below the number of corpora. A block takes the next windows of the epochs of each corpus, at most
    about one epoch of any corpus.

    Args:
        documents: Of all windows, one corpus after the other.
        sizes: Number of windows of each corpus.
        weights: In any unit.
    """

    def __init__(
        self, documents: np.ndarray, sizes: Sequence[int], weights: Sequence[float], group_size: int, seed: int
    ):
        super().__init__(documents, group_size, seed)
        fractions = [Fraction(weight) for weight in weights]
        unit = math.lcm(*(weight.denominator for weight in fractions))
        self._weights = [int(weight * unit) for weight in fractions]
        self._sizes = sizes
        epochs = [size * sum(self._weights) // weight for size, weight in zip(sizes, self._weights, strict=True)]
        self._block_groups = max(1, min(BLOCK_GROUPS, min(epochs) // group_size))

    def _locate_block(self, group: int) -> tuple[tuple[int, int], int]:
        block = group // self._block_groups
        return (0, block), block * self._block_groups

    def _counts_by_corpus(self, count: int) -> list[int]:
        """The number of examples of each corpus among the first `count`.

        The first corpus takes its share, the next one its share of the rest, and so on. The numbers are non-decreasing
        in `count`, and their sum is `count`.
        """
        shares, rest = [], sum(self._weights)
        for weight in self._weights:
            shares.append(count * weight // rest)
            count, rest = count - shares[-1], rest - weight
        return shares

    def _block_windows(self, epoch: int, block: int) -> np.ndarray:
        begins, ends = (self._counts_by_corpus(b * self._block_groups * self.group_size) for b in (block, block + 1))
        window_ids, offset = [], 0
        for corpus, (size, begin, end) in enumerate(zip(self._sizes, begins, ends, strict=True)):
            while begin < end:
                corpus_epoch, first = divmod(begin, size)
                last = min(first + end - begin, size)
                window_ids.append(offset + permuted(size, (self.seed, corpus_epoch, corpus + 1), first, last))
                begin += last - first
            offset += size
        return np.concatenate(window_ids)


def groups_sharing_documents(documents: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Whether each group has two windows that share a document.

    Args:
        documents: int32 [n, 2].
        ids: int [groups, G], window ids; -1 for an empty place.

    Returns:
        bool [groups].
    """
    empty = ids < 0
    touched = documents[np.where(empty, 0, ids)]
    first = np.where(empty, _EMPTY, touched[..., 0])
    last = np.where(empty, -1, touched[..., 1])
    by_first = np.argsort(first, axis=1, kind="stable")
    first, last = np.take_along_axis(first, by_first, axis=1), np.take_along_axis(last, by_first, axis=1)
    reached = np.maximum.accumulate(last, axis=1)
    return np.any(first[:, 1:] <= reached[:, :-1], axis=1)


def validation_order(documents: np.ndarray, group_size: int) -> np.ndarray:
    """Every window once, in a fixed order, such that no two windows of a group share a document.

    The windows are assigned to the groups in turn. The number of groups is the larger of n / group_size, rounded up,
    and the number that the document with the most windows needs.

    Args:
        documents: int32 [n, 2].

    Returns:
        int64 [groups, group_size], window ids; -1 for an empty place.
    """
    n = len(documents)
    first, last = np.ascontiguousarray(documents[:, 0]), documents[:, 1]
    # With K groups, window i is in a group with window i + K, which must start after the last document of window i.
    needed = int(np.max(np.searchsorted(first, last, side="right") - np.arange(n), initial=1))
    groups = max(-(-n // group_size), needed)
    order = np.full((group_size, groups), -1, np.int64)
    order.reshape(-1)[:n] = np.arange(n)
    assert not groups_sharing_documents(documents, order.T).any()
    return np.ascontiguousarray(order.T)


def filled_share(documents: np.ndarray, group_size: int) -> float:
    """The fraction of the places in the groups of `validation_order` that hold a window."""
    return len(documents) / validation_order(documents, group_size).size


def fill_warnings(documents: np.ndarray, split: str, group_size: int, advice: str) -> list[str]:
    """A warning if less than half of the places in the groups of a split hold a window, so that groups are smaller."""
    filled = filled_share(documents, group_size)
    if filled >= 0.5:
        return []
    reason = f"their sequences come from different documents, and the split {split!r} has too few long ones"
    return [f"warning: groups of {group_size} are filled to {filled:.0%}: {reason}; try {advice}"]
