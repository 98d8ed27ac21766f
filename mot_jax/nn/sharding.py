"""Sharding: one table from the dimensions of arrays to mesh axes, the mesh, and products with sharded weights.

The four axes of a mesh, and the dimensions that each of them shards:

    data     sequences of the batch, nothing else. With several TPU slices it is the outermost axis, over the slow
             network between them.
    fsdp     sequences of the batch. Also `d_model` of the parameters and of the optimizer state; each product gathers
             the weight that it uses.
    expert   sequences of the batch. Also the experts, of their weights and of the mixtures.
    tensor   attention heads, and the hidden widths of dense layers and experts (`d_ff`, `expert_dim`,
             `shared_expert_dim`), of parameters as of activations. Between the sub-layers, where activations have
             neither, the positions of the sequences. Together with `fsdp`, `d_model` of the embeddings and the head.

`DIMENSIONS` and `PARAMETERS` are this table in code. Other modules use its names for the dimensions of arrays.

All axes are Explicit: the sharding of an array is part of its type, and an inconsistent one is an error at trace time.
Where no mesh is set (`jax.set_mesh`), the functions that reshard are no-ops, so that the layers also run in other
models.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mot_jax.config import Config, FeedForwardConfig, MeshConfig, ModelConfig, platform_errors
from mot_jax.errors import UserError
from mot_jax.nn.device_order import Traffic, arrange, slice_of
from mot_jax.runtime.compilation import default_promotion, disable_cache_for_cpu_mesh

AXES = ("data", "fsdp", "expert", "tensor")

Axes = tuple[str, ...]  # the mesh axes that one dimension of an array is sharded over, outermost first
Sizes = tuple[int, int, int, int]  # of the mesh axes, in the order of AXES

DIMENSIONS: dict[str, Axes] = {
    # Of activations:
    "sequences": ("data", "fsdp", "expert"),
    "positions": ("tensor",),
    # Of activations and parameters:
    "experts": ("expert",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    # Of parameters only, d_model: of the matrices of a block, and of the embeddings and the head.
    "features": ("fsdp",),
    "embedding": ("fsdp", "tensor"),
}
# The dimensions of a parameter, by the last part of its name. A block's parameters have the leading dimension of the
# scan before these, which is not sharded. Parameters without an entry are replicated.
PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "token_embedding": (None, "embedding"),
    "position_embedding": (None, "embedding"),
    "head": ("embedding", None),
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
    "controller": ("features", None),  # of soft_moe, [D, E, P]: E over `fsdp`, so that norms over D are local
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
    """Build the Explicit mesh of `config.mesh`, laid out along the physical network of the devices (`device_order`).

    On several CPU devices this turns JAX's compilation cache off for the rest of the process, see
    `compilation.disable_cache_for_cpu_mesh`.

    Args:
        config: its `mesh` has the sizes of the axes.
        devices: all of JAX's by default.
        trains: whether the mesh must also suit the batch size of training and the kernels that training uses. If not,
            a mesh for more or other devices than there are is replaced by one for these, see `_fitting_mesh`.

    Raises:
        UserError: if the sizes do not multiply to the number of devices; if an axis does not divide a dimension that it
            shards (experts, heads, widths, sequences); or if it shards experts that a kernel needs unsharded.
    """
    devices = jax.devices() if devices is None else list(devices)
    if not trains:
        config = dataclasses.replace(config, mesh=_fitting_mesh(config, len(devices)))
    sizes = _axis_sizes(config.mesh, len(devices))
    slices = len({slice_of(device) for device in devices})
    faults = [*_model_faults(config, *sizes, slices), *(_batch_faults(config, sizes) if trains else ())]
    faults += platform_errors(config, devices[0]) if trains else ()
    if faults:
        raise UserError(*faults)
    requested = ", ".join(f"mesh.{name} = {size}" for name, size in zip(AXES, sizes, strict=True))
    used = math.prod(sizes)
    if used < len(devices) and len({(d.process_index, slice_of(d)) for d in devices}) > 1:
        raise UserError(f"{requested}: leaves {len(devices) - used} of {len(devices)} devices idle; try mesh.data = -1")
    traffic = _traffic(config, sizes)
    try:  # An axis may take a part of a dimension of the torus, for example expert = 8 on 4 x 4 x 4 chips.
        array = arrange(sizes, devices[:used], traffic)
    except (NotImplementedError, ValueError) as error:
        advice = "try axes that are products of the torus' sizes"
        raise UserError(f"{requested}: JAX cannot map these axes to this network; {advice}") from error
    mesh = Mesh(array, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    disable_cache_for_cpu_mesh(mesh)
    return mesh


def _traffic(config: Config, sizes: Sizes) -> list[Traffic]:
    """The collectives of a training step on one device, as estimates from the sizes of the model.

    Along `expert` two all-to-alls of the mixtures per layer forward and two backward, and as many of the activations
    where groups span devices; along `fsdp` two gathers of each weight and a reduce-scatter of its gradient per
    microbatch; along `tensor` two gathers and two reduce-scatters of the activations per sub-layer, forward and
    backward; and one sum of the gradients over the axes that do not shard the weight, or one per microbatch for
    experts whose sums are not deferred.
    """
    _, fsdp, expert, tensor = sizes
    m, t, kind = config.model, config.training, config.model.feed_forward
    steps, width = t.gradient_accumulation_steps, jnp.dtype(m.dtype).itemsize
    d, matrices = m.d_model, 3 if m.gated else 2
    activations = t.batch_size * m.context_length * d * width / math.prod(sizes[:3])
    experts = getattr(kind, "num_experts", 0)
    num_moe = sum(hasattr(block, "num_experts") for block in m.block_kinds())
    attention = 2 * d * d * (1 + (m.num_kv_heads or m.num_heads) / m.num_heads)
    dense = matrices * d * (m.d_ff * (m.num_blocks - num_moe) + kind.shared_dim(m.d_ff) * num_moe)
    weights = width * (m.num_blocks * attention + dense) / tensor
    hidden = getattr(kind, "hidden_dim", lambda d_ff: 0)(m.d_ff)
    expert_weights = width * num_moe * experts * matrices * d * hidden / (expert * tensor)
    per_token = getattr(kind, "top_k", None) or experts / getattr(kind, "group_size", 1)
    mixtures = activations * per_token * (getattr(kind, "capacity_factor", None) or 1)
    whole_groups = _num_whole_group_axes(t.batch_size // steps, m.group_size, sizes) if not t.batch_size % steps else 3
    tables = 4 * 2 * m.vocab_size * d / tensor
    collectives = [
        Traffic("all-to-all", (2,), 4 * num_moe * mixtures),
        Traffic("all-to-all", tuple(range(whole_groups, 3)), 4 * num_moe * activations),
        Traffic("all-gather", (1,), 2 * steps * (weights + expert_weights + tables)),
        Traffic("reduce-scatter", (1,), steps * (weights + expert_weights + tables)),
        Traffic("all-gather", (3,), 4 * m.num_blocks * activations),
        Traffic("reduce-scatter", (3,), 4 * m.num_blocks * activations),
        Traffic("all-reduce", (0,), expert_weights / fsdp * (1 if _defers_experts(kind) else steps)),
        Traffic("all-reduce", (0, 2), (weights + tables) / fsdp),
    ]
    present = (c._replace(axes=tuple(axis for axis in c.axes if sizes[axis] > 1)) for c in collectives)
    return [collective for collective in present if collective.axes and collective.bytes]


def _fitting_mesh(config: Config, num_devices: int) -> MeshConfig:
    """The mesh of `config`, or one over the devices at hand, which need not be those of the training.

    Every axis but `data` keeps the largest size that divides its own and the number of devices that are left, and
    `data` takes the rest; if the model does not allow that, `data` takes all. A model computes the same on every mesh.
    """
    mesh = config.mesh
    sizes = {name: getattr(mesh, name) for name in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    fits = num_devices % known == 0 if -1 in sizes.values() else known <= num_devices
    uses_all = known == num_devices or -1 in sizes.values() or jax.process_count() == 1
    if not (fits and uses_all):
        remaining = num_devices
        for name in AXES[1:]:
            sizes[name] = math.gcd(remaining, max(sizes[name], 1))
            remaining //= sizes[name]
        mesh = dataclasses.replace(mesh, **sizes | {"data": remaining})
    if any(_model_faults(config, *_axis_sizes(mesh, num_devices), 1)):
        mesh = dataclasses.replace(mesh, **dict.fromkeys(AXES, 1) | {"data": num_devices})
    return mesh


def _axis_sizes(mesh: MeshConfig, num_devices: int) -> Sizes:
    """The sizes of the axes, with -1 replaced by the number of the remaining devices."""
    sizes = [mesh.data, mesh.fsdp, mesh.expert, mesh.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if known > num_devices or (-1 in sizes and num_devices % known):
        requested = ", ".join(f"mesh.{name} = {size}" for name, size in zip(AXES, sizes, strict=True) if size != 1)
        remaining = num_devices
        valid: list[str] = []
        for name, size in zip(AXES[1:], sizes[1:], strict=True):
            size = math.gcd(remaining, max(size, 1))
            valid, remaining = [*valid, f"mesh.{name} = {size}"], remaining // size
        advice = f"try mesh.data = -1, {', '.join(valid)}"
        raise UserError(f"{requested}: must divide the {num_devices} available devices; {advice}")
    data, fsdp, expert, tensor = (num_devices // known if size == -1 else size for size in sizes)
    return data, fsdp, expert, tensor


def _model_faults(config: Config, data: int, fsdp: int, expert: int, tensor: int, slices: int) -> Iterator[str]:
    """Error texts for axes that do not divide a dimension of the model, or shard one that must stay whole."""
    m, kind = config.model, config.model.feed_forward
    sharded = [("expert", expert, "model.feed_forward.num_experts", getattr(kind, "num_experts", expert))]
    sharded += [("tensor", tensor, "model.num_heads", m.num_heads)]
    sharded += [("tensor", tensor, "model.num_kv_heads", m.num_kv_heads)] if m.num_kv_heads else []
    sharded += [("tensor", tensor, "model.d_ff", m.d_ff), ("fsdp", fsdp, "model.d_model", m.d_model)]
    if m.d_model % fsdp == 0:
        sharded += [("tensor", tensor, "model.d_model / mesh.fsdp", m.d_model // fsdp)]
    if (hidden_dim := getattr(kind, "hidden_dim", None)) is not None:
        sharded += [("tensor", tensor, "model.feed_forward.expert_dim", hidden_dim(m.d_ff))]
        sharded += [("tensor", tensor, "model.feed_forward.shared_expert_dim", kind.shared_dim(m.d_ff))]
    sharded += [("fsdp", fsdp, f"model.feed_forward.{name}", size) for name, size in kind.sizes_over_fsdp.items()]
    for axis, size, name, width in sharded:
        if width % size:
            yield f"mesh.{axis} = {size}: must divide {name} = {width}; try {math.gcd(size, width)}"
    if (kernel := getattr(kind, "kernel", "xla")) != "xla":
        for axis, size in (("expert", expert), ("tensor", tensor)):
            if size > 1:
                yield f"mesh.{axis} = {size}: model.feed_forward.kernel = {kernel!r} needs unsharded experts; try 1"
    if data % slices:
        yield f"mesh.data = {data}: must be a multiple of the {slices} slices; try {slices}"


def _batch_faults(config: Config, sizes: Sizes) -> Iterator[str]:
    """The error text, if any, for a microbatch that the mesh cannot hold in whole groups."""
    t, m = config.training, config.model
    multiple = _model_multiple(m, sizes)
    sequences = t.batch_size // t.gradient_accumulation_steps
    if sequences % multiple:
        nearest = max(1, round(sequences / multiple)) * multiple * t.gradient_accumulation_steps
        group_size, shards = max(m.group_size, m.sequences_per_routing_group), math.prod(sizes[:3])
        factors = f"group size {group_size} x {t.gradient_accumulation_steps} gradient accumulation steps"
        rule = f"must be a multiple of {multiple * t.gradient_accumulation_steps}"
        yield f"training.batch_size = {t.batch_size}: {rule} ({factors} on {shards} shards of the batch); try {nearest}"


def batch_multiple(config: Config, mesh: Mesh) -> int:
    """The smallest batch size whose groups the devices of the mesh can bring together; its multiples work too."""
    shape = mesh.shape
    sizes = (shape["data"], shape["fsdp"], shape["expert"], shape["tensor"])
    return math.lcm(config.group_size, _model_multiple(config.model, sizes))


def mixing_multiple(group_size: int, length: int) -> int:
    """The smallest batch size of sequences of this length whose mixing groups the mesh that is set can bring together.

    A multiple of the group size, and of the devices that shard sequences.
    """
    return _mixing_multiple(group_size, length, _sizes())


def _model_multiple(model: ModelConfig, sizes: Sizes) -> int:
    """As `batch_multiple`. Devices may exchange sequences of a mixing group, but not of a routing group."""
    multiple = _mixing_multiple(model.group_size, model.context_length, sizes)
    return math.lcm(multiple, model.sequences_per_routing_group * math.prod(sizes[:3]))


def _mixing_multiple(group_size: int, length: int, sizes: Sizes) -> int:
    shards = math.prod(sizes[:3])
    return next(n for n in itertools.count(shards, shards) if _num_batch_axes(n, length, group_size, sizes) is not None)


def _num_batch_axes(batch: int, length: int, group_size: int, sizes: Sizes) -> int | None:
    """The number of mesh axes, of data, fsdp and expert in this order, that shard [B, S, ...] by whole groups.

    The remaining ones must shard the positions instead, so their sizes must divide the length. None if they do not, or
    if there are too few sequences.
    """
    *axes, tensor = sizes
    if batch % group_size or batch % math.prod(axes):
        return None
    count = _num_whole_group_axes(batch, group_size, sizes)
    position_shards = math.prod(axes[count:]) * (1 if length % tensor else tensor)
    return None if length % position_shards else count


def _num_whole_group_axes(batch: int, group_size: int, sizes: Sizes) -> int:
    """As `_num_batch_axes`, whatever the length."""
    return max((k for k in range(4) if batch % (math.prod(sizes[:k]) * group_size) == 0), default=0)


# --- the shardings of arrays, and changing them -----------------------------------------------------------------------


def axis_size(name: str) -> int:
    """The size of an axis of the mesh that is set; 1 without this axis or without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(name, 1)


def _sizes() -> Sizes:
    return axis_size("data"), axis_size("fsdp"), axis_size("expert"), axis_size("tensor")


def num_shards(axes: Axes) -> int:
    """The number of shards of a dimension that is sharded over these axes."""
    return math.prod(axis_size(axis) for axis in axes)


def _explicit_axes() -> set[str]:
    """Those of `AXES` that the mesh that is set has as Explicit axes."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {name for name in AXES if types.get(name) == AxisType.Explicit}


def axes_of(x: jax.Array) -> list[Axes]:
    """The mesh axes, of `AXES`, that each dimension of `x` is sharded over, according to its type."""
    explicit = _explicit_axes()
    entries = [
        (entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in jax.typeof(x).sharding.spec.partitions
    ]
    entries += [()] * (x.ndim - len(entries))
    return [tuple(axis for axis in entry if axis in explicit) for entry in entries]


def spec(*dimensions: str | Axes | None) -> PartitionSpec | None:
    """The PartitionSpec of an array on the mesh that is set.

    Args:
        dimensions: for each dimension of the array a key of `DIMENSIONS`, mesh axes, or None for an unsharded one.

    Returns:
        The spec; None, which leaves the sharding to JAX, if the mesh that is set has none of `AXES` as Explicit axes.
    """
    if not (explicit := _explicit_axes()):
        return None
    entries = (DIMENSIONS[d] if isinstance(d, str) else d or () for d in dimensions)
    return PartitionSpec(*(tuple(axis for axis in axes if axis in explicit) or None for axes in entries))


def reshard(x: jax.Array, *dimensions: str | Axes | None) -> jax.Array:
    """`jax.reshard` to `spec(*dimensions)`: a collective where devices must exchange data.

    A parameter whose gradient sums are deferred (`defer_gradient_sums`) remains one.
    """
    target = spec(*dimensions)
    return x if target is None else jax.reshard(x, target.update(reduced=deferred_axes(x)))


def replicate(x: jax.Array) -> jax.Array:
    """Reshard `x` to a full copy on every device (an all-gather). Its gradient has the sharding of `x`."""
    return reshard(x, *[None] * x.ndim)


@jax.custom_vjp
def pin_cotangent_sharding(x: jax.Array) -> jax.Array:
    """Return `x`, and keep its cotangent in the sharding of its type.

    The compiled program gives the carry of a loop no sharding of its own, and the partitioner may choose another one
    for it, at the price of an exchange. An operation on the cotangent has a sharding. A `reshard` does not help: JAX
    drops one that changes nothing.
    """
    return x


pin_cotangent_sharding.defvjp(lambda x: (x, None), lambda _, cotangent: (cotangent * jnp.ones((), cotangent.dtype),))


def positions_dimension(length: int) -> str | None:
    """The entry for `spec` of S positions between the sub-layers: "positions", or None if its axes do not divide S."""
    return None if length % num_shards(DIMENSIONS["positions"]) else "positions"


def whole_group_axes(x: jax.Array, group_size: int) -> tuple[Axes, Axes]:
    """The mesh axes for the sequences and for the positions of x [B, S, ...] such that each device has whole groups.

    Where the sequences of one device are only a part of a group, the last axes of the sequences, as few as possible,
    shard the positions instead. With S = 1, as in a decode step, they replicate: devices along them have the same
    groups.

    Where the mesh that is set has none of `AXES` as Explicit axes, nothing is resharded, and any x will do.

    Raises:
        AssertionError: if B or S is too small for that, or not divisible.
    """
    batch_axes, dimension, sizes = DIMENSIONS["sequences"], positions_dimension(x.shape[1]), _sizes()
    if not _explicit_axes():
        return batch_axes, ()
    if x.shape[1] == 1:
        return batch_axes[: _num_whole_group_axes(x.shape[0], group_size, sizes)], ()
    count = _num_batch_axes(x.shape[0], x.shape[1], group_size, sizes)
    if count is None:
        shards = num_shards(batch_axes)
        raise AssertionError(
            f"batch B = {x.shape[0]} over {shards} devices splits groups of G = {group_size}, and sequence "
            f"S = {x.shape[1]} cannot be sharded instead; B = {shards * group_size} would do"
        )
    moved = tuple(axis for axis in batch_axes[count:] if axis_size(axis) > 1)
    return batch_axes[:count], (DIMENSIONS[dimension] if dimension else ()) + moved


# --- products with weights --------------------------------------------------------------------------------------------


def product(
    equation: str,
    x: jax.Array,
    weight: jax.Array,
    out: PartitionSpec | None = None,
    dtype: Any = None,
    fenced: bool = True,
    precision: jax.lax.Precision | None = None,
) -> jax.Array:
    """einsum(equation, x, weight), computed in x's dtype, of operands with any sharding.

    The shards of the weight along `fsdp` are gathered in x's dtype for this product, and once more for the backward
    pass, so that no gathered weight is saved for it. Positions of x that are sharded over `tensor` are gathered if the
    weight is sharded over `tensor`. Of a weight that has all experts on every device, each device takes those of its
    own part of x. Each gradient has the sharding of its operand; that of the weight is reduced
    directly into the weight's shards.

    Args:
        equation: of einsum. Each letter stands for one dimension and is in two or three of x, weight and the result.
        out: the sharding of the result. Required where both operands are sharded along a contracted dimension, so that
            the devices must add their partial sums. None: it follows from the operands.
        dtype: of the result; None: x's.
        fenced: whether an optimization barrier keeps the compiler from reusing the gathered weight of the forward pass
            in the backward pass, and so from saving it. False where the caller has such a barrier.
        precision: of the product and of its gradients; None: that of JAX, which for float32 is less on GPUs and TPUs.
    """
    return _product(equation, out, dtype, fenced, precision, x, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _product(
    equation: str,
    out: PartitionSpec | None,
    dtype: Any,
    fenced: bool,
    precision: jax.lax.Precision | None,
    x: jax.Array,
    weight: jax.Array,
) -> jax.Array:
    of_x, of_weight, of_y = _subscripts(equation)
    weight = _local_batch(of_weight, _gather_fsdp(undeferred(weight).astype(x.dtype)), of_x, x, of_y)
    x = _align(of_x, x, of_weight, weight, of_y)
    return jnp.einsum(equation, x, weight, out_sharding=out, preferred_element_type=dtype, precision=precision)


def _product_forward(equation, out, dtype, fenced, precision, x, weight):
    return _product(equation, out, dtype, fenced, precision, x, weight), (x, weight)


@default_promotion()
def _product_backward(equation, out, dtype, fenced, precision, residuals, cotangent):
    x, weight = residuals
    weight_dtype, cotangent = weight.dtype, cotangent.astype(x.dtype)
    if fenced:
        x, weight, cotangent = _fenced_operands(x, weight, cotangent)
    of_x, of_weight, of_y = _subscripts(equation)
    gathered = _local_batch(of_weight, _gather_fsdp(undeferred(weight).astype(x.dtype)), of_x, x, of_y)
    x_spec, weight_spec = (spec(*axes_of(a)) for a in (x, weight))
    cotangent = _align(of_y, cotangent, of_weight, gathered, of_x)
    dx = jnp.einsum(f"{of_y},{of_weight}->{of_x}", cotangent, gathered, out_sharding=x_spec, precision=precision)
    x = _align(of_x, x, of_weight, gathered, of_y)
    contract = partial(jnp.einsum, f"{of_x},{of_y}->{of_weight}", x, cotangent, precision=precision)
    if not deferred_axes(weight):
        local = _local_batch(of_weight, weight, of_x, x, of_y)
        dw = contract(out_sharding=spec(*axes_of(local)))
        return dx, (dw if local is weight else jax.reshard(dw, weight_spec)).astype(weight_dtype)
    axes = dict(zip(of_x + of_y, axes_of(x) + axes_of(cotangent), strict=True))
    summed = frozenset(itertools.chain(*(axes[letter] for letter in axes if letter not in of_weight)))
    dw = contract(out_sharding=PartitionSpec(*(axes[letter] or None for letter in of_weight), unreduced=summed))
    return dx, _as_gradient(dw, weight).astype(weight_dtype)


_product.defvjp(_product_forward, _product_backward)


def _fenced_operands(*operands: jax.Array) -> tuple[jax.Array, ...]:
    """Pass x, weight and cotangent through a barrier, and cast the weight to x's dtype.

    On a GPU only a weight that has to be gathered passes, after the cast: XLA fuses neither the cast nor an activation
    function into a product, across a barrier, so that both passes would run them as programs of their own.
    """
    gathers = any("fsdp" in axes for axes in axes_of(operands[1])) and axis_size("fsdp") > 1

    def default(x: jax.Array, weight: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, ...]:
        x, weight, cotangent = jax.lax.optimization_barrier((x, weight, cotangent))
        return x, weight.astype(x.dtype), cotangent

    def gpu(x: jax.Array, weight: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, ...]:
        weight = weight.astype(x.dtype)
        if gathers:
            weight, cotangent = jax.lax.optimization_barrier((weight, cotangent))
        return x, weight, cotangent

    return select_by_platform(gpu, default, *operands)


def select_by_platform(gpu: Callable[..., Any], default: Callable[..., Any], *operands: Any) -> Any:
    """`gpu(*operands)` in a program compiled for GPUs, attached or not, else `default(*operands)`."""
    return jax.lax.platform_dependent(*operands, cuda=gpu, rocm=gpu, default=default)


def _subscripts(equation: str) -> tuple[str, str, str]:
    operands, result = equation.split("->")
    x, weight = operands.split(",")
    return x, weight, result


def _gather_fsdp(weight: jax.Array) -> jax.Array:
    return reshard(weight, *(tuple(axis for axis in axes if axis != "fsdp") for axes in axes_of(weight)))


def _local_batch(of_weight: str, weight: jax.Array, of_x: str, x: jax.Array, of_result: str) -> jax.Array:
    """Shard the batch dimensions of a product that are sharded in x and not in the weight as in x: a local slice."""
    in_x = dict(zip(of_x, axes_of(x), strict=True))
    axes = [
        in_x[letter] if letter in of_x and letter in of_result and not in_weight else in_weight
        for letter, in_weight in zip(of_weight, axes_of(weight), strict=True)
    ]
    return weight if axes == axes_of(weight) else reshard(weight, *axes)


def _align(of_x: str, x: jax.Array, of_weight: str, weight: jax.Array, of_result: str) -> jax.Array:
    """Reshard `x` for its product with `weight`.

    A mesh axis that shards a dimension of the weight may shard no other dimension of x. A batch dimension of the
    product, whose letter is in all three, is sharded as in the weight: JAX 0.12 requires equal shardings there.
    """
    weight_axes = dict(zip(of_weight, axes_of(weight), strict=True))
    letter_of_axis = {axis: letter for letter, axes in weight_axes.items() for axis in axes}

    def aligned_axes(letter: str, axes: Axes) -> Axes:
        if letter in of_weight and letter in of_result:
            return weight_axes[letter]
        return tuple(axis for axis in axes if letter_of_axis.get(axis, letter) == letter)

    return reshard(x, *map(aligned_axes, of_x, axes_of(x)))


# --- gradients that are summed over devices once a step ---------------------------------------------------------------


# Parameters that only products and look-ups read. Elementwise operations need the gradients of the others, scales and
# biases, at once.
DEFERRABLE = frozenset(
    "token_embedding position_embedding head query key_value out kernel_in kernel_gate kernel_out controller "
    "emit_controller w_in w_gate w_out".split()
)


def defer_gradient_sums(params: dict[str, jax.Array], model: ModelConfig) -> dict[str, jax.Array]:
    """Return `params` with types whose gradients are partial sums: each device has that of its own sequences.

    In terms of JAX's types: a parameter that is `reduced` over the mesh axes that shard sequences, except those that
    shard the parameter, has a gradient that is `unreduced` over them. Such gradients can be added, and are summed over
    devices by `sum_gradients`. Sums over the axes that shard the parameter, such as `fsdp`, are not deferred: the
    partial sums would have the size of the whole parameter. The shards have the same sizes with and without.

    Args:
        params: by name.
        model: experts that do not run as products, but in kernels of Pallas or without a capacity, are not deferred.
    """
    experts = _defers_experts(model.feed_forward)

    def defer(name: str, x: jax.Array) -> jax.Array:
        suffix, sharded_over = name.rpartition("/")[2], set(itertools.chain(*axes_of(x)))
        batch_axes = (axis for axis in DIMENSIONS["sequences"] if axis_size(axis) > 1 and axis in _explicit_axes())
        axes = frozenset(batch_axes) - sharded_over
        if suffix not in DEFERRABLE or (not experts and suffix in ("w_in", "w_gate", "w_out")) or not axes:
            return x
        return jax.reshard(x, PartitionSpec(*jax.typeof(x).sharding.spec.partitions, reduced=axes))

    return {name: defer(name, x) for name, x in params.items()}


def _defers_experts(kind: FeedForwardConfig) -> bool:
    """Whether the gradients of the experts are deferred: whether they run as products in XLA, on their own devices."""
    has_capacity = getattr(kind, "capacity_factor", 1.0) is not None
    return getattr(kind, "kernel", "xla") == "xla" and kind.experts_share_computation and has_capacity


def deferred_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes over which the sum of the gradient of `x` is deferred."""
    return jax.typeof(x).sharding.spec.reduced


def undeferred(x: jax.Array) -> jax.Array:
    """`x` with a gradient that is summed over devices at once."""
    return jax.reshard(x, spec(*axes_of(x))) if deferred_axes(x) else x


def _as_gradient(gradient: jax.Array, x: jax.Array) -> jax.Array:
    """Sum a gradient, unreduced over some mesh axes, over those that are not deferred, and shard it as `x`."""
    return jax.reshard(gradient, PartitionSpec(*jax.typeof(x).sharding.spec.partitions, unreduced=deferred_axes(x)))


def sum_gradients(gradients: dict[str, jax.Array], model: ModelConfig) -> dict[str, jax.Array]:
    """Sum partial sums over the devices.

    In `model.dtype` where a step without accumulation does so, which is in products with weights; those of controllers
    in float32 for every kind.
    """

    def total(name: str, gradient: jax.Array) -> jax.Array:
        if not jax.typeof(gradient).sharding.spec.unreduced:
            return gradient
        in_float32 = name.endswith(("embedding", "head", "controller"))
        narrow = gradient if in_float32 else gradient.astype(model.dtype)
        return jax.reshard(narrow, spec(*axes_of(gradient))).astype(gradient.dtype)

    return {name: total(name, gradient) for name, gradient in gradients.items()}


def sum_leading(x: jax.Array, dimensions: int, like: jax.Array) -> jax.Array:
    """Sum x over so many leading dimensions, to a gradient of `like`, whose sums over devices are deferred."""
    axes = axes_of(x)
    summed = frozenset(itertools.chain(*axes[:dimensions]))
    partial_sums = PartitionSpec(*(a or None for a in axes[dimensions:]), unreduced=summed)
    total = jax.lax.reduce_sum(x, axes=range(dimensions), out_sharding=partial_sums)
    if any(axes[dimensions:]):  # gathered before it is sharded as `like`: one all-gather, as without deferral
        total = jax.reshard(total, PartitionSpec(*[None] * total.ndim, unreduced=summed))
    return _as_gradient(total, like)


def scale_gradient(gradient: jax.Array, factor: jax.Array) -> jax.Array:
    """The product of a gradient, whose sums over devices may be deferred, and a scalar."""
    unreduced = jax.typeof(gradient).sharding.spec.unreduced
    return gradient * (jax.reshard(factor, PartitionSpec(reduced=unreduced)) if unreduced else factor)


def look_up(table: jax.Array, indices: jax.Array, out: PartitionSpec | None) -> jax.Array:
    """The rows [B, S, D] of `table` [V, D] with these indices int32 [B, S]."""
    if not deferred_axes(table):
        return replicate(table).at[indices].get(out_sharding=out)
    return _look_up(out, table, indices)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(out: PartitionSpec, table: jax.Array, indices: jax.Array) -> jax.Array:
    return replicate(undeferred(table)).at[indices].get(out_sharding=out)


def _look_up_backward(out, residuals, cotangent):
    table, indices = residuals
    summed = frozenset(itertools.chain(*axes_of(indices)))
    partial_sums = PartitionSpec(None, None, unreduced=summed)
    gradient = jnp.zeros(table.shape, cotangent.dtype).at[indices].add(cotangent, out_sharding=partial_sums)
    return _as_gradient(gradient, table).astype(table.dtype), None


_look_up.defvjp(lambda out, table, indices: (_look_up(out, table, indices), (table, indices)), _look_up_backward)


def add_to_sequences(x: jax.Array, table: jax.Array) -> jax.Array:
    """x [B, S, D] + table [S, D]."""
    return x + (_broadcast(spec(*axes_of(x)), x.shape[0], table) if deferred_axes(table) else replicate(table))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _broadcast(out: PartitionSpec, batch: int, table: jax.Array) -> jax.Array:
    return jnp.broadcast_to(replicate(undeferred(table)), (batch, *table.shape), out_sharding=out)


def _broadcast_backward(out, batch, table, cotangent):
    return (sum_leading(cotangent, 1, table).astype(table.dtype),)


_broadcast.defvjp(lambda out, batch, table: (_broadcast(out, batch, table), table), _broadcast_backward)


# --- placing parameters and batches -----------------------------------------------------------------------------------


def parameter_spec(name: str, rank: int) -> PartitionSpec:
    """The PartitionSpec of the parameter with this name, for example `stacks/0/0/feed_forward/w_in`.

    Leading dimensions beyond those of `PARAMETERS` are not sharded.
    """
    dimensions = PARAMETERS.get(name.rpartition("/")[2], ())
    leading = (None,) * (rank - len(dimensions))
    return PartitionSpec(*leading, *(DIMENSIONS[d] if d else None for d in dimensions))


def host_device() -> jax.Device:
    """A device in the memory of this machine: a CPU, or, if JAX_PLATFORMS leaves CPUs out, its first device."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The sharding of arrays [..., B, ...], with so many unsharded `leading` dimensions before the sequences."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, DIMENSIONS["sequences"]))


def local_sequences(mesh: Mesh, batch_size: int, gradient_accumulation_steps: int = 1) -> np.ndarray:
    """The indices, ascending, of the sequences of a global batch that this process's devices hold: int [b].

    Microbatches are contiguous parts of the batch, and each of them is sharded over all devices.
    """
    size = batch_size // gradient_accumulation_steps
    slices = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    indices = np.unique(np.concatenate([np.arange(size)[index] for index in slices]))
    return (np.arange(gradient_accumulation_steps)[:, None] * size + indices).reshape(-1)


def place_sequences(mesh: Mesh, sequences: Any, batch_size: int) -> Any:
    """Global arrays [B, ...] from a tree of each process's `local_sequences`, [b, ...]."""

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(batch_sharding(mesh), x, (batch_size, *x.shape[1:]))

    return jax.tree.map(place, sequences)


def place_microbatches(mesh: Mesh, sequences: Any, batch_size: int, gradient_accumulation_steps: int) -> Any:
    """Global arrays [A, B / A, ...], A gradient accumulation steps, from a tree of `local_sequences`, [b, ...]."""
    steps = gradient_accumulation_steps
    leaves, tree = jax.tree.flatten(sequences)
    local = [x.reshape(steps, -1, *x.shape[1:]) for x in leaves]
    shapes = [(steps, batch_size // steps, *x.shape[1:]) for x in leaves]
    # One call for all leaves, since each call has a fixed cost.
    placed = jax.make_array_from_process_local_data(batch_sharding(mesh, leading=1), local, shapes)
    return jax.tree.unflatten(tree, placed)
