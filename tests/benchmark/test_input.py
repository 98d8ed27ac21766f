"""`mot bench input`: the batches of training, timed without steps."""

import json
import time

import pytest

from mot_jax import cli
from mot_jax.benchmark import input as bench

DEMO = ["configs/demo.py", "--model.context-length", "32", "--training.batch-size", "64"]


def test_batches_are_counted_and_timed(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(f"line {i} " * 9 for i in range(400)))
    directory = ["--directory", str(tmp_path / "data")]
    cli.main(["data", "build", "mine", str(tmp_path / "a.txt"), "--documents", "line", "--workers", "1", *directory])
    shapes = []

    def slow_batches(windows, order, objective, batch_size, rows, first):
        iterator = train_batches(windows, order, objective, batch_size, rows, first)

        class Batches:
            def __next__(self):
                time.sleep(0.01 if len(shapes) < 5 else 0.05)
                batch = next(iterator)
                shapes.append(batch.sequences.inputs.shape)
                return batch

            close = iterator.close

        return Batches()

    train_batches = bench.train_batches
    monkeypatch.setattr(bench, "train_batches", slow_batches)
    corpus = ["--data.corpus", "mine", "--data.directory", str(tmp_path / "data"), "--data.validation-split", "train"]
    capsys.readouterr()
    cli.main(["bench", "input", *DEMO, *corpus, "--batches", "5", "--json", str(tmp_path / "rows.json")])
    assert shapes == [(64, 32)] * 6  # the first, untimed one fills the prefetch buffer
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["tokens"] == 64 * 32 and row["batches"] == 5 and row["corpus"] == "mine"
    assert row["mean_s"] > 0.01 and row["slowest_s"] > 0.05 and row["slowest_s"] > 2 * row["mean_s"]
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["mean_s"])
    assert "| mine " in capsys.readouterr().out
