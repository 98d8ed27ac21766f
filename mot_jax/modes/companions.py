"""The companions of a run: choosing, storing and summarizing G reference sequences of the training text.

In the modes `companions`, `sparse` and `mean_field` each sequence is mixed with these instead of with other users'
sequences. The layer that does so, from the summaries computed here, is `nn.feed_forward.companions.Companions`.

They are stored as `companions.npy` in the workdir: int32 [2, G, S], the model's inputs in G windows, and the index of
each token's document within its window. They are text of the training corpus. The SHA-256 of the file is stored in
`data.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding

from mot_jax.config import CompanionsConfig, ModelConfig
from mot_jax.data.fingerprints import load_fingerprints, save_fingerprints
from mot_jax.data.objectives import Objective
from mot_jax.data.order import Order
from mot_jax.data.windows import Windows
from mot_jax.errors import UserError, error_words
from mot_jax.modes.recording import record
from mot_jax.nn.feed_forward import FeedForwardContext
from mot_jax.nn.feed_forward.companions import summarise
from mot_jax.nn.sharding import mixing_multiple, parameter_spec, replicate, reshard
from mot_jax.nn.transformer import Params, block_places
from mot_jax.runtime.paths import read_file, replace_file, user_path

FILE = "companions.npy"
_REMEDY = "a finished run writes it when its mot train command is given again; for another model try --mode grouped"
_ADVICE = f"delete it: {_REMEDY}"
_KEY = "companions"  # of the digest in data.json


def choose(windows: Windows, order: Order, objective: Objective, group_size: int) -> np.ndarray:
    """Return the first G full windows of the training order, as the model reads them: int32 [2, G, S]."""
    ids: list[int] = []
    for first in itertools.count(0, group_size):  # terminates: only the last window of a corpus may not be full
        candidates = order.window_ids(first, first + group_size)
        ids += candidates[windows.read(candidates).mask.all(axis=1)].tolist()
        if len(ids) >= group_size:
            break
    with_documents = dataclasses.replace(objective, document_mask=True)  # segments are stored for any model
    batch = with_documents(windows.read(ids[:group_size]), np.arange(group_size))
    return np.stack([batch.inputs, batch.segments])


def save_companions(workdir: epath.Path, companions: np.ndarray | None, fingerprints: dict[str, str]) -> None:
    """Write `companions.npy` into the workdir, unless it exists or `companions` is None, and before it `data.json`.

    `data.json` has the fingerprints of the text and the digest of `companions.npy`. It is written first, so that a kill
    leaves no file next to the digest of another one. A file of an earlier version, without a digest, gets one.
    """
    path, content = workdir / FILE, None
    fingerprints = load_fingerprints(workdir) | fingerprints  # with the digest of `thresholds.json`
    if path.exists():
        digest = fingerprints.get(_KEY) or _digest(read_file(path, _ADVICE))
        fingerprints = fingerprints | {_KEY: digest}
    elif companions is not None:
        file = io.BytesIO()
        np.save(file, companions, allow_pickle=False)
        content = file.getvalue()
        fingerprints = fingerprints | {_KEY: _digest(content)}
    save_fingerprints(workdir, fingerprints)
    if content is not None:
        replace_file(path, content)


def load_companions(workdir: epath.PathLike) -> np.ndarray | None:
    """Read the companions of the run in `workdir`, int32 [2, G, S]; None if it has none.

    Raises:
        UserError: the file is damaged or cannot be read.
    """
    path = user_path("workdir", workdir) / FILE
    if not path.exists():
        return None
    content = read_file(path, _ADVICE)
    digest = load_fingerprints(path.parent).get(_KEY)
    if digest not in (None, _digest(content)):
        raise UserError(f"{path}: is damaged (it is not the file whose digest data.json has); {_ADVICE}")
    try:
        return np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # of NumPy's parser of the header
        raise UserError(f"{path}: is damaged ({error_words(error)}); {_ADVICE}") from None


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def check_companions(companions: np.ndarray | None, model: ModelConfig) -> None:
    """Raise UserError unless they are int32 [2, G, S] with at least the model's group size and its context length."""
    if companions is None:
        raise UserError(f"{FILE}: is missing; {_REMEDY}")
    shape, length = companions.shape, model.context_length
    if companions.dtype != np.int32 or len(shape) != 3 or shape[0] != 2 or shape[2] != length:
        words = f"must be int32 [2, G, {length}], and is {companions.dtype} {list(shape)}"
        raise UserError(f"{FILE}: {words}; {_ADVICE}")
    if shape[1] < model.group_size:
        words = f"holds {shape[1]} sequences, too few for groups of {model.group_size}"
        raise UserError(f"{FILE}: {words}; try --group-size {shape[1]}")


def summaries(
    model: ModelConfig, params: Params, step: int, companions: np.ndarray, kind: CompanionsConfig
) -> dict[str, jax.Array]:
    """Run the trained model on the companions, and return the summaries that the `Companions` layers hold.

    Args:
        model: as trained; the first G companions form one group.
        params: by name.
        step: the number of training steps.
        companions: int32 [2, at least G, S].
        kind: of the layers that hold the summaries.

    Returns:
        Summaries by parameter name, sharded over the mesh that is set.
    """
    copies = mixing_multiple(model.group_size, model.context_length) // model.group_size  # of the group
    tokens, segments = np.tile(companions[:, : model.group_size], (1, copies, 1))
    summary = _summaries(model, kind, params, tokens, segments, jnp.asarray(step))
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return summary
    return {n: jax.device_put(v, NamedSharding(mesh, parameter_spec(n, v.ndim))) for n, v in summary.items()}


@partial(jax.jit, static_argnames=("model", "kind"))
def _summaries(
    model: ModelConfig, kind: CompanionsConfig, params: Params, tokens: jax.Array, segments: jax.Array, step: jax.Array
) -> dict[str, jax.Array]:
    tokens, segments = (reshard(a, "sequences", None) for a in (tokens, segments))
    context = FeedForwardContext(token_ids=tokens, step=step)
    _, recorded = record(model, params, tokens, context, segments, summarise)
    if kind.experts_per_token is None:
        del recorded["companion_outputs"]
    places = block_places(model)
    by_parameter: dict[str, list[jax.Array]] = {}
    for name, by_block in recorded.items():
        for block, value in by_block.items():  # in the order of the blocks, which is that of a scanned layer's repeats
            value = replicate(value)[0]  # the first copy of the group
            value = value if kind.num_positions > 1 else value.mean(axis=0, keepdims=True)
            by_parameter.setdefault(f"{places[block][0]}feed_forward/{name}", []).append(value)
    return {name: jnp.stack(values) for name, values in by_parameter.items()}
