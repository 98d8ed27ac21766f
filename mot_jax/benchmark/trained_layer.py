"""A feed-forward layer of a finished run, on one validation batch: sizes, activations and router for a benchmark."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mot_jax.config import Config, DenseConfig, HashConfig
from mot_jax.cost.feed_forward import feed_forward_cost, flop_matched_kinds
from mot_jax.cost.layers import Shape
from mot_jax.cost.matched import TOLERANCE
from mot_jax.data.objectives import Objective
from mot_jax.data.pipeline import COUNTED_TOKENS, validation_batches
from mot_jax.data.text import open_split, open_tokenizer, store_text_once
from mot_jax.errors import UserError
from mot_jax.modes.recording import record
from mot_jax.nn.feed_forward import FeedForward, FeedForwardContext
from mot_jax.nn.feed_forward.hash import balanced_table
from mot_jax.nn.transformer import block_places, unroll
from mot_jax.runs.restore import check_data, load_run, load_run_config, parameter_kinds
from mot_jax.runs.status import RESULT
from mot_jax.runs.tensor_files import holds_tensors
from mot_jax.runtime.paths import user_path
from mot_jax.training.evaluation import evaluated_config

Variables = tuple[Any, Any]  # parameters and router state, which has no gradient


class TrainedLayer(NamedTuple):
    """A layer of a run.

    shape: its sizes, with the other kinds that have its experts. left_out: by name, why another kind is not among
    them. kind: its own. x: its input [B, S, D], after the layer norm, for the tokens token_ids [B, S]. router: by name,
    the controller [D, E], the router state, and for hash layers the table that is balanced for the validation text.
    """

    shape: Shape
    left_out: dict[str, str]
    kind: str
    x: jax.Array
    token_ids: jax.Array
    router: dict[str, jax.Array]
    block: int
    step: int

    def with_router(self, variables: Variables) -> Variables:
        """Replace the variables of a layer that have the name and the shape of a value of `router`."""

        def changed(state: nnx.State) -> nnx.State:
            flat = {
                path: variable.replace(self.router[path[-1]])
                if len(path) == 1 and path[-1] in self.router and self.router[path[-1]].shape == variable.shape
                else variable
                for path, variable in nnx.to_flat_state(state)
            }
            return nnx.from_flat_state(flat)

        params, router = variables
        return changed(params), changed(router)


def read_trained_layer(run: str, block: int | None = None) -> TrainedLayer:
    """Read a layer of a finished run or of an export, and the first validation batch up to this layer.

    Args:
        run: the workdir.
        block: index of the block; None is the middle one of the blocks with such a layer.

    Raises:
        UserError: the directory holds no finished run, its kind has no controller [D, E], or the block has no such
            layer.
    """
    workdir = user_path("--routing", run)
    try:
        config = load_run_config(workdir)
    except UserError as error:
        raise UserError(*(f"--routing: {fault}" for fault in error.faults)) from None
    if not holds_tensors(workdir) and not (workdir / RESULT).exists():
        raise UserError(f"--routing = {run}: must be a finished run, and has no {RESULT}; try another, or resume it")
    kind, model = config.model.feed_forward, config.model
    blocks = [index for index, of_block in enumerate(model.block_kinds()) if of_block == kind]
    block = blocks[len(blocks) // 2] if block is None else block
    if block not in blocks:
        raise UserError(f"--block = {block}: has no {kind.kind} layer in {run}; try one of {blocks}")
    controller = parameter_kinds(model).get(f"{block_places(model)[block][0]}feed_forward/controller")
    if controller is None or len(controller.shape) != 3:  # stacked over layers
        raise UserError(
            f"--routing = {run}: its kind {kind.kind} has no controller [D, E]; try a mixture_of_tokens run"
        )
    trained = load_run(workdir)
    unrolled, params = unroll(model, trained.params)
    prefix = block_places(unrolled)[block][0] + "feed_forward/"
    values = {name.removeprefix(prefix): value[0] for name, value in params.items() if name.startswith(prefix)}
    weights = ("w_in", "w_out", "w_gate")
    router = {name: value for name, value in values.items() if "/" not in name and name not in weights}
    inference = dataclasses.replace(evaluated_config(config).model, scan_layers=False)
    x, token_ids, token_counts = _input_of_block(config, inference, params, trained.step, block, workdir)
    shape, left_out = _shape(config, workdir.name, x)
    hash_layer = shape.kinds().get(HashConfig.kind)
    if isinstance(hash_layer, HashConfig):
        router["table"] = jnp.asarray(balanced_table(token_counts, hash_layer.num_experts, hash_layer.top_k, block))
    return TrainedLayer(shape, left_out, kind.kind, x, token_ids, router, block, trained.step)


def _input_of_block(
    config: Config, model: Any, params: Any, step: int, block: int, workdir: Any
) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """The layer's input [B, S, D], its tokens [B, S], and how often the validation text has each token id [V]."""
    tokenizer, split = open_tokenizer(config), config.data.validation_split
    check_data({"tokenizer": tokenizer.fingerprint}, config, workdir)
    store_text_once(config, tokenizer, split)
    windows = open_split(config, split, tokenizer)
    check_data({"validation": windows.fingerprint}, config, workdir)
    training, group = config.training, config.group_size
    size = -(-training.batch_size // training.gradient_accumulation_steps // group) * group
    batches = validation_batches(windows, Objective.of(config, tokenizer), group, size, np.arange(size), None)
    batch = next(batches)

    @jax.jit
    def layer_input(params: Any) -> jax.Array:
        context = FeedForwardContext(batch.token_mask, batch.inputs, step=jnp.asarray(step))
        _, values = record(
            model, params, batch.inputs, context, batch.segments, lambda layer, x, context: {"x": x}, FeedForward
        )
        return values["x"][block]

    counted = windows.read(np.arange(min(len(windows), max(1, COUNTED_TOKENS // windows.context_length))))
    counts = np.bincount(counted.tokens[:, :-1][counted.mask], minlength=model.vocab_size)
    return layer_input(params), jnp.asarray(batch.inputs), counts


def _shape(config: Config, name: str, x: jax.Array) -> tuple[Shape, dict[str, str]]:
    """The sizes of the layer, and all kinds with as many experts of its width, without shared experts.

    The second result has the reason why a kind is left out: batches are not whole groups, or its FLOPs are others.
    """
    model, (sequences, length, _) = config.model, x.shape
    trained: Any = model.feed_forward
    width, experts, top_k = trained.hidden_dim(model.d_ff), trained.num_experts, getattr(trained, "top_k", None)
    group = getattr(trained, "group_size", None) or max(1, experts // top_k)
    d_ff = width * top_k if top_k else width * experts // group
    of_width = dataclasses.replace(model, d_ff=d_ff)
    dense_flops = feed_forward_cost(of_width, DenseConfig()).expert_flops()
    configs: list[Any] = []
    left_out: dict[str, str] = {}
    for kind in (flop_matched_kinds(group, experts, length) | {trained.kind: trained}).values():
        fields = {"expert_dim": width, "shared_expert_dim": 0, "flop_matched": False}
        if top_k is not None:
            fields["top_k"] = top_k
        if kind != trained:
            fields["routing_group_tokens"] = length
        fields = {name: value for name, value in fields.items() if hasattr(kind, name)}
        if (count := getattr(kind, "num_experts", experts)) != experts:
            left_out[kind.kind] = f"at its FLOPs, it would have {count} experts, and the run has {experts}"
            continue
        kind = dataclasses.replace(kind, **fields)
        ratio = feed_forward_cost(of_width, kind).expert_flops() / dense_flops
        if kind.kind == trained.kind:
            configs.append(kind)
        elif sequences % kind.mixed_sequences:
            left_out[kind.kind] = f"groups of {kind.mixed_sequences} sequences do not divide a batch of {sequences}"
        elif abs(ratio - 1) > TOLERANCE:
            left_out[kind.kind] = f"its experts, as wide as those of the run, would have {ratio:.2f} times the FLOPs"
        else:
            configs.append(kind)
    sizes = (model.d_model, d_ff, group, experts, sequences, length)
    return Shape(name, *sizes, model.gated, model.activation, tuple(configs), model.vocab_size), left_out
