"""`mot bench step`: the whole training step of a config and of its dense twin, in turns, on random tokens.

What is timed is the compiled step of `mot train`, state donated and handed on from one to the next, with its batch on
the device: reading text is not in it. The optimizer is timed by itself as well, on the same state: clipping, update and
new parameters. MFU is over what large products of the model's dtype reach on the first device, in the same run; where
the data sheet's peak is known, over that too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mot_jax.benchmark.report import Column, number
from mot_jax.benchmark.timing import bandwidth, in_turns, matmul_peak, temporaries
from mot_jax.config import Config, DenseConfig, check
from mot_jax.cost.accounting import count_parameters, flops_per_token, peak_flops
from mot_jax.cost.layers import optimizer_bytes
from mot_jax.data.objectives import Batch
from mot_jax.nn.sharding import local_rows, make_mesh, place_microbatches
from mot_jax.runs.optimizer import make_optimizer
from mot_jax.runs.state import TrainState, create_state
from mot_jax.training.step import make_train_step

Row = dict[str, Any]


def dense_twin(config: Config) -> Config:
    """The dense model of the same widths, as in configs/*_dense.py: the paper's baseline of a step's time.

    Its feed-forward layers have the FLOPs of the experts; that of `benchmark.decoding` has as many active parameters.
    """
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, feed_forward=DenseConfig()),
        data=dataclasses.replace(config.data, shuffle_group_size=config.group_size),
    )


def bench_step(
    configs: Mapping[str, Config],
    rounds: int,
    progress: Callable[[str], None],
    profile: str | None = None,
) -> tuple[list[Row], dict[str, float]]:
    """A row for each config, by name, the last of which is the baseline; what the machine can do.

    Raises UserError for a config that cannot be. profile: a directory for a trace of the timed rounds.

    Rows: config, kind; parameters; tokens, of a step; median_s; spread; ratio_to_dense, over the baseline;
    tokens_per_second; flops of a step, 3 x forward, and mfu over the measured peak; mfu_by_datasheet, None where that
    is not known; optimizer_s, its share of the step, optimizer_bound_s: the fewest bytes of AdamW over the measured
    bandwidth, None for another optimizer; temporaries, bytes, None where XLA does not say; compile_s.
    The machine: peak in FLOP/s of the last config's dtype, of all devices of its mesh; bandwidth in bytes/s, likewise.
    Several CPU devices count as one: they share the cores.
    """
    for config in configs.values():
        check(config)
    runs = {}
    for name, config in configs.items():
        progress(f"{name}: compiling")
        runs[name] = _Run(config)
    progress(f"{rounds} rounds")
    programs: dict[str, Callable[[], Callable[[], Any]]] = {}
    for name, run in runs.items():
        programs |= {name: run.step, f"{name}, optimizer": run.optimizer}
    with jax.profiler.trace(profile) if profile else contextlib.nullcontext():
        times = in_turns(programs, rounds)
    *_, baseline = configs
    rate, peaks = bandwidth(), {d: matmul_peak(d) for d in {config.model.dtype for config in configs.values()}}
    rows = []
    for name, run in runs.items():
        config, median = configs[name], times[name].median
        size = 1 if run.mesh.devices.flat[0].platform == "cpu" else run.mesh.size  # CPU devices are the same cores
        parameters, dtype = sum(count_parameters(config.model).values()), config.model.dtype
        tokens = config.training.batch_size * config.model.context_length
        flops, optimizer = flops_per_token(config) * tokens, times[f"{name}, optimizer"].median
        known = peak_flops(run.mesh.devices.flat[0], dtype)
        adamw = config.training.optimizer.name == "adamw"
        least = optimizer_bytes(parameters, config.model.param_dtype) if adamw else None
        rows.append(
            {
                "config": name,
                "kind": config.model.feed_forward.kind,
                "parameters": parameters,
                "tokens": tokens,
                "median_s": median,
                "spread": times[name].spread,
                "ratio_to_dense": median / times[baseline].median,
                "tokens_per_second": tokens / median,
                "flops": flops,
                "mfu": flops / median / (size * peaks[dtype]),
                "mfu_by_datasheet": None if known is None else flops / median / (size * known),
                "optimizer_s": optimizer,
                "optimizer_share": optimizer / median,
                "optimizer_bound_s": None if least is None else least / (size * rate),
                "temporaries": run.temporaries,
                "compile_s": run.seconds_to_compile,
            }
        )
    return rows, {"peak": size * peaks[dtype], "bandwidth": size * rate}


class _Run:
    """A state that goes on with every call."""

    def __init__(self, config: Config):
        t, self.mesh = config.training, make_mesh(config)
        self._state = create_state(config, self.mesh)
        rows = len(local_rows(self.mesh, t.batch_size, t.gradient_accumulation_steps))
        self._batch = place_microbatches(
            self.mesh, random_batch(config, rows), t.batch_size, t.gradient_accumulation_steps
        )
        optimizer = make_optimizer(t.optimizer, t.steps)

        def update(gradients: Any, state: TrainState) -> TrainState:
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            return TrainState(state.step, optax.apply_updates(state.params, updates), opt_state)

        with jax.set_mesh(self.mesh):
            start = time.perf_counter()
            step = jax.jit(make_train_step(config), donate_argnums=0)
            self._step = step.lower(self._state, self._batch).compile()
            self.seconds_to_compile = time.perf_counter() - start
            small = jax.jit(lambda params: jax.tree.map(lambda p: jnp.full_like(p, 1e-4), params))
            self._gradients = small(self._state.params)
            self._update = jax.jit(update, donate_argnums=1).lower(self._gradients, self._state).compile()
        self.temporaries = temporaries(self._step)

    def step(self) -> Callable[[], Any]:
        """One step of training."""
        return self._run_step

    def optimizer(self) -> Callable[[], Any]:
        """The update alone."""
        return self._run_update

    def _run_step(self) -> Any:
        self._state, metrics = self._step(self._state, self._batch)
        return self._state, metrics

    def _run_update(self) -> Any:
        self._state = self._update(self._gradients, self._state)
        return self._state


def random_batch(config: Config, rows: int) -> Batch:
    """Rows [rows, S] of random tokens, all real; each predicts the next, or what is hidden in a masked model."""
    model, draw = config.model, np.random.default_rng(0)
    tokens = draw.integers(0, model.vocab_size, (rows, model.context_length + 1), dtype=np.int32)
    real = np.ones((rows, model.context_length), bool)
    masked = model.objective == "masked"
    targets = draw.random(real.shape) < config.data.mask_rate if masked else real
    segments = np.zeros(real.shape, np.int32) if model.document_mask else None
    return Batch(tokens[:, :-1], tokens[:, :-1] if masked else tokens[:, 1:], real, targets, segments)


COLUMNS: list[Column] = [
    ("config", lambda row: row["config"]),
    ("M parameters", partial(number, "parameters", 1e-6, ",.1f")),
    ("ms a step", partial(number, "median_s", 1e3, ",.2f")),
    ("spread", partial(number, "spread", 1, ".0%")),
    ("over dense", partial(number, "ratio_to_dense", 1, ".2f")),
    ("tokens/s", partial(number, "tokens_per_second", 1, ",.0f")),
    ("MFU", partial(number, "mfu", 1, ".1%")),
    ("of data sheet", partial(number, "mfu_by_datasheet", 1, ".1%")),
    ("ms optimizer", partial(number, "optimizer_s", 1e3, ",.2f")),
    ("of step", partial(number, "optimizer_share", 1, ".0%")),
    ("at the bound", partial(number, "optimizer_bound_s", 1e3, ",.2f")),
    ("MB of temporaries", partial(number, "temporaries", 1e-6, ",.1f")),
    ("s to compile", partial(number, "compile_s", 1, ".1f")),
]
