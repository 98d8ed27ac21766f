"""Numerical correctness of the accelerator: each feed-forward kind against the same layer in float64 on a CPU.

Parameters, input and cotangent have the same values on both sides, rounded to the accelerator's dtype. The
accelerator's products run at JAX's highest precision, so that a router's choices differ by rounding only. An error is
the L2 norm of the difference over that of the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mot_jax.benchmark.layers import Variables, as_function, create_layer, forward_and_backward
from mot_jax.benchmark.report import Column, number
from mot_jax.config import CompanionsConfig, FeedForwardConfig, ThresholdConfig, kernel_runs_on, without_kernel
from mot_jax.cost.layers import SHAPES, Shape
from mot_jax.errors import UserError
from mot_jax.nn.feed_forward.companions import Summary

Row = dict[str, Any]
SHAPE = Shape("numerics", 128, 512, 16, 32, 32, 32)
# Of y and of gradients, which are sums of a thousand products. The gradient of a bias in bfloat16 is a sum of as many
# rounded numbers.
TOLERANCES = {"float32": (2e-5, 2e-5), "bfloat16": (2e-2, 6e-2)}


def configs_to_check(shape: Shape, device: jax.Device) -> dict[str, FeedForwardConfig]:
    """Every kind, those for inference only included, and every implementation that such a device supports."""
    supported = {name: config for name, config in shape.implementations().items() if kernel_runs_on(config, device)}
    inference = (
        CompanionsConfig(shape.group_size, shape.num_experts),
        ThresholdConfig(shape.group_size, shape.num_experts),
    )
    return supported | {config.kind: config for config in inference}


def bench_numerics(small: bool, progress: Callable[[str], None]) -> list[Row]:
    """Compute a row for each kind and dtype. Raises UserError if JAX has no CPU device next to the accelerator.

    Rows: kind, dtype; y_error; gradient_error, the largest of those of x and the parameters, None for a kind that does
    not train; tolerance and gradient_tolerance; ok.
    """
    shape, rows = SHAPES["tiny"] if small else SHAPE, []
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:
        raise UserError("JAX_PLATFORMS: must include a CPU device for the reference; try cuda,cpu") from None
    device = jax.devices()[0]
    for kind, config in configs_to_check(shape, device).items():
        for dtype, (tolerance, gradient_tolerance) in TOLERANCES.items():
            progress(f"numerics: {kind}, {dtype}")
            y_error, *gradient_errors = _errors(shape, config, dtype, cpu)
            gradient_error = max(gradient_errors) if gradient_errors else None
            row: Row = {"kind": kind, "dtype": dtype, "y_error": y_error, "tolerance": tolerance}
            row |= {"gradient_error": gradient_error, "gradient_tolerance": gradient_tolerance}
            ok = y_error <= tolerance and (gradient_error or 0.0) <= gradient_tolerance
            rows.append({**row, "ok": ok})
    return rows


def _errors(shape: Shape, config: FeedForwardConfig, dtype: str, cpu: jax.Device) -> list[float]:
    """Relative errors of y and, for kinds that train, of the gradients of the parameters and of x."""
    generator = np.random.default_rng(0)
    size = (shape.sequences, shape.length, shape.d_model)
    with jax.default_device(cpu):
        forward, variables = as_function(_layer(shape, config, dtype))
        params, router = jax.tree.map(np.asarray, variables)
        inputs = [np.asarray(jnp.asarray(generator.standard_normal(size), dtype)) for _ in range(2)]
    with jax.default_matmul_precision("highest"):
        x, dy = map(jnp.asarray, inputs)
        results = [np.asarray(leaf, np.float64) for leaf in _outputs(forward, (params, router), x, dy, config)]
    with jax.enable_x64(True), jax.default_device(cpu):
        exact_forward, (exact_params, _) = as_function(_layer(shape, without_kernel(config), "float64"))
        *exact_values, x, dy = (jnp.asarray(value.astype(np.float64)) for value in (*jax.tree.leaves(params), *inputs))
        exact_params = jax.tree.unflatten(jax.tree.structure(exact_params), exact_values)
        references = [np.asarray(leaf) for leaf in _outputs(exact_forward, (exact_params, router), x, dy, config)]
    pairs = zip(results, references, strict=True)
    return [float(np.linalg.norm(a - b)) / float(np.linalg.norm(b)) for a, b in pairs]


def _layer(shape: Shape, config: FeedForwardConfig, dtype: str) -> nnx.Module:
    layer = create_layer(shape, config, activation="gelu", dtype=dtype)
    for name, value in vars(layer).items():
        if isinstance(value, Summary):  # initialized to zero
            value[...] = jax.random.normal(jax.random.key(len(name)), value.shape).astype(value.dtype)
    return layer


def _outputs(
    forward: Any, variables: Variables, x: jax.Array, dy: jax.Array, config: FeedForwardConfig
) -> list[jax.Array]:
    """y, and for kinds that train the gradients of the parameters and of x."""
    if isinstance(config, (CompanionsConfig, ThresholdConfig)):
        return jax.tree.leaves(jax.jit(forward)(variables, x))
    return jax.tree.leaves(jax.jit(forward_and_backward(forward))(variables, x, dy))


COLUMNS: list[Column] = [
    ("kind", lambda row: row["kind"]),
    ("dtype", lambda row: row["dtype"]),
    ("error of y", partial(number, "y_error", 1, ".1e")),
    ("tolerance", partial(number, "tolerance", 1, ".0e")),
    ("error of gradients", partial(number, "gradient_error", 1, ".1e")),
    ("gradient tolerance", partial(number, "gradient_tolerance", 1, ".0e")),
    ("", lambda row: "ok" if row["ok"] else "WRONG"),
]
