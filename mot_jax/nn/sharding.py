"""The mesh, the one table from dimension and parameter names to mesh axes, and products with weights that lie in parts.

All axes are Explicit: an array's sharding is part of its type, and a wrong one is an error at trace time. Without a
mesh (`jax.set_mesh`) every function here is a no-op, so that the layers also run as they are in anybody's model.

    data     rows of the batch, nothing else; over several slices, the outermost axis, on the slow network
    fsdp     rows of the batch; between the steps, weights and the optimizer's state, too
    expert   rows of the batch, and experts
    tensor   heads and hidden widths; between the sub-layers, positions
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mot_jax.config import Config, DenseConfig, MeshConfig, ModelConfig, platform_errors
from mot_jax.errors import UserError
from mot_jax.runtime.compilation import compile_anew_for

AXES = ("data", "fsdp", "expert", "tensor")

Axes = tuple[str, ...]  # of the mesh, over which one dimension of an array is spread, the outermost first
Sizes = tuple[int, int, int, int]  # of the mesh's axes

DIMENSIONS: dict[str, Axes] = {
    "rows": ("data", "fsdp", "expert"),
    "positions": ("tensor",),
    "experts": ("expert",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    # Of parameters alone: d_model of matrices, and of what every device needs whole.
    "features": ("fsdp",),
    "table": ("fsdp", "tensor"),
}
# By the last part of a parameter's name, the dimensions that come after a stack's leading ones. All else is replicated.
PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "token_embedding": (None, "table"),
    "position_embedding": (None, "table"),
    "head": ("table", None),
    "query": ("features", "heads", None),
    "key_value": ("features", None, "heads", None),
    "out": ("heads", None, "features"),
    "query_bias": ("heads", None),
    "key_value_bias": (None, "heads", None),
    "kernel_in": ("features", "hidden"),
    "kernel_gate": ("features", "hidden"),
    "kernel_out": ("hidden", "features"),
    "bias_in": ("hidden",),
    "bias_gate": ("hidden",),
    "controller": ("features", None),
    "emit_controller": ("features", None),
    "base_controller": ("features", None),
    "w_in": ("experts", "features", "hidden"),
    "w_gate": ("experts", "features", "hidden"),
    "w_out": ("experts", "hidden", "features"),
    "companion_mixtures": (None, "experts", None),
    "companion_outputs": (None, "experts", None),
}


# --- the mesh ---------------------------------------------------------------------------------------------------------


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None, trains: bool = True) -> Mesh:
    """The Explicit mesh of `config.mesh` over `devices` (default: all), along the machine's own network.

    Raises UserError if the axes do not multiply to the number of devices, if what they are to divide (experts, heads,
    widths; the batch of a config that `trains`) does not divide, or if they cut what a kernel takes whole.
    On several CPU devices JAX's compilation cache is off from here on, see `compilation.compile_anew_for`.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _sizes(config.mesh, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    faults = [*_model_faults(config, *sizes, slices), *(_batch_faults(config, sizes) if trains else ())]
    faults += platform_errors(config, devices[0]) if trains else ()
    if faults:
        raise UserError(*faults)
    asked = ", ".join(f"mesh.{name} = {size}" for name, size in zip(AXES, sizes, strict=True))
    used = math.prod(sizes)
    if used < len(devices) and len({(d.process_index, getattr(d, "slice_index", 0)) for d in devices}) > 1:
        raise UserError(f"{asked}: leaves {len(devices) - used} of {len(devices)} devices idle; try mesh.data = -1")
    try:  # An axis may take a part of a dimension of the torus: expert 8 on 4 x 4 x 4 chips, say.
        if slices == 1:
            array = mesh_utils.create_device_mesh(sizes, devices[:used], allow_split_physical_axes=True)
        else:
            inside, outside = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1)
            array = mesh_utils.create_hybrid_device_mesh(inside, outside, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError) as error:
        advice = "try axes that are products of the torus' sizes"
        raise UserError(f"{asked}: JAX cannot lay these axes on this network; {advice}") from error
    mesh = Mesh(array, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    compile_anew_for(mesh)
    return mesh


def _sizes(mesh: MeshConfig, count: int) -> Sizes:
    sizes = [mesh.data, mesh.fsdp, mesh.expert, mesh.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if known > count or (-1 in sizes and count % known):
        asked = ", ".join(f"mesh.{name} = {size}" for name, size in zip(AXES, sizes, strict=True) if size != 1)
        left = count
        good: list[str] = []
        for name, size in zip(AXES[1:], sizes[1:], strict=True):
            size = math.gcd(left, max(size, 1))
            good, left = [*good, f"mesh.{name} = {size}"], left // size
        raise UserError(f"{asked}: must divide the {count} devices there are; try mesh.data = -1, {', '.join(good)}")
    data, fsdp, expert, tensor = (count // known if size == -1 else size for size in sizes)
    return data, fsdp, expert, tensor


def _model_faults(config: Config, data: int, fsdp: int, expert: int, tensor: int, slices: int) -> Iterator[str]:
    """What an axis is to cut into equal parts, and cannot; what it is not to cut."""
    m, kind = config.model, config.model.feed_forward
    parts = [("expert", expert, "model.feed_forward.num_experts", getattr(kind, "num_experts", expert))]
    parts += [("tensor", tensor, "model.num_heads", m.num_heads)]
    parts += [("tensor", tensor, "model.num_kv_heads", m.num_kv_heads)] if m.num_kv_heads else []
    parts += [("tensor", tensor, "model.d_ff", m.d_ff), ("fsdp", fsdp, "model.d_model", m.d_model)]
    if m.d_model % fsdp == 0:
        parts += [("tensor", tensor, "model.d_model / mesh.fsdp", m.d_model // fsdp)]
    if not isinstance(kind, DenseConfig):
        parts += [("tensor", tensor, "model.feed_forward.expert_dim", kind.hidden_dim(m.d_ff))]
        parts += [("tensor", tensor, "model.feed_forward.shared_expert_dim", kind.shared_expert_dim)]
    for axis, size, name, whole in parts:
        if whole % size:
            yield f"mesh.{axis} = {size}: must divide {name} = {whole}; try {math.gcd(size, whole)}"
    if (kernel := getattr(kind, "kernel", "xla")) != "xla":
        for axis, size in (("expert", expert), ("tensor", tensor)):
            if size > 1:
                yield f"mesh.{axis} = {size}: model.feed_forward.kernel = {kernel!r} takes whole experts; try 1"
    if data % slices:
        yield f"mesh.data = {data}: must be a multiple of the {slices} slices; try {slices}"


def _batch_faults(config: Config, sizes: Sizes) -> Iterator[str]:
    """The fault of a microbatch whose groups cannot be made whole on the mesh, if they cannot."""
    t, m = config.training, config.model
    rows = t.batch_size // t.gradient_accumulation_steps
    multiple = _model_rows(m, sizes)
    if rows % multiple:
        good = max(1, round(rows / multiple)) * multiple * t.gradient_accumulation_steps
        group_size, over = max(m.group_size, m.sequences_per_routing_group), math.prod(sizes[:3])
        parts = f"group size {group_size} x accumulation {t.gradient_accumulation_steps} on {over} shards of the rows"
        words = f"must be a multiple of {multiple * t.gradient_accumulation_steps} ({parts}); try {good}"
        yield f"training.batch_size = {t.batch_size}: {words}"


def rows_multiple(config: Config, mesh: Mesh) -> int:
    """The rows that the mesh can hold so that its devices can make the groups whole: this many, or a multiple."""
    shape = mesh.shape
    sizes = (shape["data"], shape["fsdp"], shape["expert"], shape["tensor"])
    return math.lcm(config.group_size, _model_rows(config.model, sizes))


def _model_rows(model: ModelConfig, sizes: Sizes) -> int:
    """Mixing groups may span devices, which then exchange; a routing group is whole on one."""
    mixed = _rows_multiple(model.group_size, model.context_length, sizes)
    return math.lcm(mixed, model.sequences_per_routing_group * math.prod(sizes[:3]))


def _rows_multiple(group_size: int, length: int, sizes: Sizes) -> int:
    shards = math.prod(sizes[:3])
    return next(n for n in itertools.count(shards, shards) if _kept_axes(n, length, group_size, sizes) is not None)


def _kept_axes(rows: int, length: int, group_size: int, sizes: Sizes) -> int | None:
    """Of the three axes of the rows, how many, the first ones, cut rows into whole groups. None if no exchange helps.

    The other axes are to cut the positions instead, so as many parts must divide the length.
    """
    *axes, tensor = sizes
    if rows % group_size or rows % math.prod(axes):
        return None
    kept = _whole_axes(rows, group_size, sizes)
    parts = math.prod(axes[kept:]) * (1 if length % tensor else tensor)
    return None if length % parts else kept


def _whole_axes(rows: int, group_size: int, sizes: Sizes) -> int:
    """The most of the three axes of the rows, the first ones, that together cut them into whole groups."""
    return max(k for k in range(4) if rows % (math.prod(sizes[:k]) * group_size) == 0)


# --- the types of arrays ----------------------------------------------------------------------------------------------


def axis_size(name: str) -> int:
    """The size of a mesh axis where the code runs; 1 where there is none."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(name, 1)


def shards(axes: Axes) -> int:
    """Into how many parts these axes of the mesh cut a dimension."""
    return math.prod(axis_size(axis) for axis in axes)


def _axes() -> set[str]:
    """Of our axes, those that the mesh has; none where no mesh is set, or somebody else's."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {name for name in AXES if types.get(name) == AxisType.Explicit}


def axes_of(x: jax.Array) -> list[Axes]:
    """The mesh axes, of ours, over which each dimension of `x` is spread."""
    ours = _axes()
    parts = [(part,) if isinstance(part, str) else tuple(part or ()) for part in jax.typeof(x).sharding.spec]
    parts += [()] * (x.ndim - len(parts))
    return [tuple(axis for axis in part if axis in ours) for part in parts]


def spec(*dimensions: str | Axes | None) -> PartitionSpec | None:
    """The partition of an array with these dimensions (a name of the table, or mesh axes) on the mesh that is set.

    None, which leaves the sharding to JAX, where no mesh with our Explicit axes is set.
    """
    if not (ours := _axes()):
        return None
    named = (DIMENSIONS[d] if isinstance(d, str) else d or () for d in dimensions)
    return PartitionSpec(*(tuple(axis for axis in axes if axis in ours) or None for axes in named))


def reshard(x: jax.Array, *dimensions: str | Axes | None) -> jax.Array:
    """`x` moved to the partition of these dimensions: a collective where the devices must exchange."""
    target = spec(*dimensions)
    return x if target is None else jax.reshard(x, target)


def whole(x: jax.Array) -> jax.Array:
    """`x` on every device; its gradient lies where `x` does."""
    return reshard(x, *[None] * x.ndim)


@jax.custom_vjp
def anchor(x: jax.Array) -> jax.Array:
    """`x`. Its cotangent, too, stays where its type says.

    What a loop carries has no sharding of its own in the compiled program, and the partitioner may take another one
    there, at the price of an exchange; an operation on it has one. JAX drops a `reshard` that changes nothing.
    """
    return x


anchor.defvjp(lambda x: (x, None), lambda _, cotangent: (cotangent * jnp.ones((), cotangent.dtype),))


def positions_of(length: int) -> str | None:
    """`positions`, if the positions of rows of this length are spread between the sub-layers."""
    return None if length % shards(DIMENSIONS["positions"]) else "positions"


def groups_axes(x: jax.Array, group_size: int) -> tuple[Axes, Axes]:
    """(axes of the rows, axes of the positions) under which every device holds whole groups of x [B, S, ...].

    Where its own rows are no whole groups, devices exchange rows for positions: over the last axes of the rows, as few
    as will do. Raises AssertionError where there are too few rows or positions for that; but for a single position,
    as in generation, devices along these axes hold the same groups.
    """
    rows, named = DIMENSIONS["rows"], positions_of(x.shape[1])
    sizes = (axis_size("data"), axis_size("fsdp"), axis_size("expert"), axis_size("tensor"))
    if x.shape[1] == 1:
        return rows[: _whole_axes(x.shape[0], group_size, sizes)], ()
    kept = _kept_axes(x.shape[0], x.shape[1], group_size, sizes)
    if kept is None:
        raise AssertionError(
            f"batch B = {x.shape[0]} over {shards(rows)} devices cuts groups of G = {group_size}, and sequence "
            f"S = {x.shape[1]} does not divide for an exchange; B = {shards(rows) * group_size} would do"
        )
    moved = tuple(axis for axis in rows[kept:] if axis_size(axis) > 1)
    return rows[:kept], (DIMENSIONS[named] if named else ()) + moved


# --- products with weights --------------------------------------------------------------------------------------------


def product(
    equation: str,
    x: jax.Array,
    weight: jax.Array,
    out: PartitionSpec | None = None,
    dtype: Any = None,
    fenced: bool = True,
) -> jax.Array:
    """einsum(equation, x, weight) in x's dtype, wherever both lie; so are its gradients, before and after adding up.

    What `fsdp` has cut of a weight is gathered in x's dtype for the product alone, and again for the backward pass:
    nothing is kept of it. What `tensor` has cut of x's positions is gathered where the weight is cut by it. The
    gradient of the weight is added up straight into the weight's own parts, over its own axes last.

    Args:
        equation: with different letters for different dimensions, each in two of x, weight and the result.
        out: partition of the result; needed where both are cut along what they are contracted over, so that the
            devices add up their parts. None: as the operands are cut.
        dtype: of the result; None is x's.
        fenced: False where the caller sees to it that the compiler does not take the forward pass' gathered weight for
            the backward pass, and so keep it.
    """
    return _product(equation, out, dtype, fenced, x, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _product(
    equation: str, out: PartitionSpec | None, dtype: Any, fenced: bool, x: jax.Array, weight: jax.Array
) -> jax.Array:
    letters, of_weight, _ = _letters(equation)
    weight = _gathered(weight.astype(x.dtype))
    x = _aligned(letters, x, of_weight, weight)
    return jnp.einsum(equation, x, weight, out_sharding=out, preferred_element_type=dtype)


def _product_forward(equation, out, dtype, fenced, x, weight):
    return _product(equation, out, dtype, fenced, x, weight), (x, weight)


def _product_backward(equation, out, dtype, fenced, kept, cotangent):
    operands = (*kept, cotangent.astype(kept[0].dtype))
    x, weight, cotangent = jax.lax.optimization_barrier(operands) if fenced else operands
    of_x, of_weight, of_y = _letters(equation)
    gathered = _gathered(weight.astype(x.dtype))
    x_spec, weight_spec = (spec(*axes_of(a)) for a in (x, weight))
    cotangent = _aligned(of_y, cotangent, of_weight, gathered)
    dx = jnp.einsum(f"{of_y},{of_weight}->{of_x}", cotangent, gathered, out_sharding=x_spec)
    x = _aligned(of_x, x, of_weight, gathered)
    dw = jnp.einsum(f"{of_x},{of_y}->{of_weight}", x, cotangent, out_sharding=weight_spec)
    return dx, dw.astype(weight.dtype)


_product.defvjp(_product_forward, _product_backward)


def _letters(equation: str) -> tuple[str, str, str]:
    operands, result = equation.split("->")
    x, weight = operands.split(",")
    return x, weight, result


def _gathered(weight: jax.Array) -> jax.Array:
    """Whole along what `fsdp` has cut."""
    return reshard(weight, *(tuple(axis for axis in axes if axis != "fsdp") for axes in axes_of(weight)))


def _aligned(letters: str, x: jax.Array, of_weight: str, weight: jax.Array) -> jax.Array:
    """`x`, gathered along an axis of the mesh that cuts another dimension of the weight."""
    cut = {axis: letter for letter, axes in zip(of_weight, axes_of(weight), strict=True) for axis in axes}
    pairs = zip(letters, axes_of(x), strict=True)
    return reshard(x, *(tuple(axis for axis in axes if cut.get(axis, letter) == letter) for letter, axes in pairs))


# --- parameters and rows ----------------------------------------------------------------------------------------------


def parameter_spec(name: str, rank: int) -> PartitionSpec:
    """The partition of the parameter with this name (`…/w_in`, say); stacked leading dimensions are not split."""
    dimensions = PARAMETERS.get(name.rpartition("/")[2], ())
    leading = (None,) * (rank - len(dimensions))
    return PartitionSpec(*leading, *(DIMENSIONS[d] if d else None for d in dimensions))


def rows_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Of arrays whose first dimension, after so many `leading` ones, is the rows of the batch."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, DIMENSIONS["rows"]))


def local_rows(mesh: Mesh, batch_size: int, accumulation: int = 1) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, ascending. int [rows].

    Microbatches are neighbouring parts of the batch, and each is spread over all devices.
    """
    size = batch_size // accumulation
    index = rows_sharding(mesh).addressable_devices_indices_map((size,))
    rows = np.unique(np.concatenate([np.arange(size)[rows] for rows in index.values()]))
    return (np.arange(accumulation)[:, None] * size + rows).reshape(-1)


def place_rows(mesh: Mesh, rows: Any, batch_size: int) -> Any:
    """Global arrays [B, ...] from the rows [b, ...] (a tree of them) that `local_rows` names on each process."""

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(rows_sharding(mesh), x, (batch_size, *x.shape[1:]))

    return jax.tree.map(place, rows)


def place_microbatches(mesh: Mesh, rows: Any, batch_size: int, accumulation: int) -> Any:
    """Global arrays [A, B / A, ...], with A the accumulation, from the rows [b, ...] that `local_rows` names."""
    leaves, tree = jax.tree.flatten(rows)  # all in one call: each has its price
    local = [x.reshape(accumulation, -1, *x.shape[1:]) for x in leaves]
    shapes = [(accumulation, batch_size // accumulation, *x.shape[1:]) for x in leaves]
    placed = jax.make_array_from_process_local_data(rows_sharding(mesh, leading=1), local, shapes)
    return jax.tree.unflatten(tree, placed)
