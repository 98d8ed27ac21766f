"""The scores of a run in its inference modes: stored in `modes.json` in its workdir, and printed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.table
from etils import epath

from mot_jax.config import Config
from mot_jax.errors import UserError
from mot_jax.modes import is_independent, mode_of
from mot_jax.runs.metrics import validation_line
from mot_jax.runs.restore import load_run_config
from mot_jax.runtime import strict_json
from mot_jax.runtime.paths import replace_file, user_path

Score = dict[str, Any]

_KEY = ("mode", "split", "step", "windows", "group_size")  # a newer score replaces one that agrees in these


def score_of(mode: str, split: str, config: Config, result: Score) -> Score:
    """A score: the result of an evaluation, its mode, split and groups, and its perplexity.

    config: that of the run; its groups may differ. independent: whether no sequence depends on the others of its batch.
    """
    settings = {"mode": mode, "split": split, "group_size": _group_size(config)}
    settings |= {"independent": is_independent(mode, config)}
    return {**settings, **result, "perplexity": perplexity(result["loss"])}


def perplexity(loss: float) -> float:
    """The exponential of a loss, infinite if it exceeds a float, as that of a diverged run may."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def record_score(workdir: epath.PathLike, score: Score) -> None:
    """Store a score in the workdir, in place of an older one of the same mode, split, step, windows and group size."""
    path = user_path("workdir", workdir) / "modes.json"
    others = [other for other in _read(path) if any(other[key] != score[key] for key in _KEY)]
    replace_file(path, (strict_json.dumps([*others, score], indent=1) + "\n").encode())


def measured(workdir: epath.PathLike, step: int) -> dict[str, Score]:
    """The stored scores of the run in `workdir`, by mode: of its validation split, after `step` updates, in its groups.

    All are of the same number of windows, so that they can be compared: the one on which most modes have been scored.
    """
    config = load_run_config(workdir)
    settings = {"split": config.data.validation_split, "step": step, "group_size": _group_size(config)}
    by_windows: dict[int, dict[str, Score]] = {}
    for score in read_scores(workdir):
        if all(score[key] == value for key, value in settings.items()):
            by_windows.setdefault(score["windows"], {})[score["mode"]] = score
    return max(by_windows.items(), key=lambda item: (len(item[1]), item[0]), default=(0, {}))[1]


def _group_size(config: Config) -> int:
    """The size of mixing groups; for a model tuned to token choice, that of the groups with which it was trained."""
    mixture = getattr(config.model.feed_forward, "mixture", None)
    return config.model.group_size if mixture is None else mixture.group_size


def read_scores(workdir: epath.PathLike) -> list[Score]:
    """The stored scores of the run in `workdir`. Raises UserError if they are damaged."""
    return _read(user_path("workdir", workdir) / "modes.json")


def _read(path: epath.Path) -> list[Score]:
    advice = "delete it, and mot evaluate writes it again"
    scores = strict_json.load(path, list, advice) if path.exists() else []
    if not all(isinstance(score, dict) and score.keys() >= {*_KEY} for score in scores):
        raise UserError(f"{path}: is damaged (a score must have {', '.join(_KEY)}); {advice}")
    return scores


# --- printing ---------------------------------------------------------------------------------------------------------


def show(config: Config, scores: Sequence[Score]) -> None:
    """Print the scores of one split: a single one as sentences, more as a table."""
    print(f"{scores[0]['split']} split of {' + '.join(config.data.corpus)}, groups of {scores[0]['group_size']}")
    if len(scores) == 1:
        (score,) = scores
        print(f"mode {score['mode']}, {mode_of(score['mode']).about}; sequences {_independence(score)}")
        print(f"{validation_line(score)} | {score['tokens']:,} tokens | perplexity {score['perplexity']:.3f}")
        return
    print(f"after {scores[0]['step']} steps, {scores[0]['windows']:,} windows, {scores[0]['tokens']:,} tokens")
    names = ("mode", "bits per byte", "loss", "perplexity", "sequences", "")
    rows = [
        (s["mode"], f"{s['bits_per_byte']:.4f}", f"{s['loss']:.4f}", f"{s['perplexity']:.3f}", _independence(s),
         mode_of(s["mode"]).about)
        for s in scores
    ]  # fmt: skip
    console = rich.console.Console(highlight=False, soft_wrap=True)
    if console.is_terminal:
        table = rich.table.Table(*names, box=None)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    for row in (names, *rows):
        print(" | ".join(text.ljust(width) for text, width in zip(row, (12, 13, 7, 10, 20, 0), strict=True)).rstrip())


def _independence(score: Score) -> str:
    return "are independent" if score["independent"] else "influence each other"
