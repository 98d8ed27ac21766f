"""The platforms of JAX: a command selects CPUs where there can be no accelerator."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mot_jax.runtime import platforms

ROOT = Path(__file__).parents[2]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without accelerators, plugins and variables, on which libtpu is installed; its directory of devices."""
    for name in os.environ:
        if name == "JAX_PLATFORMS" or name.startswith(platforms._VARIABLES):
            monkeypatch.delenv(name)
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu" / "__init__.py").touch()
    (tmp_path / "dev").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(platforms, "_DEVICE_FILES", (f"{tmp_path}/dev/accel*",))
    if importlib.util.find_spec("jax_plugins") is not None:
        pytest.skip("a plugin of JAX is installed")
    return tmp_path


def install_plugin(machine: Path, name: str) -> None:
    (machine / "jax_plugins" / name).mkdir(parents=True)
    (machine / "jax_plugins" / name / "__init__.py").touch()
    importlib.invalidate_caches()


def selected() -> str | None:
    platforms.skip_absent_accelerators()
    return os.environ.get("JAX_PLATFORMS")


def test_without_any_accelerator_the_platform_is_cpu(machine, monkeypatch):
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH"):  # set by importing JAX
        monkeypatch.setenv(name, "1")
    assert platforms.only_cpus() and selected() == "cpu"


def test_an_accelerator_is_not_hidden(machine, monkeypatch):
    def is_left_alone() -> bool:
        return not platforms.only_cpus() and selected() is None

    with monkeypatch.context() as patch:
        patch.setenv("TPU_WORKER_ID", "0")
        assert is_left_alone()
    (machine / "dev" / "accel0").touch()
    assert is_left_alone()
    (machine / "dev" / "accel0").unlink()
    install_plugin(machine, "other")
    assert is_left_alone()


def test_the_cuda_plugin_alone_is_no_gpu(machine):
    (machine / "libtpu" / "__init__.py").unlink()
    (machine / "libtpu").rmdir()
    install_plugin(machine, "xla_cuda13")
    (machine / "dev" / "accel0").touch()
    assert not platforms.only_cpus() and selected() is None
    (machine / "dev" / "accel0").unlink()
    assert platforms.only_cpus() and selected() == "cpu"


@pytest.mark.parametrize(("named", "cpus"), [("cuda,cpu", False), ("tpu", False), ("cpu", True)])
def test_a_platform_that_is_set_stays(machine, monkeypatch, named, cpus):
    monkeypatch.setenv("JAX_PLATFORMS", named)
    assert platforms.only_cpus() == cpus and selected() == named


def test_without_libtpu_nothing_is_set(machine):
    (machine / "libtpu" / "__init__.py").unlink()
    (machine / "libtpu").rmdir()
    importlib.invalidate_caches()
    if importlib.util.find_spec("libtpu") is not None:
        pytest.skip("libtpu is installed")
    assert platforms.only_cpus() and selected() is None


@pytest.mark.slow  # as all tests that need libtpu or the CUDA plugin
@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("libtpu", "jax_plugins"))), reason="needs libtpu or XLA's CUDA plugin"
)
@pytest.mark.skipif(any(map(platforms.glob.glob, platforms._DEVICE_FILES)), reason="an accelerator may be attached")
def test_a_command_prints_no_errors_of_absent_accelerators():
    code = "from mot_jax import cli; cli.COMMANDS['list'] = lambda _: print(__import__('jax').devices()); cli.main()"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run([sys.executable, "-c", code, "list"], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "CpuDevice" in result.stdout
