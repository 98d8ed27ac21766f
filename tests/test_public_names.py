"""`import mot_jax`: its public names, which import JAX only when they are used."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import mot_jax
from mot_jax import training


def test_every_public_name_is_there():
    for name in mot_jax.__all__:
        assert getattr(mot_jax, name) is not None
    assert mot_jax.train is training.train
    assert not hasattr(mot_jax, "model")


def test_the_version_and_the_marker_of_typed_packages():
    assert re.match(r"\d+\.\d+", mot_jax.__version__)
    assert (Path(mot_jax.__file__).parent / "py.typed").exists()


def test_importing_the_package_does_not_import_jax():
    code = "import sys, mot_jax; assert mot_jax.__version__ and mot_jax.Config; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
