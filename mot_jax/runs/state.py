"""The state of a run: one pytree, initialized sharded."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from mot_jax.config import Config
from mot_jax.nn.sharding import parameter_spec, replicate
from mot_jax.nn.transformer import Params, init_router, init_variables
from mot_jax.runs.optimizer import make_optimizer, stacked


class TrainState(NamedTuple):
    """The state of a run.

    Attributes:
        step: int32 scalar, steps made so far.
        params: parameters by name.
        opt_state: that of optax; its counts are of updates, and so do not count skipped steps.
        skipped: int32 scalar, steps so far whose update was skipped, because the loss or its gradient was not finite.
        skipped_in_a_row: int32 scalar, the latest steps that were all skipped.
        router: the router state by name; empty for kinds without.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    router: Params

    @property
    def variables(self) -> Params:
        """Parameters and router state: all that inference reads."""
        return self.params | self.router

    def content(self) -> dict[str, Any]:
        """The fields, as a checkpoint stores them. Router state is absent where there is none."""
        return {name: value for name, value in self._asdict().items() if name != "router" or value}


def create_state(config: Config, mesh: Mesh) -> TrainState:
    """Initialize a state; each device computes only its own shards. The values do not depend on the mesh."""
    create, key = partial(_create, config), jax.random.key(config.training.seed)
    with jax.set_mesh(mesh):  # so that JAX traces `create` once, for its shapes and for its values
        shardings = jax.tree.map(lambda leaf: leaf.sharding, _placed(jax.eval_shape(create, key), mesh))
        return jax.jit(create, out_shardings=shardings)(key)


def create_router(config: Config, mesh: Mesh) -> Params:
    """Initialize the router state alone."""
    shardings = {name: leaf.sharding for name, leaf in abstract_state(config, mesh).router.items()}
    with jax.set_mesh(mesh):
        return jax.jit(partial(init_router, config.model), out_shardings=shardings)()


COUNTERS = ("skipped", "skipped_in_a_row")


def state_of(content: dict[str, Any]) -> TrainState:
    """The state of a checkpoint, from its fields; counters that it lacks are 0."""
    sharding = content["step"].sharding
    zeros = {name: spread(np.zeros((), np.int32), sharding) for name in COUNTERS if name not in content}
    return TrainState(**({"router": {}} | content | zeros))


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    return _placed(jax.eval_shape(partial(_create, config), jax.random.key(config.training.seed)), mesh)


def _placed(shapes: TrainState, mesh: Mesh) -> TrainState:
    """The shapes of a state with the shardings of its arrays."""

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # The optimizer's state of a parameter has the parameter's name and sharding. Factored moments, of the rows or
        # columns of a matrix, have at least the leading dimensions over which matrices are stacked, and their sharding.
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        param = shapes.variables[names[-1]] if names else leaf
        spec = parameter_spec(names[-1], param.ndim) if names else PartitionSpec()
        if leaf.shape != param.shape:
            spec = PartitionSpec(*spec[: stacked(names[-1])])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, shapes)


def _create(config: Config, key: jax.Array) -> TrainState:
    params, router = init_variables(config.model, key)
    optimizer = make_optimizer(config.training.optimizer, config.training.steps)
    step, skipped, skipped_in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, params, optimizer.init(params), skipped, skipped_in_a_row, router)


def fetch(value: jax.Array) -> np.ndarray:
    """Copy a whole array into the memory of this process.

    With several processes, each calls this, with the mesh set; while it runs, each device holds the whole array.
    """
    return np.array(value if value.is_fully_addressable else jax.jit(replicate)(value))


def spread(value: np.ndarray, sharding: Sharding) -> jax.Array:
    """Place an array on devices; each process copies the shards of its own devices."""
    return jax.make_array_from_callback(value.shape, sharding, lambda part: value[part])
