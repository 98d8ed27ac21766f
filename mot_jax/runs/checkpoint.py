"""Checkpoints, written by Orbax: asynchronous, atomic, checked by a manifest, each sufficient to resume the run."""

from __future__ import annotations

import collections
import concurrent.futures
import importlib.metadata
import itertools
import json
import platform
from types import TracebackType
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from mot_jax.config import CheckpointConfig, Config, to_json
from mot_jax.errors import UserError
from mot_jax.runs import manifest
from mot_jax.runs.state import TrainState, abstract_state, state_of
from mot_jax.runs.stores import by_itself, orbax_path, quieten, unreadable
from mot_jax.runtime import distributed
from mot_jax.runtime.paths import is_remote

_PACKAGES = ("mot_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

_saves = itertools.count()  # the same in all processes


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

    Each has the state, as metadata the index of the next training example, the config and the package versions, and
    last of all a manifest (`runs/manifest.py`). Older ones are removed after the manifest of a new one is written, as
    `CheckpointConfig` defines. With several processes, each makes the same calls.
    """

    def __init__(self, directory: epath.PathLike, config: CheckpointConfig | None = None):
        quieten()
        self._directory, self._config = orbax_path(epath.Path(directory)), config or CheckpointConfig()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None

    def newest_intact(self) -> tuple[int | None, dict[int, str]]:
        """The step of the newest checkpoint that is as it was written, and why newer ones are left out, by step."""
        return manifest.newest_intact(self._directory, self._config.verify == "contents")

    def save(
        self, step: int, state: TrainState, next_example: int, config: Config, validation_loss: float | None = None
    ) -> None:
        """Begin to save; return as soon as the state is copied. The next `save` or `wait` raises the errors of this.

        validation_loss: that of these parameters, in nats per token, if they were validated.
        """
        self.wait()
        metadata = {
            "next_example": next_example,
            "config": json.loads(to_json(config)),
            "versions": versions(),
            "manifest": manifest.FORMAT,
        }
        path = self._directory / str(step)
        # A checkpoint of this step is a damaged one, or one without a manifest.
        saving = ocp.save_async(path, state._asdict(), custom_metadata=metadata, overwrite=True)
        shapes = collections.Counter((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(state))
        key = f"manifest/{next(_saves)}"
        self._saving = self._thread.submit(self._complete, saving, path, shapes, key, validation_loss)

    def wait(self) -> None:
        """Wait until the last save is complete, and raise its error, if any."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def _complete(
        self,
        saving: ocp.AsyncResponse[None],
        path: epath.Path,
        shapes: collections.Counter[tuple[tuple[int, ...], str]],
        key: str,
        validation_loss: float | None,
    ) -> None:
        """Wait until the files are written, read back their description, write the manifest, remove older steps."""
        saving.result()
        if distributed.is_first():
            with by_itself():
                leaves = jax.tree.leaves(ocp.metadata(path).metadata)
            if collections.Counter((leaf.shape, str(leaf.dtype)) for leaf in leaves) != shapes:
                raise UserError(f"{path}: cannot be read back as it was saved; try a --workdir on another disk")
        manifest.write(path, key, validation_loss)
        if distributed.is_first():
            self._remove_expired(int(path.name))

    def _remove_expired(self, newest: int) -> None:
        """Remove the checkpoints that `CheckpointConfig` does not retain, now that `newest` is complete."""
        c = self._config
        steps = [step for step in manifest.steps_of(self._directory) if step <= newest]
        retained = set(steps[-c.max_to_keep :])
        if c.keep_every:
            retained |= {step for step in steps if step % c.keep_every == 0}
        if c.keep_best:
            losses = [(loss, -step) for step in steps if (loss := self._validation_loss(step)) is not None]
            retained |= {-step for _, step in sorted(losses)[: c.keep_best]}
        for step in set(steps) - retained:
            (self._directory / str(step) / manifest.FILE).unlink()  # first, since it is no checkpoint without it
            (self._directory / str(step)).rmtree()

    def _validation_loss(self, step: int) -> float | None:
        try:
            return manifest.read(self._directory / str(step)).validation_loss
        except manifest.DamageError:
            return None

    def tidy(self, start: int, left_out: dict[int, str]) -> None:
        """Prepare the directory for saves: create it, and remove the remains of interrupted ones. Process 0 calls this.

        On a file system, checkpoints that are left out are renamed, so that no later one replaces them.

        Args:
            start: the step of the checkpoint in which the run resumes; 0 for none.
            left_out: the keys are the steps of newer checkpoints, as `newest_intact` returns them.

        Raises:
            UserError: if there is nothing but checkpoints of an earlier version, which had no manifests.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.iterdir():
            if ".orbax-checkpoint-tmp" in path.name or (
                is_remote(path) and path.name.isdecimal() and not (path / "commit_success.txt").exists()
            ):
                path.rmtree()
            elif path.name.isdecimal() and not start and not left_out and self._lacks_manifests(path):
                raise UserError(
                    f"workdir = {self._directory.parent}: its checkpoint {path.name} is of an earlier version of "
                    "mot_jax, which wrote no manifest.json; try that version, or another workdir"
                )
        for step in left_out if not is_remote(self._directory) else ():
            path, number = self._directory / str(step), 1
            while (aside := self._directory / f"{step}.left-out-{number}").exists():
                number += 1
            path.rename(aside)

    def _lacks_manifests(self, path: epath.Path) -> bool:
        """Whether a checkpoint is of a version that wrote no manifests, and not just without one."""
        try:
            with by_itself():
                return "manifest" not in (ocp.metadata(path).custom_metadata or {"manifest": 0})
        except Exception:  # not a checkpoint
            return False

    def restore(self, step: int, config: Config, mesh: Mesh) -> Restored:
        """Load a checkpoint onto a mesh, which may differ from the one it was saved from.

        Numbers may differ in their last bits if versions of packages have changed since.

        Raises:
            UserError: for a checkpoint of another state, or a damaged one.
            RetryableError: if it cannot be read now.
        """
        current, path = versions(), self._directory / str(step)
        try:
            custom = ocp.metadata(path).custom_metadata
            if not custom:
                raise ValueError("its metadata is missing or damaged")
            saved, next_example, saved_config = custom["versions"], int(custom["next_example"]), custom["config"]
            abstract = abstract_state(config, mesh)._asdict()
            state = state_of(ocp.load(path, abstract))
        except jax.errors.JaxRuntimeError:  # for example a lost process
            raise
        except Exception as error:  # Orbax passes on all errors of the libraries below it
            problem = f"cannot be read into this config's state by mot_jax {current['mot_jax']}"
            raise unreadable(path, error, problem) from error
        changes = [f"{k}: {v} then, {current.get(k)} now" for k, v in saved.items() if v != current.get(k)]
        return Restored(state, next_example, saved_config, changes)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that the numbers depend on, and the platform."""
    installed = {"python": platform.python_version(), "platform": jax.default_backend()}
    for package in _PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed
