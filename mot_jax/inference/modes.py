"""Other ways to run a trained model: functions Config -> Config. The same parameters load under all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from mot_jax.config import (
    Config,
    ConfigError,
    FeedForwardConfig,
    LossWeights,
    MixingConfig,
    MixtureOfTokensConfig,
    TokenChoiceConfig,
    check,
)


def grouped(config: Config) -> Config:
    """As trained: the rows of a group influence each other. Of token choice that was tuned from it: the MoT it was."""
    return _mixed(config, "--mode grouped") if isinstance(config.model.feed_forward, TokenChoiceConfig) else config


def discrete(config: Config) -> Config:
    """Each expert takes its first arg-max token of the group (PAPER.md section 4): temperature 0, learnt or not.

    The rows of a group influence each other still. A merge without a softmax takes the largest logit.
    """
    config = _mixed(config, "--mode discrete")
    mixing = _mixture(config).mixing
    merge = "softmax" if mixing.merge == "logits" else mixing.merge
    plain = MixingConfig()
    # `softmax` over the same logits at the same temperature 0 is what merge has.
    emit = "merge" if mixing.emit == "softmax" and mixing.controllers == "shared" else mixing.emit
    return _with(
        config,
        mixing=dataclasses.replace(
            mixing,
            merge=merge,
            emit=emit,
            temperature=0.0 if merge == "softmax" or mixing.own_emit else plain.temperature,
            annealing=plain.annealing,
            learnt_temperature=plain.learnt_temperature,
            separate_temperatures=plain.separate_temperatures,
            straight_through=plain.straight_through,
        ),
    )


def regrouped(config: Config, group_size: int) -> Config:
    """The same experts for groups of another size (PAPER.md section 3)."""
    config = _mixed(config, f"--group-size {group_size}")
    width = _mixture(config).hidden_dim(config.model.d_ff)
    changed = _with(config, group_size=group_size, expert_dim=width, flop_matched=False)
    return _whole_groups(changed)


def token_choice(config: Config, top_k: int | None = None) -> Config:
    """Each token to the top_k experts that the controller, by softmax over the experts, finds likeliest; none dropped.

    No token sees another row. Of a MoT layer top_k is its granularity, and at least 1; a temperature is not applied,
    which changes the probabilities but no choice. Of token choice it is as trained, without the capacity.

    Raises ConfigError for a MoT whose controller is no router: learnt otherwise or scaled for each expert, beside
    another one, or before a norm, which no token by itself has.
    """
    kind = config.model.feed_forward
    if isinstance(kind, MixtureOfTokensConfig):
        if faults := list(_router_faults(kind.mixing)):
            raise ConfigError(*faults)
        kind = TokenChoiceConfig(
            num_experts=kind.num_experts,
            expert_dim=kind.hidden_dim(config.model.d_ff),
            top_k=max(1, kind.num_experts // kind.group_size),
            shared_dim=kind.shared_dim,
            routing_group_tokens=config.model.context_length,
            controller_init_scale=kind.controller_init_scale,
            w_in_init_scale=kind.w_in_init_scale,
            w_out_init_scale=kind.w_out_init_scale,
            mixture=kind,
        )
    if not isinstance(kind, TokenChoiceConfig):
        raise ConfigError(
            f"--mode token_choice: must be left out, since the layers have no experts: they are {kind.kind}"
        )
    tokens = min(kind.routing_group_tokens, config.model.context_length)
    width = kind.hidden_dim(config.model.d_ff)  # of the weights, however many are chosen
    kind = dataclasses.replace(kind, expert_dim=width, top_k=top_k or kind.top_k)
    changed = _with_kind(config, dataclasses.replace(kind, capacity_factor=None, routing_group_tokens=tokens))
    check(changed)
    return changed


def _router_faults(mixing: MixingConfig) -> Iterator[str]:
    plain = {"merge": "softmax", "controllers": "shared", "layer_norm": False}
    reasons = {
        "merge": "the controller was not learnt as the logits of a softmax",
        "controllers": "there are two controllers, and a router is one",
        "layer_norm": "the experts read normalised mixtures, and a token by itself is none",
    }
    for name, value in plain.items():
        if getattr(mixing, name) != value:
            yield f"--mode token_choice: has no meaning with mixing.{name} = {getattr(mixing, name)!r}: {reasons[name]}"
    if mixing.learnt_temperature == "per_expert":
        yield "--mode token_choice: has no meaning with a temperature learnt for each expert, by which choices differ"


MODES = {"grouped": grouped, "discrete": discrete, "token_choice": token_choice}


def _mixed(config: Config, asked: str) -> Config:
    """`config` itself if its layers mix; the MoT that the layers were if they were tuned from one."""
    kind = config.model.feed_forward
    if isinstance(kind, TokenChoiceConfig) and kind.mixture is not None:
        return _whole_groups(_with_kind(config, kind.mixture))
    if not isinstance(kind, MixtureOfTokensConfig):
        raise ConfigError(f"{asked}: must be left out, since the model's layers mix nothing: they are {kind.kind}")
    return config


def _mixture(config: Config) -> MixtureOfTokensConfig:
    kind = config.model.feed_forward
    assert isinstance(kind, MixtureOfTokensConfig)
    return kind


def _with(config: Config, **changes: object) -> Config:
    return _with_kind(config, dataclasses.replace(_mixture(config), **changes))  # type: ignore[arg-type]


def _with_kind(config: Config, kind: FeedForwardConfig) -> Config:
    """Another feed-forward layer, without what the training had for the one before."""
    training = config.training
    if type(kind) is not type(config.model.feed_forward):
        losses = LossWeights(head_z=training.losses.head_z)
        training = dataclasses.replace(training, upcycle_from=None, losses=losses)
    model = dataclasses.replace(config.model, feed_forward=kind)
    return dataclasses.replace(config, model=model, training=training)


def _whole_groups(config: Config) -> Config:
    """With a batch of whole groups of the model."""
    data, rows = dataclasses.replace(config.data, group_size=None), config.model.group_size
    batch = -(-config.training.batch_size // rows) * rows
    training = dataclasses.replace(config.training, batch_size=batch, accumulation=1)
    changed = dataclasses.replace(config, data=data, training=training)
    check(changed)
    return changed
