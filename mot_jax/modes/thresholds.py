"""The thresholds of the inference mode `threshold`: measuring them on the training text, and their file.

A run measures them at its end and stores them as `thresholds.json` in the workdir, with the step of the checkpoint. The
SHA-256 of the file is stored in `data.json`. The layer is `nn.feed_forward.threshold.Threshold`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from mot_jax.config import Config, MixtureOfTokensConfig, ModelConfig
from mot_jax.data.fingerprints import load_fingerprints, save_fingerprints
from mot_jax.data.objectives import Batch, Objective
from mot_jax.data.order import Order
from mot_jax.data.windows import Windows
from mot_jax.errors import UserError, error_words
from mot_jax.modes.recording import record
from mot_jax.nn.feed_forward import FeedForwardContext, MixtureOfTokens
from mot_jax.nn.feed_forward.threshold import scaled_logits
from mot_jax.nn.sharding import batch_multiple, local_sequences, place_sequences, replicate
from mot_jax.nn.transformer import Params, block_places
from mot_jax.runtime.paths import read_file, replace_file, user_path

FILE = "thresholds.json"
MAX_TOKENS = 2**18  # of the training text on which thresholds are measured
MIN_TOKENS = 2**14  # of a training run: on fewer tokens, the largest logits of an expert are too few for a quantile
_BATCH_TOKENS = 2**14  # about, whose logits are in memory at one time
_REMEDY = "the mot train command of a finished run, given again, writes it; or try --mode grouped"
_KEY = "thresholds"  # of the digest in data.json


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """The values from which the constants of `Threshold` layers follow, in the order of the blocks that mix tokens.

    step: of the model. group_size: G in training. tokens: number of measured tokens. log_means: log mean exp(l / T),
    float32 [layers, E]. logits: the threshold of l / T, float32 [layers, E].
    """

    step: int
    group_size: int
    tokens: int
    log_means: np.ndarray
    logits: np.ndarray


# --- measuring --------------------------------------------------------------------------------------------------------


def measured_tokens(config: Config) -> int:
    """The number of training tokens on which the thresholds of a run are measured, about; 0: the run is too short."""
    training = config.training
    tokens = training.steps * training.batch_size * config.model.context_length
    return min(tokens, MAX_TOKENS) if tokens >= MIN_TOKENS else 0


def first_batches(config: Config, mesh: Mesh, windows: Windows, order: Order, objective: Objective) -> Iterator[Batch]:
    """Yield the first sequences of the training order, `measured_tokens` in whole batches, sharded over the mesh."""
    length, multiple = config.model.context_length, batch_multiple(config, mesh)
    size = max(1, _BATCH_TOKENS // (length * multiple)) * multiple
    rows = local_sequences(mesh, size)
    for first in range(0, max(1, measured_tokens(config) // (length * size)) * size, size):
        ids = order.window_ids(first, first + size)[rows]
        yield place_sequences(mesh, objective(windows.read(ids), first + rows), size)


def measure(model: ModelConfig, params: Params, step: int, batches: Iterable[Batch]) -> Thresholds:
    """Run a trained model on batches of text, and return the thresholds that E / G of the E experts reach on it.

    Every process receives the same result.
    """
    kind = model.feed_forward
    assert isinstance(kind, MixtureOfTokensConfig)
    top_k, num_experts = max(1, kind.num_experts // kind.group_size), kind.num_experts
    tokens, log_sum, largest = 0, np.array(-np.inf), None
    for batch in batches:
        arrays = batch.inputs, batch.token_mask, batch.segments
        logits, mask = jax.device_get(_logits(model, params, *arrays, jnp.asarray(step)))
        logits = logits[:, mask]  # [layers, tokens, E]
        tokens += logits.shape[1]
        log_sum = np.logaddexp(log_sum, np.logaddexp.reduce(logits.astype(np.float64), axis=1))
        logits = logits if largest is None else np.concatenate([largest, logits], axis=1)
        # Of later batches, no smaller logit of these tokens can be among the largest of all.
        rank = min(-(-top_k * max(MAX_TOKENS, batch.inputs.size) // num_experts), logits.shape[1])
        largest = np.partition(logits, -rank, axis=1)[:, -rank:]
    assert largest is not None
    threshold = np.sort(largest, axis=1)[:, -top_k * tokens // num_experts]  # the ceil(k tokens / E)-th largest
    log_means = np.asarray(log_sum - math.log(tokens), np.float32)
    return Thresholds(step, kind.group_size, tokens, log_means, threshold.astype(np.float32))


@partial(jax.jit, static_argnames="model")
def _logits(
    model: ModelConfig, params: Params, tokens: jax.Array, mask: jax.Array, segments: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """l / T of all layers [layers, B, S, E], and the mask [B, S], on every device."""

    def logits(layer: MixtureOfTokens, x: jax.Array, context: FeedForwardContext) -> dict[str, jax.Array]:
        return {"logits": scaled_logits(layer, x, context)}

    context = FeedForwardContext(token_mask=mask, token_ids=tokens, step=step)
    _, recorded = record(model, params, tokens, context, segments, logits)
    by_block = recorded["logits"]
    return jnp.stack([replicate(by_block[block]) for block in sorted(by_block)]), replicate(mask)


def constants(model: ModelConfig, thresholds: Thresholds) -> dict[str, jax.Array]:
    """The constants of the `Threshold` layers, by name, on every device of the mesh that is set."""
    kinds, places = model.block_kinds(), block_places(model)
    blocks = [block for block, kind in enumerate(kinds) if isinstance(kind, MixtureOfTokensConfig)]
    offsets = thresholds.log_means + np.float32(math.log(thresholds.group_size - 1))
    by_name: dict[str, list[np.ndarray]] = {}
    for layer, block in enumerate(blocks):
        for name, values in {"gate_offset": offsets, "logit_threshold": thresholds.logits}.items():
            by_name.setdefault(f"{places[block][0]}feed_forward/{name}", []).append(values[layer])
    stacked, mesh = {name: jnp.asarray(np.stack(values)) for name, values in by_name.items()}, jax.sharding.get_mesh()
    return stacked if mesh.empty else jax.device_put(stacked, NamedSharding(mesh, jax.P()))


# --- the file ---------------------------------------------------------------------------------------------------------


def save_thresholds(workdir: epath.Path, thresholds: Thresholds) -> None:
    """Write `thresholds.json`, and before it its digest in `data.json`, which a kill in between leaves without it."""
    fields = {name: getattr(thresholds, name) for name in ("step", "group_size", "tokens")}
    arrays = {name: getattr(thresholds, name).tolist() for name in ("log_means", "logits")}
    content = json.dumps(fields | arrays, allow_nan=False).encode()
    save_fingerprints(workdir, load_fingerprints(workdir) | {_KEY: _digest(content)})
    replace_file(workdir / FILE, content)


def load_thresholds(workdir: epath.PathLike) -> Thresholds | None:
    """Read the thresholds of the run in `workdir`; None if it has none.

    Raises:
        UserError: the file is damaged, of another run, or cannot be read.
    """
    path = user_path("workdir", workdir) / FILE
    if not path.exists():
        return None
    content = read_file(path, _REMEDY)
    if load_fingerprints(path.parent).get(_KEY) != _digest(content):
        raise UserError(f"{path}: is damaged (it is not the file whose digest data.json has); {_REMEDY}")
    try:
        fields: dict[str, Any] = json.loads(content)
        arrays = {name: np.asarray(fields[name], np.float32) for name in ("log_means", "logits")}
        return Thresholds(**(fields | arrays))
    except Exception as error:
        raise UserError(f"{path}: is damaged ({error_words(error)}); {_REMEDY}") from None


def check_thresholds(thresholds: Thresholds | None, config: Config, step: int | None) -> None:
    """Raise UserError unless they are those of this model: of its groups, its sizes and, if it is given, its step."""
    model = config.model
    if thresholds is None:
        if not measured_tokens(config):
            rule = f"is written by runs of at least {MIN_TOKENS:,} training tokens, and this one has fewer"
            raise UserError(f"{FILE}: {rule}; try --mode grouped")
        raise UserError(f"{FILE}: is missing; {_REMEDY}")
    if step is not None and thresholds.step != step:
        rule = f"is of step {thresholds.step}, and the model is of step {step}"
        raise UserError(f"{FILE}: {rule}; {_REMEDY}")
    if thresholds.group_size != model.group_size:
        rule = f"is for groups of {thresholds.group_size}, and the model has groups of {model.group_size}"
        raise UserError(f"{FILE}: {rule}; try --group-size {thresholds.group_size}")
    layers = sum(isinstance(kind, MixtureOfTokensConfig) for kind in model.block_kinds())
    expected = (layers, model.feed_forward.num_experts)  # type: ignore[union-attr]
    for values in (thresholds.log_means, thresholds.logits):
        if values.shape != expected:
            rule = f"must have {list(expected)} values, for layers and experts, and has {list(values.shape)}"
            raise UserError(f"{FILE}: {rule}; {_REMEDY}")


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()
