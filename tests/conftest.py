"""Eight virtual CPU devices, or GPUs; deterministic property tests, and the fixtures that the test files share.

`pytest -m gpu` runs the tests with this marker on NVIDIA GPUs, and skips them where there is none, unless the
environment variable MOT_TEST_DEVICE is `cpu`. Without `-m gpu` they run on the CPU as all others.
"""

import functools
import math
import os
import signal
import time

# Set before JAX is imported. A platform that is set in the environment takes precedence.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests spend more time on compiling than on computing. Processes that they start inherit this.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # it queries over gRPC, and the tests' store has none

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from jax.experimental.compilation_cache import compilation_cache

from mot_jax.config import files, hints
from mot_jax.cost.feed_forward import COSTS
from mot_jax.nn.feed_forward import KINDS
from mot_jax.nn.sharding import AXES
from mot_jax.runtime.compilation import disable_cache_for_cpu_mesh
from mot_jax.training import evaluation, trainer
from mot_jax.training.step import make_eval_step, make_train_step

pytest_plugins = ["tiny_run"]
NVIDIA_DRIVER = "/dev/nvidiactl"
jax.config.update("jax_num_cpu_devices", 8)
# A shell starts its background jobs with SIGINT ignored, which the processes of tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, so that failures are reproducible. No deadline: the first example includes compiling.
settings.register_profile(
    "mot_jax",
    deadline=None,
    max_examples=25,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("mot_jax")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache_directory(tmp_path_factory):
    """Share compiled programs between tests, many of which compile the same ones."""
    jax.devices()  # initialized now: a test that plans for fewer virtual devices would change their number
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent  # shared by all workers
    jax.config.update("jax_compilation_cache_dir", str(directory / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    # For processes that tests start:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(autouse=True)
def restore_compilation_cache():
    """Turn the compilation cache on again after a test with a mesh, which turns it off."""
    before = jax.config.jax_enable_compilation_cache
    yield
    if jax.config.jax_enable_compilation_cache != before:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def registered_kinds():
    """Forget the kinds that a test has registered."""
    tables = (KINDS, COSTS, hints._ADDED)
    before = [dict(table) for table in tables]
    yield
    if before[-1] != hints._ADDED:
        for table, content in zip(tables, before, strict=True):
            table.clear()
            table.update(content)
        files._execute.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def compiled_programs():
    """Free the programs of a file: each has several memory maps, of which Linux allows a process 65,530 by default."""
    yield
    jax.clear_caches()


_train_step = functools.lru_cache(maxsize=8)(make_train_step)


@functools.lru_cache(maxsize=8)
def _eval_step(model, token_bytes):
    return make_eval_step(model, np.array(token_bytes))


@pytest.fixture(autouse=True)
def shared_programs(request):
    """Let equal training runs of a file share their traced and compiled programs.

    Not in tests that may replace parts of the program or compile with other options, nor in those with the fixture
    `separate_programs`.
    """
    if {"monkeypatch", "optimized", "separate_programs"} & set(request.fixturenames):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_train_step", _train_step)
        patch.setattr(evaluation, "make_eval_step", lambda model, sizes: _eval_step(model, tuple(sizes.tolist())))
        yield


@pytest.fixture
def separate_programs():
    """Trace and compile each run of the test by itself, as processes do."""


@pytest.fixture
def optimized():
    """Compile with all optimizations, as for users: for tests of results to the last bit, or nearly."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def mesh_of():
    """mesh_of(data=1, fsdp=1, expert=1, tensor=1) makes the Explicit mesh of that shape over the first devices."""

    def make(**sizes: int) -> jax.sharding.Mesh:
        shape = [sizes.get(axis, 1) for axis in AXES]
        types = (jax.sharding.AxisType.Explicit,) * len(AXES)
        mesh = jax.make_mesh(shape, AXES, axis_types=types, devices=jax.devices()[: math.prod(shape)])
        disable_cache_for_cpu_mesh(mesh)
        return mesh

    return make


def _for_gpus(config: pytest.Config) -> bool:
    return config.option.markexpr == "gpu" and os.environ.get("MOT_TEST_DEVICE") != "cpu"


def pytest_configure(config: pytest.Config) -> None:
    """Let JAX use the GPUs for `-m gpu`: with results that do not depend on the run, and a CPU for references.

    Processes that tests start inherit this, and need memory of the GPU as well.
    """
    if _for_gpus(config) and os.path.exists(NVIDIA_DRIVER):
        os.environ |= {"JAX_PLATFORMS": "cuda,cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
        jax.config.update("jax_platforms", "cuda,cpu")
        jax.config.update("jax_disable_most_optimizations", False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests that begin after the time MOT_TEST_UNTIL, in seconds since 1970: `.ci/run` has a limit."""
    if time.time() > float(os.environ.get("MOT_TEST_UNTIL") or "inf"):
        pytest.skip("the time MOT_TEST_UNTIL has passed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the properties of all kinds first, which no limit of time should skip, and then the files with whole runs.

    At the end, one of these would leave the other processes without work.
    """
    if _for_gpus(config) and not os.path.exists(NVIDIA_DRIVER):
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, or MOT_TEST_DEVICE=cpu"))
    first = ("/test_every_kind.py", "/runtime/", "/training/", "/runs/")
    items.sort(key=lambda item: next((rank for rank, name in enumerate(first) if name in item.nodeid), len(first)))
