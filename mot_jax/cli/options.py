"""Options that several commands share: JSON output, and the place of this process among others."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from mot_jax.cli.parsing import OutputFileOrNone
from mot_jax.config import Config
from mot_jax.errors import UserError, error_words
from mot_jax.runtime import distributed, strict_json
from mot_jax.runtime.paths import user_path


def write_json(path: str, content: dict) -> None:
    try:
        user_path("--json", path).write_text(strict_json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"--json = {path}: cannot be written ({error.strerror or error_words(error)}); try result.json"
        ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonOptions:
    """Output of a command as JSON."""

    json: OutputFileOrNone = None
    """File for the results as JSON, in addition to the printed ones."""


# --- several processes -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """Description of this process, one of several of a run."""

    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Address of process 0, if the command runs in several processes. None: from the cluster's environment."""
    num_processes: Annotated[str | None, tyro.conf.arg(metavar="N")] = None
    """Number of processes. 1: a single process, also in a cluster. None: from the cluster's environment."""
    process_id: Annotated[str | None, tyro.conf.arg(metavar="N")] = None
    """Index of this process, from 0. None: from the cluster's environment."""


def process(options: ProcessOptions, config: Config) -> distributed.Process | None:
    """This process, of several, by the flags or else by the cluster."""
    named = distributed.from_flags(options.coordinator, options.num_processes, options.process_id)
    return named or distributed.detect(config.mesh.wait_seconds)
