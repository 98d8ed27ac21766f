"""Time the training step with and without skipping updates that are not finite, in pairs.

    python tests/skip_cost.py [CONFIG] [ROUNDS]     # configs/demo.py, 200 rounds: 2 minutes on two cores

Without: the step is compiled with the constant True in place of the test, so that XLA removes all selects, and nothing
is fetched. With: the step of training, and the three scalars that the loop fetches for each step. Prints the median of
the ratios of the pairs with its 95 % bootstrap interval.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np

from mot_jax.benchmark.step import _TrainingRun
from mot_jax.benchmark.timing import in_turns, machine
from mot_jax.config import load_config
from mot_jax.runtime import allocator
from mot_jax.training import step
from mot_jax.training.divergence import WATCHED


class _WatchedRun(_TrainingRun):
    """Fetches the metrics of a step while the next one runs, as `LogHook` does."""

    _pending: dict[str, jax.Array] | None = None

    def _run_step(self):
        state, metrics = super()._run_step()
        before, self._pending = self._pending, {name: metrics[name] for name in WATCHED}
        return state, jax.device_get(before)


def main(path: str = "configs/demo.py", rounds: str = "200") -> None:
    allocator.retain_freed_memory()
    config = load_config(path)
    runs = {"with": _WatchedRun(config)}
    step._all_finite = lambda *values: jnp.bool_(True)
    runs["without"] = _TrainingRun(config)
    timings = in_turns({name: run.step for name, run in runs.items()}, int(rounds))
    with_skips, without = (np.array(timings[name].seconds) for name in ("with", "without"))
    ratios = with_skips / without
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    print(machine())
    medians = f"{1e3 * np.median(with_skips):.2f} ms with, {1e3 * np.median(without):.2f} ms without"
    print(f"{path}, {len(ratios)} pairs: {medians}")
    print(f"median ratio {np.median(ratios):.4f}, 95 % interval {low:.4f} to {high:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
