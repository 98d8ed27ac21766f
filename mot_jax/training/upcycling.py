"""Upcycling: a Mixture-of-Tokens model that begins with the weights of a dense one (`docs/paper.md`, section 3)."""

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
    """Replace the initial parameters by those of the dense run in `workdir`, wherever both models have them.

    An expert as wide as the dense layer is a copy of it. A narrower one is a slice: k neighbouring experts together are
    the layer. A wider one is several copies of it, concatenated. With the rule E F = G (d_ff - shared_expert_dim) and
    uniform mixing, the output is therefore that of the dense layer for the mean of the group, except for the biases,
    which experts do not have. A shared expert takes the first hidden units, the experts the others. Controllers and all
    other parameters that only the new model has keep their initial values.

    Args:
        model: config of the new model.
        params: its initial parameters, by name.

    Returns:
        The parameters, with the shardings of `params`, and lines for the user.

    Raises:
        UserError: as `check_upcycle`, or without a checkpoint.
    """
    dense_config, dense_params, step = load_run(workdir)
    dense_values = {name: fetch(value) for name, value in dense_params.items()}
    values = {name: fetch(value) for name, value in params.items()}
    biases_dropped = False
    for name in values:
        if not name.startswith("stacks/"):
            values[name] = dense_values[name]
    places, dense_places = block_places(model), block_places(dense_config.model)
    for (prefix, index), (dense_prefix, dense_index), kind in zip(
        places, dense_places, model.block_kinds(), strict=True
    ):
        block = {
            name.removeprefix(dense_prefix): value[dense_index]
            for name, value in dense_values.items()
            if name.startswith(dense_prefix)
        }
        if isinstance(kind, MixtureOfTokensConfig):
            block |= _experts(model, kind, block)
        biases_dropped |= any("feed_forward/bias" in name and prefix + name not in values for name in block)
        for name, value in values.items():
            if name.startswith(prefix) and name.removeprefix(prefix) in block:
                value[index] = block[name.removeprefix(prefix)]
    notes = [f"experts begin as the dense layers of {workdir} after {step} steps"]
    if biases_dropped:
        notes += ["warning: the biases of the dense layers are dropped: experts, and layers without biases, have none"]
    return {name: spread(value, params[name].sharding) for name, value in values.items()}, notes


def _experts(model: ModelConfig, kind: MixtureOfTokensConfig, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of a MoT layer, from those of a block with a dense layer; names without the block's prefix."""
    shared_dim, width = kind.shared_expert_dim, kind.hidden_dim(model.d_ff)
    remaining = model.d_ff - shared_dim

    def split(units: np.ndarray) -> Iterator[np.ndarray]:
        """The hidden units of each expert, [F, D], from those of the dense layer, [d_ff, D]."""
        tiled = np.tile(units[shared_dim:], (max(width // remaining, 1), 1))
        for e in range(kind.num_experts):
            begin = e * width % len(tiled)
            yield tiled[begin : begin + width]

    params = {}
    for name, dense_name in {"w_in": "kernel_in", "w_gate": "kernel_gate", "w_out": "kernel_out"}.items():
        kernel = block.get(f"feed_forward/{dense_name}")
        if kernel is None:
            continue
        units = kernel if name == "w_out" else kernel.T
        experts = np.stack(list(split(units)))
        if name == "w_out":
            params["feed_forward/w_out"] = experts
            params["feed_forward/shared/kernel_out"] = units[:shared_dim]
        else:
            params[f"feed_forward/{name}"] = experts.swapaxes(1, 2)
            params[f"feed_forward/shared/{dense_name}"] = kernel[:, :shared_dim]
    return params


def check_upcycle(config: Config) -> None:
    """Raise UserError unless `upcycle_from` is a dense model that differs in its feed-forward layers only.

    Its tokenizer must be the same.
    """
    model, workdir = config.model, config.training.upcycle_from
    assert workdir is not None
    source = load_run_config(workdir).model
    if not isinstance(source.feed_forward, DenseConfig):
        raise UserError(f"training.upcycle_from = {workdir!r}: must be a dense run, and is {source.feed_forward.kind}")
    free = {"feed_forward", "moe_blocks", "dense_bias", "init", "dtype", "attention_kernel", "remat", "loss_chunk"}
    faults = [
        f"model.{field.name} = {getattr(model, field.name)!r}: must be as in training.upcycle_from = {workdir!r}; "
        f"try {getattr(source, field.name)!r}"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in free and getattr(model, field.name) != getattr(source, field.name)
    ]
    kind = model.feed_forward
    if isinstance(kind, MixtureOfTokensConfig):
        width, remaining = kind.hidden_dim(model.d_ff), model.d_ff - kind.shared_expert_dim
        if remaining % width and width % remaining:
            divisor = max(f for f in range(1, min(remaining, width) + 1) if remaining % f == 0)
            faults.append(
                f"model.feed_forward.expert_dim = {width}: must divide d_ff - shared_expert_dim = {remaining} of the "
                f"layers in training.upcycle_from, or be a multiple of it; try {divisor}"
            )
    if faults:
        raise UserError(*faults)
    check_data({"tokenizer": open_tokenizer(config).fingerprint}, config, workdir)
