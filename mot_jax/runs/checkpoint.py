"""Checkpoints, written by Orbax: asynchronous, atomic, checked by a manifest, each sufficient to resume the run."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import importlib.metadata
import itertools
import json
import platform
import sys
from types import TracebackType
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from mot_jax.config import CheckpointConfig, Config, to_json
from mot_jax.errors import ReportedError, RetryableError, UserError, error_words
from mot_jax.nn.sharding import host_device
from mot_jax.runs import manifest
from mot_jax.runs.restore import check_saved_config
from mot_jax.runs.state import TrainState, abstract_state, state_of
from mot_jax.runs.stores import by_itself, first_cause, orbax_path, quieten, unreadable
from mot_jax.runtime import distributed
from mot_jax.runtime.paths import FULL, is_passing, is_remote

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
        """Begin to save; return as soon as the state is copied. `check`, `wait` or the next `save` raises its errors.

        validation_loss: that of these parameters, in nats per token, if they were validated.
        """
        self.wait()
        metadata = {"next_example": next_example, "config": json.loads(to_json(config)), "versions": versions()}
        path = self._directory / str(step)
        # A checkpoint of this step is a damaged one, or one without a manifest.
        saving = ocp.save_async(path, state.content(), custom_metadata=metadata, overwrite=True)
        shapes = collections.Counter((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(state))
        key = f"manifest/{next(_saves)}"
        self._saving = self._thread.submit(self._complete, saving, path, shapes, key, validation_loss)

    def check(self) -> None:
        """Raise the error of the last save, if it has failed already."""
        if self._saving is not None and self._saving.done():
            self.wait()

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
        try:
            saving.result()
            if distributed.is_first():
                with by_itself():
                    leaves = jax.tree.leaves(ocp.metadata(path).metadata)
                if collections.Counter((leaf.shape, str(leaf.dtype)) for leaf in leaves) != shapes:
                    raise UserError(f"{path}: cannot be read back as it was saved; try a --workdir on another disk")
            manifest.write(path, key, validation_loss)
        except ReportedError:
            raise
        except Exception as error:
            cause = first_cause(error)
            passing = isinstance(cause, manifest.DamageError) or is_passing(cause)
            if passing or (isinstance(cause, OSError) and cause.errno is not None and cause.errno not in FULL):
                words = f"{path}: could not be saved ({error_words(cause)}); {self._resumption()}"
                raise (RetryableError if passing else UserError)(words) from error
            raise
        if distributed.is_first():
            try:
                self._remove_expired(int(path.name))
            except Exception as error:  # of no harm to the run; the next save tries again
                print(f"warning: {path.parent}: cannot remove old checkpoints ({error_words(error)})", file=sys.stderr)

    def _resumption(self) -> str:
        """A clause that names the last checkpoint, after a save has failed."""
        steps: list[int] = []
        with contextlib.suppress(OSError):  # of a directory that cannot be read either
            steps = manifest.steps_of(self._directory)
        last = f"resumes from its last checkpoint, {self._directory / str(steps[-1])}" if steps else "begins again"
        return f"the same command {last}"

    def _remove_expired(self, newest: int) -> None:
        """Remove the checkpoints that `CheckpointConfig` does not retain, now that `newest` is complete."""
        c = self._config
        steps = [step for step in manifest.steps_of(self._directory) if step <= newest]
        retained = set(steps[-c.max_to_keep :])
        if c.keep_every:  # the first one from each multiple on, since a save is postponed while steps are skipped
            intervals = [step // c.keep_every for step in [0, *steps]]
            retained |= {step for step, i, before in zip(steps, intervals[1:], intervals, strict=False) if i > before}
        if c.keep_best:
            losses = [(loss, -step) for step in steps if (loss := self._validation_loss(step)) is not None]
            retained |= {-step for _, step in sorted(losses)[: c.keep_best]}
        for step in manifest.committed_steps(self._directory):  # also those of interrupted saves and removals
            if step <= newest and step not in retained:
                path = self._directory / str(step)
                (path / manifest.FILE).unlink(missing_ok=True)  # first, since it is no checkpoint without it
                path.rmtree()

    def _validation_loss(self, step: int) -> float | None:
        try:
            return manifest.read(self._directory / str(step)).validation_loss
        except manifest.DamageError:
            return None

    def tidy(self, start: int, left_out: dict[int, str], first_save: bool = False) -> None:
        """Prepare the directory for saves: create it, and remove the remains of interrupted ones. Process 0 calls this.

        Checkpoints that are left out are renamed on a file system, and lose their manifest on an object store, so that
        they do not count as checkpoints, and no later one replaces those that are renamed.

        Args:
            start: the step of the checkpoint in which the run resumes; 0 for none.
            left_out: why newer checkpoints are left out, by step, as `newest_intact` returns them.
            first_save: whether the run may begin again if a checkpoint without a manifest is the only one.

        Raises:
            UserError: if all checkpoints are left out and the run may not begin again; or if one is of a newer format
                and cannot be renamed.
        """
        paths = {step: self._directory / str(step) for step in left_out}
        lines = manifest.left_out_lines(self._directory, left_out)
        one_interrupted = len(left_out) == 1 and not any((path / manifest.FILE).exists() for path in paths.values())
        if left_out and not start and not (one_interrupted and first_save):
            advice = f"try another workdir, or move {self._directory} away to begin again"
            raise UserError(*(f"{line}; {advice}" for line in lines))
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.iterdir() if self._directory.is_dir() else ():  # a store has no empty directories
            if ".orbax-checkpoint-tmp" in path.name or (
                is_remote(path) and path.name.isdecimal() and not (path / "commit_success.txt").exists()
            ):
                path.rmtree()
        for path, line in zip(paths.values(), lines, strict=True):
            if not is_remote(path):
                number = 1
                while (aside := self._directory / f"{path.name}.left-out-{number}").exists():
                    number += 1
                path.rename(aside)
            elif manifest.is_newer_format(path):
                raise UserError(f"{line}; try a newer mot_jax, or another workdir")
            elif (path / manifest.FILE).exists():
                (path / f"left_out_{manifest.FILE}").write_bytes((path / manifest.FILE).read_bytes())
                (path / manifest.FILE).unlink()

    def restore(self, step: int, config: Config, mesh: Mesh) -> Restored:
        """Load a checkpoint onto a mesh, which may differ from the one it was saved from.

        Numbers may differ in their last bits if versions of packages have changed since.

        Raises:
            UserError: for a checkpoint of another model or state, or a damaged one.
            RetryableError: if it cannot be read now.
        """
        current, path = versions(), self._directory / str(step)
        try:
            with by_itself():
                custom = ocp.metadata(path).custom_metadata
                if not custom:
                    raise ValueError("its metadata is missing or damaged")
                saved, next_example, saved_config = custom["versions"], int(custom["next_example"]), custom["config"]
                check_saved_config(path, saved_config, config)
                state = state_of(ocp.load(path, abstract_state(config, mesh).content()))
        except (ReportedError, jax.errors.JaxRuntimeError):  # the latter for example of a lost process
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


def adopt(checkpoint: epath.Path) -> None:
    """Write the manifest of a checkpoint that has none, after reading all its arrays into the memory of this machine.

    Raises UserError or RetryableError if they cannot be read.
    """
    quieten()
    checkpoint, device = orbax_path(checkpoint), jax.sharding.SingleDeviceSharding(host_device())
    try:
        with by_itself():
            leaves = ocp.metadata(checkpoint).metadata
            abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), leaves)
            jax.block_until_ready(ocp.load(checkpoint, abstract))
    except Exception as error:  # Orbax passes on all errors of the libraries below it
        raise unreadable(checkpoint, error, "cannot be read") from error
    manifest.write(checkpoint, f"manifest/{next(_saves)}")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that the numbers depend on, and the platform."""
    installed = {"python": platform.python_version(), "platform": jax.default_backend()}
    for package in _PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed
