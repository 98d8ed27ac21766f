"""From windows and their order to batches in memory, read ahead by a thread of Grain's.

Row b of batch t is example t B + b of one global order, whatever the mesh and the number of processes. A process reads
the rows that its devices hold, and no others.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from typing import NamedTuple

import grain
import numpy as np

from mot_jax.data.objectives import VALIDATION, Batch, Objective
from mot_jax.data.order import Order, shared_document_pairs, validation_order
from mot_jax.data.windows import WindowBatch, Windows

READ_TOGETHER = 2048  # windows; a call of the reader, which wakes 64 threads, takes a millisecond even for a few
MOST_TOKENS, MOST_DEALT = 2**20, 2**17  # of such a block, and windows of whole batches that it is part of


class TrainBatch(NamedTuple):
    """rows: this process's. shared_document_share: of the whole batch's groups, those with a document in two rows."""

    rows: Batch
    shared_document_share: float


def train_batches(
    windows: Windows,
    order: Order,
    objective: Objective,
    batch_size: int,
    rows: np.ndarray,
    first_example: int,
) -> Generator[TrainBatch, None, None]:
    """The endless training batches from `first_example` on; `close()` stops their thread.

    batch_size: B, rows of the whole batch, in whole groups. rows: int [b], ascending, the rows of it to read.
    first_example: the example to begin with, a multiple of B.

    Blocks of up to `READ_TOGETHER` rows are read at once, the next one while the batches of one are taken.
    """
    if batch_size % order.group_size or first_example % batch_size:
        raise ValueError(
            f"batch_size = {batch_size} must be a multiple of the group size {order.group_size}, "
            f"and first_example = {first_example} of batch_size"
        )

    tokens = len(rows) * windows.context_length
    count = max(1, min(READ_TOGETHER // len(rows), MOST_TOKENS // tokens, MOST_DEALT // batch_size))

    def read(block: int) -> list[TrainBatch]:
        begin = first_example + block * count * batch_size
        firsts = range(begin, begin + count * batch_size, batch_size)
        ids = order.window_ids(firsts.start, firsts.stop)
        shared = shared_document_pairs(order.documents, ids.reshape(-1, order.group_size)).reshape(count, -1)
        found = windows.read(ids.reshape(count, -1)[:, rows].reshape(-1))
        batches = zip(*(np.split(array, count) for array in found), firsts, shared.mean(axis=1), strict=True)
        return [
            TrainBatch(objective(WindowBatch(tokens, mask), first + rows), float(share))
            for tokens, mask, first, share in batches
        ]

    # More threads, or more ahead, gained nothing that was sure.
    blocks = grain.MapDataset.range(sys.maxsize).map(read)
    ahead = iter(blocks.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)))

    def batches() -> Generator[TrainBatch, None, None]:
        try:
            for block in ahead:
                yield from block
        finally:
            ahead.close()

    return batches()


def validation_batches(
    windows: Windows,
    objective: Objective,
    group_size: int,
    rows_per_batch: int,
    rows: np.ndarray,
    limit: int | None,
) -> Iterator[Batch]:
    """One pass over the validation windows, in the same groups and order every time; absent rows fill the last batch.

    rows_per_batch: rows of a whole batch, in whole groups, or in equal parts of one where rows do not mix.
    rows: int [b], ascending, the rows of it to read.
    limit: stop after the group that completes that many windows; None reads them all.
    """
    if rows_per_batch % group_size and group_size % rows_per_batch:
        raise ValueError(f"rows_per_batch = {rows_per_batch} must divide group_size = {group_size}, or be a multiple")
    groups = validation_order(windows.documents, group_size)
    if limit is not None:
        groups = groups[: np.searchsorted((groups >= 0).sum(axis=1).cumsum(), limit) + 1]
    ids = groups.reshape(-1)
    ids = np.pad(ids, (0, -len(ids) % rows_per_batch), constant_values=-1)
    for first in range(0, len(ids), rows_per_batch):
        yield objective(windows.read(ids[first + rows]), first + rows, VALIDATION)
