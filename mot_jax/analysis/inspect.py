"""Analysis of the mixing weights of a trained model (`mot inspect`): pictures, a table and a summary.

The quantity shown for each token is its share in a mixture, |weight| / sum of |weights| over the group. For mixing
weights that are a softmax over the group, these are the weights.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mot_jax.analysis import curves, pictures
from mot_jax.config import MixtureOfTokensConfig, ModelConfig
from mot_jax.data.objectives import VALIDATION, Batch, Objective
from mot_jax.data.order import validation_order
from mot_jax.data.text import open_split, open_tokenizer, store_text_once
from mot_jax.data.tokenizers import Tokenizer
from mot_jax.data.windows import Windows
from mot_jax.errors import UserError, error_words
from mot_jax.modes.recording import record
from mot_jax.nn.feed_forward import FeedForwardContext, MixtureOfTokens
from mot_jax.nn.mixing import normalised_entropy
from mot_jax.nn.transformer import ModelOutput, Params
from mot_jax.runs.metrics import read_rows
from mot_jax.runs.restore import TrainedModel, check_data, load_run, load_run_config
from mot_jax.runtime import strict_json
from mot_jax.runtime.paths import user_path

_MIN_TOKENS = 65_536  # of the validation split, or all of a smaller one
_MIN_COUNT = 8  # a mean over fewer occurrences of a token is too noisy
_EXPERTS, _TOKENS = 16, 8  # in the table: experts of each layer, tokens of each expert
_SUMMARY_EXPERTS = 4  # of each layer in the summary
_LABEL_CHARACTERS = 20  # of the text before a token


def inspect(
    workdir: epath.PathLike, output: epath.PathLike | None = None, group: int = 0, position: int | None = None
) -> list[str]:
    """Analyze a trained Mixture-of-Tokens model on validation text, and write pictures and tables.

    entropy.png: entropies of the mixing weights and update/residual ratios over the steps, from metrics.jsonl.
    weights.png (and weights_emit.png if emit has weights of its own): the shares of one group's tokens at `position`.
    tokens.png, tokens.txt, inspect.json: the tokens with the largest mean weights in the experts of lowest entropy,
    over many windows.

    Args:
        workdir: of the run.
        output: a directory; None is WORKDIR/inspect.
        group: index of the group in the validation split.
        position: within the window; None is the middle.

    Returns:
        The lines of a summary.

    Raises:
        UserError: the run has no checkpoint or no mixing layers, the dataset or tokenizer is not that of the run, the
            group or position does not exist, or `output` cannot be written.
    """
    workdir = user_path("workdir", workdir)
    output = workdir / "inspect" if output is None else user_path("--output", output)
    config = load_run_config(workdir)
    kind, length = config.model.feed_forward, config.model.context_length
    if MixtureOfTokensConfig not in map(type, config.model.block_kinds()):
        rule = f"holds a {kind.kind} model, and mixing weights are those of mixture_of_tokens"
        raise UserError(f"workdir = {workdir}: {rule}; try a Mixture-of-Tokens run")
    assert isinstance(kind, MixtureOfTokensConfig)
    run = load_run(workdir)
    tokenizer = open_tokenizer(config)
    check_data({"tokenizer": tokenizer.fingerprint}, config, workdir)
    store_text_once(config, tokenizer, config.data.validation_split)
    windows = open_split(config, config.data.validation_split, tokenizer)
    check_data({"validation": windows.fingerprint}, config, workdir)

    # A unit is the sequences of one group, or one sequence with several groups if groups are within sequences.
    units = validation_order(windows.documents, config.group_size).reshape(-1, config.model.group_size)
    within = kind.mixing.groups == "within"
    groups, positions = (len(units) * length // kind.group_size, 1) if within else (len(units), length)
    position = positions // 2 if position is None else position
    for name, value, count in (("group", group, groups), ("position", position, positions)):
        if not 0 <= value < count:
            raise UserError(f"--{name} = {value}: must be 0 to {count - 1}; try {min(max(value, 0), count - 1)}")

    unit, inner = divmod(group, groups // len(units))
    shares, members = _group_shares(run, tokenizer, windows, units[unit], inner, position)
    selected = {"index": group, "position": position, "rows": members}
    report = {"workdir": str(workdir), "step": run.step, "group": selected}
    report |= _token_statistics(run, tokenizer, windows, units)

    title = f"{workdir.name}, step {run.step}"
    files = {
        "entropy.png": curves.mixing_curves(read_rows(workdir), title),
        "tokens.png": pictures.token_table(report, kind.group_size),
        "tokens.txt": "".join(line + "\n" for line in _table_lines(report, _EXPERTS)).encode(),
        "inspect.json": strict_json.dumps(report, indent=1).encode(),
    }
    labels = [f"{pictures.visible(member['before'], ' ')}│{pictures.visible(member['token'])}" for member in members]
    for name, by_block in shares.items():
        about = f"{title}: {name} weights of group {group} at position {position}"
        file = "weights.png" if name == "merge" else f"weights_{name}.png"
        files[file] = pictures.weight_maps(by_block, labels, about)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (output / name).write_bytes(content)
    except OSError as error:
        raise UserError(
            f"--output = {output}: cannot be written ({error.strerror or error_words(error)}); try another"
        ) from None
    return [*_table_lines(report, _SUMMARY_EXPERTS), f"in {output}: {', '.join(sorted(files))}"]


# --- mixing weights ---------------------------------------------------------------------------------------------------


def forward_with_weights(
    config: ModelConfig, params: Params, step: int, batch: Batch
) -> tuple[ModelOutput, dict[str, dict[int, jax.Array]]]:
    """Run the model on a batch [B, S] and record its mixing weights.

    Returns:
        The model's output, and the weights by name (merge; emit if it has weights of its own) and block: [N, G, S, E],
        a large array for each block.
    """

    def weights(layer: MixtureOfTokens, x: jax.Array, context: FeedForwardContext) -> dict[str, jax.Array]:
        merge, emit = layer.weights(x, context)
        return {"merge": merge} | ({} if emit is None else {"emit": emit})

    context = FeedForwardContext(batch.token_mask, batch.inputs, step=jnp.asarray(step))
    return record(config, params, batch.inputs, context, batch.segments, weights)


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
    """Sum the merge shares of each class of tokens, relative to uniform mixing.

    Args:
        classes: int32 [B, S]; a token of class `num_classes` is not counted.

    Returns:
        By block, the entropy of each expert [E], and the shares times the group's number of non-padding tokens, summed
        over the tokens of each class [C, E].
    """

    def measure(shares: jax.Array) -> tuple[jax.Array, jax.Array]:
        token_mask = batch.token_mask.reshape(shares.shape[:3])
        entropy = jax.vmap(lambda share: normalised_entropy(share[..., None], token_mask), in_axes=-1)(shares)
        ratio = shares * token_mask.sum(axis=1)[:, None, :, None]
        return entropy, jax.ops.segment_sum(ratio.reshape(-1, shares.shape[-1]), classes.reshape(-1), num_classes)

    return jax.tree.map(measure, _shares(config, params, step, batch)["merge"])


# --- tables -----------------------------------------------------------------------------------------------------------


def _group_shares(
    run: TrainedModel, tokenizer: Tokenizer, windows: Windows, unit: np.ndarray, inner: int, position: int
) -> tuple[dict[str, dict[int, np.ndarray]], list[dict[str, Any]]]:
    """Return the shares of one group at one position, and a description of its members.

    Args:
        unit: ids of the windows that hold the group.
        inner: index of the group within the unit.
        position: within the window; 0 if groups are within sequences.

    Returns:
        Shares [G, E] by name and block; of each member the text before its token, the token, and whether it is a
        non-padding token.
    """
    model = run.config.model
    batch = Objective.of(run.config, tokenizer)(windows.read(unit), unit, VALIDATION)
    tokens, mask = batch.inputs, batch.token_mask
    batch_shares = _shares(model, run.params, run.step, batch)
    shares = jax.tree.map(lambda array: np.asarray(array[inner, :, position]), batch_shares)
    grouped_shape = next(iter(batch_shares["merge"].values())).shape[:3]
    indices = np.arange(tokens.size).reshape(grouped_shape)[inner, :, position]
    members = []
    for row, column in zip(*np.unravel_index(indices, tokens.shape), strict=True):
        is_token = bool(mask[row, column])
        before = _text_before(tokenizer, tokens[row, :column]) if is_token else ""
        token = _token_text(tokenizer, tokens[row, column]) if is_token else "<masked>"
        members.append({"before": before, "token": token, "real": is_token})
    return shares, members


def _token_statistics(run: TrainedModel, tokenizer: Tokenizer, windows: Windows, units: np.ndarray) -> dict[str, Any]:
    """Return, by block, the experts of lowest entropy and the tokens with the largest mean share over 1/G in each."""
    model = run.config.model
    length, unit_size = model.context_length, units.shape[1]
    units_per_batch = min(max(1, 32 // unit_size), len(units))
    count = min(math.ceil(_MIN_TOKENS / (units_per_batch * unit_size * length)), len(units) // units_per_batch)
    objective = Objective.of(run.config, tokenizer)
    batches = [
        objective(windows.read(ids), ids, VALIDATION) for ids in units[: count * units_per_batch].reshape(count, -1)
    ]
    tokens = np.stack([batch.inputs for batch in batches])
    mask = np.stack([batch.token_mask for batch in batches])

    ids, counts = np.unique(tokens[mask], return_counts=True)
    ids, counts = ids[counts >= _MIN_COUNT], counts[counts >= _MIN_COUNT]
    classes = np.searchsorted(ids, tokens)
    counted = mask & (np.append(ids, -1)[classes] == tokens)
    classes = np.where(counted, classes, len(ids)).astype(np.int32)
    sums: Any = None
    for batch, labels in zip(batches, classes, strict=True):
        statistics = jax.device_get(_statistics(model, run.params, run.step, batch, labels, num_classes=len(ids)))
        sums = statistics if sums is None else jax.tree.map(np.add, sums, statistics)

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
                    "text": _token_text(tokenizer, ids[i]),
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
    return {"tokens_read": int(mask.sum()), "least_count": _MIN_COUNT, "blocks": blocks}


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    if token == tokenizer.end_of_text:
        return "<eot>"
    if token == tokenizer.mask_token:
        return "<mask>"
    return tokenizer.decode([token]).decode(errors="backslashreplace")


def _text_before(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """Return the last characters of a text, without its mask tokens."""
    return tokenizer.decode(tokens[tokens != tokenizer.mask_token]).decode(errors="replace")[-_LABEL_CHARACTERS:]


def _table_lines(report: dict[str, Any], experts: int) -> list[str]:
    """Format the statistics as lines of text, with at most `experts` experts of each block."""
    lines = [
        f"{report['workdir']}, step {report['step']}: merge weights over {report['tokens_read']:,} validation tokens",
        "entropy: 1 is uniform mixing, 0 is one token a mixture; (x): x times the weight of uniform mixing, on average",
    ]
    for name, block in report["blocks"].items():
        lines.append(
            f"block {name}: mean entropy {block['entropy']:.2f}, of its experts "
            f"{block['least_entropy']:.2f} to {block['most_entropy']:.2f}; experts of lowest entropy:"
        )
        for expert in block["experts"][:experts]:
            words = "  ".join(f"{pictures.visible(t['text'])} ({t['ratio']:.1f})" for t in expert["tokens"])
            lines.append(f"  expert {expert['expert']:>4}  entropy {expert['entropy']:.2f}  {words}")
    return lines
