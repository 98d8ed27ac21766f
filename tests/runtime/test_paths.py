"""Paths that a user gives."""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
from pathlib import Path

import aiohttp
import botocore.exceptions
import google.auth.exceptions
import pytest
import requests
from botocore.exceptions import ClientError
from etils import epath
from gcsfs.retry import ChecksumError, HttpError
from s3fs.errors import translate_boto_error

from mot_jax import cli
from mot_jax.config import Config
from mot_jax.data.tokenizers import load_tokenizer
from mot_jax.errors import ReportedError, RetryableError, UserError
from mot_jax.runs import restore
from mot_jax.runs.stores import orbax_path
from mot_jax.runtime import exit_codes, paths
from mot_jax.training import train


def test_a_tilde_is_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.user_path("workdir", "~/runs") == epath.Path(tmp_path) / "runs"
    assert paths.local_path("data.directory", "~/x") == epath.Path(tmp_path) / "x"


@pytest.mark.parametrize(
    ("scheme", "package", "packages"),
    [("gs", "gcsfs", "gcsfs"), ("s3", "s3fs", "s3fs boto3"), ("s3", "boto3", "s3fs boto3")],
)
def test_a_store_that_is_not_installed_is_told_in_one_line(monkeypatch, scheme, package, packages):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    for use in (lambda path: train(Config(), path), restore.load_run, lambda path: cli.main(["curves", path])):
        with pytest.raises((UserError, SystemExit)) as error:
            use(f"{scheme}://bucket/run")
        if isinstance(error.value, UserError):
            expected = f"{package} is not installed; try pip install {packages}"
            assert error.value.faults == (f"workdir = {scheme}://bucket/run: {expected}",)
        else:
            assert error.value.code == exit_codes.USER_ERROR


def test_another_store_is_not_a_directory_of_that_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path, nearest in {"gcs://bucket/run": "gs://", "s3n://bucket/run": "s3://"}.items():
        with pytest.raises(UserError, match=rf"^workdir = {path}: must be local, gs:// or s3://.*{nearest}"):
            train(Config(), path)
    with pytest.raises(UserError, match=r"^data.tokenizer = hdfs://x/y.json: must be local"):
        load_tokenizer("hdfs://x/y.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            OSError("Anonymous caller\nhas no access"),
            UserError,
            "refuses (OSError: Anonymous caller); try a bucket that",
        ),
        (PermissionError("Forbidden"), UserError, "refuses (PermissionError: Forbidden); try a bucket that"),
        (TimeoutError(), RetryableError, "does not respond (TimeoutError: )"),
        (OSError("Cannot connect to host a:443"), RetryableError, "does not respond (OSError: Cannot connect to host"),
        (OSError(errno.EIO, "SlowDown"), RetryableError, "does not respond (OSError: [Errno 5] SlowDown)"),
        (RuntimeError("Service Unavailable, 503"), RetryableError, "does not respond (RuntimeError: Service Unav"),
    ],
)
def test_a_store_that_refuses_or_does_not_answer_is_told_in_one_line(monkeypatch, error, kind, words):
    class Broken:
        def __init__(self, path):
            pass

        def exists(self):
            raise error

    monkeypatch.setattr(paths.epath, "Path", Broken)
    with pytest.raises(ReportedError) as found:
        paths.user_path("workdir", "gs://b/r")
    (fault,) = found.value.faults
    assert type(found.value) is kind and fault.startswith(f"workdir = gs://b/r: the store {words}")


def client_error(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")


@pytest.mark.parametrize(
    "error",
    [
        HttpError({"code": 503, "message": "backendError"}),
        HttpError({"code": "504"}),
        HttpError({"code": 429, "message": "rateLimitExceeded"}),
        ChecksumError(),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError("Response payload is not completed"),
        botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        botocore.exceptions.EndpointConnectionError(endpoint_url="https://a"),
        client_error("SlowDown", 503),
        translate_boto_error(client_error("SlowDown", 503)),
        translate_boto_error(client_error("InternalError", 500)),
        client_error("RequestTimeout", 400),
        requests.exceptions.ProxyError(),
        google.auth.exceptions.RefreshError("503", retryable=True),
        OSError(errno.ENETUNREACH, ""),
        OSError(errno.EHOSTUNREACH, ""),
        OSError(errno.ENETDOWN, ""),
        socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
        RuntimeError("UNAVAILABLE: Error writing gs://bucket/run"),
        RuntimeError("[Input/output error]"),
    ],
    ids=repr,
)
def test_errors_of_stores_and_networks_that_may_pass(error):
    assert paths.is_passing(error)


@pytest.mark.parametrize(
    "error",
    [
        HttpError({"code": 401, "message": "connection of an unknown user"}),
        client_error("AccessDenied", 403),
        translate_boto_error(client_error("AccessDenied", 403)),
        botocore.exceptions.NoCredentialsError(),
        google.auth.exceptions.DefaultCredentialsError("no credentials"),
        FileNotFoundError("bucket/connection/config.json"),  # as gcsfs raises it
        OSError("Forbidden: https://host/b/bucket/o/timeout"),
        OSError(errno.EINVAL, "Invalid argument", "timeout"),
        ValueError("/runs/connection-study/config.json: is not JSON"),
    ],
    ids=repr,
)
def test_refusals_and_words_of_paths_do_not_pass(error):
    assert not paths.is_passing(error)


def test_a_directory_that_cannot_be_made_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^workdir = .*/file/connection: cannot be written to \(NotADirectoryError"):
        paths.make_directory("workdir", epath.Path(tmp_path / "file" / "connection"))


def test_a_replaced_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "file")
    paths.replace_file(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(type(path), "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            paths.replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    paths.replace_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_created_file_appears_with_its_content_and_is_created_once(tmp_path, monkeypatch):
    path, link = epath.Path(tmp_path / "owner.json"), os.link

    def linked(source, target):
        assert not path.exists() and epath.Path(source).read_bytes() == b"first"
        link(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", linked)
        assert paths.create_file(path, b"first")
    assert not paths.create_file(path, b"second") and path.read_bytes() == b"first"

    def refused(source, target):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", refused)
    other = path.with_name("other.json")
    assert (
        not paths.create_file(path, b"second")
        and paths.create_file(other, b"other")
        and not paths.create_file(other, b"again")
    )
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        "owner.json": b"first",
        "other.json": b"other",
    }


def test_orbax_takes_paths_from_the_root(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert orbax_path(epath.Path("runs")) == epath.Path(tmp_path / "runs")
    for path in ("gs://bucket/run", "s3://bucket/run"):
        assert str(orbax_path(epath.Path(path))) == path
    assert Path("runs").exists() is False
