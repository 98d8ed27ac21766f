"""Batches: one global order, for any division of the batch among processes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from mot_jax.data import pipeline
from mot_jax.data.corpora import Corpus
from mot_jax.data.objectives import Batch, Objective
from mot_jax.data.order import TrainingOrder, groups_sharing_documents, validation_order
from mot_jax.data.pipeline import TrainBatch, token_counts, train_batches, validation_batches
from mot_jax.data.tokenizers import load_tokenizer
from mot_jax.data.windows import WindowBatch, Windows, open_windows

NAME = "python_source/stdlib"


CAUSAL = Objective(False, True, 0.15, 0, 257, 257, 256)
MASKED = dataclasses.replace(CAUSAL, masked=True)


def assert_same(actual: Batch, expected: Batch) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture(scope="module")
def opened(data_directory: Path, toy_corpus: Callable[..., Corpus]) -> Windows:
    texts = [np.random.default_rng(i).bytes(20 + i) for i in range(60)]
    return open_windows(toy_corpus(*texts), "train", load_tokenizer("bytes"), 8, data_directory)


@pytest.fixture
def windows(opened: Windows) -> Windows:
    """A copy for each test: the background thread of an earlier test may still be reading."""
    return copy.copy(opened)


def take(windows: Windows, order: TrainingOrder, sequences: list[int], first: int, count: int) -> list[TrainBatch]:
    batches = train_batches(windows, order, CAUSAL, 12, np.array(sequences), first)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


@pytest.mark.parametrize("objective", [CAUSAL, MASKED])
@pytest.mark.parametrize("limit, examples", [(80, 10), (1, 1), (2**22, None)])
def test_token_counts_are_of_the_inputs_of_the_first_examples(
    windows: Windows, monkeypatch: pytest.MonkeyPatch, objective: Objective, limit: int, examples: int | None
) -> None:
    """In blocks of four windows; of a short text, of one epoch."""
    monkeypatch.setattr(pipeline, "COUNTED_TOKENS", limit)
    monkeypatch.setattr(pipeline, "MAX_TOKENS_READ", 4 * 8)
    order, numbers = TrainingOrder(windows.documents, 4, seed=3), np.arange(examples or len(windows))
    batch = objective(windows.read(order.window_ids(0, len(numbers))), numbers)
    expected = np.bincount(batch.inputs[batch.token_mask], minlength=300)
    assert expected.sum() <= max(limit, 8) and (expected[257] > 0) == objective.masked
    np.testing.assert_array_equal(token_counts(windows, order, objective, 300), expected)


def test_training_batches_follow_the_order(windows: Windows) -> None:
    order = TrainingOrder(windows.documents, 4, seed=3)
    per_epoch = len(windows) // 12
    for t, batch in enumerate(take(windows, order, list(range(12)), 0, per_epoch + 5)):
        ids = order.window_ids(12 * t, 12 * t + 12)
        assert_same(batch.sequences, CAUSAL(windows.read(ids), ids))
        assert batch.shared_document_share == groups_sharing_documents(windows.documents, ids.reshape(3, 4)).mean()


def test_processes_together_read_the_whole_batch(windows: Windows) -> None:
    order = TrainingOrder(windows.documents, 4, seed=3)
    whole = take(windows, order, list(range(12)), 24, 6)
    for parts in ([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]], [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]):
        for sequences in parts:
            for local, complete in zip(take(windows, order, sequences, 24, 6), whole, strict=True):
                assert_same(
                    local.sequences, jax.tree.map(lambda x, sequences=sequences: x[sequences], complete.sequences)
                )
                assert local.shared_document_share == complete.shared_document_share


def test_a_run_continues_where_it_stopped(windows: Windows) -> None:
    order = TrainingOrder(windows.documents, 4, seed=3)
    whole = take(windows, order, [0, 5], 0, 9)
    rest = take(windows, TrainingOrder(windows.documents, 4, seed=3), [0, 5], 48, 5)
    for a, b in zip(whole[4:], rest, strict=True):
        assert_same(a.sequences, b.sequences)


def test_a_process_reads_only_its_sequences(windows: Windows, monkeypatch: pytest.MonkeyPatch) -> None:
    ids_read: list[list[int]] = []
    read = windows.read

    def counting_read(ids: np.ndarray) -> WindowBatch:
        ids_read.append(ids.tolist())
        return read(ids)

    monkeypatch.setattr(windows, "read", counting_read)
    list(validation_batches(windows, CAUSAL, 4, 12, np.array([1, 7]), None))
    assert {len(ids) for ids in ids_read} == {2}
    ids_read.clear()
    monkeypatch.setattr(pipeline, "MAX_WINDOWS_READ", 8)
    order = TrainingOrder(windows.documents, 4, seed=3)
    take(windows, order, [1, 7], 0, 3)
    assert ids_read[0] == order.window_ids(0, 48).reshape(4, 12)[:, [1, 7]].reshape(-1).tolist()


@pytest.mark.parametrize("limit", ["MAX_WINDOWS_READ", "MAX_TOKENS_READ", "MAX_WINDOWS_ORDERED"])
def test_the_windows_read_at_once_are_limited(windows: Windows, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """Each limit allows two batches of two sequences of twelve."""
    ids_read: list[int] = []
    counted: Any = SimpleNamespace(
        read=lambda ids: ids_read.append(len(ids)) or windows.read(ids), context_length=windows.context_length
    )
    value = {"MAX_WINDOWS_READ": 5, "MAX_TOKENS_READ": 5 * windows.context_length, "MAX_WINDOWS_ORDERED": 30}[limit]
    monkeypatch.setattr(pipeline, limit, value)
    take(counted, TrainingOrder(windows.documents, 4, seed=3), [1, 7], 0, 3)
    assert ids_read[0] == 4


@pytest.mark.parametrize("together", [1, 12, 30, 36])
def test_batches_do_not_depend_on_the_number_read_at_once(
    windows: Windows, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    sequences, expected = (
        [0, 2, 5, 7, 8, 11],
        take(windows, TrainingOrder(windows.documents, 4, seed=3), [0, 2, 5], 24, 9),
    )
    monkeypatch.setattr(pipeline, "MAX_WINDOWS_READ", together)
    batches = take(windows, TrainingOrder(windows.documents, 4, seed=3), sequences, 24, 9)
    for a, b in zip(batches, expected, strict=True):
        assert_same(jax.tree.map(lambda x: x[:3], a.sequences), b.sequences)
        assert a.shared_document_share == b.shared_document_share


def test_closing_ends_the_thread(windows: Windows) -> None:
    batches = train_batches(windows, TrainingOrder(windows.documents, 4, seed=3), CAUSAL, 12, np.arange(12), 0)
    before = set(threading.enumerate())
    next(batches)
    begun = set(threading.enumerate()) - before
    assert len(begun) == 1
    batches.close()
    for _ in range(500):
        if not begun & set(threading.enumerate()):
            return
        time.sleep(0.01)
    pytest.fail("the thread is still running")


def test_batches_and_starts_that_split_groups_are_refused(windows: Windows) -> None:
    order = TrainingOrder(windows.documents, 4, seed=3)
    with pytest.raises(ValueError, match="multiple"):
        train_batches(windows, order, CAUSAL, 10, np.arange(10), 0)
    with pytest.raises(ValueError, match="multiple"):
        train_batches(windows, order, CAUSAL, 12, np.arange(12), 6)
    with pytest.raises(ValueError, match="multiple"):
        next(validation_batches(windows, CAUSAL, 4, 10, np.arange(10), None))


def test_an_error_while_reading_reaches_the_reader(windows: Windows, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ids: np.ndarray) -> None:
        raise RuntimeError("checksum")

    monkeypatch.setattr(windows, "read", fail)
    with pytest.raises(RuntimeError, match="checksum"):
        take(windows, TrainingOrder(windows.documents, 4, seed=3), [0], 0, 1)


def test_validation_predicts_every_token_once(windows: Windows) -> None:
    batches = list(validation_batches(windows, CAUSAL, 4, 12, np.arange(12), None))
    assert sum(int(batch.target_mask.sum()) for batch in batches) == windows.info["tokens"] - 1
    assert {batch.inputs.shape for batch in batches} == {(12, 8)}
    for sequences in ([0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]):
        for part, whole in zip(
            validation_batches(windows, CAUSAL, 4, 12, np.array(sequences), None), batches, strict=True
        ):
            assert_same(part, jax.tree.map(lambda x, sequences=sequences: x[sequences], whole))


@pytest.mark.parametrize("limit", [1, 4, 5, 50, 10**6])
def test_the_validation_limit_takes_whole_groups_of_the_whole_text(windows: Windows, limit: int) -> None:
    """Each group once, with gaps of at most three times the mean."""
    ids_read: list[np.ndarray] = []
    counted: Any = SimpleNamespace(
        read=lambda ids: ids_read.append(ids) or windows.read(ids), documents=windows.documents
    )
    list(validation_batches(counted, CAUSAL, 4, 12, np.arange(12), limit))
    groups = np.concatenate(ids_read).reshape(-1, 4)
    groups = groups[(groups >= 0).any(axis=1)]
    assert min(limit, len(windows)) <= (groups >= 0).sum() < limit + 4
    order = validation_order(windows.documents, 4)
    place = {tuple(group): number for number, group in enumerate(order.tolist())}
    scored = sorted({place[tuple(group)] for group in groups.tolist()})
    assert len(scored) == len(groups)
    assert np.diff([-1, *scored, len(order)]).max() <= 3 * len(order) / len(groups) + 1


def test_groups_of_the_standard_library_share_no_documents(data_directory: Path) -> None:
    """With the group size and context length of the demo."""
    tokenizer = load_tokenizer("bytes")
    validation = open_windows(NAME, "validation", tokenizer, 128, data_directory)
    order = validation_order(validation.documents, 32)
    assert not groups_sharing_documents(validation.documents, order).any()
    assert (order >= 0).mean() > 0.97
    test = open_windows(NAME, "test", tokenizer, 128, data_directory)
    assert (validation_order(test.documents, 32) >= 0).mean() > 0.65
    train = open_windows(NAME, "train", tokenizer, 128, data_directory)
    training = TrainingOrder(train.documents, 32, seed=0)
    groups = training.window_ids(0, training.groups_per_epoch * 32).reshape(-1, 32)
    assert not groups_sharing_documents(train.documents, groups).any()


def test_hidden_tokens_are_fixed_in_validation_and_new_in_each_training_epoch(windows: Windows) -> None:
    first, again = (list(validation_batches(windows, MASKED, 4, 12, np.arange(12), None)) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert_same(a, b)
    order = TrainingOrder(windows.documents, 4, seed=3)
    per_epoch = order.groups_per_epoch // 3
    batches = train_batches(windows, order, MASKED, 12, np.arange(12), 0)
    seen = [next(batches).sequences for _ in range(2 * per_epoch)]
    batches.close()
    hidden = {batch.targets[i].tobytes() + batch.target_mask[i].tobytes() for batch in seen for i in range(12)}
    assert len(hidden) > 0.6 * 12 * len(seen)  # of 8 tokens, the same may be hidden by chance
