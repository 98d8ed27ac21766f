"""A row in a group with companions: what the Mixture-of-Tokens layer makes of that very group, by its oracle."""

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
STEP = 4  # of 10
ANNEALED = {"linear": 0.6, "cosine": (1 + np.cos(0.4 * np.pi)) / 2}  # the temperature there
NAMES = [name for name, mixing in VARIANTS.items() if mixing.groups == "across"]
FAST = {
    "default",
    "emit over experts",
    "no softmax",
    "top-token emit",
    "learnable temperature, separate",
    "uniform mixing",
}
SLOWLY = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
GATED = {"separate controllers", "layer norm"}
CONTEXT = FeedForwardContext(step=jnp.asarray(STEP))


def pair_of(name: str, dtype: str = "float64", **changes) -> tuple[MixtureOfTokens, Companions]:
    """The trained layer, every parameter of it drawn anew, and the one with companions, which has yet to hear them."""
    kind = MixtureOfTokensConfig(G, E, F, mixing=VARIANTS[name], shared_expert_dim=2 if name == "default" else 0)
    alone = CompanionsConfig(**vars(kind), **({"num_positions": S} | changes))
    return filled(MixtureOfTokens, kind, name, dtype), filled(Companions, alone, name, dtype)


def filled(cls: type, kind: MixtureOfTokensConfig, name: str, dtype: str):
    """Standard normal numbers, the same in both."""
    options = {"gated": name in GATED, "dtype": dtype, "param_dtype": dtype}
    graph, state = nnx.split(nnx.eval_shape(lambda: cls(D, 8, kind, rngs=nnx.Rngs(params=0), **options)))
    rng, flat = np.random.default_rng(0), nnx.to_flat_state(state)
    values = []
    for path, variable in sorted(flat, key=lambda item: (item[1].type is not nnx.Param, item[0])):
        scale = 0.3 if path[-1] in ("temperature", "emit_temperature") else 1.0
        values.append((path, variable.replace(jnp.asarray(scale * rng.normal(size=variable.shape), dtype))))
    return nnx.merge(graph, nnx.from_flat_state(values))


def introduce(trained: MixtureOfTokens, layer: Companions, companions: np.ndarray) -> None:
    """The layer hears its companions [G, S, D]."""
    for name, value in summarise(trained, jnp.asarray(companions), CONTEXT).items():
        if getattr(layer, name) is not None:
            getattr(layer, name)[...] = value[0]


def drawn(seed: int, rows: int = B) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, S, D))


def parameters(layer: MixtureOfTokens) -> dict[str, np.ndarray]:
    """As the oracle names them."""
    return {path[-1]: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(layer, nnx.Param))}


def expected(name: str, trained: MixtureOfTokens, x: np.ndarray, companions: np.ndarray) -> np.ndarray:
    """[B, S, D]: the oracle's update of the first row of each group (row, companions but the first)."""
    c, p = VARIANTS[name], parameters(trained)
    groups = np.concatenate([np.concatenate([row[None], companions[1:]]) for row in x])
    anchor = {"x": groups, **p} if c.straight_through else None
    t = ANNEALED.get(c.annealing, c.temperature)
    layer = oracle.Layer(G, c.merge, t, None, c.emit, positive=c.positive_temperature, anchor=anchor)
    return layer.forward({"x": groups, **p})[::G]


@pytest.mark.parametrize("name", SLOWLY)
def test_a_row_is_what_it_is_in_a_group_with_its_companions(name):
    """To 1e-9 in float64, also where positions are given, and where the row is turned about by them."""
    x, companions = drawn(1), drawn(2, G)
    with jax.enable_x64(True):
        trained, layer = pair_of(name)
        introduce(trained, layer, companions)
        wanted = expected(name, trained, x, companions)
        np.testing.assert_allclose(layer(jnp.asarray(x), CONTEXT).y, wanted, rtol=1e-9, atol=1e-9)
        turned = np.tile(np.arange(S)[::-1], (B, 1)).astype(np.int32)
        found = layer(jnp.asarray(x[:, ::-1]), dataclasses.replace(CONTEXT, positions=turned)).y
        np.testing.assert_allclose(found[:, ::-1], wanted, rtol=1e-9, atol=1e-9)


def test_masked_tokens_are_given_nothing():
    trained, layer = pair_of("uniform emit", "float32")
    introduce(trained, layer, drawn(2, G))
    mask = np.random.default_rng(0).random((B, S)) < 0.5
    x = jnp.asarray(drawn(1), "float32")
    plain, masked = (layer(x, dataclasses.replace(CONTEXT, token_mask=m)).y for m in (None, mask))
    assert not np.asarray(masked)[~mask].any()
    np.testing.assert_array_equal(masked[mask], plain[mask])


@pytest.mark.parametrize("positions", [pytest.param(S, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("name", ["default", pytest.param("emit over experts", marks=pytest.mark.slow)])
def test_the_experts_that_are_not_run_say_what_they_say_to_the_companions(name, positions):
    """By hand, token for token; all E experts run is nothing left out. One position: of averages over all."""
    x, companions = drawn(1), drawn(2, G)
    k = 2
    with jax.enable_x64(True):
        trained, full = pair_of(name, num_positions=S)
        introduce(trained, full, companions)
        _, sparse = pair_of(name, num_positions=positions, experts_per_token=k)
        heard = {n: v[0] for n, v in summarise(trained, jnp.asarray(companions), CONTEXT).items()}
        heard = heard if positions == S else {n: v.mean(axis=0, keepdims=True) for n, v in heard.items()}
        for key in ("companion_mixtures", "companion_outputs", "companion_logits"):
            getattr(sparse, key)[...] = heard[key]
        found = np.asarray(sparse(jnp.asarray(x), CONTEXT).y)
        p = parameters(trained)
        mixtures, outputs, logits = (np.asarray(heard[f"companion_{n}"]) for n in ("mixtures", "outputs", "logits"))
        t = VARIANTS[name].temperature
        for b in range(B):
            for s in range(S):
                place, said = s % positions, x[b, s] @ p["controller"]
                own = 1 / (1 + np.exp((logits[place] - said) / t))
                powers = np.exp(said / t)
                emit = own if name == "default" else powers / powers.sum()
                y = np.zeros(D)
                for rank, e in enumerate(np.argsort(-emit)):
                    mixture = own[e] * x[b, s] + (1 - own[e]) * mixtures[place, e]
                    output = np.maximum(mixture @ p["w_in"][e], 0) @ p["w_out"][e]
                    y += emit[e] * (output if rank < k else outputs[place, e])
                if "kernel_in" in p:
                    y += np.maximum(x[b, s] @ p["kernel_in"], 0) @ p["kernel_out"]
                np.testing.assert_allclose(found[b, s], y, rtol=1e-9, atol=1e-9)
        if positions == S:
            _, all_run = pair_of(name, num_positions=S, experts_per_token=E)
            introduce(trained, all_run, companions)
            np.testing.assert_allclose(all_run(jnp.asarray(x), CONTEXT).y, full(jnp.asarray(x), CONTEXT).y, rtol=1e-9)


def test_its_parameters_are_those_of_the_trained_layer():
    names = [set(parameters(layer)) for layer in pair_of("weighted common base, two", "float32")]
    assert names[0] == names[1] and "emit_base_weight" in names[0]


MESHES = [({"expert": 8}, 2)]
for sizes in ({"data": 8}, {"expert": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}):
    MESHES += [pytest.param(sizes, k, marks=pytest.mark.slow) for k in (None, 2)]


@pytest.mark.parametrize(("shape", "k"), MESHES, ids=str)
def test_a_mesh_gives_what_one_device_gives(mesh_of, shape, k):
    """With and without positions; the companions' vectors lie where the experts do."""
    mixing = MixingConfig(emit="softmax", controllers="separate")
    alone = CompanionsConfig(G, 8, 4, mixing=mixing, num_positions=S, experts_per_token=k)
    graph, state = nnx.split(nnx.eval_shape(lambda: Companions(4, 8, alone, rngs=nnx.Rngs(params=0))))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "float32"), state)
    x = rng.normal(size=(8, S, 4)).astype("float32")
    places = rng.integers(0, S, (8, S)).astype(np.int32)

    @jax.jit
    def run(state, x, places):
        layer = nnx.merge(graph, state)
        return layer(x).y, layer(x, FeedForwardContext(positions=places)).y

    wanted = run(state, x, places)
    mesh = mesh_of(**shape)
    with jax.set_mesh(mesh):
        placed = nnx.to_pure_dict(state)
        placed = {n: jax.device_put(v, NamedSharding(mesh, parameter_spec(n, v.ndim))) for n, v in placed.items()}
        nnx.replace_by_pure_dict(state, placed)
        found = run(state, *jax.device_put((x, places), batch_sharding(mesh)))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
