"""The source of Python as corpora: documents, splits, and builds that are silent and happen once."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mot_jax.data import build, python_source
from mot_jax.data.corpora import Corpus, open_corpus
from mot_jax.data.python_source import SPLITS, package_splits, site_packages_documents, split_of, stdlib_documents

NAME = "python_source/stdlib"
STDLIB = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module")
def splits(data_directory: Path) -> dict[str, Corpus]:
    return {split: open_corpus(NAME, split, data_directory) for split in SPLITS}


def _size(corpus: Corpus) -> int:
    return sum(len(text) for _, text in corpus)


def test_documents_are_the_files_of_the_standard_library_byte_for_byte(splits: dict[str, Corpus]) -> None:
    texts = {name: text for corpus in splits.values() for name, text in corpus}
    assert texts == {name: path.read_bytes() for name, path in stdlib_documents(STDLIB).items()}
    assert sum(len(corpus) for corpus in splits.values()) == len(texts)
    assert {"os.py", "json/decoder.py", "heapq.py"} <= texts.keys()
    for corpus in splits.values():
        names = [name for name, _ in corpus]
        assert names == sorted(names)


def test_other_software_tests_tables_and_products_are_excluded(tmp_path: Path) -> None:
    included = ["os.py", "json/decoder.py", "testing.py"]
    excluded = ["site-packages/a.py", "test/a.py", "unittest/test/a.py", "distutils/tests/a.py", "idlelib/a.py"]
    excluded += ["encodings/a.py", "pydoc_data/topics.py", "lib-dynload/a.py", "json/__pycache__/a.py", "_pydecimal.py"]
    excluded += ["_sysconfigdata__linux.py", "config-3.11-linux/python-config.py", "os.txt"]
    for name in included + excluded:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass")
    (tmp_path / "empty.py").touch()
    assert list(stdlib_documents(tmp_path)) == sorted(included)


def test_no_top_level_module_is_in_two_splits(splits: dict[str, Corpus]) -> None:
    modules = [{name.split("/")[0].removesuffix(".py") for name, _ in corpus} for corpus in splits.values()]
    assert sum(map(len, modules)) == len(set.union(*modules))
    assert modules[1] == set(python_source.VALIDATION_MODULES)
    assert modules[2] == set(python_source.TEST_MODULES)
    assert len(modules[1] | modules[2]) == len(python_source.VALIDATION_MODULES) + len(python_source.TEST_MODULES)


def test_split_of_depends_on_the_top_level_module() -> None:
    assert [split_of(n) for n in ("json/decoder.py", "gzip.py", "os.py")] == ["validation", "test", "train"]
    assert split_of("email/json.py") == "train"


def test_split_sizes(splits: dict[str, Corpus]) -> None:
    sizes = {split: _size(corpus) for split, corpus in splits.items()}
    assert 450_000 < sizes["validation"] < 600_000
    assert sizes["train"] > 0.85 * sum(sizes.values())
    for split, share in (("train", 1 / 35), ("validation", 1 / 30), ("test", 1 / 20)):
        assert max(len(text) for _, text in splits[split]) < share * sizes[split]


def test_the_version_names_this_python(splits: dict[str, Corpus]) -> None:
    assert ".".join(map(str, sys.version_info[:3])) in splits["train"].version
    assert len({corpus.fingerprint for corpus in splits.values()}) == 1
    assert int(splits["train"].fingerprint, 16)


def test_the_fingerprint_follows_content_and_python_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stdlib").mkdir()
    for module in ("os", "json", "gzip"):
        (tmp_path / "stdlib" / f"{module}.py").write_text("pass")
    monkeypatch.setattr(python_source.sysconfig, "get_path", lambda name: str(tmp_path / "stdlib"))

    def fingerprint(directory: str) -> str:
        return open_corpus(NAME, "train", tmp_path / directory).fingerprint

    first = fingerprint("a")
    assert fingerprint("b") == first
    (tmp_path / "stdlib" / "os.py").write_text("pasS")
    assert fingerprint("a") == first, "a prepared corpus does not change"
    assert fingerprint("c") != first
    (tmp_path / "stdlib" / "os.py").write_text("pass")
    monkeypatch.setattr(python_source, "_PYTHON_VERSION", "3.99.0")
    assert fingerprint("d") != first


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages directory of 60 packages, one of them with a file too long to be held out."""
    root = tmp_path / "site-packages"
    for i in range(60):
        (root / f"package_{i}/inner").mkdir(parents=True)
        for j in range(20):
            (root / f"package_{i}/inner/{j}.py").write_text(f"x = {i}\n" * 20)
    (root / "package_0/long.py").write_text("y = 1\n" * 20_000)
    (root / "single.py").write_text("z = 1\n")
    (root / "__editable___mine_finder.py").write_text("a path of this machine")
    (root / "empty.py").touch()
    (root / "data.txt").write_text("no source")
    monkeypatch.setattr(python_source.sysconfig, "get_path", lambda name: str(root))
    return root


def test_site_packages_are_all_installed_files(packages: Path, tmp_path: Path) -> None:
    splits = {split: open_corpus("python_source/site_packages", split, tmp_path) for split in SPLITS}
    texts = {name: text for corpus in splits.values() for name, text in corpus}
    assert len(texts) == 60 * 20 + 2 and {"package_3/inner/7.py", "single.py"} <= texts.keys()
    assert all(text == (packages / name).read_bytes() for name, text in texts.items())
    assert list(site_packages_documents([str(packages), str(packages)])) == sorted(texts)
    modules = [{name.split("/")[0] for name, _ in corpus} for corpus in splits.values()]
    assert sum(map(len, modules)) == 61, "a package is in one split"
    assert "package_0" in modules[0]
    assert all(0.01 < _size(splits[split]) / sum(map(len, texts.values())) <= 0.02 for split in SPLITS[1:])


def test_site_packages_are_built_once_for_each_set_of_packages(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_corpus("python_source/site_packages", "train", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(build, "_write_piece", None)
        assert open_corpus("python_source/site_packages", "train", tmp_path).fingerprint == first.fingerprint
    (packages / "package_61").mkdir()
    (packages / "package_61/new.py").write_text("new = True\n")
    more = open_corpus("python_source/site_packages", "train", tmp_path)
    assert more.version != first.version and more.fingerprint != first.fingerprint


def test_packages_that_are_too_large_stay_in_train() -> None:
    sizes = {f"p{i}/{j}.py": 50 for i in range(100) for j in range(20)} | {"large/a.py": 5000, "wide.py": 100}
    splits = package_splits(sizes)
    assert splits["large"] == splits["wide"] == "train"
    held = [sum(splits[f"p{i}"] == split for i in range(100)) for split in SPLITS[1:]]
    assert held == [2, 2]


def test_processes_build_concurrently_without_output(tmp_path: Path) -> None:
    code = f"from mot_jax.data.corpora import open_corpus; open_corpus({NAME!r}, 'train', {str(tmp_path)!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-W", "error", "-c", code]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs == [b"", b""]
    assert len(open_corpus(NAME, "train", tmp_path)) > 100
