"""The experts as Pallas kernels for TPU: neither pre-activations nor their cotangents reach HBM.

Two kernels, forward and backward (letters as in `mixing.py`; T = N S, all that an expert reads). One expert at a time,
a block of its width F at a time: inputs, outputs and their cotangents, [T, D] each, stay in a core's memory while the
weights come by, are read once as they are stored, and their gradients are written once. Backward makes the
pre-activations again: 7 products for 6. Merge and emit are XLA's.

For experts of about the dense width, which `mosaic_mixing.py` has no room for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from mot_jax import mixing
from mot_jax.config import ConfigError
from mot_jax.kernels.mosaic import TILE, VMEM_BYTES, Activation, Plan, dot
from mot_jax.sharding import axes_of, reshard, spec, whole

LANES = 128
ROWS = 256  # of an expert's input that are multiplied at a time


@functools.cache
def plan(kernel: str, e: int, t: int, d: int, f: int, dtype: str, param_dtype: str) -> Plan:
    """The blocks of `forward` or `backward`: the widest part of F that fits.

    Raises ConfigError where none does: inputs of one expert fill a core's memory.
    """
    widths = [w for w in range(LANES, f, LANES) if f % w == 0]
    for width in [f, *reversed(widths)]:
        found = _plan(kernel, e, t, d, f, jnp.dtype(dtype), jnp.dtype(param_dtype), width)
        if found.vmem_bytes <= VMEM_BYTES * 3 // 4:  # the compiler wants the rest for products of `ROWS` rows
            return found
    words = f"{t} mixtures of d_model = {d} for each expert are too much for a core's memory"
    raise ConfigError(f"kernel = 'pallas_experts': {words}; try fewer rows a device, or kernel = 'xla'")


def _plan(kernel: str, e: int, t: int, d: int, f: int, dtype: Any, param_dtype: Any, width: int) -> Plan:
    tokens = (pl.BlockSpec((1, t, d), lambda i, j: (i, 0, 0)), dtype)
    w_in = (pl.BlockSpec((1, d, width), lambda i, j: (i, 0, j)), param_dtype)
    w_out = (pl.BlockSpec((1, width, d), lambda i, j: (i, j, 0)), param_dtype)
    sums = pltpu.VMEM((t, d), jnp.float32)
    grid = (e, f // width)
    if kernel == "forward":
        return Plan(grid, [tokens, w_in, w_out], [tokens], [sums])
    gradients = [pltpu.VMEM((d, width), jnp.float32), pltpu.VMEM((width, d), jnp.float32)]
    return Plan(grid, [tokens, tokens, w_in, w_out], [tokens, w_in, w_out], [sums, *gradients])


def _by_rows(t: int, body: Callable[[Any], None]) -> None:
    rows = next(r for r in range(min(t, ROWS) // TILE * TILE, 0, -TILE) if t % r == 0)  # whole tiles

    def turn(i, nothing):
        body(pl.ds(i * rows, rows))
        return nothing

    jax.lax.fori_loop(0, t // rows, turn, None)


def _sum_up(sums, out) -> tuple[Callable[[], None], Callable[[], None]]:
    """Before and after the parts of F: zeros, and the sum into its place."""

    def begin():
        sums[...] = jnp.zeros_like(sums)

    def end():
        out[0] = sums[...].astype(out.dtype)

    return begin, end


def _forward_kernel(activation, u, w_in, w_out, o, sums):
    begin, end = _sum_up(sums, o)
    pl.when(pl.program_id(1) == 0)(begin)
    first, second = (w[0].astype(u.dtype) for w in (w_in, w_out))

    def some(rows):
        hidden = activation(dot(u[0, rows], first))
        sums[rows] += dot(hidden.astype(u.dtype), second)

    _by_rows(sums.shape[0], some)
    pl.when(pl.program_id(1) == pl.num_programs(1) - 1)(end)


def _backward_kernel(activation, u, do, w_in, w_out, du, dw_in, dw_out, sums, sum_in, sum_out):
    begin, end = _sum_up(sums, du)
    pl.when(pl.program_id(1) == 0)(begin)
    (begin_in, end_in), (begin_out, end_out) = _sum_up(sum_in, dw_in), _sum_up(sum_out, dw_out)
    begin_in()
    begin_out()
    first, second = (w[0].astype(u.dtype) for w in (w_in, w_out))

    def some(rows):
        hidden, pull = jax.vjp(activation, dot(u[0, rows], first))
        (dh,) = pull(dot(do[0, rows], second, (1, 1)))
        dh = dh.astype(u.dtype)
        sums[rows] += dot(dh, first, (1, 1))
        sum_in[...] += dot(u[0, rows], dh, (0, 0))
        sum_out[...] += dot(hidden.astype(u.dtype), do[0, rows], (0, 0))

    _by_rows(sums.shape[0], some)
    end_in()
    end_out()
    pl.when(pl.program_id(1) == pl.num_programs(1) - 1)(end)


_KERNELS: dict[str, Callable[..., None]] = {"forward": _forward_kernel, "backward": _backward_kernel}


def _call(kernel: str, activation: Activation, *arrays: jax.Array) -> list[jax.Array]:
    """u, or u and do, [E, T, D]; w_in; w_out -> o, or the gradients of u, w_in and w_out."""
    u, w_in = arrays[0], arrays[-2]
    found = plan(kernel, *u.shape, w_in.shape[-1], u.dtype.name, w_in.dtype.name)
    shapes = [a.shape for a in ([u] if kernel == "forward" else [u, *arrays[-2:]])]
    body = functools.partial(_KERNELS[kernel], activation)
    return found.run(body, f"experts_{kernel}", ("parallel", "arbitrary"), shapes, *arrays)


def layer_bytes(e: int, t: int, d: int, f: int, dtype: str, param_dtype: str) -> int:
    """What the two kernels move of one layer, forward and backward."""
    return sum(plan(kernel, e, t, d, f, dtype, param_dtype).bytes for kernel in _KERNELS)


# --- the function -----------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def experts(activation: Activation, u: jax.Array, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
    """act(u w_in) w_out of each expert; interpreted where no TPU is. Keeps its arguments for the backward pass.

    Under a mesh each device has its groups or positions, and for their time all experts' weights.

    Args:
        activation: of pre-activations in float32, element by element; JAX knows it by identity.
        u: [E, N, S, D], S a multiple of 8 (on each device).
        w_in, w_out: [E, D, F], [E, F, D].

    Returns:
        [E, N, S, D] in u's dtype. Products are of u's dtype and add up in float32.
    """
    return _forward(activation, u, w_in, w_out)[0]


def _forward(activation, u, w_in, w_out):
    chex.assert_rank([u, w_in, w_out], [4, 3, 3], custom_message="u is [E, N, S, D], weights are [E, D, F], [E, F, D]")

    def local(u, w_in, w_out):
        return _call("forward", activation, _rows_of(u), w_in, w_out)[0].reshape(u.shape)

    places = spec(*axes_of(u))
    o = _on_each(local, places, places and (places, PartitionSpec(), PartitionSpec()), u, *_gathered(u, w_in, w_out))
    return o, (u, w_in, w_out)


def _backward(activation, kept, do):
    u, *weights = kept
    axes = tuple(axis for found in axes_of(u) for axis in found)

    def local(u, do, w_in, w_out):
        du, *found = _call("backward", activation, _rows_of(u), _rows_of(do), w_in, w_out)
        return du.reshape(u.shape), *(jax.lax.psum(found, axes) if axes else found)

    places, one = spec(*axes_of(u)), PartitionSpec()
    do = reshard(do, *axes_of(u))
    inputs, outputs = (places, places, one, one), (places, one, one)
    du, *found = _on_each(local, places and outputs, places and inputs, u, do, *_gathered(u, *weights))
    dw_in, dw_out = (reshard(dw.astype(w.dtype), *axes_of(w)) for dw, w in zip(found, weights, strict=True))
    return du, dw_in, dw_out


experts.defvjp(_forward, _backward)


def mix_through(
    activation: Activation, x: jax.Array, weights: jax.Array, w_in: jax.Array, w_out: jax.Array
) -> jax.Array:
    """`mixing.mix_through` with these experts: x [N, G, S, D], weights [N, G, S, E] -> [N, G, S, D].

    Mixtures and expert outputs are kept for the backward pass.
    """
    u = jnp.moveaxis(mixing.merge(weights, x), 2, 0)
    return mixing.emit(weights, jnp.moveaxis(experts(activation, u, w_in, w_out), 0, 2))


def _rows_of(u: jax.Array) -> jax.Array:
    return u.reshape(u.shape[0], -1, u.shape[-1])


def _gathered(u: jax.Array, *weights: jax.Array) -> list[jax.Array]:
    """As they are stored, unless `fsdp` has cut them."""
    return [whole(w.astype(u.dtype)) if any(axes_of(w)) else w for w in weights]


def _on_each(local: Callable[..., Any], outputs: Any, inputs: Any, *arrays: jax.Array) -> Any:
    """`local` on each device, if there are several."""
    if outputs is None:
        return local(*arrays)
    return jax.shard_map(local, in_specs=inputs, out_specs=outputs, check_vma=False)(*arrays)
