"""The paper's claim at a small scale: version 1's dense and MoT models on Python source, trained as by `mot train`.

4,000 steps each, vocabulary 8,192; v1's widths, batch, context and learning rates. A call trains until its time is up
and saves a checkpoint; the same command then resumes the run.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mot_jax.benchmark import workloads
from mot_jax.benchmark.report import Column, number
from mot_jax.config import Config, DataConfig, LoggingConfig, MixtureOfTokensConfig, ModelConfig
from mot_jax.data import corpora, report, tokenizers
from mot_jax.runs.metrics import read_rows
from mot_jax.runtime import distributed
from mot_jax.runtime.paths import user_path
from mot_jax.training import Hook, Trainer, train

Row = dict[str, Any]
_STEPS, _VOCABULARY = 4_000, 8_192
_CORPORA = ("python_source/stdlib", "python_source/site_packages")


def headline_configs(folder: Path, small: bool) -> dict[str, Config]:
    """The configs of both runs, by the names of their workdirs. small: a few steps of tiny models on bytes."""
    mot = workloads.v1_mot()
    steps = 6 if small else _STEPS
    optimizer = dataclasses.replace(mot.training.optimizer, warmup_steps=max(steps // 100, 1))
    training = dataclasses.replace(mot.training, steps=steps, optimizer=optimizer, log_every=20, validate_every=200)
    data = DataConfig(_CORPORA, tokenizer=str(folder / "tokenizer.json"), directory=str(folder / "data"))
    model = dataclasses.replace(mot.model, vocab_size=_VOCABULARY)
    if small:
        model = ModelConfig(1, 16, 32, 2, context_length=32, loss_chunk=32, feed_forward=MixtureOfTokensConfig(4, 8))
        training = dataclasses.replace(training, batch_size=8, log_every=1, validate_every=3)
        data = dataclasses.replace(data, corpus=_CORPORA[:1], tokenizer="bytes", validation_split="validation[:1%]")
    mot = dataclasses.replace(
        mot,
        model=model,
        data=dataclasses.replace(data, validation_windows=64 if small else 2_048),
        training=dataclasses.replace(training, checkpoint_every=500),
        logging=LoggingConfig(tensorboard=False, sample_tokens=0),
    )
    dense = workloads.dense_of_equal_width(mot)
    rate = workloads.v1_dense().training.optimizer.learning_rate
    optimizer = dataclasses.replace(optimizer, learning_rate=rate)
    dense = dataclasses.replace(dense, training=dataclasses.replace(dense.training, optimizer=optimizer))
    return {"dense": dense, "mixture_of_tokens": mot}


class TimeLimit(Hook):
    """Stops the training, with a checkpoint, in the first step after a deadline in seconds of `time.monotonic`."""

    def __init__(self, deadline: float):
        self._deadline = deadline

    def after_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if distributed.gather(time.monotonic() >= self._deadline)[0]:  # the clock of process 0
            trainer.stop()


def bench_headline(folder: Path, small: bool, seconds: float, progress: Callable[[str], None]) -> list[Row]:
    """Train both models in `folder` for at most about `seconds`; return a row for each, finished or not.

    Rows: kind; step, of steps; loss, the last validation loss in nats per token; tokens_per_second, the median of the
    logged rows; matched_step, the first validated step with a loss of at most the dense model's last one, None until
    that model is finished; share_of_steps and share_of_time, the matched step relative to the steps and the time of the
    dense model.
    """
    deadline, configs = time.monotonic() + seconds, headline_configs(folder, small)
    folder.mkdir(parents=True, exist_ok=True)
    if not small and not (folder / "tokenizer.json").exists():
        progress(f"headline: a tokenizer of {_VOCABULARY} tokens")
        corpus = corpora.open_corpus(_CORPORA[-1], "train", folder / "data", "text")
        train_tokenizer = partial(tokenizers.train_tokenizer, vocab_size=_VOCABULARY)
        progress(report.write_tokenizer(corpus, train_tokenizer, str(folder / "tokenizer.json")))
    for name, config in configs.items():
        left = deadline - time.monotonic()
        if left <= 0:
            progress(f"headline: no time is left for {name}; the same command resumes")
            break
        progress(f"headline: {name}, for at most {left:.0f} s")
        train(config, user_path("--out", str(folder / name)), [TimeLimit(deadline)])
    return headline_rows({name: (c.training.steps, _rows(folder / name)) for name, c in configs.items()})


def _rows(workdir: Path) -> list[Row]:
    return read_rows(user_path("--out", str(workdir))) if workdir.exists() else []


def headline_rows(runs: dict[str, tuple[int, list[Row]]]) -> list[Row]:
    """The rows of `bench_headline`, from the number of steps of each run, `dense` among them, and its logged rows."""
    validated = {name: [r for r in rows if r["split"] == "validation"] for name, (_, rows) in runs.items()}
    speeds = {}
    for name, (_, rows) in runs.items():
        logged = [row["tokens_per_second"] for row in rows if row["split"] == "train"]
        speeds[name] = statistics.median(logged) if logged else None
    steps, dense = runs["dense"][0], validated["dense"][-1:]
    goal = dense[0]["loss"] if dense and dense[0]["step"] == steps else None
    results = []
    for name, (total, rows) in runs.items():
        step = max((row["step"] for row in rows), default=0)
        loss = validated[name][-1]["loss"] if validated[name] else None
        reached = [row["step"] for row in validated[name] if goal is not None and row["loss"] <= goal]
        matched = reached[0] if reached else None
        share = None if matched is None else matched / steps
        speed, dense_speed = speeds[name], speeds["dense"]
        time_share = None if share is None or not speed or not dense_speed else share * dense_speed / speed
        row = {"kind": name, "step": step, "steps": total, "loss": loss, "tokens_per_second": speed}
        results.append(row | {"matched_step": matched, "share_of_steps": share, "share_of_time": time_share})
    return results


COLUMNS: list[Column] = [
    ("model", lambda row: row["kind"]),
    ("step", lambda row: f"{row['step']:,} of {row['steps']:,}"),
    ("validation loss", partial(number, "loss", 1, ".4f")),
    ("tokens/s", partial(number, "tokens_per_second", 1, ",.0f")),
    ("dense's loss at step", partial(number, "matched_step", 1, ",d")),
    ("of its steps", partial(number, "share_of_steps", 1, ".0%")),
    ("of its time", partial(number, "share_of_time", 1, ".0%")),
]
