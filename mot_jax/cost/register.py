"""Feed-forward kinds from files outside of the package, such as a config or a study."""

from __future__ import annotations

import dataclasses

from mot_jax.config import FeedForwardConfig, FeedForwardKind
from mot_jax.config.hints import add_option, options
from mot_jax.cost.feed_forward import COSTS, FeedForwardCost
from mot_jax.errors import UserError
from mot_jax.nn.feed_forward import KINDS, FeedForward


def register_kind(layer: type[FeedForward], cost: type[FeedForwardCost]) -> None:
    """Add a kind to those that configs of this process can have.

    It can then be trained, resumed, described, planned and compared in studies; `docs/add-a-kind.md` has an example.

    Args:
        layer: the class of the layer. Its `config_type` is a frozen dataclass, a subclass of `FeedForwardKind` with a
            name of its own as `kind`.
        cost: the class that counts its FLOPs and arrays.

    Raises:
        UserError: the config is no such class, or another kind has the name.
    """
    config = layer.config_type
    if not (issubclass(config, FeedForwardKind) and dataclasses.is_dataclass(config) and "kind" in vars(config)):
        rule = "must be a dataclass derived from FeedForwardKind with a `kind` of its own"
        raise UserError(f"{layer.__name__}.config_type = {config.__name__}: {rule}; try kind: ClassVar[str] = 'mine'")
    others = {option.kind: option for option in options(FeedForwardConfig)}
    if config.kind in others and others[config.kind] is not config:
        raise UserError(f"kind = {config.kind!r}: is another kind; try {'my_' + config.kind!r}")
    add_option(FeedForwardConfig, config)
    KINDS[config] = layer
    COSTS[config] = cost
