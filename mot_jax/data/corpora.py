"""Text corpora by name: the source of the running Python, what `mot data build` made, and any prepared TFDS data set.

All are TFDS data sets in array_record files, read without TensorFlow. A name is looked up in `<directory>/corpora`,
then where TFDS keeps its own (`TFDS_DATA_DIR`, or ~/tensorflow_datasets); a path is that of a data set's directory.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.metadata
import os
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from mot_jax.data import python_source
from mot_jax.data.build import build, prepared
from mot_jax.errors import UserError, error_words, nearest

_PUBLIC_FOLDERS = ("datasets", "question_answering", "summarization", "text", "translate")  # of TFDS, those with text
CORPORA = ("python_source/stdlib", "python_source/site_packages")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One split of a prepared corpus. Iterating gives (document name, text as bytes), in a fixed order.

    version: of the data set and of what it was made from. fingerprint: hex digest of what the whole corpus holds.
    records: {feature: text, "name": name, if the data set has names}, as bytes, by index; reading one is cheap, and
    threads may share them. num_bytes: of the split, about. feature: the one that holds the text.
    metadata: what its build counted, if we built it.
    Other processes may be sent a corpus: it opens its files again there.
    """

    name: str
    split: str
    version: str
    fingerprint: str
    records: Sequence[dict[str, bytes]] = dataclasses.field(repr=False)
    num_bytes: int = 0
    feature: str = "text"
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        return self.read(0, len(self))

    def read(self, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
        """(name, text) of the documents start .. stop - 1. Without names in the data set, they are named by number."""
        for i in range(start, stop):
            record = self.records[i]
            name = record.get("name")
            yield (
                name.decode(errors="replace") if isinstance(name, bytes) else f"{self.split}/{i}",
                record[self.feature],
            )


def open_corpus(
    name: str, split: str, directory: str | os.PathLike[str], feature: str = "text", field: str = "--split"
) -> Corpus:
    """The `split` of the corpus `name`, as TFDS names them; the source of Python is built first if it is not there yet.

    split: also a part, as `train[:90%]`. feature: the one that holds the text. field: what the split was asked for by.
    Raises UserError, in one line, for a name, split or feature that does not exist, a data set that is not prepared
    or not as array_record, and a split without a document.
    """
    path = _find(name, Path(directory).expanduser().absolute() / "corpora")
    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:
        raise UserError(f"data.corpus = {name!r}: {path} cannot be read: {error_words(error)}; try another") from error
    info = builder.info
    _check_format(name, info, path)
    _check_feature(name, info, feature)
    _check_split(name, info, split, field)
    metadata = dict(info.metadata or {})
    fingerprint = metadata.get("fingerprint") or _fingerprint(info)
    if feature != "text":
        fingerprint = hashlib.sha256(f"{fingerprint} {feature}".encode()).hexdigest()
    records = builder.as_data_source(split, file_format="array_record")
    size = int(info.splits[split].num_bytes)  # 0 for parts of splits: in proportion, then
    num_bytes = size or int(info.dataset_size) * len(records) // sum(i.num_examples for i in info.splits.values())
    return Corpus(name, split, info.full_name, fingerprint, records, num_bytes, feature, metadata)


def _fingerprint(info: tfds.core.DatasetInfo) -> str:
    """Of a data set that we did not build: the sizes of its shards tell what no version number needs to."""
    splits = [(split, i.shard_lengths, int(i.num_bytes)) for split, i in sorted(info.splits.items())]
    return hashlib.sha256(repr((info.full_name, splits)).encode()).hexdigest()


# --- faults -----------------------------------------------------------------------------------------------------------


def _check_format(name: str, info: tfds.core.DatasetInfo, path: epath.Path) -> None:
    formats = sorted(form.value for form in info.available_file_formats())
    if "array_record" not in formats:
        raise UserError(
            f"data.corpus = {name!r}: is prepared as {' and '.join(formats)}, without random access; where TensorFlow "
            f"is installed, try tfds convert_format --dataset_version_dir={path} --out_file_format=array_record"
        )


def _texts(info: tfds.core.DatasetInfo) -> list[str]:
    features = info.features.items() if isinstance(info.features, tfds.features.FeaturesDict) else ()
    return sorted(name for name, feature in features if feature.shape == () and feature.np_dtype in (object, str))


def _check_feature(name: str, info: tfds.core.DatasetInfo, feature: str) -> None:
    texts = _texts(info)
    if not texts:
        raise UserError(f"data.corpus = {name!r}: has no feature that is text; try another data set")
    if feature not in texts:
        what = "is not text" if feature in info.features else f"no such feature of {name}"
        raise UserError(f"data.text_feature = {feature!r}: {what}{nearest(feature, texts)}")


def _check_split(name: str, info: tfds.core.DatasetInfo, split: str, field: str) -> None:
    there = ", ".join(f"{known} ({info_.num_examples:,} documents)" for known, info_ in info.splits.items())
    unknown = [part for part in re.findall(r"(?:^|\+)\s*(\w+)", split) if part not in info.splits]
    if unknown:
        raise UserError(f"{field} = {split!r}: {name} has no such split, but {there}{nearest(unknown[0], info.splits)}")
    try:
        documents = info.splits[split].num_examples
    except Exception as error:
        raise UserError(f"{field} = {split!r}: {error_words(error)}; {name} has {there}; try train[:90%]") from error
    if not documents:
        raise UserError(f"{field} = {split!r}: empty, there is no document in it; {name} has {there}; try train")


# --- where a data set lies --------------------------------------------------------------------------------------------


def _find(name: str, corpora: Path) -> epath.Path:
    """The version directory of a data set, built first if it is Python's source. Raises UserError."""
    if name == "python_source/stdlib":
        return epath.Path(prepared(corpora, python_source.stdlib_name()) or build(python_source.stdlib(), corpora))
    if name == "python_source/site_packages":
        plan = python_source.site_packages()
        return epath.Path(prepared(corpora, plan.name) or build(plan, corpora))
    roots = [epath.Path(corpora), epath.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()]
    path, version = re.fullmatch(r"(.*?)(?::(\d+\.\d+\.\d+))?", name.rstrip("/")).groups()  # type: ignore[union-attr]
    if re.match(r"(?!gs:)\w+://", path):
        raise UserError(f"data.corpus = {name!r}: array_record reads local files and gs:// alone; try a local copy")
    is_path = "://" in path or path.startswith(("/", "~", "."))
    try:
        for root in [epath.Path()] if is_path else roots:
            base = root / epath.Path(path).expanduser()
            for directory in [base / version] if version else [base, *reversed(_versions(base))]:
                if (directory / "dataset_info.json").exists():
                    return directory
        if is_path:
            raise UserError(f"data.corpus = {name!r}: no prepared data set; its directory holds dataset_info.json")
        raise UserError(f"data.corpus = {name!r}: {_why_not(path, version, roots)}")
    except UserError:
        raise
    except Exception as error:  # of a bucket, or of a directory that may not be read
        raise UserError(f"data.corpus = {name!r}: cannot be looked up: {error_words(error)}; try a copy") from error


def _versions(base: epath.Path) -> list[epath.Path]:
    return [base / str(version) for version in tfds.core.utils.version.list_all_versions(base)]


def _why_not(path: str, version: str | None, roots: Sequence[epath.Path]) -> str:
    """Why no data set of that name was found, and what to do."""
    there = [known for root in roots for known in _data_sets(root) if not known.startswith("python_source/")]
    related = [known for known in there if known == path or known.startswith(f"{path}/")]
    if related:
        return f"{'no such version' if version else 'needs a config'}; there is {', '.join(related)}"
    dataset, public = path.partition("/")[0], _public()
    if dataset in public:
        if path == dataset and _has_configs(dataset):
            catalog = f"https://www.tensorflow.org/datasets/catalog/{dataset}"
            return f"needs a config, such as {dataset}/NAME; try one of {catalog}"
        extras = importlib.metadata.metadata("tensorflow-datasets").get_all("Provides-Extra") or []
        extra = dataset.replace("_", "-")
        package = f"'tensorflow-datasets[{extra}]'" if extra in extras else "tensorflow-datasets"
        return (
            f"is not prepared in {' or '.join(map(str, roots))}; on a machine with TensorFlow, try "
            f"pip install tensorflow {package} && "
            f"tfds build {path} --file_format=array_record --data_dir={roots[0]}"
        )
    own = [*CORPORA, *there]
    return f"no such corpus{nearest(path, difflib.get_close_matches(path, [*own, *public], 1) or own)}"


def _data_sets(root: epath.Path) -> Iterator[str]:
    """The names of the data sets prepared below `root`."""
    for dataset in sorted(root.iterdir()) if root.is_dir() else ():
        if _versions(dataset):
            yield f"{dataset.name}"
        elif dataset.is_dir():
            yield from (f"{dataset.name}/{config.name}" for config in sorted(dataset.iterdir()) if _versions(config))


def _public() -> set[str]:
    """The data sets of text that TFDS can prepare, by the names of its modules: to import those takes TensorFlow."""
    modules = pkgutil.iter_modules([os.path.join(tfds.__path__[0], folder) for folder in _PUBLIC_FOLDERS])
    return {module.name for module in modules if not module.name.endswith(("_test", "_utils"))}


def _has_configs(dataset: str) -> bool:
    """Whether a public data set comes in several configs, by its source."""
    names = (f"{dataset}.py", f"{dataset}/{dataset}.py", f"{dataset}/{dataset}_dataset_builder.py")
    files = [Path(tfds.__path__[0], folder, name) for folder in _PUBLIC_FOLDERS for name in names]
    return any("BUILDER_CONFIGS" in file.read_text() for file in files if file.is_file())
