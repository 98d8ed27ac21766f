"""`mot bench input`: how fast the batches of a config are read and placed on the devices, without training steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from mot_jax.benchmark.report import Column, number
from mot_jax.config import Config, check
from mot_jax.data.objectives import Objective
from mot_jax.data.order import BLOCK_GROUPS
from mot_jax.data.pipeline import train_batches
from mot_jax.data.text import open_text
from mot_jax.nn.sharding import local_sequences, make_mesh, place_microbatches


def bench_input(config: Config, progress: Callable[[str], None], batches: int | None = None) -> dict[str, Any]:
    """Time everything that `mot train` does for a batch except the step, for the devices of this process.

    Args:
        config: An experiment, checked here.
        progress: Receives lines about the progress.
        batches: Number of batches to time. None takes those of two blocks of the order, because shuffling a block takes
            long and happens once in so many batches.

    Returns:
        A row: corpus and objective; batch_size, and tokens of a batch; batches; mean_s, seconds per batch over all of
        them; slowest_s, the longest wait for one; tokens_per_second.

    Raises:
        UserError: For an invalid config or a corpus that cannot be opened.
    """
    check(config)
    t, mesh = config.training, make_mesh(config)
    tokenizer, windows, _, order, _ = open_text(config)
    count = batches or max(64, 2 * BLOCK_GROUPS * config.group_size // t.batch_size)
    rows = local_sequences(mesh, t.batch_size, t.gradient_accumulation_steps)
    iterator = train_batches(windows, order, Objective.of(config, tokenizer), t.batch_size, rows, 0)
    progress(f"{count} batches of {t.batch_size} x {config.model.context_length} tokens")

    def wait_for_batch() -> None:
        batch = place_microbatches(mesh, next(iterator).sequences, t.batch_size, t.gradient_accumulation_steps)
        jax.block_until_ready(batch)

    try:
        wait_for_batch()
        ends = [time.perf_counter()]
        for _ in range(count):
            wait_for_batch()
            ends.append(time.perf_counter())
    finally:
        iterator.close()
    mean, tokens = (ends[-1] - ends[0]) / count, t.batch_size * config.model.context_length
    return {
        "corpus": ", ".join(config.data.corpus),
        "objective": config.model.objective,
        "batch_size": t.batch_size,
        "tokens": tokens,
        "batches": count,
        "mean_s": mean,
        "slowest_s": float(np.max(np.diff(ends))),
        "tokens_per_second": tokens / mean,
    }


COLUMNS: list[Column] = [
    ("corpus", lambda row: row["corpus"]),
    ("objective", lambda row: row["objective"]),
    ("batch size", lambda row: f"{row['batch_size']:,}"),
    ("tokens", lambda row: f"{row['tokens']:,}"),
    ("batches", lambda row: f"{row['batches']:,}"),
    ("ms per batch", partial(number, "mean_s", 1e3, ",.2f")),
    ("ms slowest", partial(number, "slowest_s", 1e3, ",.2f")),
    ("tokens/s", partial(number, "tokens_per_second", 1, ",.0f")),
]
