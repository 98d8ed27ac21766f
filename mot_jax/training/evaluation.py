"""The loss of a model on a split of the text, in one fixed grouping."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mot_jax.config import CompanionsConfig, Config, TokenChoiceConfig, to_json
from mot_jax.data.objectives import Objective
from mot_jax.data.pipeline import validation_batches
from mot_jax.data.text import open_split, open_tokenizer
from mot_jax.data.tokenizers import Tokenizer
from mot_jax.data.windows import Windows
from mot_jax.modes import enter, token_choice
from mot_jax.modes.companions import load_companions
from mot_jax.nn.sharding import (
    DIMENSIONS,
    batch_multiple,
    local_sequences,
    make_mesh,
    num_shards,
    place_sequences,
    replicate,
)
from mot_jax.nn.transformer import Params
from mot_jax.runs.restore import check_data, load_run
from mot_jax.runs.scores import Score, check_scores, record_score, score_of
from mot_jax.runtime import distributed
from mot_jax.training.step import make_eval_step

Result = dict[str, float | int]


def evaluated_config(config: Config) -> Config:
    """The config with which a model is scored during training: token choice without a capacity, so that none drop."""
    return token_choice(config) if isinstance(config.model.feed_forward, TokenChoiceConfig) else config


def make_evaluation(
    config: Config, mesh: Mesh, windows: Windows, tokenizer: Tokenizer
) -> Callable[[Params, jax.Array, int | None], Result]:
    """(params, step, limit) -> loss in nats per target, bits per byte, accuracy, and how much text they stand on.

    limit: stop after about so many windows; None scores them all. A masked model is scored on its masked tokens, the
    same ones every time, and `most_frequent` is the accuracy of whoever always says the commonest of them.
    """
    padding = config.model.vocab_size - tokenizer.vocab_size
    eval_step = jax.jit(make_eval_step(config.model, np.pad(tokenizer.token_bytes, (0, padding))))
    objective = Objective.of(config, tokenizer)

    def evaluate(params: Params, step: jax.Array, limit: int | None) -> Result:
        rows = _rows(config, mesh)
        batches = validation_batches(windows, objective, config.group_size, rows, local_sequences(mesh, rows), limit)
        sums, said = np.zeros(5), np.zeros(config.model.vocab_size, np.int64)
        for batch in batches:
            sums += np.array(jax.device_get(eval_step(params, step, place_sequences(mesh, batch, rows))), np.float64)
            if objective.masked:
                said += np.bincount(batch.targets[batch.target_mask], minlength=len(said))
        nats, tokens, correct, size, scored = map(float, sums)
        result: dict[str, Any] = {
            "loss": nats / tokens,
            "bits_per_byte": nats / math.log(2) / (size * windows.bytes_per_token_byte),
            "accuracy": correct / tokens,
            "tokens": int(tokens),
            "windows": int(scored),
        }
        if objective.masked:
            said = _sum(mesh, said)
            result["most_frequent"] = float(said.max() / said.sum())
        return result

    return evaluate


def evaluate_run(
    workdir: epath.PathLike, config: Config, split: str, limit: int | None, modes: Sequence[str] = ("grouped",)
) -> list[Score]:
    """The newest checkpoint of the run in `workdir` on a split of its text, in each of these modes.

    config: that of the run, but for its mesh and perhaps regrouped. Each score is written down in the workdir, too, if
    that can be written. Raises UserError if the tokenizer, or the run's own validation text, is not what it was, and
    for a mode that the model does not have.
    """
    with distributed.together() as same:
        same |= {"config": to_json(config), "workdir": str(workdir)}
        mesh, tokenizer = make_mesh(config, trains=False), open_tokenizer(config)
        check_data({"tokenizer": tokenizer.fingerprint}, config, workdir)
        windows = open_split(config, split, tokenizer)
        if split == config.data.validation_split:
            check_data({"validation": windows.fingerprint}, config, workdir)
        same |= {f"text of the {split} split": windows.fingerprint}
        companions = load_companions(workdir)
        check_scores(workdir)
    scores = []
    with jax.set_mesh(mesh):
        run = load_run(workdir, mesh)
        for mode in modes:
            changed, params = enter(mode, config, run.params, run.step, companions)
            evaluate = make_evaluation(changed, mesh, windows, tokenizer)
            result = {"step": run.step, **evaluate(params, jnp.asarray(run.step), limit)}
            scores.append(score_of(mode, split, config, result))
            if distributed.is_first():
                with contextlib.suppress(OSError):  # somebody else's run
                    record_score(workdir, scores[-1])
    return scores


_MIXTURE_BYTES = 2**28  # of one device, at most, if that many hold one row


def _rows(config: Config, mesh: Mesh) -> int:
    """Of a batch: those of a microbatch of training, in whole groups; fewer where each has mixtures of its own."""
    multiple, kind = batch_multiple(config, mesh), config.model.feed_forward
    rows = -(-config.training.batch_size // config.training.gradient_accumulation_steps // multiple) * multiple
    if not isinstance(kind, CompanionsConfig):
        return rows
    model, devices = config.model, num_shards(DIMENSIONS["sequences"])
    of_row = model.context_length * kind.num_experts * model.d_model * 4
    whole = [n for n in range(devices, rows + 1, devices) if n % config.group_size == 0 or config.group_size % n == 0]
    return max((n for n in whole if n * of_row <= devices * _MIXTURE_BYTES), default=whole[0])


def _sum(mesh: Mesh, counts: np.ndarray) -> np.ndarray:
    """The sum over the processes of the counts [V] that each made of its own rows."""
    number = num_shards(DIMENSIONS["sequences"])
    rows = np.zeros((len(local_sequences(mesh, number)), len(counts)), np.int32)
    rows[0] = counts
    return np.asarray(_added(place_sequences(mesh, rows, number)))


@jax.jit  # once: a function made anew would be compiled anew in each evaluation
def _added(rows: jax.Array) -> jax.Array:
    return replicate(rows.sum(axis=0))
