"""The layer of the inference mode `companions`: equal to the oracle's Mixture of Tokens with these companions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from variants import VARIANTS

from mot_jax.config import CompanionsConfig, MixingConfig, MixtureOfTokensConfig
from mot_jax.nn.feed_forward import Companions, FeedForwardContext, MixtureOfTokens
from mot_jax.nn.feed_forward.companions import summarise
from mot_jax.nn.sharding import batch_sharding, parameter_spec

B, S, D, G, E, F = 3, 4, 3, 4, 6, 4
STEP = 4  # of the 10 of the annealing
ANNEALED = {"linear": 0.6, "cosine": (1 + np.cos(0.4 * np.pi)) / 2}  # the temperature at that step
NAMES = [name for name, mixing in VARIANTS.items() if mixing.groups == "across"]
FAST = {
    "default",
    "emit over experts",
    "no softmax",
    "top-token emit",
    "learnable temperature, separate",
    "uniform mixing",
}
CASES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
GATED = {"separate controllers", "layer norm"}
CONTEXT = FeedForwardContext(step=jnp.asarray(STEP))


def pair_of(name: str, dtype: str = "float64", **changes) -> tuple[MixtureOfTokens, Companions]:
    """The trained layer, its parameters drawn at random, and the layer with companions, whose constants are not set."""
    kind = MixtureOfTokensConfig(G, E, F, mixing=VARIANTS[name], shared_expert_dim=2 if name == "default" else 0)
    config = CompanionsConfig(**vars(kind), **({"num_positions": S} | changes))
    return filled(MixtureOfTokens, kind, name, dtype), filled(Companions, config, name, dtype)


def filled(cls: type, kind: MixtureOfTokensConfig, name: str, dtype: str):
    """A layer whose parameters are standard normal numbers, the same for both classes."""
    options = {"gated": name in GATED, "dtype": dtype, "param_dtype": dtype}
    graph, state = nnx.split(nnx.eval_shape(lambda: cls(D, 8, kind, rngs=nnx.Rngs(params=0), **options)))
    rng, flat = np.random.default_rng(0), nnx.to_flat_state(state)
    values = []
    for path, variable in sorted(flat, key=lambda item: (item[1].type is not nnx.Param, item[0])):
        scale = 0.3 if path[-1] in ("temperature", "emit_temperature") else 1.0
        values.append((path, variable.replace(jnp.asarray(scale * rng.normal(size=variable.shape), dtype))))
    return nnx.merge(graph, nnx.from_flat_state(values))


def set_companions(layer: Companions, trained: MixtureOfTokens, companions: np.ndarray) -> None:
    """Set the constants of the layer from its companions [G, S, D]."""
    for name, value in summarise(trained, jnp.asarray(companions), CONTEXT).items():
        if getattr(layer, name) is not None:
            getattr(layer, name)[...] = value[0]


def normal(seed: int, batch: int = B) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, S, D))


def parameters(layer: MixtureOfTokens) -> dict[str, np.ndarray]:
    """Named as in the oracle."""
    return {path[-1]: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(layer, nnx.Param))}


def expected(name: str, trained: MixtureOfTokens, x: np.ndarray, companions: np.ndarray) -> np.ndarray:
    """[B, S, D]: the oracle's update of each sequence in a group with all companions except the first."""
    c, p = VARIANTS[name], parameters(trained)
    groups = np.concatenate([np.concatenate([sequence[None], companions[1:]]) for sequence in x])
    anchor = {"x": groups, **p} if c.straight_through else None
    t = ANNEALED.get(c.annealing, c.temperature)
    layer = oracle.MixtureOfTokens(G, c.merge, t, None, c.emit, positive=c.positive_temperature, anchor=anchor)
    return layer.forward({"x": groups, **p})[::G]


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_mixing_with_the_companions(name):
    """To 1e-9 in float64, also for a sequence in reverse order with the positions of its tokens."""
    x, companions = normal(1), normal(2, G)
    with jax.enable_x64(True):
        trained, layer = pair_of(name)
        set_companions(layer, trained, companions)
        reference = expected(name, trained, x, companions)
        np.testing.assert_allclose(layer(jnp.asarray(x), CONTEXT).y, reference, rtol=1e-9, atol=1e-9)
        reversed_positions = np.tile(np.arange(S)[::-1], (B, 1)).astype(np.int32)
        y = layer(jnp.asarray(x[:, ::-1]), dataclasses.replace(CONTEXT, positions=reversed_positions)).y
        np.testing.assert_allclose(y[:, ::-1], reference, rtol=1e-9, atol=1e-9)


def test_padding_tokens_have_zero_updates():
    trained, layer = pair_of("uniform emit", "float32")
    set_companions(layer, trained, normal(2, G))
    mask = np.random.default_rng(0).random((B, S)) < 0.5
    x = jnp.asarray(normal(1), "float32")
    plain, masked = (layer(x, dataclasses.replace(CONTEXT, token_mask=m)).y for m in (None, mask))
    assert not np.asarray(masked)[~mask].any()
    np.testing.assert_array_equal(masked[mask], plain[mask])


@pytest.mark.parametrize("positions", [pytest.param(S, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("name", ["default", pytest.param("emit over experts", marks=pytest.mark.slow)])
def test_experts_that_do_not_run_are_replaced_by_their_outputs_for_the_companions(name, positions):
    """Equal to a loop over tokens; with k = E, to the layer without `experts_per_token`.

    One position: the constants are averages over positions.
    """
    x, companions = normal(1), normal(2, G)
    k = 2
    with jax.enable_x64(True):
        trained, full = pair_of(name, num_positions=S)
        set_companions(full, trained, companions)
        _, sparse = pair_of(name, num_positions=positions, experts_per_token=k)
        constants = {n: v[0] for n, v in summarise(trained, jnp.asarray(companions), CONTEXT).items()}
        if positions == 1:
            constants = {n: v.mean(axis=0, keepdims=True) for n, v in constants.items()}
        for key in ("companion_mixtures", "companion_outputs", "companion_logits"):
            getattr(sparse, key)[...] = constants[key]
        updates = np.asarray(sparse(jnp.asarray(x), CONTEXT).y)
        p = parameters(trained)
        mixtures, outputs, logits = (np.asarray(constants[f"companion_{n}"]) for n in ("mixtures", "outputs", "logits"))
        t = VARIANTS[name].temperature
        for b in range(B):
            for s in range(S):
                position, token_logits = s % positions, x[b, s] @ p["controller"]
                merge = 1 / (1 + np.exp((logits[position] - token_logits) / t))
                powers = np.exp(token_logits / t)
                emit = merge if name == "default" else powers / powers.sum()
                y = np.zeros(D)
                for rank, e in enumerate(np.argsort(-emit)):
                    mixture = merge[e] * x[b, s] + (1 - merge[e]) * mixtures[position, e]
                    output = np.maximum(mixture @ p["w_in"][e], 0) @ p["w_out"][e]
                    y += emit[e] * (output if rank < k else outputs[position, e])
                if "kernel_in" in p:
                    y += np.maximum(x[b, s] @ p["kernel_in"], 0) @ p["kernel_out"]
                np.testing.assert_allclose(updates[b, s], y, rtol=1e-9, atol=1e-9)
        if positions == S:
            _, all_run = pair_of(name, num_positions=S, experts_per_token=E)
            set_companions(all_run, trained, companions)
            np.testing.assert_allclose(all_run(jnp.asarray(x), CONTEXT).y, full(jnp.asarray(x), CONTEXT).y, rtol=1e-9)


def test_parameters_are_those_of_the_trained_layer():
    names = [set(parameters(layer)) for layer in pair_of("weighted common base, two", "float32")]
    assert names[0] == names[1] and "emit_base_weight" in names[0]


MESHES = [({"expert": 8}, 2)]
for sizes in ({"data": 8}, {"expert": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}):
    MESHES += [pytest.param(sizes, k, marks=pytest.mark.slow) for k in (None, 2)]


@pytest.mark.parametrize(("shape", "k"), MESHES, ids=str)
def test_layer_on_a_mesh_equals_one_device(mesh_of, shape, k):
    """With and without positions; the companions' vectors are sharded like the experts."""
    mixing = MixingConfig(emit="softmax", controllers="separate")
    config = CompanionsConfig(G, 8, 4, mixing=mixing, num_positions=S, experts_per_token=k)
    graph, state = nnx.split(nnx.eval_shape(lambda: Companions(4, 8, config, rngs=nnx.Rngs(params=0))))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "float32"), state)
    x = rng.normal(size=(8, S, 4)).astype("float32")
    positions = rng.integers(0, S, (8, S)).astype(np.int32)

    @jax.jit
    def run(state, x, positions):
        layer = nnx.merge(graph, state)
        return layer(x).y, layer(x, FeedForwardContext(positions=positions)).y

    expected = run(state, x, positions)
    mesh = mesh_of(**shape)
    with jax.set_mesh(mesh):
        placed = nnx.to_pure_dict(state)
        placed = {n: jax.device_put(v, NamedSharding(mesh, parameter_spec(n, v.ndim))) for n, v in placed.items()}
        nnx.replace_by_pure_dict(state, placed)
        on_mesh = run(state, *jax.device_put((x, positions), batch_sharding(mesh)))
    for a, b in zip(on_mesh, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
