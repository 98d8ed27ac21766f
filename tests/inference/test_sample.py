"""The sample at the end of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from mot_jax.config import Config
from mot_jax.data.corpora import Corpus
from mot_jax.data.tokenizers import ByteTokenizer
from mot_jax.data.windows import Windows, open_windows
from mot_jax.errors import UserError
from mot_jax.inference.sample import SampleHook
from mot_jax.nn.transformer import init_params

TOKENIZER = ByteTokenizer()


def windows(config: Config, directory: Path) -> Windows:
    """At least one window of each of four documents."""
    records = [{"name": f"{i}.txt".encode(), "text": f"def f{i}(): pass".encode()} for i in range(4)]
    corpus = Corpus("functions", "validation", "1", "fingerprint", records)
    return open_windows(corpus, "validation", TOKENIZER, config.model.context_length, epath.Path(directory))


def end(config: Config, directory: Path, scale: float = 1.0) -> str:
    """The sample of a run on one device that ends with its initial parameters times `scale`."""
    params = {name: value * scale for name, value in init_params(config.model, jax.random.key(0, impl="rbg")).items()}
    run = SimpleNamespace(
        config=config,
        mesh=None,
        workdir=epath.Path(directory),
        tokenizer=TOKENIZER,
        validation_windows=windows(config, directory),
    )
    SampleHook().at_end(SimpleNamespace(run=run, state=SimpleNamespace(variables=params)))
    return (directory / "sample.txt").read_text()


@pytest.mark.slow
def test_a_diverged_model_has_no_sample(tiny: Config, tmp_path: Path):
    sample = end(tiny, tmp_path, jnp.nan)
    assert sample.startswith(
        "no sample: model after 12 steps, mode grouped: its outputs have values that are not finite"
    )


@pytest.mark.slow
def test_another_error_of_the_sample_is_not_hidden(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def sample_of_no_prompt(*_):
        raise UserError("prompt = '': is empty")

    monkeypatch.setattr("mot_jax.inference.sample.sample_text", sample_of_no_prompt)
    with pytest.raises(UserError, match="is empty"):
        end(tiny, tmp_path)
    assert not (tmp_path / "sample.txt").exists()


@pytest.mark.slow
def test_a_context_of_one_token_has_a_sample(tiny: Config, tmp_path: Path):
    config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, context_length=1, loss_chunk=1))
    assert "--- continued" in end(config, tmp_path)
