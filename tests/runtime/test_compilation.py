"""Compiled programs are found again by the next process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mot_jax.runtime import compilation

ROOT = Path(__file__).parents[2]
COMPILE = """
import sys
from mot_jax.runtime import compilation
compilation.enable_cache()
import jax
from mot_jax.config import Config, MeshConfig
from mot_jax.nn.sharding import make_mesh
devices = int(sys.argv[1])
jax.config.update("jax_num_cpu_devices", 2)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
jax.jit(lambda x: x - 1)(1)  # JAX looks whether to use its cache
before = len(events)
make_mesh(Config(mesh=MeshConfig(data=devices)))
jax.jit(lambda x: x + 1)(1)
print("cache_hits" in events[before:])
"""


def found(home: Path, devices: int = 1, **environment: str) -> bool:
    """Whether a process with this home, and a mesh of so many CPU devices, finds its program there."""
    paths = os.pathsep.join(p for p in sys.path if p)
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    own = {"HOME": str(home), "PYTHONPATH": paths, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **environment}
    command = [sys.executable, "-c", COMPILE, str(devices)]
    done = subprocess.run(command, env=inherited | own, check=True, capture_output=True, text=True)
    return done.stdout.strip() == "True"


@pytest.mark.slow
def test_the_next_process_finds_what_this_one_compiled(tmp_path):
    assert not found(tmp_path)
    assert found(tmp_path)
    assert not found(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")


def test_programs_of_several_cpu_devices_are_not_read_back(tmp_path):
    """XLA would read them without the order of their collectives, and devices would wait for each other forever."""
    directory = tmp_path / ".cache/mot_jax/compiled"
    kept = []
    for _ in range(2):
        assert not found(tmp_path, devices=2)
        kept.append(sorted(file.name for file in directory.glob("*-cache")))
    assert kept[0] == kept[1] and len(kept[0]) == 1  # programs compiled before the mesh was made


def test_a_directory_that_the_user_names_is_taken(tmp_path):
    assert not found(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert any((tmp_path / "own").iterdir())
    assert not (tmp_path / ".cache").exists()


def test_without_a_directory_to_write_to_it_goes_on(tmp_path):
    (tmp_path / ".cache").write_text("a file")
    assert not found(tmp_path)


def test_what_was_used_longest_ago_is_forgotten_first(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(compilation, "MAX_CACHE_BYTES", 25)
    directory = tmp_path / ".cache/mot_jax/compiled"
    directory.mkdir(parents=True)
    for name, written, used in (("a", 1, 9), ("b", 2, 2), ("c", 3, 3), ("d", 4, 4)):
        file = directory / f"{name}-cache"
        file.write_bytes(bytes(10))
        os.utime(file, (used, written))
    compilation.enable_cache()
    assert sorted(file.name for file in directory.iterdir()) == ["a-cache", "d-cache"]


@pytest.mark.slow
def test_commands_do_not_depend_on_the_dtypes_and_promotion_of_the_environment():
    program = (
        "from mot_jax.cli import main\n"
        "main(['describe', 'configs/demo.py'])\n"
        "import jax\n"
        "print(jax.config.jax_enable_x64, jax.config.jax_numpy_rank_promotion, jax.config.jax_numpy_dtype_promotion)"
    )
    variables = {
        "JAX_ENABLE_X64": "1",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=True)
    assert output.stdout.splitlines()[-1] == "False allow standard"
