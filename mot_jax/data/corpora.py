"""Text corpora as TFDS data sets: which documents there are, and to which split each belongs.

A corpus is built once into `directory` by TFDS, without TensorFlow, as array_record files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import logging
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from mot_jax.config import ConfigError, nearest

SPLITS = ("train", "validation", "test")
CORPORA = ("python_source/stdlib",)

# Validation and test are whole top-level modules of the standard library, so that no file of a package is seen in
# training; every other module is train. Both lists hold about 6 % of the bytes, in modules that Python 3.11 to 3.13
# all have, and near relatives (bz2 and lzma, profile and cProfile) stay together. No file is long: at most 1/32 of
# validation and 1/23 of test, so that groups of 32 windows of different files are full there, and nearly full here.
VALIDATION_MODULES = (
    *("__future__", "_markupbase", "_threading_local", "bisect", "cmd", "code", "codeop", "colorsys", "copy"),
    *("copyreg", "curses", "dbm", "ensurepip", "filecmp", "fileinput", "fnmatch", "getopt", "getpass", "graphlib"),
    *("hashlib", "hmac", "json", "linecache", "netrc", "numbers", "opcode", "operator", "poplib", "pty"),
    *("py_compile", "pyclbr", "queue", "quopri", "reprlib", "rlcompleter", "runpy", "sched", "secrets", "shelve"),
    *("shlex", "signal", "sqlite3", "stat", "string", "symtable", "tabnanny", "timeit", "token", "tracemalloc"),
    *("tty", "turtledemo", "types", "zipapp"),
)
TEST_MODULES = (
    *("_compression", "_weakrefset", "base64", "bz2", "cProfile", "calendar", "compileall", "csv", "ctypes"),
    *("gettext", "glob", "gzip", "heapq", "lzma", "mimetypes", "modulefinder", "pkgutil", "pprint", "profile"),
    *("selectors", "textwrap", "tomllib", "wave", "weakref", "wsgiref", "zoneinfo"),
)

# Not the library's own text (site-packages, build products), tests and tables (encodings), or an application (idlelib).
# A document with more than 1/32 of all windows must meet itself in groups of 32, whatever the shuffle does: hence
# without pydoc_data, one generated file of 0.7 MB (7.6 % of the corpus), and _pydecimal.py (3 % under Python 3.13).
_EXCLUDED_DIRECTORIES = frozenset(
    [
        "site-packages",
        "dist-packages",
        "lib-dynload",
        "__pycache__",
        "test",
        "tests",
        "idlelib",
        "encodings",
        "pydoc_data",
    ]
)
# The last two are written when Python is built, with that machine's paths in them.
_EXCLUDED_PREFIXES = ("_pydecimal", "_sysconfigdata", "config-")

_PYTHON_VERSION = ".".join(map(str, sys.version_info[:3]))


def stdlib_documents(root: Path) -> dict[str, Path]:
    """The corpus' files in the standard library at `root`: their names ('json/decoder.py') in order, and their paths.

    Empty files are no documents.
    """
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        excluded = parts[0].startswith(_EXCLUDED_PREFIXES) or not _EXCLUDED_DIRECTORIES.isdisjoint(parts[:-1])
        if not excluded and path.stat().st_size:
            found["/".join(parts)] = path
    return dict(sorted(found.items()))


def split_of(name: str) -> str:
    """The split of the document `name`, by its top-level module."""
    module = name.split("/")[0].removesuffix(".py")
    return "validation" if module in VALIDATION_MODULES else "test" if module in TEST_MODULES else "train"


class PythonSource(tfds.core.GeneratorBasedBuilder):
    """Python source files. The config `stdlib_<version>` is the standard library of the running Python."""

    VERSION = tfds.core.Version("1.0.0")
    # With Python's version in the name, two Pythons can share one directory.
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=f"stdlib_{_PYTHON_VERSION}", description="The running Python's standard library.")
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Python source files, one document a file.",
            features=tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()}),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # documents stay sorted by name
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        texts = {name: path.read_bytes() for name, path in stdlib_documents(Path(sysconfig.get_path("stdlib"))).items()}
        digest = hashlib.sha256(_PYTHON_VERSION.encode())
        for name, text in texts.items():
            digest.update(f"\0{split_of(name)} {name} {len(text)}\0".encode() + text)
        self.info.metadata["fingerprint"] = digest.hexdigest()
        return {
            split: self._generate_examples({name: text for name, text in texts.items() if split_of(name) == split})
            for split in SPLITS
        }

    def _generate_examples(self, texts: dict[str, bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, (name, text) in enumerate(texts.items()):
            yield key, {"name": name, "text": text}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One split of a prepared corpus. Iterating gives (document name, text as bytes), in a fixed order.

    version: of the data set and of what it was made from. records: {"name": bytes, "text": bytes} by index.
    fingerprint: hex digest of the whole corpus' content and of the Python version it came from.
    num_bytes: of the split, about.
    """

    name: str
    split: str
    version: str
    fingerprint: str
    records: Sequence[dict[str, bytes]] = dataclasses.field(repr=False)
    num_bytes: int = 0

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        return self.read(0, len(self))

    def read(self, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
        for i in range(start, stop):
            record = self.records[i]
            yield record["name"].decode(), record["text"]


def open_corpus(name: str, split: str, directory: str | os.PathLike[str], feature: str = "text") -> Corpus:
    """The `split` of the corpus `name`, built under `directory` if it is not there yet.

    Raises ConfigError for a name or split that does not exist.
    """
    if name not in CORPORA:
        raise ConfigError(f"data.corpus = {name!r}: no such corpus{nearest(name, CORPORA)}")
    if split not in SPLITS:
        raise ConfigError(f"split = {split!r}: must be one of {', '.join(SPLITS)}{nearest(split, SPLITS)}")
    builder = _prepared(Path(directory).absolute() / "corpora")
    return Corpus(
        name=name,
        split=split,
        version=builder.info.full_name,
        fingerprint=builder.info.metadata["fingerprint"],
        records=builder.as_data_source(split=split),
        num_bytes=builder.info.splits[split].num_bytes,
    )


def _prepared(directory: Path) -> tfds.core.DatasetBuilder:
    """The builder of `python_source`, its data in place."""

    def new() -> tfds.core.DatasetBuilder:
        config = PythonSource.BUILDER_CONFIGS[0].name
        return PythonSource(data_dir=os.fspath(directory), config=config, file_format="array_record")

    def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
        # What TFDS asks in its own is_prepared, which logs a warning when the answer is no.
        return (builder.data_path / "dataset_info.json").exists()

    builder = new()
    if is_prepared(builder):
        return builder
    logging.getLogger(__name__).info("preparing corpus %s in %s", builder.info.full_name, directory)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download that does not happen
            builder.download_and_prepare()
    except OSError:
        # TFDS renames its finished directory into place, which fails where another process was first.
        if not is_prepared(new()):
            raise
    return new()
