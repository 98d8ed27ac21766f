"""Paths that a user gives: local ones, and those of object stores, `gs://` and `s3://`."""

from __future__ import annotations

import errno
import importlib.util
import os
import re

from etils import epath

from mot_jax.errors import RetryableError, UserError, error_words, nearest

DATA_DIRECTORY = "~/.cache/mot_jax"  # of prepared text, where a config names no other, and of compiled programs

# By scheme: the packages that read and write there (boto3 for TensorBoard), and the extra that brings them.
_STORES = {"gs": (("gcsfs",), "gcs"), "s3": (("s3fs", "boto3"), "s3")}

# What says that a network, a store or a disk did not answer, and may answer later.
_PASSING = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|timed out|timeout\b|\bconnection|not connect|reset by peer|max retries|"
    r"service not known|name resolution|service unavailable|server error|internal error|bad gateway|"
    r"too many requests|reduce your request|input/output error|stale file",
    re.IGNORECASE,
)


def is_passing(error: Exception) -> bool:
    """Whether input or output failed in a way that may pass by itself, as a store that does not answer."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return getattr(error, "errno", None) in (errno.EIO, errno.ESTALE) or bool(_PASSING.search(error_words(error)))


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is on an object store: there is no append, rename or lock, and a write is whole or absent."""
    return "://" in os.fspath(path)


def user_path(name: str, path: epath.PathLike) -> epath.Path:
    """A path, local (`~` is the home) or on an object store.

    Raises UserError, which says `name`, for a store that is not known, not installed or refuses; RetryableError for
    one that does not answer.
    """
    text = os.fspath(path)
    if not is_remote(text):
        return epath.Path(text).expanduser()
    scheme = text.partition("://")[0]
    if scheme not in _STORES:
        known = [f"{store}://" for store in _STORES]
        raise UserError(f"{name} = {text}: must be local, gs:// or s3://{nearest(f'{scheme}://', known)}")
    packages, extra = _STORES[scheme]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{name} = {text}: {missing[0]} is not installed; try pip install 'mot_jax[{extra}]'")
    _forget_listings(scheme)
    found = epath.Path(text)
    try:
        found.exists()
    except Exception as error:
        login = "gcloud auth application-default login" if scheme == "gs" else "aws configure"
        if is_passing(error):
            raise RetryableError(f"{name} = {text}: the store does not answer ({error_words(error)})") from None
        raise UserError(
            f"{name} = {text}: the store refuses ({error_words(error)}); try a bucket that you may read, after {login}"
        ) from None
    return found


def local_path(name: str, path: epath.PathLike) -> epath.Path:
    """A path where files are mapped, renamed and locked. Raises UserError, which says `name`, for an object store."""
    if is_remote(path):
        raise UserError(f"{name} = {path}: must be on a local or shared file system; try ~/.cache/mot_jax")
    return epath.Path(path).expanduser()


def make_directory(name: str, path: epath.Path) -> None:
    """Makes a directory, and its parents; on an object store, where there are none, tries to write there.

    Raises UserError, which says `name`, if that cannot be; RetryableError if it may be later.
    """
    try:
        if is_remote(path):
            probe = path / "config.json.new"  # a name that a kill may leave behind
            probe.write_bytes(b"")
            probe.unlink()
        else:
            path.mkdir(parents=True, exist_ok=True)
    except Exception as error:
        kind = RetryableError if is_passing(error) else UserError
        raise kind(f"{name} = {path}: cannot be written to ({error_words(error)}); try another") from None


def replace_file(path: epath.Path, content: bytes) -> None:
    """Writes a file so that a kill leaves the old one or the new one."""
    if is_remote(path):
        path.write_bytes(content)
    else:
        new = path.with_name(path.name + ".new")
        new.write_bytes(content)
        new.replace(path)


def _forget_listings(scheme: str) -> None:
    """fsspec would remember what a directory held; Orbax, and other processes, write there without its knowledge."""
    import fsspec.config

    fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
