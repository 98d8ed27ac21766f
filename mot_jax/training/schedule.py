"""The optimizer and its learning rate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from mot_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_steps`, then a cosine down to `final_fraction` of the peak at `steps`.

    Step t (from 0) makes update t + 1: the first update has 1/warmup_steps of the peak, the last one the final value.
    """
    warmup = config.warmup_steps

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        update = jnp.asarray(step, jnp.float32) + 1
        progress = jnp.clip((update - warmup) / max(steps - warmup, 1), 0, 1)
        cosine = config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return config.learning_rate * jnp.where(update < warmup, update / max(warmup, 1), cosine)

    return schedule


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW on clipped gradients; weight decay on all parameters, as in the paper (PAPER.md section 5)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        ),
    )
