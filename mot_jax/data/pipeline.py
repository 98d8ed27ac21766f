"""Training and validation batches, read ahead in a background thread (grain).

Sequence b of batch t is example t B + b of one global order, for every mesh and number of processes. A process reads
only the sequences that its devices hold.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Iterator
from typing import NamedTuple

import grain
import numpy as np

from mot_jax.data.objectives import VALIDATION, Batch, Objective
from mot_jax.data.order import Order, groups_sharing_documents, validation_order
from mot_jax.data.windows import WindowBatch, Windows

MAX_WINDOWS_READ = 2048  # at once: a call of the reader, which uses 64 threads, takes a millisecond even for a few
MAX_TOKENS_READ = 2**20
MAX_WINDOWS_ORDERED = 2**17  # in the whole batches of which a process reads its sequences at once
COUNTED_TOKENS = 2**22  # by `token_counts`


class TrainBatch(NamedTuple):
    """A training batch.

    Attributes:
        sequences: The sequences of this process.
        shared_document_share: Fraction of the groups of the whole batch in which two sequences share a document.
    """

    sequences: Batch
    shared_document_share: float


def train_batches(
    windows: Windows,
    order: Order,
    objective: Objective,
    batch_size: int,
    local_sequences: np.ndarray,
    first_example: int,
) -> Generator[TrainBatch, None, None]:
    """Yield training batches from `first_example` on, without end; `close()` stops the background thread.

    Blocks of up to `MAX_WINDOWS_READ` sequences are read at once; the next block is read while this one is consumed.

    Args:
        batch_size: B, the sequences of the whole batch; a multiple of the group size.
        local_sequences: int [b], increasing: the sequences of the batch to read.
        first_example: The first example, a multiple of B.
    """
    if batch_size % order.group_size or first_example % batch_size:
        raise ValueError(
            f"batch_size = {batch_size} must be a multiple of the group size {order.group_size}, "
            f"and first_example = {first_example} of batch_size"
        )

    tokens = len(local_sequences) * windows.context_length
    count = max(
        1, min(MAX_WINDOWS_READ // len(local_sequences), MAX_TOKENS_READ // tokens, MAX_WINDOWS_ORDERED // batch_size)
    )

    def read(block: int) -> list[TrainBatch]:
        begin = first_example + block * count * batch_size
        firsts = range(begin, begin + count * batch_size, batch_size)
        ids = order.window_ids(firsts.start, firsts.stop)
        shared = groups_sharing_documents(order.documents, ids.reshape(-1, order.group_size)).reshape(count, -1)
        batch = windows.read(ids.reshape(count, -1)[:, local_sequences].reshape(-1))
        batches = zip(*(np.split(array, count) for array in batch), firsts, shared.mean(axis=1), strict=True)
        return [
            TrainBatch(objective(WindowBatch(tokens, mask), first + local_sequences), float(share))
            for tokens, mask, first, share in batches
        ]

    # More threads or a larger buffer gave no measurable speedup.
    blocks = grain.MapDataset.range(sys.maxsize).map(read)
    ahead = iter(blocks.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)))

    def batches() -> Generator[TrainBatch, None, None]:
        try:
            for block in ahead:
                yield from block
        finally:
            ahead.close()

    return batches()


def token_counts(windows: Windows, order: Order, objective: Objective, vocab_size: int) -> np.ndarray:
    """Count the inputs of the first training examples by token id, without padding: int64 [vocab_size].

    At most 2^22 tokens (at least one window), and at most one epoch. Every process reads the same ones, on any mesh.
    """
    length = windows.context_length
    examples = min(len(windows), max(1, COUNTED_TOKENS // length))
    block = max(1, min(MAX_WINDOWS_READ, MAX_TOKENS_READ // length))
    counts = np.zeros(vocab_size, np.int64)
    for first in range(0, examples, block):
        numbers = np.arange(first, min(first + block, examples))
        batch = objective(windows.read(order.window_ids(first, first + len(numbers))), numbers)
        counts += np.bincount(batch.inputs[batch.token_mask], minlength=vocab_size)
    return counts


def validation_batches(
    windows: Windows,
    objective: Objective,
    group_size: int,
    batch_size: int,
    local_sequences: np.ndarray,
    limit: int | None,
) -> Iterator[Batch]:
    """Yield the validation windows once, in the same groups and order every time; empty sequences fill the last batch.

    Args:
        batch_size: Sequences of a whole batch: a multiple of `group_size`, or a divisor of it where sequences are not
            mixed.
        local_sequences: int [b], increasing: the sequences of the batch to read.
        limit: Score only so many windows, in whole groups that are spread evenly over the text; None for all windows.
    """
    if batch_size % group_size and group_size % batch_size:
        raise ValueError(f"batch_size = {batch_size} must divide group_size = {group_size}, or be a multiple")
    groups = validation_order(windows.documents, group_size)
    if limit is not None:
        # Multiples of the golden ratio modulo 1: any number of the first ones is spread evenly.
        groups = groups[np.argsort(np.arange(len(groups)) * (math.sqrt(5) - 1) / 2 % 1)]
        groups = groups[: np.searchsorted((groups >= 0).sum(axis=1).cumsum(), limit) + 1]
    ids = groups.reshape(-1)
    ids = np.pad(ids, (0, -len(ids) % batch_size), constant_values=-1)
    for first in range(0, len(ids), batch_size):
        yield objective(windows.read(ids[first + local_sequences]), first + local_sequences, VALIDATION)
