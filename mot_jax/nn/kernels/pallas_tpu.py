"""Shared parts of the Pallas kernels for TPU: grid and blocks as a value, kernel calls, sharding, products.

Each kernel file builds a `KernelBlocks` for its problem size, the only place where block shapes are chosen; from it
follow the kernel call, the HBM traffic (for the cost model) and the VMEM footprint (for the choice of block sizes).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from mot_jax.nn.kernels.counting import moved_bytes
from mot_jax.nn.sharding import axes_of, spec

Activation = Callable[[jax.Array], jax.Array]

TILE = 8  # sublanes of a tile; the positions that `tiles_tpu` merges in one product
VMEM_BYTES = 63 * 2**20  # that a kernel may use; a v5p core has 64 MiB


class KernelBlocks(NamedTuple):
    """Grid, block specs and scratch of a kernel."""

    grid: tuple[int, ...]

    inputs: list[tuple[pl.BlockSpec, Any]]
    """(block spec, dtype) of each input, in the order of the kernel's arguments."""

    outputs: list[tuple[pl.BlockSpec, Any]]
    """(block spec, dtype) of each output."""

    scratch: list[Any]
    """VMEM scratch shapes."""

    @property
    def hbm_bytes(self) -> int:
        """Bytes moved between HBM and VMEM."""
        return moved_bytes(self.grid, self.inputs + self.outputs)

    @property
    def vmem_bytes(self) -> int:
        """VMEM footprint of blocks and scratch, padded to whole tiles. A pipelined block has two buffers."""
        total = sum(_padded_bytes(s.shape, s.dtype) for s in self.scratch)
        for block, dtype in self.inputs + self.outputs:
            total += _padded_bytes(block.block_shape, dtype) * (2 if block.pipeline_mode is None else 1)
        return total

    def call(
        self,
        body: Callable[..., None],
        name: str,
        semantics: tuple[Any, ...],
        shapes: Sequence[Any],
        *arrays: jax.Array,
    ) -> list[jax.Array]:
        """Call the kernel; on other platforms than TPU it is interpreted.

        Args:
            body: the kernel function, of references to inputs, outputs and scratch.
            name: of the kernel in the compiled program.
            semantics: `parallel` or `arbitrary` for each dimension of the grid.
            shapes: of the outputs.
            *arrays: the inputs.
        """

        def pallas_call(interpret: bool) -> Any:
            return pl.pallas_call(
                body,
                [jax.ShapeDtypeStruct(shape, dtype) for shape, (_, dtype) in zip(shapes, self.outputs, strict=True)],
                grid=self.grid,
                in_specs=[block for block, _ in self.inputs],
                out_specs=[block for block, _ in self.outputs],
                scratch_shapes=self.scratch,
                compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES),
                interpret=interpret,
                name=name,
            )

        return jax.lax.platform_dependent(*arrays, tpu=pallas_call(False), default=pallas_call(True))


def _padded_bytes(shape: Any, dtype: Any) -> int:
    """Size of an array in VMEM, its last two dimensions padded to 8 sublanes and 128 lanes."""
    *outer, sublanes, lanes = (1 if n is None else n for n in shape)
    size = -(-sublanes // TILE) * TILE * -(-lanes // 128) * 128 * jnp.dtype(dtype).itemsize
    for n in outer:
        size *= n
    return size


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """Product of two matrices over dimension contract[0] of a and contract[1] of b, accumulated in float32."""
    # Mosaic supports only the default precision for other dtypes, whatever `jax_default_matmul_precision` is.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def map_devices(local: Callable[..., Any], inputs: str, outputs: str, x: jax.Array, *arrays: jax.Array) -> Any:
    """Apply `local(axes, x, *arrays)` on each device to its own groups and positions, by `shard_map`.

    Args:
        local: its first argument is the mesh axes that groups and positions of x are sharded over.
        inputs: one word per array of (x, *arrays), one letter per dimension: `n` and `s` are sharded like the groups
            and positions of x, other letters are not; `-` stands for an array that is replicated.
        outputs: the same for the results of `local`.
        x: [N, G, S, D].
    """
    groups, _, positions, _ = axes_of(x)
    if spec(groups, positions) is None:
        return local((), x, *arrays)

    def partitions(words: str) -> list[Any]:
        axes = {"n": groups, "s": positions}
        return [PartitionSpec() if word == "-" else spec(*(axes.get(c, ()) for c in word)) for word in words.split()]

    out_specs = tuple(partitions(outputs)) if " " in outputs else partitions(outputs)[0]
    mapped = functools.partial(local, groups + positions)
    return jax.shard_map(mapped, in_specs=tuple(partitions(inputs)), out_specs=out_specs, check_vma=False)(x, *arrays)
