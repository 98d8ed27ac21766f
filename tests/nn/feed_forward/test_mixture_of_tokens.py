"""The Mixture-of-Tokens layer: equal to the oracle, with every property of `docs/paper.md`, section 2."""

from functools import lru_cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from absl.testing import parameterized
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from mot_jax.config import DenseConfig, ExpertChoiceConfig, InitConfig, MixingConfig, MixtureOfTokensConfig
from mot_jax.nn import mixing, sharding
from mot_jax.nn.feed_forward import Dense, FeedForwardContext, MixtureOfTokens
from mot_jax.nn.feed_forward.expert_choice import ExpertChoice

B, S, D, G, E, F = 8, 3, 5, 4, 3, 6
# This generator compiles in a fraction of the time.
KEY = jax.random.key(0, impl="rbg")
SEEDS = st.integers(0, 2**16)
MERGES = {
    "softmax": MixingConfig(),
    "uniform": MixingConfig("uniform"),
    "one_hot": MixingConfig(temperature=0.0),
}
POLICIES = ("nothing", "pre_activations", "all")
# (mixing, width of the shared expert, whether some tokens are masked)
CASES = {
    "softmax": (MixingConfig(), 0, False),
    "tempered": (MixingConfig(temperature=0.3), 4, True),
    "uniform": (MixingConfig("uniform"), 4, True),
    "one_hot": (MixingConfig(temperature=0.0), 0, True),
}


def mask_of(seed: int) -> np.ndarray:
    """Random padding; at position 0 one group has padding only, at position 1 another has none."""
    mask = np.random.default_rng(seed).random((B, S)) < 0.6
    mask[:G, 0] = False
    mask[G:, 1] = True
    return mask


def values(seed: int, shared: int = 0, **scales: float) -> dict[str, np.ndarray]:
    """x and the parameters, by their names in the layer: standard normal numbers times `scales`."""
    shapes = {"x": (B, S, D), "controller": (D, E), "w_in": (E, D, F), "w_out": (E, F, D)}
    if shared:
        shapes |= {"kernel_in": (D, shared), "kernel_out": (shared, D)}
    rng = np.random.default_rng(seed)
    return {name: scales.get(name, 1.0) * rng.normal(size=shape) for name, shape in shapes.items()}


@lru_cache
def abstract(config: MixtureOfTokensConfig, dtype: str):
    dtypes = {"dtype": dtype, "param_dtype": dtype}
    return nnx.split(nnx.eval_shape(lambda: MixtureOfTokens(D, 8, config, rngs=nnx.Rngs(params=KEY), **dtypes)))


def apply(config: MixtureOfTokensConfig, dtype: str, p: dict, mask=None):
    """The layer's output with the parameters p, named as in the oracle."""
    graph, state = abstract(config, dtype)
    filled = [(path, v.replace(jnp.asarray(p[path[-1]], dtype))) for path, v in nnx.to_flat_state(state)]
    layer = nnx.merge(graph, nnx.from_flat_state(filled))
    return layer(jnp.asarray(p["x"], dtype), FeedForwardContext(token_mask=mask))


def config_of(
    mixing: MixingConfig = MixingConfig(), shared: int = 0, save_for_backward: str = "pre_activations", g: int = G
):
    return MixtureOfTokensConfig(g, E, F, shared_expert_dim=shared, mixing=mixing, save_for_backward=save_for_backward)


@partial(jax.jit, static_argnums=0)
def run(config: MixtureOfTokensConfig, p: dict, mask=None) -> jax.Array:
    return apply(config, "float32", p, mask).y


@partial(jax.jit, static_argnums=0)
def gradients(config: MixtureOfTokensConfig, p: dict, dy: jax.Array, mask=None) -> dict[str, jax.Array]:
    return jax.grad(lambda p: (apply(config, "float32", p, mask).y * dy).sum())(p)


# --- the oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_oracle_gradients_equal_finite_differences(case):
    mixing, shared, masked = CASES[case]
    layer = oracle.MixtureOfTokens(G, mixing.merge, mixing.temperature, mask_of(1) if masked else None)
    p, dy = values(0, shared), np.random.default_rng(2).normal(size=(B, S, D))
    oracle.check_gradients(lambda p: (layer.forward(p) * dy).sum(), p, layer.backward(p, dy), rtol=1e-6)


class LayerEqualsOracle(chex.TestCase):
    """Values and every gradient, with and without jit."""

    def compare(self, case: str, save_for_backward: str, dtype: str, tolerance: float):
        mixing, shared, masked = CASES[case]
        mask = mask_of(1) if masked else None
        p, dy = values(0, shared), np.random.default_rng(2).normal(size=(B, S, D))
        reference = oracle.MixtureOfTokens(G, mixing.merge, mixing.temperature, mask)

        def loss(p, mask):
            y = apply(config_of(mixing, shared, save_for_backward), dtype, p, mask).y
            return (y * dy.astype(dtype)).sum(), y

        cast = {name: jnp.asarray(value, dtype) for name, value in p.items()}
        gradients, y = self.variant(jax.grad(loss, has_aux=True))(cast, mask)
        assert y.dtype == dtype
        for name, expected in {"y": reference.forward(p), **reference.backward(p, dy)}.items():
            actual = y if name == "y" else gradients[name]
            assert np.abs(actual - expected).max() <= tolerance * max(1.0, np.abs(expected).max()), name

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(case=tuple(CASES), save_for_backward=POLICIES)
    def test_float64(self, case, save_for_backward):
        with jax.enable_x64(True):
            self.compare(case, save_for_backward, "float64", 1e-10)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(
        *[(case, "pre_activations") for case in CASES], ("tempered", "nothing"), ("tempered", "all")
    )
    def test_float32(self, case, save_for_backward):
        self.compare(case, save_for_backward, "float32", 1e-5)


# --- properties (`docs/paper.md`, section 2) --------------------------------------------------------------------------


@given(SEEDS, st.permutations(range(G)), st.booleans())
def test_permuting_a_group_permutes_its_outputs(seed, order, masked):
    order = np.array([*order, *range(G, B)])  # the second group stays
    p, mask = values(seed), mask_of(seed) if masked else np.ones((B, S), bool)
    y = run(config_of(), p, mask)
    permuted = run(config_of(), p | {"x": p["x"][order]}, mask[order])
    np.testing.assert_allclose(permuted, y[order], atol=1e-5)


@given(SEEDS, st.sampled_from(["softmax", "uniform", "one_hot"]), st.booleans())
def test_groups_and_positions_are_independent(seed, merge, shared):
    """Changed tokens of one group at one position change its outputs there, and no bit of any other output."""
    config = config_of(MERGES[merge], 4 * shared)
    p = values(seed, 4 * shared)
    rng = np.random.default_rng(seed)
    start, s = G * rng.integers(B // G), rng.integers(S)
    inside = np.zeros((B, S), bool)
    inside[start : start + G, s] = True
    other = np.where(inside[..., None], 100 * rng.normal(size=p["x"].shape), p["x"])
    before, after = run(config, p), run(config, p | {"x": other})
    np.testing.assert_array_equal(before[~inside], after[~inside])
    assert (before[inside] != after[inside]).any()


def sum_of_experts(p: dict, x: np.ndarray) -> np.ndarray:
    """sum_e FFN_e(x), for each token."""
    h = np.maximum(np.einsum("bsd,edf->bsef", x, p["w_in"]), 0)
    return np.einsum("bsef,efd->bsd", h, p["w_out"])


@given(SEEDS, st.sampled_from(["softmax", "uniform", "one_hot"]))
def test_a_group_of_one_gives_the_sum_of_experts(seed, merge):
    p = values(seed)
    np.testing.assert_allclose(run(config_of(MERGES[merge], g=1), p), sum_of_experts(p, p["x"]), rtol=1e-4, atol=1e-4)


@given(SEEDS, st.sampled_from(["softmax", "uniform"]))
def test_identical_tokens_in_a_group_give_the_sum_of_experts_over_g(seed, merge):
    p = values(seed)
    p["x"] = np.repeat(p["x"][::G], G, axis=0)
    np.testing.assert_allclose(run(config_of(MERGES[merge]), p), sum_of_experts(p, p["x"]) / G, rtol=1e-4, atol=1e-4)


@given(SEEDS)
def test_updates_of_a_group_sum_to_the_expert_outputs(seed):
    """Sum over the group of Y = sum_e O_e, since the columns of M sum to 1."""
    p = values(seed)
    weights = np.asarray(jax.nn.softmax(p["x"].reshape(B // G, G, S, D) @ p["controller"], axis=1))
    mixtures = np.einsum("ngse,ngsd->nsed", weights, p["x"].reshape(B // G, G, S, D))
    h = np.maximum(np.einsum("nsed,edf->nsef", mixtures, p["w_in"]), 0)
    outputs = np.einsum("nsef,efd->nsd", h, p["w_out"])
    np.testing.assert_allclose(run(config_of(), p).reshape(B // G, G, S, D).sum(axis=1), outputs, rtol=1e-4, atol=1e-4)


@given(SEEDS, st.sampled_from([(1e9, "uniform"), (1e-6, "one_hot"), (0.0, "one_hot")]))
def test_temperature_limits_are_one_hot_and_uniform(seed, case):
    temperature, limit = case
    p, mask = values(seed), mask_of(seed)
    tempered = run(config_of(MixingConfig(temperature=temperature)), p, mask)
    np.testing.assert_allclose(tempered, run(config_of(MERGES[limit]), p, mask), atol=1e-5)


@given(SEEDS, st.sampled_from(["softmax", "uniform", "one_hot"]), st.sampled_from([1.0, 1e3, 1e15]))
def test_the_values_of_padding_tokens_change_no_bit(seed, merge, scale):
    config, p, mask = config_of(MERGES[merge]), values(seed), mask_of(seed)
    rng = np.random.default_rng(seed)
    other = p | {"x": np.where(mask[..., None], p["x"], scale * rng.normal(size=p["x"].shape))}
    y, dy = run(config, p, mask), rng.normal(size=p["x"].shape)
    np.testing.assert_array_equal(y, run(config, other, mask))
    assert not y[~mask].any(), "the update of a padding token is 0"
    for name, gradient in gradients(config, p, dy, mask).items():
        np.testing.assert_array_equal(gradient, gradients(config, other, dy, mask)[name], err_msg=name)


@given(SEEDS)
def test_masking_a_group_member_equals_a_smaller_group(seed):
    """The last member of each group is masked at every position."""
    p, mask = values(seed), np.ones((B, S), bool)
    mask[G - 1 :: G] = False
    smaller = config_of(g=G - 1)
    expected = run(smaller, p | {"x": p["x"][mask[:, 0]]})
    np.testing.assert_allclose(run(config_of(), p, mask)[mask[:, 0]], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_with_padding_only_has_zero_updates_and_gradients(case):
    mixing, _, _ = CASES[case]
    p, nothing = values(0), np.zeros((B, S), bool)
    assert not run(config_of(mixing), p, nothing).any()
    for name, gradient in gradients(config_of(mixing), p, np.ones((B, S, D)), nothing).items():
        assert not gradient.any(), name


def values_with_open_relus(seed: int) -> dict[str, np.ndarray]:
    """Values for which every ReLU is active, so that a zero gradient is due to the mixing weights."""
    p = values(seed)
    return p | {"x": abs(p["x"]), "w_in": abs(p["w_in"])}


@given(SEEDS)
def test_every_expert_has_a_gradient_from_every_non_padding_token(seed):
    """Also from tokens with the smallest weights, and from no padding token."""
    p, mask = values_with_open_relus(seed), mask_of(seed)
    tokens = np.eye(B * S).reshape(B * S, B, S, 1) * np.random.default_rng(seed).normal(size=D)
    gradients_of_token = per_token_gradients(p, tokens, mask)
    for name in ("w_in", "w_out"):
        learns = (gradients_of_token[name] != 0).any(axis=(2, 3)).reshape(B, S, E)
        np.testing.assert_array_equal(learns, np.broadcast_to(mask[..., None], learns.shape), err_msg=name)


@jax.jit
def per_token_gradients(p: dict, tokens: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """The gradients of a loss that depends on one token's update only, for each of `tokens`."""
    return jax.vmap(lambda dy: gradients(config_of(), p, dy, mask))(tokens)


@given(SEEDS)
def test_every_expert_depends_on_every_token(seed):
    """If a single token of the batch is not zero, w_in of every expert has a gradient from it."""
    p = values_with_open_relus(seed)
    rng = np.random.default_rng(seed)
    b, s = rng.integers(B), rng.integers(S)
    p["x"] = np.where((np.arange(B)[:, None, None] == b) & (np.arange(S)[:, None] == s), p["x"], 0)
    assert (gradients(config_of(), p, rng.normal(size=(B, S, D)))["w_in"] != 0).any(axis=(1, 2)).all()


EXTREMES = {
    "ordinary": {},
    "uniform routing": {"controller": 0.0},
    "zero init": {"controller": 0.0, "w_in": 0.0, "w_out": 0.0},
    "zero input": {"x": 0.0},
    "one-hot weights": {"controller": 1e4},
    "huge logits": {"controller": 1e30},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mixing", [MixingConfig(), MixingConfig(temperature=0.0), MixingConfig("uniform")], ids=repr)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_gradients_are_finite(extreme, mixing, masked):
    p, mask = values(0, **EXTREMES[extreme]), mask_of(1) if masked else np.ones((B, S), bool)
    config = config_of(mixing)
    chex.assert_tree_all_finite((run(config, p, mask), gradients(config, p, np.ones((B, S, D)), mask)))


# --- the layer as a module --------------------------------------------------------------------------------------------


def test_save_for_backward_decides_which_arrays_are_saved_and_recomputed():
    """Counts the saved arrays of the pre-activations' and the mixtures' shapes, and the FLOPs of the backward pass."""
    p = {name: jnp.asarray(v, "float32") for name, v in values(0).items()}
    n, saved, flops = B // G, {}, {}
    backward = jax.jit(lambda pull, dy: pull(dy))
    for save_for_backward in POLICIES:
        config = config_of(save_for_backward=save_for_backward)
        pull = jax.vjp(lambda p, c=config: apply(c, "float32", p).y, p)[1]
        shapes = [leaf.shape for leaf in jax.tree.leaves(pull)]
        saved[save_for_backward] = (shapes.count((E, n, S, F)), shapes.count((n, S, E, D)))
        flops[save_for_backward] = backward.lower(pull, jnp.ones((B, S, D))).compile().cost_analysis()["flops"]
    assert saved == {"nothing": (0, 0), "pre_activations": (1, 0), "all": (1, 2)}
    assert flops["nothing"] > flops["pre_activations"] > flops["all"]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("dense", "bfloat16"), ("mixture", "float32"), ("gated_mixture", "bfloat16"), ("expert_choice", "bfloat16")],
)
def test_programs_for_gpus_compute_the_same(monkeypatch, kind, dtype):
    """Their branches of the backward pass, executed on this device, which differ in the order of sums only."""
    options = {"dtype": dtype, "gated": kind == "gated_mixture", "rngs": nnx.Rngs(params=KEY)}
    layer = {
        "dense": lambda: Dense(D, 8, **options),
        "expert_choice": lambda: ExpertChoice(D, 8, ExpertChoiceConfig(G, E), **options),
    }.get(kind, lambda: MixtureOfTokens(D, 8, config_of(), **options))()
    graph, variables = nnx.split(layer)
    x, dy = (jax.random.normal(jax.random.key(seed), (B, S, D), dtype) for seed in (1, 2))

    def results():
        y, pull = jax.vjp(
            lambda variables, x: nnx.merge(graph, variables)(x, FeedForwardContext(train=True)).y, variables, x
        )
        return y, pull(dy)

    expected = jax.jit(results)()
    branches = []

    def gpu_branch(gpu, default, *operands):
        branches.append(gpu)
        return gpu(*operands)

    for module in (mixing, sharding):
        monkeypatch.setattr(module, "select_by_platform", gpu_branch)
    chex.assert_trees_all_close(
        jax.jit(lambda: results())(), expected, rtol=1e-5 if dtype == "float32" else 0.02, atol=1e-5
    )
    assert branches


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_output_and_metrics(dtype):
    config = MixtureOfTokensConfig(group_size=4, num_experts=8, shared_expert_dim=6)
    layer = MixtureOfTokens(5, 10, config, dtype=dtype, rngs=nnx.Rngs(params=KEY))
    shapes = {name: getattr(layer, name).shape for name in ("controller", "w_in", "w_out")}
    assert shapes == {"controller": (5, 8), "w_in": (8, 5, 2), "w_out": (8, 2, 5)}  # 8 x 2 = 4 x (10 - 6)
    assert layer.shared.kernel_in.shape == (5, 6) and layer.shared.bias_in is None
    out = layer(jnp.ones((8, 3, 5)))
    chex.assert_shape(out.y, (8, 3, 5))
    assert out.y.dtype == dtype and layer.w_in.dtype == "float32"
    assert not out.losses and list(out.metrics) == ["mixing_entropy"]
    assert out.metrics["mixing_entropy"] == pytest.approx(1.0, abs=1e-6)  # equal tokens


@pytest.mark.parametrize("name", ["controller", "w_in", "w_out"])
def test_an_init_scale_multiplies_one_parameter(name):
    config = MixtureOfTokensConfig(group_size=4, num_experts=4)
    scaled = MixtureOfTokensConfig(group_size=4, num_experts=4, **{f"{name}_init_scale": 3.0})
    one, other = (MixtureOfTokens(6, 8, c, rngs=nnx.Rngs(params=KEY)) for c in (config, scaled))
    for parameter in ("controller", "w_in", "w_out"):
        expected = getattr(one, parameter)[...] * (3.0 if parameter == name else 1.0)
        np.testing.assert_allclose(getattr(other, parameter)[...], expected, rtol=1e-6)


def test_wrong_shapes_raise_an_error_that_names_the_dimensions():
    layer = MixtureOfTokens(D, 8, config_of(), rngs=nnx.Rngs(params=KEY))
    with pytest.raises(AssertionError, match="batch B = 6, group size G = 4"):
        layer(jnp.ones((6, S, D)))
    with pytest.raises(AssertionError, match="token mask is"):
        layer(jnp.ones((B, S, D)), FeedForwardContext(token_mask=jnp.ones((B, S + 1), bool)))


@pytest.mark.parametrize("bias", [False, True])
def test_dense_equals_its_formula(bias):
    layer = Dense(D, F, DenseConfig(bias), init=InitConfig("normal", scale=1.0), rngs=nnx.Rngs(params=KEY))
    x = np.random.default_rng(0).normal(size=(2, S, D)).astype("float32")
    biases = (0.5, -0.25) if bias else (0.0, 0.0)
    if bias:
        layer.bias_in[...], layer.bias_out[...] = jnp.full(F, biases[0]), jnp.full(D, biases[1])
    expected = np.maximum(x @ layer.kernel_in[...] + biases[0], 0) @ layer.kernel_out[...] + biases[1]
    np.testing.assert_allclose(layer(x).y, expected, rtol=1e-5, atol=1e-5)
    assert (layer.bias_in is None) != bias


def test_derivatives_are_of_reverse_mode_to_any_order():
    """The Hessian-vector product is that of a layer without its own backward pass; forward mode is JAX's TypeError."""
    layer = MixtureOfTokens(D, F, MixtureOfTokensConfig(G, E), activation="gelu", rngs=nnx.Rngs(params=1))
    x, v = (jax.random.normal(jax.random.key(seed), (2 * G, 1, D)) for seed in (0, 1))

    def plain(x):
        grouped = x.reshape(2, G, 1, D)
        weights = jax.nn.softmax(jnp.einsum("ngsd,de->ngse", grouped, layer.controller[...]), axis=1)
        u = jnp.einsum("ngse,ngsd->nsed", weights, grouped)
        h = jax.nn.gelu(jnp.einsum("nsed,edf->nsef", u, layer.w_in[...]))
        o = jnp.einsum("nsef,efd->nsed", h, layer.w_out[...])
        return (jnp.einsum("ngse,nsed->ngsd", weights, o) ** 2).sum()

    def with_layer(x):
        return (layer(x).y ** 2).sum()

    def product(f):
        return jax.jit(jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v)))(x)

    expected = product(plain)
    np.testing.assert_allclose(product(with_layer), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(with_layer, (x,), (v,))
