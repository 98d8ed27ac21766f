"""Config checks (all errors at once, with advice that works), the JSON format, and the fields that identify a run."""

import ast
import dataclasses
import json
import math
import re
from functools import reduce
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mot_jax.config import (
    Config,
    DataConfig,
    DenseConfig,
    ExpertChoiceConfig,
    ExpertThresholdConfig,
    HashConfig,
    InitConfig,
    MeshConfig,
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TokenChoiceConfig,
    TrainingConfig,
    check,
    from_json,
    identity_changes,
    to_json,
)
from mot_jax.errors import UserError


def get(config: Any, name: str) -> Any:
    return reduce(getattr, name.split("."), config)


def put(config: Any, name: str, value: Any) -> Any:
    """`config` with the field of this dotted name replaced."""
    first, _, rest = name.partition(".")
    return dataclasses.replace(config, **{first: put(getattr(config, first), rest, value) if rest else value})


def leaves(value: Any, path: str = "") -> list[str]:
    """The dotted names of all fields that are not groups of fields."""
    if not dataclasses.is_dataclass(value):
        return [path]
    inner = {f"{path}.{f.name}".strip("."): getattr(value, f.name) for f in dataclasses.fields(value)}
    return [leaf for name, item in inner.items() for leaf in leaves(item, name)]


def errors_of(config: Config) -> tuple[str, ...]:
    try:
        check(config)
    except UserError as error:
        assert str(error) == "\n".join(error.faults)
        return error.faults
    return ()


SUGGESTION = re.compile(r"^(?P<field>[\w.]+) = .*; try (?P<advice>.*)$")


def follow(config: Config, line: str) -> Config:
    """The config after the advice of an error: a value for its field, or `field = value, field = value`."""
    field, advice = SUGGESTION.match(line).group("field", "advice")
    changes = re.findall(r"([a-z_.]+) = ([^,]+)", advice) or [(field, advice)]
    for name, value in changes:
        config = put(config, name, ast.literal_eval(value))
    return config


small = st.integers(1, 6)
unit = st.floats(0, 0.99)
positive = st.floats(1e-6, 1e3)


mixings = st.one_of(
    st.builds(
        MixingConfig, temperature=st.floats(0, 10), emit=st.sampled_from(["merge", "softmax_over_experts", "ones"])
    ),
    st.builds(MixingConfig, merge=st.sampled_from(["uniform", "logits"]), layer_norm=st.booleans()),
    st.builds(
        MixingConfig,
        emit=st.just("softmax"),
        controllers=st.just("common_base"),
        base_weight=st.sampled_from(["sum", "one", "two"]),
        learned_temperature=st.sampled_from(["scalar", "per_expert"]),
        separate_temperatures=st.booleans(),
        frozen_steps=small,
    ),
    st.builds(
        MixingConfig,
        annealing=st.sampled_from(["linear", "cosine"]),
        annealing_steps=st.tuples(small, st.integers(7, 9)),
        straight_through=st.booleans(),
    ),
)


@st.composite
def configs(draw) -> Config:
    """Valid configs of every kind."""
    heads, chunk, group, accumulation = (draw(small) for _ in range(4))
    d_ff, blocks = draw(st.integers(2, 64)), draw(small)
    kinds = ["mixture", "token choice", "expert threshold", "expert choice", "dense"]
    kind_name = draw(st.sampled_from(kinds))
    length = chunk * draw(small)
    shared = draw(st.integers(0, d_ff - 1))
    if kind_name == "mixture":
        product = group * (d_ff - shared)
        experts = draw(st.sampled_from([e for e in range(1, product + 1) if product % e == 0]))
        expert_dim = draw(st.sampled_from([None, product // experts]))
        kind = MixtureOfTokensConfig(
            group,
            experts,
            expert_dim,
            flop_matched=draw(st.booleans()),
            shared_expert_dim=shared,
            mixing=draw(mixings),
            controller_init_scale=draw(positive),
            save_for_backward=draw(st.sampled_from(["nothing", "pre_activations", "all"])),
        )
    elif kind_name == "token choice":
        divisors = [k for k in range(1, d_ff - shared + 1) if (d_ff - shared) % k == 0]
        top_k, experts = draw(st.sampled_from(divisors)), draw(st.integers(0, 9))
        tokens = st.sampled_from([n for n in range(1, length + 1) if length % n == 0] + [2 * length, 3 * length])
        kind = TokenChoiceConfig(
            experts + top_k,
            top_k=top_k,
            shared_expert_dim=shared,
            capacity_factor=draw(st.none() | positive),
            routing_group_tokens=draw(tokens),
        )
        if draw(st.booleans()):
            mixture = MixtureOfTokensConfig(
                draw(small), kind.num_experts, kind.hidden_dim(d_ff), shared_expert_dim=shared
            )
            kind = dataclasses.replace(kind, mixture=dataclasses.replace(mixture, mixing=draw(mixings)))
    elif kind_name == "expert threshold":
        top_k = draw(st.integers(1, d_ff - 1))
        kind = ExpertThresholdConfig(
            draw(st.integers(0, 9)) + top_k,
            draw(st.none() | small),
            top_k,
            capacity_factor=draw(st.none() | positive),
            routing_group_tokens=length * draw(st.sampled_from([1, 2])),
            group_size=2 * group,
            warmup_steps=draw(st.none() | st.integers(0, 9)),
        )
    elif kind_name == "expert choice":
        divisors = [k for k in range(1, d_ff - shared + 1) if (d_ff - shared) % k == 0]
        top_k = draw(st.sampled_from(divisors))
        experts = draw(st.integers(0, 9)) + top_k
        kind = ExpertChoiceConfig(
            group,
            experts,
            top_k=top_k,
            capacity_factor=experts / (top_k * group) + draw(positive),
            layer_norm=draw(st.booleans()),
            shared_expert_dim=shared,
        )
    else:
        kind = DenseConfig(draw(st.booleans()))
    dense_bias = isinstance(kind, DenseConfig) or draw(st.booleans())
    moe = st.sampled_from(["all", "last_half", "every_other"]) | st.lists(st.integers(0, blocks - 1)).map(tuple)
    model = ModelConfig(
        num_blocks=blocks,
        d_model=heads * draw(small),
        d_ff=d_ff,
        num_heads=heads,
        context_length=length,
        vocab_size=draw(st.integers(1, 1000)),
        feed_forward=kind,
        moe_blocks=draw(moe),
        dense_bias=dense_bias,
        final_norm=draw(st.booleans()),
        init=InitConfig(draw(st.sampled_from(["truncated_normal", "normal", "uniform"])), draw(positive)),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        loss_chunk=chunk,
    )
    group_size = max(model.group_size, model.sequences_per_routing_group)
    optimizer = OptimizerConfig(
        draw(st.sampled_from(["adamw", "adafactor", "muon"])),
        draw(positive),
        beta1=draw(unit),
        multipliers=draw(st.lists(st.tuples(st.text(), positive)).map(tuple)),
    )
    data_group = draw(st.sampled_from([None, group_size, 2 * group_size]))
    batch_size = (data_group or group_size) * accumulation * draw(small)
    training = TrainingConfig(draw(small), batch_size, accumulation, optimizer=optimizer)
    data = DataConfig(shuffle_group_size=data_group, directory=draw(st.none() | st.text()))
    return Config(
        model, data, training, MeshConfig(draw(st.sampled_from([-1, 1, 8])), draw(small), draw(small), draw(small))
    )


# --- checks -----------------------------------------------------------------------------------------------------------


@given(configs())
def test_valid_configs_pass(config):
    check(config)


MIXTURE = Config(model=ModelConfig(feed_forward=MixtureOfTokensConfig(32, 32)))
BROKEN = {
    "model.num_heads": 3,
    "model.loss_chunk": 100,
    "model.moe_blocks": (1, 4),
    "model.feed_forward.num_experts": 48,
    "model.feed_forward.shared_expert_dim": 1024,
    "model.feed_forward.mixing.temperature": -1.0,
    "training.batch_size": 100,
    "training.gradient_accumulation_steps": 3,
    "training.optimizer.clip_norm": 0,
    "training.optimizer.beta1": 1.5,
    "training.optimizer.min_lr_ratio": 2.0,
    "training.optimizer.learning_rate": float("nan"),
    "data.shuffle_group_size": 33,
    "data.validation_windows": 0,
    "data.final_validation_windows": 0,
    "mesh.data": 0,
    "mesh.expert": -2,
    "mesh.wait_seconds": 0,
    "mesh.heartbeat_seconds": -1,
    "checkpoint.max_to_keep": 0,
    "checkpoint.preempted_exit_code": 2,
    "logging.sample_tokens": -1,
    "model.norm_epsilon": 0.0,
    "model.num_kv_heads": 3,
    "model.feed_forward.mixing.groups": "within",
    "model.feed_forward.mixing.controllers": "separate",
    "model.feed_forward.mixing.base_weight": "one",
    "model.feed_forward.mixing.emit": "softmax",
    "model.feed_forward.mixing.separate_temperatures": True,
    "data.corpus": (),
    "data.weights": (1.0, 2.0),
    "data.mask_rate": 0.0,
    "training.optimizer.multipliers": (("controller", -1.0),),
}
# Invalid combinations: the other fields, the field, its value.
COMBINED = [
    (MixingConfig("uniform"), "temperature", 0.5),
    (MixingConfig("uniform"), "annealing", "linear"),
    (MixingConfig("logits"), "learned_temperature", "scalar"),
    (MixingConfig("uniform"), "straight_through", True),
    (MixingConfig(annealing="cosine"), "annealing_steps", (5, 5)),
    (MixingConfig(annealing="cosine"), "learned_temperature", "scalar"),
    (MixingConfig(temperature=0.0), "learned_temperature", "per_expert"),
]


@pytest.mark.parametrize("name", BROKEN)
def test_each_error_is_one_line_with_field_value_rule_and_a_value_that_works(name):
    broken = put(MIXTURE, name, BROKEN[name])
    (line,) = errors_of(broken)
    field = "training.batch_size" if name == "training.gradient_accumulation_steps" else name
    assert (
        line.startswith((f"{field} = {get(broken, field)}: ", f"{field} = {get(broken, field)!r}: "))
        and "\n" not in line
    )
    check(follow(broken, line))


@pytest.mark.parametrize("code", [-1, 0, 1, 2, 3, 127, 130, 201, 256])
def test_an_exit_code_after_which_no_run_is_restarted_is_not_that_of_a_preempted_one(code):
    broken = put(MIXTURE, "checkpoint.preempted_exit_code", code)
    (line,) = errors_of(broken)
    assert line.startswith(f"checkpoint.preempted_exit_code = {code}: must be from 4 to 200") and line.endswith(
        "; try 143"
    )
    check(follow(broken, line))


@pytest.mark.parametrize(("mixing", "name", "value"), COMBINED)
def test_mixing_without_a_meaning_is_refused(mixing, name, value):
    broken = put(MIXTURE, "model.feed_forward.mixing", dataclasses.replace(mixing, **{name: value}))
    (line,) = errors_of(broken)
    assert line.startswith(f"model.feed_forward.mixing.{name} = {value!r}: ")
    check(follow(broken, line))


def test_more_combinations_are_refused():
    rotary = put(put(MIXTURE, "model.num_heads", 256), "model.positions", "rotary")
    dense = put(MIXTURE, "model.feed_forward", DenseConfig())
    entropy, upcycled = (
        put(dense, name, value)
        for name, value in {"training.losses.mixing_entropy": 0.1, "training.upcycle_from": "runs/dense"}.items()
    )
    losses = [put(MIXTURE, f"training.losses.{name}", 0.1) for name in ("load_balancing", "router_z", "relu_l1")]
    for broken in (rotary, entropy, upcycled, *losses, put(dense, "model.dense_bias", False)):
        (line,) = errors_of(broken)
        check(follow(broken, line))


TRAINED_AS = MixtureOfTokensConfig(8, 16, 256)
ROUTED = Config(
    model=ModelConfig(feed_forward=TokenChoiceConfig(16, top_k=4, routing_group_tokens=512, mixture=TRAINED_AS))
)
BROKEN_ROUTING = {
    "model.feed_forward.top_k": 3,
    "model.feed_forward.num_experts": 0,
    "model.feed_forward.routing_group_tokens": 300,
    "model.feed_forward.capacity_factor": 0,
    "model.feed_forward.mixture.num_experts": 32,
    "model.feed_forward.mixture.expert_dim": 128,
    "model.feed_forward.mixture.mixing.temperature": -1.0,
    "data.shuffle_group_size": 3,
    "training.batch_size": 33,
}


@pytest.mark.parametrize("name", BROKEN_ROUTING)
def test_each_error_of_token_choice_is_one_line(name):
    check(ROUTED)
    broken = put(ROUTED, name, BROKEN_ROUTING[name])
    line = next(line for line in errors_of(broken) if line.startswith(f"{name} = {BROKEN_ROUTING[name]}: "))
    for _ in range(4):  # another number of experts breaks other rules
        broken = reduce(follow, errors_of(broken), broken)
    check(broken)
    assert get(broken, name) != BROKEN_ROUTING[name], line


def test_more_choices_than_experts_and_no_width_left():
    fields = [("top_k", 32), ("shared_expert_dim", 1024)]
    cases = [(kind, *field) for kind in (TokenChoiceConfig(16), HashConfig(16)) for field in fields]
    for kind, name, value in [*cases, (HashConfig(16), "vocab_size", 256), (HashConfig(16), "top_k", 3)]:
        kind = dataclasses.replace(kind, **{name: value})
        (line,) = errors_of(put(ROUTED, "model.feed_forward", kind))
        assert line.startswith(f"model.feed_forward.{name} = {value}: must ")
        check(follow(put(ROUTED, "model.feed_forward", kind), line))


def test_errors_of_expert_choice():
    kind = ExpertChoiceConfig(16, 16, over="tokens", top_k=32)
    chosen = put(MIXTURE, "model.feed_forward", kind)
    top_k, over = errors_of(chosen)
    assert top_k.startswith("model.feed_forward.top_k = 32: must be at most model.feed_forward.num_experts = 16")
    assert over.startswith("model.feed_forward.over = 'tokens': ") and "later tokens" in over
    check(reduce(follow, (top_k, over), chosen))
    check(put(put(chosen, "model.objective", "masked"), "model.feed_forward.top_k", 2))
    few = put(put(MIXTURE, "model.feed_forward", ExpertChoiceConfig(6, 50, top_k=4)), "training.batch_size", 6)
    (line,) = errors_of(few)
    assert line.startswith(
        "model.feed_forward.capacity_factor = 1.0: must be at least num_experts / (top_k x group_size)"
    )
    assert follow(few, line).model.feed_forward.capacity_factor == 2.0834
    check(follow(few, line))
    check(put(few, "model.feed_forward.top_k", 16))
    assert chosen.model.group_size == 1 and put(chosen, "model.feed_forward.over", "batch").model.group_size == 16


def test_sequences_of_a_routing_group_come_from_different_documents():
    assert ROUTED.group_size == 2 and ROUTED.model.group_size == 1
    assert put(ROUTED, "model.feed_forward.routing_group_tokens", 128).group_size == 1


@pytest.mark.parametrize("experts", [32, 48])
def test_flop_matched(experts):
    """The rule of flop_matched can be met with 32 experts, and not with 48."""
    kind = MixtureOfTokensConfig(32, experts, expert_dim=1000, flop_matched=True)
    broken = put(MIXTURE, "model.feed_forward", kind)
    (line,) = errors_of(broken)
    assert line.startswith("model.feed_forward.expert_dim = 1000: breaks the rule")
    check(follow(broken, line))
    check(put(broken, "model.feed_forward.flop_matched", False))


@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.0, 0.0), (1.0, math.nan), (-1.0, 2.0), (1.0, math.inf)])
def test_the_advice_on_weights_has_one_for_each_corpus(weights):
    broken = put(put(MIXTURE, "data.corpus", ("one", "two")), "data.weights", weights)
    lines = errors_of(broken)
    assert all(line.startswith(f"data.weights = {weights}: ") for line in lines)
    check(follow(broken, lines[0]))


def test_only_one_axis_takes_the_remaining_devices():
    broken = put(put(MIXTURE, "mesh.data", -1), "mesh.expert", -1)
    (line,) = errors_of(broken)
    check(follow(broken, line))


def test_all_errors_are_reported_at_once():
    masked = {"training.gradient_accumulation_steps", "model.feed_forward.num_experts"}
    masked |= {"data.weights", "model.num_kv_heads"}
    masked |= {f"model.feed_forward.mixing.{name}" for name in ("groups", "emit", "controllers")}
    several = {name: value for name, value in BROKEN.items() if name not in masked}
    broken = reduce(lambda config, item: put(config, *item), several.items(), MIXTURE)
    assert {line.split(" = ")[0] for line in errors_of(broken)} == set(several)


@given(configs(), st.data())
def test_any_number_is_accepted_or_refused_with_advice_that_works(config, data):
    """No number in any field makes the checks fail, and following their advice leads to a valid config.

    It takes more than one round, since a field that returns to its range can break the rule of another one.
    """
    name = data.draw(st.sampled_from([n for n in leaves(config) if type(get(config, n)) in (int, float)]))
    config = put(config, name, data.draw(st.integers(-5, 70)))
    for _ in range(4):
        config = reduce(follow, errors_of(config), config)
    check(config)


@pytest.mark.parametrize("name", leaves(MIXTURE))
def test_wrong_types_are_named_with_the_default(name):
    number = type(get(MIXTURE, name)) in (int, float)
    for value in [{}, ["a"], *([True, "1", None] if number and not name.endswith("cut") else [])]:
        broken = put(MIXTURE, name, value)
        (line,) = errors_of(broken)
        assert line.startswith(f"{name} = {value!r}: must be ")
        check(follow(broken, line))


# --- JSON -------------------------------------------------------------------------------------------------------------


@given(configs())
def test_json_round_trip(config):
    restored = from_json(to_json(config))
    assert restored == config and to_json(restored) == to_json(config)
    assert type(restored.model.feed_forward) is type(config.model.feed_forward)


def edited(name: str, value: Any) -> str:
    """The JSON of a config in which one field, existing or new, has been set."""
    data = json.loads(to_json(MIXTURE))
    *path, last = name.split(".")
    reduce(lambda group, key: group[key], path, data)[last] = value
    return json.dumps(data)


EDITS = {
    "unknown field": (
        edited("training.batch_sise", 3),
        "training.batch_sise: no such field; did you mean 'batch_size'",
    ),
    "unknown group": (edited("modell", {}), "modell: no such field; did you mean 'model'?"),
    "far from any": (edited("mesh.zzz", 1), "mesh.zzz: no such field; there is data, fsdp, expert, tensor"),
    "field of another kind": (edited("model.feed_forward.bias", True), "model.feed_forward.bias: no such field"),
    "unknown kind": (
        edited("model.feed_forward.kind", "dens"),
        "model.feed_forward.kind = 'dens': no such kind; did you mean 'dense'?",
    ),
    "wrong type": (edited("model.d_model", "256"), "model.d_model = '256': must be int; try 256"),
    "not a group": (edited("model", 3), "model = 3: must be a group of fields"),
    "bad value": (edited("model.num_heads", 3), "model.num_heads = 3: must divide model.d_model = 256; try 2"),
    "other version": (edited("version", 99), "config.json: version = 99: this mot_jax reads version 3"),
    "no version": ("{}", "config.json: version = None: this mot_jax reads version 3"),
    "no object": ("[]", "config.json: version = None"),
    "no JSON": ('{"version": 3,\n"model"', "config.json, line 2: not JSON"),
}


@pytest.mark.parametrize("case", EDITS)
def test_json_is_strict(case):
    text, start = EDITS[case]
    with pytest.raises(UserError) as error:
        from_json(text)
    assert error.value.faults[0].startswith(start)


# --- resuming ---------------------------------------------------------------------------------------------------------

FREE = {
    "data.directory",
    "data.validation_windows",
    "data.final_validation_windows",
    "mesh.data",
    "mesh.fsdp",
    "mesh.expert",
    "mesh.tensor",
    "checkpoint.max_to_keep",
    "model.attention_kernel",
    "model.feed_forward.kernel",
    "model.feed_forward.save_for_backward",
}
FREE |= {"logging.tensorboard", "logging.wandb", "logging.wandb_project", "logging.sample_tokens"}
FREE |= {f"training.{name}" for name in ("log_every", "validate_every", "checkpoint_every", "max_skipped")}
FREE |= {"mesh.wait_seconds", "mesh.heartbeat_seconds", "checkpoint.preempted_exit_code"}
FREE |= {"checkpoint.keep_every", "checkpoint.keep_best", "checkpoint.verify"}


@pytest.mark.parametrize("name", leaves(MIXTURE))
def test_every_field_is_identity_extendable_or_free(name):
    """Fields on which no number of the training depends are free. Of the others, only `steps` may change."""
    changed = put(MIXTURE, name, "other")
    if name == "training.steps":
        assert identity_changes(MIXTURE, put(MIXTURE, name, 2000)) == []
        (line,) = identity_changes(MIXTURE, put(MIXTURE, name, 500))
        assert line == "training.steps: 1000 in the run, now 500; a run can be extended, not shortened"
    elif name in FREE:
        assert identity_changes(MIXTURE, changed) == []
    else:
        (line,) = identity_changes(MIXTURE, changed)
        assert line.startswith(f"{name}: {get(MIXTURE, name)!r} in the run, now 'other'")


@given(configs())
def test_a_config_has_no_identity_changes_after_a_round_trip(config):
    assert identity_changes(config, from_json(to_json(config))) == []


@pytest.mark.parametrize("name", ["training.upcycle_from", "training.transition_from"])
def test_a_source_run_is_part_of_the_identity_however_its_path_is_spelled(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    run = put(MIXTURE, name, f"{tmp_path}/runs/a")
    for spelling in ("runs/a", "./runs/../runs/a/", "~/runs/a", f"{tmp_path}/link/a"):
        assert identity_changes(run, put(MIXTURE, name, spelling)) == []
    for other in ("runs/b", "/runs/a", "gs://runs/a", None):
        for old, new in ((run, put(MIXTURE, name, other)), (put(MIXTURE, name, other), run)):
            (line,) = identity_changes(old, new)
            assert (
                line == f"{name}: {get(old, name)!r} in the run, now {get(new, name)!r}; it is part of a run's identity"
            )
    (line,) = identity_changes(put(MIXTURE, name, "gs://runs/a"), put(MIXTURE, name, "gs://runs/b"))


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        (("/a", "c4"), ("/b", "c4"), 0),
        (("/a", "c4"), ("/b", "wiki"), 1),
        (("/a", "c4"), ("/b",), 1),
        (("/a",), (), 1),
        (("/a",), ("a",), 1),
    ],
)
def test_paths_of_corpora_are_compared_by_content_and_names_are_not(old, new, changes):
    assert len(identity_changes(put(MIXTURE, "data.corpus", old), put(MIXTURE, "data.corpus", new))) == changes


def test_all_changes_are_reported_at_once():
    assert len(identity_changes(MIXTURE, put(put(MIXTURE, "training.seed", 1), "model.d_model", 8))) == 2


def test_the_feed_forward_kind_is_part_of_the_identity():
    dense = put(MIXTURE, "model.feed_forward", DenseConfig())
    (line,) = identity_changes(MIXTURE, dense)
    assert line.startswith("model.feed_forward.kind: 'mixture_of_tokens' in the run, now 'dense'; ")
