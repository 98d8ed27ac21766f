"""Continuations for people to read."""

import dataclasses

import jax
import numpy as np
from jax.sharding import NamedSharding

from mot_jax.config import MixtureOfTokensConfig, ModelConfig
from mot_jax.inference.sample import sample
from mot_jax.model import init_params
from mot_jax.sharding import parameter_spec, place_rows

MODEL = ModelConfig(
    1, 16, 32, 2, context_length=12, loss_chunk=12, feed_forward=MixtureOfTokensConfig(4, 8), document_mask=True
)


def test_a_document_that_has_ended_is_forgotten():
    """With documents kept apart, what comes before an end of text changes no bit of what is written after it."""
    params = init_params(MODEL, jax.random.key(0, impl="rbg"))
    params = {name: 4 * value for name, value in params.items()}  # decided enough to be changed
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 256, (4, 8)).astype(np.int32)
    prompts[:, 4] = 256  # in every row of the group: rows hear each other
    other = prompts.copy()
    other[0, :4] = rng.integers(0, 256, 4)

    def write(model: ModelConfig, prompts: np.ndarray) -> np.ndarray:
        key, present = jax.random.key(1), np.ones(4, bool)
        return np.asarray(sample(model, params, prompts, present, key, length=4, vocab_size=257, end_of_text=256))[
            :, 8:
        ]

    before, after = write(MODEL, prompts), write(MODEL, other)
    np.testing.assert_array_equal(before, after)
    assert before.max() < 257 and before.shape == (4, 4)
    joined = dataclasses.replace(MODEL, document_mask=False)
    assert (write(joined, prompts) != write(joined, other)).any()


def test_a_mesh_writes_what_one_device_writes(mesh_of):
    """Groups that span devices, positions spread over `tensor`."""
    params = {name: 4 * value for name, value in init_params(MODEL, jax.random.key(0, impl="rbg")).items()}
    prompts, present = np.random.default_rng(0).integers(0, 256, (4, 8)).astype(np.int32), np.ones(4, bool)
    sizes = {"length": 6, "vocab_size": 257, "end_of_text": 256}
    expected = np.asarray(sample(MODEL, params, prompts, present, jax.random.key(1), **sizes))
    mesh = mesh_of(expert=2, tensor=2)
    with jax.set_mesh(mesh):
        where = {name: NamedSharding(mesh, parameter_spec(name, v.ndim)) for name, v in params.items()}
        placed = place_rows(mesh, (prompts, present), 4)
        found = sample(MODEL, jax.device_put(params, where), *placed, jax.random.key(1), **sizes)
    np.testing.assert_array_equal(found, expected)
