"""Whether this accelerator computes what it should: each feed-forward kind against the same layer in float64 on a CPU.

Parameters, input and cotangent are the same numbers on both sides, as the accelerator's dtype holds them; its products
run at JAX's highest precision, so that a router's choices differ by rounding alone. An error is the L2 norm of the
difference over that of the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mot_jax.benchmark.layers import applied, both, make
from mot_jax.benchmark.report import Column, number
from mot_jax.config import CompanionsConfig, FeedForwardConfig, kernel_runs_on, without_kernel
from mot_jax.cost.layers import SHAPES, Shape
from mot_jax.errors import UserError
from mot_jax.nn.feed_forward.companions import Summary

Row = dict[str, Any]
SHAPE = Shape("numerics", 128, 512, 16, 32, 32, 32)
# Of y and of gradients: sums of a thousand products. A bias's gradient in bfloat16 is a sum of as many rounded numbers.
TOLERANCES = {"float32": (2e-5, 2e-5), "bfloat16": (2e-2, 6e-2)}


def kinds(shape: Shape, device: jax.Device) -> dict[str, FeedForwardConfig]:
    """All kinds there are, those for inference alone too, and all ways to compute them on such a device."""
    ways = {name: config for name, config in shape.ways().items() if kernel_runs_on(config, device)}
    return ways | {"companions": CompanionsConfig(shape.group_size, shape.num_experts)}


def bench_numerics(small: bool, progress: Callable[[str], None]) -> list[Row]:
    """A row for each kind and dtype. Raises UserError where JAX has no CPU device beside the accelerator.

    Rows: kind, dtype; y_error; gradient_error, the largest of those of x and the parameters, None for a kind that does
    not train; tolerance and gradient_tolerance; ok.
    """
    shape, rows = SHAPES["tiny"] if small else SHAPE, []
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:
        raise UserError("JAX_PLATFORMS: must leave a CPU device to compare with; try cuda,cpu") from None
    device = jax.devices()[0]
    for kind, config in kinds(shape, device).items():
        for dtype, (tolerance, of_gradients) in TOLERANCES.items():
            progress(f"numerics: {kind}, {dtype}")
            y_error, *errors = _errors(shape, config, dtype, cpu)
            gradient_error = max(errors) if errors else None
            found: Row = {"y_error": y_error, "tolerance": tolerance}
            found |= {"gradient_error": gradient_error, "gradient_tolerance": of_gradients}
            ok = y_error <= tolerance and (gradient_error or 0.0) <= of_gradients
            rows.append({"kind": kind, "dtype": dtype, **found, "ok": ok})
    return rows


def _errors(shape: Shape, config: FeedForwardConfig, dtype: str, cpu: jax.Device) -> list[float]:
    draw = np.random.default_rng(0)
    size = (shape.rows, shape.length, shape.d_model)
    with jax.default_device(cpu):
        run, state = applied(_layer(shape, config, dtype))
        values = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        given = [np.asarray(jnp.asarray(draw.standard_normal(size), dtype)) for _ in range(2)]
    with jax.default_matmul_precision("highest"):
        state = jax.tree.unflatten(jax.tree.structure(state), values)
        x, dy = map(jnp.asarray, given)
        here = [np.asarray(leaf, np.float64) for leaf in _run(run, state, x, dy, config)]
    with jax.enable_x64(True), jax.default_device(cpu):
        exact, exact_state = applied(_layer(shape, without_kernel(config), "float64"))
        *wide, x, dy = (jnp.asarray(value.astype(np.float64)) for value in (*values, *given))
        exact_state = jax.tree.unflatten(jax.tree.structure(exact_state), wide)
        there = [np.asarray(leaf) for leaf in _run(exact, exact_state, x, dy, config)]
    return [float(np.linalg.norm(a - b)) / float(np.linalg.norm(b)) for a, b in zip(here, there, strict=True)]


def _layer(shape: Shape, config: FeedForwardConfig, dtype: str) -> nnx.Module:
    layer = make(shape, config, activation="gelu", dtype=dtype)
    for name, value in vars(layer).items():
        if isinstance(value, Summary):  # zero as yet
            value[...] = jax.random.normal(jax.random.key(len(name)), value.shape).astype(value.dtype)
    return layer


def _run(run: Any, state: Any, x: jax.Array, dy: jax.Array, config: FeedForwardConfig) -> list[jax.Array]:
    """y; of kinds that train, the gradients of the parameters and of x too."""
    trains = not isinstance(config, CompanionsConfig)
    return jax.tree.leaves(jax.jit(both(run))(state, x, dy) if trains else jax.jit(run)(state, x))


COLUMNS: list[Column] = [
    ("kind", lambda row: row["kind"]),
    ("dtype", lambda row: row["dtype"]),
    ("error of y", partial(number, "y_error", 1, ".1e")),
    ("at most", partial(number, "tolerance", 1, ".0e")),
    ("of gradients", partial(number, "gradient_error", 1, ".1e")),
    ("gradients at most", partial(number, "gradient_tolerance", 1, ".0e")),
    ("", lambda row: "ok" if row["ok"] else "WRONG"),
]
