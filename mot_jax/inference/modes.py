"""Other ways to run a trained model: functions Config -> Config. The same parameters load under all of them."""

from __future__ import annotations

import dataclasses

import numpy as np
from etils import epath

from mot_jax.config import Config, ConfigError, MixingConfig, MixtureOfTokensConfig, check
from mot_jax.model import Params


def grouped(config: Config) -> Config:
    """As trained: the rows of a group influence each other."""
    return config


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


MODES = {"grouped": grouped, "discrete": discrete}


def enter(
    mode: str, config: Config, params: Params, step: int, companions: np.ndarray | None = None
) -> tuple[Config, Params]:
    """The model in a mode."""
    return MODES[mode](config), params


def load_companions(workdir: epath.PathLike) -> np.ndarray | None:
    """The companions of the run in `workdir`, int32 [G, S], if it has them."""
    return None


def default_mode(config: Config) -> tuple[str, str]:
    """The mode for whoever names none, in which no row sees another's text, and why."""
    return "grouped", "as trained"


def _mixture(config: Config, asked: str) -> MixtureOfTokensConfig:
    kind = config.model.feed_forward
    if not isinstance(kind, MixtureOfTokensConfig):
        raise ConfigError(f"{asked}: must be left out, since the model's layers mix nothing: they are {kind.kind}")
    return kind


def _with(config: Config, **changes: object) -> Config:
    kind = dataclasses.replace(_mixture(config, "mode"), **changes)  # type: ignore[arg-type]
    return dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=kind))
