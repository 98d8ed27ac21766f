"""One training step and one evaluation step, pure functions for `jax.jit`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mot_jax.config import Config
from mot_jax.feed_forward import FeedForwardContext
from mot_jax.model import Params, bind
from mot_jax.sharding import shards, spec
from mot_jax.training.schedule import learning_rate, make_optimizer
from mot_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


class Evaluation(NamedTuple):
    """Sums over a batch: nats, real targets, bytes of text that they stand for, windows. Scalars, float32."""

    nats: jax.Array
    tokens: jax.Array
    bytes: jax.Array
    windows: jax.Array


def make_train_step(config: Config) -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]:
    """(state, tokens int32 [B, S + 1], mask bool [B, S]) -> (state, metrics): one update by the mean loss per target.

    Metrics, scalars: loss in nats, learning_rate, RMS of gradient (before clipping), update and parameters, and the
    layers' own, averaged over microbatches. Compile it with the state donated.
    """
    accumulation = config.training.accumulation
    optimizer = make_optimizer(config.training.optimizer, config.training.steps)
    schedule = learning_rate(config.training.optimizer, config.training.steps)

    def loss(params: Params, tokens: jax.Array, mask: jax.Array, step: jax.Array, targets: jax.Array):
        model = bind(config.model, params)
        inputs = tokens[:, :-1]
        out = model(inputs, FeedForwardContext(token_mask=mask, token_ids=inputs, step=step, train=True))
        if out.losses:
            raise NotImplementedError(f"the training config has no weights for the losses {sorted(out.losses)}")
        return model.loss_sum(out.hidden, tokens[:, 1:], mask) / targets, out.metrics

    def train_step(state: TrainState, tokens: jax.Array, mask: jax.Array) -> tuple[TrainState, Metrics]:
        targets = jnp.maximum(mask.sum(), 1).astype(jnp.float32)

        def microbatch(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, Metrics, Params]:
            gradient = jax.value_and_grad(loss, has_aux=True)
            (value, metrics), gradients = gradient(state.params, tokens, mask, state.step, targets)
            return value, jax.tree.map(lambda m: m / accumulation, metrics), gradients

        if accumulation == 1:
            value, metrics, gradients = microbatch(tokens, mask)
        else:
            parts = split_rows(tokens, accumulation), split_rows(mask, accumulation)
            shapes = jax.eval_shape(microbatch, *jax.tree.map(lambda x: x[0], parts))
            # Sums in float32, whatever the parameters are.
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, _wide(s.dtype), device=s.sharding), shapes)
            add = partial(jax.tree.map, jnp.add)
            (value, metrics, gradients), _ = jax.lax.scan(
                lambda sum, part: (add(sum, microbatch(*part)), None), zeros, parts
            )
            gradients = jax.tree.map(lambda g, s: g.astype(s.dtype), gradients, shapes[2])
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": value,
            "learning_rate": schedule(state.step),
            "gradient_rms": _rms(gradients),
            "update_rms": _rms(updates),
            "parameter_rms": _rms(params),
            **metrics,
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_eval_step(config: Config, token_bytes: np.ndarray) -> Callable[[Params, jax.Array, jax.Array], Evaluation]:
    """(params, tokens int32 [B, S + 1], mask bool [B, S]) -> Evaluation. token_bytes: int [V], bytes of each token."""

    def eval_step(params: Params, tokens: jax.Array, mask: jax.Array) -> Evaluation:
        model = bind(config.model, params)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        out = model(inputs, FeedForwardContext(token_mask=mask, token_ids=inputs))
        sizes = jnp.asarray(token_bytes, jnp.float32).at[targets].get(out_sharding=spec("rows", None))
        nats = model.loss_sum(out.hidden, targets, mask).astype(jnp.float32)
        windows = mask.any(axis=1).sum().astype(jnp.float32)
        return Evaluation(nats, mask.sum().astype(jnp.float32), jnp.where(mask, sizes, 0).sum(), windows)

    return eval_step


def split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...]: each device's own rows are cut, in whole groups, so that none move."""
    n = shards("rows")
    shape = (n, parts, x.shape[0] // (n * parts), *x.shape[1:])
    rest = [None] * (x.ndim - 1)
    cut = jnp.reshape(x, shape, out_sharding=spec("rows", None, None, *rest))
    whole = (parts, x.shape[0] // parts, *x.shape[1:])
    return jnp.reshape(jnp.moveaxis(cut, 1, 0), whole, out_sharding=spec(None, "rows", *rest))


def _rms(tree: Params) -> jax.Array:
    """Root mean square of all numbers of a tree, in float32 at least."""
    wide = jax.tree.map(lambda leaf: leaf.astype(_wide(leaf.dtype)), tree)
    return optax.tree.norm(wide) / np.sqrt(sum(leaf.size for leaf in jax.tree.leaves(tree)))


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)
