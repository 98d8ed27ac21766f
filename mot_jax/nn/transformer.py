"""The transformer: a pre-norm decoder or bidirectional encoder; by default the paper's (`docs/paper.md`, section 5).

Consecutive blocks with the same feed-forward kind are one scan: their parameters have a leading dimension, and
`jax.lax.scan` runs them, so that neither the compiled program nor its compile time grows with depth.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from mot_jax.config import FeedForwardConfig, ModelConfig, check_part
from mot_jax.nn.attention import Attention, LayerCache
from mot_jax.nn.feed_forward import KINDS, FeedForwardContext, RouterState, make_feed_forward
from mot_jax.nn.initializers import draw
from mot_jax.nn.kernels import fused_attention
from mot_jax.nn.losses import LossSums, cross_entropy_sum
from mot_jax.nn.sharding import (
    add_to_sequences,
    look_up,
    pin_cotangent_sharding,
    positions_dimension,
    replicate,
    reshard,
    spec,
)
from mot_jax.runtime.compilation import default_promotion

Params = dict[str, jax.Array]
# Keys and values of the blocks of one period of a scan with R repeats, each [R, B, T, H_kv, K].
KeysAndValues = list[tuple[jax.Array, jax.Array]]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["layers", "token_mask", "segments", "step"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """The state of a causal model between decode steps.

    Sequences are left-padded, so that a decode step writes the next token of each of them at the same index.

    Attributes:
        layers: keys and values, for each scan.
        token_mask: bool [B, T], the tokens that may be attended to.
        segments: int32 [B, T], the index of each token's document within its sequence.
        step: int32 scalar, the index of the next decode step.
    """

    layers: list[KeysAndValues]
    token_mask: jax.Array
    segments: jax.Array
    step: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, max_length: int) -> Cache:
        """A cache for `batch` sequences, B, of at most `max_length` tokens, T."""
        head_dim = config.d_model // config.num_heads
        shape = (batch, max_length, config.num_kv_heads or config.num_heads, head_dim)

        def zeros(repeats: int) -> jax.Array:
            sharding = spec(None, "sequences", None, "heads", None)
            return jnp.zeros((repeats, *shape), config.dtype, out_sharding=sharding)

        layers = [[(zeros(n), zeros(n)) for _ in period] for period, n in scan_groups(config)]
        token_mask, segments = (
            jnp.zeros((batch, max_length), dtype, out_sharding=spec("sequences", None)) for dtype in (bool, jnp.int32)
        )
        return cls(layers, token_mask, segments, jnp.zeros((), jnp.int32))

    def with_masks(self, token_mask: jax.Array, segments: jax.Array | None) -> Cache:
        """The cache with the masks of the next tokens, [B, S], written at `step`, which does not advance."""
        start = (0, self.step)
        token_mask = jax.lax.dynamic_update_slice(self.token_mask, token_mask, start)
        segments = self.segments if segments is None else jax.lax.dynamic_update_slice(self.segments, segments, start)
        return dataclasses.replace(self, token_mask=token_mask, segments=segments)

    def attention_mask(self, length: int, document_mask: bool) -> jax.Array:
        """The cached tokens that each of the `length` tokens from `step` on may attend to: bool [B, 1, S, T]."""
        steps = self.step + jnp.arange(length)
        mask = self.token_mask[:, None, :] & (jnp.arange(self.token_mask.shape[1]) <= steps[:, None])
        if document_mask:
            segments = jax.lax.dynamic_slice_in_dim(self.segments, self.step, length, axis=1)
            mask &= fused_attention.same_document(segments, self.segments)
        return mask[:, None]


class ModelOutput(NamedTuple):
    """The result of a `Transformer`.

    hidden: [B, S, D], the input of the head. losses, metrics: scalars, named `{name}/{block}`. statistics: those of the
    feed-forward layers, named as parameters are, with the leading dimension of their scan. cache: if any.
    """

    hidden: jax.Array
    losses: dict[str, jax.Array]
    metrics: dict[str, jax.Array]
    statistics: dict[str, jax.Array]
    cache: Cache | None = None


class Auxiliary(NamedTuple):
    """Losses, metrics and statistics of a feed-forward layer, by name (`FeedForwardOutput`)."""

    losses: dict[str, jax.Array]
    metrics: dict[str, jax.Array]
    statistics: dict[str, jax.Array]


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, kind: FeedForwardConfig, *, rngs: nnx.Rngs):
        self.attention_norm = _make_norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = _make_norm(config, rngs)
        self.feed_forward = make_feed_forward(config, kind, rngs)

    def __call__(
        self,
        x: jax.Array,
        context: FeedForwardContext,
        segments: jax.Array | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, Auxiliary]:
        """Apply the block to x [B, S, D].

        The metric `update_ratio` is the RMS of the feed-forward update over that of the residual stream that it is
        added to, both over non-padding tokens.
        """
        normed = self.attention_norm(x)
        x = x + self.attention(normed, context.token_mask, segments, context.positions, cache, context.train)
        out = self.feed_forward(self.feed_forward_norm(x), context)
        ratio = jax.lax.stop_gradient(_norm_of(out.y, context.token_mask) / (_norm_of(x, context.token_mask) + 1e-30))
        return x + out.y, Auxiliary(out.losses, {**out.metrics, "update_ratio": ratio}, out.statistics)


class Transformer(nnx.Module):
    """Token and position embeddings, scanned blocks, head.

    Parameters: `token_embedding` [V, D]; `position_embedding` [S, D] unless positions are rotary; `stacks/i/j/…`, those
    of the j-th block in the period of the i-th scan, with a leading dimension over the repeats of the period;
    `final_norm`, if the config has one; and `head` [D, V], unless the embeddings are tied.

    Raises UserError for an invalid config.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        check_part(config, "model.")
        self.config = config
        d, init, dtype = config.d_model, config.init, config.param_dtype
        self.token_embedding = nnx.Param(draw(rngs.params(), (config.vocab_size, d), 1, init, dtype))
        self.position_embedding = (
            nnx.Param(draw(rngs.params(), (config.context_length, d), 1, init, dtype))
            if config.positions == "learned"
            else None
        )
        self.scan_groups = scan_groups(config)
        keys = _block_keys(config, rngs)
        self.stacks: nnx.List = nnx.List()
        for period, n in self.scan_groups:
            group_keys, keys = keys[: n * len(period)], keys[n * len(period) :]
            self.stacks.append(
                nnx.List(_stack_blocks(config, kind, group_keys[j :: len(period)]) for j, kind in enumerate(period))
            )
        self.final_norm = _make_norm(config, rngs) if config.final_norm else None
        self.head = (
            None if config.tie_embeddings else nnx.Param(draw(rngs.params(), (d, config.vocab_size), d, init, dtype))
        )

    @default_promotion()
    def __call__(
        self,
        tokens: jax.Array,
        context: FeedForwardContext = FeedForwardContext(),
        segments: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> ModelOutput:
        """Run the model up to the input of the head.

        Args:
            tokens: int32 [B, S], S at most the context length.
            context: inputs of the feed-forward layers. `token_mask` bool [B, S] is True for non-padding tokens;
                `token_ids` are those of `tokens` if they are None.
            segments: int32 [B, S], the index of each token's document within its sequence. Required with
                `document_mask`, ignored without.
            cache: of the decode steps before these tokens, whose positions are then `context.positions`.
        """
        if context.token_ids is None:
            context = dataclasses.replace(context, token_ids=tokens)
        positions = positions_dimension(tokens.shape[1])
        tokens = reshard(tokens, "sequences", positions)
        out_sharding = spec("sequences", positions, None)
        x = look_up(self.token_embedding[...], tokens, out_sharding)
        if self.position_embedding is not None:
            if context.positions is None:
                x = add_to_sequences(x, self.position_embedding[: tokens.shape[1]])
            else:
                indices = reshard(context.positions, "sequences", positions)
                x += look_up(self.position_embedding[...], indices, out_sharding)
            if fused_attention.platform() == "gpu":
                # The gradient of the positions is a sum over sequences, for which XLA would make these the innermost
                # dimension of all activations, and transpose them before and after each product.
                x = with_layout_constraint(x, Layout((0, 1, 2)))
        x = x.astype(self.config.dtype)
        losses: dict[str, jax.Array] = {}
        metrics: dict[str, jax.Array] = {}
        statistics: dict[str, jax.Array] = {}
        block = 0
        layers: list[KeysAndValues] = []
        if cache is not None:
            token_mask = jnp.ones_like(tokens, bool) if context.token_mask is None else context.token_mask
            cache = cache.with_masks(token_mask, segments)
            attention_mask = cache.attention_mask(tokens.shape[1], self.config.document_mask)
        for index, (stack, (_, repeats)) in enumerate(zip(self.stacks, self.scan_groups, strict=True)):
            if cache is None:
                x, outputs = _scan(stack, x, context, segments, self.config.remat == "blocks")
            else:
                keys_and_values = cache.layers[len(layers)]
                x, keys_and_values, outputs = _scan_cached(
                    stack, x, context, keys_and_values, attention_mask, cache.step
                )
                layers.append(keys_and_values)
            for j, output in enumerate(outputs):
                prefix = f"stacks/{index}/{j}/feed_forward/"
                statistics.update({prefix + name: value for name, value in output.statistics.items()})
            for i in range(repeats):
                for output in outputs:
                    losses.update({f"{name}/{block:02d}": value[i] for name, value in output.losses.items()})
                    metrics.update({f"{name}/{block:02d}": value[i] for name, value in output.metrics.items()})
                    block += 1
        if self.final_norm is not None:
            x = self.final_norm(x)
        if cache is not None:
            cache = dataclasses.replace(cache, layers=layers, step=cache.step + tokens.shape[1])
        return ModelOutput(x, losses, metrics, statistics, cache)

    def loss_counts(self, token_mask: jax.Array) -> dict[str, jax.Array]:
        """The number of terms in each mean of the layers' losses, by name, for a token mask [B, S].

        Equal in all blocks that have a loss, since they have one config.
        """
        layers = [block.feed_forward for stack in self.stacks for block in stack]
        return {name: count for layer in layers for name, count in layer.loss_counts(token_mask).items()}

    @default_promotion()
    def logits(self, hidden: jax.Array, vocab_size: int | None = None) -> jax.Array:
        """The logits [..., V], in float32 or wider, of hidden [..., D].

        vocab_size: of the tokenizer, if the model's is larger. Logits of the tokens beyond it are -inf.
        """
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        logits = jnp.matmul(hidden, replicate(self._head().astype(hidden.dtype)), preferred_element_type=wide)
        return logits if vocab_size is None else jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)

    @default_promotion()
    def loss_sum(
        self, hidden: jax.Array, targets: jax.Array, mask: jax.Array, head_z: float = 0.0, accuracy: bool = False
    ) -> LossSums:
        """`cross_entropy_sum` with the model's head; the logits of one chunk at a time are in memory."""
        return cross_entropy_sum(hidden, self._head(), targets, mask, self.config.loss_chunk, head_z, accuracy)

    def _head(self) -> jax.Array:
        """[D, V]."""
        return self.token_embedding[...].T if self.head is None else self.head[...]


def scan_groups(config: ModelConfig) -> list[tuple[tuple[FeedForwardConfig, ...], int]]:
    """The blocks as scans: for each the feed-forward kinds of one period, and the number of its repeats.

    One scan if the whole pattern of kinds repeats, otherwise one for each run of equal kinds. Without `scan_layers`,
    one for each block.
    """
    kinds = config.block_kinds()
    if not config.scan_layers:
        return [((kind,), 1) for kind in kinds]
    n = len(kinds)
    for period in range(1, n // 2 + 1):
        if n % period == 0 and kinds == kinds[:period] * (n // period):
            return [(tuple(kinds[:period]), n // period)]
    groups: list[tuple[tuple[FeedForwardConfig, ...], int]] = []
    for kind in kinds:
        if groups and groups[-1][0] == (kind,):
            groups[-1] = ((kind,), groups[-1][1] + 1)
        else:
            groups.append(((kind,), 1))
    return groups


def block_places(config: ModelConfig) -> list[tuple[str, int]]:
    """For each block, the prefix of its parameters' names and its index in their leading dimension."""
    return [
        (f"stacks/{i}/{j}/", repeat)
        for i, (period, repeats) in enumerate(scan_groups(config))
        for repeat in range(repeats)
        for j in range(len(period))
    ]


def _block_keys(config: ModelConfig, rngs: nnx.Rngs) -> jax.Array:
    """A key for each block, [blocks]. They do not depend on `scan_layers`."""
    keys: list[jax.Array] = []
    for period, n in scan_groups(dataclasses.replace(config, scan_layers=True)):
        group_keys = jnp.stack([jax.random.split(rngs.params(), n) for _ in period], axis=1)  # [repeats, period]
        keys.append(group_keys.reshape(-1))
    return jnp.concatenate(keys)


def _stack_blocks(config: ModelConfig, kind: FeedForwardConfig, keys: jax.Array) -> Block:
    """A block whose parameters have a leading dimension, with one initialization for each of the `keys`."""

    def create(key: jax.Array) -> nnx.State:
        return nnx.state(Block(config, kind, rngs=nnx.Rngs(params=key)))

    graph = nnx.graphdef(nnx.eval_shape(lambda: Block(config, kind, rngs=nnx.Rngs(params=0))))
    return nnx.merge(graph, jax.vmap(create)(keys))


def _scan(
    stack: nnx.List, x: jax.Array, context: FeedForwardContext, segments: jax.Array | None, remat: bool
) -> tuple[jax.Array, list]:
    """Scan over the repeats of a stack's period.

    Returns x and, for each block of the period, its `Auxiliary` with a leading dimension over the repeats.
    """
    graph, state = nnx.split(stack)

    def body(x: jax.Array, state: nnx.State) -> tuple[jax.Array, list]:
        outputs = []
        for block in nnx.merge(graph, state):
            x, output = block(x, context, segments)
            outputs.append(output)
        return pin_cotangent_sharding(x), outputs

    if remat:
        # In a loop, common subexpression elimination cannot undo the rematerialization. XLA removes a loop of one.
        body = jax.checkpoint(body, prevent_cse=jax.tree.leaves(state)[0].shape[0] == 1)
    return jax.lax.scan(body, x, state)


def _scan_cached(
    stack: nnx.List,
    x: jax.Array,
    context: FeedForwardContext,
    keys_and_values: KeysAndValues,
    attention_mask: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, KeysAndValues, list]:
    """As `_scan`, with the keys and values of a `Cache` in the carry, so that they are updated in place."""
    graph, state = nnx.split(stack)

    def body(carry: tuple, inputs: tuple) -> tuple[tuple, list]:
        (x, keys_and_values), (state, index) = carry, inputs
        outputs, extended = [], []
        blocks = nnx.merge(graph, state)
        for block, (key, value) in zip(blocks, keys_and_values, strict=True):
            layer = LayerCache(key, value, index, attention_mask, step)
            x, output = block(x, context, cache=layer)
            outputs.append(output)
            extended.append((layer.key, layer.value))
        return (pin_cotangent_sharding(x), extended), outputs

    indices = jnp.arange(jax.tree.leaves(state)[0].shape[0])
    (x, keys_and_values), outputs = jax.lax.scan(body, (x, keys_and_values), (state, indices))
    return x, keys_and_values, outputs


def _make_norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
    kind = {"layer": nnx.LayerNorm, "rms": nnx.RMSNorm}[config.norm]
    return kind(
        config.d_model, epsilon=config.norm_epsilon, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs
    )


def _norm_of(x: jax.Array, token_mask: jax.Array | None) -> jax.Array:
    """The Euclidean norm of x [B, S, D] over all non-padding tokens."""
    squares = jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    return jnp.sqrt((squares if token_mask is None else jnp.where(token_mask[..., None], squares, 0)).sum())


# --- the model as a pure function of flat parameters ------------------------------------------------------------------


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Initialize all parameters, by name, for example `stacks/0/0/feed_forward/w_in`."""
    return init_variables(config, key)[0]


def init_router(config: ModelConfig) -> Params:
    """Initialize the router state, by name; empty for kinds without."""
    return init_variables(config, jax.random.key(0))[1]


def init_variables(config: ModelConfig, key: jax.Array) -> tuple[Params, Params]:
    """Initialize parameters and router state, by name."""
    model = Transformer(config, rngs=nnx.Rngs(params=key))
    return get_params(model), _variables(model, RouterState)


def initial_router(config: ModelConfig, token_counts: Callable[[], np.ndarray]) -> dict[str, np.ndarray]:
    """The router state that depends on the training text, by name (`FeedForward.initial_router`)."""
    kind, prefixes = config.feed_forward, _layer_prefixes(config)
    if not prefixes:
        return {}
    values = KINDS[type(kind)].initial_router(kind, sum(prefixes.values()), token_counts)
    ends = np.cumsum([*prefixes.values()])[:-1]
    return {
        prefix + name: part
        for name, value in values.items()
        for prefix, part in zip(prefixes, np.split(value, ends), strict=True)
    }


def update_router(config: ModelConfig, router: Params, statistics: Params) -> Params:
    """The router state after a training step, from its `ModelOutput.statistics`, summed over microbatches."""
    if not router:
        return router
    prefixes = _layer_prefixes(config)

    def stack(values: Params) -> Params:
        first = next(iter(prefixes))
        names = [name.removeprefix(first) for name in values if name.startswith(first)]
        return {name: jnp.concatenate([values[prefix + name] for prefix in prefixes]) for name in names}

    updated = KINDS[type(config.feed_forward)].update_router(config.feed_forward, stack(router), stack(statistics))
    ends = np.cumsum([*prefixes.values()])[:-1]
    return {
        prefix + name: part
        for name, value in updated.items()
        for prefix, part in zip(prefixes, jnp.split(value, ends), strict=True)
    }


def _layer_prefixes(config: ModelConfig) -> dict[str, int]:
    """The prefixes of the names of the layers of kind `config.feed_forward`, and the numbers of layers with them."""
    return {
        f"stacks/{i}/{j}/feed_forward/": repeats
        for i, (period, repeats) in enumerate(scan_groups(config))
        for j, kind in enumerate(period)
        if kind == config.feed_forward
    }


def get_params(model: nnx.Module) -> Params:
    """The parameters of a module, by name."""
    return _variables(model, nnx.Param)


def _variables(model: nnx.Module, kind: type[nnx.Variable]) -> Params:
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {"/".join(map(str, path)): variable[...] for path, variable in flat}


def bind(config: ModelConfig, params: Params) -> Transformer:
    """The model with these parameters and router state, inside or outside of `jax.jit`.

    Raises KeyError if one is missing.
    """
    graph, variables = _structure(config)
    values = [(path, variable.replace(params["/".join(map(str, path))])) for path, variable in variables]
    return nnx.merge(graph, nnx.from_flat_state(values))


@functools.lru_cache(maxsize=64)
def _structure(config: ModelConfig) -> tuple[nnx.GraphDef, list[tuple]]:
    """The graph of a model, and its variables, without values, by path."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0))))
    return graph, list(nnx.to_flat_state(state))


def unroll(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same model without `scan_layers`: its config, and its parameters with a leading dimension of 1."""
    unrolled_config = dataclasses.replace(config, scan_layers=False)
    unrolled = {name: value for name, value in params.items() if not name.startswith("stacks/")}
    for (prefix, repeat), (new_prefix, _) in zip(block_places(config), block_places(unrolled_config), strict=True):
        for name, value in params.items():
            if name.startswith(prefix):
                unrolled[new_prefix + name.removeprefix(prefix)] = value[repeat : repeat + 1]
    return unrolled_config, unrolled
