"""Checkpoints: Orbax, asynchronous, atomic; each holds all that is needed to go on."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
from types import TracebackType

import jax
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from mot_jax.config import Config, ConfigError, error_words, to_json
from mot_jax.training.state import TrainState, abstract_state
from mot_jax.training.stores import orbax_path

_PACKAGES = ("mot_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Checkpoints:
    """The checkpoints of one run, `<directory>/<step>`; a context manager that waits for the last save.

    Each holds the state, and as metadata the next example of the global order, the config and the versions. What a
    killed save left behind is removed on opening.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it also raises, and much else
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
        ConfigError for a checkpoint of another state, or a damaged one.
        """
        about = self._checkpointer.metadata(step).custom_metadata
        now = versions()
        try:
            state = self._checkpointer.load(step, abstract_state(config, mesh)._asdict())
        except jax.errors.JaxRuntimeError:  # a lost process, say
            raise
        except Exception as error:  # Orbax raises whatever its parts do
            wrote = about["versions"].get("mot_jax")
            raise ConfigError(
                f"workdir = {self._directory.parent}: its checkpoint {step} cannot be read into this config's state "
                f"({error_words(error)}); it was written by mot_jax {wrote}, here is {now['mot_jax']}; if it is "
                f"damaged, remove {self._directory / str(step)}, and the run goes on from the one before"
            ) from error
        changed = [f"{k}: {v} then, {now.get(k)} now" for k, v in about["versions"].items() if v != now.get(k)]
        return TrainState(**state), int(about["next_example"]), changed

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
