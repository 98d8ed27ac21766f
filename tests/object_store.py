"""A small Google Cloud Storage for tests: objects in memory behind the JSON API, over HTTP on this machine.

It has the limits of an object store: no request appends, and requests that copy, rename or join objects are counted in
`refused` and answered with an error.
"""

from __future__ import annotations

import base64
import contextlib
import email
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NoReturn

import pytest
from etils import epath

BUCKET = "bucket"


@contextlib.contextmanager
def open_bucket(scheme: str) -> Iterator[tuple[epath.Path, ObjectStore | None]]:
    """A bucket behind the protocol of `gs` or `s3`, on this machine; to append or rename is an error.

    Yields its path, and the store of `gs`.
    """
    import gcsfs
    import s3fs
    from etils.epath import backend

    with pytest.MonkeyPatch.context() as patch:
        store, stop = {"gs": _google, "s3": _amazon}[scheme](patch)
        opens = backend.fsspec_backend.open

        def refuse(*_: object) -> NoReturn:
            raise AssertionError("an object store cannot do this")

        def whole(path: str, mode: str):
            return refuse() if "a" in mode else opens(path, mode)

        patch.setattr(backend.fsspec_backend, "open", whole)
        patch.setattr(backend.fsspec_backend, "rename", refuse)
        patch.setattr(backend.fsspec_backend, "replace", refuse)
        yield epath.Path(f"{scheme}://{BUCKET}"), store
        assert store is None or store.refused == []
        stop()
        for cache in (gcsfs.GCSFileSystem, s3fs.S3FileSystem):
            cache.clear_instance_cache()
        type(backend.fsspec_backend)._get_filesystem.cache_clear()


def _google(patch: pytest.MonkeyPatch) -> tuple[ObjectStore, Callable[[], None]]:
    import fsspec.config

    store = ObjectStore()
    patch.setenv("STORAGE_EMULATOR_HOST", store.url)
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", store.url)
    patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})

    def stop() -> None:
        store.shutdown()
        store.server_close()

    return store, stop


def _amazon(patch: pytest.MonkeyPatch) -> tuple[None, Callable[[], None]]:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "none")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    return None, server.stop


class ObjectStore(ThreadingHTTPServer):
    """One bucket.

    objects: its contents by name. refused: the requests that no object store answers. unavailable: a part of the names
    that cannot be read or listed now, with status 503; None for none.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.lock = threading.Lock()
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.refused: list[str] = []
        self.unavailable: str | None = None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that close the connection early; other errors reach the client as responses."""

    def put(self, name: str, content: bytes, expected: int | None) -> bool:
        """Whole objects only; with a generation expected, only in place of that one (0: of none)."""
        with self.lock:
            now = self.generations.get(name, 0) if name in self.objects else 0
            if expected is not None and expected != now:
                return False
            self.objects[name] = content
            self.generations[name] = self.generations.get(name, 0) + 1
            return True

    def delete(self, name: str) -> bool:
        with self.lock:
            return self.objects.pop(name, None) is not None

    def about(self, name: str) -> dict:
        content = self.objects[name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": BUCKET,
            "size": str(len(content)),
            "generation": str(self.generations[name]),
            "metageneration": "1",
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }


class _Requests(BaseHTTPRequestHandler):
    server: ObjectStore
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is one packet

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        store, (parts, query) = self.server, self._target()
        if store.unavailable is not None and store.unavailable in "/".join([*parts, query.get("prefix", "")]):
            self._answer(503, {"error": {"code": 503, "message": "backendError"}})
        elif parts == ["b", BUCKET]:
            self._answer(200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET})
        elif parts == ["b", BUCKET, "o"]:
            self._answer(200, self._listing(query))
        elif parts[:3] == ["b", BUCKET, "o"] and len(parts) == 4 and parts[3] in store.objects:
            if query.get("alt") == "media":
                self._send_content(store.objects[parts[3]], store.generations[parts[3]])
            else:
                self._answer(200, store.about(parts[3]))
        else:
            self._answer(404, {"error": {"code": 404, "message": f"no such thing: {self.path}"}})

    def do_POST(self) -> None:
        parts, query = self._target()
        body = self._body()
        if parts[:2] != ["b", BUCKET]:
            self._answer(404, {"error": {"code": 404, "message": "no such bucket"}})
        elif parts[2:] != ["o"] or "uploadType" not in query:
            self._refuse()
        elif query["uploadType"] == "media":
            self._put(query["name"], body, query)
        elif query["uploadType"] == "multipart":
            about, content = _two_parts(self.headers["Content-Type"], body)
            self._put(json.loads(about).get("name") or query["name"], content, query)
        else:  # resumable: the place where the content is to be sent
            name = query.get("name") or json.loads(body)["name"]
            place = f"{self.server.url}/upload/storage/v1/b/{BUCKET}/o?uploadType=media"
            self._answer(200, {}, {"Location": f"{place}&name={urllib.parse.quote(name, safe='')}"})

    do_PUT = do_POST  # noqa: N815

    def do_DELETE(self) -> None:
        parts, _ = self._target()
        found = self.server.delete(parts[3]) if len(parts) == 4 else False
        self._answer(204 if found else 404, None)

    def _target(self) -> tuple[list[str], dict[str, str]]:
        """The path after `/storage/v1`, an object's name being one part, and the query."""
        url = urllib.parse.urlsplit(self.path)
        parts = url.path.partition("/storage/v1/")[2].split("/", 3)
        return [urllib.parse.unquote(part) for part in parts], dict(urllib.parse.parse_qsl(url.query))

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _listing(self, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        with self.server.lock:
            for name in sorted(self.server.objects):
                rest = name.removeprefix(prefix)
                if not name.startswith(prefix):
                    continue
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    items.append(self.server.about(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _put(self, name: str, content: bytes, query: dict[str, str]) -> None:
        expected = query.get("ifGenerationMatch")
        if self.server.put(name, content, None if expected is None else int(expected)):
            self._answer(200, self.server.about(name))
        else:
            self._answer(412, {"error": {"code": 412, "message": "another generation"}})

    def _send_content(self, content: bytes, generation: int) -> None:
        headers, status, wanted = {"x-goog-generation": str(generation)}, 200, self.headers.get("Range")
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            begin = int(first) if first else max(len(content) - int(last), 0)
            end = min(int(last) + 1 if first and last else len(content), len(content))
            if begin >= len(content):
                self._answer(416, None)
                return
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
            status, content = 206, content[begin:end]
        self._send(status, content, headers | {"Content-Type": "application/octet-stream"})

    def _refuse(self) -> None:
        self.server.refused.append(f"{self.command} {self.path}")
        self._answer(403, {"error": {"code": 403, "message": "an object store cannot do this"}})

    def _answer(self, status: int, content: dict | None, headers: dict[str, str] | None = None) -> None:
        body = b"" if content is None else json.dumps(content).encode()
        self._send(status, body, {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _two_parts(content_type: str, body: bytes) -> tuple[bytes, bytes]:
    """The metadata and the content of a multipart upload."""
    boundary = email.message_from_string(f"Content-Type: {content_type}\n").get_param("boundary")
    pieces = body.split(b"--" + str(boundary).encode())[1:3]
    about, content = (piece.partition(b"\r\n\r\n" if b"\r\n\r\n" in piece else b"\n\n")[2] for piece in pieces)
    return about, content.removesuffix(b"\r\n") if content.endswith(b"\r\n") else content.removesuffix(b"\n")
