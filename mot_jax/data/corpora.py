"""Open a text corpus by name: Python's source, a corpus built by `mot data build`, or a prepared TFDS data set.

All are TFDS data sets in array_record files, and are read without TensorFlow. A name is looked up in
`<directory>/corpora`, then in TFDS's directory (`TFDS_DATA_DIR`, or ~/tensorflow_datasets); a path is the directory of
a data set. Any of these may be on an object store: then the files that are read are copied to the local disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from mot_jax.config import is_corpus_path
from mot_jax.data import python_source, stores
from mot_jax.data.build import DESCRIPTION, PLAN, build, built_directory, damaged_corpus, is_built, read_metadata
from mot_jax.errors import ReportedError, RetryableError, UserError, error_words, nearest
from mot_jax.runtime.paths import is_passing, is_remote, store_errors, user_path

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
CORPORA = ("python_source/stdlib", "python_source/site_packages")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One split of a prepared corpus. Iteration yields (document name, text as bytes), in a fixed order.

    A corpus can be pickled; the other process opens the files again.

    Attributes:
        version: Version of the data set and of its source.
        fingerprint: Hex digest of the content of the whole corpus.
        records: {feature: text, "name": name, if the data set has names}, as bytes, by index. Random access is fast and
            thread-safe.
        num_bytes: Approximate size of the split.
        feature: The feature with the text.
        metadata: Counts of the build, if `mot data build` built the corpus.
        directory: Of its files, on the local disk.
        shards: Names of the files of the split, each with the number of its documents that are in the split.
        stored: The same directory on an object store; shards are copied before they are read.
    """

    name: str
    split: str
    version: str
    fingerprint: str
    records: Sequence[dict[str, bytes]] = dataclasses.field(repr=False)
    num_bytes: int = 0
    feature: str = "text"
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    directory: str = ""
    shards: tuple[tuple[str, int], ...] = ()
    stored: stores.StoredDirectory | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        return self.read(0, len(self))

    def read(self, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
        """Yield (name, text) of documents start .. stop - 1; documents without names are numbered.

        Raises:
            UserError: A file is damaged.
        """
        self.copy_shards()
        for i in range(start, stop):
            try:
                record = self.records[i]
            except (RuntimeError, ValueError) as error:  # of array_record
                raise self._damaged(i, error) from error
            name, text = record.get("name"), record[self.feature]
            if text is None:  # of a file that was cut
                raise self._damaged(i, ValueError("no such record"))
            yield name.decode(errors="replace") if isinstance(name, bytes) else f"{self.split}/{i}", text

    def _damaged(self, document: int, error: Exception) -> UserError:
        directory, stops = Path(self.directory), itertools.accumulate(count for _, count in self.shards)
        shard = next(name for (name, _), stop in zip(self.shards, stops, strict=True) if document < stop)
        return damaged_corpus(directory, shard, f"document {document}: {error_words(error)}", self.stored)

    def copy_shards(self) -> None:
        """Copy the shards of the split from the object store to the local disk, if they are on one."""
        if self.stored is not None:
            _copy(self.stored, self._shard_names(), Path(self.directory))

    def is_local(self) -> bool:
        """Whether documents can be read without copying shards from an object store."""
        return self.stored is None or all(Path(self.directory, name).exists() for name in self._shard_names())

    def _shard_names(self) -> list[str]:
        return [name for name, _ in self.shards]

    def shard_sizes(self) -> dict[str, int]:
        """The sizes in bytes of the shards of the split that exist."""
        if self.stored is not None:
            return {name: self.stored.files[name].size for name in self._shard_names() if name in self.stored.files}
        paths = [Path(self.directory, name) for name in self._shard_names()]
        return {path.name: path.stat().st_size for path in paths if path.exists()}


def open_corpus(
    name: str, split: str, directory: str | os.PathLike[str], feature: str = "text", field: str = "--split"
) -> Corpus:
    """Open a split of a corpus; the source of Python is built first if necessary.

    Args:
        split: In the notation of TFDS, for example `train[:90%]`.
        directory: Local, or on an object store.
        feature: The feature with the text.
        field: The config field or flag that sets `split`, for error messages.

    Raises:
        UserError: The name, split or feature does not exist, the data set is not prepared, damaged or not in
            array_record format, or the split is empty.
        RetryableError: A store does not respond.
    """
    place = _find(name, directory)
    with store_errors("data.corpus", place) if is_remote(place) else contextlib.nullcontext():
        if is_built(place):
            read_metadata(place)  # raises an error that names a damaged file
    path, stored = _local_metadata(place)
    if stored is not None and is_built(path):
        read_metadata(path, copied_from=stored)
    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:
        raise UserError(f"data.corpus = {name!r}: {path} cannot be read: {error_words(error)}; try another") from error
    info = builder.info
    _check_format(name, info, path)
    _check_feature(name, info, feature)
    _check_split(name, info, split, field)
    metadata = dict(info.metadata or {}) if info.description == DESCRIPTION else {}
    fingerprint = metadata.get("fingerprint") or _fingerprint(info)
    if feature != "text":
        fingerprint = hashlib.sha256(f"{fingerprint} {feature}".encode()).hexdigest()
    records = builder.as_data_source(split, file_format="array_record")
    size = int(info.splits[split].num_bytes)  # 0 for slices of splits: then estimated in proportion
    num_bytes = size or int(info.dataset_size) * len(records) // sum(i.num_examples for i in info.splits.values())
    shards = tuple((Path(part.filename).name, part.take) for part in info.splits[split].file_instructions)
    return Corpus(
        *(name, split, info.full_name, fingerprint, records, num_bytes, feature, metadata, str(path), shards, stored)
    )


def _local_metadata(place: epath.Path) -> tuple[Path, stores.StoredDirectory | None]:
    """The local directory with the metadata of a data set, which is copied from a store, and the directory there."""
    if not is_remote(place):
        return Path(place), None
    stored = stores.StoredDirectory(place)
    stored.files.pop(PLAN, None)  # another build is about to remove it
    path = stores.local_copy(place) / stored.digest
    _copy(stored, [file for file in stored.files if not _SHARD.search(file)], path)
    return path, stored


def _copy(stored: stores.StoredDirectory, names: Sequence[str], target: Path) -> None:
    if not all((target / name).exists() for name in names):
        with stores.one_process_at_a_time(target, f"copies {stored.path}", ".lock") as locked:
            for other in target.parent.glob("[0-9a-f]" * 16) if locked else ():  # copies of files since replaced
                if other != target:
                    shutil.rmtree(other, ignore_errors=True)
            stored.copy(names, target)


def shared_documents(name: str, splits: Sequence[str], directory: str | os.PathLike[str]) -> int:
    """The number of documents that two splits of a corpus have in common, such as `train` and `train[90%:]`."""
    info = tfds.builder_from_directory(_local_metadata(_find(name, directory))[0]).info

    def ranges(split: str) -> Iterator[tuple[str, int, int]]:
        """Shard, first document and last of each part of a split."""
        for part in info.splits[split].file_instructions:
            yield part.filename, part.skip, part.skip + part.take if part.take >= 0 else part.examples_in_shard

    first, second = (list(ranges(split)) for split in splits)
    return sum(
        max(0, min(stop, other_stop) - max(start, other_start))
        for shard, start, stop in first
        for other_shard, other_start, other_stop in second
        if shard == other_shard
    )


def _fingerprint(info: tfds.core.DatasetInfo) -> str:
    """The fingerprint of a data set that `mot data build` did not build, from its version and the sizes of its shards.

    Equal version numbers do not guarantee equal content.
    """
    splits = [(split, i.shard_lengths, int(i.num_bytes)) for split, i in sorted(info.splits.items())]
    return hashlib.sha256(repr((info.full_name, splits)).encode()).hexdigest()


# --- errors -----------------------------------------------------------------------------------------------------------


def _check_format(name: str, info: tfds.core.DatasetInfo, path: epath.Path) -> None:
    formats = sorted(form.value for form in info.available_file_formats())
    if "array_record" not in formats:
        raise UserError(
            f"data.corpus = {name!r}: is prepared as {' and '.join(formats)}, which has no random access; on a machine "
            f"with TensorFlow try tfds convert_format --dataset_version_dir={path} --out_file_format=array_record"
        )


def _text_features(info: tfds.core.DatasetInfo) -> list[str]:
    features = info.features.items() if isinstance(info.features, tfds.features.FeaturesDict) else ()
    return sorted(name for name, feature in features if feature.shape == () and feature.np_dtype in (object, str))


def _check_feature(name: str, info: tfds.core.DatasetInfo, feature: str) -> None:
    text_features = _text_features(info)
    if not text_features:
        raise UserError(f"data.corpus = {name!r}: has no text feature; try another data set")
    if feature not in text_features:
        reason = "is not text" if feature in info.features else f"no such feature of {name}"
        raise UserError(f"data.text_feature = {feature!r}: {reason}{nearest(feature, text_features)}")


def _check_split(name: str, info: tfds.core.DatasetInfo, split: str, field: str) -> None:
    splits = ", ".join(f"{known} ({info_.num_examples:,} documents)" for known, info_ in info.splits.items())
    unknown = [part for part in re.findall(r"(?:^|\+)\s*(\w+)", split) if part not in info.splits]
    if unknown:
        raise UserError(
            f"{field} = {split!r}: {name} has no such split; it has {splits}{nearest(unknown[0], info.splits)}"
        )
    try:
        documents = info.splits[split].num_examples
    except Exception as error:
        raise UserError(f"{field} = {split!r}: {error_words(error)}; {name} has {splits}; try train[:90%]") from error
    if not documents:
        raise UserError(f"{field} = {split!r}: has no documents; {name} has {splits}; try train")


# --- the directory of a data set --------------------------------------------------------------------------------------


def _find(name: str, data_directory: str | os.PathLike[str]) -> epath.Path:
    """The version directory of a data set. The source of Python is built first. Raises UserError."""
    data = epath.Path(data_directory)
    corpora = (data if is_remote(data) else data.expanduser().absolute()) / "corpora"
    if name == "python_source/stdlib":
        return epath.Path(
            built_directory(corpora, python_source.stdlib_name()) or build(python_source.stdlib_spec(), corpora)
        )
    if name == "python_source/site_packages":
        spec = python_source.site_packages_spec()
        return epath.Path(built_directory(corpora, spec.name) or build(spec, corpora))
    roots = [corpora, epath.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()]
    path, version = re.fullmatch(r"(.*?)(?::(\d+\.\d+\.\d+))?", name.rstrip("/")).groups()  # type: ignore[union-attr]
    is_path = is_corpus_path(path)
    if is_remote(path):
        user_path("data.corpus", path)  # raises an error for a store that is not supported or refuses
    try:
        for root in [epath.Path()] if is_path else roots:
            base = root / epath.Path(path).expanduser()
            for directory in [base / version] if version else [base, *reversed(_versions(base))]:
                if any((directory / name).exists() for name in ("dataset_info.json", "metadata.json")):
                    return directory
                if (directory / PLAN).exists():  # on a store
                    raise UserError(
                        f"data.corpus = {name!r}: {directory} is incomplete, its build is in progress or was "
                        "interrupted; try the same mot data build again"
                    )
        if is_path:
            raise UserError(
                f"data.corpus = {name!r}: no prepared data set; must be a directory with dataset_info.json; try another"
            )
        raise UserError(f"data.corpus = {name!r}: {_why_not(path, version, roots)}")
    except ReportedError:
        raise
    except Exception as error:  # from object stores, or for lack of permission
        if is_passing(error):
            raise RetryableError(f"data.corpus = {name!r}: cannot be looked up: {error_words(error)}") from error
        raise UserError(
            f"data.corpus = {name!r}: cannot be looked up: {error_words(error)}; try a local copy"
        ) from error


def _versions(base: epath.Path) -> list[epath.Path]:
    return [base / str(version) for version in tfds.core.utils.version.list_all_versions(base)]


def _why_not(path: str, version: str | None, roots: Sequence[epath.Path]) -> str:
    """The reason why no data set has this name, and advice, for an error message."""
    prepared = [known for root in roots for known in _data_sets(root) if not known.startswith("python_source/")]
    related = [known for known in prepared if known == path or known.startswith(f"{path}/")]
    if related:
        return f"{'no such version' if version else 'needs a config'}; there is {', '.join(related)}"
    names = [*CORPORA, *prepared]
    if difflib.get_close_matches(path, names, 1):
        return f"no such corpus{nearest(path, names)}"
    return (
        f"no such corpus; there is {', '.join(names)}; to add {path!r} from the catalog at "
        "https://www.tensorflow.org/datasets, on a machine with TensorFlow try "
        f"tfds build {path} --file_format=array_record --data_dir={roots[0]}"
    )


def _data_sets(root: epath.Path) -> Iterator[str]:
    """The names of the data sets prepared under `root`."""
    for dataset in sorted(root.iterdir()) if root.is_dir() else ():
        if _versions(dataset):
            yield f"{dataset.name}"
        elif dataset.is_dir():
            yield from (f"{dataset.name}/{config.name}" for config in sorted(dataset.iterdir()) if _versions(config))
