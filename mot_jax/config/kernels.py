"""The kernels that a config can select: which shapes, layers and devices each of them supports."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mot_jax.config.fields import Config, FeedForwardConfig, MixtureOfTokensConfig

if TYPE_CHECKING:
    import jax


def attention_error(kernel: str, length: int, head_dim: int, dtype: str) -> str | None:
    """The error of an attention kernel that does not support these shapes, if it does not.

    Args:
        kernel: value of `attention_kernel`.
        length: number of positions.
        head_dim: width of a head.
        dtype: of the activations.
    """
    error = None
    if kernel == "splash" and length % 128:
        error = f"requires a multiple of 128 positions, and context_length = {length}"
    if kernel == "cudnn":
        if dtype != "bfloat16":
            error = f"computes in bfloat16, and dtype = {dtype!r}"
        elif head_dim % 8 or head_dim > 128:
            error = f"requires heads whose width is a multiple of 8 up to 128, and d_model / num_heads = {head_dim}"
        elif length % 2:
            error = f"requires an even number of positions, and context_length = {length}"
    return error and f"attention_kernel = {kernel!r}: {error}; try 'auto'"


def kernel_errors(kind: MixtureOfTokensConfig, gated: bool) -> Iterator[str]:
    """Fields of a layer that its kernel does not support."""
    if kind.kernel == "xla":
        return
    prefix = f"kernel = {kind.kernel!r}: "
    saves, save_for_backward = {
        "fused_mixture": ("saves nothing", "nothing"),
        "fused_experts": ("saves mixtures and expert outputs", "all"),
    }[kind.kernel]
    if kind.save_for_backward != save_for_backward:
        rule = f"{saves} for the backward pass, and save_for_backward = {kind.save_for_backward!r}"
        yield f"{prefix}{rule}; try save_for_backward = {save_for_backward!r}"
    if kind.kernel == "fused_mixture" and kind.num_experts % 8:
        yield f"{prefix}requires a multiple of 8 experts, and num_experts = {kind.num_experts}; try kernel = 'xla'"
    if kind.mixing.emit != "merge":
        yield f"{prefix}emits by the merge weights, and mixing.emit = {kind.mixing.emit!r}; try kernel = 'xla'"
    if kind.mixing.groups == "within":
        yield f"{prefix}mixes across sequences, and mixing.groups = 'within'; try kernel = 'xla'"
    if kind.mixing.layer_norm:
        yield f"{prefix}has no layer normalization, and mixing.layer_norm = True; try kernel = 'xla'"
    if gated:
        yield f"{prefix}has experts without a gate, and gated = True; try kernel = 'xla'"


def platform_errors(config: Config, device: jax.Device) -> Iterator[str]:
    """Kernels of the config that training cannot use on this device."""
    kernel = config.model.attention_kernel
    platform = {"splash": "tpu", "cudnn": "gpu"}.get(kernel, device.platform)
    if device.platform != platform:
        rule = f"is for devices of platform {platform}, not {device.platform}"
        yield f"model.attention_kernel = {kernel!r}: {rule}; try 'auto'"
    if not kernel_runs_on(config.model.feed_forward, device):
        kernel = getattr(config.model.feed_forward, "kernel", "xla")
        rule = f"is for TPU v5e, v5p and later, not {device.device_kind}"
        yield f"model.feed_forward.kernel = {kernel!r}: {rule}; try 'xla'"


def kernel_runs_on(kind: FeedForwardConfig, device: jax.Device) -> bool:
    """Whether the kernel of a layer, if it has one, runs on this device.

    Those for TPU need more vector memory than the 16 MiB of a core before v5e.
    """
    supported = device.platform == "tpu" and device.device_kind not in ("TPU v2", "TPU v3", "TPU v4")
    return supported or getattr(kind, "kernel", "xla") == "xla"


def without_kernel(kind: FeedForwardConfig) -> FeedForwardConfig:
    """The same layer, computed by XLA."""
    return dataclasses.replace(kind, kernel="xla") if isinstance(kind, MixtureOfTokensConfig) else kind
