"""The optimizers: the update of each for a matrix, the options of all, and their sharding on a mesh."""

import dataclasses
import math
from functools import lru_cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mot_jax.config import Config, MeshConfig, MixtureOfTokensConfig, ModelConfig, OptimizerConfig, TrainingConfig
from mot_jax.errors import UserError
from mot_jax.nn.sharding import batch_sharding, make_mesh
from mot_jax.nn.transformer import bind, init_params
from mot_jax.runs.checkpoint import Checkpoints
from mot_jax.runs.optimizer import learning_rate, make_optimizer
from mot_jax.runs.state import TrainState, abstract_state, create_state

PLAIN = OptimizerConfig(warmup_steps=0, weight_decay=0.0, clip_norm=1e30, learning_rate=1.0, min_lr_ratio=1.0)
NAMES = ("adamw", "adafactor", "muon")
SHAPES = {
    "token_embedding": (9, 4),
    "head": (4, 9),
    "stacks/0/0/attention_norm/scale": (2, 4),
    "stacks/0/0/attention/query": (2, 4, 2, 3),
    "stacks/0/0/attention/key_value": (2, 4, 2, 2, 3),
    "stacks/0/0/attention/out": (2, 2, 3, 4),
    "stacks/0/0/feed_forward/controller": (2, 4, 3),
    "stacks/0/0/feed_forward/w_in": (2, 3, 4, 5),
    "stacks/0/0/feed_forward/shared/kernel_out": (2, 6, 4),
}


def arrays(seed: int, shapes: dict = SHAPES) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), "float32") for name, shape in shapes.items()}


def updates_of(config: OptimizerConfig, gradients: list[dict], params: dict) -> list[dict]:
    optimizer = make_optimizer(config, 10)
    state, update, updates_by_step = optimizer.init(params), jax.jit(optimizer.update), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        updates_by_step.append(updates)
    return updates_by_step


# --- each optimizer ---------------------------------------------------------------------------------------------------


def test_adamw_is_optaxs_bit_for_bit():
    config, params, gradients = OptimizerConfig(), arrays(0), [arrays(1), arrays(2)]
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(learning_rate(config, 10), weight_decay=0.1))
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient, ours in zip(gradients, updates_of(config, gradients, params), strict=True):
        updates, state = update(gradient, state, params)
        chex.assert_trees_all_equal(ours, updates)


# name -> the matrices of a parameter, [many, m, n]
MATRICES = {
    "stacks/0/0/attention/query": lambda x: x.reshape(2, 4, 6),
    "stacks/0/0/attention/key_value": lambda x: np.moveaxis(x, 2, 1).reshape(4, 4, 6),
    "stacks/0/0/attention/out": lambda x: x.reshape(2, 6, 4),
    "stacks/0/0/feed_forward/controller": lambda x: x,
    "stacks/0/0/feed_forward/w_in": lambda x: x.reshape(6, 4, 5),
    "stacks/0/0/feed_forward/shared/kernel_out": lambda x: x,
}


@pytest.mark.slow
def test_muon_orthogonalizes_each_matrix_of_a_stack():
    """Its first step has the singular vectors of each gradient, and singular values of about 1."""
    params, gradients = arrays(0), arrays(1)
    gradients["stacks/0/0/feed_forward/w_in"] *= jnp.array([1.0, 1e-3, 1e3])[:, None, None]  # all the same to it
    (updates,), (plain,) = (
        updates_of(dataclasses.replace(PLAIN, name=n), [gradients], params) for n in ("muon", "adamw")
    )
    for name, update in updates.items():
        if name not in MATRICES:
            np.testing.assert_allclose(update, plain[name], rtol=1e-6)
            continue
        for g, u in zip(*(MATRICES[name](np.asarray(x, "float64")) for x in (gradients[name], update)), strict=True):
            left, _, right = np.linalg.svd(g, full_matrices=False)
            turned = left.T @ u @ right.T / (0.2 * max(u.shape) ** 0.5)
            np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-3)
            assert (np.diag(turned) < -0.6).all() and (np.diag(turned) > -1.3).all(), name


def test_adafactor_keeps_a_row_and_a_column_of_each_matrix():
    shapes = {"stacks/0/0/feed_forward/w_in": (2, 2, 128, 130), "stacks/0/0/feed_forward/bias_in": (2, 5)}
    gradients, config = arrays(1, shapes), dataclasses.replace(PLAIN, name="adafactor", beta1=0.75)
    (updates,) = updates_of(config, [gradients], arrays(0, shapes))
    for g, u in zip(
        *(x["stacks/0/0/feed_forward/w_in"].reshape(4, 128, 130) for x in (gradients, updates)), strict=True
    ):
        square = np.square(np.asarray(g, "float64"))
        rows, columns = square.mean(axis=1), square.mean(axis=0)
        expected = g / np.sqrt(np.outer(rows, columns) / rows.mean())
        expected /= max(1, np.sqrt(np.square(expected).mean()))
        np.testing.assert_allclose(u, -0.25 * expected, rtol=1e-4)
    signs = np.sign(gradients["stacks/0/0/feed_forward/bias_in"])
    np.testing.assert_allclose(updates["stacks/0/0/feed_forward/bias_in"], -0.25 * signs, rtol=1e-4)
    optimizer = make_optimizer(dataclasses.replace(config, beta1=0.0), 1)
    kept = jax.tree.leaves(jax.eval_shape(optimizer.init, gradients))
    assert max(leaf.size for leaf in kept) == 2 * 2 * 130


@pytest.mark.parametrize("name", NAMES)
def test_moments_dtype_is_of_the_first_moment(name):
    def kept(**fields):
        leaves = jax.tree.leaves(jax.eval_shape(make_optimizer(OptimizerConfig(name, **fields), 1).init, arrays(0)))
        return sorted((leaf.shape, str(leaf.dtype)) for leaf in leaves)

    wide, narrow = kept(), kept(mu_dtype="bfloat16")
    assert sorted(shape for shape, dtype in narrow if dtype == "bfloat16") == sorted(SHAPES.values())
    assert sorted((shape, dtype.replace("bfloat16", "float32")) for shape, dtype in narrow) == wide
    params = jax.tree.map(lambda x: x.astype("bfloat16"), arrays(0))
    for moments in ("float32", "bfloat16"):  # of a pure bfloat16 model: the update has the dtype of the gradient
        optimizer = make_optimizer(OptimizerConfig(name, mu_dtype=moments), 1)
        state = jax.eval_shape(optimizer.init, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(optimizer.update, params, state, params)[1], state)


def test_the_second_moment_of_bfloat16_parameters_decays():
    """After one gradient of 1, 100 of 0; bfloat16 would round 0.999 to 1."""
    gradients = jax.tree.map(lambda x: jnp.ones_like(x, "bfloat16"), arrays(0))
    optimizer = make_optimizer(dataclasses.replace(PLAIN, name="adamw", beta2=0.999), 101)
    state = optimizer.init(gradients)
    for gradient in [gradients, *[jax.tree.map(jnp.zeros_like, gradients)] * 100]:
        _, state = optimizer.update(gradient, state, gradients)
    moments = jax.tree.leaves(optax.tree.get(state, "nu"))
    assert len(moments) == len(SHAPES)
    for moment in moments:
        np.testing.assert_allclose(moment, 0.001 * 0.999**100, rtol=1e-4)


# --- options of all ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_decay_and_multipliers(decay, tied):
    """Without a gradient, only the decay is left of an update."""
    params = arrays(0)
    if tied:
        del params["head"]
    multipliers = (("controller", 3.0), ("stacks/0", 0.5), ("controller", 2.0), ("w_in", 0.0))
    config = dataclasses.replace(PLAIN, weight_decay=0.1, decay=decay, multipliers=multipliers)
    (updates,) = updates_of(config, [jax.tree.map(jnp.zeros_like, params)], params)
    for name, update in updates.items():
        factor = 0.5 if name.startswith("stacks/0") else 1
        factor *= {"controller": 6, "w_in": 0}.get(name.rpartition("/")[2], 1)
        whole = "scale" in name or name == ("token_embedding" if not tied else "")
        factor *= 0 if decay == "matrices" and whole else 1
        np.testing.assert_allclose(update, -0.1 * factor * params[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "part, near", [("contoller", "'controller'"), ("stacks/0/0/feed_foward/w_in", "'stacks/0/0/feed_forward/w_in'")]
)
def test_multipliers_of_no_parameter(part, near):
    config = OptimizerConfig(multipliers=(("controller", 2.0), (part, 3.0)))
    with pytest.raises(UserError) as error:
        make_optimizer(config, 1).init(arrays(0))
    (fault,) = error.value.faults
    assert fault.startswith("training.optimizer.multipliers = ") and "\n" not in fault
    assert fault.endswith(f"'{part}' is in no parameter's name; did you mean {near}?")


# --- on a mesh --------------------------------------------------------------------------------------------------------

B, S, V = 16, 4, 16
QUICK = {"xla_backend_optimization_level": 0}  # of machine code: to compile takes longer than to run


EIGHT = (("data", 1), ("fsdp", 2), ("expert", 2), ("tensor", 2))


def config_of(name: str, shape: tuple[tuple[str, int], ...]) -> Config:
    """Experts of 128 x 128, which Adafactor factors."""
    kind = MixtureOfTokensConfig(group_size=2, num_experts=4)
    model = ModelConfig(1, 128, 256, 2, context_length=S, vocab_size=V, feed_forward=kind, loss_chunk=2)
    optimizer = OptimizerConfig(name, learning_rate=0.01, warmup_steps=0)
    return Config(model, training=TrainingConfig(3, B, optimizer=optimizer), mesh=MeshConfig(**dict(shape)))


def mesh_of(config: Config) -> jax.sharding.Mesh:
    return make_mesh(config, jax.devices()[: math.prod(dataclasses.astuple(config.mesh))])


@lru_cache
def compiled_gradient(shape: tuple[tuple[str, int], ...]):
    """Gradients of the loss on a mesh, the same for all optimizers."""
    config = config_of("muon", shape)

    def loss(params, tokens):
        model = bind(config.model, params)
        return model.loss_sum(model(tokens).hidden, (tokens + 1) % V, tokens >= 0).loss / tokens.size

    mesh = mesh_of(config)
    tokens = jax.device_put(np.arange(B * S, dtype="int32").reshape(B, S) * 7 % V, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss)).lower(abstract_state(config, mesh).params, tokens).compile(QUICK)
    return lambda params: step(params, tokens)


def three_steps(config: Config, state: TrainState) -> tuple[list[float], TrainState]:
    """Losses and last state. Compiled for the shardings of `abstract_state`: it refuses any other, its own too."""
    optimizer, gradient = (
        make_optimizer(config.training.optimizer, 3),
        compiled_gradient(tuple(vars(config.mesh).items())),
    )

    def step(state: TrainState, gradients) -> TrainState:
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state)

    mesh, losses = mesh_of(config), []
    with jax.set_mesh(mesh):
        abstract = abstract_state(config, mesh)
        update = jax.jit(step).lower(abstract, abstract.params).compile(QUICK)
        for _ in range(3):
            loss, gradients = gradient(state.params)
            state = update(state, gradients)
            losses.append(float(loss))
    return losses, state


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "muon"])  # AdamW: tests/training
def test_on_eight_devices_and_restored(name, tmp_path):
    config, single = config_of(name, EIGHT), config_of(name, (("data", 1),))
    begin = create_state(config, mesh_of(config))
    losses, state = three_steps(config, begin)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(single, mesh_of(single)))
    expected, _ = three_steps(single, jax.device_put(jax.device_get(begin), shardings))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[2] < losses[0]

    split = [not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state)]
    kept = {"adafactor": 6, "muon": 3}[name]  # arrays for a parameter, counts too
    assert sum(split) > 2 * (1 + kept)  # all matrices, not only w_in and w_out

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, 3 * B, config)
        checkpoints.wait()
        restored = checkpoints.restore(3, single, mesh_of(single)).state
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    chex.assert_trees_all_equal_structs(restored, state)


@pytest.mark.slow
def test_all_options_together_train():
    """All options of the model and of the optimizer together, in a few steps."""
    kind = MixtureOfTokensConfig(group_size=2, num_experts=4, shared_expert_dim=8)
    choices = {"positions": "rotary", "document_mask": True, "activation": "silu", "gated": True, "norm": "rms"}
    choices |= {"final_norm": True, "tie_embeddings": True, "num_kv_heads": 1}
    config = ModelConfig(2, 16, 32, 4, context_length=S, vocab_size=V, feed_forward=kind, loss_chunk=2, **choices)
    optimizer = make_optimizer(
        OptimizerConfig(
            "muon",
            learning_rate=0.02,
            warmup_steps=2,
            decay="matrices",
            mu_dtype="bfloat16",
            multipliers=(("controller", 3.0),),
        ),
        30,
    )
    tokens = np.arange(B * S, dtype="int32").reshape(B, S) * 7 % V

    @jax.jit
    def create(key):
        params = init_params(config, key)
        return params, optimizer.init(params)

    def loss(params):
        model = bind(config, params)
        x = model(tokens, segments=np.cumsum(tokens == 0, axis=1)).hidden
        sums = model.loss_sum(x, (tokens + 1) % V, tokens >= 0, head_z=1e-3, accuracy=True)
        return sums.loss, sums

    @partial(jax.jit, compiler_options=QUICK)
    def step(params, state):
        (_, sums), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, sums

    (params, state), sums_by_step = create(jax.random.key(0, impl="rbg")), []
    for _ in range(30):
        params, state, sums = step(params, state)
        sums_by_step.append(jax.tree.map(float, sums))
    first, last = sums_by_step[0], sums_by_step[-1]
    assert last.nats < last.loss < 0.5 * first.loss and last.correct > first.correct + 16


@pytest.mark.slow
def test_the_norms_of_mixtures_are_no_matrices():
    """Scale and bias are one array [2, D], which is neither decayed with the matrices nor orthogonalized."""
    params = {
        "stacks/0/0/feed_forward/mixture_norm": jnp.ones((1, 2, 8)),
        "stacks/0/0/feed_forward/controller": jnp.ones((1, 8, 4)),
    }
    grads = jax.tree.map(lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), params)
    updates = {}
    for name in ("adamw", "muon"):
        optimizer = make_optimizer(OptimizerConfig(name, decay="matrices", weight_decay=0.5, warmup_steps=0), 10)
        updates[name], _ = optimizer.update(grads, optimizer.init(params), params)
    norm, controller = params
    np.testing.assert_allclose(updates["muon"][norm], updates["adamw"][norm], rtol=1e-5)
    assert (updates["muon"][controller] != updates["adamw"][controller]).any()
    still, _ = optimizer.update(jax.tree.map(jnp.zeros_like, grads), optimizer.init(params), params)
    assert not still[norm].any() and (still[controller] < 0).all()
