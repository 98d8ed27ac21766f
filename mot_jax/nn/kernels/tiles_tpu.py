"""Merge and emit on TPU: what their kernels are made of, and as kernels of their own, passes over the activations.

A mixture contracts over G, too few for a matrix unit. So eight positions, one tile of rows, are merged in one product,
with a matrix that is zero between different positions (letters as in `mixing.py`):

    mixtures [(e, s), D] = spread [(e, s), (g, s')] x [(g, s'), D],   spread = weights where s = s', else 0

Eight times the FLOPs of a merge, but an expert's rows are whole tiles: they are picked and put, never moved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mot_jax.errors import UserError
from mot_jax.nn.kernels.pallas_tpu import TILE, VMEM_BYTES, Plan, dot

MOST_POSITIONS = 64  # of a block: more move no fewer bytes


# --- within a kernel --------------------------------------------------------------------------------------------------


def rows(ref: Any, q: Any) -> jax.Array:
    """Eight positions of a block [K, P, D], the q-th eight, as rows [(k, s), D]."""
    tile = ref[:, pl.ds(q * TILE, TILE), :]
    return tile.astype(jnp.float32).reshape(-1, tile.shape[-1]).astype(tile.dtype)


def put(ref: Any, q: Any, values: jax.Array) -> None:
    """`rows` the other way: values [(k, s), D] into the block, in its dtype."""
    ref[:, pl.ds(q * TILE, TILE), :] = values.reshape(-1, TILE, values.shape[-1]).astype(ref.dtype)


def spread(weights: jax.Array, dtype: Any) -> jax.Array:
    """[k, (g, s)] -> [(e, s), (g, s')], zero between different positions."""
    k, lanes = weights.shape
    found = jnp.where(_same(lanes)[None], weights.astype(jnp.float32)[:, None, :], 0.0)
    return found.reshape(k * TILE, lanes).astype(dtype)


def gather(products: jax.Array) -> jax.Array:
    """`spread`'s transpose: [(e, s), (g, s')] -> [k, (g, s)]."""
    products = products.reshape(-1, TILE, products.shape[-1])
    return jnp.where(_same(products.shape[-1])[None], products, 0.0).sum(axis=1)


def _same(lanes: int) -> jax.Array:
    """[8, (g, s')]: whether s = s'."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (TILE, lanes), axis) for axis in (0, 1))
    return row == column % TILE


def each(count: int, body: Callable[[Any], object]) -> None:
    """body(0), body(1), ..."""

    def turn(i, nothing):
        body(i)
        return nothing

    jax.lax.fori_loop(0, count, turn, None)


# --- around a kernel --------------------------------------------------------------------------------------------------


def by_tiles(weights: jax.Array) -> jax.Array:
    """[N, G, S, E] -> [N, S / 8, E, (G, 8)]: what eight positions need of each expert, as full lanes."""
    n, g, s, e = weights.shape
    return weights.reshape(n, g, s // TILE, TILE, e).transpose(0, 2, 4, 1, 3).reshape(n, s // TILE, e, g * TILE)


def from_tiles(tiles: jax.Array) -> jax.Array:
    """`by_tiles` the other way."""
    n, parts, e, lanes = tiles.shape
    tiles = tiles.reshape(n, parts, e, lanes // TILE, TILE)
    return tiles.transpose(0, 3, 1, 4, 2).reshape(n, lanes // TILE, parts * TILE, e)


# --- passes -----------------------------------------------------------------------------------------------------------


@functools.cache
def plan(kernel: str, n: int, g: int, s: int, e: int, d: int, dtype: str) -> Plan:
    """The blocks of `merge`, `emit` or `mixing_backward`: as many positions as fit. S is a multiple of 8.

    Raises UserError where eight do not fit.
    """
    for p in range(min(s, MOST_POSITIONS), 0, -TILE):
        found = _plan(kernel, n, g, s, e, d, jnp.dtype(dtype), p)
        if s % p == 0 and found.vmem_bytes <= VMEM_BYTES // 2:  # the compiler wants the rest for products
            return found
    words = f"{e} mixtures of {g} tokens of d_model = {d}, at eight positions, are too much for a core's memory"
    raise UserError(f"kernel = 'fused_experts': {words}; try kernel = 'xla'")


def _plan(kernel: str, n: int, g: int, s: int, e: int, d: int, dtype: Any, p: int) -> Plan:
    tokens = (pl.BlockSpec((None, g, p, d), lambda i, t: (i, 0, t, 0)), dtype)
    mixtures = (pl.BlockSpec((e, None, p, d), lambda i, t: (0, i, t, 0)), dtype)
    weights = pl.BlockSpec((None, p // TILE, e, g * TILE), lambda i, t: (i, t, 0, 0))
    used, gradient = (weights, dtype), (weights, jnp.dtype(jnp.float32))
    inputs, outputs = {
        "merge": ([tokens, used], [mixtures]),
        "emit": ([mixtures, used], [tokens]),
        "mixing_backward": ([tokens, tokens, mixtures, mixtures, used], [tokens, gradient]),
    }[kernel]
    return Plan((n, s // p), inputs, outputs, [])


def _merge_kernel(x, weights, u):
    each(weights.shape[0], lambda q: put(u, q, dot(spread(weights[q], x.dtype), rows(x, q))))


def _emit_kernel(o, weights, y):
    each(weights.shape[0], lambda q: put(y, q, dot(spread(weights[q], o.dtype), rows(o, q), (0, 0))))


def _backward_kernel(x, dy, o, du, weights, dx, d_weights):
    def tile(q):
        cotangents = rows(du, q)
        put(dx, q, dot(spread(weights[q], x.dtype), cotangents, (0, 0)))
        found = dot(cotangents, rows(x, q), (1, 1)) + dot(rows(o, q), rows(dy, q), (1, 1))
        d_weights[q] = gather(found)

    each(weights.shape[0], tile)


_KERNELS: dict[str, Callable[..., None]] = {
    "merge": _merge_kernel,
    "emit": _emit_kernel,
    "mixing_backward": _backward_kernel,
}


def _call(kernel: str, shapes: list[tuple[int, ...]], *arrays: jax.Array) -> list[jax.Array]:
    (n, parts, e, lanes), first = arrays[-1].shape, arrays[0]
    found = plan(kernel, n, lanes // TILE, parts * TILE, e, first.shape[-1], first.dtype.name)
    return found.run(_KERNELS[kernel], kernel, ("parallel", "parallel"), shapes, *arrays)


def merge(x: jax.Array, tiles: jax.Array) -> jax.Array:
    """`mixing.merge`, experts first: x [N, G, S, D], weights by tiles in x's dtype -> mixtures [E, N, S, D]."""
    n, _, s, d = x.shape
    return _call("merge", [(tiles.shape[2], n, s, d)], x, tiles)[0]


def emit(o: jax.Array, tiles: jax.Array) -> jax.Array:
    """`mixing.emit`, experts first: expert outputs o [E, N, S, D], weights by tiles in o's dtype -> [N, G, S, D]."""
    _, n, s, d = o.shape
    return _call("emit", [(n, tiles.shape[3] // TILE, s, d)], o, tiles)[0]


def mixing_backward(
    x: jax.Array, dy: jax.Array, o: jax.Array, du: jax.Array, tiles: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of x (by the mixtures' cotangents du) and of the weights (by both uses): [N, G, S, D], tiles.

    x, dy [N, G, S, D]; o, du [E, N, S, D]. All are read once. The weights' gradient is in float32.
    """
    dx, d_tiles = _call("mixing_backward", [x.shape, tiles.shape], x, dy, o, du, tiles)
    return dx, d_tiles


def passes_bytes(n: int, g: int, s: int, e: int, d: int, dtype: str) -> int:
    """What the passes move of one layer, forward (merge, emit) and backward (merge of dy, the gradients)."""
    return sum(plan(kernel, n, g, s, e, d, dtype).bytes for kernel in ("merge", "emit", "merge", "mixing_backward"))
