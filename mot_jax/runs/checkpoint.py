"""Checkpoints: Orbax, asynchronous, atomic; each holds all that is needed to go on."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from types import TracebackType

import jax
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from mot_jax.config import Config, to_json
from mot_jax.runs.state import TrainState, abstract_state
from mot_jax.runs.stores import orbax_path, quieten, unreadable

_PACKAGES = ("mot_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Checkpoints:
    """The checkpoints of one run, `<directory>/<step>`; a context manager that waits for the last save.

    Each holds the state, and as metadata the next example of the global order, the config and the versions. What a
    killed save left behind is removed on opening.
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
        """Begins to save. Returns as soon as the state is copied; errors of a save appear in the next one or `wait`."""
        self.wait()
        about = {"next_example": next_example, "config": json.loads(to_json(config)), "versions": versions()}
        self._saving = self._checkpointer.save_async(step, state._asdict(), custom_metadata=about)

    def wait(self) -> None:
        """Returns when the last save is complete; raises what went wrong in it."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def restore(self, step: int, config: Config, mesh: Mesh) -> tuple[TrainState, int, list[str]]:
        """A checkpoint's state, on this mesh, whichever it was saved from, and its next example.

        Also a line for each version that has changed since: then numbers may differ in their last bits. Raises
        UserError for a checkpoint of another state, or a damaged one; RetryableError if it cannot be read now.
        """
        now = versions()
        try:
            about = self._checkpointer.metadata(step).custom_metadata
            if not about:
                raise ValueError("its metadata is missing or damaged")
            then, next_example = dict(about["versions"]), int(about["next_example"])
            state = self._checkpointer.load(step, abstract_state(config, mesh)._asdict())
        except jax.errors.JaxRuntimeError:  # a lost process, say
            raise
        except Exception as error:  # Orbax raises whatever its parts do
            words = f"cannot be read into this config's state by mot_jax {now['mot_jax']}"
            raise unreadable(self._directory / str(step), error, words) from error
        changed = [f"{k}: {v} then, {now.get(k)} now" for k, v in then.items() if v != now.get(k)]
        return TrainState(**state), next_example, changed

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.wait()
        finally:
            self._checkpointer.close()


def versions() -> dict[str, str]:
    """Of Python, the platform and the packages that the numbers depend on."""
    found = {"python": platform.python_version(), "platform": jax.default_backend()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
