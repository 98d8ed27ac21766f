"""Feed-forward kinds at equal cost, against numbers that are counted independently of `mot_jax.cost`."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mot_jax import cli
from mot_jax.config import (
    Config,
    DataConfig,
    DenseConfig,
    ExpertChoiceConfig,
    LossWeights,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TokenChoiceConfig,
    TrainingConfig,
    check,
    load_config,
)
from mot_jax.cost.feed_forward import trainable_kinds
from mot_jax.cost.matched import matched, remainder, rows, width_of
from mot_jax.errors import UserError
from mot_jax.nn.transformer import init_params

DEMO = load_config(str(Path(__file__).parents[2] / "configs/demo.py:all_blocks"))
COUNTED = {"dense", "mixture_of_tokens", "token_choice", "expert_choice"}  # by `count_by_hand`
RULES = ("layer_flops", "expert_flops", "parameters")


def with_fields(config, name, **changes):
    """`config` with fields of `config.NAME` replaced, where NAME may be dotted."""
    first, _, rest = name.partition(".")
    group = getattr(config, first)
    group = with_fields(group, rest, **changes) if rest else dataclasses.replace(group, **changes)
    return dataclasses.replace(config, **{first: group})


def count_by_hand(model, kind, by):
    """FLOPs per token of a layer: two or three matrices of each network, and three products of D x E for mixing."""
    of_width = 2 * model.d_model * (3 if model.gated else 2)
    if isinstance(kind, DenseConfig):
        return of_width * model.d_ff
    mixture = isinstance(kind, MixtureOfTokensConfig)
    share = kind.num_experts / kind.group_size if mixture else kind.top_k
    experts = of_width * (kind.hidden_dim(model.d_ff) * share + kind.shared_expert_dim)
    return experts + (2 * model.d_model * kind.num_experts * (3 if mixture else 1) if by == "layer_flops" else 0)


def excess_by_hand(config, changed, by):
    if by == "parameters":
        shapes = (
            jax.eval_shape(lambda model=c.model: init_params(model, jax.random.key(0))) for c in (config, changed)
        )
        before, after = (sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for tree in shapes)
        return after / before - 1
    old, new = config.model.block_kinds(), changed.model.block_kinds()
    before, after = (
        sum(count_by_hand(c.model, kind, by) for kind in kinds) for c, kinds in ((config, old), (changed, new))
    )
    replaced = sum(count_by_hand(config.model, a, by) for a, b in zip(old, new, strict=True) if type(a) is not type(b))
    return (after - before) / replaced


# --- widths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "dense", "routed"),
    [
        # 3 x 2 x 96 x 128 of mixing are worth 192 of d_ff; a router has a third, and 4 F + 96 + 64 = 384 + 192.
        ("layer_flops", 576, 104),
        ("expert_flops", 384, 72),
        # 3 x 2 x 96 x (128 x 72 + 96) + 3 x 96 x 128 parameters, less a bias of d_ff + 96 in each block.
        ("parameters", 9328, 72),
    ],
)
def test_widths_of_the_demo(by, dense, routed):
    assert matched(DEMO, "mixture_of_tokens", by) is DEMO
    assert matched(DEMO, "dense", by).model == dataclasses.replace(
        DEMO.model, d_ff=dense, feed_forward=DenseConfig(bias=True)
    )
    kind = matched(DEMO, "token_choice", by).model.feed_forward
    tokens = 32 * 64  # a routing group has the sequences of a group
    assert kind == TokenChoiceConfig(
        128, routed, 4, shared_expert_dim=96, routing_group_tokens=tokens, controller_init_scale=3.0
    )


@pytest.mark.parametrize("by", RULES)
def test_remainders_are_those_counted_by_hand(by):
    """Gated experts, a shared one, and dense layers next to them without biases."""
    config = with_fields(DEMO, "model", moe_blocks="last_half", gated=True, dense_bias=False, d_ff=768)
    for kind in ("dense", "token_choice", "expert_choice"):
        changed = matched(config, kind, by)
        excess = remainder(config, changed, by)
        assert excess == pytest.approx(excess_by_hand(config, changed, by), abs=1e-12) and abs(excess) <= 0.02
        # No neighbor is nearer.
        field, width = width_of(changed)
        group, _, name = field.rpartition(".")
        for neighbor in (width - 8, width + 8):
            assert abs(remainder(config, with_fields(changed, group, **{name: neighbor}), by)) >= abs(excess)
    assert matched(config, "dense", by).model.feed_forward == DenseConfig(bias=False)


def test_a_dense_model_is_replaced_by_the_experts_of_its_batches():
    """E is the default of 32; G is that of the batches, which stay the same; k = E / G."""
    dense = matched(DEMO, "dense", "expert_flops")
    dense = with_fields(with_fields(dense, "model.feed_forward", bias=False), "data", shuffle_group_size=8)
    mixture = matched(dense, "mixture_of_tokens", "expert_flops")
    assert mixture.model.feed_forward == MixtureOfTokensConfig(8, 32, expert_dim=96)
    assert not mixture.model.dense_bias and mixture.group_size == dense.group_size == 8
    assert matched(dense, "token_choice", "expert_flops").model.feed_forward.top_k == 4
    assert matched(mixture, "dense", "expert_flops").model == dense.model


@st.composite
def configs(draw) -> Config:
    """Valid configs of every kind, many of them with experts of few widths, which no multiple of 8 matches."""
    group_size, granularity = draw(st.sampled_from([1, 2, 8])), draw(st.sampled_from([1, 2, 3]))
    shared, gated = draw(st.sampled_from([0, 24])), draw(st.booleans())
    d_ff = shared + draw(st.sampled_from([6, 48, 120, 960]))
    experts = group_size * granularity
    kind = draw(
        st.sampled_from(
            [
                DenseConfig(draw(st.booleans())),
                MixtureOfTokensConfig(group_size, experts, shared_expert_dim=shared),
                MixtureOfTokensConfig(group_size, experts, 40, shared_expert_dim=shared, flop_matched=False),
                TokenChoiceConfig(experts, top_k=granularity, shared_expert_dim=shared, routing_group_tokens=16),
                ExpertChoiceConfig(group_size, experts, top_k=granularity, shared_expert_dim=shared),
            ]
        )
    )
    model = ModelConfig(
        num_blocks=2,
        d_model=16,
        d_ff=d_ff,
        context_length=8,
        loss_chunk=8,
        vocab_size=64,
        gated=gated,
        feed_forward=kind,
        moe_blocks=draw(st.sampled_from(["all", "last_half", ()])),
        dense_bias=isinstance(kind, DenseConfig) or draw(st.booleans()),
    )
    return Config(model, training=TrainingConfig(batch_size=draw(st.sampled_from([32, 48]))))


def with_advice(config, by, name, value):
    """`config` and `by` after the advice of an error."""
    if name == "by":
        return config, value
    group, _, field = name.rpartition(".")
    return with_fields(config, group, **{field: int(value) if value.isdecimal() else value}), by


@pytest.mark.slow
@settings(max_examples=25)
@given(configs(), st.sampled_from([*trainable_kinds()]), st.sampled_from(RULES))
def test_a_config_is_matched_or_the_advice_of_the_error_works(config, kind, by):
    check(config)
    rules = set()
    while True:
        try:
            changed = matched(config, kind, by)
            break
        except UserError as error:  # after its advice another rule may be broken, but not the same one again
            (line,) = error.faults
            error = re.fullmatch(r"([\w.]+) = (?:.+?)( of kind \w+)?: .+; try (?:([\w.]+) = )?'?(\w+)'?", line)
            assert error and (error[1], error[2]) not in rules, line
            rules.add((error[1], error[2]))
            config, by = with_advice(config, by, error[3] or error[1], error[4])
    check(changed)
    assert changed.model.feed_forward.kind == kind
    if kind == config.model.feed_forward.kind:
        assert changed == config
        return
    assert width_of(changed)[1] % 8 == 0
    if by == "parameters" or {kind, config.model.feed_forward.kind} <= COUNTED:
        assert abs(excess_by_hand(config, changed, by)) <= 0.02
    sizes = [
        (k.num_experts, k.shared_expert_dim or 0)  # None: without one to keep, the kind's default
        for c in (config, changed)
        if hasattr(k := c.model.feed_forward, "num_experts")
    ]
    assert len({*sizes}) == 1


# --- the rest of the config -------------------------------------------------------------------------------------------


def test_training_options_of_the_old_kind_are_removed():
    optimizer = OptimizerConfig(multipliers=(("controller", 3.0), ("attention", 2.0)))
    config = with_fields(
        DEMO,
        "training",
        optimizer=optimizer,
        losses=LossWeights(mixing_entropy=0.1, head_z=0.2),
        upcycle_from="runs/dense",
    )
    dense, routed = (matched(config, kind, "layer_flops") for kind in ("dense", "token_choice"))
    for changed in (dense, routed):
        assert changed.training.upcycle_from is None and changed.training.losses == LossWeights(head_z=0.2)
        assert changed.group_size == config.group_size
    assert dense.training.optimizer.multipliers == (("attention", 2.0),)
    assert routed.training.optimizer == optimizer
    tuned = with_fields(routed, "training", transition_from="runs/mot", transition_router="random")
    assert matched(tuned, "mixture_of_tokens", "layer_flops").training == dataclasses.replace(
        routed.training, transition_from=None
    )


def test_batches_stay_the_same_if_groups_divide_them():
    assert matched(DEMO, "dense", "layer_flops").data == dataclasses.replace(DEMO.data, shuffle_group_size=32)
    routed = with_fields(DEMO, "model", feed_forward=TokenChoiceConfig(16, top_k=2, routing_group_tokens=64))
    assert matched(routed, "mixture_of_tokens", "expert_flops").group_size == 8
    over_tokens = ExpertChoiceConfig(num_experts=16, top_k=2, over="tokens")  # whose group size of 32 is not used
    masked = with_fields(DEMO, "model", feed_forward=over_tokens, objective="masked")
    assert matched(masked, "mixture_of_tokens", "expert_flops").group_size == 8
    pairs = dataclasses.replace(routed, data=DataConfig(shuffle_group_size=16))
    assert matched(pairs, "mixture_of_tokens", "expert_flops").data.shuffle_group_size == 16


def test_soft_moe_has_the_slots_of_k_experts_per_token():
    """4 = E / G of 128 experts for each of 64 tokens are 2 slots of an expert; FLOPs as of token choice."""
    masked = with_fields(DEMO, "model", objective="masked", vocab_size=258)
    soft, routed = (matched(masked, kind, "expert_flops").model.feed_forward for kind in ("soft_moe", "token_choice"))
    assert (soft.num_experts, soft.slots_per_expert, soft.expert_dim) == (128, 2, routed.expert_dim)
    more = with_fields(masked, "model", feed_forward=dataclasses.replace(routed, top_k=6))
    assert matched(more, "soft_moe", "expert_flops").model.feed_forward.slots_per_expert == 3


@pytest.mark.parametrize(
    ("kind", "by", "words"),
    [
        ("token_choise", "layer_flops", "kind = 'token_choise': no such feed-forward kind that trains; did you mean"),
        ("companions", "layer_flops", "kind = 'companions': no such feed-forward kind that trains"),
        ("dense", "flops", "by = 'flops': must be 'layer_flops' or 'expert_flops' or 'parameters'"),
    ],
)
def test_errors_name_the_argument(kind, by, words):
    with pytest.raises(UserError, match=re.escape(words)):
        matched(DEMO, kind, by)


# --- rows, and the command --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_empty_slots_are_executed_but_not_useful():
    """12 of 128 x 1.25 x 4 / 32 = 20 slots of an expert; of 7 tokens 2 slots, where 1.1 would be even.

    Without a capacity, the 2,048 choices of a batch fill at most 10 + (2,048 - 10) // 128 = 25 blocks of 128 rows.
    """
    config = with_fields(DEMO, "model", feed_forward=DenseConfig(), moe_blocks=(1,))
    for fields, slots in (
        ({"num_experts": 32, "top_k": 4, "routing_group_tokens": 128}, 32 * 20 / 128),
        ({"num_experts": 10, "top_k": 1, "routing_group_tokens": 8}, 10 * 1 / 8),
        ({"num_experts": 10, "top_k": 1, "routing_group_tokens": 8, "capacity_factor": None}, 25 * 128 / 2048),
    ):
        kind = TokenChoiceConfig(expert_dim=48, shared_expert_dim=16, **fields)
        row = next(
            row for row in rows(with_fields(config, "model", feed_forward=kind), "parameters") if row["is_config"]
        )
        router, of_width = 2 * 96 * kind.num_experts, 4 * 96
        assert row["layer_flops"] == router + of_width * (48 * kind.top_k + 16)
        assert row["executed_layer_flops"] == pytest.approx(router + of_width * (48 * slots + 16))
        assert row["executed_model_flops"] - row["model_flops"] == pytest.approx(
            row["executed_layer_flops"] - row["layer_flops"]
        )


def test_the_command_prints_all_kinds(capsys, tmp_path):
    path = str(Path(__file__).parents[2] / "configs/demo.py:all_blocks")
    output = tmp_path / "kinds.json"
    cli.main(["describe", "--matched", path, "--json", str(output)])
    written, lines = json.loads(output.read_text()), capsys.readouterr().out.splitlines()
    assert (written["by"], [row["kind"] for row in written["kinds"]]) == ("layer_flops", [*trainable_kinds()])
    for row, line in zip(written["kinds"], lines[3:], strict=False):
        if row["kind"] == "soft_moe":  # not causal
            assert row.keys() == {"kind", "is_config", "reason"} and line.split() == [
                "soft_moe",
                *["-"] * (len(line.split()) - 1),
            ]
            continue
        assert line.startswith(row["kind"]) and f"{row['width']:,}  " in line and f"{row['parameters']:,}" in line
        assert ("*" in line) == row["is_config"] == (row["kind"] == "mixture_of_tokens")
    cli.main(["describe", path, "--matched", "expert_flops", "--training.steps", "3"])
    assert "matched by expert_flops" in capsys.readouterr().out


def test_a_kind_that_cannot_replace_the_layer_has_the_reason(capsys):
    path = str(Path(__file__).parents[2] / "configs/demo.py:dense")
    flags = ["--data.shuffle-group-size", "2", "--training.batch-size", "10"]
    cli.main(["describe", path, *flags, "--model.d-ff", "12", "--matched=layer_flops"])
    output = capsys.readouterr().out
    assert re.search(r"^dense \* +d_ff 12 .* 0$", output, re.MULTILINE)
    assert re.search(r"^mixture_of_tokens +-", output, re.MULTILINE)
    assert re.search(r"^mixture_of_tokens: model.feed_forward.expert_dim = 8 .*; try ", output, re.MULTILINE)


@pytest.mark.parametrize("value", ["layer_flop", ""])
def test_a_rule_that_does_not_exist_is_one_line(capsys, value):
    with pytest.raises(SystemExit) as end:
        cli.main(["describe", str(Path(__file__).parents[2] / "configs/demo.py:all_blocks"), f"--matched={value}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith(f"error: --matched = {value!r}: must be 'layer_flops' or")
