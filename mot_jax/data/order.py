"""Which windows share a batch: pure index arithmetic on NumPy arrays, no I/O.

Two windows of one document must not share a group: the later one shows the earlier one its future, which no causal
mask sees. So the shuffle cares about groups, not about windows alone.

`documents`, int32 [n, 2], is the first and last document that each of n windows touches; both columns never decrease.
"""

from __future__ import annotations

import functools

import grain
import numpy as np

from mot_jax.config import ConfigError

_BLOCK_GROUPS = 512
_ABSENT = np.iinfo(np.int32).max


class TrainingOrder:
    """The endless shuffled order of the windows of a training split, one example after another.

    Each epoch is a new seeded permutation of all n windows, cut to whole groups. Blocks of about 512 groups are dealt
    like cards: a block's windows are sorted, so that those of one document lie together, and handed out one to each
    group in turn. A document with no more windows in a block than the block has groups never meets itself.

    Random access, the same on every machine: an example depends on (n, group_size, seed) and its number alone.
    Memory is that of a few blocks. Raises ConfigError if the windows do not fill one group.
    """

    def __init__(self, documents: np.ndarray, group_size: int, seed: int):
        self.documents = documents
        self.group_size = group_size
        self.seed = seed
        self.groups_per_epoch = len(documents) // group_size
        if not self.groups_per_epoch:
            raise ConfigError(
                f"data.group_size = {group_size}: the corpus has {len(documents)} windows, too few for one group; "
                f"try a group size of {max(len(documents), 1)} or a shorter model.context_length"
            )
        self._blocks = max(1, self.groups_per_epoch // _BLOCK_GROUPS)
        self._block = functools.lru_cache(maxsize=4)(self._deal)
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)

    def window_ids(self, start: int, stop: int) -> np.ndarray:
        """The windows of examples start .. stop - 1, counted from the first epoch's first: int64 [stop - start]."""
        first, last = start // self.group_size, -(-stop // self.group_size)
        parts, group = [np.zeros((0, self.group_size), np.int64)], first
        while group < last:
            epoch, within = divmod(group, self.groups_per_epoch)
            block = ((within + 1) * self._blocks - 1) // self.groups_per_epoch
            begin, _ = self._bounds(block)
            part = self._block(epoch, block)[within - begin : last - group + within - begin]
            parts.append(part)
            group += len(part)
        return np.concatenate(parts).reshape(-1)[start - first * self.group_size :][: stop - start]

    def _bounds(self, block: int) -> tuple[int, int]:
        """The groups of an epoch that `block` holds; sizes differ by at most one."""
        return block * self.groups_per_epoch // self._blocks, (block + 1) * self.groups_per_epoch // self._blocks

    def _permute(self, epoch: int) -> grain.MapDataset[int]:
        seed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
        return grain.MapDataset.range(len(self.documents)).shuffle(seed=seed)

    def _deal(self, epoch: int, block: int) -> np.ndarray:
        """The windows of one block: int64 [groups, group_size], read-only."""
        begin, end = self._bounds(block)
        permutation = self._permutation(epoch)
        cards = np.array([permutation[i] for i in range(begin * self.group_size, end * self.group_size)], np.int64)
        groups = np.sort(cards).reshape(self.group_size, end - begin).T
        # Places within a group, and groups within the block, by the ranks of random numbers: NumPy promises the raw
        # bits of a generator for ever, but not what its `permutation` makes of them.
        bits = np.random.Philox(np.random.SeedSequence((self.seed, epoch, block)))
        places = np.argsort(bits.random_raw(groups.size).reshape(groups.shape), axis=1, kind="stable")
        groups = np.take_along_axis(groups, places, axis=1)
        groups = groups[np.argsort(bits.random_raw(len(groups)), kind="stable")]
        groups.flags.writeable = False
        return groups


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
