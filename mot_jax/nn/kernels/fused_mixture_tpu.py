"""Merge, experts and emit as Pallas kernels for TPU: neither mixtures nor expert outputs are written to HBM.

Three kernels (letters as in `mixing.py`). A grid step has a block of P positions of one group, for all G members, and a
block of k experts:

    kernel     grid                  outputs, accumulated in VMEM over the inner grid dimensions
    forward    (N, S / P, E / k)     y, over the experts
    backward   (N, S / P, E / k)     dx, over the experts; the gradient of the mixing weights, complete at each step
    gradients  (E / k, N, S / P)     the gradients of w_in and w_out, over groups and positions

Each step merges its tokens into mixtures (VMEM scratch), applies the experts to them, and emits. The backward kernels
recompute all that they need of the forward pass: only x, the mixing weights and the parameters are saved.

Eight positions are merged in one product, at eight times the FLOPs of a merge: see `tiles_tpu.py`. For small experts;
experts of about the dense width do not fit (`fused_experts_tpu.py` is for them).
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
from mot_jax.nn.kernels.pallas_tpu import TILE, VMEM_BYTES, Activation, KernelBlocks, dot, map_devices
from mot_jax.nn.kernels.tiles_tpu import (
    for_each,
    from_tiles,
    load_tile,
    merge_matrix,
    merge_matrix_gradient,
    store_tile,
    to_tiles,
)
from mot_jax.nn.sharding import axes_of, replicate, reshard
from mot_jax.runtime.compilation import default_promotion

MIN_POSITIONS = 64  # of a block: the rows of an expert's products, enough to fill the matrix unit


@functools.cache
def choose_blocks(kernel: str, n: int, g: int, s: int, e: int, d: int, f: int, dtype: str) -> KernelBlocks:
    """Choose the blocks of `forward`, `backward` or `gradients` that fit in VMEM and move the fewest bytes.

    S and E are multiples of 8.

    Raises:
        UserError: no blocks fit, as with experts of the dense width.
    """
    positions = [p for p in range(TILE, s + 1, TILE) if s % p == 0 and p >= min(MIN_POSITIONS, s)]
    sizes = [(p, k) for p in positions for k in range(TILE, e + 1, TILE) if e % k == 0]
    candidates = (make_blocks(kernel, n, g, s, e, d, f, jnp.dtype(dtype), p, k) for p, k in sizes)
    fitting = [blocks for blocks in candidates if blocks.vmem_bytes <= VMEM_BYTES - 2**22]  # 4 MiB for the compiler
    if not fitting:
        tokens = f"{min(MIN_POSITIONS, s)} positions of {g} sequences"
        problem = f"eight experts of d_model = {d} and width {f}, and {tokens},"
        raise UserError(f"kernel = 'fused_mixture': {problem} do not fit in a core's memory; try kernel = 'xla'")
    return min(fitting, key=lambda blocks: blocks.hbm_bytes)


def make_blocks(kernel: str, n, g, s, e, d, f, dtype, p: int, k: int) -> KernelBlocks:
    """The blocks of a kernel for p positions and k experts.

    Index maps are written for (group i, block t of positions, block j of experts), whatever the order of the grid.
    """
    single_buffer = pl.Buffered(1)
    wide = jnp.dtype(jnp.float32)
    experts_outermost = kernel == "gradients"
    grid = (e // k, n, s // p) if experts_outermost else (n, s // p, e // k)

    def block(shape, index, mode=None):
        index_map = (lambda j, i, t: index(i, t, j)) if experts_outermost else index
        return pl.BlockSpec(shape, index_map, pipeline_mode=mode)

    # A block that stays the same over the inner grid dimension needs no second buffer to prefetch into.
    tokens = (block((None, g, p, d), lambda i, t, j: (i, 0, t, 0), None if experts_outermost else single_buffer), dtype)
    weights = (block((None, p // TILE, k, g * TILE), lambda i, t, j: (i, t, j, 0)), dtype)
    experts = [
        (block(shape, lambda i, t, j: (j, 0, 0), single_buffer if experts_outermost else None), dtype)
        for shape in ((k, d, f), (k, f, d))
    ]
    mixtures = pltpu.VMEM((p // TILE, k, TILE, d), wide)
    sums = pltpu.VMEM((p // TILE, g * TILE, d), wide)
    if kernel == "forward":
        return KernelBlocks(grid, [tokens, weights, *experts], [tokens], [mixtures, sums])
    inputs = [tokens, tokens, weights, *experts]
    if experts_outermost:
        return KernelBlocks(grid, inputs, [(spec, wide) for spec, _ in experts], [mixtures, mixtures])
    return KernelBlocks(grid, inputs, [tokens, weights], [mixtures, mixtures, sums])


# --- the kernels ------------------------------------------------------------------------------------------------------
#
# References, without the blocked dimension N: x, dy and y [G, P, D]; weights [P / 8, k, (G, 8)]; w_in [k, D, F] and
# w_out [k, F, D]; scratch `mixtures` and `cotangents` [P / 8, k, 8, D], `sums` [P / 8, (G, 8), D], both float32.


def _merge_into(weights, tokens, mixtures) -> None:
    """Merge all tokens of the block into the scratch `mixtures`."""

    def tile(q):
        x = load_tile(tokens, q)
        mixtures[q] = dot(merge_matrix(weights[q], x.dtype), x).reshape(mixtures.shape[1:])

    for_each(mixtures.shape[0], tile)


def _load_expert(mixtures, i, dtype) -> jax.Array:
    """Load the mixtures of expert i, [P, D]."""
    return mixtures[:, i].reshape(-1, mixtures.shape[-1]).astype(dtype)


def _store_expert(mixtures, i, values: jax.Array) -> None:
    """Invert `_load_expert`."""
    mixtures[:, i] = values.reshape(mixtures.shape[0], TILE, mixtures.shape[-1])


def _add_emitted(weights, mixtures, sums, q, dtype) -> jax.Array:
    """Emit the q-th tile of `mixtures` and add it to `sums`; return the tile as [(e, s), D]."""
    outputs = mixtures[q].reshape(-1, mixtures.shape[-1]).astype(dtype)
    sums[q] += dot(merge_matrix(weights[q], dtype), outputs, (0, 0))
    return outputs


def _store_sums(sums, out) -> None:
    for_each(sums.shape[0], lambda q: store_tile(out, q, sums[q]))


def _set_zero(ref) -> None:
    ref[...] = jnp.zeros_like(ref)


def _forward_kernel(activation, x, weights, w_in, w_out, y, mixtures, sums):
    pl.when(pl.program_id(2) == 0)(lambda: _set_zero(sums))
    _merge_into(weights, x, mixtures)

    def expert(i):
        h = dot(_load_expert(mixtures, i, x.dtype), w_in[i])
        _store_expert(mixtures, i, dot(activation(h).astype(x.dtype), w_out[i]))

    for_each(w_in.shape[0], expert)
    for_each(sums.shape[0], lambda q: _add_emitted(weights, mixtures, sums, q, x.dtype))
    pl.when(pl.program_id(2) == pl.num_programs(2) - 1)(lambda: _store_sums(sums, y))


@default_promotion()
def _backward_kernel(activation, x, dy, weights, w_in, w_out, dx, d_weights, mixtures, cotangents, sums):
    pl.when(pl.program_id(2) == 0)(lambda: _set_zero(sums))
    _merge_into(weights, x, mixtures)
    _merge_into(weights, dy, cotangents)

    def expert(i):
        # Reads u and do, and overwrites them: `mixtures` with du, `cotangents` with o.
        h = dot(_load_expert(mixtures, i, x.dtype), w_in[i])
        hidden, pull = jax.vjp(activation, h)
        (dh,) = pull(dot(_load_expert(cotangents, i, x.dtype), w_out[i], (1, 1)))
        _store_expert(mixtures, i, dot(dh.astype(x.dtype), w_in[i], (1, 1)))
        _store_expert(cotangents, i, dot(hidden.astype(x.dtype), w_out[i]))

    for_each(w_in.shape[0], expert)

    def tile(q):
        du = _add_emitted(weights, mixtures, sums, q, x.dtype)
        o = cotangents[q].reshape(du.shape).astype(x.dtype)
        gradient = dot(du, load_tile(x, q), (1, 1)) + dot(o, load_tile(dy, q), (1, 1))
        d_weights[q] = merge_matrix_gradient(gradient).astype(x.dtype)

    for_each(sums.shape[0], tile)
    pl.when(pl.program_id(2) == pl.num_programs(2) - 1)(lambda: _store_sums(sums, dx))


def _gradients_kernel(activation, x, dy, weights, w_in, w_out, dw_in, dw_out, mixtures, cotangents):
    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        _set_zero(dw_in)
        _set_zero(dw_out)

    _merge_into(weights, x, mixtures)
    _merge_into(weights, dy, cotangents)

    def expert(i):
        u, do = _load_expert(mixtures, i, x.dtype), _load_expert(cotangents, i, x.dtype)
        hidden, pull = jax.vjp(activation, dot(u, w_in[i]))
        (dh,) = pull(dot(do, w_out[i], (1, 1)))
        dw_in[i] += dot(u, dh.astype(x.dtype), (0, 0))
        dw_out[i] += dot(hidden.astype(x.dtype), do, (0, 0))

    for_each(w_in.shape[0], expert)


_KERNELS: dict[str, Callable[..., None]] = {
    "forward": _forward_kernel,
    "backward": _backward_kernel,
    "gradients": _gradients_kernel,
}


def _call(kernel: str, activation: Activation, shapes: list[tuple[int, ...]], *arrays: jax.Array) -> list[jax.Array]:
    x, w_in = arrays[0], arrays[-2]
    (n, g, s, d), (e, _, f) = x.shape, w_in.shape
    blocks = choose_blocks(kernel, n, g, s, e, d, f, x.dtype.name)
    semantics = ("parallel", "arbitrary" if kernel == "gradients" else "parallel", "arbitrary")
    body = functools.partial(_KERNELS[kernel], activation)
    return blocks.call(body, f"mixing_{kernel}", semantics, shapes, *arrays)


def layer_bytes(n: int, g: int, s: int, e: int, d: int, f: int, dtype: str) -> int:
    """HBM bytes of one layer's three kernels, forward and backward."""
    return sum(choose_blocks(kernel, n, g, s, e, d, f, dtype).hbm_bytes for kernel in _KERNELS)


# --- the function -----------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_mixture(
    activation: Activation, x: jax.Array, weights: jax.Array, w_in: jax.Array, w_out: jax.Array
) -> jax.Array:
    """`mixing.merge_experts_emit` for experts act(u w_in) w_out and equal merge and emit weights.

    On other platforms than TPU the kernels are interpreted. Under a mesh each device has its own groups or positions
    and, during the call, the weights of all experts. Saved for the backward pass: the arguments.

    Args:
        activation: elementwise, of pre-activations in float32. Static: JAX compares it by identity.
        x: [N, G, S, D], S a multiple of 8 (on each device).
        weights: mixing weights [N, G, S, E], E a multiple of 8. Cast to x's dtype, as in `mixing.merge`; so is their
            gradient.
        w_in: [E, D, F].
        w_out: [E, F, D].

    Returns:
        The update [N, G, S, D] in x's dtype. Products are of x's dtype, accumulated in float32.
    """
    return _forward(activation, x, weights, w_in, w_out)[0]


def _forward(activation, x, weights, w_in, w_out):
    chex.assert_rank([x, weights], 4, custom_message="x is [N, G, S, D], weights are [N, G, S, E]")

    def local(axes, x, weights, w_in, w_out):
        return _call("forward", activation, [x.shape], x, to_tiles(weights), w_in, w_out)[0]

    arrays = (x, weights.astype(x.dtype), replicate(w_in.astype(x.dtype)), replicate(w_out.astype(x.dtype)))
    return map_devices(local, "ngsd ngse - -", "ngsd", *arrays), (x, weights, w_in, w_out)


def _backward(activation, residuals, dy):
    x, weights, w_in, w_out = residuals

    def local(axes, x, dy, weights, w_in, w_out):
        tiles = to_tiles(weights)
        dx, d_tiles = _call("backward", activation, [x.shape, tiles.shape], x, dy, tiles, w_in, w_out)
        gradients = _call("gradients", activation, [w_in.shape, w_out.shape], x, dy, tiles, w_in, w_out)
        dw_in, dw_out = jax.lax.psum(gradients, axes) if axes else gradients
        return dx, from_tiles(d_tiles), dw_in, dw_out

    arrays = (x, dy, weights.astype(x.dtype), replicate(w_in.astype(x.dtype)), replicate(w_out.astype(x.dtype)))
    dx, d_weights, *gradients = map_devices(local, "ngsd ngsd ngse - -", "ngsd ngse - -", *arrays)
    dw_in, dw_out = (reshard(dw.astype(w.dtype), *axes_of(w)) for dw, w in zip(gradients, (w_in, w_out), strict=True))
    return dx, d_weights.astype(weights.dtype), dw_in, dw_out


fused_mixture.defvjp(_forward, _backward)
