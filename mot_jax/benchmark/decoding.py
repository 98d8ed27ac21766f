"""What a token costs in generation: each inference mode, beside a dense model of equal active size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mot_jax.benchmark.report import Column, number
from mot_jax.benchmark.timing import bandwidth, in_turns, temporaries
from mot_jax.config import Config, DenseConfig, ModelConfig
from mot_jax.cost.parameters import active_parameters
from mot_jax.errors import UserError
from mot_jax.inference.generate import Sampler, decode, left_padded, prefill
from mot_jax.modes import MODES, enter, lacking
from mot_jax.nn.transformer import Params, init_params, unstack

_COLUMNS = 32  # that are written in one timing, at most

Row = dict[str, Any]


def bench_decoding(
    config: Config, batches: Sequence[int], rounds: int, progress: Callable[[str], None]
) -> tuple[list[Row], float]:
    """A row for each mode of a causal model and each number of texts, and for its dense twin; the memory's bytes/s.

    The parameters are drawn: what they are changes no time, but for the experts that routed tokens meet.

    Rows: mode; batch, texts; seconds_per_step, the median of one, which writes a token of each text; spread;
    ratio_to_dense; prefill_seconds, of a prompt half the context long; bytes, those that a step must read: weights,
    the cache, and what the mode keeps of companions; bound_seconds, these over the measured bandwidth;
    temporaries, bytes that XLA allocates beside arguments and results.
    """
    if config.model.objective != "causal":
        raise UserError(f"model.objective = {config.model.objective!r}: writes no text; try a causal model")
    rate, length = bandwidth(), config.model.context_length
    params = jax.jit(partial(init_params, config.model))(jax.random.key(0))
    group = config.model.group_size
    companions = np.random.default_rng(0).integers(0, 256, (2, max(group, 1), length)).astype(np.int32)
    companions[1] = 0  # one document each
    dense = dense_twin(config)
    models = {"dense": (dense.model, jax.jit(partial(init_params, dense.model))(jax.random.key(0)))}
    for mode in MODES:
        if mode != "without" and lacking(mode, config, companions) is None:
            changed, needed = enter(mode, config, params, 0, companions)
            models[mode] = (changed.model, needed)
    rows = []
    for batch in batches:
        progress(f"{batch} texts: compiling {len(models)} models")
        runs = {name: _Run(*model, batch) for name, model in models.items()}
        progress(f"{batch} texts: {rounds} rounds")
        read = in_turns({name: run.read for name, run in runs.items()}, rounds)
        write = in_turns({name: run.write for name, run in runs.items()}, rounds)
        for name, (model, needed) in models.items():
            size = step_bytes(model, needed, batch)
            rows.append(
                {
                    "mode": name,
                    "batch": batch,
                    "seconds_per_step": write[name].median / runs[name].columns,
                    "spread": write[name].spread,
                    "ratio_to_dense": write[name].median / write["dense"].median,
                    "prefill_seconds": read[name].median,
                    "bytes": size,
                    "bound_seconds": size / rate,
                    "temporaries": runs[name].temporaries,
                }
            )
    return rows, rate


COLUMNS: list[Column] = [
    ("mode", lambda row: row["mode"]),
    ("texts", lambda row: f"{row['batch']}"),
    ("ms a step", lambda row: f"{1e3 * row['seconds_per_step']:.2f}"),
    ("spread", lambda row: f"{row['spread']:.0%}"),
    ("over dense", lambda row: f"{row['ratio_to_dense']:.2f}"),
    ("tokens/s", lambda row: f"{row['batch'] / row['seconds_per_step']:,.0f}"),
    ("MB to read", lambda row: f"{row['bytes'] / 1e6:.1f}"),
    ("ms at the bound", lambda row: f"{1e3 * row['bound_seconds']:.2f}"),
    ("MB of temporaries", partial(number, "temporaries", 1e-6, ".2f")),
    ("ms to read the prompts", lambda row: f"{1e3 * row['prefill_seconds']:.1f}"),
]


class _Run:
    """Texts of a model in the making, again and again from the same prompts."""

    def __init__(self, model: ModelConfig, params: Params, batch: int):
        model, params = unstack(model, params)
        length, rows = model.context_length, -(-batch // model.group_size) * model.group_size
        width = length // 2
        self.columns = min(_COLUMNS, length - width)
        prompts = np.random.default_rng(1).integers(0, min(model.vocab_size, 256), (batch, width))
        no_stop = np.full((1, 1), -2, np.int32)
        self._sampler = Sampler(np.float32(0.7), np.int32(1), np.float32(1), np.uint32(0), no_stop)
        sizes = {"vocab_size": model.vocab_size, "end_of_text": model.vocab_size - 1, "filtered": False}
        tokens, real = left_padded(list(prompts), rows, width)
        self._prefill = partial(
            prefill,
            model,
            params,
            np.int32(0),
            tokens,
            real,
            self._sampler,
            np.int32(0),
            columns=width + self.columns + 1,
            **sizes,
        )
        self._until = np.int32(width + self.columns + 1)
        given = (jax.eval_shape(self._prefill), self._sampler, self._until)
        compiled = decode.lower(model, params, np.int32(0), *given, **sizes).compile()
        self.temporaries = temporaries(compiled)
        self._decode = partial(compiled, params, np.int32(0))

    def read(self) -> Callable[[], Any]:
        """The prompts, and the first token of each."""
        return lambda: self._prefill()

    def write(self) -> Callable[[], Any]:
        """`columns` further tokens of each."""
        state = jax.block_until_ready(self._prefill())
        return lambda: self._decode(state, self._sampler, self._until)


def dense_twin(config: Config) -> Config:
    """The dense model with as many active parameters."""
    model = config.model

    def dense(width: int) -> ModelConfig:
        return dataclasses.replace(model, feed_forward=DenseConfig(), moe_blocks="all", dense_bias=True, d_ff=width)

    wanted, one, two = (active_parameters(m) for m in (model, dense(1), dense(2)))
    return dataclasses.replace(config, model=dense(max(round(1 + (wanted - one) / (two - one)), 1)))


def step_bytes(model: ModelConfig, params: Params, batch: int) -> int:
    """The fewest bytes that a step over `batch` texts reads: each weight that it needs once, and what it keeps.

    Of the embedding tables the rows of the tokens. Of routed experts those that tokens choose, if each chooses by
    itself and all alike: E (1 - (1 - k/E)^B) of E. Of companions what stands at the texts' positions.
    """
    kind = model.feed_forward
    chosen = getattr(kind, "experts_per_token", None) or getattr(kind, "top_k", None)
    experts = getattr(kind, "num_experts", 1)
    share = 1.0 if chosen is None else 1 - (1 - chosen / experts) ** batch
    total = 0.0
    for name, value in params.items():
        last, size = name.rpartition("/")[2], float(value.size * value.dtype.itemsize)
        if last.endswith("_embedding") and not (model.tie_embeddings and last == "token_embedding"):
            size = min(size, batch * size / value.shape[0])
        elif last.startswith("companion_") and value.shape[1] > 1:
            size = min(size, batch * size / value.shape[1])
        elif last in ("w_in", "w_gate", "w_out"):
            size *= share
        if last == "companion_mixtures":
            size *= (chosen or experts) / experts
        total += size
    width = model.d_model // model.num_heads * (model.num_kv_heads or model.num_heads)
    cache = 2 * model.num_blocks * batch * (model.context_length // 2) * width * jnp.dtype(model.dtype).itemsize
    return round(total + cache)
