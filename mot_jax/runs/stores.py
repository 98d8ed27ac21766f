"""Checkpoints on object stores, as Orbax writes them.

Orbax 0.12 supports `gs://`: TensorStore's driver writes the arrays, and a file that marks the checkpoint as complete is
written last, in place of a rename. TensorStore has a driver for `s3://` too, which Orbax does not use: this module
patches it so that it does.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from mot_jax.errors import RetryableError, UserError, error_words
from mot_jax.runtime.paths import is_passing, is_remote

_MAX_REASON = 200  # characters of an error of Orbax

_PRIVATE = (
    (gcs_utils, "_GCS_PATH_PREFIX"),
    (gcs_utils, "get_kvstore_for_gcs"),
    (tensorstore_utils, "_use_gcs_driver"),
    (tensorstore_utils, "_normalize_path"),
)


def quieten() -> None:
    """Silence Orbax, which logs the errors that it also raises, and asyncio, which logs those of tasks Orbax leaves."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def by_itself() -> ocp.Context:
    """A context in which Orbax reads in this process alone.

    A process that cannot read would leave the others at a barrier of Orbax for five minutes.
    """
    context = ocp.Context()
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    return context


def first_cause(error: Exception) -> Exception:
    """The first error in the chain of an error of Orbax."""
    while isinstance(cause := error.__cause__ or error.__context__, Exception):
        error = cause
    return error


def unreadable(checkpoint: epath.Path, error: Exception, problem: str) -> UserError | RetryableError:
    """The error to raise for a checkpoint that Orbax cannot read: a RetryableError if its disk or store failed.

    problem: the predicate of the message otherwise. The reason given is the first error in the chain of Orbax.
    """
    error = first_cause(error)
    reason = error_words(error)
    reason = reason if len(reason) <= _MAX_REASON else reason[:_MAX_REASON] + "…"
    place = f"workdir = {checkpoint.parent.parent}: its checkpoint {checkpoint.name}"
    if is_passing(error):
        return RetryableError(f"{place} could not be read ({reason}); the same command may work later")
    return UserError(f"{place} {problem} ({reason}); `mot verify {checkpoint.parent.parent}` checks its files")


def orbax_path(path: epath.Path) -> epath.Path:
    """The absolute path for Orbax. Raises UserError for `s3://` if this version of Orbax cannot be patched."""
    if str(path).startswith("s3://"):
        _patch_orbax_for_s3()
    return path if is_remote(path) else path.absolute()


def _patch_orbax_for_s3() -> None:
    """Make Orbax treat `s3://` as it treats `gs://`, but with the driver for S3."""
    if not all(hasattr(module, name) for module, name in _PRIVATE):
        raise UserError(
            "workdir = s3://...: this orbax-checkpoint writes no checkpoints there; try 0.12.8, or a workdir on gs://"
        )
    if "s3://" in gcs_utils._GCS_PATH_PREFIX:
        return
    kvstore_for_gcs, normalize = gcs_utils.get_kvstore_for_gcs, tensorstore_utils._normalize_path

    def kvstore(path: str) -> dict[str, Any]:
        return _s3_kvstore(path) if path.startswith("s3://") else kvstore_for_gcs(path)

    gcs_utils._GCS_PATH_PREFIX = (*gcs_utils._GCS_PATH_PREFIX, "s3://")
    gcs_utils.get_kvstore_for_gcs = kvstore
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(("gs://", "s3://"))
    tensorstore_utils._normalize_path = lambda path: normalize(path).replace("s3:/", "s3://")


def _s3_kvstore(path: str) -> dict[str, Any]:
    """TensorStore's specification of a path; endpoint and region from the environment variables of the AWS tools."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options = {"endpoint": endpoint, "aws_region": region}
    return {"driver": "s3", "bucket": bucket, "path": key} | {name: value for name, value in options.items() if value}
