"""`import mot_jax`: its public names, which import JAX only when they are used."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mot_jax
from mot_jax.config import LoggingConfig


def test_every_public_name_is_there():
    for name in mot_jax.__all__:
        assert getattr(mot_jax, name) is not None
    assert not hasattr(mot_jax, "model")


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [2, 0])
def test_train_writes_a_sample_unless_its_length_is_0(tiny, tmp_path, monkeypatch, tokens):
    monkeypatch.setattr("mot_jax.inference.sample.sample_text", lambda *_: "a text")
    logging = LoggingConfig(tensorboard=False, sample_tokens=tokens)
    data = dataclasses.replace(tiny.data, validation_split="validation[:1%]")
    training = dataclasses.replace(tiny.training, steps=1)
    row = mot_jax.train(dataclasses.replace(tiny, data=data, training=training, logging=logging), tmp_path / "run")
    assert row["step"] == 1 and (tmp_path / "run" / "sample.txt").exists() == bool(tokens)


def test_the_version_and_the_marker_of_typed_packages():
    assert re.match(r"\d+\.\d+", mot_jax.__version__)
    assert (Path(mot_jax.__file__).parent / "py.typed").exists()


def test_importing_the_package_does_not_import_jax():
    code = "import sys, mot_jax; assert mot_jax.__version__ and mot_jax.Config; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
