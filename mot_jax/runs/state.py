"""The state of a run: one pytree, born sharded."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from mot_jax.config import Config
from mot_jax.nn.sharding import parameter_spec, replicate
from mot_jax.nn.transformer import Params, init_params
from mot_jax.runs.optimizer import make_optimizer, stacked


class TrainState(NamedTuple):
    """step: int32 scalar, updates made so far. params: by name. opt_state: optax's."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState


def create_state(config: Config, mesh: Mesh) -> TrainState:
    """A new state; each device makes only the shards it holds. The values do not depend on the mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    with jax.set_mesh(mesh):
        return jax.jit(partial(_create, config), out_shardings=shardings)(jax.random.key(config.training.seed))


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    shapes = jax.eval_shape(partial(_create, config), jax.random.key(config.training.seed))

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # What the optimizer keeps of a parameter has its name, and lies where the parameter does. What it keeps of the
        # rows or columns of a matrix has at least the dimensions over which matrices are stacked, and is cut by those.
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        param = shapes.params[names[-1]] if names else leaf
        spec = parameter_spec(names[-1], param.ndim) if names else PartitionSpec()
        if leaf.shape != param.shape:
            spec = PartitionSpec(*spec[: stacked(names[-1])])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, shapes)


def _create(config: Config, key: jax.Array) -> TrainState:
    params = init_params(config.model, key)
    optimizer = make_optimizer(config.training.optimizer, config.training.steps)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def fetch(value: jax.Array) -> np.ndarray:
    """All of an array in this process's memory, a copy.

    Of several processes, each calls it, with the mesh set; then each device needs room for the array meanwhile.
    """
    return np.array(value if value.is_fully_addressable else jax.jit(replicate)(value))


def spread(value: np.ndarray, sharding: Sharding) -> jax.Array:
    """The parts of it that this process's devices hold."""
    return jax.make_array_from_callback(value.shape, sharding, lambda part: value[part])
