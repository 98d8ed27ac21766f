"""Opening the text of a config: one corpus or several, in windows of its tokenizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from mot_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from mot_jax.data import text as module
from mot_jax.data import windows as windows_module
from mot_jax.data.build import build, spec_from_files
from mot_jax.data.order import MixtureOrder, TrainingOrder
from mot_jax.data.text import open_split, open_text, open_tokenizer, text_warnings, with_absolute_paths
from mot_jax.data.tokenizers import train_tokenizer
from mot_jax.data.windows import JoinedWindows, open_windows
from mot_jax.errors import UserError
from mot_jax.runs.restore import check_data


@pytest.fixture
def corpora(monkeypatch, toy_corpus):
    """Two corpora in memory, of 20 and 60 documents."""

    def open_corpus(name, split, directory, feature="text", field="--split"):
        count = {"small": 20, "large": 60}[name]
        texts = [f"{name} {split} {i} ".encode() * (3 + i % 5) for i in range(count)]
        return toy_corpus(*texts, name=name, split=split)

    monkeypatch.setattr(module, "open_corpus", open_corpus)


def config_of(directory: Path, *corpus: str, weights: tuple[float, ...] = (), **data) -> Config:
    return Config(
        model=ModelConfig(context_length=16, loss_chunk=16),
        data=DataConfig(corpus=corpus, weights=weights, shuffle_group_size=4, directory=str(directory), **data),
        training=TrainingConfig(batch_size=32),
    )


def test_one_corpus(corpora, tmp_path):
    text = open_text(config_of(tmp_path, "small"))
    assert type(text.order) is TrainingOrder and not isinstance(text.train, JoinedWindows)
    assert text.fingerprints.keys() == {"train", "validation", "tokenizer", "order"}
    assert text.train.fingerprint != text.validation.fingerprint


def test_several_corpora_in_proportion_to_their_sizes_or_weights(corpora, tmp_path):
    single = [open_text(config_of(tmp_path, name)) for name in ("small", "large")]
    joined, mixed = (open_text(config_of(tmp_path, "small", "large", weights=w)) for w in ((), (1.0, 1.0)))
    assert type(joined.order) is TrainingOrder and type(mixed.order) is MixtureOrder
    sizes = [len(text.train) for text in single]
    assert len(joined.train) == sum(sizes) and len(joined.validation) == sum(len(t.validation) for t in single)
    ids = np.array([0, -1, sizes[0], sum(sizes) - 1])
    batch = joined.train.read(ids)
    for row, (text, at) in zip((0, 2, 3), ((single[0], 0), (single[1], 0), (single[1], sizes[1] - 1)), strict=True):
        np.testing.assert_array_equal(batch.tokens[row], text.train.read([at]).tokens[0])
    assert not batch.mask[1].any()
    assert len(np.unique(joined.train.documents[:, 0])) == 20 + 60 or joined.train.documents.max() == 79
    drawn = mixed.order.window_ids(0, 4000)
    assert (drawn < sizes[0]).mean() == pytest.approx(0.5, abs=0.01) and sizes[0] < 0.4 * sizes[1]
    assert mixed.fingerprints["train"] != joined.fingerprints["train"]


def test_the_bytes_dropped_by_a_lossy_tokenizer_are_counted(corpora, tmp_path):
    """A tokenizer of words without the spaces: the bytes that it drops are counted, for correct bits per byte."""
    assert open_text(config_of(tmp_path, "small")).train.bytes_per_token_byte == 1
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["[UNK]", "</s>"], show_progress=False)
    words.train_from_iterator([f"small train {i}" for i in range(20)], trainer)
    words.save(str(tmp_path / "t.json"))
    windows = open_text(config_of(tmp_path, "small", tokenizer=str(tmp_path / "t.json"))).train
    text = [f"small train {i} " for i in range(20)]
    repeats = [3 + i % 5 for i in range(20)]
    total, encoded = (
        sum(n * len(t.replace(" ", "") if drop else t) for n, t in zip(repeats, text, strict=True)) for drop in (0, 1)
    )
    assert windows.info["bytes"] == total and windows.info["token_bytes"] == encoded
    assert windows.bytes_per_token_byte == pytest.approx(total / encoded)


@pytest.fixture
def built(tmp_path):
    """A config of a corpus of 50 documents on disk; its fields can be replaced."""
    (tmp_path / "a.txt").write_text("\n".join(f"Line {i}, of Words" for i in range(50)))
    build(spec_from_files("mine", [str(tmp_path / "a.txt")], "line", validation=0.2), tmp_path / "corpora", 1)
    return lambda **data: config_of(tmp_path, "mine", **data)


@pytest.mark.parametrize(
    ("train", "validation", "shared"),
    [
        ("train", "validation", False),
        ("train[:90%]", "train[90%:]", False),
        ("train", "train", True),
        ("train", "train[90%:]", True),
        ("train+validation", "validation", True),
    ],
)
def test_training_on_the_validation_split_is_reported(built, train, validation, shared):
    config = built(train_split=train, validation_split=validation)
    lines = text_warnings(config, open_tokenizer(config))
    assert len(lines) == shared
    assert all("the validation loss is that of text trained on" in line for line in lines)


def lowercase(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()


def words_alone(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()


@pytest.mark.parametrize("change", [lowercase, words_alone])
def test_a_lossy_tokenizer_is_reported(built, tmp_path, change):
    def warnings() -> list[str]:
        config = built(tokenizer=str(tmp_path / "t.json"))
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=1000))
        return text_warnings(config, open_tokenizer(config))

    (tmp_path / "t.json").write_bytes(train_tokenizer([b"Line 1, of Words"] * 9, 300, warn=lambda line: None))
    assert warnings() == []
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    change(tokenizer)
    tokenizer.save(str(tmp_path / "t.json"))
    (line,) = warnings()
    assert "is lossy: of " in line and "differ after encoding and decoding" in line


@pytest.mark.parametrize(("objective", "size", "good"), [("causal", 256, 257), ("masked", 257, 258)])
def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path, objective, size, good):
    config = config_of(tmp_path, "small")
    config = dataclasses.replace(config, model=ModelConfig(vocab_size=size, objective=objective))
    with pytest.raises(UserError, match=rf"^model.vocab_size = {size}: must be at least .*; try {good}$"):
        open_tokenizer(config)


def test_parts_are_built_by_processes_and_reused(tmp_path, toy_corpus, monkeypatch):
    """The windows do not depend on the number of processes, and only missing parts are rebuilt."""
    monkeypatch.setattr(windows_module, "PART_BYTES", 1000)
    texts = [f"document {i} ".encode() * 9 for i in range(40)]
    corpus = dataclasses.replace(toy_corpus(*texts), num_bytes=sum(map(len, texts)))
    tokenizer = open_tokenizer(Config())
    two, one = (open_windows(corpus, "train", tokenizer, 8, tmp_path / str(n), workers=n) for n in (2, 1))
    assert isinstance(two, JoinedWindows) and len(two.parts) == 5 and two.fingerprint == one.fingerprint
    everything = np.arange(len(two))
    np.testing.assert_array_equal(two.read(everything).tokens, one.read(everything).tokens)
    np.testing.assert_array_equal(two.documents, one.documents)
    whole = tmp_path / "1" / "windows" / one.fingerprint
    first, *others = sorted(whole.iterdir())
    (first / "windows.json").unlink()  # as after an interruption
    times = {path: (path / "windows.json").stat().st_mtime_ns for path in others}
    again = open_windows(corpus, "train", tokenizer, 8, tmp_path / "1", workers=1)
    np.testing.assert_array_equal(two.read(everything).tokens, again.read(everything).tokens)
    assert times == {path: (path / "windows.json").stat().st_mtime_ns for path in others}


@pytest.mark.parametrize("field", ["train_split", "validation_split"])
def test_an_unknown_split_is_reported_with_its_field(tmp_path, field):
    (tmp_path / "a.txt").write_text("\n".join(f"line {i}" for i in range(50)))
    build(spec_from_files("mine", [str(tmp_path / "a.txt")], "line", validation=0.2), tmp_path / "corpora", 1)
    config = config_of(tmp_path, "mine", **{field: "tran"})
    with pytest.raises(UserError, match=rf"^data\.{field} = 'tran': mine has no such split"):
        open_text(config)
    with pytest.raises(UserError, match=r"^--split = 'test': mine has no such split"):
        open_split(config, "test", open_tokenizer(config))


def test_a_run_with_another_version_of_the_order_is_not_resumed(corpora, tmp_path):
    """Runs from before the order had a version used Grain's permutation."""
    config = config_of(tmp_path, "small")
    fingerprints = open_text(config).fingerprints
    (tmp_path / "data.json").write_text(json.dumps(fingerprints))
    check_data(fingerprints, config, tmp_path)
    del fingerprints["order"]
    (tmp_path / "data.json").write_text(json.dumps(fingerprints))
    check_data(fingerprints, config, tmp_path)  # evaluation does not use the training order
    with pytest.raises(
        UserError, match=r"another version of the training order \(order: 1 in the run, now 2\)"
    ) as error:
        check_data(open_text(config).fingerprints, config, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given, stored", [("text", "{cwd}/text"), ("~/t", "{home}/t"), ("gs://b/t", "gs://b/t"), (None, None)]
)
def test_the_directory_of_the_text_is_stored_as_an_absolute_path(monkeypatch, tmp_path, given, stored):
    monkeypatch.chdir(tmp_path)
    stored = stored and stored.format(cwd=tmp_path, home=Path.home())
    assert with_absolute_paths(Config(data=DataConfig(directory=given))).data.directory == stored
