"""Attention whose S x S scores never reach memory: splash attention on TPU, cuDNN's on NVIDIA, both as JAX has them.

Neither is ours. What is: when each runs, the masks in the form that it takes, each device on its own rows and heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from mot_jax.config import ModelConfig, attention_error
from mot_jax.nn.sharding import reshard, spec

BLOCK = 512  # positions of queries, and of keys, that a core of a TPU reads at a time, at most
# `auto` takes splash from here on: a guess between 256, where it saves no bytes, and 2,048, where it moves a seventh.
AUTO_LENGTH = 1024


def choose(config: ModelConfig, length: int) -> str:
    """Which of `xla`, `cudnn` and `splash` attends over `length` positions where the code runs.

    One that does not know the device, the length, the dtype or the width of heads gives way to `xla`: a model is
    trained on one machine and read on another, in texts of every length.
    """
    own = {"tpu": "splash", "gpu": "cudnn"}.get(platform())
    wanted: str = config.attention_kernel
    if wanted == "auto" and not (own == "splash" and length < AUTO_LENGTH):
        wanted = own or "xla"
    width = config.d_model // config.num_heads
    fits = wanted == own and attention_error(wanted, length, width, config.dtype) is None
    return wanted if fits else "xla"


def platform() -> str:
    """`tpu`, `gpu` or `cpu`: of the mesh that is set, which may be of devices that are not here, or else JAX's own.

    A GPU that cuDNN's attention does not run on, of AMD or older than NVIDIA's Ampere, is none here.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = device.platform if device else jax.default_backend()
    if name not in ("gpu", "cuda"):
        return "cpu" if name == "rocm" else name
    capability = getattr(jax.local_devices()[0], "compute_capability", "0")  # absent, or a name, on AMD
    return "gpu" if capability[0].isdigit() and float(capability) >= 8 else "cpu"


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    documents: jax.Array | None,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """query [B, S, H, K], key and value [B, S, H_kv, K] -> [B, S, H, K] in query's dtype; S a multiple of 128.

    documents: int32 [B, S]; a token attends to those of its own number alone, itself among them, so that no row of
    scores is empty. interpret: where no TPU is.
    """
    length = query.shape[1]
    block = next(n for n in range(min(BLOCK, length), 0, -128) if length % n == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = (splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask)((length, length))

    def local(query: jax.Array, key: jax.Array, value: jax.Array, documents: jax.Array | None) -> jax.Array:
        masks = splash_attention_mask.MultiHeadMask([mask] * query.shape[2])
        kernel = splash_attention_kernel.make_splash_mha(
            masks, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        scaled = query * query.shape[-1] ** -0.5  # which the kernel leaves to its caller
        by_heads = (a.swapaxes(1, 2) for a in (scaled, key, value))
        ids = None if documents is None else splash_attention_kernel.SegmentIds(documents, documents)
        return jax.vmap(kernel)(*by_heads, ids).swapaxes(1, 2)

    return _on_each(local, query, key, value, documents)


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array, documents: jax.Array | None, causal: bool) -> jax.Array:
    """The same, in bfloat16. The documents are a bias [B, 1, S, S] in memory, one for all heads."""

    def local(query: jax.Array, key: jax.Array, value: jax.Array, documents: jax.Array | None) -> jax.Array:
        mask = None if documents is None else same_document(documents, documents)[:, None]
        attend = partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
        return attend(query, key, value, mask=mask)

    return _on_each(local, query, key, value, documents)


def same_document(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """The documents' numbers, int [B, S] and [B, T] -> bool [B, S, T]: which tokens share one."""
    return queries[:, :, None] == keys[:, None, :]


def documents_of(token_mask: jax.Array | None, segments: jax.Array | None) -> jax.Array | None:
    """int32 [B, S]: numbers that tokens share where one may attend to the other; None where all may.

    Tokens that are not real see each other, and no real one: what they say reaches no loss.
    """
    if token_mask is None:
        return segments
    return jnp.where(token_mask, 0 if segments is None else segments, -1).astype(jnp.int32)


def _on_each(local: Callable[..., jax.Array], query: jax.Array, *arrays: jax.Array | None) -> jax.Array:
    """`local` on each device of the mesh, with its own rows and heads; as it is where no mesh is set."""
    heads, rows = ("sequences", None, "heads", None), ("sequences", None)
    if spec(*heads) is None:
        return local(query, *arrays)
    places = [rows if a is None or a.ndim == 2 else heads for a in (query, *arrays)]
    there = [a if a is None else reshard(a, *place) for a, place in zip((query, *arrays), places, strict=True)]
    specs = tuple(spec(*place) for place in places)
    return jax.shard_map(local, in_specs=specs, out_specs=spec(*heads), check_vma=False)(*there)
