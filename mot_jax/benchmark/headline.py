"""The paper's claim, small: version 1's dense and MoT models on Python source, by `mot train`'s own loop.

4,000 steps each, vocabulary 8,192; v1's widths, batch, context and learning rates. A call trains until its time is up
and leaves a checkpoint; the next one, the same command, goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mot_jax.benchmark import workloads
from mot_jax.benchmark.report import Column, number
from mot_jax.config import Config, DataConfig, LoggingConfig, MixtureOfTokensConfig, ModelConfig
from mot_jax.data import corpora, report, tokenizers
from mot_jax.runs.metrics import read_rows
from mot_jax.runtime.paths import user_path
from mot_jax.training import loop

Row = dict[str, Any]
_STEPS, _VOCABULARY = 4_000, 8_192
_CORPORA = ("python_source/stdlib", "python_source/site_packages")


def headline_configs(folder: Path, small: bool) -> dict[str, Config]:
    """By the name of their workdir. small: a few steps of tiny models on bytes."""
    mot = workloads.v1_mot()
    steps = 6 if small else _STEPS
    optimizer = dataclasses.replace(mot.training.optimizer, warmup_steps=max(steps // 100, 1))
    training = dataclasses.replace(mot.training, steps=steps, optimizer=optimizer, log_every=20, validate_every=200)
    data = DataConfig(_CORPORA, tokenizer=str(folder / "tokenizer.json"), directory=str(folder / "data"))
    model = dataclasses.replace(mot.model, vocab_size=_VOCABULARY)
    if small:
        model = ModelConfig(1, 16, 32, 2, context_length=32, loss_chunk=32, feed_forward=MixtureOfTokensConfig(4, 8))
        training = dataclasses.replace(training, batch_size=8, log_every=1, validate_every=3)
        data = dataclasses.replace(data, corpus=_CORPORA[:1], tokenizer="bytes")
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


def bench_headline(folder: Path, small: bool, seconds: float, progress: Callable[[str], None]) -> list[Row]:
    """Trains in `folder` for at most about so many seconds; a row for each model, as far as it is.

    Rows: kind; step, of steps; loss, the last one on the validation split, nats a token; tokens_per_second, the median
    of the rows of the log; matched_step: the first validated one with a loss at most the dense model's last one, once
    that is at its end; share_of_steps and share_of_time: what that is of the dense model's steps, and of its time.
    """
    deadline, configs = time.monotonic() + seconds, headline_configs(folder, small)
    folder.mkdir(parents=True, exist_ok=True)
    if not small and not (folder / "tokenizer.json").exists():
        progress(f"headline: a tokenizer of {_VOCABULARY} tokens")
        corpus = corpora.open_corpus(_CORPORA[-1], "train", folder / "data", "text")
        train = partial(tokenizers.train_tokenizer, vocab_size=_VOCABULARY)
        progress(report.write_tokenizer(corpus, train, str(folder / "tokenizer.json")))
    for name, config in configs.items():
        left = deadline - time.monotonic()
        if left <= 0:
            progress(f"headline: no time is left for {name}; the same command goes on")
            break
        progress(f"headline: {name}, for at most {left:.0f} s")
        try:
            with sigterm_after(left):
                loop.train(config, user_path("--out", str(folder / name)))
        except SystemExit:
            break
    return headline_rows({name: (c.training.steps, _rows(folder / name)) for name, c in configs.items()})


def _rows(workdir: Path) -> list[Row]:
    return read_rows(user_path("--out", str(workdir))) if workdir.exists() else []


def headline_rows(runs: dict[str, tuple[int, list[Row]]]) -> list[Row]:
    """From each run's number of steps and its rows of metrics so far; `dense` is among them."""
    validated = {name: [r for r in rows if r["split"] == "validation"] for name, (_, rows) in runs.items()}
    speeds = {}
    for name, (_, rows) in runs.items():
        logged = [row["tokens_per_second"] for row in rows if row["split"] == "train"]
        speeds[name] = statistics.median(logged) if logged else None
    steps, dense = runs["dense"][0], validated["dense"][-1:]
    goal = dense[0]["loss"] if dense and dense[0]["step"] == steps else None
    found = []
    for name, (total, rows) in runs.items():
        step = max((row["step"] for row in rows), default=0)
        loss = validated[name][-1]["loss"] if validated[name] else None
        good = [row["step"] for row in validated[name] if goal is not None and row["loss"] <= goal]
        matched = good[0] if good else None
        share = None if matched is None else matched / steps
        own, of_dense = speeds[name], speeds["dense"]
        in_time = None if share is None or not own or not of_dense else share * of_dense / own
        row = {"kind": name, "step": step, "steps": total, "loss": loss, "tokens_per_second": own}
        found.append(row | {"matched_step": matched, "share_of_steps": share, "share_of_time": in_time})
    return found


@contextlib.contextmanager
def sigterm_after(seconds: float) -> Iterator[None]:
    """This process gets a SIGTERM after so many seconds, unless the block is through; and again, while nobody listens.

    A training run that gets it saves a checkpoint and raises SystemExit. Only in the main thread.
    """
    lock, through, timers = threading.Lock(), threading.Event(), []

    def ask() -> None:
        with lock:
            if not through.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

    def start(after: float) -> None:
        timers.append(threading.Timer(after, ask))
        timers[-1].daemon = True
        timers[-1].start()

    previous = signal.signal(signal.SIGTERM, lambda *_: start(1.0))  # the run has not begun to listen
    start(max(seconds, 0.0))
    try:
        yield
    finally:
        with lock:
            through.set()
        for timer in timers:
            timer.cancel()
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


COLUMNS: list[Column] = [
    ("model", lambda row: row["kind"]),
    ("step", lambda row: f"{row['step']:,} of {row['steps']:,}"),
    ("validation loss", partial(number, "loss", 1, ".4f")),
    ("tokens/s", partial(number, "tokens_per_second", 1, ",.0f")),
    ("dense's loss at step", partial(number, "matched_step", 1, ",d")),
    ("of its steps", partial(number, "share_of_steps", 1, ".0%")),
    ("of its time", partial(number, "share_of_time", 1, ".0%")),
]
