"""Checkpoints on object stores, as Orbax writes them.

Orbax 0.12 knows `gs://`: TensorStore's own driver writes the arrays, and a file that says that a checkpoint is whole is
written last, in place of a rename. TensorStore has a driver for `s3://` too. Orbax does not use it: here it is told to.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from etils import epath
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from mot_jax.errors import RetryableError, UserError, error_words
from mot_jax.runtime.paths import is_passing, is_remote

_LONGEST = 200  # characters of an error of Orbax's

_PRIVATE = (
    (gcs_utils, "_GCS_PATH_PREFIX"),
    (gcs_utils, "get_kvstore_for_gcs"),
    (tensorstore_utils, "_use_gcs_driver"),
    (tensorstore_utils, "_normalize_path"),
)


def quieten() -> None:
    """Orbax logs what it also raises, and much else; asyncio, the errors of the tasks that Orbax leaves behind."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def unreadable(checkpoint: epath.Path, error: Exception, words: str) -> UserError:
    """What to tell of a checkpoint that Orbax cannot read. RetryableError if it was its disk or store.

    words: what is wrong with it, if it is not that. Of Orbax's chain of errors only the first is told.
    """
    while isinstance(cause := error.__cause__ or error.__context__, Exception):
        error = cause
    reason = error_words(error)
    reason = reason if len(reason) <= _LONGEST else reason[:_LONGEST] + "…"
    place = f"workdir = {checkpoint.parent.parent}: its checkpoint {checkpoint.name}"
    if is_passing(error):
        return RetryableError(f"{place} could not be read ({reason}); the same command may work later")
    return UserError(f"{place} {words} ({reason}); if it is damaged, remove {checkpoint}, and the one before is used")


def orbax_path(path: epath.Path) -> epath.Path:
    """The path as Orbax takes it, from the root. Raises UserError for `s3://` under an Orbax that cannot be told."""
    if str(path).startswith("s3://"):
        _teach_s3()
    return path if is_remote(path) else path.absolute()


def _teach_s3() -> None:
    """Makes Orbax treat `s3://` as it treats `gs://`, with the other driver."""
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
    """Where and with which driver TensorStore writes; endpoint and region from the variables that AWS' tools read."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    chosen = {"endpoint": endpoint, "aws_region": region}
    return {"driver": "s3", "bucket": bucket, "path": key} | {name: value for name, value in chosen.items() if value}
