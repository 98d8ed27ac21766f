"""The source of the running Python as corpora: its standard library, and the packages that are installed beside it.

Whole modules go to validation and test, so that no file of a package is seen in training.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from mot_jax.data.build import Plan
from mot_jax.data.files import Part

SPLITS = ("train", "validation", "test")

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

# Of the installed packages: what share of the bytes validation and test take at most, and what share of that one file.
_HELD_OUT = 0.02
_LARGEST_FILE = 1 / 32


def stdlib_name() -> str:
    """With Python's version, so that two Pythons can share one directory."""
    return f"python_source/stdlib_{_PYTHON_VERSION}"


def stdlib() -> Plan:
    """The standard library."""
    documents = stdlib_documents(Path(sysconfig.get_path("stdlib")))
    parts = tuple(_part(path, name, os.path.getsize(path), split_of(name)) for name, path in documents.items())
    return Plan(stdlib_name(), parts, SPLITS, salt=_PYTHON_VERSION)


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
    """The split of the standard library's document `name`, by its top-level module."""
    module = _module(name)
    return "validation" if module in VALIDATION_MODULES else "test" if module in TEST_MODULES else "train"


def site_packages() -> Plan:
    """The installed packages. Its name has a digest of the files' names and sizes: other packages, another corpus."""
    documents = site_packages_documents({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    sizes = {name: size for name, (_, size) in documents.items()}
    splits = package_splits(sizes)
    digest = hashlib.sha256(repr(list(sizes.items())).encode()).hexdigest()[:12]
    parts = tuple(_part(path, name, size, splits[_module(name)]) for name, (path, size) in documents.items())
    return Plan(f"python_source/site_packages_{digest}", parts, SPLITS)


def site_packages_documents(roots: Iterable[str]) -> dict[str, tuple[str, int]]:
    """{name: (path, size)} of the Python files below `roots` that are not empty, in order of their names.

    Finders of editable installations are left out: they hold paths of this machine, not text.
    """
    found: dict[str, tuple[str, int]] = {}
    for root in sorted(roots):
        waiting = [root] if os.path.isdir(root) else []
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif entry.name.endswith(".py") and not entry.name.startswith("__editable__"):
                        name = os.path.relpath(entry.path, root).replace(os.sep, "/")
                        if entry.is_file() and entry.stat().st_size:
                            found.setdefault(name, (entry.path, entry.stat().st_size))
    return dict(sorted(found.items()))


def package_splits(sizes: dict[str, int]) -> dict[str, str]:
    """The split of each top-level package, of the sizes of its files in bytes.

    In the order of the hashes of their names, packages fill validation, then test, to 2 % of all bytes each; one that
    is too large for what is left, or has a file of more than 1/32 of that, stays in train.
    """
    packages: dict[str, list[int]] = defaultdict(list)
    for name, size in sizes.items():
        packages[_module(name)].append(size)
    budget = _HELD_OUT * sum(sizes.values())
    left = {"validation": budget, "test": budget}
    splits = {}
    for package in sorted(packages, key=lambda name: hashlib.sha256(name.encode()).digest()):
        size, largest = sum(packages[package]), max(packages[package])
        fits = [split for split, room in left.items() if size <= room and largest <= _LARGEST_FILE * budget]
        splits[package] = fits[0] if fits else "train"
        if fits:
            left[fits[0]] -= size
    return splits


def _module(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def _part(path: str | os.PathLike[str], name: str, size: int, split: str) -> Part:
    return Part(os.fspath(path), name, 0, sys.maxsize, size, split=split)
