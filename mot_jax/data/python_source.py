"""The source code of the running Python as corpora: its standard library, and its installed packages.

Whole modules are held out for validation and test, so that no file of a package in these splits is trained on.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from mot_jax.data.build import CorpusSpec
from mot_jax.data.files import FilePart

SPLITS = ("train", "validation", "test")

# Top-level modules of the standard library; every other module is in train. Both lists have about 6 % of the bytes, in
# modules that exist in Python 3.11 to 3.13, and closely related modules (bz2 and lzma, profile and cProfile) are in the
# same split. No file is longer than 1/32 of validation or 1/23 of test: groups of 32 windows from different files are
# full in validation, and nearly full in test.
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

# Excluded: other software and build products (site-packages), tests, tables (encodings) and an application (idlelib).
# A document with more than 1/32 of all windows shares some groups of 32 with itself in any order: hence pydoc_data, one
# generated file of 0.7 MB (7.6 % of the corpus), and _pydecimal.py (3 % under Python 3.13) are excluded as well.
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
# The last two are generated when Python is built, and contain paths of that machine.
_EXCLUDED_PREFIXES = ("_pydecimal", "_sysconfigdata", "config-")

_PYTHON_VERSION = ".".join(map(str, sys.version_info[:3]))

# Of the installed packages: the largest fraction of the bytes for each of validation and test, and the largest
# fraction of these bytes in one file.
_HELD_OUT = 0.02
_LARGEST_FILE = 1 / 32


def stdlib_name() -> str:
    """The name of the corpus, with Python's version: two Pythons can share one directory."""
    return f"python_source/stdlib_{_PYTHON_VERSION}"


def stdlib_spec() -> CorpusSpec:
    """The spec of the standard library's corpus."""
    documents = stdlib_documents(Path(sysconfig.get_path("stdlib")))
    parts = tuple(_file_part(path, name, os.path.getsize(path), split_of(name)) for name, path in documents.items())
    return CorpusSpec(stdlib_name(), parts, SPLITS, salt=_PYTHON_VERSION)


def stdlib_documents(root: Path) -> dict[str, Path]:
    """The documents in the standard library at `root`: {name: path}, sorted by names such as 'json/decoder.py'.

    Empty files are skipped.
    """
    documents = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        excluded = parts[0].startswith(_EXCLUDED_PREFIXES) or not _EXCLUDED_DIRECTORIES.isdisjoint(parts[:-1])
        if not excluded and path.stat().st_size:
            documents["/".join(parts)] = path
    return dict(sorted(documents.items()))


def split_of(name: str) -> str:
    """The split of the standard library's document `name`, which depends on its top-level module."""
    module = _top_level_module(name)
    return "validation" if module in VALIDATION_MODULES else "test" if module in TEST_MODULES else "train"


def site_packages_spec() -> CorpusSpec:
    """The spec of the corpus of the installed packages.

    Its name contains a digest of the names and sizes of the files: other packages make another corpus.
    """
    documents = site_packages_documents({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    sizes = {name: size for name, (_, size) in documents.items()}
    splits = package_splits(sizes)
    digest = hashlib.sha256(repr(list(sizes.items())).encode()).hexdigest()[:12]
    parts = tuple(
        _file_part(path, name, size, splits[_top_level_module(name)]) for name, (path, size) in documents.items()
    )
    return CorpusSpec(f"python_source/site_packages_{digest}", parts, SPLITS)


def site_packages_documents(roots: Iterable[str]) -> dict[str, tuple[str, int]]:
    """The non-empty Python files below `roots`: {name: (path, size in bytes)}, sorted by name.

    Import finders of editable installations are excluded: they contain paths of this machine.
    """
    documents: dict[str, tuple[str, int]] = {}
    for root in sorted(roots):
        directories = [root] if os.path.isdir(root) else []
        while directories:
            with os.scandir(directories.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.path)
                    elif entry.name.endswith(".py") and not entry.name.startswith("__editable__"):
                        name = os.path.relpath(entry.path, root).replace(os.sep, "/")
                        if entry.is_file() and entry.stat().st_size:
                            documents.setdefault(name, (entry.path, entry.stat().st_size))
    return dict(sorted(documents.items()))


def package_splits(sizes: dict[str, int]) -> dict[str, str]:
    """The split of each top-level package, from the sizes of its files in bytes.

    Packages are taken in the order of the hashes of their names, first for validation, then for test, up to 2 % of all
    bytes each. A package that exceeds the remaining bytes, or has a file of more than 1/32 of the 2 %, is in train.
    """
    packages: dict[str, list[int]] = defaultdict(list)
    for name, size in sizes.items():
        packages[_top_level_module(name)].append(size)
    budget = _HELD_OUT * sum(sizes.values())
    remaining = {"validation": budget, "test": budget}
    splits = {}
    for package in sorted(packages, key=lambda name: hashlib.sha256(name.encode()).digest()):
        size, largest = sum(packages[package]), max(packages[package])
        fits = [split for split, room in remaining.items() if size <= room and largest <= _LARGEST_FILE * budget]
        splits[package] = fits[0] if fits else "train"
        if fits:
            remaining[fits[0]] -= size
    return splits


def _top_level_module(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def _file_part(path: str | os.PathLike[str], name: str, size: int, split: str) -> FilePart:
    return FilePart(os.fspath(path), name, 0, sys.maxsize, size, split=split)
