"""Initial values of parameters (`docs/paper.md`, section 5)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mot_jax.config import InitConfig


def draw(
    key: jax.Array, shape: tuple[int, ...], fan_in: int, init: InitConfig, dtype: str, multiplier: float = 1.0
) -> jax.Array:
    """Draw a matrix with standard deviation `multiplier` x sqrt(scale / fan_in), before any truncation.

    The values are drawn in float32 or wider, then cast to `dtype`, so that a bfloat16 model starts from the rounded
    values of the float32 model.
    """
    std = (init.scale / fan_in) ** 0.5
    wide = jnp.promote_types(dtype, jnp.float32)
    if init.distribution == "uniform":
        value = jax.random.uniform(key, shape, wide, -1.0, 1.0) * (3**0.5 * std)
    elif init.distribution == "normal":
        value = jax.random.normal(key, shape, wide) * std
    else:
        bound = 2.0 if init.cut is None else init.cut / max(std, 1e-30)
        value = jax.random.truncated_normal(key, -bound, bound, shape, wide) * std
    return (value * multiplier).astype(dtype)
