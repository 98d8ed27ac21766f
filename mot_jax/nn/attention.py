"""Multi-head self-attention, and one layer's cache of keys and values for generation."""

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
from mot_jax.nn.sharding import axes_of, deferred_axes, product, reshard, spec


@dataclasses.dataclass
class LayerCache:
    """One layer's view of the keys and values of a `Cache`, during one call of the model.

    Attributes:
        key, value: [R, B, T, H_kv, K], of all R layers of a scan. `extend` replaces them.
        index: int32 scalar, the index of this layer in R.
        attention_mask: bool [B, 1, S, T], the cached tokens that each of the S new tokens may attend to, themselves
            among them.
        step: int32 scalar, the decode step of the first new token.
    """

    key: jax.Array
    value: jax.Array
    index: jax.Array
    attention_mask: jax.Array
    step: jax.Array

    def extend(self, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Write the keys and values of the new tokens, [B, S, H_kv, K]; return all of this layer, [B, T, H_kv, K]."""
        start = (self.index, 0, self.step, 0, 0)
        self.key = jax.lax.dynamic_update_slice(self.key, key[None], start)
        self.value = jax.lax.dynamic_update_slice(self.value, value[None], start)
        key, value = (jax.lax.dynamic_index_in_dim(a, self.index, keepdims=False) for a in (self.key, self.value))
        return key, value


class Attention(nnx.Module):
    """Scaled dot-product attention within a sequence: causal, or bidirectional if `config.objective` is `masked`.

    Parameters: `query` [D, H, K], `key_value` [D, 2, H_kv, K], `out` [H, K, D], with K = D / H; with `attention_bias`
    also `query_bias` [H, K], `key_value_bias` [2, H_kv, K] and `out_bias` [D], initialized to zero. Each H / H_kv
    consecutive query heads share the keys and values of one head (grouped-query attention).
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
        """Attention of x [B, S, D], before the residual: [B, S, D] in `config.dtype`.

        Args:
            x: the normalized input.
            token_mask: bool [B, S]. Tokens with False are not attended to.
            segments: int32 [B, S], the index of each token's document within its sequence. Used with `document_mask`.
            positions: int32 [B, S]; None: 0 to S - 1. Used with rotary positions.
            cache: of the decode steps before; extended by the new tokens. Its `attention_mask` replaces `token_mask`
                and `segments`.
            train: whether padding is only at the ends of sequences.

        Raises:
            ValueError: if `document_mask` is set and `segments` is None.
        """
        config = self.config
        x = x.astype(config.dtype)
        query = product("bsd,dhk->bshk", x, self.query[...])
        key, value = self._keys_and_values(x)
        if self.query_bias is not None and self.key_value_bias is not None:
            query += self.query_bias[...].astype(config.dtype)
            key_bias, value_bias = (self.key_value_bias[i].astype(config.dtype) for i in (0, 1))
            key, value = key + key_bias, value + value_bias
        if config.positions == "rotary":
            positions = jnp.arange(x.shape[1]) if positions is None else positions
            query, key = (rotate(a, positions, config.rotary_base) for a in (query, key))
        if cache is not None:
            key, value = cache.extend(key, value)
            return self._out(_dot_product_attention(query, key, value, cache.attention_mask), x)
        if config.document_mask and segments is None:
            raise ValueError("document_mask = True needs segments, int32 [B, S]; segments = None")
        if train and config.objective == "causal":
            token_mask = None  # Padding at the end is after all other tokens, which therefore do not attend to it.
        return self._out(self._attend(query, key, value, token_mask, segments if config.document_mask else None), x)

    def _keys_and_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, H_kv, K] of x [B, S, D].

        On a GPU of two products: XLA would copy both out of the result of one, and their gradients into one array.
        """
        weights = self.key_value[...]
        if fused_attention.platform() == "gpu" and not deferred_axes(weights):
            return product("bsd,dhk->bshk", x, weights[:, 0]), product("bsd,dhk->bshk", x, weights[:, 1])
        key, value = product("bsd,dchk->cbshk", x, weights)
        return key, value

    def _attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        token_mask: jax.Array | None,
        segments: jax.Array | None,
    ) -> jax.Array:
        """Apply the attention kernel for this config and device: query [B, S, H, K], key and value [B, S, H_kv, K] ->
        [B, S, H, K].
        """
        causal, kernel = self.config.objective == "causal", fused_attention.choose_kernel(self.config, query.shape[1])
        if kernel != "xla":
            fused = {"splash": fused_attention.splash, "cudnn": fused_attention.cudnn}[kernel]
            return fused(query, key, value, fused_attention.attention_ids(token_mask, segments), causal)
        mask = None if token_mask is None else token_mask[:, None, None, :]
        if segments is not None:
            document_mask = fused_attention.same_document(segments, segments)[:, None]
            mask = document_mask if mask is None else document_mask & mask
        attend: Callable[..., jax.Array] = partial(_dot_product_attention, is_causal=causal)
        if self.config.remat == "attention":  # the S x S scores are large, and cheap to recompute
            attend = jax.checkpoint(attend)
        return attend(query, key, value, mask)

    def _out(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """The output projection of y [B, S, H, K], sharded as x [B, S, D]."""
        y = product("bshk,hkd->bsd", y, self.out[...], spec(*axes_of(x)))
        return y if self.out_bias is None else y + self.out_bias[...].astype(y.dtype)


def _dot_product_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, is_causal: bool = False
) -> jax.Array:
    """`jax.nn.dot_product_attention`, also for a single sequence or head on a mesh.

    That function reshapes the query. In JAX 0.12 a reshape drops the mesh axes, all of size 1, from the type of a
    dimension of size 1, and the products require the same type of the key, the value and the mask.
    """

    def drop_axes_of_size_1_dimensions(a: jax.Array) -> jax.Array:
        return reshard(a, *(axes if size > 1 else None for size, axes in zip(a.shape, axes_of(a), strict=True)))

    query, key, value = (drop_axes_of_size_1_dimensions(a) for a in (query, key, value))
    mask = None if mask is None else drop_axes_of_size_1_dimensions(mask)
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal)


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding: rotate each pair (x_i, x_i+K/2) by the angle position / base^(2i / K).

    The product of a query and a key then depends on their positions only through the difference.

    Args:
        x: [B, S, H, K], K even.
        positions: int [S] or [B, S].
        base: the base of the wavelengths.

    Returns:
        Of x's shape and dtype, computed in float32 or wider.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * base ** (-jnp.arange(half, dtype=wide) / half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
