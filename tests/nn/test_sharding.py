"""The mesh: its checks, and that the model on it equals the model on one device, with the documented collectives."""

import dataclasses
import math
import re
from functools import lru_cache, partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from mot_jax.config import (
    Config,
    MeshConfig,
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    TokenChoiceConfig,
    TrainingConfig,
    platform_errors,
)
from mot_jax.errors import UserError
from mot_jax.nn import sharding
from mot_jax.nn.feed_forward import FeedForwardContext, MixtureOfTokens
from mot_jax.nn.transformer import bind, get_params, init_params

B, S, V = 16, 8, 11
DATA, FSDP, EXPERT, TENSOR = (8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (2, 1, 1, 4)
SHAPES = [DATA, FSDP, EXPERT, TENSOR, (2, 2, 2, 1), (1, 1, 4, 2), (1, 2, 2, 2)]
ONE = (1, 1, 1, 1)


OPTIONS = {"num_kv_heads": 2, "positions": "rotary", "document_mask": True, "activation": "silu", "gated": True}
OPTIONS |= {"norm": "rms", "final_norm": True, "tie_embeddings": True, "remat": "attention"}


def config_of(
    shape=ONE, save_for_backward="pre_activations", shared_expert_dim=8, group_size=2, mixing=MixingConfig(), **model
) -> Config:
    kind = MixtureOfTokensConfig(
        group_size=group_size,
        num_experts=8,
        shared_expert_dim=shared_expert_dim,
        save_for_backward=save_for_backward,
        mixing=mixing,
        controller_init_scale=3.0,
    )
    widths = {"num_blocks": 2, "d_model": 16, "d_ff": 40, "num_heads": 4, "context_length": S, "vocab_size": V}
    return Config(
        ModelConfig(feed_forward=kind, loss_chunk=2, **widths | model),
        training=TrainingConfig(batch_size=B),
        mesh=MeshConfig(*shape),
    )


def mesh_for(config: Config) -> jax.sharding.Mesh:
    return sharding.make_mesh(config, jax.devices()[: math.prod(dataclasses.astuple(config.mesh))])


def shardings(config: Config, mesh: jax.sharding.Mesh) -> dict[str, NamedSharding]:
    shapes = shapes_of(config)
    return {name: NamedSharding(mesh, sharding.parameter_spec(name, v.ndim)) for name, v in shapes.items()}


def shapes_of(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    return jax.eval_shape(partial(init_params, config.model), jax.random.key(0))


def arguments(config: Config, mesh: jax.sharding.Mesh) -> tuple:
    """Parameters and tokens with the same values on every mesh, sharded."""
    rng = np.random.default_rng(0)
    shapes = shapes_of(config)
    params = {name: 0.5 * rng.normal(size=v.shape).astype(v.dtype) for name, v in shapes.items()}
    batch = (rng.integers(V, size=(B, S + 1), dtype="int32"), rng.random((B, S)) < 0.8)
    return jax.device_put(params, shardings(config, mesh)), *jax.device_put(batch, sharding.batch_sharding(mesh))


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


def collective_bytes(config: Config, kind: str, backward: bool = True) -> list[int]:
    """The bytes of each collective of this kind in the compiled program, except those of masks."""
    results = re.findall(rf"= (.*?) {kind}(?:-start)?\(", compiled(config, backward).as_text())
    shapes = [re.findall(r"f32\[([\d,]*)\]", types) for types in results if "pred" not in types]
    return [4 * sum(math.prod(map(int, shape.split(","))) for shape in parts) for parts in shapes]


# --- the model on a mesh ----------------------------------------------------------------------------------------------


CASES = {
    "plain": {},
    "every option": OPTIONS,
    "groups of the whole batch": {"group_size": 16, "save_for_backward": "all"},
    "groups of two devices, every option": {**OPTIONS, "group_size": 4, "save_for_backward": "nothing"},
    "within": {"group_size": 4, "objective": "masked", "mixing": MixingConfig(groups="within")},
}


def mesh_cases():
    """The plain case on every mesh, one of them fast; the others on the meshes with most axes."""
    for case in CASES:
        for shape in SHAPES if case == "plain" else SHAPES[-3:]:
            fast = case == "plain" and shape == SHAPES[-1]
            yield pytest.param(case, shape, marks=[] if fast else [pytest.mark.slow], id=f"{case} on {shape}")


@pytest.mark.parametrize("case, shape", [*mesh_cases()])
def test_loss_metrics_and_gradients_equal_those_of_one_device(case, shape):
    changes = CASES[case]
    if shape == TENSOR and "num_kv_heads" in changes:
        changes = {**changes, "num_kv_heads": 4}
    actual, expected = results(config_of(shape, **changes)), results(config_of(**changes))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [DATA, SHAPES[-1]], ids=str)
def test_groups_that_span_devices_are_causal_and_isolated(shape):
    """No output changes in any bit when the tokens that it must not depend on are replaced."""
    config = config_of(shape, group_size=8)
    mesh, rng = mesh_for(config), np.random.default_rng(1)
    with jax.set_mesh(mesh):
        params, tokens, _ = arguments(config, mesh)
        run = jax.jit(lambda tokens: bind(config.model, params)(tokens).hidden)
        tokens = np.asarray(tokens)[:, :S]

        def hidden(tokens: np.ndarray) -> np.ndarray:
            return np.asarray(run(sharding.place_sequences(mesh, tokens, B)))

        before = hidden(tokens)
        for _ in range(5):
            changed = rng.integers(V, size=(B, S), dtype="int32")
            changed[:8, :5] = tokens[:8, :5]
            after = hidden(changed)
            np.testing.assert_array_equal(after[:8, :5], before[:8, :5])
        changed = tokens.copy()
        changed[0, 2] = (tokens[0, 2] + 1) % V
        assert (hidden(changed)[1:8, 2] != before[1:8, 2]).any()  # the positive control: its own group


# A scan's body is counted once, forward and backward, and has one MoT layer.
EXCHANGES = {
    # mesh, changes: all-to-alls forward, backward
    "experts on all": (EXPERT, {}, (2, 2)),
    "data, fsdp and expert": ((2, 2, 2, 1), {}, (2, 2)),
    "every option": ((1, 2, 2, 2), OPTIONS, (2, 2)),
    "nothing saved": (EXPERT, {"save_for_backward": "nothing", "shared_expert_dim": 0}, (2, 2)),
    "no expert axis": (DATA, {}, (0, 0)),
    "one device": (ONE, {}, (0, 0)),
    "groups of many devices": (DATA, {"group_size": 8}, (2, 2)),
    "groups of many devices, experts": (EXPERT, {"group_size": 16}, (4, 4)),
    "groups of many devices, every axis": ((1, 2, 2, 2), {"group_size": 8}, (4, 4)),
}


FAST = {"groups of many devices"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in FAST else [pytest.mark.slow]) for c in EXCHANGES])
def test_all_to_alls(case):
    """Two forward and two backward for the experts, whatever is saved, and as many for groups that span devices.

    Their bytes are those of the activations for the groups, and those of the mixtures, k = E / G times as many, for the
    experts.
    """
    shape, changes, (forward, backward) = EXCHANGES[case]
    config = config_of(shape, **changes)
    sent = collective_bytes(config, "all-to-all", False)
    assert len(sent) == forward and len(collective_bytes(config, "all-to-all")) == forward + backward
    activations = 4 * B * S * config.model.d_model // math.prod(shape)  # bytes on one device
    mixtures = activations * 8 // config.model.feed_forward.group_size
    expected = {0: [], 2: [mixtures] * 2, 4: [activations, activations, mixtures, mixtures]}[forward]
    if "groups" in case and forward == 2:
        expected = [activations, activations]
    assert sorted(sent) == sorted(expected)


@pytest.mark.slow
def test_fsdp_gathers_only_weights_and_at_their_use():
    """Each weight of a block once forward and once backward, in the body of the scan, and the embeddings and head."""
    config = config_of(FSDP)
    sizes = {"/".join(name.split("/")[3:]): v.size // 2 for name, v in shapes_of(config).items() if "norm" not in name}
    block = [4 * size for name, size in sizes.items() if name]
    tables = [4 * V * 16, 4 * S * 16, 4 * V * 16]
    assert sorted(collective_bytes(config, "all-gather", False)) == sorted(block + tables)
    assert sorted(collective_bytes(config, "all-gather")) == sorted(2 * block + tables)
    for shape in (DATA, EXPERT):
        assert not collective_bytes(config_of(shape), "all-gather")


@pytest.mark.slow
@pytest.mark.parametrize("save_for_backward", ["nothing", "pre_activations", "all"])
@pytest.mark.parametrize("moe_blocks, bodies", [("every_other", 1), ((0, 1, 3), 2)])
def test_all_to_alls_of_deeper_models(moe_blocks, bodies, save_for_backward):
    config = config_of((2, 1, 4, 1), save_for_backward, num_blocks=4, moe_blocks=moe_blocks)
    assert len(collective_bytes(config, "all-to-all")) == 4 * bodies and not collective_bytes(config, "all-gather")


def test_initial_values_are_the_same_on_a_mesh():
    """Parameters that each device draws its shards of have the shapes and values of those without a mesh."""
    config = config_of((1, 2, 2, 2), shared_expert_dim=0)
    kind, mesh = config.model.feed_forward, mesh_for(config)

    def init(key):
        return get_params(MixtureOfTokens(16, 40, kind, rngs=nnx.Rngs(params=key)))

    expected = jax.device_get(jax.jit(init)(jax.random.key(0)))
    with jax.set_mesh(mesh):
        parameter_shardings = {
            name: NamedSharding(mesh, sharding.parameter_spec(name, v.ndim)) for name, v in expected.items()
        }
        params = jax.jit(init, out_shardings=parameter_shardings)(jax.random.key(0))
        on_mesh = jax.eval_shape(partial(init_params, config.model), jax.random.key(0))
    assert {name: value.sharding for name, value in params.items()} == parameter_shardings
    chex.assert_trees_all_close(jax.device_get(params), expected, rtol=1e-6, atol=1e-7)
    on_none = jax.eval_shape(partial(init_params, config.model), jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(on_mesh, on_none)


# --- the shardings of arrays ------------------------------------------------------------------------------------------


def test_parameter_specs():
    """The end of the name decides; leading dimensions are not sharded, other parameters are replicated."""
    expected = {
        "stacks/0/1/feed_forward/w_in": (None, ("expert",), ("fsdp",), ("tensor",)),
        "w_out": (("expert",), ("tensor",), ("fsdp",)),
        "stacks/0/0/attention/key_value": (None, ("fsdp",), None, ("tensor",), None),
        "stacks/0/0/feed_forward/shared/kernel_out": (None, ("tensor",), ("fsdp",)),
        "head": (("fsdp", "tensor"), None),
        "final_norm/scale": (None,),
    }
    for name, axes in expected.items():
        assert sharding.parameter_spec(name, len(axes)) == PartitionSpec(*axes)


def test_every_matrix_of_a_model_is_sharded():
    for name, shape in shapes_of(config_of()).items():
        assert any(sharding.parameter_spec(name, len(shape.shape))) == ("norm" not in name), name


def test_without_a_mesh_nothing_is_sharded():
    x = jnp.arange(8.0)
    assert sharding.spec("sequences", None) is None and sharding.reshard(x, "sequences") is x
    assert sharding.axis_size("expert") == sharding.num_shards(("data", "fsdp")) == 1


def test_on_a_mesh_the_table_decides(mesh_of):
    with jax.set_mesh(mesh_of(data=2, fsdp=2, expert=2)):
        assert sharding.spec("sequences", None) == PartitionSpec(("data", "fsdp", "expert"), None)
        assert (sharding.axis_size("expert"), sharding.num_shards(("data", "expert"))) == (2, 4)
        placed = sharding.reshard(jnp.zeros((8, 4)), ("data", "fsdp"), "experts")
        assert jax.typeof(placed).sharding.spec == PartitionSpec(("data", "fsdp"), "expert")
        assert sharding.axes_of(placed) == [("data", "fsdp"), ("expert",)]


@pytest.mark.parametrize(
    "sizes, batch, length, expected",
    [
        ({"data": 8}, 64, 8, (("data", "fsdp", "expert"), ("tensor",))),  # one group of 8 per device
        ({"data": 2, "expert": 4}, 16, 8, (("data", "fsdp"), ("tensor", "expert"))),
        ({"data": 2, "fsdp": 4}, 8, 8, ((), ("tensor", "data", "fsdp"))),
        ({"fsdp": 2, "expert": 2, "tensor": 2}, 16, 8, (("data", "fsdp"), ("tensor", "expert"))),
    ],
)
def test_as_few_batch_axes_as_possible_move_to_the_positions(mesh_of, sizes, batch, length, expected):
    with jax.set_mesh(mesh_of(**sizes)):
        assert sharding.whole_group_axes(jnp.zeros((batch, length)), 8) == expected


def test_a_batch_that_splits_groups_is_refused_where_positions_do_not_divide(mesh_of):
    with (
        jax.set_mesh(mesh_of(data=8)),
        pytest.raises(AssertionError, match="B = 16 over 8 devices splits groups of G = 8"),
    ):
        sharding.whole_group_axes(jnp.zeros((16, 4)), 8)


def test_a_mesh_of_other_axes_leaves_the_sharding_to_jax():
    """Axes with other names, and Auto ones."""
    types = [((8,), ("batch",), jax.sharding.AxisType.Explicit), ((8,), ("data",), jax.sharding.AxisType.Auto)]
    for sizes, names, kind in types:
        with jax.set_mesh(jax.make_mesh(sizes, names, axis_types=(kind,))):
            assert sharding.spec("sequences") is None


def test_groups_on_a_mesh_of_auto_axes_are_of_any_size():
    """Sixteen sequences of 7 tokens in groups of 4 on 8 devices, which Explicit axes could not bring together."""
    layer = MixtureOfTokens(16, 32, MixtureOfTokensConfig(4, 8), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (16, 7, 16))
    expected = layer(x).y
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        np.testing.assert_allclose(nnx.jit(lambda layer, x: layer(x).y)(layer, x), expected, rtol=1e-5, atol=1e-6)


def test_each_device_computes_its_own_experts_of_replicated_weights(mesh_of):
    """In the forward and the backward pass; the gradients are replicated, as the weights."""
    layer = MixtureOfTokens(16, 32, MixtureOfTokensConfig(4, 8), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (32, 4, 16))
    graph, params = nnx.split(layer)

    def loss(params, x):
        return jnp.square(nnx.merge(graph, params)(x).y).sum()

    expected, flops = jax.grad(loss)(params, x), {}
    for name, mesh in (("data", mesh_of(data=8)), ("expert", mesh_of(data=2, expert=4))):
        with jax.set_mesh(mesh):
            gradient = jax.jit(jax.grad(loss))
            placed = sharding.reshard(x, "sequences", None, None)
            if name == "expert":  # also with weights of which each device stores only its own
                layer.w_in.set_value(jax.device_put(layer.w_in[...], NamedSharding(mesh, PartitionSpec("expert"))))
                stored = nnx.state(layer)
                chex.assert_trees_all_close(gradient(stored, placed), expected, rtol=1e-4, atol=1e-4)
            flops[name] = gradient.lower(params, placed).compile().cost_analysis()["flops"]
            chex.assert_trees_all_close(gradient(params, placed), expected, rtol=1e-4, atol=1e-4)
    assert flops["expert"] == pytest.approx(flops["data"], rel=0.1)


def test_a_wrong_sharding_is_an_error_at_trace_time():
    """A parameter with another sharding than the table's is refused before compilation."""
    config = config_of((2, 1, 4, 1))
    mesh = mesh_for(config)
    with jax.set_mesh(mesh):
        params, *batch = arguments(config, mesh)
        name = "stacks/0/0/attention/query"
        heads_sharded = NamedSharding(mesh, PartitionSpec(None, None, None, "expert"))
        wrong = params | {name: jax.device_put(params[name], heads_sharded)}
        jax.jit(partial(loss, config)).trace(params, *batch)
        with pytest.raises(Exception, match=r"(consistent|the same) sharding"):  # of JAX 0.10 and 0.12
            jax.jit(partial(loss, config)).trace(wrong, *batch)


# --- make_mesh --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "requested, sizes",
    [((-1, 1, 1, 1), DATA), ((1, 1, -1, 1), EXPERT), ((2, -1, 2, 1), (2, 2, 2, 1)), ((2, 1, 1, 1),) * 2],
)
def test_mesh_sizes(requested, sizes):
    mesh = sharding.make_mesh(config_of(requested))
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "expert", "tensor"), sizes, strict=True))
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}


@pytest.mark.parametrize(
    "trained, devices, sizes",
    [
        ((2, 1, 1, 1), 1, (1, 1, 1, 1)),
        ((2, 4, 4, 2), 8, (1, 4, 2, 1)),
        ((1, 1, 16, 1), 8, (1, 1, 8, 1)),
        ((3, 1, 2, 1), 4, (2, 1, 2, 1)),
        ((2, 1, -1, 1), 3, (3, 1, 1, 1)),
        ((1, 1, 2, 1), 8, (1, 1, 2, 1)),  # as the run was trained, though there are more devices
        ((1, 1, 1, -1), 3, (3, 1, 1, 1)),  # 3 divides no dimension
    ],
)
def test_a_trained_model_is_read_on_the_devices_at_hand(trained, devices, sizes):
    mesh = sharding.make_mesh(config_of(trained), jax.devices()[:devices], trains=False)
    assert tuple(mesh.shape.values()) == sizes


def training(config: Config, batch_size: int, steps: int = 1) -> Config:
    return dataclasses.replace(
        config, training=TrainingConfig(batch_size=batch_size, gradient_accumulation_steps=steps)
    )


def routed(shape, sequences: int, **fields) -> Config:
    """Token choice in routing groups of so many sequences."""
    config = config_of(shape)
    kind = TokenChoiceConfig(8, routing_group_tokens=sequences * S, **fields)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=kind))


def with_kernel(shape) -> Config:
    config = config_of(shape, save_for_backward="nothing")
    kind = dataclasses.replace(config.model.feed_forward, kernel="fused_mixture")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=kind))


def test_a_batch_multiple_has_whole_routing_groups():
    mesh = jax.make_mesh((2, 1, 2, 1), sharding.AXES, devices=jax.devices()[:4])
    assert sharding.batch_multiple(routed((2, 1, 2, 1), 3), mesh) == 12
    assert sharding.batch_multiple(routed((2, 1, 2, 1), 1), mesh) == 4


def batch_fault(batch_size: int, multiple: int, group_size: int, steps: int) -> str:
    factors = f"group size {group_size} x {steps} gradient accumulation steps on 8 shards of the batch"
    return f"training.batch_size = {batch_size}: must be a multiple of {multiple} ({factors})"


FAULTS = {
    "too many devices": (
        config_of((16, 1, 1, 1)),
        ["mesh.data = 16: must divide the 8 available devices; try"],
    ),
    "not a divisor": (
        config_of((-1, 1, 3, 1)),
        ["mesh.data = -1, mesh.expert = 3: must divide the 8 available devices"],
    ),
    "batch": (
        training(config_of(DATA), 20),
        [batch_fault(20, 8, group_size=2, steps=1)],
    ),
    "gradient accumulation": (
        training(config_of(DATA), 24, 2),
        [batch_fault(24, 16, group_size=2, steps=2)],
    ),
    "positions that do not divide": (
        training(config_of(DATA, context_length=12), 24),
        ["training.batch_size = 24: must be a multiple of 16 (group size 2"],
    ),
    "experts and batch at once": (
        training(config_of((1, 1, 6, 1)), 16),
        ["mesh.expert = 6: must divide model.feed_forward.num_experts = 8; try 2", "training.batch_size = 16"],
    ),
    "experts of a kernel": (
        with_kernel((2, 1, -1, 2)),
        [
            f"mesh.{axis} = 2: model.feed_forward.kernel = 'fused_mixture' needs unsharded experts"
            for axis in ("expert", "tensor")
        ]
        + ["model.feed_forward.kernel = 'fused_mixture': is for TPU v5e, v5p and later, not cpu"],
    ),
    "heads": (config_of((1, 1, 1, 8), d_ff=72), ["mesh.tensor = 8: must divide model.num_heads = 4; try 4"] * 1),
    "routing groups": (
        routed(DATA, 4),
        [batch_fault(16, 32, group_size=4, steps=1)],
    ),
    "routed widths": (
        routed((1, 1, 2, 4), 1, shared_expert_dim=6),
        ["mesh.tensor = 4: must divide model.feed_forward.expert_dim = 34", "mesh.tensor = 4: must divide model.feed_"],
    ),
    "width": (config_of((1, 3, 1, 1)), ["mesh.fsdp = 3: must divide model.d_model = 16; try 1", "training.batch_size"]),
}


@pytest.mark.parametrize("case", FAULTS)
def test_bad_meshes_are_refused(case):
    config, starts = FAULTS[case]
    with pytest.raises(UserError) as error:
        sharding.make_mesh(config)
    for fault, start in zip(error.value.faults, starts, strict=True):
        assert fault.startswith(start) and "; try " in fault


class FakeDevice(NamedTuple):
    """A device of another slice or process, with the attributes that `make_mesh` reads."""

    id: int
    slice_index: int = 0
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_slices_are_along_the_data_axis():
    devices = [FakeDevice(i, slice_index=i % 2) for i in range(8)]
    with pytest.raises(UserError, match=r"mesh\.data = 1: must be a multiple of the 2 slices; try 2"):
        sharding.make_mesh(config_of(EXPERT), devices)


def test_kernels_of_the_layer_require_a_later_tpu_in_training():
    config = with_kernel((1, 1, 1, 1))
    for platform, kind, faults in (("tpu", "TPU v5", 0), ("tpu", "TPU v4", 1), ("gpu", "NVIDIA H100", 1)):
        assert len(list(platform_errors(config, FakeDevice(0, platform=platform, device_kind=kind)))) == faults
    assert sharding.make_mesh(config, jax.devices()[:1], trains=False)  # interpreted


def test_every_process_and_slice_must_be_used():
    for devices in ([FakeDevice(i, process_index=i // 4) for i in range(8)], [FakeDevice(i, i // 4) for i in range(8)]):
        with pytest.raises(UserError, match=r"leaves 4 of 8 devices idle; try mesh\.data = -1"):
            sharding.make_mesh(config_of((2, 1, 2, 1)), devices)


@given(
    batch=st.integers(1, 64),
    length=st.integers(1, 24),
    group_size=st.integers(1, 8),
    sizes=st.tuples(*[st.integers(1, 4)] * 4),
)
@settings(max_examples=300)
def test_valid_batch_sizes_are_the_multiples_of_one(batch, length, group_size, sizes):
    multiple = sharding._mixing_multiple(group_size, length, sizes)
    count = sharding._num_batch_axes(batch, length, group_size, sizes)
    assert (count is not None) == (batch % multiple == 0)
    assert count is None or batch % (math.prod(sizes[:count]) * group_size) == 0


@pytest.mark.slow
def test_bfloat16_on_a_mesh():
    """The dtype of the paper's configs, with groups that span devices: as close to float32 as on one device."""
    case = {"group_size": 8, "num_blocks": 2, **OPTIONS}
    exact, narrow = (jax.tree.leaves(results(config_of(dtype=t, **case))[1]) for t in ("float32", "bfloat16"))
    found = jax.tree.leaves(results(config_of((1, 2, 2, 2), dtype="bfloat16", **case))[1])
    for a, b, c in zip(found, narrow, exact, strict=True):
        scale = np.sqrt(np.mean(c**2))
        assert a.dtype == b.dtype == "float32"
        assert np.sqrt(np.mean((a - c) ** 2)) <= 2 * np.sqrt(np.mean((b - c) ** 2)) + 0.01 * scale
