"""Other ways to run a trained model: functions Config -> Config. The same parameters load under all of them.

`enter` adds to the parameters what a mode needs beside them, and changes nothing else; but where a layer's kernel is
not for the device, XLA takes its place. A mode is named as in `MODES`; where tokens choose among the experts,
`token_choice:2`, say, has each choose two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from mot_jax.config import (
    CompanionsConfig,
    Config,
    FeedForwardConfig,
    LossWeights,
    MixingConfig,
    MixtureOfTokensConfig,
    TokenChoiceConfig,
    check,
    kernel_runs_on,
    without_kernel,
)
from mot_jax.errors import UserError, nearest

if TYPE_CHECKING:  # commands that run no model do without JAX
    import numpy as np

    from mot_jax.nn.transformer import Params


@dataclasses.dataclass(frozen=True)
class Mode:
    """change: the mode. about: what it does, in a line. independent: no row hears another's text.
    chooses: tokens choose among the experts, as many as `change`'s second argument says, or by its default E / G.
    """

    change: Callable[..., Config]
    about: str
    independent: bool = False
    chooses: bool = False


def grouped(config: Config) -> Config:
    """As trained: the rows of a group influence each other. Of token choice that was tuned from it: the MoT it was."""
    return _mixed(config, "--mode grouped") if isinstance(config.model.feed_forward, TokenChoiceConfig) else config


def companions(config: Config) -> Config:
    """Each row shares its group with G - 1 fixed sequences, the same for all; what a token needs of them is kept."""
    return _alone(config, "companions", num_positions=config.model.context_length)


def sparse(config: Config, experts: int | None = None) -> Config:
    """`companions`, but a token runs the E / G experts alone that it weighs most: FLOPs as in a group of users.

    The other experts are taken to say to it what they say to the companions.
    """
    chosen = experts or _granularity(config)
    return _alone(config, "sparse", num_positions=config.model.context_length, experts_per_token=chosen)


def mean_field(config: Config, experts: int | None = None) -> Config:
    """`sparse`, but what the companions say is averaged over the positions, and as little kept as for one."""
    return _alone(config, "mean_field", num_positions=1, experts_per_token=experts or _granularity(config))


def discrete(config: Config) -> Config:
    """Each expert takes its first arg-max token of the group (PAPER.md section 4): temperature 0, learned or not.

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
            temperature=0.0 if merge == "softmax" or mixing.emit_has_own_softmax else plain.temperature,
            annealing=plain.annealing,
            learned_temperature=plain.learned_temperature,
            separate_temperatures=plain.separate_temperatures,
            straight_through=plain.straight_through,
        ),
    )


def without(config: Config) -> Config:
    """No expert says anything, which `enter` sees to: what mixing is worth."""
    return _mixed(config, "--mode without")


def token_choice(config: Config, experts: int | None = None) -> Config:
    """Each token to the `experts` that the controller, by softmax over all, finds likeliest; none dropped.

    No token sees another row. Of a MoT layer they are its granularity, and at least 1; a temperature is not applied,
    which changes the probabilities but no choice. Of token choice they are as trained, without the capacity.

    Raises UserError for a MoT whose controller is no router: learned otherwise or scaled for each expert, beside
    another one, or before a norm, which no token by itself has.
    """
    kind = config.model.feed_forward
    if isinstance(kind, MixtureOfTokensConfig):
        if faults := list(_router_faults(kind.mixing)):
            raise UserError(*faults)
        kind = TokenChoiceConfig(
            num_experts=kind.num_experts,
            expert_dim=kind.hidden_dim(config.model.d_ff),
            top_k=max(1, kind.num_experts // kind.group_size),
            shared_expert_dim=kind.shared_expert_dim,
            routing_group_tokens=config.model.context_length,
            controller_init_scale=kind.controller_init_scale,
            w_in_init_scale=kind.w_in_init_scale,
            w_out_init_scale=kind.w_out_init_scale,
            mixture=kind,
        )
    if not isinstance(kind, TokenChoiceConfig):
        raise UserError(
            f"--mode token_choice: must be left out, since the layers have no experts: they are {kind.kind}"
        )
    tokens = min(kind.routing_group_tokens, config.model.context_length)
    data = dataclasses.replace(config.data, shuffle_group_size=config.group_size)  # the same windows, in the same order
    width = kind.hidden_dim(config.model.d_ff)  # of the weights, however many are chosen
    kind = dataclasses.replace(kind, expert_dim=width, top_k=experts or kind.top_k)
    kind = dataclasses.replace(kind, capacity_factor=None, routing_group_tokens=tokens)
    changed = _with_kind(dataclasses.replace(config, data=data), kind)
    check(changed)
    return changed


def _router_faults(mixing: MixingConfig) -> Iterator[str]:
    plain = {"merge": "softmax", "controllers": "shared", "layer_norm": False}
    reasons = {
        "merge": "the controller was not learned as the logits of a softmax",
        "controllers": "there are two controllers, and a router is one",
        "layer_norm": "the experts read normalised mixtures, and a token by itself is none",
    }
    for name, value in plain.items():
        if getattr(mixing, name) != value:
            yield f"--mode token_choice: has no meaning with mixing.{name} = {getattr(mixing, name)!r}: {reasons[name]}"
    if mixing.learned_temperature == "per_expert":
        yield "--mode token_choice: has no meaning with a temperature learned for each expert, by which choices differ"


MODES = {
    "grouped": Mode(grouped, "as trained"),
    "companions": Mode(companions, "each row in a group with fixed training texts, read once", independent=True),
    "sparse": Mode(
        sparse, "companions, and a token runs only the experts that it weighs most", independent=True, chooses=True
    ),
    "mean_field": Mode(
        mean_field, "sparse, and the companions are averaged over positions", independent=True, chooses=True
    ),
    "token_choice": Mode(
        token_choice, "each token to its likeliest experts, none dropped", independent=True, chooses=True
    ),
    "discrete": Mode(discrete, "each expert takes one token of the group"),
    "without": Mode(without, "no expert says anything: what mixing is worth", independent=True),
}


def mode_of(name: str, also: Sequence[str] = ()) -> Mode:
    """The mode of this name, or of `name:k`, in which each token chooses k experts.

    Raises UserError; `also` names what else a person may have meant.
    """
    word, colon, number = name.partition(":")
    if word not in MODES:
        raise UserError(f"mode = {name!r}: no such mode{nearest(word, [*MODES, *also])}")
    mode = MODES[word]
    if not colon:
        return mode
    if not mode.chooses:
        raise UserError(f"mode = {name!r}: must be {word!r}, where tokens choose no experts; try 'token_choice:2'")
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"mode = {name!r}: must say how many experts a token chooses; try '{word}:2'")
    return dataclasses.replace(mode, change=partial(mode.change, experts=int(number)))


def enter(
    mode: str, config: Config, params: Params, step: int, companions: np.ndarray | None = None
) -> tuple[Config, Params]:
    """A trained model in a mode, on the mesh that is set: its config, and parameters that load under it.

    config: as trained, or `regrouped`. step: how long it was trained. companions: int32 [2, G, S], see
    `inference.companions`; read by modes that `needs_companions` names.

    Raises UserError for a mode that is not known, that the model does not have, or that lacks companions.
    """
    changed = mode_of(mode).change(config)
    if needs_companions(changed):
        from mot_jax.modes.companions import check_companions, summaries

        mixed = _mixed(config, mode).model
        check_companions(companions, mixed)
        kind = changed.model.feed_forward
        assert isinstance(kind, CompanionsConfig) and companions is not None
        params = params | summaries(mixed, params, step, companions, kind)
    if mode == "without":
        silent = ("feed_forward/w_out", "feed_forward/output_norm")
        params = {name: 0 * value if name.endswith(silent) else value for name, value in params.items()}
    return _where_kernels_run(changed), params


def _where_kernels_run(config: Config) -> Config:
    """Elsewhere the layer's kernels would be interpreted, which takes twenty times as long."""
    import jax

    kind = config.model.feed_forward
    if kernel_runs_on(kind, jax.devices()[0]):
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=without_kernel(kind)))


def lacking(mode: str, config: Config, companions: np.ndarray | None) -> str | None:
    """Why a model does not have a mode; None if it does. The arguments are those of `enter`."""
    try:
        if needs_companions(mode_of(mode).change(config)):
            from mot_jax.modes.companions import check_companions

            check_companions(companions, _mixed(config, mode).model)
    except UserError as error:
        return str(error)
    return None


def default_mode(config: Config) -> tuple[str, str]:
    """The mode for whoever names none, in which no row hears another, and why."""
    if isinstance(config.model.feed_forward, TokenChoiceConfig):
        return "token_choice", "the model was trained so, and nothing is dropped"
    if config.model.group_size > 1:
        return "companions", "the model was trained in groups, and hears nobody else's text so"
    return "grouped", "no row hears another"


def trained_mode(config: Config) -> str:
    """The mode that is the model as it was trained; of token choice, but for what training dropped."""
    return "token_choice" if isinstance(config.model.feed_forward, TokenChoiceConfig) else "grouped"


def needs_companions(config: Config) -> bool:
    """Whether a config in a mode has layers that keep something of companions."""
    return isinstance(config.model.feed_forward, CompanionsConfig)


def regrouped(config: Config, group_size: int) -> Config:
    """The same experts for groups of another size (PAPER.md section 3)."""
    config = _mixed(config, f"--group-size {group_size}")
    width = _mixture(config).hidden_dim(config.model.d_ff)
    changed = _with(config, group_size=group_size, expert_dim=width, flop_matched=False)
    return _whole_groups(dataclasses.replace(changed, data=dataclasses.replace(config.data, shuffle_group_size=None)))


def _alone(config: Config, mode: str, **fields: int | None) -> Config:
    """With companions, and the same windows in the same order as those of the config's groups."""
    config = _mixed(config, f"--mode {mode}")
    if config.model.group_size == 1:
        raise UserError(f"--mode {mode}: must be left out, since no row hears another anyway; try --mode grouped")
    changed = CompanionsConfig(**vars(_mixture(config)), **fields)  # type: ignore[arg-type]
    if (changed.experts_per_token or 1) > changed.num_experts:
        rule = f"must be at most model.feed_forward.num_experts = {changed.num_experts}"
        raise UserError(f"--mode {mode}:{changed.experts_per_token}: {rule}; try --mode {mode}")
    if changed.mixing.layer_norm and changed.experts_per_token is not None:
        raise UserError(f"--mode {mode}: needs model.feed_forward.mixing.layer_norm = False; try --mode companions")
    data = dataclasses.replace(config.data, shuffle_group_size=config.group_size)
    return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, feed_forward=changed))


def _granularity(config: Config) -> int:
    kind = config.model.feed_forward
    mixture = kind.mixture if isinstance(kind, TokenChoiceConfig) else kind
    return max(1, mixture.num_experts // mixture.group_size) if isinstance(mixture, MixtureOfTokensConfig) else 1


def _mixed(config: Config, asked: str) -> Config:
    """`config` itself if its layers mix; the MoT that the layers were if they were tuned from one."""
    kind = config.model.feed_forward
    if isinstance(kind, TokenChoiceConfig) and kind.mixture is not None:
        return _whole_groups(_with_kind(config, kind.mixture))
    if not isinstance(kind, MixtureOfTokensConfig):
        raise UserError(f"{asked}: must be left out, since the model's layers mix nothing: they are {kind.kind}")
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
    rows, t = config.model.group_size, config.training
    if t.batch_size % (rows * t.gradient_accumulation_steps):
        batch = -(-t.batch_size // rows) * rows
        config = dataclasses.replace(
            config, training=dataclasses.replace(t, batch_size=batch, gradient_accumulation_steps=1)
        )
    check(config)
    return config
