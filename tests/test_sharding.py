"""The mesh: its checks, and that the model on it is the model on one device, at the price of four all-to-alls."""

import dataclasses
import re
from functools import lru_cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mot_jax import sharding
from mot_jax.config import Config, ConfigError, MeshConfig, MixtureOfTokensConfig, ModelConfig, TrainingConfig
from mot_jax.feed_forward import FeedForwardContext, MixtureOfTokens
from mot_jax.model import bind, get_params, init_params

B, S, V = 16, 4, 11
SHAPES = [(8, 1), (1, 8), (2, 4)]
ONE = (1, 1)


CHOICES = {"num_kv_heads": 1, "positions": "rotary", "document_mask": True, "activation": "silu", "gated": True}
CHOICES |= {"norm": "rms", "final_norm": True, "tied_head": True, "remat": "attention"}


def config_of(shape=ONE, saved: str = "pre_activations", shared_dim: int = 8, **model) -> Config:
    kind = MixtureOfTokensConfig(group_size=2, num_experts=8, shared_dim=shared_dim, saved=saved)
    widths = {"num_blocks": 2, "d_model": 8, "d_ff": 16, "num_heads": 2, "context_length": S, "vocab_size": V}
    return Config(
        ModelConfig(feed_forward=kind, loss_chunk=2, **widths | model),
        training=TrainingConfig(batch_size=B),
        mesh=MeshConfig(*shape),
    )


def mesh_for(config: Config) -> jax.sharding.Mesh:
    return sharding.make_mesh(config, jax.devices()[: config.mesh.data * config.mesh.expert])


def shardings(config: Config, mesh: jax.sharding.Mesh) -> dict[str, NamedSharding]:
    shapes = jax.eval_shape(partial(init_params, config.model), jax.random.key(0))
    return {name: NamedSharding(mesh, sharding.parameter_spec(name, v.ndim)) for name, v in shapes.items()}


def arguments(config: Config, mesh: jax.sharding.Mesh) -> tuple:
    """Parameters and tokens, the same on every mesh, each where it belongs."""
    rng, where = np.random.default_rng(0), shardings(config, mesh)
    shapes = jax.eval_shape(partial(init_params, config.model), jax.random.key(0))
    params = {name: 0.5 * rng.normal(size=v.shape).astype(v.dtype) for name, v in shapes.items()}
    rows = (rng.integers(V, size=(B, S + 1), dtype="int32"), rng.random((B, S)) < 0.8)
    return jax.device_put(params, where), *jax.device_put(rows, sharding.rows_sharding(mesh))


def loss(config: Config, params, tokens, mask):
    model = bind(config.model, params)
    segments = jnp.cumsum(tokens[:, :-1] == 0, axis=1)
    out = model(tokens[:, :-1], FeedForwardContext(token_mask=mask), segments)
    return model.loss_sum(out.hidden, tokens[:, 1:], mask).loss / mask.sum(), out.metrics


@lru_cache
def compiled(config: Config, backward: bool):
    """The compiled loss (and its gradients) on the config's mesh."""
    mesh = mesh_for(config)
    function = partial(loss, config)
    with jax.set_mesh(mesh):
        function = jax.value_and_grad(function, has_aux=True) if backward else function
        return jax.jit(function).lower(*arguments(config, mesh)).compile()


@lru_cache
def results(config: Config):
    mesh = mesh_for(config)
    with jax.set_mesh(mesh):
        return jax.device_get(compiled(config, True)(*arguments(config, mesh)))


def collectives(config: Config, backward: bool = True) -> dict[str, int]:
    text = compiled(config, backward).as_text()
    return {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in ("all-to-all", "all-gather")}


# --- the model on a mesh ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, choices", [*((shape, {}) for shape in SHAPES), ((2, 4), CHOICES)])
def test_loss_metrics_and_gradients_equal_one_devices(shape, choices):
    found, expected = results(config_of(shape, **choices)), results(config_of(**choices))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


COLLECTIVES = {
    # mesh, changes, the bodies of MoT layers that have experts to reach: a scan's is counted once.
    "experts on all": ((1, 8), {}, 1),
    "data and experts": ((2, 4), {}, 1),
    "every choice": ((2, 4), CHOICES, 1),
    "nothing kept": ((1, 8), {"saved": "nothing", "shared_dim": 0}, 1),
    "no experts axis": ((8, 1), {}, 0),
    "one device": (ONE, {}, 0),
}


@pytest.mark.parametrize("case", COLLECTIVES)
def test_two_all_to_alls_forward_and_two_backward(case):
    """For each body of a MoT layer, whatever is kept; and no all-gather."""
    shape, changes, bodies = COLLECTIVES[case]
    assert collectives(config_of(shape, **changes)) == {"all-to-all": 4 * bodies, "all-gather": 0}


def test_two_all_to_alls_without_gradients():
    assert collectives(config_of((1, 8)), backward=False) == {"all-to-all": 2, "all-gather": 0}


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["nothing", "pre_activations", "all"])
@pytest.mark.parametrize("moe_blocks, bodies", [("every_other", 1), ((0, 1, 3), 2)])
def test_all_to_alls_of_deeper_models(moe_blocks, bodies, saved):
    config = config_of((2, 4), saved, num_blocks=4, moe_blocks=moe_blocks)
    assert collectives(config) == {"all-to-all": 4 * bodies, "all-gather": 0}


def test_init_is_the_same_on_a_mesh():
    """Drawn in place, each device its part, parameters have the shapes and values that they have on no mesh at all."""
    config = config_of((2, 4), shared_dim=0)
    kind, mesh = config.model.feed_forward, mesh_for(config)

    def init(key):
        return get_params(MixtureOfTokens(8, 16, kind, rngs=nnx.Rngs(params=key)))

    expected = jax.device_get(jax.jit(init)(jax.random.key(0)))
    with jax.set_mesh(mesh):
        where = {name: NamedSharding(mesh, sharding.parameter_spec(name, v.ndim)) for name, v in expected.items()}
        found = jax.jit(init, out_shardings=where)(jax.random.key(0))
        on_mesh = jax.eval_shape(partial(init_params, config.model), jax.random.key(0))
    assert {name: value.sharding for name, value in found.items()} == where
    chex.assert_trees_all_close(jax.device_get(found), expected, rtol=1e-6, atol=1e-7)
    on_none = jax.eval_shape(partial(init_params, config.model), jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(on_mesh, on_none)


# --- partitions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w_in", "w_gate", "w_out"])
def test_experts_are_spread_and_all_else_is_replicated(name):
    experts = PartitionSpec(None, ("expert",), None, None)
    assert sharding.parameter_spec(f"stacks/0/1/feed_forward/{name}", 4) == experts
    assert sharding.parameter_spec(name, 3) == PartitionSpec(("expert",), None, None)
    for other in ("head", "token_embedding", "feed_forward/controller", "feed_forward/shared/kernel_in"):
        assert not any(sharding.parameter_spec(other, 2))


def test_without_a_mesh_nothing_is_sharded():
    x = jnp.arange(8.0)
    assert sharding.spec("rows", None) is None and sharding.reshard(x, "rows") is x
    assert sharding.axis_size("expert") == sharding.shards("rows") == 1


def test_on_a_mesh_the_table_decides(mesh_of):
    with jax.set_mesh(mesh_of(2, 4)):
        assert sharding.spec("groups", None) == PartitionSpec(("data", "expert"), None)
        assert (sharding.axis_size("expert"), sharding.shards("rows"), sharding.shards("exchanged_groups")) == (4, 8, 2)
        moved = sharding.reshard(jnp.zeros((8, 4)), "exchanged_groups", "experts")
        assert jax.typeof(moved).sharding.spec == PartitionSpec("data", "expert")


def test_a_foreign_mesh_is_left_alone():
    """Somebody else's axes, Auto or by other names: the layer leaves the sharding to JAX."""
    types = [((8,), ("batch",), jax.sharding.AxisType.Explicit), ((8,), ("data",), jax.sharding.AxisType.Auto)]
    for sizes, names, kind in types:
        with jax.set_mesh(jax.make_mesh(sizes, names, axis_types=(kind,))):
            assert sharding.spec("rows") is None


def test_a_wrong_sharding_is_an_error_at_trace_time():
    """A parameter that is cut where nobody expects it: refused before anything is compiled."""
    config = config_of((2, 4))
    mesh = mesh_for(config)
    with jax.set_mesh(mesh):
        params, *rows = arguments(config, mesh)
        name = "stacks/0/0/attention/query"
        heads_cut = NamedSharding(mesh, PartitionSpec(None, None, None, "expert"))
        wrong = params | {name: jax.device_put(params[name], heads_cut)}
        jax.jit(partial(loss, config)).trace(params, *rows)
        with pytest.raises(Exception, match="illegally sharded"):  # JAX has no public name for its type
            jax.jit(partial(loss, config)).trace(wrong, *rows)


# --- make_mesh --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "axes, sizes", [((-1, 1), (8, 1)), ((1, -1), (1, 8)), ((2, -1), (2, 4)), ((2, 4), (2, 4)), ((2, 1), (2, 1))]
)
def test_mesh_sizes(axes, sizes):
    mesh = sharding.make_mesh(config_of(axes))
    assert dict(mesh.shape) == dict(zip(("data", "expert"), sizes, strict=True))
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}


FAULTS = {
    "too many devices": (config_of((16, 1)), ["mesh.data = 16, mesh.expert = 1: must divide the 8 devices"]),
    "not a divisor": (config_of((-1, 3)), ["mesh.data = -1, mesh.expert = 3: must divide the 8 devices"]),
    "batch": (
        dataclasses.replace(config_of((8, 1)), training=TrainingConfig(batch_size=24)),
        ["training.batch_size = 24: must be a multiple of group size 2 x accumulation 1 x shards 8 = 16; try 32"],
    ),
    "accumulation": (
        dataclasses.replace(config_of((8, 1)), training=TrainingConfig(batch_size=16, accumulation=2)),
        ["training.batch_size = 16: must be a multiple of group size 2 x accumulation 2 x shards 8 = 32; try 32"],
    ),
    "experts and batch at once": (
        dataclasses.replace(config_of((1, 6)), training=TrainingConfig(batch_size=16)),
        ["training.batch_size = 16", "mesh.expert = 6: must divide model.feed_forward.num_experts = 8; try 2"],
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_mesh_faults(case):
    config, starts = FAULTS[case]
    with pytest.raises(ConfigError) as error:
        sharding.make_mesh(config)
    assert len(error.value.faults) == len(starts)
    for fault, start in zip(error.value.faults, starts, strict=True):
        assert fault.startswith(start) and "; try " in fault
