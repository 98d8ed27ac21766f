"""`mot bench step`: the training step of a config and of its FLOP-matched dense baseline, in turns, on random tokens.

The compiled step of `mot train` is timed with a batch that is on the device already, so reading the dataset is not
included. The state is donated, and each step continues from the previous one. The optimizer is also timed separately on
the same state: clipping, update and new parameters. MFU is relative to the FLOP/s that large products of the model's
dtype reach on the first device in the same run and, if it is known, also to the data sheet's peak.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mot_jax.benchmark.calibration import Model, modeled
from mot_jax.benchmark.report import Column, number
from mot_jax.benchmark.timing import bandwidth, in_turns, matmul_peak, temporaries
from mot_jax.config import Config, check
from mot_jax.cost.flops import flops_per_token
from mot_jax.cost.hardware import peak_flops
from mot_jax.cost.memory import adamw_bytes
from mot_jax.cost.parameters import count_parameters
from mot_jax.data.objectives import Batch
from mot_jax.errors import UserError
from mot_jax.nn.sharding import local_sequences, make_mesh, place_microbatches
from mot_jax.runs.optimizer import make_optimizer
from mot_jax.runs.state import TrainState, create_state
from mot_jax.training.step import make_train_step

Row = dict[str, Any]


def bench_step(
    configs: Mapping[str, Config],
    rounds: int,
    progress: Callable[[str], None],
    profile: str | None = None,
    model: Model | None = None,
) -> tuple[list[Row], dict[str, float]]:
    """Time the training steps of several configs.

    Args:
        configs: By name; the last one is the baseline of the ratios. Their steps have equally many tokens.
        rounds: Number of timings of each program.
        progress: Receives lines about the progress.
        profile: Directory for a trace of the timed rounds.
        model: If given, rows have `modeled_s`, the modeled seconds of the step by class of kernel.

    Returns:
        A row for each config, and the machine's `peak` in FLOP/s for the last config's dtype and `bandwidth` in
        bytes/s, both of all devices of its mesh. Several CPU devices count as one, as they share the cores.
        A row has config, kind; parameters; tokens of a step; median_s; spread; ratio_to_dense, over the baseline;
        tokens_per_second; flops of a step, 3 x forward, and mfu over the measured peak; mfu_by_datasheet, None if that
        peak is not known; optimizer_s, and optimizer_share of the step; optimizer_bound_s, the minimum bytes of AdamW
        over the measured bandwidth, None for other optimizers; temporaries in bytes, None if XLA does not report them;
        compile_s.

    Raises:
        UserError: For an invalid config, or for steps of different numbers of tokens.
    """
    for config in configs.values():
        check(config)
    (name, first), *others = configs.items()
    for other, config in others:
        if (tokens := _tokens(first)) != _tokens(config):
            rule = f"the steps of {name} have {tokens:,} tokens, those of {other} {_tokens(config):,}: must be equal"
            size = _tokens(config) / first.model.context_length
            raise UserError(f"{rule}; try --training.batch-size {size:.0f}")
    runs = {}
    for name, config in configs.items():
        progress(f"{name}: compiling")
        runs[name] = _TrainingRun(config)
    programs: dict[str, Callable[[], Callable[[], Any]]] = {}
    for name, run in runs.items():
        programs |= {name: run.step, f"{name}, optimizer": run.optimizer}
    with jax.profiler.trace(profile) if profile else contextlib.nullcontext():
        timings = in_turns(programs, rounds, "timing")
    *_, baseline = configs
    rate, peaks = bandwidth(), {d: matmul_peak(d) for d in {config.model.dtype for config in configs.values()}}
    rows = []
    for name, run in runs.items():
        config, median = configs[name], timings[name].median
        devices = 1 if run.mesh.devices.flat[0].platform == "cpu" else run.mesh.size  # CPU devices share the cores
        parameters, dtype = sum(count_parameters(config.model).values()), config.model.dtype
        # Those that memory reads and writes: on CPUs those of all devices, otherwise of each device.
        stored = run.parameters_per_device * (run.mesh.size // devices)
        tokens = _tokens(config)
        flops, optimizer = flops_per_token(config) * tokens, timings[f"{name}, optimizer"].median
        datasheet_peak = peak_flops(run.mesh.devices.flat[0], dtype)
        adamw = config.training.optimizer.name == "adamw"
        min_bytes = adamw_bytes(stored, config.model.param_dtype, config.training.optimizer.mu_dtype) if adamw else None
        rows.append(
            {
                "config": name,
                "kind": config.model.feed_forward.kind,
                "parameters": parameters,
                "tokens": tokens,
                "median_s": median,
                "spread": timings[name].spread,
                "ratio_to_dense": median / timings[baseline].median,
                "tokens_per_second": tokens / median,
                "flops": flops,
                "mfu": flops / median / (devices * peaks[dtype]),
                "mfu_by_datasheet": None if datasheet_peak is None else flops / median / (devices * datasheet_peak),
                "optimizer_s": optimizer,
                "optimizer_share": optimizer / median,
                "optimizer_bound_s": None if min_bytes is None else min_bytes / rate,
                "temporaries": run.temporaries,
                "compile_s": run.seconds_to_compile,
            }
        )
        if model:
            rows[-1] |= modeled(model, run.compiled, dtype, run.mesh)
    return rows, {"peak": devices * peaks[dtype], "bandwidth": devices * rate}


def _tokens(config: Config) -> int:
    """Tokens of a step."""
    return config.training.batch_size * config.model.context_length


class TrainingProgram:
    """A training state that advances with every call of its compiled step.

    Args:
        config: of the model and the step.
        state: the state to begin with; None: the initial one.
        batch: the batch of every step, the sequences of this process; None: random tokens.
    """

    def __init__(self, config: Config, state: TrainState | None = None, batch: Batch | None = None):
        t, self.mesh = config.training, make_mesh(config)
        self._state = create_state(config, self.mesh) if state is None else state
        if batch is None:
            rows = len(local_sequences(self.mesh, t.batch_size, t.gradient_accumulation_steps))
            batch = random_batch(config, rows)
        parameters = jax.tree.leaves(self._state.params)
        self.parameters_per_device = sum(math.prod(p.sharding.shard_shape(p.shape)) for p in parameters)
        self._batch = place_microbatches(self.mesh, batch, t.batch_size, t.gradient_accumulation_steps)
        with jax.set_mesh(self.mesh):
            start = time.perf_counter()
            train_step = make_train_step(config.model, t.optimizer, t.steps, t.losses, t.gradient_accumulation_steps)
            self.compiled = jax.jit(train_step, donate_argnums=0).lower(self._state, self._batch).compile()
            self.seconds_to_compile = time.perf_counter() - start
        self.temporaries = temporaries(self.compiled)

    def step(self) -> Callable[[], Any]:
        """The function that runs one training step."""
        return self._run_step

    def _run_step(self) -> Any:
        self._state, metrics = self.compiled(self._state, self._batch)
        return self._state, metrics


class _TrainingRun(TrainingProgram):
    """The same, with an optimizer update that can be run without the rest of the step."""

    def __init__(self, config: Config):
        super().__init__(config)
        optimizer = make_optimizer(config.training.optimizer, config.training.steps)

        def update(gradients: Any, state: TrainState) -> TrainState:
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)

        with jax.set_mesh(self.mesh):
            small_gradients = jax.jit(lambda params: jax.tree.map(lambda p: jnp.full_like(p, 1e-4), params))
            self._gradients = small_gradients(self._state.params)
            self._update = jax.jit(update, donate_argnums=1).lower(self._gradients, self._state).compile()

    def optimizer(self) -> Callable[[], Any]:
        """The function that runs one optimizer update."""
        return self._run_update

    def _run_update(self) -> Any:
        self._state = self._update(self._gradients, self._state)
        return self._state


def random_batch(config: Config, sequences: int) -> Batch:
    """A batch [sequences, S] of random tokens without padding.

    Targets are the next tokens, or in a masked model the inputs at a random choice of positions.
    """
    model, generator = config.model, np.random.default_rng(0)
    tokens = generator.integers(0, model.vocab_size, (sequences, model.context_length + 1), dtype=np.int32)
    token_mask = np.ones((sequences, model.context_length), bool)
    masked = model.objective == "masked"
    target_mask = generator.random(token_mask.shape) < config.data.mask_rate if masked else token_mask
    segments = np.zeros(token_mask.shape, np.int32) if model.document_mask else None
    return Batch(tokens[:, :-1], tokens[:, :-1] if masked else tokens[:, 1:], token_mask, target_mask, segments)


COLUMNS: list[Column] = [
    ("config", lambda row: row["config"]),
    ("M parameters", partial(number, "parameters", 1e-6, ",.1f")),
    ("ms per step", partial(number, "median_s", 1e3, ",.2f")),
    ("spread", partial(number, "spread", 1, ".0%")),
    ("ratio to the last row", partial(number, "ratio_to_dense", 1, ".2f")),
    ("tokens/s", partial(number, "tokens_per_second", 1, ",.0f")),
    ("MFU", partial(number, "mfu", 1, ".1%")),
    ("MFU by data sheet", partial(number, "mfu_by_datasheet", 1, ".1%")),
    ("ms optimizer", partial(number, "optimizer_s", 1e3, ",.2f")),
    ("share of step", partial(number, "optimizer_share", 1, ".0%")),
    ("ms bound", partial(number, "optimizer_bound_s", 1e3, ",.2f")),
    ("MB of temporaries", partial(number, "temporaries", 1e-6, ",.1f")),
    ("s to compile", partial(number, "compile_s", 1, ".1f")),
]
