"""Merge, experts and emit as Pallas kernels for TPU: neither mixtures nor expert outputs reach HBM.

Three kernels (letters as in `mixing.py`; P positions and a block of k experts at a time):

    forward    for each block of positions, over the blocks of experts: mixtures, both products, emit into y
    backward   the same for dx and the gradient of the mixing weights
    gradients  for each block of experts, over all positions: the gradients of w_in and w_out

What a kernel needs of the forward pass it makes again; nothing but x and the weights is kept.

Eight positions are merged in one product, at eight times the FLOPs: see `tiles_tpu.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mot_jax.errors import UserError
from mot_jax.nn.kernels.pallas_tpu import TILE, VMEM_BYTES, Activation, Plan, dot, on_each
from mot_jax.nn.kernels.tiles_tpu import by_tiles, each, from_tiles, gather, put, rows, spread
from mot_jax.nn.sharding import axes_of, replicate, reshard

ROWS = 64  # positions, the fewest that an expert reads at a time, for the matrix unit's sake


@functools.cache
def plan(kernel: str, n: int, g: int, s: int, e: int, d: int, f: int, dtype: str) -> Plan:
    """The blocks of `forward`, `backward` or `gradients` that fit and move the fewest bytes.

    S and E are multiples of 8. Raises UserError where none fits, as with experts of the dense width.
    """
    positions = [p for p in range(TILE, s + 1, TILE) if s % p == 0 and p >= min(ROWS, s)]
    sizes = [(p, k) for p in positions for k in range(TILE, e + 1, TILE) if e % k == 0]
    plans = (_plan(kernel, n, g, s, e, d, f, jnp.dtype(dtype), p, k) for p, k in sizes)
    fitting = [found for found in plans if found.vmem_bytes <= VMEM_BYTES - 2**22]  # what the compiler wants for itself
    if not fitting:
        words = f"eight experts of d_model = {d} and width {f}, and {min(ROWS, s)} positions of {g} rows"
        raise UserError(f"kernel = 'fused_mixture': {words} are too much for a core's memory; try kernel = 'xla'")
    return min(fitting, key=lambda found: found.bytes)


def _plan(kernel: str, n, g, s, e, d, f, dtype, p: int, k: int) -> Plan:
    once = pl.Buffered(1)
    wide = jnp.dtype(jnp.float32)
    by_experts = kernel == "gradients"
    grid = (e // k, n, s // p) if by_experts else (n, s // p, e // k)

    def block(shape, index, mode=None):
        place = (lambda j, i, t: index(i, t, j)) if by_experts else index
        return pl.BlockSpec(shape, place, pipeline_mode=mode)

    # What stays for the inner loop is not fetched ahead.
    tokens = (block((None, g, p, d), lambda i, t, j: (i, 0, t, 0), None if by_experts else once), dtype)
    weights = (block((None, p // TILE, k, g * TILE), lambda i, t, j: (i, t, j, 0)), dtype)
    experts = [
        (block(shape, lambda i, t, j: (j, 0, 0), once if by_experts else None), dtype)
        for shape in ((k, d, f), (k, f, d))
    ]
    mixtures = pltpu.VMEM((p // TILE, k, TILE, d), wide)
    sums = pltpu.VMEM((p // TILE, g * TILE, d), wide)
    if kernel == "forward":
        return Plan(grid, [tokens, weights, *experts], [tokens], [mixtures, sums])
    inputs = [tokens, tokens, weights, *experts]
    if by_experts:
        return Plan(grid, inputs, [(spec, wide) for spec, _ in experts], [mixtures, mixtures])
    return Plan(grid, inputs, [tokens, weights], [mixtures, mixtures, sums])


# --- the kernels ------------------------------------------------------------------------------------------------------


def _merge(weights, tokens, mixtures) -> None:
    def tile(q):
        x = rows(tokens, q)
        mixtures[q] = dot(spread(weights[q], x.dtype), x).reshape(mixtures.shape[1:])

    each(mixtures.shape[0], tile)


def _rows(mixtures, i, dtype) -> jax.Array:
    """What expert i reads: [P, D]."""
    return mixtures[:, i].reshape(-1, mixtures.shape[-1]).astype(dtype)


def _put(mixtures, i, rows: jax.Array) -> None:
    mixtures[:, i] = rows.reshape(mixtures.shape[0], TILE, mixtures.shape[-1])


def _emit(weights, mixtures, sums, q, dtype) -> jax.Array:
    outputs = mixtures[q].reshape(-1, mixtures.shape[-1]).astype(dtype)
    sums[q] += dot(spread(weights[q], dtype), outputs, (0, 0))
    return outputs


def _finish(sums, out) -> None:
    each(sums.shape[0], lambda q: put(out, q, sums[q]))


def _begin(sums) -> None:
    sums[...] = jnp.zeros_like(sums)


def _forward_kernel(activation, x, weights, w_in, w_out, y, mixtures, sums):
    pl.when(pl.program_id(2) == 0)(lambda: _begin(sums))
    _merge(weights, x, mixtures)

    def expert(i):
        h = dot(_rows(mixtures, i, x.dtype), w_in[i])
        _put(mixtures, i, dot(activation(h).astype(x.dtype), w_out[i]))

    each(w_in.shape[0], expert)
    each(sums.shape[0], lambda q: _emit(weights, mixtures, sums, q, x.dtype))
    pl.when(pl.program_id(2) == pl.num_programs(2) - 1)(lambda: _finish(sums, y))


def _backward_kernel(activation, x, dy, weights, w_in, w_out, dx, d_weights, mixtures, cotangents, sums):
    pl.when(pl.program_id(2) == 0)(lambda: _begin(sums))
    _merge(weights, x, mixtures)
    _merge(weights, dy, cotangents)

    def expert(i):
        h = dot(_rows(mixtures, i, x.dtype), w_in[i])
        hidden, pull = jax.vjp(activation, h)
        (dh,) = pull(dot(_rows(cotangents, i, x.dtype), w_out[i], (1, 1)))
        _put(mixtures, i, dot(dh.astype(x.dtype), w_in[i], (1, 1)))
        _put(cotangents, i, dot(hidden.astype(x.dtype), w_out[i]))

    each(w_in.shape[0], expert)

    def tile(q):
        du = _emit(weights, mixtures, sums, q, x.dtype)
        o = cotangents[q].reshape(du.shape).astype(x.dtype)
        found = dot(du, rows(x, q), (1, 1)) + dot(o, rows(dy, q), (1, 1))
        d_weights[q] = gather(found).astype(x.dtype)

    each(sums.shape[0], tile)
    pl.when(pl.program_id(2) == pl.num_programs(2) - 1)(lambda: _finish(sums, dx))


def _gradients_kernel(activation, x, dy, weights, w_in, w_out, dw_in, dw_out, mixtures, cotangents):
    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        _begin(dw_in)
        _begin(dw_out)

    _merge(weights, x, mixtures)
    _merge(weights, dy, cotangents)

    def expert(i):
        u, do = _rows(mixtures, i, x.dtype), _rows(cotangents, i, x.dtype)
        hidden, pull = jax.vjp(activation, dot(u, w_in[i]))
        (dh,) = pull(dot(do, w_out[i], (1, 1)))
        dw_in[i] += dot(u, dh.astype(x.dtype), (0, 0))
        dw_out[i] += dot(hidden.astype(x.dtype), do, (0, 0))

    each(w_in.shape[0], expert)


_KERNELS: dict[str, Callable[..., None]] = {
    "forward": _forward_kernel,
    "backward": _backward_kernel,
    "gradients": _gradients_kernel,
}


def _call(kernel: str, activation: Activation, shapes: list[tuple[int, ...]], *arrays: jax.Array) -> list[jax.Array]:
    x, w_in = arrays[0], arrays[-2]
    (n, g, s, d), (e, _, f) = x.shape, w_in.shape
    found = plan(kernel, n, g, s, e, d, f, x.dtype.name)
    semantics = ("parallel", "arbitrary" if kernel == "gradients" else "parallel", "arbitrary")
    return found.run(functools.partial(_KERNELS[kernel], activation), f"mixing_{kernel}", semantics, shapes, *arrays)


def layer_bytes(n: int, g: int, s: int, e: int, d: int, f: int, dtype: str) -> int:
    """What the three kernels move of one layer, forward and backward."""
    return sum(plan(kernel, n, g, s, e, d, f, dtype).bytes for kernel in _KERNELS)


# --- the function -----------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mix_through(
    activation: Activation, x: jax.Array, weights: jax.Array, w_in: jax.Array, w_out: jax.Array
) -> jax.Array:
    """`mixing.mix_through` for experts act(u w_in) w_out that emit by the merge weights; interpreted where no TPU is.

    Under a mesh each device has its groups or positions, and for their time all experts' weights.

    Args:
        activation: of pre-activations in float32, element by element; JAX knows it by identity.
        x: [N, G, S, D], S a multiple of 8 (on each device).
        weights: [N, G, S, E], E a multiple of 8; used in x's dtype, as in `mixing.merge`, and so is their gradient.
        w_in, w_out: [E, D, F], [E, F, D].

    Returns:
        The update [N, G, S, D] in x's dtype. Products are of x's dtype and add up in float32.
    """
    return _forward(activation, x, weights, w_in, w_out)[0]


def _forward(activation, x, weights, w_in, w_out):
    chex.assert_rank([x, weights], 4, custom_message="x is [N, G, S, D], weights are [N, G, S, E]")

    def local(axes, x, weights, w_in, w_out):
        return _call("forward", activation, [x.shape], x, by_tiles(weights), w_in, w_out)[0]

    arrays = (x, weights.astype(x.dtype), replicate(w_in.astype(x.dtype)), replicate(w_out.astype(x.dtype)))
    return on_each(local, "ngsd ngse - -", "ngsd", *arrays), (x, weights, w_in, w_out)


def _backward(activation, kept, dy):
    x, weights, w_in, w_out = kept

    def local(axes, x, dy, weights, w_in, w_out):
        tiles = by_tiles(weights)
        dx, d_tiles = _call("backward", activation, [x.shape, tiles.shape], x, dy, tiles, w_in, w_out)
        found = _call("gradients", activation, [w_in.shape, w_out.shape], x, dy, tiles, w_in, w_out)
        dw_in, dw_out = jax.lax.psum(found, axes) if axes else found
        return dx, from_tiles(d_tiles), dw_in, dw_out

    arrays = (x, dy, weights.astype(x.dtype), replicate(w_in.astype(x.dtype)), replicate(w_out.astype(x.dtype)))
    dx, d_weights, *found = on_each(local, "ngsd ngsd ngse - -", "ngsd ngse - -", *arrays)
    dw_in, dw_out = (reshard(dw.astype(w.dtype), *axes_of(w)) for dw, w in zip(found, (w_in, w_out), strict=True))
    return dx, d_weights.astype(weights.dtype), dw_in, dw_out


mix_through.defvjp(_forward, _backward)
