"""Objectives: inputs, targets and masks from windows."""

import numpy as np
import pytest

from mot_jax.data.objectives import VALIDATION, Batch, Objective
from mot_jax.data.windows import WindowBatch

EOT, MASK, V, S = 256, 257, 257, 40


def objective(masked: bool = True, document_mask: bool = False, mask_rate: float = 0.15, seed: int = 0) -> Objective:
    return Objective(masked, document_mask, mask_rate, seed, V, MASK, EOT)


def windows(sequences: int = 3) -> WindowBatch:
    """Random tokens; the second sequence ends early, the third is empty."""
    tokens = np.random.default_rng(0).integers(0, EOT, (sequences, S + 1)).astype(np.int32)
    mask = np.ones((sequences, S), bool)
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


def large_batch(mask_rate: float = 0.15, first: int = 0, **kind) -> Batch:
    tokens = np.random.default_rng(1).integers(0, EOT, (2000, 129)).astype(np.int32)
    return objective(mask_rate=mask_rate)(
        WindowBatch(tokens, np.ones((2000, 128), bool)), first + np.arange(2000), **kind
    )


@pytest.mark.parametrize("mask_rate", [0.15, 0.4, 1.0])
def test_fractions_of_masked_random_and_unchanged_tokens(mask_rate):
    """80 % masked, 10 % random, 10 % unchanged; the tolerance is six standard deviations."""
    batch = large_batch(mask_rate)
    chosen = batch.target_mask
    count = chosen.sum()
    assert chosen.mean() == pytest.approx(mask_rate, abs=6 * np.sqrt(0.25 / chosen.size))
    tolerance = 6 * np.sqrt(0.25 / count)
    assert (batch.inputs[chosen] == MASK).mean() == pytest.approx(0.8, abs=tolerance)
    other = (batch.inputs != batch.targets) & (batch.inputs != MASK)
    assert other.sum() / count == pytest.approx(0.1 * (1 - 1 / V), abs=tolerance)
    assert set(np.unique(batch.inputs[other])) == set(range(V))


def test_random_choices_depend_only_on_the_example():
    """Independent of the batch; different in each epoch, in validation and with another seed."""
    whole, later, unseen = large_batch(), large_batch(first=2000), large_batch(split=VALIDATION)
    tokens = np.random.default_rng(1).integers(0, EOT, (2000, 129)).astype(np.int32)
    part = objective()(WindowBatch(tokens[5:7], np.ones((2, 128), bool)), np.array([5, 6]))
    for actual, expected in zip(part[:4], whole[:4], strict=True):
        np.testing.assert_array_equal(actual, expected[5:7])
    for other in (later, unseen):
        assert 0.2 < (other.target_mask != whole.target_mask).mean() < 0.3
    np.testing.assert_array_equal(large_batch(split=VALIDATION).inputs, unseen.inputs)
