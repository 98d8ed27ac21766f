"""`mot bench input`: the batches of training, timed without steps."""

import json
from types import SimpleNamespace

from mot_jax import cli
from mot_jax.benchmark import input as bench

DEMO = ["configs/demo.py", "--model.context-length", "32", "--training.batch-size", "64"]


def test_batches_are_counted_and_timed(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(f"line {i} " * 9 for i in range(400)))
    directory = ["--directory", str(tmp_path / "data")]
    cli.main(["data", "build", "mine", str(tmp_path / "a.txt"), "--documents", "line", "--workers", "1", *directory])
    shapes = []

    def recording(*arguments):
        for batch in train_batches(*arguments):
            shapes.append(batch.sequences.inputs.shape)
            yield batch

    train_batches = bench.train_batches
    monkeypatch.setattr(bench, "train_batches", recording)
    clock = iter([100.0, 101.0, 102.0, 104.0, 105.0, 110.0])  # before the first timed batch, and after each
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    corpus = ["--data.corpus", "mine", "--data.directory", str(tmp_path / "data"), "--data.validation-split", "train"]
    capsys.readouterr()
    cli.main(["bench", "input", *DEMO, *corpus, "--batches", "5", "--json", str(tmp_path / "rows.json")])
    assert shapes == [(64, 32)] * 6  # the first, untimed one fills the prefetch buffer
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["tokens"] == 64 * 32 and row["batches"] == 5 and row["corpus"] == "mine"
    assert (row["mean_s"], row["slowest_s"], row["tokens_per_second"]) == (2.0, 5.0, 64 * 32 / 2.0)
    assert "| mine " in capsys.readouterr().out
