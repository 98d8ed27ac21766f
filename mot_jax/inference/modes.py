"""Other ways to run a trained model: functions Config -> Config. The same parameters load under all of them.

`enter` adds to the parameters what a mode needs beside them, and changes nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from mot_jax.config import CompanionsConfig, Config, ConfigError, MixingConfig, MixtureOfTokensConfig, check, nearest

if TYPE_CHECKING:  # commands that run no model do without JAX
    import numpy as np

    from mot_jax.model import Params


@dataclasses.dataclass(frozen=True)
class Mode:
    """change: the mode. about: what it does, in a line. independent: no row hears another's text."""

    change: Callable[[Config], Config]
    about: str
    independent: bool = False


def grouped(config: Config) -> Config:
    """As trained: the rows of a group influence each other."""
    return config


def companions(config: Config) -> Config:
    """Each row shares its group with G - 1 fixed sequences, the same for all; what a token needs of them is kept."""
    return _alone(config, "companions", num_positions=config.model.context_length)


def mean_field(config: Config) -> Config:
    """Each row shares its group with the average of what G - 1 fixed sequences say at all positions."""
    return _alone(config, "mean_field", num_positions=1)


def discrete(config: Config) -> Config:
    """Each expert takes its first arg-max token of the group (PAPER.md section 4): temperature 0, learnt or not.

    The rows of a group influence each other still. A merge without a softmax takes the largest logit.
    """
    mixing = _mixture(config, "--mode discrete").mixing
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


def without(config: Config) -> Config:
    """No expert says anything, which `enter` sees to: what mixing is worth."""
    _mixture(config, "--mode without")
    return config


MODES = {
    "grouped": Mode(grouped, "as trained: the rows of a group influence each other"),
    "companions": Mode(companions, "each row in a group with fixed training texts, read once", independent=True),
    "mean_field": Mode(mean_field, "each row in a group with the average of fixed training texts", independent=True),
    "discrete": Mode(discrete, "each expert takes one token of the group"),
    "without": Mode(without, "no expert says anything: what mixing is worth", independent=True),
}


def enter(
    mode: str, config: Config, params: Params, step: int, companions: np.ndarray | None = None
) -> tuple[Config, Params]:
    """A trained model in a mode, on the mesh that is set: its config, and parameters that load under it.

    config: as trained, or `regrouped`. step: how long it was trained. companions: int32 [2, G, S], see
    `inference.companions`; read by modes that `needs_companions` names.

    Raises ConfigError for a mode that is not known, that the model does not have, or that lacks companions.
    """
    if mode not in MODES:
        raise ConfigError(f"mode = {mode!r}: no such mode{nearest(mode, MODES)}")
    changed = MODES[mode].change(config)
    if needs_companions(changed):
        from mot_jax.inference.companions import check_companions, summaries

        check_companions(companions, config.model)
        kind = changed.model.feed_forward
        assert isinstance(kind, CompanionsConfig) and companions is not None
        params = params | summaries(config.model, params, step, companions, kind.num_positions)
    if mode == "without":
        silent = ("feed_forward/w_out", "feed_forward/output_norm")
        params = {name: 0 * value if name.endswith(silent) else value for name, value in params.items()}
    return changed, params


def lacking(mode: str, config: Config, companions: np.ndarray | None) -> str | None:
    """Why a model does not have a mode; None if it does. The arguments are those of `enter`."""
    try:
        if needs_companions(MODES[mode].change(config)):
            from mot_jax.inference.companions import check_companions

            check_companions(companions, config.model)
    except ConfigError as error:
        return str(error)
    return None


def default_mode(config: Config) -> tuple[str, str]:
    """The mode for whoever names none, in which no row hears another, and why."""
    if config.model.group_size > 1:
        return "companions", "the model was trained in groups, and hears nobody else's text so"
    return "grouped", "no row hears another"


def trained_mode(config: Config) -> str:
    """The mode that is the model as it was trained, or tuned."""
    return "grouped"


def needs_companions(config: Config) -> bool:
    """Whether a config in a mode has layers that keep something of companions."""
    return isinstance(config.model.feed_forward, CompanionsConfig)


def regrouped(config: Config, group_size: int) -> Config:
    """The same experts for groups of another size (PAPER.md section 3)."""
    kind = _mixture(config, f"--group-size {group_size}")
    width = kind.hidden_dim(config.model.d_ff)
    changed = _with(config, group_size=group_size, expert_dim=width, flop_matched=False)
    data, rows = dataclasses.replace(config.data, group_size=None), changed.model.group_size
    batch = -(-config.training.batch_size // rows) * rows  # whole groups
    training = dataclasses.replace(config.training, batch_size=batch, accumulation=1)
    changed = dataclasses.replace(changed, data=data, training=training)
    check(changed)
    return changed


def _alone(config: Config, mode: str, **fields: int | None) -> Config:
    """With companions, and the same windows in the same order as those of the config's groups."""
    kind = _mixture(config, f"--mode {mode}")
    if config.model.group_size == 1:
        raise ConfigError(f"--mode {mode}: must be left out, since no row hears another anyway; try --mode grouped")
    changed = CompanionsConfig(**vars(kind), **fields)  # type: ignore[arg-type]
    data = dataclasses.replace(config.data, group_size=config.group_size)
    return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, feed_forward=changed))


def _mixture(config: Config, asked: str) -> MixtureOfTokensConfig:
    kind = config.model.feed_forward
    if not isinstance(kind, MixtureOfTokensConfig):
        raise ConfigError(f"{asked}: must be left out, since the model's layers mix nothing: they are {kind.kind}")
    return kind


def _with(config: Config, **changes: object) -> Config:
    kind = dataclasses.replace(_mixture(config, "mode"), **changes)  # type: ignore[arg-type]
    return dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=kind))
