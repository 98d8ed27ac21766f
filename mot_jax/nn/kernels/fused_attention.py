"""Attention that never writes its S x S scores to memory: JAX's splash attention on TPU, cuDNN's on NVIDIA GPUs.

The kernels are JAX's. This module chooses one, brings the masks into the form that it takes, and applies it on each
device to its own sequences and heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from mot_jax.config import ModelConfig, attention_error
from mot_jax.nn.sharding import reshard, spec

BLOCK = 512  # the most positions of queries, and of keys, that splash attention loads at a time
# The shortest sequences for which `auto` takes splash attention: a guess between 256, where it saves no bytes, and
# 2,048, where it moves a seventh.
AUTO_LENGTH = 1024


def choose_kernel(config: ModelConfig, length: int) -> str:
    """Choose `xla`, `cudnn` or `splash` for sequences of `length` positions on the devices at hand.

    Returns `xla` if the configured kernel does not support the device, the length, the dtype or the width of the heads:
    a model is trained on one machine and used on another, on texts of every length.
    """
    native = {"tpu": "splash", "gpu": "cudnn"}.get(platform())
    kernel: str = config.attention_kernel
    if kernel == "auto" and not (native == "splash" and length < AUTO_LENGTH):
        kernel = native or "xla"
    width = config.d_model // config.num_heads
    supported = kernel == native and attention_error(kernel, length, width, config.dtype) is None
    return kernel if supported else "xla"


def platform() -> str:
    """Return `tpu`, `gpu` or `cpu`: the platform of the mesh, which may consist of target devices, or JAX's default.

    JAX's default is `jax.default_device`, where it is set, or the backend.

    A GPU that does not run cuDNN's attention (of AMD, or older than NVIDIA's Ampere) counts as `cpu`. Target GPUs,
    which are not attached, all run it.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    default = getattr(jax.config, "jax_default_device", None)  # a device, or the name of a platform
    name = device.platform if device else getattr(default, "platform", default) or jax.default_backend()
    if name not in ("gpu", "cuda"):
        return "cpu" if name == "rocm" else name
    attached = [other for other in jax.local_devices() if device is None or other.device_kind == device.device_kind]
    capability = getattr(attached[0], "compute_capability", "0") if attached else "8.0"  # absent, or a name, on AMD
    return "gpu" if capability[0].isdigit() and float(capability) >= 8 else "cpu"


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention on TPU.

    Args:
        query: [B, S, H, K], S a multiple of 128.
        key, value: [B, S, H_kv, K].
        segment_ids: int32 [B, S]; a token attends only to tokens with its own number, which include itself, so that no
            row of scores is empty.
        causal: whether a token attends to no later ones.
        interpret: run the kernel in Pallas' interpreter, for other platforms.

    Returns:
        [B, S, H, K] in query's dtype.
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

    def local(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        masks = splash_attention_mask.MultiHeadMask([mask] * query.shape[2])
        kernel = splash_attention_kernel.make_splash_mha(
            masks, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        scaled = query * query.shape[-1] ** -0.5  # the kernel does not scale
        by_heads = (a.swapaxes(1, 2) for a in (scaled, key, value))
        ids = None if segment_ids is None else splash_attention_kernel.SegmentIds(segment_ids, segment_ids)
        return jax.vmap(kernel)(*by_heads, ids).swapaxes(1, 2)

    return _map_devices(local, query, key, value, segment_ids)


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None, causal: bool) -> jax.Array:
    """cuDNN's attention, with the arguments of `splash`, in bfloat16.

    Segment ids become a bias [B, 1, S, S] in memory, shared by the heads.
    """

    def local(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        mask = None if segment_ids is None else same_document(segment_ids, segment_ids)[:, None]
        attend = partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
        return attend(query, key, value, mask=mask)

    return _map_devices(local, query, key, value, segment_ids)


def same_document(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Document numbers int [B, S] and [B, T] -> bool [B, S, T]: whether a query and a key are of one document."""
    return queries[:, :, None] == keys[:, None, :]


def attention_ids(token_mask: jax.Array | None, segments: jax.Array | None) -> jax.Array | None:
    """Numbers int32 [B, S] that two tokens share if one may attend to the other; None if all may.

    Padding tokens attend to each other and to no non-padding token; their outputs reach no loss.
    """
    if token_mask is None:
        return segments
    return jnp.where(token_mask, 0 if segments is None else segments, -1).astype(jnp.int32)


def _map_devices(local: Callable[..., jax.Array], query: jax.Array, *arrays: jax.Array | None) -> jax.Array:
    """Apply `local` on each device of the mesh to its own sequences and heads; directly if no mesh is set."""
    heads, rows = ("sequences", None, "heads", None), ("sequences", None)
    if spec(*heads) is None:
        return local(query, *arrays)
    dimensions = [rows if a is None or a.ndim == 2 else heads for a in (query, *arrays)]
    pairs = zip((query, *arrays), dimensions, strict=True)
    sharded = [a if a is None else reshard(a, *names) for a, names in pairs]
    specs = tuple(spec(*names) for names in dimensions)
    return jax.shard_map(local, in_specs=specs, out_specs=spec(*heads), check_vma=False)(*sharded)
