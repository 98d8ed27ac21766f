"""The transformer: a pre-norm decoder or bidirectional encoder; by default the paper's (PAPER.md section 5).

Equal neighbouring blocks are stacked: their parameters carry a leading dimension, and `jax.lax.scan` runs them, so
that neither the compiled program nor its compile time grows with depth.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mot_jax.config import FeedForwardConfig, ModelConfig
from mot_jax.nn.attention import Attention, LayerCache
from mot_jax.nn.feed_forward import FeedForwardContext, make_feed_forward
from mot_jax.nn.initializers import draw
from mot_jax.nn.kernels.fused_attention import same_document
from mot_jax.nn.losses import LossSums, cross_entropy_sum
from mot_jax.nn.sharding import anchor, positions_of, reshard, spec, whole

Params = dict[str, jax.Array]
Layers = list[tuple[jax.Array, jax.Array]]  # keys and values of the blocks of a stack's period, each [R, B, T, H_kv, K]


@partial(jax.tree_util.register_dataclass, data_fields=["layers", "real", "segments", "column"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a causal model keeps of the columns so far: rows are left-padded, and a column is a step in time for all.

    layers: of each stack. real: bool [B, T], what may be attended to. segments: int32 [B, T], which document of its
    row each is of. column: int32 scalar, the next one.
    """

    layers: list[Layers]
    real: jax.Array
    segments: jax.Array
    column: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, columns: int) -> Cache:
        """With room for so many columns, T, of B rows."""
        width = config.d_model // config.num_heads
        shape = (rows, columns, config.num_kv_heads or config.num_heads, width)

        def zeros(repeats: int) -> jax.Array:
            place = spec(None, "rows", None, "heads", None)
            return jnp.zeros((repeats, *shape), config.dtype, out_sharding=place)

        layers = [[(zeros(n), zeros(n)) for _ in period] for period, n in stack_plan(config)]
        real, segments = (jnp.zeros((rows, columns), t, out_sharding=spec("rows", None)) for t in (bool, jnp.int32))
        return cls(layers, real, segments, jnp.zeros((), jnp.int32))

    def extended(self, real: jax.Array, segments: jax.Array | None) -> Cache:
        """With the masks of the next columns [B, S] written down; `column` is still the first of them."""
        begin = (0, self.column)
        real = jax.lax.dynamic_update_slice(self.real, real, begin)
        segments = self.segments if segments is None else jax.lax.dynamic_update_slice(self.segments, segments, begin)
        return dataclasses.replace(self, real=real, segments=segments)

    def visible(self, length: int, document_mask: bool) -> jax.Array:
        """bool [B, 1, S, T]: what each of the `length` columns from `column` on may attend to."""
        columns = self.column + jnp.arange(length)
        seen = self.real[:, None, :] & (jnp.arange(self.real.shape[1]) <= columns[:, None])
        if document_mask:
            own = jax.lax.dynamic_slice_in_dim(self.segments, self.column, length, axis=1)
            seen &= same_document(own, self.segments)
        return seen[:, None]


class ModelOutput(NamedTuple):
    """hidden [B, S, D], what the head reads; losses and metrics as `{name}/{block}`, scalars; the cache, if any."""

    hidden: jax.Array
    losses: dict[str, jax.Array]
    metrics: dict[str, jax.Array]
    cache: Cache | None = None


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, kind: FeedForwardConfig, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = _norm(config, rngs)
        self.feed_forward = make_feed_forward(config, kind, rngs)

    def __call__(
        self,
        x: jax.Array,
        context: FeedForwardContext,
        segments: jax.Array | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, dict, dict]:
        """x [B, S, D] -> (x, losses, metrics). Metric `update_ratio`: RMS of the update over that of what it joins, of
        real tokens.
        """
        normed = self.attention_norm(x)
        x = x + self.attention(normed, context.token_mask, segments, context.positions, cache, context.train)
        out = self.feed_forward(self.feed_forward_norm(x), context)
        ratio = jax.lax.stop_gradient(_length(out.y, context.token_mask) / (_length(x, context.token_mask) + 1e-30))
        return x + out.y, out.losses, {**out.metrics, "update_ratio": ratio}


class Transformer(nnx.Module):
    """Token and position embeddings, stacks of blocks, head.

    Parameters: `token_embedding` [V, D], `position_embedding` [S, D] unless positions are rotary, `stacks/i/j/…` (the
    j-th block of the i-th stack's period, stacked over its repeats), `final_norm` if the config has one, and `head`
    [D, V] unless it is tied.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        d, init, dtype = config.d_model, config.init, config.param_dtype
        self.token_embedding = nnx.Param(draw(rngs.params(), (config.vocab_size, d), 1, init, dtype))
        self.position_embedding = (
            nnx.Param(draw(rngs.params(), (config.context_length, d), 1, init, dtype))
            if config.positions == "learned"
            else None
        )
        self.plan = stack_plan(config)
        keys = _block_keys(config, rngs)
        self.stacks: nnx.List = nnx.List()
        for period, n in self.plan:
            own, keys = keys[: n * len(period)], keys[n * len(period) :]
            self.stacks.append(nnx.List(_stack(config, kind, own[j :: len(period)]) for j, kind in enumerate(period)))
        self.final_norm = _norm(config, rngs) if config.final_norm else None
        self.head = (
            None if config.tie_embeddings else nnx.Param(draw(rngs.params(), (d, config.vocab_size), d, init, dtype))
        )

    def __call__(
        self,
        tokens: jax.Array,
        context: FeedForwardContext = FeedForwardContext(),
        segments: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> ModelOutput:
        """tokens int32 [B, S], S at most the context length; `context.token_mask` [B, S] says which are real.

        segments: int32 [B, S], which document of its row a token is of; `document_mask` needs it, nothing else reads
        it. cache: of earlier columns, of which the tokens are the next; `context.positions` says where they stand.
        """
        positions = positions_of(tokens.shape[1])
        tokens = reshard(tokens, "rows", positions)
        x = whole(self.token_embedding[...]).at[tokens].get(out_sharding=spec("rows", positions, None))
        if self.position_embedding is not None:
            if context.positions is None:
                x += whole(self.position_embedding[: tokens.shape[1]])
            else:
                places = reshard(context.positions, "rows", positions)
                x += whole(self.position_embedding[...]).at[places].get(out_sharding=spec("rows", positions, None))
        x = x.astype(self.config.dtype)
        losses: dict[str, jax.Array] = {}
        metrics: dict[str, jax.Array] = {}
        block = 0
        layers: list[Layers] = []
        if cache is not None:
            real = jnp.ones_like(tokens, bool) if context.token_mask is None else context.token_mask
            cache = cache.extended(real, segments)
            visible = cache.visible(tokens.shape[1], self.config.document_mask)
        for stack, (_, repeats) in zip(self.stacks, self.plan, strict=True):
            if cache is None:
                x, scanned = _run(stack, x, context, segments, self.config.remat == "blocks")
            else:
                kept = cache.layers[len(layers)]
                x, kept, scanned = _run_cached(stack, x, context, kept, visible, cache.column)
                layers.append(kept)
            for i in range(repeats):
                for found in scanned:
                    for collected, new in zip((losses, metrics), found, strict=True):
                        collected.update({f"{name}/{block:02d}": value[i] for name, value in new.items()})
                    block += 1
        if self.final_norm is not None:
            x = self.final_norm(x)
        if cache is not None:
            cache = dataclasses.replace(cache, layers=layers, column=cache.column + tokens.shape[1])
        return ModelOutput(x, losses, metrics, cache)

    def logits(self, hidden: jax.Array, vocab_size: int | None = None) -> jax.Array:
        """hidden [..., D] -> logits [..., V] in float32 (or wider).

        vocab_size: of the tokenizer, where the model has room for more: -inf from there on. None: as they are.
        """
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        logits = jnp.matmul(hidden, whole(self._head().astype(hidden.dtype)), preferred_element_type=wide)
        return logits if vocab_size is None else jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)

    def loss_sum(
        self, hidden: jax.Array, targets: jax.Array, mask: jax.Array, head_z: float = 0.0, accuracy: bool = False
    ) -> LossSums:
        """Sums over the True entries of `mask`, see `cross_entropy_sum`; the logits exist for a chunk at a time."""
        return cross_entropy_sum(hidden, self._head(), targets, mask, self.config.loss_chunk, head_z, accuracy)

    def _head(self) -> jax.Array:
        """[D, V]."""
        return self.token_embedding[...].T if self.head is None else self.head[...]


def stack_plan(config: ModelConfig) -> list[tuple[tuple[FeedForwardConfig, ...], int]]:
    """Cuts the blocks into (period, repeats): one stack if the whole pattern repeats, else one a run of equals.

    One for each block, unless they are `scan_layers`.
    """
    kinds = config.block_kinds()
    if not config.scan_layers:
        return [((kind,), 1) for kind in kinds]
    n = len(kinds)
    for period in range(1, n // 2 + 1):
        if n % period == 0 and kinds == kinds[:period] * (n // period):
            return [(tuple(kinds[:period]), n // period)]
    plan: list[tuple[tuple[FeedForwardConfig, ...], int]] = []
    for kind in kinds:
        if plan and plan[-1][0] == (kind,):
            plan[-1] = ((kind,), plan[-1][1] + 1)
        else:
            plan.append(((kind,), 1))
    return plan


def block_places(config: ModelConfig) -> list[tuple[str, int]]:
    """Where each block's parameters are: the beginning of their names, and their index in the leading dimension."""
    return [
        (f"stacks/{i}/{j}/", repeat)
        for i, (period, repeats) in enumerate(stack_plan(config))
        for repeat in range(repeats)
        for j in range(len(period))
    ]


def _block_keys(config: ModelConfig, rngs: nnx.Rngs) -> jax.Array:
    """A key for each block, [blocks], in whatever stacks they are."""
    keys: list[jax.Array] = []
    for period, n in stack_plan(dataclasses.replace(config, scan_layers=True)):
        found = jnp.stack([jax.random.split(rngs.params(), n) for _ in period], axis=1)  # [repeats, period]
        keys.append(found.reshape(-1))
    return jnp.concatenate(keys)


def _stack(config: ModelConfig, kind: FeedForwardConfig, keys: jax.Array) -> Block:
    """A block whose parameters have a leading dimension, each part drawn from one of the `keys`."""

    def create(key: jax.Array) -> nnx.State:
        return nnx.state(Block(config, kind, rngs=nnx.Rngs(params=key)))

    graph = nnx.graphdef(nnx.eval_shape(lambda: Block(config, kind, rngs=nnx.Rngs(params=0))))
    return nnx.merge(graph, jax.vmap(create)(keys))


def _run(
    stack: nnx.List, x: jax.Array, context: FeedForwardContext, segments: jax.Array | None, remat: bool
) -> tuple[jax.Array, list]:
    """Runs a stack's period over its repeats. Returns x and, by block of the period, (losses, metrics), stacked."""
    graph, state = nnx.split(stack)

    def body(x: jax.Array, state: nnx.State) -> tuple[jax.Array, list]:
        found = []
        for block in nnx.merge(graph, state):
            x, losses, metrics = block(x, context, segments)
            found.append((losses, metrics))
        return anchor(x), found

    if remat:  # inside a loop no common subexpression can undo it; a loop of one is no loop
        body = jax.checkpoint(body, prevent_cse=jax.tree.leaves(state)[0].shape[0] == 1)
    return jax.lax.scan(body, x, state)


def _run_cached(
    stack: nnx.List,
    x: jax.Array,
    context: FeedForwardContext,
    kept: Layers,
    visible: jax.Array,
    column: jax.Array,
) -> tuple[jax.Array, Layers, list]:
    """The same, with the keys and values of a `Cache`, which the loop carries, so that they are written in place."""
    graph, state = nnx.split(stack)

    def body(carry: tuple, part: tuple) -> tuple[tuple, list]:
        (x, kept), (state, index) = carry, part
        found, extended = [], []
        for block, (key, value) in zip(nnx.merge(graph, state), kept, strict=True):  # type: ignore[arg-type]
            layer = LayerCache(key, value, index, visible, column)
            x, losses, metrics = block(x, context, cache=layer)
            found.append((losses, metrics))
            extended.append((layer.key, layer.value))
        return (anchor(x), extended), found

    repeats = jnp.arange(jax.tree.leaves(state)[0].shape[0])
    (x, kept), found = jax.lax.scan(body, (x, kept), (state, repeats))
    return x, kept, found


def _norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
    kind = {"layer": nnx.LayerNorm, "rms": nnx.RMSNorm}[config.norm]
    return kind(
        config.d_model, epsilon=config.norm_epsilon, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs
    )


def _length(x: jax.Array, token_mask: jax.Array | None) -> jax.Array:
    """The Euclidean norm of all real tokens [B, S, D]."""
    squares = jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    return jnp.sqrt((squares if token_mask is None else jnp.where(token_mask[..., None], squares, 0)).sum())


# --- the model as a pure function of flat parameters ------------------------------------------------------------------


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """All parameters by name (`stacks/0/0/feed_forward/w_in`, say)."""
    return get_params(Transformer(config, rngs=nnx.Rngs(params=key)))


def get_params(model: nnx.Module) -> Params:
    """The parameters of a module, flat."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): variable[...] for path, variable in flat}


def bind(config: ModelConfig, params: Params) -> Transformer:
    """The model with these parameters; inside or outside of jit."""
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0)))
    graph, state = nnx.split(abstract)
    flat = nnx.to_flat_state(state)
    values = [(path, variable.replace(params["/".join(map(str, path))])) for path, variable in flat]
    return nnx.merge(graph, nnx.from_flat_state(values))


def unstack(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same model with every block by itself."""
    apart = dataclasses.replace(config, scan_layers=False)
    found = {name: value for name, value in params.items() if not name.startswith("stacks/")}
    for (old, repeat), (new, _) in zip(block_places(config), block_places(apart), strict=True):
        for name, value in params.items():
            if name.startswith(old):
                found[new + name.removeprefix(old)] = value[repeat : repeat + 1]
    return apart, found
