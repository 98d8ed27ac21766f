"""Merge and emit on TPU: the operations on tiles that all kernels use, and kernels that only merge or emit.

A mixture is a sum over the G tokens of a group: too few terms for a matrix unit, at one position. Therefore eight
positions, the sublanes of one tile, are merged by one product with a matrix that is zero between different positions
(letters as in `mixing.py`; s and s' are positions of the tile):

    mixtures [(e, s), D] = W [(e, s), (g, s')] x [(g, s'), D],   W = mixing weights where s = s', else 0

This takes eight times the FLOPs of a merge, but the rows of an expert are whole tiles, which are loaded and stored
without any relayout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mot_jax.errors import UserError
from mot_jax.nn.kernels.pallas_tpu import TILE, VMEM_BYTES, KernelBlocks, dot

MAX_POSITIONS = 64  # of a block; larger blocks move no fewer bytes


# --- inside a kernel --------------------------------------------------------------------------------------------------


def load_tile(ref: Any, q: Any) -> jax.Array:
    """Load the q-th eight positions of a block [K, P, D] as a matrix [(k, s), D]."""
    tile = ref[:, pl.ds(q * TILE, TILE), :]
    # In float32, whose tiles have eight sublanes, the reshape moves no data.
    return tile.astype(jnp.float32).reshape(-1, tile.shape[-1]).astype(tile.dtype)


def store_tile(ref: Any, q: Any, values: jax.Array) -> None:
    """Invert `load_tile`: store values [(k, s), D] in the block, in its dtype."""
    ref[:, pl.ds(q * TILE, TILE), :] = values.reshape(-1, TILE, values.shape[-1]).astype(ref.dtype)


def merge_matrix(weights: jax.Array, dtype: Any) -> jax.Array:
    """The matrix W above: weights [k, (g, s)] -> [(e, s), (g, s')], zero between different positions."""
    k, lanes = weights.shape
    matrix = jnp.where(_same_position(lanes)[None], weights.astype(jnp.float32)[:, None, :], 0.0)
    return matrix.reshape(k * TILE, lanes).astype(dtype)


def merge_matrix_gradient(gradient: jax.Array) -> jax.Array:
    """The transpose of `merge_matrix`: a gradient [(e, s), (g, s')] -> the weights' gradient [k, (g, s)]."""
    gradient = gradient.reshape(-1, TILE, gradient.shape[-1])
    return jnp.where(_same_position(gradient.shape[-1])[None], gradient, 0.0).sum(axis=1)


def _same_position(lanes: int) -> jax.Array:
    """bool [8, (g, s')]: whether s = s'."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (TILE, lanes), axis) for axis in (0, 1))
    return row == column % TILE


def for_each(count: int, body: Callable[[Any], object]) -> None:
    """Run body(0), body(1), ..., body(count - 1) in a loop of the kernel."""

    def step(i, carry):
        body(i)
        return carry

    jax.lax.fori_loop(0, count, step, None)


# --- outside of a kernel ----------------------------------------------------------------------------------------------


def to_tiles(weights: jax.Array) -> jax.Array:
    """[N, G, S, E] -> [N, S / 8, E, (G, 8)]: for each eight positions, an expert's weights along the lanes."""
    n, g, s, e = weights.shape
    return weights.reshape(n, g, s // TILE, TILE, e).transpose(0, 2, 4, 1, 3).reshape(n, s // TILE, e, g * TILE)


def from_tiles(tiles: jax.Array) -> jax.Array:
    """Invert `to_tiles`."""
    n, parts, e, lanes = tiles.shape
    tiles = tiles.reshape(n, parts, e, lanes // TILE, TILE)
    return tiles.transpose(0, 3, 1, 4, 2).reshape(n, lanes // TILE, parts * TILE, e)


# --- kernels that only merge or emit ----------------------------------------------------------------------------------


@functools.cache
def choose_pass_blocks(kernel: str, n: int, g: int, s: int, e: int, d: int, dtype: str) -> KernelBlocks:
    """Choose the blocks of `merge`, `emit` or `mixing_backward`: as many positions as fit. S is a multiple of 8.

    Raises:
        UserError: eight positions do not fit.
    """
    for p in range(min(s, MAX_POSITIONS), 0, -TILE):
        blocks = make_pass_blocks(kernel, n, g, s, e, d, jnp.dtype(dtype), p)
        if s % p == 0 and blocks.vmem_bytes <= VMEM_BYTES // 2:  # the compiler needs the rest for products
            return blocks
    problem = f"{e} mixtures of {g} tokens of d_model = {d}, at eight positions, do not fit in a core's memory"
    raise UserError(f"kernel = 'fused_experts': {problem}; try kernel = 'xla'")


def make_pass_blocks(kernel: str, n: int, g: int, s: int, e: int, d: int, dtype: Any, p: int) -> KernelBlocks:
    """The blocks of a kernel for p positions: all experts and members of one group. The grid is (N, S / p)."""
    tokens = (pl.BlockSpec((None, g, p, d), lambda i, t: (i, 0, t, 0)), dtype)
    mixtures = (pl.BlockSpec((e, None, p, d), lambda i, t: (0, i, t, 0)), dtype)
    weights = pl.BlockSpec((None, p // TILE, e, g * TILE), lambda i, t: (i, t, 0, 0))
    used, gradient = (weights, dtype), (weights, jnp.dtype(jnp.float32))
    inputs, outputs = {
        "merge": ([tokens, used], [mixtures]),
        "emit": ([mixtures, used], [tokens]),
        "mixing_backward": ([tokens, tokens, mixtures, mixtures, used], [tokens, gradient]),
    }[kernel]
    return KernelBlocks((n, s // p), inputs, outputs, [])


def _merge_kernel(x, weights, u):
    for_each(weights.shape[0], lambda q: store_tile(u, q, dot(merge_matrix(weights[q], x.dtype), load_tile(x, q))))


def _emit_kernel(o, weights, y):
    def tile(q):
        store_tile(y, q, dot(merge_matrix(weights[q], o.dtype), load_tile(o, q), (0, 0)))

    for_each(weights.shape[0], tile)


def _mixing_backward_kernel(x, dy, o, du, weights, dx, d_weights):
    def tile(q):
        cotangents = load_tile(du, q)
        store_tile(dx, q, dot(merge_matrix(weights[q], x.dtype), cotangents, (0, 0)))
        gradient = dot(cotangents, load_tile(x, q), (1, 1)) + dot(load_tile(o, q), load_tile(dy, q), (1, 1))
        d_weights[q] = merge_matrix_gradient(gradient)

    for_each(weights.shape[0], tile)


_KERNELS: dict[str, Callable[..., None]] = {
    "merge": _merge_kernel,
    "emit": _emit_kernel,
    "mixing_backward": _mixing_backward_kernel,
}


def _call(kernel: str, shapes: list[tuple[int, ...]], *arrays: jax.Array) -> list[jax.Array]:
    (n, parts, e, lanes), first = arrays[-1].shape, arrays[0]
    blocks = choose_pass_blocks(kernel, n, lanes // TILE, parts * TILE, e, first.shape[-1], first.dtype.name)
    return blocks.call(_KERNELS[kernel], kernel, ("parallel", "parallel"), shapes, *arrays)


def merge(x: jax.Array, tiles: jax.Array) -> jax.Array:
    """`mixing.merge` with experts first: x [N, G, S, D], weights by tiles in x's dtype -> mixtures [E, N, S, D]."""
    n, _, s, d = x.shape
    return _call("merge", [(tiles.shape[2], n, s, d)], x, tiles)[0]


def emit(o: jax.Array, tiles: jax.Array) -> jax.Array:
    """`mixing.emit` with experts first: outputs o [E, N, S, D], weights by tiles in o's dtype -> [N, G, S, D]."""
    _, n, s, d = o.shape
    return _call("emit", [(n, tiles.shape[3] // TILE, s, d)], o, tiles)[0]


def mixing_backward(
    x: jax.Array, dy: jax.Array, o: jax.Array, du: jax.Array, tiles: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of x, through the mixtures' cotangents du, and of the weights, through merge and emit.

    Reads every array once.

    Args:
        x, dy: [N, G, S, D].
        o, du: [E, N, S, D].
        tiles: the weights by tiles, in x's dtype.

    Returns:
        dx [N, G, S, D] in x's dtype; the weights' gradient by tiles in float32.
    """
    dx, d_tiles = _call("mixing_backward", [x.shape, tiles.shape], x, dy, o, du, tiles)
    return dx, d_tiles


def passes_bytes(n: int, g: int, s: int, e: int, d: int, dtype: str) -> int:
    """HBM bytes of one layer's passes, forward (merge, emit) and backward (merge of dy, the gradients)."""
    kernels = ("merge", "emit", "merge", "mixing_backward")
    return sum(choose_pass_blocks(kernel, n, g, s, e, d, dtype).hbm_bytes for kernel in kernels)
