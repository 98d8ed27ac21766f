"""Numerical correctness of the accelerator: each feed-forward kind, and attention, against float64 on a CPU.

Parameters, input and cotangent have the same values on both sides, rounded to the accelerator's dtype. The
accelerator's products run at JAX's highest precision, so that a router's choices differ by rounding only. An error is
the L2 norm of the difference over that of the reference.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mot_jax.benchmark.layers import Variables, as_function, create_layer, forward_and_backward
from mot_jax.benchmark.report import Column, number
from mot_jax.config import (
    CompanionsConfig,
    FeedForwardConfig,
    ModelConfig,
    ThresholdConfig,
    attention_error,
    kernel_runs_on,
    without_kernel,
)
from mot_jax.cost.layers import SHAPES, Shape
from mot_jax.errors import UserError, error_words
from mot_jax.nn.attention import Attention
from mot_jax.nn.feed_forward.companions import Summary
from mot_jax.nn.kernels import fused_attention

Row = dict[str, Any]
Forward = Callable[[Variables, jax.Array], jax.Array]
Create = Callable[[str], tuple[Forward, Variables]]
SHAPE = Shape("numerics", 128, 512, 16, 32, 32, 32)
ATTENTION_SIZE = (4, 128)  # sequences, tokens
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


def attention_to_check(fused: str | None) -> dict[str, ModelConfig]:
    """Attention with every mask, by XLA and by the kernel `fused`."""
    base = ModelConfig(d_model=256, num_heads=4, context_length=ATTENTION_SIZE[1])
    masks = {
        "causal": base,
        "causal, documents": dataclasses.replace(base, document_mask=True),
        "bidirectional, padding": dataclasses.replace(base, objective="masked"),
    }
    return {
        f"attention, {kernel}, {mask}": dataclasses.replace(config, attention_kernel=kernel)
        for kernel in ("xla", *([fused] if fused else ()))
        for mask, config in masks.items()
    }


def checks(small: bool) -> dict[tuple[str, str], Callable[[], Row]]:
    """Functions that compute a row, by (kind, dtype).

    Rows: kind, dtype; y_error; gradient_error, the largest of those of x and the parameters, None for a kind that does
    not train; tolerance and gradient_tolerance; ok.
    """
    shape = SHAPES["tiny"] if small else SHAPE
    fused = {"gpu": "cudnn", "tpu": "splash"}.get(fused_attention.platform())
    table: dict[tuple[str, str], Callable[[], Row]] = {}
    for dtype in TOLERANCES:
        for kind, config in configs_to_check(shape, jax.devices()[0]).items():
            create, exact = partial(_layer, shape, config), partial(_layer, shape, without_kernel(config))
            size = (shape.sequences, shape.length, shape.d_model)
            trains = not isinstance(config, (CompanionsConfig, ThresholdConfig))
            table[kind, dtype] = partial(_row, kind, dtype, create, exact, size, trains)
        for kind, model in attention_to_check(fused).items():
            head_dim = model.d_model // model.num_heads
            if attention_error(model.attention_kernel, model.context_length, head_dim, dtype) is None:
                create = partial(_attention, model)
                exact = partial(_attention, dataclasses.replace(model, attention_kernel="xla"))
                table[kind, dtype] = partial(_row, kind, dtype, create, exact, (*ATTENTION_SIZE, model.d_model), True)
    return table


def bench_numerics(small: bool, progress: Callable[[str], None]) -> list[Row]:
    """Compute a row for each of `checks`; that of a check that fails has kind, dtype, the reason, and ok = False.

    Raises UserError if JAX has no CPU device next to the accelerator.
    """
    _cpu()
    rows = []
    for (kind, dtype), check in checks(small).items():
        progress(f"numerics: {kind}, {dtype}")
        try:
            rows.append(check())
        except Exception as error:  # the others may still succeed
            progress(traceback.format_exc())
            rows.append({"kind": kind, "dtype": dtype, "reason": error_words(error), "ok": False})
    return rows


def _cpu() -> jax.Device:
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        raise UserError("JAX_PLATFORMS: must include a CPU device for the reference; try cuda,cpu") from None


def _row(kind: str, dtype: str, create: Create, exact: Create, size: tuple[int, ...], trains: bool) -> Row:
    tolerance, gradient_tolerance = TOLERANCES[dtype]
    y_error, *gradient_errors = _errors(create, exact, size, trains, dtype)
    gradient_error = max(gradient_errors) if gradient_errors else None
    row: Row = {"kind": kind, "dtype": dtype, "y_error": y_error, "tolerance": tolerance}
    row |= {"gradient_error": gradient_error, "gradient_tolerance": gradient_tolerance}
    return {**row, "ok": y_error <= tolerance and (gradient_error or 0.0) <= gradient_tolerance}


def _errors(create: Create, exact: Create, size: tuple[int, ...], trains: bool, dtype: str) -> list[float]:
    """Relative errors of y and, for kinds that train, of the gradients of the parameters and of x.

    create, exact: the layer for a dtype, as it is computed on the accelerator and in the reference.
    """
    cpu, generator = _cpu(), np.random.default_rng(0)
    with jax.default_device(cpu):
        forward, variables = create(dtype)
        params, router = jax.tree.map(np.asarray, variables)
        inputs = [np.asarray(jnp.asarray(generator.standard_normal(size), dtype)) for _ in range(2)]
    with jax.default_matmul_precision("highest"):
        x, dy = map(jnp.asarray, inputs)
        results = [np.asarray(leaf, np.float64) for leaf in _outputs(forward, (params, router), x, dy, trains)]
    with jax.enable_x64(True), jax.default_device(cpu):
        exact_forward, (exact_params, _) = exact("float64")
        *exact_values, x, dy = (jnp.asarray(value.astype(np.float64)) for value in (*jax.tree.leaves(params), *inputs))
        exact_params = jax.tree.unflatten(jax.tree.structure(exact_params), exact_values)
        references = [np.asarray(leaf) for leaf in _outputs(exact_forward, (exact_params, router), x, dy, trains)]
    pairs = zip(results, references, strict=True)
    return [float(np.linalg.norm(a - b)) / float(np.linalg.norm(b)) for a, b in pairs]


def _layer(shape: Shape, config: FeedForwardConfig, dtype: str) -> tuple[Forward, Variables]:
    layer = create_layer(shape, config, activation="gelu", dtype=dtype)
    for name, value in vars(layer).items():
        if isinstance(value, Summary):  # initialized to zero
            value[...] = jax.random.normal(jax.random.key(len(name)), value.shape).astype(value.dtype)
    return as_function(layer)[:2]


def _attention(config: ModelConfig, dtype: str) -> tuple[Forward, Variables]:
    """Attention for x [B, S, D]. Documents have S / 4 tokens; the padding of sequence b is its last b tokens."""
    typed: Any = dtype  # float64, of the reference, is no dtype of a config
    graph, params = nnx.split(Attention(dataclasses.replace(config, dtype=typed), rngs=nnx.Rngs(params=0)))

    def forward(variables: Variables, x: jax.Array) -> jax.Array:
        rows, positions = (jnp.arange(n, dtype=jnp.int32) for n in x.shape[:2])
        segments = jnp.broadcast_to(positions // (x.shape[1] // 4), x.shape[:2]) if config.document_mask else None
        token_mask = positions < x.shape[1] - rows[:, None]
        y = nnx.merge(graph, variables[0])(x, None if config.objective == "causal" else token_mask, segments)
        return y if config.objective == "causal" else jnp.where(token_mask[..., None], y, 0)

    return forward, (params, ())


def _outputs(forward: Forward, variables: Variables, x: jax.Array, dy: jax.Array, trains: bool) -> list[jax.Array]:
    """y, and for kinds that train the gradients of the parameters and of x."""
    if not trains:
        return jax.tree.leaves(jax.jit(forward)(variables, x))
    return jax.tree.leaves(jax.jit(forward_and_backward(forward))(variables, x, dy))


COLUMNS: list[Column] = [
    ("kind", lambda row: row["kind"]),
    ("dtype", lambda row: row["dtype"]),
    ("error of y", partial(number, "y_error", 1, ".1e")),
    ("tolerance", partial(number, "tolerance", 1, ".0e")),
    ("error of gradients", partial(number, "gradient_error", 1, ".1e")),
    ("gradient tolerance", partial(number, "gradient_tolerance", 1, ".0e")),
    ("", lambda row: row.get("reason") or ("ok" if row["ok"] else "WRONG")),
]
