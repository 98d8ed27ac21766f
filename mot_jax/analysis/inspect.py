"""What the mixing weights of a trained model do: pictures, a table and a summary of a run.

Of mixing weights of any kind the share of each token is shown, |weight| over its sum over the group: for a softmax over
the group, the weights themselves.
"""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mot_jax.analysis import pictures
from mot_jax.config import MixtureOfTokensConfig, ModelConfig
from mot_jax.data.objectives import VALIDATION, Batch, Objective
from mot_jax.data.order import validation_order
from mot_jax.data.text import open_split, open_tokenizer
from mot_jax.data.tokenizers import Tokenizer
from mot_jax.data.windows import Windows
from mot_jax.errors import UserError, error_words
from mot_jax.modes.recording import record
from mot_jax.nn.feed_forward import FeedForwardContext, MixtureOfTokens
from mot_jax.nn.mixing import normalised_entropy
from mot_jax.nn.transformer import ModelOutput, Params
from mot_jax.runs.metrics import read_rows
from mot_jax.runs.restore import TrainedModel, check_data, load_run, load_run_config
from mot_jax.runtime.paths import user_path

_TOKENS_READ = 65_536  # of validation text, at least, if there is as much
_LEAST_COUNT = 8  # a token that occurs less often says little
_EXPERTS, _TOKENS, _SUMMARY = 16, 8, 4  # of a layer in the table; of an expert; experts of a layer in the summary
_BEFORE = 20  # characters before a token


def inspect(
    workdir: epath.PathLike, output: epath.PathLike | None = None, group: int = 0, position: int | None = None
) -> list[str]:
    """Writes what a trained Mixture-of-Tokens model does with validation text; returns the lines of a summary.

    entropy.png: entropies of the mixing weights and update/residual ratios over the steps, from metrics.jsonl.
    weights.png (weights_emit.png, where emit has its own): the shares of one group's tokens at `position`.
    tokens.png, tokens.txt, inspect.json: the tokens that the most decided experts weigh most, over many windows.

    output: a directory; None is WORKDIR/inspect. group: counts the groups of the validation split, position: within the
    window; None is its middle. Raises UserError for a run without checkpoints or mixing, for text that is not the
    run's, and for what does not exist.
    """
    workdir = user_path("workdir", workdir)
    output = workdir / "inspect" if output is None else user_path("--output", output)
    config = load_run_config(workdir)
    kind, length = config.model.feed_forward, config.model.context_length
    if MixtureOfTokensConfig not in map(type, config.model.block_kinds()):
        raise UserError(
            f"workdir = {workdir}: holds a {kind.kind} model, which mixes nothing; try a Mixture-of-Tokens run"
        )
    assert isinstance(kind, MixtureOfTokensConfig)
    run = load_run(workdir)
    tokenizer = open_tokenizer(config)
    check_data({"tokenizer": tokenizer.fingerprint}, config, workdir)
    windows = open_split(config, config.data.validation_split, tokenizer)
    check_data({"validation": windows.fingerprint}, config, workdir)

    # Units of the text: the rows that must stay together, which hold one group, or several where groups lie within.
    units = validation_order(windows.documents, config.group_size).reshape(-1, config.model.group_size)
    within = kind.mixing.groups == "within"
    groups, positions = (len(units) * length // kind.group_size, 1) if within else (len(units), length)
    position = positions // 2 if position is None else position
    for name, value, count in (("group", group, groups), ("position", position, positions)):
        if not 0 <= value < count:
            raise UserError(f"--{name} = {value}: must be 0 to {count - 1}; try {min(max(value, 0), count - 1)}")

    unit, inner = divmod(group, groups // len(units))
    shown, rows = _one_group(run, tokenizer, windows, units[unit], inner, position)
    of_group = {"index": group, "position": position, "rows": rows}
    report = {"workdir": str(workdir), "step": run.step, "group": of_group}
    report |= _tables(run, tokenizer, windows, units)

    title = f"{workdir.name}, step {run.step}"
    files = {
        "entropy.png": pictures.entropy(read_rows(workdir), title),
        "tokens.png": pictures.tokens(report, kind.group_size),
        "tokens.txt": "".join(line + "\n" for line in _lines(report, _EXPERTS)).encode(),
        "inspect.json": json.dumps(report, indent=1).encode(),
    }
    labels = [f"{pictures.visible(row['before'], ' ')}│{pictures.visible(row['token'])}" for row in rows]
    for name, shares in shown.items():
        about = f"{title}: {name} weights of group {group} at position {position}"
        files["weights.png" if name == "merge" else f"weights_{name}.png"] = pictures.weights(shares, labels, about)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (output / name).write_bytes(content)
    except OSError as error:
        raise UserError(
            f"--output = {output}: cannot be written ({error.strerror or error_words(error)}); try another"
        ) from None
    return [*_lines(report, _SUMMARY), f"in {output}: {', '.join(sorted(files))}"]


# --- the weights ------------------------------------------------------------------------------------------------------


def forward_with_weights(
    config: ModelConfig, params: Params, step: int, batch: Batch
) -> tuple[ModelOutput, dict[str, dict[int, jax.Array]]]:
    """The model's output for a batch [B, S], and by name (merge, emit if it has its own) and block its weights.

    Weights: [N, G, S, E], a large array for each block.
    """

    def look(layer: MixtureOfTokens, x: jax.Array, context: FeedForwardContext) -> dict[str, jax.Array]:
        merge, emit = layer.weights(x, context)
        return {"merge": merge} | ({} if emit is None else {"emit": emit})

    context = FeedForwardContext(batch.token_mask, batch.inputs, step=jnp.asarray(step))
    return record(config, params, batch.inputs, context, batch.segments, look)


@partial(jax.jit, static_argnames="config")
def _shares(config: ModelConfig, params: Params, step: int, batch: Batch):
    _, weights = forward_with_weights(config, params, step, batch)
    tiny = jnp.finfo(jnp.float32).tiny
    return jax.tree.map(lambda w: jnp.abs(w) / jnp.maximum(jnp.abs(w).sum(axis=1, keepdims=True), tiny), weights)


@partial(jax.jit, static_argnames=("config", "num_classes"))
def _statistics(
    config: ModelConfig,
    params: Params,
    step: int,
    batch: Batch,
    classes: jax.Array,
    num_classes: int,
) -> dict[int, tuple[jax.Array, jax.Array]]:
    """By block: each expert's entropy [E], and the merge shares times the group's real tokens, summed by class [C, E].

    classes: int32 [B, S]; a token of class `num_classes` is not counted.
    """

    def measure(shares: jax.Array) -> tuple[jax.Array, jax.Array]:
        real = batch.token_mask.reshape(shares.shape[:3])
        entropy = jax.vmap(lambda share: normalised_entropy(share[..., None], real), in_axes=-1)(shares)
        ratio = shares * real.sum(axis=1)[:, None, :, None]
        return entropy, jax.ops.segment_sum(ratio.reshape(-1, shares.shape[-1]), classes.reshape(-1), num_classes)

    return jax.tree.map(measure, _shares(config, params, step, batch)["merge"])


# --- what is shown ----------------------------------------------------------------------------------------------------


def _one_group(
    run: TrainedModel, tokenizer: Tokenizer, windows: Windows, unit: np.ndarray, inner: int, position: int
) -> tuple[dict[str, dict[int, np.ndarray]], list[dict[str, Any]]]:
    """Shares [G, E] by name and block, and what the group's rows are."""
    model = run.config.model
    batch = Objective.of(run.config, tokenizer)(windows.read(unit), unit, VALIDATION)
    tokens, mask = batch.inputs, batch.token_mask
    found = _shares(model, run.params, run.step, batch)
    shares = jax.tree.map(lambda array: np.asarray(array[inner, :, position]), found)
    shape = next(iter(found["merge"].values())).shape[:3]
    place = np.arange(tokens.size).reshape(shape)[inner, :, position]
    rows = []
    for row, column in zip(*np.unravel_index(place, tokens.shape), strict=True):
        real = bool(mask[row, column])
        before = _before(tokenizer, tokens[row, :column]) if real else ""
        token = _text(tokenizer, tokens[row, column]) if real else "<masked>"
        rows.append({"before": before, "token": token, "real": real})
    return shares, rows


def _tables(run: TrainedModel, tokenizer: Tokenizer, windows: Windows, units: np.ndarray) -> dict[str, Any]:
    """By block, the most decided experts, and the tokens with the highest mean share over 1/G in their mixtures."""
    model = run.config.model
    length, rows = model.context_length, units.shape[1]
    together = min(max(1, 32 // rows), len(units))  # units that are read at one time
    count = min(math.ceil(_TOKENS_READ / (together * rows * length)), len(units) // together)
    objective = Objective.of(run.config, tokenizer)
    batches = [objective(windows.read(ids), ids, VALIDATION) for ids in units[: count * together].reshape(count, -1)]
    tokens = np.stack([batch.inputs for batch in batches])
    mask = np.stack([batch.token_mask for batch in batches])

    ids, counts = np.unique(tokens[mask], return_counts=True)
    ids, counts = ids[counts >= _LEAST_COUNT], counts[counts >= _LEAST_COUNT]
    classes = np.searchsorted(ids, tokens)
    known = mask & (np.append(ids, -1)[classes] == tokens)
    classes = np.where(known, classes, len(ids)).astype(np.int32)
    sums: Any = None
    for batch, labels in zip(batches, classes, strict=True):
        found = jax.device_get(_statistics(model, run.params, run.step, batch, labels, num_classes=len(ids)))
        sums = found if sums is None else jax.tree.map(np.add, sums, found)

    blocks = {}
    for block, (entropy, ratios) in sums.items():
        entropy, ratios = entropy / len(tokens), ratios / counts[:, None]
        experts = []
        for expert in np.argsort(entropy, kind="stable")[:_EXPERTS]:
            best = np.argsort(-ratios[:, expert], kind="stable")[:_TOKENS]
            best = best[ratios[best, expert] > 1]
            words = [
                {
                    "id": int(ids[i]),
                    "text": _text(tokenizer, ids[i]),
                    "ratio": round(float(ratios[i, expert]), 3),
                    "count": int(counts[i]),
                }
                for i in best
            ]
            experts.append({"expert": int(expert), "entropy": round(float(entropy[expert]), 4), "tokens": words})
        blocks[f"{block:02d}"] = {
            "entropy": round(float(entropy.mean()), 4),
            "least_entropy": round(float(entropy.min()), 4),
            "most_entropy": round(float(entropy.max()), 4),
            "experts": experts,
        }
    return {"tokens_read": int(mask.sum()), "least_count": _LEAST_COUNT, "blocks": blocks}


def _text(tokenizer: Tokenizer, token: int) -> str:
    if token == tokenizer.end_of_text:
        return "<eot>"
    if token == tokenizer.mask_token:
        return "<mask>"
    return tokenizer.decode([token]).decode(errors="backslashreplace")


def _before(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """The end of a text; what is masked is left out."""
    return tokenizer.decode(tokens[tokens != tokenizer.mask_token]).decode(errors="replace")[-_BEFORE:]


def _lines(report: dict[str, Any], experts: int) -> list[str]:
    """The table for people."""
    lines = [
        f"{report['workdir']}, step {report['step']}: merge weights over {report['tokens_read']:,} validation tokens",
        "entropy: 1 is uniform mixing, 0 is one token a mixture; (x): x times the weight of uniform mixing, on average",
    ]
    for name, block in report["blocks"].items():
        lines.append(
            f"block {name}: mean entropy {block['entropy']:.2f}, of its experts "
            f"{block['least_entropy']:.2f} to {block['most_entropy']:.2f}; the most decided:"
        )
        for expert in block["experts"][:experts]:
            words = "  ".join(f"{pictures.visible(t['text'])} ({t['ratio']:.1f})" for t in expert["tokens"])
            lines.append(f"  expert {expert['expert']:>4}  entropy {expert['entropy']:.2f}  {words}")
    return lines
