"""Wide experts as Pallas kernels for TPU: neither pre-activations nor their cotangents are written to HBM.

Two kernels apply the experts, forward and backward (letters as in `mixing.py`; T = N S, the mixtures of one expert).
Both have the grid (E, F / width): one expert at a time, and of it one block of its hidden width F at a time. The
expert's inputs, outputs and their cotangents, [T, D] each, stay in VMEM over the blocks of F. Each block of the
parameters is read once, in the dtype in which it is stored, and its gradient is written once. The backward kernel
recomputes the pre-activations: 7 products instead of 6.

Before and after them, the passes of `tiles_tpu.py` merge and emit; they convert between tokens [N, G, S, D] and
mixtures with experts first, [E, N, S, D]. Mixtures and expert outputs are written to HBM and saved for the backward
pass.

For experts of about the dense width, for which the blocks of `fused_mixture_tpu.py` do not fit.
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
from mot_jax.nn.kernels.pallas_tpu import TILE, VMEM_BYTES, Activation, KernelBlocks, dot, map_devices
from mot_jax.nn.kernels.tiles_tpu import emit, for_each, from_tiles, merge, mixing_backward, passes_bytes, to_tiles
from mot_jax.nn.sharding import axes_of, replicate, reshard
from mot_jax.runtime.compilation import default_promotion

LANES = 128
MAX_ROWS = 256  # of an expert's input in one product


@functools.cache
def choose_blocks(
    kernel: str, e: int, t: int, d: int, f: int, dtype: str, weight_dtype: str, gradient_dtype: str
) -> KernelBlocks:
    """Choose the blocks of `forward` or `backward`: the widest block of F that fits in VMEM.

    Args:
        dtype: of activations.
        weight_dtype: of the experts' parameters as the kernel reads them.
        gradient_dtype: of the parameters' gradients.

    Raises:
        UserError: no block fits, since the inputs of one expert fill VMEM.
    """
    widths = [w for w in range(LANES, f, LANES) if f % w == 0]
    for width in [f, *reversed(widths)]:
        blocks = make_blocks(kernel, e, t, d, f, dtype, weight_dtype, gradient_dtype, width)
        # Values outside of blocks: pre-activations, and arrays of their size that are computed from them.
        values = (2 if kernel == "forward" else 6) * 4 * min(t, MAX_ROWS) * width
        if blocks.vmem_bytes + values <= VMEM_BYTES * 3 // 4:  # the compiler needs the rest
            return blocks
    problem = f"{t} mixtures of d_model = {d} for each expert do not fit in a core's memory"
    raise UserError(f"kernel = 'fused_experts': {problem}; try fewer sequences per device, or kernel = 'xla'")


def make_blocks(
    kernel: str, e: int, t: int, d: int, f: int, dtype, weight_dtype, gradient_dtype, width: int
) -> KernelBlocks:
    """The blocks of a kernel for a block of F of this width. Index maps are of (expert i, block j of F)."""
    tokens = (pl.BlockSpec((1, t, d), lambda i, j: (i, 0, 0)), jnp.dtype(dtype))
    w_in = pl.BlockSpec((1, d, width), lambda i, j: (i, 0, j))
    w_out = pl.BlockSpec((1, width, d), lambda i, j: (i, j, 0))
    weights, gradients = ([(w, jnp.dtype(to)) for w in (w_in, w_out)] for to in (weight_dtype, gradient_dtype))
    sums = pltpu.VMEM((t, d), jnp.float32)
    grid = (e, f // width)
    if kernel == "forward":
        return KernelBlocks(grid, [tokens, *weights], [tokens], [sums])
    weight_sums = [pltpu.VMEM((d, width), jnp.float32), pltpu.VMEM((width, d), jnp.float32)]
    return KernelBlocks(grid, [tokens, tokens, *weights], [tokens, *gradients], [sums, *weight_sums])


# --- the kernels ------------------------------------------------------------------------------------------------------
#
# References: u, do, o and du [1, T, D]; w_in and dw_in [1, D, width]; w_out and dw_out [1, width, D]; float32 scratch
# `sums` [T, D] accumulates o or du over the blocks of F, `sum_in` and `sum_out` the parameters' gradients over T.


def _for_each_rows(t: int, body: Callable[[Any], None]) -> None:
    """Run `body` on slices of the T rows, each of at most `MAX_ROWS` rows and of whole tiles."""
    rows = next(r for r in range(min(t, MAX_ROWS) // TILE * TILE, 0, -TILE) if t % r == 0)
    for_each(t // rows, lambda i: body(pl.ds(i * rows, rows)))


def _accumulator(sums, out) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two functions: set `sums` to zero, and store them in `out`."""

    def set_zero():
        sums[...] = jnp.zeros_like(sums)

    def store():
        out[0] = sums[...].astype(out.dtype)

    return set_zero, store


def _forward_kernel(activation, u, w_in, w_out, o, sums):
    set_zero, store = _accumulator(sums, o)
    pl.when(pl.program_id(1) == 0)(set_zero)
    first, second = (w[0].astype(u.dtype) for w in (w_in, w_out))

    def add_output(rows):
        hidden = activation(dot(u[0, rows], first))
        sums[rows] += dot(hidden.astype(u.dtype), second)

    _for_each_rows(sums.shape[0], add_output)
    pl.when(pl.program_id(1) == pl.num_programs(1) - 1)(store)


@default_promotion()
def _backward_kernel(activation, u, do, w_in, w_out, du, dw_in, dw_out, sums, sum_in, sum_out):
    set_zero, store = _accumulator(sums, du)
    pl.when(pl.program_id(1) == 0)(set_zero)
    (set_zero_in, store_in), (set_zero_out, store_out) = _accumulator(sum_in, dw_in), _accumulator(sum_out, dw_out)
    set_zero_in()
    set_zero_out()
    first, second = (w[0].astype(u.dtype) for w in (w_in, w_out))

    def add_gradients(rows):
        hidden, pull = jax.vjp(activation, dot(u[0, rows], first))
        (dh,) = pull(dot(do[0, rows], second, (1, 1)))
        dh = dh.astype(u.dtype)
        sums[rows] += dot(dh, first, (1, 1))
        sum_in[...] += dot(u[0, rows], dh, (0, 0))
        sum_out[...] += dot(hidden.astype(u.dtype), do[0, rows], (0, 0))

    _for_each_rows(sums.shape[0], add_gradients)
    store_in()
    store_out()
    pl.when(pl.program_id(1) == pl.num_programs(1) - 1)(store)


_KERNELS: dict[str, Callable[..., None]] = {"forward": _forward_kernel, "backward": _backward_kernel}


def _call(kernel: str, activation: Activation, gradient_dtype: Any, *arrays: jax.Array) -> list[jax.Array]:
    """Arrays u (and do, backward) [E, T, D], w_in, w_out -> [o], or the gradients of u, w_in and w_out."""
    u, w_in = arrays[0], arrays[-2]
    gradient_name = jnp.dtype(gradient_dtype).name
    blocks = choose_blocks(kernel, *u.shape, w_in.shape[-1], u.dtype.name, w_in.dtype.name, gradient_name)
    shapes = [a.shape for a in ([u] if kernel == "forward" else [u, *arrays[-2:]])]
    body = functools.partial(_KERNELS[kernel], activation)
    return blocks.call(body, f"experts_{kernel}", ("parallel", "arbitrary"), shapes, *arrays)


def layer_bytes(n: int, g: int, s: int, e: int, d: int, f: int, dtype: str, param_dtype: str) -> int:
    """HBM bytes of all kernels of one layer, forward and backward."""
    blocks = (choose_blocks(kernel, e, n * s, d, f, dtype, param_dtype, param_dtype) for kernel in _KERNELS)
    return sum(b.hbm_bytes for b in blocks) + passes_bytes(n, g, s, e, d, dtype)


# --- the function -----------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_experts(
    activation: Activation, x: jax.Array, weights: jax.Array, w_in: jax.Array, w_out: jax.Array
) -> jax.Array:
    """`mixing.merge_experts_emit` for experts act(u w_in) w_out and equal merge and emit weights.

    On other platforms than TPU the kernels are interpreted. Under a mesh each device has its own groups or positions
    and, during the call, the weights of all experts. Saved for the backward pass: the arguments, the mixtures and the
    expert outputs.

    Args:
        activation: elementwise, of pre-activations in float32. Static: JAX compares it by identity.
        x: [N, G, S, D], S a multiple of 8 (on each device).
        weights: mixing weights [N, G, S, E], cast to x's dtype, as in `mixing.merge`.
        w_in: [E, D, F].
        w_out: [E, F, D].

    Returns:
        The update [N, G, S, D] in x's dtype. Products are of x's dtype, accumulated in float32.
    """
    return _forward(activation, x, weights, w_in, w_out)[0]


def _forward(activation, x, weights, w_in, w_out):
    chex.assert_rank([x, weights], 4, custom_message="x is [N, G, S, D], weights are [N, G, S, E]")

    def local(axes, x, weights, w_in, w_out):
        tiles = to_tiles(weights)
        u = merge(x, tiles)
        (o,) = _call("forward", activation, w_in.dtype, _flatten(u), w_in, w_out)
        o = o.reshape(u.shape)
        return emit(o, tiles), u, o

    arrays = (x, weights.astype(x.dtype), *_gather_weights(x, w_in, w_out))
    y, u, o = map_devices(local, "ngsd ngse - -", "ngsd ensd ensd", *arrays)
    return y, (x, weights, u, o, w_in, w_out)


def _backward(activation, residuals, dy):
    x, weights, u, o, w_in, w_out = residuals

    def local(axes, x, dy, weights, u, o, *experts):
        tiles = to_tiles(weights)
        do = merge(dy, tiles)  # the transpose of emit
        du, *gradients = _call("backward", activation, w_in.dtype, _flatten(u), _flatten(do), *experts)
        dx, d_tiles = mixing_backward(x, dy, o, du.reshape(u.shape), tiles)
        return dx, from_tiles(d_tiles), *(jax.lax.psum(gradients, axes) if axes else gradients)

    arrays = (x, dy, weights.astype(x.dtype), u, o, *_gather_weights(x, w_in, w_out))
    dx, d_weights, *gradients = map_devices(local, "ngsd ngsd ngse ensd ensd - -", "ngsd ngse - -", *arrays)
    dw_in, dw_out = (reshard(dw, *axes_of(w)) for dw, w in zip(gradients, (w_in, w_out), strict=True))
    return dx, d_weights.astype(weights.dtype), dw_in, dw_out


fused_experts.defvjp(_forward, _backward)


def _flatten(u: jax.Array) -> jax.Array:
    """[E, N, S, D] -> [E, T, D]."""
    return u.reshape(u.shape[0], -1, u.shape[-1])


def _gather_weights(x: jax.Array, *weights: jax.Array) -> list[jax.Array]:
    """The weights of all experts on every device, in the dtype in which they are stored.

    Sharded weights are gathered in x's dtype.
    """
    return [replicate(w.astype(x.dtype)) if any(axes_of(w)) else w for w in weights]
