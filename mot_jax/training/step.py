"""One training step and one evaluation step, pure functions for `jax.jit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mot_jax.config import LossWeights, ModelConfig, OptimizerConfig
from mot_jax.data.objectives import Batch
from mot_jax.nn.feed_forward import FeedForwardContext
from mot_jax.nn.sharding import defer_gradient_sums, select_by_platform, spec, sum_gradients
from mot_jax.nn.transformer import Params, bind, update_router
from mot_jax.runs.optimizer import learning_rate, make_optimizer
from mot_jax.runs.state import TrainState

Metrics = dict[str, jax.Array]


class Evaluation(NamedTuple):
    """Sums over a batch, float32 scalars.

    nats: cross-entropy. tokens: targets that count. correct: those of them with the largest logit. bytes: bytes of text
    that these targets encode. windows: sequences that are not all padding.
    """

    nats: jax.Array
    tokens: jax.Array
    correct: jax.Array
    bytes: jax.Array
    windows: jax.Array


def make_train_step(
    model_config: ModelConfig,
    optimizer_config: OptimizerConfig,
    steps: int,
    losses: LossWeights = LossWeights(),
    gradient_accumulation_steps: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Build the training step, to be compiled with `jax.jit(..., donate_argnums=0)`.

    Args:
        steps: length of the run, for the learning-rate schedule and for fields that are a fraction of it.
        losses: weights of the losses that are added to the cross-entropy.
        gradient_accumulation_steps: A, the number of microbatches.

    Returns:
        A function (state, batch of global arrays [A, B / A, S]) -> (state, metrics), which makes one update by the
        gradient of the mean loss per target. All losses are means over the whole batch, whatever A is. If the loss or
        the norm of its gradient is not finite, the update is skipped: parameters, optimizer and router state keep their
        values.
        Metrics, scalars: loss, the cross-entropy in nats per target, without the added losses; learning_rate;
        gradient_rms, before clipping; parameter_rms; update_rms, of the change of the parameters, as rounded to their
        dtype; skipped and skipped_in_a_row, as in the new state; those of the layers, averaged over microbatches.
    """
    kind = model_config.feed_forward.for_training(steps)
    model_config = dataclasses.replace(model_config, feed_forward=kind)
    optimizer, schedule = make_optimizer(optimizer_config, steps), learning_rate(optimizer_config, steps)
    layer_weights = losses.of_layers(model_config.feed_forward)

    def loss(
        params: Params,
        router: Params,
        batch: Batch,
        step: jax.Array,
        targets: jax.Array,
        counts: dict[str, jax.Array] | None,
    ):
        model, names = bind(model_config, params | router), tuple(layer_weights)
        context = FeedForwardContext(
            batch.token_mask, batch.inputs, step=step, losses=names, train=True, loss_counts=counts
        )
        out = model(batch.inputs, context, batch.segments)
        sums = model.loss_sum(out.hidden, batch.targets, batch.target_mask, losses.head_z)
        total = sums.loss / targets
        for name, weight in layer_weights.items():
            values = [value for key, value in out.losses.items() if key.startswith(name + "/")]
            total += weight * sum(values) / max(len(values), 1)
        return total, (sums.nats / targets, out.metrics, out.statistics)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        targets = jnp.maximum(batch.target_mask.sum(), 1).astype(jnp.float32)
        counts = None
        if gradient_accumulation_steps > 1 and layer_weights:
            model = bind(model_config, state.variables)
            counts = jax.tree.map(lambda c: c.sum(axis=0), jax.lax.map(model.loss_counts, batch.token_mask))

        def microbatch(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, Metrics, Params, Params]:
            gradient = jax.value_and_grad(loss, has_aux=True)
            (total, (value, metrics, statistics)), gradients = gradient(
                params, state.router, batch, state.step, targets, counts
            )
            metrics = jax.tree.map(lambda m: m / gradient_accumulation_steps, metrics)
            return total, value, metrics, statistics, gradients

        first = jax.tree.map(lambda x: x[0], batch)
        if gradient_accumulation_steps == 1:
            total, value, metrics, statistics, gradients = microbatch(state.params, first)
        else:
            # Each device sums the gradients of its own sequences, and devices add them up after the last microbatch.
            params = defer_gradient_sums(state.params, model_config)
            shapes = jax.eval_shape(microbatch, params, first)
            # Sums in float32, also of bfloat16 gradients.
            zeros = jax.tree.map(lambda s: _zeros(s, _wide(s.dtype)), shapes)
            add = partial(jax.tree.map, jnp.add)
            (total, value, metrics, statistics, gradients), _ = jax.lax.scan(
                lambda sum, part: (add(sum, microbatch(params, part)), None), zeros, batch
            )
            gradients = sum_gradients(gradients, model_config)
            gradients = jax.tree.map(lambda g, s: g.astype(s.dtype), gradients, shapes[-1])
        gradient_rms = _rms(gradients)
        finite = _all_finite(total, gradient_rms)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, finite=finite)
        # Selects, which XLA fuses with the update. A conditional would make the host wait on a GPU.
        new_params = optax.apply_updates(state.params, updates)
        params = jax.tree.map(partial(jnp.where, finite), new_params, state.params)
        new_router = update_router(model_config, state.router, statistics)
        router = jax.tree.map(partial(jnp.where, finite), new_router, state.router)
        update_rms, parameter_rms = select_by_platform(_rms_by_one_sum, _rms_of_change_and_new, params, state.params)
        skipped = state.skipped + ~finite
        skipped_in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
        metrics = {
            "loss": value,
            "learning_rate": schedule(state.step - state.skipped),  # the optimizer counts only updates
            "gradient_rms": gradient_rms,
            "update_rms": update_rms,
            "parameter_rms": parameter_rms,
            "skipped": skipped,
            "skipped_in_a_row": skipped_in_a_row,
            **metrics,
        }
        return TrainState(state.step + 1, params, opt_state, skipped, skipped_in_a_row, router), metrics

    return train_step


def make_eval_step(
    model_config: ModelConfig, token_bytes: np.ndarray
) -> Callable[[Params, jax.Array, Batch], Evaluation]:
    """Build the evaluation step.

    Args:
        token_bytes: [V], the number of bytes that each token encodes.

    Returns:
        A function (params, step int32 scalar, batch of global arrays [B, S]) -> Evaluation.
    """

    def eval_step(params: Params, step: jax.Array, batch: Batch) -> Evaluation:
        model = bind(model_config, params)
        out = model(batch.inputs, FeedForwardContext(batch.token_mask, batch.inputs, step=step), batch.segments)
        sizes = jnp.asarray(token_bytes, jnp.float32).at[batch.targets].get(out_sharding=spec("sequences", None))
        sums = model.loss_sum(out.hidden, batch.targets, batch.target_mask, accuracy=True)
        counts = (
            batch.target_mask.sum(),
            sums.correct,
            jnp.where(batch.target_mask, sizes, 0).sum(),
            batch.token_mask.any(axis=1).sum(),
        )
        return Evaluation(sums.nats.astype(jnp.float32), *(count.astype(jnp.float32) for count in counts))

    return eval_step


def _zeros(like: jax.ShapeDtypeStruct, dtype: jnp.dtype) -> jax.Array:
    """Zeros with the shape and the sharding of `like`, also where it is unreduced."""
    sharding = like.sharding
    if sharding is not None and sharding.spec.unreduced:
        return jnp.zeros(like.shape, dtype, out_sharding=sharding.spec)
    return jnp.zeros(like.shape, dtype, device=sharding)


def _all_finite(*values: jax.Array) -> jax.Array:
    """Whether no scalar is NaN or infinite: a bool scalar."""
    return jnp.isfinite(jnp.stack(values)).all()


def _rms(tree: Params) -> jax.Array:
    """Root mean square of all elements of a tree, computed in float32 or wider."""
    wide = jax.tree.map(lambda leaf: leaf.astype(_wide(leaf.dtype)), tree)
    return optax.tree.norm(wide) / np.sqrt(sum(leaf.size for leaf in jax.tree.leaves(tree)))


def _rms_of_change_and_new(new: Params, old: Params) -> tuple[jax.Array, jax.Array]:
    """Root mean squares of the change of the parameters and of the new parameters."""
    # Not from the optimizer's updates: XLA fuses this form with it, which then reads and writes each array once.
    return _rms(jax.tree.map(lambda n, o: n.astype(_wide(n.dtype)) - o, new, old)), _rms(new)


def _rms_by_one_sum(new: Params, old: Params) -> tuple[jax.Array, jax.Array]:
    """As `_rms_of_change_and_new`, for GPUs.

    XLA updates parameters and moments in place by a fusion with one sum, not by one with two: it would copy them all.
    So the squares of both are the parts of one complex number.
    """

    def squares(new: jax.Array, old: jax.Array) -> jax.Array:
        wide = new.astype(_wide(new.dtype))
        return jax.lax.complex(jnp.square(wide - old), jnp.square(wide)).sum()

    total = sum(jax.tree.leaves(jax.tree.map(squares, new, old)))
    size = float(sum(leaf.size for leaf in jax.tree.leaves(new)))  # may exceed an int32
    return jnp.sqrt(total.real / size), jnp.sqrt(total.imag / size)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)
