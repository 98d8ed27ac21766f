"""Multi-head self-attention, and the keys and values that generation keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mot_jax.config import ModelConfig
from mot_jax.nn.initializers import draw
from mot_jax.nn.kernels import fused_attention
from mot_jax.nn.sharding import axes_of, product, spec


@dataclasses.dataclass
class LayerCache:
    """One layer's keys and values of the columns so far, while its model runs on the next ones.

    key, value: [R, B, T, H_kv, K], of all R layers of a stack, replaced by `extend`; `index` is this one's. visible:
    bool [B, 1, S, T], what each of the S new columns may see, themselves and each other among it. column: int32
    scalar, the first of them.
    """

    key: jax.Array
    value: jax.Array
    index: jax.Array
    visible: jax.Array
    column: jax.Array

    def extend(self, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Takes those of the new columns [B, S, H_kv, K]; returns those of all columns [B, T, H_kv, K]."""
        begin = (self.index, 0, self.column, 0, 0)
        self.key = jax.lax.dynamic_update_slice(self.key, key[None], begin)
        self.value = jax.lax.dynamic_update_slice(self.value, value[None], begin)
        key, value = (jax.lax.dynamic_index_in_dim(a, self.index, keepdims=False) for a in (self.key, self.value))
        return key, value


class Attention(nnx.Module):
    """Scaled dot-product attention over the positions of a row: the earlier ones, or all if `masked`.

    Parameters: `query` [D, H, K], `key_value` [D, 2, H_kv, K], `out` [H, K, D], with K = D / H; with `attention_bias`
    `query_bias` [H, K], `key_value_bias` [2, H_kv, K] and `out_bias` [D], zero at first. Of the H heads of queries,
    each H / H_kv neighbours share keys and values.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        d, h = config.d_model, config.num_heads
        k, h_kv = d // h, config.num_kv_heads or h
        self.query = nnx.Param(draw(rngs.params(), (d, h, k), d, config.init, config.param_dtype))
        self.key_value = nnx.Param(draw(rngs.params(), (d, 2, h_kv, k), d, config.init, config.param_dtype))
        self.out = nnx.Param(draw(rngs.params(), (h, k, d), d, config.init, config.param_dtype))

        def bias(*shape: int) -> nnx.Param | None:
            return nnx.Param(jnp.zeros(shape, config.param_dtype)) if config.attention_bias else None

        self.query_bias, self.key_value_bias, self.out_bias = bias(h, k), bias(2, h_kv, k), bias(d)

    def __call__(
        self,
        x: jax.Array,
        token_mask: jax.Array | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: LayerCache | None = None,
        train: bool = False,
    ) -> jax.Array:
        """x [B, S, D] -> [B, S, D] in the layer's dtype.

        token_mask: bool [B, S]; False is not attended to. segments: int32 [B, S], which document of its row a token is
        of; read with `document_mask` alone, which raises ValueError without. positions: int32 [B, S], None is 0 to
        S - 1; read by rotary ones. cache: of earlier columns, extended by these; its `visible` stands for both masks.
        train: what is not real is at the ends of rows.
        """
        config = self.config
        x = x.astype(config.dtype)
        query = product("bsd,dhk->bshk", x, self.query[...])
        key, value = product("bsd,dchk->cbshk", x, self.key_value[...])
        if self.query_bias is not None and self.key_value_bias is not None:
            query += self.query_bias[...].astype(config.dtype)
            key_bias, value_bias = (self.key_value_bias[i].astype(config.dtype) for i in (0, 1))
            key, value = key + key_bias, value + value_bias
        if config.positions == "rotary":
            positions = jnp.arange(x.shape[1]) if positions is None else positions
            query, key = (rotate(a, positions, config.rotary_base) for a in (query, key))
        if cache is not None:
            key, value = cache.extend(key, value)
            return self._out(jax.nn.dot_product_attention(query, key, value, mask=cache.visible), x)
        if config.document_mask and segments is None:
            raise ValueError("document_mask = True needs segments, int32 [B, S]; segments = None")
        if train and config.objective == "causal":  # then no real token looks at one that is not
            token_mask = None
        return self._out(self._attend(query, key, value, token_mask, segments if config.document_mask else None), x)

    def _attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        token_mask: jax.Array | None,
        segments: jax.Array | None,
    ) -> jax.Array:
        """[B, S, H, K], [B, S, H_kv, K] twice -> [B, S, H, K], by the kernel that does it here."""
        causal, kernel = self.config.objective == "causal", fused_attention.choose_kernel(self.config, query.shape[1])
        if kernel != "xla":
            fused = {"splash": fused_attention.splash, "cudnn": fused_attention.cudnn}[kernel]
            return fused(query, key, value, fused_attention.attention_ids(token_mask, segments), causal)
        mask = None if token_mask is None else token_mask[:, None, None, :]
        if segments is not None:
            same = fused_attention.same_document(segments, segments)[:, None]
            mask = same if mask is None else same & mask
        attend: Callable[..., jax.Array] = partial(jax.nn.dot_product_attention, is_causal=causal)
        if self.config.remat == "attention":  # the S x S scores are large, and cheap to compute again
            attend = jax.checkpoint(attend)
        return attend(query, key, value, mask=mask)

    def _out(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """What the heads say, y [B, S, H, K], as an update that lies where x [B, S, D] does."""
        y = product("bshk,hkd->bsd", y, self.out[...], spec(*axes_of(x)))
        return y if self.out_bias is None else y + self.out_bias[...].astype(y.dtype)


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary positions: turns the pair (x_i, x_i+K/2) of the last dimension by the angle position / base^(2i / K).

    The product of a query and a key then knows their positions by their difference alone.

    x: [B, S, H, K], K even. positions: int [S] or [B, S]. Returns x's shape and dtype; float32 or wider inside.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * base ** (-jnp.arange(half, dtype=wide) / half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
