"""Paths that a user gives: local ones, and those of object stores, `gs://` and `s3://`."""

from __future__ import annotations

import importlib.util
import os

from etils import epath

from mot_jax.config import ConfigError, error_words, nearest

# By scheme: the packages that read and write there (boto3 for TensorBoard), and the extra that brings them.
_STORES = {"gs": (("gcsfs",), "gcs"), "s3": (("s3fs", "boto3"), "s3")}


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is on an object store: there is no append, rename or lock, and a write is whole or absent."""
    return "://" in os.fspath(path)


def user_path(name: str, path: epath.PathLike) -> epath.Path:
    """A path, local (`~` is the home) or on an object store.

    Raises ConfigError, which says `name`, for a store that is not known, not installed or does not answer.
    """
    text = os.fspath(path)
    if not is_remote(text):
        return epath.Path(text).expanduser()
    scheme = text.partition("://")[0]
    if scheme not in _STORES:
        known = [f"{store}://" for store in _STORES]
        raise ConfigError(f"{name} = {text}: must be local, gs:// or s3://{nearest(f'{scheme}://', known)}")
    packages, extra = _STORES[scheme]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"{name} = {text}: {missing[0]} is not installed; try pip install 'mot_jax[{extra}]'")
    _forget_listings(scheme)
    found = epath.Path(text)
    try:
        found.exists()
    except Exception as error:
        raise ConfigError(
            f"{name} = {text}: the store does not answer ({error_words(error)}); try a bucket that you may read, after "
            f"{'gcloud auth application-default login' if scheme == 'gs' else 'aws configure'}"
        ) from None
    return found


def local_path(name: str, path: epath.PathLike) -> epath.Path:
    """A path where files are mapped, renamed and locked. Raises ConfigError, which says `name`, for an object store."""
    if is_remote(path):
        raise ConfigError(f"{name} = {path}: must be on a local or shared file system; try ~/.cache/mot_jax")
    return epath.Path(path).expanduser()


def make_directory(name: str, path: epath.Path) -> None:
    """Makes a directory, and its parents; on an object store, where there are none, tries to write there.

    Raises ConfigError, which says `name`, if that cannot be.
    """
    try:
        if is_remote(path):
            probe = path / "config.json.new"  # a name that a kill may leave behind
            probe.write_bytes(b"")
            probe.unlink()
        else:
            path.mkdir(parents=True, exist_ok=True)
    except Exception as error:
        raise ConfigError(f"{name} = {path}: cannot be written to ({error_words(error)}); try another") from None


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
