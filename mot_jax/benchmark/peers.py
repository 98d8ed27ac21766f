"""Token-choice layers from other packages, as rows of `mot bench layers --peers`.

Each is a function of the parameters of our `TokenChoice` layer: the same controller, experts and top_k. Gates are a
softmax over all experts, not renormalized.

maxtext: `RoutedMoE` of MaxText with its matrix products for a capacity, whose experts are gated. Its decoder block
    `deepseek` with scores `softmax` has our gates; its default, that of Mixtral, divides them by their sum over the
    chosen experts, so that with top_k 1 the router would have no gradient. A routing group is a sequence; C =
    ceil(S k / E) capacity_factor, rounded down, where ours is rounded up after the product.
tokamax_ragged_dot, jax_ragged_dot: assignments sorted by expert, then one grouped product per matrix; no token is
    dropped. On CPUs and GPUs `jax.lax.ragged_dot` multiplies all rows by the matrices of all experts. On CPUs
    tokamax takes this implementation, too.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mot_jax.benchmark.trained_layer import Variables
from mot_jax.config import TokenChoiceConfig
from mot_jax.cost.layers import Shape
from mot_jax.nn import routing
from mot_jax.nn.feed_forward.interface import activate

Forward = Callable[[Variables, jax.Array], jax.Array]
_INSTALL = "not installed: pip install -r requirements-peers.lock"


class PeerError(Exception):
    """Why a peer has no time in the table."""


class Peer(NamedTuple):
    """A layer of another package.

    function: (shape, dtype) -> forward pass, (variables of `TokenChoice`, x [B, S, D]) -> update. Raises PeerError.
    executed_flops: FLOPs of the products of a forward pass.
    """

    function: Callable[[Shape, str], Forward]
    executed_flops: Callable[[Shape], float]


def _import(name: str) -> Any:
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name in (package, name)
        raise PeerError(_INSTALL if absent else f"cannot be imported: {error}".splitlines()[0]) from None


def _config(shape: Shape) -> TokenChoiceConfig:
    config = shape.kinds()["token_choice"]
    assert isinstance(config, TokenChoiceConfig)
    return config


def _expert_flops(shape: Shape) -> float:
    """FLOPs of one expert for one token."""
    return 2.0 * (3 if shape.gated else 2) * shape.d_model * _config(shape).hidden_dim(shape.d_ff)


def _router_flops(shape: Shape) -> float:
    return 2.0 * shape.tokens * shape.d_model * shape.num_experts


# --- MaxText ----------------------------------------------------------------------------------------------------------


def _maxtext_capacity(shape: Shape) -> int:
    config = _config(shape)
    factor = config.capacity_factor or 0
    return int(max(math.ceil(shape.length * config.top_k / config.num_experts) * factor, factor))


def _maxtext_flops(shape: Shape) -> float:
    """Router, experts on all slots, and the dispatch and combine products with masks [B, S, E, C]."""
    slots = shape.sequences * _maxtext_capacity(shape) * shape.num_experts
    return _router_flops(shape) + slots * (_expert_flops(shape) + 4.0 * shape.length * shape.d_model)


def _maxtext(shape: Shape, dtype: str) -> Forward:
    moe = _import("maxtext.layers.moe")
    config = _config(shape)
    if not shape.gated:
        raise PeerError("its experts are gated, and these are not")
    if config.capacity_factor is None:
        raise PeerError("needs a capacity_factor, and token_choice has none")
    layer = _maxtext_layer(moe, shape, config, dtype)
    graph, state = nnx.split(layer)

    def forward(variables: Variables, x: jax.Array) -> jax.Array:
        weights, layer = nnx.to_pure_dict(variables[0]), nnx.merge(graph, state, copy=True)
        layer.gate.kernel.set_value(weights["controller"])
        layer.wi_0.set_value(weights["w_gate"])
        layer.wi_1.set_value(weights["w_in"])
        layer.wo.set_value(weights["w_out"])
        return layer(x)[0]

    return forward


def _maxtext_layer(moe: Any, shape: Shape, config: TokenChoiceConfig, dtype: str) -> Any:
    pyconfig, initializers = _import("maxtext.configs.pyconfig"), _import("maxtext.layers.initializers")
    base, hidden = Path(pyconfig.__file__).with_name("base.yml"), config.hidden_dim(shape.d_ff)
    values = pyconfig.initialize(
        [None, str(base)],
        run_name="layer",
        enable_checkpointing=False,
        skip_jax_distributed_system=True,
        log_config=False,
        jax_cache_dir="",
        base_emb_dim=shape.d_model,
        base_mlp_dim=hidden,
        base_moe_mlp_dim=hidden,
        mlp_activations=[shape.activation, "linear"],
        num_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        capacity_factor=config.capacity_factor,
        decoder_block="deepseek",
        routed_score_func="softmax",
        float32_gate_logits=True,
        load_balance_loss_weight=0.0,
        sparse_matmul=False,
        megablox=False,
        dtype=dtype,
        weight_dtype="float32",
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape((1,) * len(values.mesh_axes)), values.mesh_axes)
    return moe.RoutedMoE(
        values,
        config.num_experts,
        config.top_k,
        mesh,
        initializers.nd_dense_init(1.0, "fan_in", "truncated_normal"),
        ("embed", None),
        nnx.Rngs(params=0),
        intermediate_dim=hidden,
        dtype=jnp.dtype(dtype),
    )


# --- grouped products -------------------------------------------------------------------------------------------------


def _ragged(shape: Shape, dtype: str, product: Callable[..., jax.Array]) -> Forward:
    """Sort the assignments by expert, and process them with grouped products (rows, matrices, group sizes)."""
    config = _config(shape)

    def forward(variables: Variables, x: jax.Array) -> jax.Array:
        weights = nnx.to_pure_dict(variables[0])
        tokens = x.reshape(-1, shape.d_model)
        logits = tokens.astype(jnp.float32) @ weights["controller"].astype(jnp.float32)
        choices = routing.choose_experts(logits[None], config.top_k)
        experts = choices.experts.reshape(-1)
        order = jnp.argsort(experts, stable=True)
        sizes = jnp.bincount(experts, length=config.num_experts).astype(jnp.int32)
        rows, matrices = (
            tokens[order // config.top_k],
            {n: w.astype(dtype) for n, w in weights.items() if n != "shared"},
        )
        gate = product(rows, matrices["w_gate"], sizes) if shape.gated else None
        hidden = activate(shape.activation, product(rows, matrices["w_in"], sizes), gate)
        outputs = product(hidden, matrices["w_out"], sizes)[jnp.argsort(order)]
        y = routing.weighted_sum(outputs.reshape(-1, config.top_k, shape.d_model), choices.weights[0])
        return y.astype(dtype).reshape(x.shape)

    return forward


def _jax_ragged_dot(shape: Shape, dtype: str) -> Forward:
    return _ragged(shape, dtype, jax.lax.ragged_dot)


def _tokamax_ragged_dot(shape: Shape, dtype: str) -> Forward:
    tokamax = _import("tokamax")
    return _ragged(shape, dtype, lambda rows, matrices, sizes: tokamax.ragged_dot(rows, matrices, group_sizes=sizes))


def _ragged_flops(shape: Shape, dense: bool) -> float:
    """dense: multiply all rows by the matrices of all experts."""
    assignments = shape.tokens * _config(shape).top_k * (shape.num_experts if dense else 1)
    return _router_flops(shape) + assignments * _expert_flops(shape)


PEERS = {
    "maxtext": Peer(_maxtext, _maxtext_flops),
    "tokamax_ragged_dot": Peer(
        _tokamax_ragged_dot, lambda shape: _ragged_flops(shape, dense=jax.default_backend() == "cpu")
    ),
    "jax_ragged_dot": Peer(_jax_ragged_dot, lambda shape: _ragged_flops(shape, dense=jax.default_backend() != "tpu")),
}


def comparable(shape: Shape) -> Shape:
    """A shape whose layers can be compared with peers.

    All experts are gated, routing groups are sequences, and token choice has the gates of the peers and no shared
    expert.
    """
    configs: list[Any] = []
    config: Any
    for config in shape.kinds().values():
        if hasattr(config, "routing_group_tokens"):
            config = dataclasses.replace(config, routing_group_tokens=shape.length)
        if isinstance(config, TokenChoiceConfig):
            width = config.hidden_dim(shape.d_ff)
            config = dataclasses.replace(
                config, expert_dim=width, shared_expert_dim=0, scores="softmax", balance="loss", mixture=None
            )
        configs.append(config)
    return dataclasses.replace(shape, gated=True, configs=tuple(configs))
