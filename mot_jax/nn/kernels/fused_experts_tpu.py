"""Wide experts as Pallas kernels for TPU: neither pre-activations nor their cotangents reach HBM.

Two kernels run the experts, forward and backward (letters as in `mixing.py`; T = N S, all that an expert reads). One
expert at a time, a block of its width F at a time: inputs, outputs and their cotangents, [T, D] each, stay in a core's
memory while the weights come by, are read once as they are stored, and their gradients are written once. Backward makes
the pre-activations again: 7 products for 6.

Before and after them the passes of `tiles_tpu.py` read tokens as they lie and write mixtures experts first, and the
other way round. For experts of about the dense width, which `fused_mixture_tpu.py` has no room for.
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

from mot_jax.errors import UserError
from mot_jax.nn.kernels.pallas_tpu import TILE, VMEM_BYTES, Activation, Plan, dot, on_each
from mot_jax.nn.kernels.tiles_tpu import by_tiles, each, emit, from_tiles, merge, mixing_backward, passes_bytes
from mot_jax.nn.sharding import axes_of, replicate, reshard

LANES = 128
ROWS = 256  # of an expert's input that are multiplied at a time


@functools.cache
def plan(kernel: str, e: int, t: int, d: int, f: int, dtype: str, weight_dtype: str, gradient_dtype: str) -> Plan:
    """The blocks of `forward` or `backward`: the widest part of F that fits.

    dtype: of activations; weight_dtype: of the experts' weights as they come by; gradient_dtype: of their gradients.
    Raises UserError where none does: inputs of one expert fill a core's memory.
    """
    widths = [w for w in range(LANES, f, LANES) if f % w == 0]
    for width in [f, *reversed(widths)]:
        found = _plan(kernel, e, t, d, f, dtype, weight_dtype, gradient_dtype, width)
        values = (2 if kernel == "forward" else 6) * 4 * min(t, ROWS) * width  # pre-activations and what comes of them
        if found.vmem_bytes + values <= VMEM_BYTES * 3 // 4:  # the compiler wants the rest
            return found
    words = f"{t} mixtures of d_model = {d} for each expert are too much for a core's memory"
    raise UserError(f"kernel = 'fused_experts': {words}; try fewer rows a device, or kernel = 'xla'")


def _plan(kernel: str, e: int, t: int, d: int, f: int, dtype, weight_dtype, gradient_dtype, width: int) -> Plan:
    tokens = (pl.BlockSpec((1, t, d), lambda i, j: (i, 0, 0)), jnp.dtype(dtype))
    w_in = pl.BlockSpec((1, d, width), lambda i, j: (i, 0, j))
    w_out = pl.BlockSpec((1, width, d), lambda i, j: (i, j, 0))
    weights, gradients = ([(w, jnp.dtype(to)) for w in (w_in, w_out)] for to in (weight_dtype, gradient_dtype))
    sums = pltpu.VMEM((t, d), jnp.float32)
    grid = (e, f // width)
    if kernel == "forward":
        return Plan(grid, [tokens, *weights], [tokens], [sums])
    parts = [pltpu.VMEM((d, width), jnp.float32), pltpu.VMEM((width, d), jnp.float32)]
    return Plan(grid, [tokens, tokens, *weights], [tokens, *gradients], [sums, *parts])


def _by_rows(t: int, body: Callable[[Any], None]) -> None:
    rows = next(r for r in range(min(t, ROWS) // TILE * TILE, 0, -TILE) if t % r == 0)  # whole tiles
    each(t // rows, lambda i: body(pl.ds(i * rows, rows)))


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


def _call(kernel: str, activation: Activation, gradient_dtype: Any, *arrays: jax.Array) -> list[jax.Array]:
    """u, or u and do, [E, T, D]; w_in; w_out -> o, or the gradients of u, w_in and w_out."""
    u, w_in = arrays[0], arrays[-2]
    found = plan(kernel, *u.shape, w_in.shape[-1], u.dtype.name, w_in.dtype.name, jnp.dtype(gradient_dtype).name)
    shapes = [a.shape for a in ([u] if kernel == "forward" else [u, *arrays[-2:]])]
    body = functools.partial(_KERNELS[kernel], activation)
    return found.run(body, f"experts_{kernel}", ("parallel", "arbitrary"), shapes, *arrays)


def layer_bytes(n: int, g: int, s: int, e: int, d: int, f: int, dtype: str, param_dtype: str) -> int:
    """What all kernels move of one layer, forward and backward."""
    of_experts = (plan(kernel, e, n * s, d, f, dtype, param_dtype, param_dtype).bytes for kernel in _KERNELS)
    return sum(of_experts) + passes_bytes(n, g, s, e, d, dtype)


# --- the function -----------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mix_through(
    activation: Activation, x: jax.Array, weights: jax.Array, w_in: jax.Array, w_out: jax.Array
) -> jax.Array:
    """`mixing.mix_through` for experts act(u w_in) w_out that emit by the merge weights; interpreted where no TPU is.

    Mixtures and expert outputs are kept for the backward pass. Under a mesh each device has its groups or positions,
    and for their time all experts' weights.

    Args:
        activation: of pre-activations in float32, element by element; JAX knows it by identity.
        x: [N, G, S, D], S a multiple of 8 (on each device).
        weights: [N, G, S, E], used in x's dtype, as in `mixing.merge`.
        w_in, w_out: [E, D, F], [E, F, D].

    Returns:
        The update [N, G, S, D] in x's dtype. Products are of x's dtype and add up in float32.
    """
    return _forward(activation, x, weights, w_in, w_out)[0]


def _forward(activation, x, weights, w_in, w_out):
    chex.assert_rank([x, weights], 4, custom_message="x is [N, G, S, D], weights are [N, G, S, E]")

    def local(axes, x, weights, w_in, w_out):
        tiles = by_tiles(weights)
        u = merge(x, tiles)
        (o,) = _call("forward", activation, w_in.dtype, _rows_of(u), w_in, w_out)
        o = o.reshape(u.shape)
        return emit(o, tiles), u, o

    y, u, o = on_each(local, "ngsd ngse - -", "ngsd ensd ensd", x, weights.astype(x.dtype), *_whole(x, w_in, w_out))
    return y, (x, weights, u, o, w_in, w_out)


def _backward(activation, kept, dy):
    x, weights, u, o, w_in, w_out = kept

    def local(axes, x, dy, weights, u, o, *experts):
        tiles = by_tiles(weights)
        do = merge(dy, tiles)  # emit's transpose
        du, *found = _call("backward", activation, w_in.dtype, _rows_of(u), _rows_of(do), *experts)
        dx, d_tiles = mixing_backward(x, dy, o, du.reshape(u.shape), tiles)
        return dx, from_tiles(d_tiles), *(jax.lax.psum(found, axes) if axes else found)

    arrays = (x, dy, weights.astype(x.dtype), u, o, *_whole(x, w_in, w_out))
    dx, d_weights, *found = on_each(local, "ngsd ngsd ngse ensd ensd - -", "ngsd ngse - -", *arrays)
    dw_in, dw_out = (reshard(dw, *axes_of(w)) for dw, w in zip(found, (w_in, w_out), strict=True))
    return dx, d_weights.astype(weights.dtype), dw_in, dw_out


mix_through.defvjp(_forward, _backward)


def _rows_of(u: jax.Array) -> jax.Array:
    """[E, N, S, D] -> [E, T, D]."""
    return u.reshape(u.shape[0], -1, u.shape[-1])


def _whole(x: jax.Array, *weights: jax.Array) -> list[jax.Array]:
    """As they are stored; but what `fsdp` has cut travels in x's dtype."""
    return [replicate(w.astype(x.dtype)) if any(axes_of(w)) else w for w in weights]
