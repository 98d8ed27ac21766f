"""The table of inference modes: functions Config -> Config over the weights of one trained model.

`MODES` names them; `enter` applies one, and adds parameters where it needs more than the trained ones (the summaries
of reference sequences, see `modes.companions`). Nothing else changes, except that a Pallas kernel which does not run on
the devices at hand is replaced by XLA's.

A mode is named by its key in `MODES`. If its tokens choose among the experts, `NAME:K` sets how many each token
chooses, for example `token_choice:2`.
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
    ThresholdConfig,
    TokenChoiceConfig,
    check,
    kernel_runs_on,
    without_kernel,
)
from mot_jax.errors import UserError, nearest

if TYPE_CHECKING:  # commands that run no model do not import JAX
    import numpy as np
    from etils import epath

    from mot_jax.modes.thresholds import Thresholds
    from mot_jax.nn.transformer import Params


@dataclasses.dataclass(frozen=True)
class Mode:
    """An inference mode.

    Attributes:
        change: converts the config of a trained model into that of the mode. If `chooses`, it takes a second argument,
            the number of experts that a token chooses, by default the granularity E / G.
        about: one line for tables and help texts.
        independent: no sequence of a batch depends on another.
        chooses: tokens choose among the experts.
    """

    change: Callable[..., Config]
    about: str
    independent: bool = False
    chooses: bool = False


def grouped(config: Config) -> Config:
    """As in training: the sequences of a group are mixed with each other. No token is dropped.

    A token-choice model that was tuned from Mixture-of-Tokens weights becomes that Mixture-of-Tokens model again.
    Experts with thresholds choose by these, not along the batch as in their warmup, so that no sequence depends on
    another.
    """
    kind = config.model.feed_forward
    if isinstance(kind, TokenChoiceConfig):
        return _as_mixture_of_tokens(config, "--mode grouped")
    inference_kind = kind.for_inference(config.model.context_length)
    return config if inference_kind == kind else _with_kind_in_order(config, inference_kind)


def companions(config: Config) -> Config:
    """Mix each sequence with G - 1 fixed reference sequences, the same for all, whose summaries are cached."""
    return _with_companions(config, "companions", num_positions=config.model.context_length)


def sparse(config: Config, experts: int | None = None) -> Config:
    """`companions`, but run only the E / G experts with the token's largest weights: as many FLOPs as in training.

    The outputs of the other experts are approximated by their outputs on the reference sequences.
    """
    return _with_companions(
        config,
        "sparse",
        num_positions=config.model.context_length,
        experts_per_token=experts or _granularity(config),
    )


def mean_field(config: Config, experts: int | None = None) -> Config:
    """`sparse`, but with summaries averaged over positions, which take the memory of one position."""
    return _with_companions(config, "mean_field", num_positions=1, experts_per_token=experts or _granularity(config))


def discrete(config: Config) -> Config:
    """Each expert processes the first arg-max token of the group (`docs/paper.md`, section 4): temperature 0.

    A learned temperature is replaced by 0, too. The sequences of a group still influence each other. If merge has no
    softmax, the expert processes the token with the largest logit.
    """
    config = _as_mixture_of_tokens(config, "--mode discrete")
    mixing = _mixture_of_tokens(config).mixing
    merge = "softmax" if mixing.merge == "logits" else mixing.merge
    defaults = MixingConfig()
    # With shared controllers, an emit `softmax` at temperature 0 equals the merge weights.
    emit = "merge" if mixing.emit == "softmax" and mixing.controllers == "shared" else mixing.emit
    return _with_layer_fields(
        config,
        mixing=dataclasses.replace(
            mixing,
            merge=merge,
            emit=emit,
            temperature=0.0 if merge == "softmax" or mixing.emit_has_own_softmax else defaults.temperature,
            annealing=defaults.annealing,
            learned_temperature=defaults.learned_temperature,
            separate_temperatures=defaults.separate_temperatures,
            straight_through=defaults.straight_through,
        ),
    )


def without(config: Config) -> Config:
    """No expert output: measures how much the mixing layers contribute. `enter` zeroes the output weights."""
    return _as_mixture_of_tokens(config, "--mode without")


def token_choice(config: Config, experts: int | None = None) -> Config:
    """Route each token to the `experts` most likely experts by the softmax of its controller logits; drop no token.

    No token depends on another sequence. By default, Mixture-of-Tokens layers route to E / G experts, at least 1. Their
    temperature is not applied, which changes the probabilities but no choice. Token-choice layers keep their `top_k`
    and lose their capacity limit.

    Raises:
        UserError: the layers are of another kind, or the mixing config makes the controller unusable as a router.
    """
    kind = config.model.feed_forward
    if isinstance(kind, MixtureOfTokensConfig):
        if errors := list(_router_errors("token_choice", kind.mixing)):
            raise UserError(*errors)
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
            "--mode token_choice: must be left out, since it is for mixture_of_tokens and token_choice layers: these "
            f"are {kind.kind}"
        )
    if experts and kind.scores == "sigmoid" and (experts == 1) != (kind.top_k == 1):
        rule = f"weights of sigmoid scores are divided by their sum if top_k > 1, and it was {kind.top_k} in training"
        raise UserError(f"--mode token_choice:{experts}: {rule}; try token_choice:{1 if kind.top_k == 1 else 2}")
    # Explicit, since the default width depends on top_k, and the weights keep theirs.
    width = kind.hidden_dim(config.model.d_ff)
    kind = dataclasses.replace(kind, expert_dim=width, top_k=experts or kind.top_k)
    changed = _with_kind_in_order(config, kind.for_inference(config.model.context_length))
    check(changed)
    return changed


def _router_errors(mode: str, mixing: MixingConfig) -> Iterator[str]:
    """Yield the reasons why the controller of Mixture-of-Tokens layers cannot be the router of a mode."""
    required = {"merge": "softmax", "controllers": "shared", "layer_norm": False}
    reasons = {
        "merge": "the controller was not trained as the logits of a softmax",
        "controllers": "there are two controllers, and a router is one",
        "layer_norm": "the experts were trained on normalized mixtures, and a routed token is not a mixture",
    }
    for name, value in required.items():
        if getattr(mixing, name) != value:
            yield f"--mode {mode}: has no meaning with mixing.{name} = {getattr(mixing, name)!r}: {reasons[name]}"
    if mode == "token_choice" and mixing.learned_temperature == "per_expert":
        yield "--mode token_choice: has no meaning with a temperature learned for each expert, by which choices differ"


def threshold(config: Config) -> Config:
    """Run each expert on the unmixed tokens whose expected mixing weight is among the largest E / G of E in training.

    No token depends on another sequence. The weights and thresholds are measured on training tokens
    (`modes.thresholds`).

    Raises:
        UserError: the layers are of another kind or do not mix sequences, or their weights are no softmax of one
            controller's logits at a temperature above 0.
    """
    kind = config.model.feed_forward
    if not isinstance(kind, MixtureOfTokensConfig):
        rule = f"must be left out, since it is for mixture_of_tokens, and the model has {kind.kind} layers"
        raise UserError(f"--mode threshold: {rule}; try --mode {trained_mode(config)}")
    if config.model.group_size == 1:
        rule = "must be left out, since the model does not mix sequences"
        raise UserError(f"--mode threshold: {rule}; try --mode grouped")
    mixing, errors = kind.mixing, list(_router_errors("threshold", kind.mixing))
    needed = {"emit": mixing.emit == "merge", "temperature": mixing.annealing != "none" or mixing.temperature != 0}
    needed["final_temperature"] = mixing.annealing == "none" or mixing.final_temperature != 0
    rules = {"emit": "'merge'"}
    errors += [
        f"--mode threshold: needs mixing.{name} = {rules.get(name, 'above 0')}, and it is {getattr(mixing, name)!r}"
        for name, valid in needed.items()
        if not valid
    ]
    if errors:
        raise UserError(*(f"{error}; try --mode companions" for error in errors))
    return _with_kind_in_order(config, ThresholdConfig(**vars(kind)))


MODES = {
    "grouped": Mode(grouped, "as in training"),
    "companions": Mode(companions, "each sequence is mixed with fixed training sequences", independent=True),
    "sparse": Mode(
        sparse, "companions, and a token runs only its experts of largest weight", independent=True, chooses=True
    ),
    "mean_field": Mode(
        mean_field, "sparse, with the companions averaged over positions", independent=True, chooses=True
    ),
    "token_choice": Mode(
        token_choice, "each token is routed to its most likely experts, none dropped", independent=True, chooses=True
    ),
    "threshold": Mode(
        threshold, "each expert takes the tokens of large expected weight, which are not mixed", independent=True
    ),
    "discrete": Mode(discrete, "each expert processes one token of the group"),
    "without": Mode(without, "no expert output: measures the contribution of mixing", independent=True),
}


def mode_of(name: str, also: Sequence[str] = ()) -> Mode:
    """Return the mode called `name`, or the one of `NAME:K`, in which each token chooses K experts.

    Args:
        name: as above.
        also: further words to suggest if there is no such mode.

    Raises:
        UserError: there is no such mode, or K is not a positive number or given to a mode that takes none.
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
        raise UserError(f"mode = {name!r}: must end in the number of experts that a token chooses; try '{word}:2'")
    return dataclasses.replace(mode, change=partial(mode.change, experts=int(number)))


def enter(
    mode: str,
    config: Config,
    params: Params,
    step: int,
    companions: np.ndarray | None = None,
    thresholds: Thresholds | None = None,
) -> tuple[Config, Params]:
    """Convert a trained model to a mode, on the mesh that is set.

    Args:
        mode: a name that `mode_of` accepts.
        config: as trained, or `regrouped`.
        params: by name.
        step: the number of training steps.
        companions: reference sequences, int32 [2, G, S], see `modes.companions`; used by the modes whose config
            `needs_companions`.
        thresholds: of the experts, see `modes.thresholds`; used by the mode `threshold`.

    Returns:
        The config of the mode, and parameters that load under it.

    Raises:
        UserError: there is no such mode, the model does not have it, or companions or thresholds are missing or do not
            fit.
    """
    changed = _checked(mode, config, companions, thresholds, step)
    kind = changed.model.feed_forward
    if isinstance(kind, CompanionsConfig):
        from mot_jax.modes.companions import summaries

        assert companions is not None
        trained = _as_mixture_of_tokens(config, mode).model
        params = params | summaries(trained, params, step, companions, kind)
    if isinstance(kind, ThresholdConfig):
        from mot_jax.modes.thresholds import constants

        assert thresholds is not None
        params = params | constants(config.model, thresholds)
    if mode == "without":
        zeroed = ("feed_forward/w_out", "feed_forward/output_norm")
        params = {name: 0 * value if name.endswith(zeroed) else value for name, value in params.items()}
    return _with_runnable_kernel(changed), params


def _with_runnable_kernel(config: Config) -> Config:
    """Replace a kernel that does not run on the devices: interpreting it would take twenty times as long."""
    import jax

    kind = config.model.feed_forward
    if kernel_runs_on(kind, jax.devices()[0]):
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=without_kernel(kind)))


def lacking(
    mode: str,
    config: Config,
    companions: np.ndarray | None,
    thresholds: Thresholds | None = None,
    step: int | None = None,
) -> str | None:
    """Return the reason why a model does not have a mode; None if it does. The arguments are those of `enter`."""
    try:
        _checked(mode, config, companions, thresholds, step)
    except UserError as error:
        return str(error)
    return None


def _checked(
    mode: str, config: Config, companions: np.ndarray | None, thresholds: Thresholds | None, step: int | None
) -> Config:
    """The config of a mode. Raises UserError unless the model, its companions and thresholds have it."""
    changed = mode_of(mode).change(config)
    if needs_companions(changed):
        from mot_jax.modes.companions import check_companions

        check_companions(companions, _as_mixture_of_tokens(config, mode).model)
    if isinstance(changed.model.feed_forward, ThresholdConfig):
        from mot_jax.modes.thresholds import check_thresholds

        check_thresholds(thresholds, config, step)
    return changed


def read_files(
    mode: str, config: Config, workdir: epath.PathLike, step: int
) -> tuple[np.ndarray | None, Thresholds | None]:
    """Read the companions and the thresholds of a run for `enter`; None for those that the mode does not use.

    Raises:
        UserError: as `enter`, or a file is damaged.
        RetryableError: a file cannot be read now.
    """
    from mot_jax.modes.companions import load_companions
    from mot_jax.modes.thresholds import load_thresholds

    changed = mode_of(mode).change(config)
    companions = load_companions(workdir) if needs_companions(changed) else None
    thresholds = load_thresholds(workdir) if isinstance(changed.model.feed_forward, ThresholdConfig) else None
    _checked(mode, config, companions, thresholds, step)
    return companions, thresholds


def offers(mode: str, config: Config) -> bool:
    """Whether the config of a trained model has a mode; `lacking` also checks the files that the mode needs."""
    try:
        mode_of(mode).change(config)
    except UserError:
        return False
    return True


def default_mode(config: Config) -> tuple[str, str]:
    """Return the default mode of a trained model and the reason; in it, if possible, no sequence depends on another."""
    if MODES[trained_mode(config)].independent:
        return trained_mode(config), "the model was trained in it, and no token is dropped"
    if config.model.has_companions:
        return "companions", "the model was trained in groups, and this mode keeps the sequences of a batch independent"
    if grouped(config).model.group_size > 1:
        return "grouped", "the model has no mode that keeps the sequences of a batch independent"
    return "grouped", "no sequence of a batch depends on another"


def is_independent(mode: str, config: Config) -> bool:
    """Whether no sequence of a batch depends on another in a mode of a trained model."""
    entry = mode_of(mode)
    return entry.independent or entry.change(config).model.group_size == 1


def trained_mode(config: Config) -> str:
    """Return the mode in which the model was trained, without the capacity limit of training."""
    return config.model.feed_forward.trained_mode


def needs_companions(config: Config) -> bool:
    """Whether the config of a mode has layers that hold summaries of reference sequences."""
    return isinstance(config.model.feed_forward, CompanionsConfig)


def regrouped(config: Config, group_size: int) -> Config:
    """Convert to groups of another size with the same experts (`docs/paper.md`, section 3)."""
    config = _as_mixture_of_tokens(config, f"--group-size {group_size}")
    width = _mixture_of_tokens(config).hidden_dim(config.model.d_ff)
    changed = _with_layer_fields(config, group_size=group_size, expert_dim=width, flop_matched=False)
    data = dataclasses.replace(config.data, shuffle_group_size=None)
    return _with_whole_groups(dataclasses.replace(changed, data=data))


def _with_companions(config: Config, mode: str, **fields: int | None) -> Config:
    """Replace the layers by `nn.feed_forward.companions` layers; the dataset stays in the order of the groups."""
    config = _as_mixture_of_tokens(config, f"--mode {mode}")
    if config.model.group_size == 1:
        rule = "must be left out, since the model does not mix sequences"
        raise UserError(f"--mode {mode}: {rule}; try --mode grouped")
    kind = CompanionsConfig(**vars(_mixture_of_tokens(config)), **fields)  # type: ignore[arg-type]
    if (kind.experts_per_token or 1) > kind.num_experts:
        rule = f"must be at most model.feed_forward.num_experts = {kind.num_experts}"
        raise UserError(f"--mode {mode}:{kind.experts_per_token}: {rule}; try --mode {mode}")
    if kind.mixing.layer_norm and kind.experts_per_token is not None:
        raise UserError(f"--mode {mode}: needs model.feed_forward.mixing.layer_norm = False; try --mode companions")
    data = dataclasses.replace(config.data, shuffle_group_size=config.group_size)
    return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, feed_forward=kind))


def _granularity(config: Config) -> int:
    """E / G of the Mixture-of-Tokens layers, at least 1; 1 for other layers."""
    kind = config.model.feed_forward
    mixture = kind.mixture if isinstance(kind, TokenChoiceConfig) else kind
    return max(1, mixture.num_experts // mixture.group_size) if isinstance(mixture, MixtureOfTokensConfig) else 1


def _as_mixture_of_tokens(config: Config, option: str) -> Config:
    """Return `config` if its layers mix; the original Mixture-of-Tokens config if they were tuned to token choice.

    Args:
        config: of a trained model.
        option: the command-line option that needs mixing layers, for the error.

    Raises:
        UserError: the layers do not mix.
    """
    kind = config.model.feed_forward
    if isinstance(kind, TokenChoiceConfig) and kind.mixture is not None:
        return _with_whole_groups(with_kind(config, kind.mixture))
    if not isinstance(kind, MixtureOfTokensConfig):
        raise UserError(
            f"{option}: must be left out, since it is for mixture_of_tokens, and the model has {kind.kind} layers"
        )
    return config


def _mixture_of_tokens(config: Config) -> MixtureOfTokensConfig:
    kind = config.model.feed_forward
    assert isinstance(kind, MixtureOfTokensConfig)
    return kind


def _with_layer_fields(config: Config, **changes: object) -> Config:
    return with_kind(config, dataclasses.replace(_mixture_of_tokens(config), **changes))  # type: ignore[arg-type]


def with_kind(config: Config, kind: FeedForwardConfig) -> Config:
    """Replace the feed-forward kind, and remove the training options that belong to the old kind."""
    training = config.training
    if type(kind) is not type(config.model.feed_forward):
        losses = LossWeights(head_z=training.losses.head_z)
        training = dataclasses.replace(training, upcycle_from=None, losses=losses)
    model = dataclasses.replace(config.model, feed_forward=kind)
    return dataclasses.replace(config, model=model, training=training)


def _with_kind_in_order(config: Config, kind: FeedForwardConfig) -> Config:
    """`with_kind`; the dataset stays in the order of the groups, so that every mode is scored on the same windows."""
    data = dataclasses.replace(config.data, shuffle_group_size=config.group_size)
    return with_kind(dataclasses.replace(config, data=data), kind)


def _with_whole_groups(config: Config) -> Config:
    """Round the batch size up to whole groups of the model."""
    group_size, training = config.model.group_size, config.training
    if training.batch_size % (group_size * training.gradient_accumulation_steps):
        batch_size = -(-training.batch_size // group_size) * group_size
        training = dataclasses.replace(training, batch_size=batch_size, gradient_accumulation_steps=1)
        config = dataclasses.replace(config, training=training)
    check(config)
    return config
