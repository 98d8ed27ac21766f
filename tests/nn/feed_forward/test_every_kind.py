"""Properties of every feed-forward kind that trains, on one tiny model: a further kind is one line in `CASES`.

The tests of a kind share its compiled programs. The formulas of a kind, its oracle and its variants have files of their
own, next to this one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Container
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mot_jax.config import (
    CompanionsConfig,
    Config,
    DenseConfig,
    ExpertChoiceConfig,
    ExpertThresholdConfig,
    FeedForwardConfig,
    HashConfig,
    LossWeights,
    MeshConfig,
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    ReluRoutingConfig,
    SoftMoEConfig,
    ThresholdConfig,
    TokenChoiceConfig,
    TrainingConfig,
    check,
)
from mot_jax.data.objectives import Batch
from mot_jax.data.tokenizers import ByteTokenizer
from mot_jax.errors import UserError
from mot_jax.inference.language_model import LanguageModel
from mot_jax.modes import default_mode, enter
from mot_jax.nn.feed_forward import KINDS, FeedForwardContext, make_feed_forward
from mot_jax.nn.sharding import local_sequences, make_mesh, place_microbatches
from mot_jax.nn.transformer import Params, bind
from mot_jax.runs.checkpoint import Checkpoints
from mot_jax.runs.state import TrainState, abstract_state, create_state
from mot_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Case:
    """A config of a kind, and the properties in which kinds differ.

    Attributes:
        config: for S = 16 positions, batches of 32 sequences, microbatches of 8, and d_ff = 32. Its numbers of experts
            and hidden widths are even.
        reach: the tokens on which a token may depend, itself included. `past`: those of its sequence up to its
            position. `group`: those of all sequences of its group up to its position. `order`: the earlier tokens of
            its routing group, sequence after sequence. `sequence`: all of its sequence, which a causal model refuses.
        reach_later: the same after the warmup of the layer; None: no other.
        drops: whether some tokens are dropped: their number is then limited by so small a capacity.
        slow: whether only the slow suite has this case. The fast one has Mixture of Tokens, and two kinds that have all
            parts of the others: router state, drops, warmup, auxiliary losses and a shared expert; some tests fewer.
    """

    config: FeedForwardConfig
    reach: Literal["past", "group", "order", "sequence"]
    drops: bool = False
    reach_later: Literal["past", "order"] | None = None
    slow: bool = False


MIXTURE = MixtureOfTokensConfig(group_size=8, num_experts=8, controller_init_scale=3.0)
ROUTED = TokenChoiceConfig(8, None, 2, 8, 0.6, routing_group_tokens=32, controller_init_scale=3.0)
SEPARATE = MixingConfig(emit="softmax", controllers="separate")
WITHIN = MixingConfig(emit="softmax_over_experts", groups="within")
CASES = {
    "dense": Case(DenseConfig(), "past", slow=True),
    "mixture_of_tokens": Case(dataclasses.replace(MIXTURE, shared_expert_dim=8), "group"),
    "mixture_of_tokens, separate": Case(dataclasses.replace(MIXTURE, mixing=SEPARATE), "group", slow=True),
    "mixture_of_tokens, within": Case(dataclasses.replace(MIXTURE, mixing=WITHIN), "sequence", slow=True),
    "token_choice": Case(ROUTED, "order", drops=True, slow=True),
    "token_choice, bias": Case(
        dataclasses.replace(ROUTED, scores="sigmoid", balance="bias", bias_rate=0.1), "order", drops=True
    ),
    "expert_threshold": Case(
        ExpertThresholdConfig(
            8, None, 2, 8, 0.6, routing_group_tokens=32, group_size=8, warmup_steps=1, controller_init_scale=3.0
        ),
        "group",
        drops=True,
        reach_later="order",
    ),
    "expert_threshold, unlimited": Case(
        ExpertThresholdConfig(8, top_k=2, capacity_factor=None, routing_group_tokens=32, group_size=8, warmup_steps=2),
        "group",
        reach_later="past",
        slow=True,
    ),
    "expert_choice": Case(
        ExpertChoiceConfig(8, 8, shared_expert_dim=8, controller_init_scale=3.0), "group", drops=True, slow=True
    ),
    "expert_choice, over tokens": Case(
        ExpertChoiceConfig(8, 8, top_k=2, over="tokens", layer_norm=True), "sequence", slow=True
    ),
    "relu_routing": Case(ReluRoutingConfig(8, top_k=2, shared_expert_dim=8, l1_weight=0.1), "past", slow=True),
    "hash": Case(HashConfig(8, top_k=2, shared_expert_dim=8), "past", slow=True),
    "soft_moe": Case(SoftMoEConfig(8, shared_expert_dim=8), "sequence", slow=True),
    "token_choice, dropless": Case(dataclasses.replace(ROUTED, capacity_factor=None), "past", slow=True),
}

B, S = 32, 16
MODEL = ModelConfig(num_blocks=2, d_model=16, d_ff=32, num_heads=4, context_length=S, vocab_size=258, loss_chunk=8)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=0, clip_norm=1e9)  # the first moment is the gradient / 10
ALL_LOSSES = LossWeights(**dict.fromkeys(vars(LossWeights()), 1.0))
MICROBATCHES = 4
# Padding is at the ends of sequences. The first of four microbatches has few tokens, the second has less than half.
MASK = np.ones((B, S), bool)
MASK[:12, 3:], MASK[12:16] = False, False
SEQUENCE, POSITION = (index.ravel() for index in np.indices((B, S)))


def every_case(fast: Container[str]) -> pytest.MarkDecorator:
    """Parametrize a test by all cases; those that are not `fast` are in the slow suite only."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[] if name in fast else [pytest.mark.slow]) for name in CASES]
    )


EVERY_CASE = every_case([name for name, case in CASES.items() if not case.slow])
# Where compilation takes 10 seconds a case:
TWO_CASES, ONE_CASE = every_case(["mixture_of_tokens", "token_choice, bias"]), every_case(["mixture_of_tokens"])


def test_the_table_has_every_kind_that_trains():
    assert {type(case.config) for case in CASES.values()} == set(KINDS) - {CompanionsConfig, ThresholdConfig}


# --- one model of each kind -------------------------------------------------------------------------------------------


def config_of(
    name: str, microbatches: int = 1, mesh: MeshConfig = MeshConfig(data=1), dtype: str = "float32"
) -> Config:
    """The config of a training step with every auxiliary loss of the kind."""
    objective = "masked" if CASES[name].reach == "sequence" else "causal"
    model = dataclasses.replace(MODEL, feed_forward=CASES[name].config, objective=objective, dtype=dtype)
    training = TrainingConfig(12, B, microbatches, optimizer=OPTIMIZER, losses=ALL_LOSSES)
    return Config(model=model, training=training, mesh=mesh)


def batch_of(number: int = 0, padding: int = 0) -> Batch:
    """Random tokens; those under the padding by the seed `padding`."""
    tokens, others = (
        np.random.default_rng([seed, 1]).integers(256, size=(B, S + 1), dtype="int32") for seed in (number, padding)
    )
    inputs, targets = (np.where(MASK, tokens[:, part], others[:, part]) for part in (slice(S), slice(1, S + 1)))
    return Batch(inputs, targets, MASK, MASK)


def mesh_of(config: Config) -> jax.sharding.Mesh:
    axes = (config.mesh.data, config.mesh.fsdp, config.mesh.expert, config.mesh.tensor)
    return make_mesh(config, jax.devices()[: math.prod(axes)])


@functools.cache
def initial_state(name: str) -> TrainState:
    config = config_of(name)
    with jax.default_prng_impl("rbg"):  # which compiles in a fraction of the time
        return jax.device_get(create_state(config, mesh_of(config)))


@functools.cache
def compiled(config: Config):
    t = config.training
    return jax.jit(make_train_step(config.model, t.optimizer, t.steps, t.losses, t.gradient_accumulation_steps))


def place(config: Config, state: TrainState) -> TrainState:
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh_of(config))))


def train(config: Config, state: TrainState, *batches: Batch) -> tuple[TrainState, dict[str, float]]:
    """Make a step with each batch: the last state, and the metrics of the last step."""
    mesh, t, state = mesh_of(config), config.training, place(config, state)
    sequences = local_sequences(mesh, t.batch_size, t.gradient_accumulation_steps)
    with jax.set_mesh(mesh):
        for batch in batches:
            batch = jax.tree.map(lambda x: x[sequences], batch)
            batch = place_microbatches(mesh, batch, t.batch_size, t.gradient_accumulation_steps)
            state, metrics = compiled(config)(state, batch)
    return jax.device_get(state), {name: float(value) for name, value in metrics.items()}


@functools.cache
def first_step(name: str) -> tuple[TrainState, dict[str, float]]:
    return train(config_of(name), initial_state(name), batch_of())


@functools.cache
def trained_state(name: str, steps: int) -> TrainState:
    return train(config_of(name), initial_state(name), *map(batch_of, range(steps)))[0]


# --- dependence on other tokens ---------------------------------------------------------------------------------------


def allowed_tokens(reach: str, config: Config) -> np.ndarray:
    """bool [B S, B S]: whether the output of the first token may depend on the second one."""
    group_size, kind = config.group_size, config.model.feed_forward
    routing_group = np.arange(B * S) // getattr(kind, "routing_group_tokens", B * S)
    same_sequence = SEQUENCE[:, None] == SEQUENCE
    same_group = SEQUENCE[:, None] // group_size == SEQUENCE // group_size
    earlier = POSITION[:, None] >= POSITION
    allowed = {
        "past": same_sequence & earlier,
        "group": same_group & earlier,
        "order": (routing_group[:, None] == routing_group) & np.tri(B * S, dtype=bool),
        "sequence": same_sequence,
    }
    return allowed[reach] & MASK.ravel()


@functools.partial(jax.jit, static_argnums=0)
def forward(model: ModelConfig, params: Params, tokens: jax.Array, step: jax.Array) -> tuple[jax.Array, dict]:
    """The model as in training: the outputs of all tokens [B S, D], and metrics."""
    out = bind(model, params)(tokens, FeedForwardContext(jnp.asarray(MASK), tokens, step=step, train=True))
    return out.hidden.reshape(B * S, -1), out.metrics


@ONE_CASE
def test_a_token_depends_on_no_token_out_of_its_reach(name):
    """Neither on later tokens, other groups or padding, by a bit; on other sequences only if its case allows it."""
    case, config, tokens = CASES[name], config_of(name), batch_of().inputs
    state, rng = trained_state(name, 2), np.random.default_rng(0)
    params = state.variables
    mask = MASK.ravel()

    def outputs(step: int, replaced: np.ndarray) -> np.ndarray:
        other = (tokens + rng.integers(1, 256, size=tokens.shape, dtype="int32")) % 256
        return np.asarray(forward(config.model, params, np.where(replaced.reshape(B, S), other, tokens), step)[0])

    drops = depends_on_other_sequences = False
    for step, reach in ((0, case.reach), (10**6, case.reach_later or case.reach)):
        allowed = allowed_tokens(reach, config)
        expected, metrics = outputs(step, np.zeros_like(mask)), forward(config.model, params, tokens, step)[1]
        drops |= metrics.get("dropped/00", 0) > 0.1
        for token in rng.choice(np.flatnonzero(mask), 12):
            replaced = ~allowed[token]
            unchanged = mask & ~(allowed & replaced).any(axis=1)
            assert unchanged[token]
            np.testing.assert_array_equal(outputs(step, replaced)[unchanged], expected[unchanged])
            others = outputs(step, allowed[token] & (SEQUENCE[token] != SEQUENCE))
            depends_on_other_sequences |= (others[token] != expected[token]).any()
    assert drops == case.drops
    assert depends_on_other_sequences == (case.reach in ("group", "order"))


@EVERY_CASE
def test_an_update_has_no_gradient_by_a_token_out_of_its_reach(name):
    """Of the layer by itself, before and after its warmup."""
    case, rng, config = CASES[name], np.random.default_rng(0), config_of(name)
    kind = case.config.for_model(config.model)
    layer = nnx.jit(lambda: make_feed_forward(config.model, kind, nnx.Rngs(params=jax.random.key(0, impl="rbg"))))()
    graph, variables = nnx.split(layer)
    x = rng.normal(size=(B, S, MODEL.d_model)).astype("float32")
    chosen = rng.choice(np.flatnonzero(MASK), 16, replace=False)
    cotangents = np.zeros((len(chosen), B * S, MODEL.d_model), "float32")
    cotangents[np.arange(len(chosen)), chosen] = rng.normal(size=(len(chosen), MODEL.d_model))

    @jax.jit
    def gradient(x: jax.Array, cotangent: jax.Array, step: jax.Array) -> jax.Array:
        context = FeedForwardContext(jnp.asarray(MASK), jnp.asarray(batch_of().inputs), step=step, train=True)
        _, pull = jax.vjp(lambda x: nnx.merge(graph, variables)(x, context).y, x)
        return pull(cotangent)[0]

    for step, reach in ((0, case.reach), (10**6, case.reach_later or case.reach)):
        # One at a time: mapped by vmap, those of soft_moe are wrong with jax 0.10.2 on a CPU.
        gradients = np.array([gradient(x, cotangent, step) for cotangent in cotangents.reshape(-1, *x.shape)])
        reached = (gradients != 0).any(axis=-1).reshape(len(chosen), -1)
        assert not (reached & ~allowed_tokens(reach, config)[chosen]).any()
        assert reached[np.arange(len(chosen)), chosen].mean() > 0.5  # others are dropped


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.reach == "sequence"])
def test_a_kind_that_is_not_causal_is_refused_for_causal_models(name):
    """Its layer, by itself, shows why: updates change with the last token of their sequence."""
    model = config_of(name).model
    layer = nnx.jit(
        lambda: make_feed_forward(model, CASES[name].config, nnx.Rngs(params=jax.random.key(0, impl="rbg")))
    )()
    x = np.random.default_rng(0).normal(size=(B, S, MODEL.d_model)).astype("float32")
    y, changed = (
        nnx.jit(lambda layer, x: layer(x).y)(layer, value) for value in (x, x * (np.arange(S) < S - 1)[:, None])
    )
    assert (y[:, :-1] != changed[:, :-1]).any()
    with pytest.raises(UserError, match="causal"):
        check(Config(model=dataclasses.replace(model, objective="causal")))


@EVERY_CASE
def test_the_content_of_padding_changes_no_bit_of_a_step(name):
    """Neither of the loss, nor of metrics, gradients or the new state."""
    state, metrics = train(config_of(name), initial_state(name), batch_of(padding=1))
    assert (batch_of(padding=1).inputs != batch_of().inputs).any() and metrics["loss"] > 0
    chex.assert_trees_all_equal((state, metrics), first_step(name))


# --- the training step ------------------------------------------------------------------------------------------------


@TWO_CASES
def test_microbatches_on_eight_devices_have_the_gradients_of_the_whole_batch_on_one(name):
    """Losses are means over the batch, although the microbatches have different numbers of tokens.

    Groups span devices. The axis `data` shards the same dimension as `fsdp` and `expert`.
    """
    config = config_of(name, MICROBATCHES, MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    (state, metrics), (expected, expected_metrics) = train(config, initial_state(name), batch_of()), first_step(name)
    for metric in ("loss", "gradient_rms"):  # those of layers are means of the microbatches' values
        assert metrics[metric] == pytest.approx(expected_metrics[metric], rel=1e-5)
    gradients, expected_gradients = (optax.tree.get(s.opt_state, "mu") for s in (state, expected))
    for parameter, gradient in expected_gradients.items():
        atol = 1e-5 * np.abs(gradient).max()
        np.testing.assert_allclose(gradients[parameter], gradient, rtol=0, atol=atol, err_msg=parameter)
    chex.assert_trees_all_close(state.router, expected.router, rtol=1e-5, atol=1e-6)


@EVERY_CASE
def test_a_resumed_run_has_the_same_bits(name, tmp_path):
    """Four steps without and with an interruption after the second one."""
    config = config_of(name)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, place(config, trained_state(name, 2)), 2 * B, config)
        checkpoints.wait()
        restored = checkpoints.restore(2, config, mesh_of(config)).state
    resumed, _ = train(config, restored, batch_of(2), batch_of(3))
    chex.assert_trees_all_equal(resumed, trained_state(name, 4))
    for before, after in zip(initial_state(name)[1:3], resumed[1:3], strict=True):  # parameters and optimizer
        assert all((b != a).any() for b, a in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


# --- numbers ----------------------------------------------------------------------------------------------------------


def extreme_params(params: Params, extreme: str) -> Params:
    """Parameters that give every layer uniform routing, zero inputs, one expert for all tokens, or none."""
    params = dict(params)
    for name, value in params.items():
        if "feed_forward_norm" in name and extreme == "zero inputs":
            params[name] = 0 * value
        elif name.endswith("feed_forward_norm/bias") and extreme == "one expert":
            params[name] = value + 3  # so that all tokens have positive logits
        elif name.endswith("feed_forward_norm/bias") and extreme == "no expert":
            params[name] = value - 3  # so that all have negative ones
        elif "controller" in name and extreme != "zero inputs":  # [blocks, D, E, ...]
            params[name] = 0 * value
            if extreme == "one expert":
                params[name][:, :, 0] = 1e4
            elif extreme == "no expert":
                params[name][:] = 1e4
    return params


@EVERY_CASE
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_extreme_inputs_have_finite_gradients_and_valid_metrics(name, dtype):
    """A step whose loss or gradient is not finite would be skipped. Metrics have the same keys in every block."""
    config, state = config_of(name, dtype=dtype), initial_state(name)
    for extreme in ("none", "uniform routing", "zero inputs", "one expert", "no expert"):
        params = state.params if extreme == "none" else extreme_params(state.params, extreme)
        new_state, metrics = train(config, state._replace(params=params), batch_of())
        assert metrics["skipped"] == 0 and metrics["gradient_rms"] > 0, extreme
        chex.assert_tree_all_finite((new_state, metrics))
        blocks = defaultdict(list)
        for key, value in metrics.items():
            metric, _, block = key.partition("/")
            blocks[metric].append(block)
            largest = 1 if metric == "dropped" or "entropy" in metric else math.inf
            smallest = 1 if metric == "load_max" else 0
            assert smallest - 1e-5 <= value <= largest + 1e-5, (extreme, key)
        assert all(numbers in ([""], ["00", "01"]) for numbers in blocks.values()), blocks


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [p for p in ONE_CASE.args[1] if CASES[p.values[0]].reach != "sequence"])
def test_generation_with_a_cache_has_the_probabilities_of_a_whole_pass(name):
    """In the default inference mode, of a trained state."""
    state, config = trained_state(name, 4), config_of(name)
    mode, rng = default_mode(config)[0], np.random.default_rng(0)
    companions = np.stack([rng.integers(256, size=(config.group_size, S)), np.zeros((config.group_size, S))])
    params, step = jax.tree.map(jnp.asarray, state.variables), int(state.step)
    config, params = enter(mode, Config(config.model), params, step, companions.astype("int32"))
    model = LanguageModel(config, params, ByteTokenizer(), mode, step)
    # Sequences that depend on each other have the same positions in both, without padding.
    lengths = (8, 7, 5, 8) if model.independent else (8,) * config.group_size
    prompts = [rng.integers(256, size=length, dtype="int32") for length in lengths]
    continuations = model.generate(prompts, max_tokens=8, temperature=1.0, ends=False)
    pairs = [(prompt, c.tokens) for prompt, c in zip(prompts, continuations, strict=True)]
    for likelihood, c in zip(model.log_likelihoods(pairs, batch_size=len(pairs)), continuations, strict=True):
        assert len(c.tokens) == 8 and likelihood.log_prob == pytest.approx(float(c.log_probs.sum()), rel=1e-5)
