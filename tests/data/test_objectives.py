"""From windows to what a model reads and predicts."""

import numpy as np
import pytest

from mot_jax.data.objectives import VALIDATION, Batch, Objective
from mot_jax.data.windows import WindowBatch

EOT, MASK, V, S = 256, 257, 257, 40


def objective(masked: bool = True, document_mask: bool = False, share: float = 0.15, seed: int = 0) -> Objective:
    return Objective(masked, document_mask, share, seed, V, MASK, EOT)


def windows(rows: int = 3) -> WindowBatch:
    """Random text; the second row ends early, the third is absent."""
    tokens = np.random.default_rng(0).integers(0, EOT, (rows, S + 1)).astype(np.int32)
    mask = np.ones((rows, S), bool)
    tokens[1, 11:], mask[1, 10:] = EOT, False
    tokens[2], mask[2] = EOT, False
    return WindowBatch(tokens, mask)


def test_causal_predicts_the_next_token():
    tokens, mask = windows()
    batch = objective(masked=False)(windows(), np.arange(3))
    np.testing.assert_array_equal(batch.inputs, tokens[:, :-1])
    np.testing.assert_array_equal(batch.targets, tokens[:, 1:])
    np.testing.assert_array_equal(batch.token_mask, mask)
    np.testing.assert_array_equal(batch.target_mask, mask)
    assert batch.segments is None


def test_segments_begin_with_each_end_of_text():
    text = np.array([[5, EOT, 6, 7, EOT, EOT, 8, 9]], np.int32)
    batch = objective(masked=False, document_mask=True)(WindowBatch(text, text[:, 1:] >= 0), np.arange(1))
    np.testing.assert_array_equal(batch.segments, [[0, 1, 1, 1, 2, 3, 3]])


def test_masked_reads_every_token_of_the_window_but_the_last():
    tokens, _ = windows()
    batch = objective()(windows(), np.arange(3))
    np.testing.assert_array_equal(batch.targets, tokens[:, :-1])
    np.testing.assert_array_equal(batch.token_mask.sum(axis=1), [S, 11, 0])
    assert not batch.target_mask[~batch.token_mask].any(), "padding is never to be predicted"
    np.testing.assert_array_equal(batch.inputs[~batch.target_mask], batch.targets[~batch.target_mask])


def many(share: float = 0.15, first: int = 0, **kind) -> Batch:
    tokens = np.random.default_rng(1).integers(0, EOT, (2000, 129)).astype(np.int32)
    return objective(share=share)(WindowBatch(tokens, np.ones((2000, 128), bool)), first + np.arange(2000), **kind)


@pytest.mark.parametrize("share", [0.15, 0.4, 1.0])
def test_shares_are_those_of_the_objective(share):
    """80 % masked, 10 % random, 10 % as they are; six standard deviations of room."""
    batch = many(share)
    chosen = batch.target_mask
    count = chosen.sum()
    assert chosen.mean() == pytest.approx(share, abs=6 * np.sqrt(0.25 / chosen.size))
    room = 6 * np.sqrt(0.25 / count)
    assert (batch.inputs[chosen] == MASK).mean() == pytest.approx(0.8, abs=room)
    other = (batch.inputs != batch.targets) & (batch.inputs != MASK)
    assert other.sum() / count == pytest.approx(0.1 * (1 - 1 / V), abs=room)
    assert set(np.unique(batch.inputs[other])) == set(range(V))


def test_randomness_is_of_the_example_alone():
    """Not of the batch that it comes in; new in each epoch; other in validation, and with another seed."""
    whole, later, unseen = many(), many(first=2000), many(split=VALIDATION)
    tokens = np.random.default_rng(1).integers(0, EOT, (2000, 129)).astype(np.int32)
    part = objective()(WindowBatch(tokens[5:7], np.ones((2, 128), bool)), np.array([5, 6]))
    for found, expected in zip(part[:4], whole[:4], strict=True):
        np.testing.assert_array_equal(found, expected[5:7])
    for other in (later, unseen):
        assert 0.2 < (other.target_mask != whole.target_mask).mean() < 0.3
    np.testing.assert_array_equal(many(split=VALIDATION).inputs, unseen.inputs)
