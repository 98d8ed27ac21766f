"""What the Pallas kernels for TPU share: grid and blocks as a value, how they run, on each device, their products."""

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

TILE = 8  # rows of a tile; positions that `fused_mixture_tpu` merges in one product
VMEM_BYTES = 63 * 2**20  # that a kernel may use; a v5p core has 64 MiB


class Plan(NamedTuple):
    """A kernel's grid and blocks. inputs, outputs: (spec, dtype) in the order of the kernel's arguments."""

    grid: tuple[int, ...]
    inputs: list[tuple[pl.BlockSpec, Any]]
    outputs: list[tuple[pl.BlockSpec, Any]]
    scratch: list[Any]

    @property
    def bytes(self) -> int:
        """Moved between HBM and the cores."""
        return moved_bytes(self.grid, self.inputs + self.outputs)

    @property
    def vmem_bytes(self) -> int:
        """Of blocks, twice where the next is fetched meanwhile, and of scratch; lanes padded."""
        total = sum(_padded(s.shape, s.dtype) for s in self.scratch)
        for block, dtype in self.inputs + self.outputs:
            total += _padded(block.block_shape, dtype) * (2 if block.pipeline_mode is None else 1)
        return total

    def run(
        self,
        body: Callable[..., None],
        name: str,
        semantics: tuple[Any, ...],
        shapes: Sequence[Any],
        *arrays: jax.Array,
    ) -> list[jax.Array]:
        """Runs the kernel `body` on its inputs; interpreted where no TPU is. shapes: of its outputs."""

        def call(interpret: bool) -> Any:
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

        return jax.lax.platform_dependent(*arrays, tpu=call(False), default=call(True))


def _padded(shape: Any, dtype: Any) -> int:
    *outer, rows, lanes = (1 if n is None else n for n in shape)
    size = -(-rows // TILE) * TILE * -(-lanes // 128) * 128 * jnp.dtype(dtype).itemsize
    for n in outer:
        size *= n
    return size


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    # Of other dtypes Mosaic knows one precision, whatever JAX's default is set to.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def on_each(local: Callable[..., Any], inputs: str, outputs: str, x: jax.Array, *arrays: jax.Array) -> Any:
    """`local(axes, x, *arrays)` on each device; axes: of the mesh, those that cut the groups and positions of x.

    x: [N, G, S, D]. inputs, outputs: a word for each array, a letter for each dimension: `n` and `s` are cut as those
    of x are, others are not; `-` is an array that is whole on every device.
    """
    groups, _, positions, _ = axes_of(x)
    if spec(groups, positions) is None:
        return local((), x, *arrays)

    def places(words: str) -> list[Any]:
        cut = {"n": groups, "s": positions}
        return [PartitionSpec() if word == "-" else spec(*(cut.get(c, ()) for c in word)) for word in words.split()]

    out_specs = tuple(places(outputs)) if " " in outputs else places(outputs)[0]
    mapped = functools.partial(local, groups + positions)
    return jax.shard_map(mapped, in_specs=tuple(places(inputs)), out_specs=out_specs, check_vma=False)(x, *arrays)
