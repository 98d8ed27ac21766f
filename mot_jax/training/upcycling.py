"""A Mixture-of-Tokens model that begins as a trained dense one (PAPER.md section 3, upcycling)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from mot_jax.config import Config, DenseConfig, MixtureOfTokensConfig, ModelConfig
from mot_jax.data.text import open_tokenizer
from mot_jax.errors import UserError
from mot_jax.nn.transformer import Params, block_places
from mot_jax.runs.restore import check_data, load_run, load_run_config
from mot_jax.runs.state import fetch, spread


def upcycle(model: ModelConfig, params: Params, workdir: str) -> tuple[Params, list[str]]:
    """`params` with all that the dense run in `workdir` has learned, and notes for people.

    An expert as wide as the dense layer is a copy of it. A narrower one is a slice: k neighbouring experts together
    are the layer. A wider one is several copies side by side. So by the rule E F = G (d_ff - shared_expert_dim), and where
    mixing is uniform, the update is the dense layer's for the mean of the group, but for the biases, which experts do
    not have. A shared expert takes the first hidden units, the experts the others. Controllers, and what else only the
    new model has, stay as drawn.

    Raises what `check_upcycle` raises, and UserError without a checkpoint.
    """
    old, dense, step = load_run(workdir)
    there = {name: fetch(value) for name, value in dense.items()}
    values = {name: fetch(value) for name, value in params.items()}
    dropped = False
    for name in values:
        if not name.startswith("stacks/"):
            values[name] = there[name]
    for new, source, kind in zip(block_places(model), block_places(old.model), model.block_kinds(), strict=True):
        mine = {name.removeprefix(source[0]): value for name, value in there.items() if name.startswith(source[0])}
        layer = {name: value[source[1]] for name, value in mine.items()}
        if isinstance(kind, MixtureOfTokensConfig):
            layer |= _experts(model, kind, layer)
        dropped |= any("feed_forward/bias" in name and new[0] + name not in values for name in layer)
        for name, value in values.items():
            if name.startswith(new[0]) and name.removeprefix(new[0]) in layer:
                value[new[1]] = layer[name.removeprefix(new[0])]
    notes = [f"experts begin as the dense layers of {workdir} after {step} steps"]
    if dropped:
        notes += ["warning: the dense layers' biases have no place in experts and layers without, and are dropped"]
    return {name: spread(value, params[name].sharding) for name, value in values.items()}, notes


def _experts(model: ModelConfig, kind: MixtureOfTokensConfig, layer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of a MoT layer from those of a dense one; names without the block's prefix."""
    shared, width = kind.shared_expert_dim, kind.hidden_dim(model.d_ff)
    rest = model.d_ff - shared

    def cut(units: np.ndarray) -> Iterator[np.ndarray]:
        """units [d_ff, D]: those of each expert, [F, D]."""
        mine = np.tile(units[shared:], (max(width // rest, 1), 1))
        for e in range(kind.num_experts):
            begin = e * width % len(mine)
            yield mine[begin : begin + width]

    found = {}
    for name, dense in {"w_in": "kernel_in", "w_gate": "kernel_gate", "w_out": "kernel_out"}.items():
        kernel = layer.get(f"feed_forward/{dense}")
        if kernel is None:
            continue
        units = kernel if name == "w_out" else kernel.T
        experts = np.stack(list(cut(units)))
        if name == "w_out":
            found["feed_forward/w_out"] = experts
            found["feed_forward/shared/kernel_out"] = units[:shared]
        else:
            found[f"feed_forward/{name}"] = experts.swapaxes(1, 2)
            found[f"feed_forward/shared/{dense}"] = kernel[:, :shared]
    return found


def check_upcycle(config: Config) -> None:
    """Raises UserError unless `upcycle_from` is a dense twin: equal but for its feed-forward layers, same tokens."""
    model, workdir = config.model, config.training.upcycle_from
    assert workdir is not None
    old = load_run_config(workdir).model
    if not isinstance(old.feed_forward, DenseConfig):
        raise UserError(f"training.upcycle_from = {workdir!r}: must be a dense run, and is {old.feed_forward.kind}")
    free = {"feed_forward", "moe_blocks", "dense_bias", "init", "dtype", "attention_kernel", "remat", "loss_chunk"}
    faults = [
        f"model.{field.name} = {getattr(model, field.name)!r}: must be as in training.upcycle_from = {workdir!r}; "
        f"try {getattr(old, field.name)!r}"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in free and getattr(model, field.name) != getattr(old, field.name)
    ]
    kind = model.feed_forward
    if isinstance(kind, MixtureOfTokensConfig):
        width, rest = kind.hidden_dim(model.d_ff), model.d_ff - kind.shared_expert_dim
        if rest % width and width % rest:
            good = max(f for f in range(1, min(rest, width) + 1) if rest % f == 0)
            faults.append(
                f"model.feed_forward.expert_dim = {width}: must divide d_ff - shared_expert_dim = {rest} of the layers in "
                f"training.upcycle_from, or be a multiple of it; try {good}"
            )
    if faults:
        raise UserError(*faults)
    check_data({"tokenizer": open_tokenizer(config).fingerprint}, config, workdir)
