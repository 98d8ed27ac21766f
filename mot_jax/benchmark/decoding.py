"""`mot bench decoding`: generation in each inference mode, compared with a dense model of equal active parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mot_jax.benchmark.report import Column, number
from mot_jax.benchmark.timing import bandwidth, in_turns, temporaries
from mot_jax.benchmark.workloads import LATE, dense_of_equal_active_parameters
from mot_jax.config import Config, ModelConfig
from mot_jax.data.objectives import Batch
from mot_jax.errors import UserError
from mot_jax.inference.generate import Sampler, decode, left_padded, prefill
from mot_jax.modes import MODES, enter, lacking, offers
from mot_jax.modes.thresholds import Thresholds, measure
from mot_jax.nn.feed_forward import FeedForwardContext
from mot_jax.nn.transformer import Params, bind, init_variables, unroll, update_router
from mot_jax.runtime.progress import progress as bar

_MAX_DECODE_STEPS = 32  # of one timing
_ROUTED_SEQUENCES = 16  # at least, of a training step

Row = dict[str, Any]


def bench_decoding(
    config: Config, batches: Sequence[int], rounds: int, progress: Callable[[str], None]
) -> tuple[list[Row], float]:
    """Time generation with a causal model in each inference mode, and with a dense model of equal active parameters.

    The parameters are random: their values affect only which experts routed tokens take.

    Args:
        config: An experiment.
        batches: Numbers of sequences that are generated at a time.
        rounds: Number of timings of each program.
        progress: Receives lines about the progress.

    Returns:
        Rows, and the measured bandwidth of the memory in bytes/s. A row has mode; batch, the number of sequences;
        seconds_per_step, the median of a decode step, which generates one token of each sequence; spread;
        ratio_to_dense; prefill_seconds, for prompts of half the context; bytes that a decode step must read: weights,
        KV cache, and the mode's statistics of companions; bound_seconds, these over the measured bandwidth;
        temporaries, bytes that XLA allocates in addition to arguments and results.

    Raises:
        UserError: For a masked model.
    """
    if config.model.objective != "causal":
        raise UserError(f"model.objective = {config.model.objective!r}: generates no text; try a causal model")
    progress("measuring the bandwidth of the memory")
    rate, length = bandwidth(), config.model.context_length
    params = random_variables(config.model)
    group = config.model.group_size
    companions = np.random.default_rng(0).integers(0, 256, (2, max(group, 1), length)).astype(np.int32)
    companions[1] = 0  # each sequence is one document
    dense = dense_of_equal_active_parameters(config)
    models = {"dense": (dense.model, random_variables(dense.model))}
    thresholds = _thresholds(config, params, companions)
    modes = [mode for mode in MODES if mode != "without" and lacking(mode, config, companions, thresholds) is None]
    with bar("preparing the parameters of the modes", len(modes)) as advance:
        for mode in modes:
            mode_config, mode_params = enter(mode, config, params, 0, companions, thresholds)
            models[mode] = (mode_config.model, mode_params)
            advance(1)
    rows = []
    for batch in batches:
        progress(f"{batch} texts: compiling {len(models)} models")
        runs = {}
        with bar(f"{batch} texts: compiling models", len(models)) as advance:
            for name, model in models.items():
                runs[name] = _Generation(*model, batch)
                advance(1)
        prefill_timings = in_turns({n: run.prefill for n, run in runs.items()}, rounds, f"{batch} texts: prompts")
        decode_timings = in_turns({n: run.decode for n, run in runs.items()}, rounds, f"{batch} texts: decoding")
        for name, (mode_model, mode_params) in models.items():
            size = step_bytes(mode_model, mode_params, batch)
            rows.append(
                {
                    "mode": name,
                    "batch": batch,
                    "seconds_per_step": decode_timings[name].median / runs[name].decode_steps,
                    "spread": decode_timings[name].spread,
                    "ratio_to_dense": decode_timings[name].median / decode_timings["dense"].median,
                    "prefill_seconds": prefill_timings[name].median,
                    "bytes": size,
                    "bound_seconds": size / rate,
                    "temporaries": runs[name].temporaries,
                }
            )
    return rows, rate


COLUMNS: list[Column] = [
    ("mode", lambda row: row["mode"]),
    ("sequences", lambda row: f"{row['batch']}"),
    ("ms per step", lambda row: f"{1e3 * row['seconds_per_step']:.2f}"),
    ("spread", lambda row: f"{row['spread']:.0%}"),
    ("ratio to dense", lambda row: f"{row['ratio_to_dense']:.2f}"),
    ("tokens/s", lambda row: f"{row['batch'] / row['seconds_per_step']:,.0f}"),
    ("MB read, at least", lambda row: f"{row['bytes'] / 1e6:.1f}"),
    ("ms bound", lambda row: f"{1e3 * row['bound_seconds']:.2f}"),
    ("MB of temporaries", partial(number, "temporaries", 1e-6, ".2f")),
    ("ms prefill", lambda row: f"{1e3 * row['prefill_seconds']:.1f}"),
]


def random_variables(model: ModelConfig) -> Params:
    """Initial parameters, and the router state that a training step on random tokens leaves.

    Before it, thresholds are 0, which half of all experts reach in place of k.
    """
    params, router = jax.jit(partial(init_variables, model))(jax.random.key(0))
    if not router:
        return params
    sequences = math.lcm(model.group_size, model.sequences_per_routing_group)
    shape = (-(-_ROUTED_SEQUENCES // sequences) * sequences, model.context_length)
    tokens = jax.random.randint(jax.random.key(2), shape, 0, min(model.vocab_size, 256))
    context = FeedForwardContext(jnp.ones(shape, bool), tokens, step=jnp.int32(LATE), train=True)

    @jax.jit
    def after_a_step(params: Params, router: Params) -> Params:
        out = bind(model, params | router)(tokens, context, jnp.zeros(shape, jnp.int32))
        return update_router(model, router, out.statistics)

    return params | after_a_step(params, router)


def _thresholds(config: Config, params: Params, texts: np.ndarray) -> Thresholds | None:
    """Those that E / G experts of a token reach on random texts [2, G, S]; None for a model without the mode."""
    if not offers("threshold", config):
        return None
    tokens, segments = texts
    every = np.ones(tokens.shape, bool)
    return measure(config.model, params, 0, [Batch(tokens, tokens, every, every, segments)])


class _Generation:
    """Prefill and decoding of a model, repeated on the same random prompts."""

    def __init__(self, model: ModelConfig, params: Params, batch: int):
        model, params = unroll(model, params)
        length, padded_batch = model.context_length, -(-batch // model.group_size) * model.group_size
        width = length // 2
        self.decode_steps = min(_MAX_DECODE_STEPS, length - width)
        prompts = np.random.default_rng(1).integers(0, min(model.vocab_size, 256), (batch, width))
        no_stop, numbers = np.full((1, 1), -2, np.int32), np.arange(padded_batch, dtype=np.uint32)
        self._sampler = Sampler(np.float32(0.7), np.int32(1), np.float32(1), np.uint32(0), numbers, no_stop)
        sizes = {"vocab_size": model.vocab_size, "end_of_text": model.vocab_size - 1, "filtered": False}
        tokens, token_mask = left_padded(list(prompts), padded_batch, width)
        self._prefill = partial(
            prefill,
            model,
            params,
            np.int32(0),
            tokens,
            token_mask,
            self._sampler,
            np.int32(0),
            columns=width + self.decode_steps + 1,
            **sizes,
        )
        self._end, self._stopped = np.int32(width + self.decode_steps + 1), np.zeros(padded_batch, bool)
        arguments = (jax.eval_shape(self._prefill), self._sampler, self._end, self._stopped)
        compiled = decode.lower(model, params, np.int32(0), *arguments, **sizes).compile()
        self.temporaries = temporaries(compiled)
        self._decode = partial(compiled, params, np.int32(0))

    def prefill(self) -> Callable[[], Any]:
        """The function that processes the prompts and samples the first token of each sequence."""
        return lambda: self._prefill()

    def decode(self) -> Callable[[], Any]:
        """The function that generates `decode_steps` further tokens of each sequence."""
        state = jax.block_until_ready(self._prefill())
        return lambda: self._decode(state, self._sampler, self._end, self._stopped)


def step_bytes(model: ModelConfig, params: Params, batch: int) -> int:
    """The minimum number of bytes that a decode step over `batch` sequences reads: weights, each once, and KV cache.

    Embedding tables, and the tables of hash layers, count with the rows of the tokens. Routed experts count with the
    expected number of experts that the tokens choose, E (1 - (1 - k/E)^B), if they choose independently and uniformly;
    of kinds that run all experts, all are read. Statistics of companions count with the positions of the sequences.
    """
    kind = model.feed_forward
    chosen, experts = kind.experts_per_token, getattr(kind, "num_experts", 1)
    share = 1.0 if chosen is None else 1 - (1 - chosen / experts) ** batch
    total = 0.0
    for name, value in params.items():
        last, size = name.rpartition("/")[2], float(value.size * value.dtype.itemsize)
        if last.endswith("_embedding") and not (model.tie_embeddings and last == "token_embedding"):
            size = min(size, batch * size / value.shape[0])
        elif last == "table" or (last.startswith("companion_") and value.shape[1] > 1):
            size = min(size, batch * size / value.shape[1])
        elif last in ("w_in", "w_gate", "w_out"):
            size *= share
        if last == "companion_mixtures":
            size *= (chosen or experts) / experts
        total += size
    width = model.d_model // model.num_heads * (model.num_kv_heads or model.num_heads)
    cache = 2 * model.num_blocks * batch * (model.context_length // 2) * width * jnp.dtype(model.dtype).itemsize
    return round(total + cache)
