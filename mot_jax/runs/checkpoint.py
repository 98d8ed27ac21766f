"""Checkpoints, written by Orbax: asynchronous, atomic, each sufficient to resume the run."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from types import TracebackType
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from mot_jax.config import Config, to_json
from mot_jax.runs.state import COUNTERS, TrainState, abstract_state, state_of
from mot_jax.runs.stores import orbax_path, quieten, unreadable

_PACKAGES = ("mot_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Restored(NamedTuple):
    """A checkpoint that was loaded.

    next_example: index of the next training example. config: that of the run when it saved the checkpoint, as in
    `config.json`. changes: a line for each package version that has changed since.
    """

    state: TrainState
    next_example: int
    config: dict[str, Any]
    changes: list[str]


class Checkpoints:
    """The checkpoints of one run, `<directory>/<step>`; a context manager that waits for the last save.

    Each has the state, and as metadata the index of the next training example, the config and the package versions.
    Opening removes the remains of interrupted saves.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2):
        quieten()
        training, self._directory = ocp.training, epath.Path(directory)
        self._checkpointer = training.Checkpointer(
            orbax_path(self._directory),
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._saving: ocp.AsyncResponse[bool] | None = None

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, next_example: int, config: Config) -> None:
        """Begin to save; return as soon as the state is copied. The next `save` or `wait` raises the errors of this."""
        self.wait()
        metadata = {"next_example": next_example, "config": json.loads(to_json(config)), "versions": versions()}
        self._saving = self._checkpointer.save_async(step, state._asdict(), custom_metadata=metadata)

    def wait(self) -> None:
        """Wait until the last save is complete, and raise its error, if any."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def restore(self, step: int, config: Config, mesh: Mesh) -> Restored:
        """Load a checkpoint onto a mesh, which may differ from the one it was saved from.

        Numbers may differ in their last bits if versions of packages have changed since.

        Raises:
            UserError: for a checkpoint of another state, or a damaged one.
            RetryableError: if it cannot be read now.
        """
        current = versions()
        try:
            metadata = self._checkpointer.metadata(step)
            custom = metadata.custom_metadata
            if not custom:
                raise ValueError("its metadata is missing or damaged")
            saved, next_example, saved_config = custom["versions"], int(custom["next_example"]), custom["config"]
            abstract = abstract_state(config, mesh)._asdict()
            for name in COUNTERS:
                if metadata.metadata and name not in metadata.metadata:  # a checkpoint of an earlier version
                    del abstract[name]
            state = state_of(self._checkpointer.load(step, abstract))
        except jax.errors.JaxRuntimeError:  # for example a lost process
            raise
        except Exception as error:  # Orbax passes on all errors of the libraries below it
            problem = f"cannot be read into this config's state by mot_jax {current['mot_jax']}"
            raise unreadable(self._directory / str(step), error, problem) from error
        changes = [f"{k}: {v} then, {current.get(k)} now" for k, v in saved.items() if v != current.get(k)]
        return Restored(state, next_example, saved_config, changes)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.wait()
        finally:
            self._checkpointer.close()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that the numbers depend on, and the platform."""
    installed = {"python": platform.python_version(), "platform": jax.default_backend()}
    for package in _PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed
