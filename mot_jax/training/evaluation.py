"""The loss of a model on a split of the dataset, whose sequences form the same groups every time."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mot_jax.config import CompanionsConfig, Config, to_json
from mot_jax.data.objectives import Objective
from mot_jax.data.order import fill_warnings
from mot_jax.data.pipeline import validation_batches
from mot_jax.data.text import open_split, open_tokenizer, store_text_once
from mot_jax.data.tokenizers import Tokenizer
from mot_jax.data.windows import Windows
from mot_jax.errors import UserError, error_words
from mot_jax.modes import MODES, enter, mode_of, read_files, trained_mode
from mot_jax.modes.thresholds import Thresholds
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
from mot_jax.runs.scores import Score, read_scores, record_score, score_of
from mot_jax.runtime import distributed
from mot_jax.runtime.compilation import default_tracing
from mot_jax.runtime.paths import is_io_error
from mot_jax.runtime.progress import Advance, progress
from mot_jax.training.step import make_eval_step

Result = dict[str, float | int]


def evaluated_config(config: Config) -> Config:
    """The config with which a model is scored during training: that of inference, in which no token is dropped."""
    return mode_of(trained_mode(config)).change(config)


def make_evaluation(
    config: Config, mesh: Mesh, windows: Windows, tokenizer: Tokenizer, advance: Advance = lambda units: None
) -> Callable[[Params, jax.Array, int | None], Result]:
    """Build the evaluation of a model on `windows`.

    Args:
        advance: receives the number of windows of each batch that is scored.

    Returns:
        A function (params, step, limit) -> result, which scores about `limit` windows, or all of them if it is None.
        Result: loss in nats per target, bits_per_byte, accuracy, tokens (targets scored), windows. A masked model is
        scored on masked tokens, the same ones every time; its result also has most_frequent, the accuracy of always
        predicting the most frequent target.
    """
    padding = config.model.vocab_size - tokenizer.vocab_size
    eval_step = jax.jit(make_eval_step(config.model, np.pad(tokenizer.token_bytes, (0, padding))))
    objective = Objective.of(config, tokenizer)

    def evaluate(params: Params, step: jax.Array, limit: int | None) -> Result:
        batch_size = _batch_size(config, mesh)
        rows = local_sequences(mesh, batch_size)
        batches = validation_batches(windows, objective, config.group_size, batch_size, rows, limit)
        sums, target_counts = np.zeros(5), np.zeros(config.model.vocab_size, np.int64)
        for batch in batches:
            batch_sums = jax.device_get(eval_step(params, step, place_sequences(mesh, batch, batch_size)))
            sums += np.array(batch_sums, np.float64)
            advance(int(batch_sums[-1]))
            if objective.masked:
                target_counts += np.bincount(batch.targets[batch.target_mask], minlength=len(target_counts))
        nats, tokens, correct, token_bytes, num_windows = map(float, sums)
        result: dict[str, Any] = {
            "loss": nats / tokens,
            "bits_per_byte": nats / math.log(2) / (token_bytes * windows.bytes_per_token_byte),
            "accuracy": correct / tokens,
            "tokens": int(tokens),
            "windows": int(num_windows),
        }
        if objective.masked:
            target_counts = _sum_over_processes(mesh, target_counts)
            result["most_frequent"] = float(np.max(target_counts)) / float(np.sum(target_counts))
        return result

    return evaluate


def evaluate_run(
    workdir: epath.PathLike,
    config: Config,
    split: str,
    limit: int | None,
    modes: Sequence[str] = ("grouped",),
    step: int | None = None,
) -> list[Score]:
    """Score a checkpoint of the run in `workdir` on a split of its dataset, in each of the inference modes.

    Scores are also recorded in the workdir. If it cannot be written, they are returned after a warning.

    Args:
        config: that of the run; its mesh and its groups may differ.
        limit: windows to score, about; None: all.
        step: that of the checkpoint; None for the newest.

    Raises:
        UserError: if the tokenizer or the validation text of the run has changed, or the model lacks a mode.
    """
    return _evaluate(workdir, config, split, limit, modes, step)[0]


def evaluate_all_modes(
    workdir: epath.PathLike, config: Config, split: str, limit: int | None, step: int | None = None
) -> tuple[list[Score], dict[str, str]]:
    """`evaluate_run` in all inference modes that the model has.

    Returns:
        The scores; and by mode the reason why it is left out, such as a file of another step.
    """
    return _evaluate(workdir, config, split, limit, None, step)


@default_tracing()
def _evaluate(
    workdir: epath.PathLike,
    config: Config,
    split: str,
    limit: int | None,
    modes: Sequence[str] | None,
    step: int | None,
) -> tuple[list[Score], dict[str, str]]:
    """The scores in these modes; for None in all that the model has, and the reasons why others are left out."""
    with distributed.together() as same:
        same |= {"config": to_json(config), "workdir": str(workdir)}
        mesh, tokenizer = make_mesh(config, trains=False), open_tokenizer(config)
        check_data({"tokenizer": tokenizer.fingerprint}, config, workdir)
    store_text_once(config, tokenizer, split)
    with distributed.together() as same:
        windows = open_split(config, split, tokenizer)
        if split == config.data.validation_split:
            check_data({"validation": windows.fingerprint}, config, workdir)
        same |= {f"text of the {split} split": windows.fingerprint}
        read_scores(workdir)
    advice = "a smaller --group-size, or --split with more text"
    if distributed.is_first():
        for line in fill_warnings(windows.documents, split, config.group_size, advice):
            print(line, file=sys.stderr)
    scores, files, reasons = [], {}, {}
    with jax.set_mesh(mesh):
        run = load_run(workdir, mesh, step)
        with distributed.together() as same:
            for mode in MODES if modes is None else modes:
                try:
                    files[mode] = read_files(mode, config, workdir, run.step)
                except UserError as error:
                    if modes is not None:
                        raise
                    reasons[mode] = str(error)
            same |= {"modes": ", ".join(files)}
            same |= {f"companions or thresholds of mode {mode}": _digest(*of_mode) for mode, of_mode in files.items()}
        title = f"scoring {workdir}{f' in {len(files)} modes' if len(files) > 1 else ''}, windows"
        total = len(files) * min(len(windows), len(windows) if limit is None else limit)
        may_record = distributed.is_first()
        with progress(title, total, quiet=not distributed.is_first()) as advance:
            for mode in files:
                changed, params = enter(mode, config, run.params, run.step, *files[mode])
                evaluate = make_evaluation(changed, mesh, windows, tokenizer, advance)
                result = {"step": run.step, **evaluate(params, jnp.asarray(run.step), limit)}
                scores.append(score_of(mode, split, config, result))
                may_record = may_record and _recorded(workdir, scores[-1])
    return scores, reasons


def _digest(companions: np.ndarray | None, thresholds: Thresholds | None) -> str:
    """The digest of the values of which a mode makes constants: each process reads them on its own file system."""
    arrays = [] if companions is None else [companions]
    if thresholds is not None:
        arrays += [np.array([thresholds.step, thresholds.group_size]), thresholds.log_means, thresholds.logits]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def _recorded(workdir: epath.PathLike, score: Score) -> bool:
    """Record a score in the workdir, or print a warning, for example for the run of another user."""
    try:
        record_score(workdir, score)
    except Exception as error:
        if not is_io_error(error):
            raise
        print(f"warning: {workdir}/modes.json: scores are not recorded ({error_words(error)})", file=sys.stderr)
        return False
    return True


_MIXTURE_BYTES = 2**28  # the largest size of the mixtures on one device, unless a single sequence has more


def _batch_size(config: Config, mesh: Mesh) -> int:
    """Sequences of an evaluation batch: a microbatch of training, rounded up to whole groups.

    Fewer in the modes with companions, where each sequence has its own mixtures.
    """
    multiple, kind = batch_multiple(config, mesh), config.model.feed_forward
    batch_size = -(-config.training.batch_size // config.training.gradient_accumulation_steps // multiple) * multiple
    if not isinstance(kind, CompanionsConfig):
        return batch_size
    model, shards, group_size = config.model, num_shards(DIMENSIONS["sequences"]), config.group_size
    mixture_bytes = model.context_length * kind.num_experts * model.d_model * 4  # of one sequence
    sizes = range(shards, batch_size + 1, shards)
    sizes_in_groups = [size for size in sizes if size % group_size == 0 or group_size % size == 0]
    fitting = (size for size in sizes_in_groups if size * mixture_bytes <= shards * _MIXTURE_BYTES)
    return max(fitting, default=sizes_in_groups[0])


def _sum_over_processes(mesh: Mesh, counts: np.ndarray) -> np.ndarray:
    """The sum over the processes of their counts [V]."""
    shards = num_shards(DIMENSIONS["sequences"])
    rows = np.zeros((len(local_sequences(mesh, shards)), len(counts)), np.int32)
    rows[0] = counts
    return np.asarray(_sum_of_rows(place_sequences(mesh, rows, shards)))


@jax.jit  # at module level: a function defined in each evaluation would be compiled in each
def _sum_of_rows(rows: jax.Array) -> jax.Array:
    return replicate(rows.sum(axis=0))
