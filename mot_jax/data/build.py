"""Build a corpus, which is a TFDS data set, from files; several processes work on it, and an interrupted build resumes.

The input is divided into pieces. One process writes each piece, to one shard of every split, and then a marker file; a
piece with a marker and complete shards is not written again. The documents of a piece depend on the files only, so the
result is the same for any number of processes and interruptions. Everything is on disk before the directory is renamed.

    <directory>/corpora/NAME/1.0.0.building/    plan (identity of the spec), piece-00003.json (marker), shards
    <directory>/corpora/NAME/1.0.0/             the same directory renamed, with TFDS's metadata: the data set;
                                                left_out.jsonl names files that were not read, or not completely,
                                                with the reasons

On an object store, `directory` being gs:// or s3://, the corpus is built on the local disk and uploaded, its
`dataset_info.json` last. Until then it has the file `plan` there, created exclusively.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from mot_jax.data import pool, stores
from mot_jax.data.files import FilePart, find_files, read_part, split_file
from mot_jax.data.formats import REASONS, DocumentUnit, ReadReport
from mot_jax.errors import UserError, error_words
from mot_jax.runtime import strict_json
from mot_jax.runtime.paths import (
    create_file,
    disk_errors,
    exclusive_lock,
    is_remote,
    make_directory,
    replace_file,
    store_errors,
    sync,
)

AnyPath: TypeAlias = Path | epath.Path

FORMAT_VERSION = 2
VERSION = "1.0.0"
PLAN = "plan"  # the file with the identity of a build in progress
_CONTENTS = "contents.json"  # of a corpus: the sizes of its shards, and digests of its metadata
DESCRIPTION = "Text corpus built by mot_jax."
PIECE_BYTES = 1 << 24  # of text, approximately
_MAX_PIECES = 256  # readers keep every shard of a split open, and systems allow about 1,000 open files
_NAMED = 10  # names of files in one line, and such lines; left_out.jsonl has all of them


@dataclasses.dataclass(frozen=True)
class CorpusSpec:
    """Everything that determines the content of a corpus.

    Attributes:
        splits: Names. Documents of a file part without a split are assigned by their hash: to the second split with
            probability `validation`, otherwise to the first.
        salt: Included in the fingerprint.
    """

    name: str
    parts: tuple[FilePart, ...]
    splits: tuple[str, ...] = ("train", "validation")
    documents: DocumentUnit = "file"
    feature: str = "text"
    validation: float = 0.0
    salt: str = ""

    def identity(self) -> str:
        """A hex digest of all fields. The corpus stores it, to detect a build from other files."""
        fields = [FORMAT_VERSION, PIECE_BYTES, [dataclasses.astuple(part) for part in self.parts]]
        fields += [getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "parts"]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()

    @property
    def total_bytes(self) -> int:
        return sum(part.size for part in self.parts)


def spec_from_files(
    name: str, files: Sequence[str], documents: DocumentUnit = "file", feature: str = "text", validation: float = 0.01
) -> CorpusSpec:
    """The spec of a corpus of the user's files, glob patterns and directories.

    Raises:
        UserError: Invalid name or validation share, or files that do not exist or cannot be read.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "python_source":
        suggestion = re.sub(r"^[^a-z]+|\W", "", name.lower().replace("-", "_"))
        raise UserError(
            f"NAME = {name!r}: must consist of lowercase letters, digits and underscores, begin with a letter, "
            f"and not be python_source; try {suggestion if suggestion not in ('', 'python_source') else 'mine'}"
        )
    if not 0 <= validation < 1:
        raise UserError(f"--validation = {validation:g}: must be at least 0 and below 1; try 0.01")
    sources = find_files(files)
    size = _piece_bytes(sum(file.size for file in sources))
    parts = tuple(part for file in sources for part in split_file(file, documents, size))
    return CorpusSpec(name, parts, documents=documents, feature=feature, validation=validation)


def built_directory(corpora: AnyPath, name: str) -> AnyPath | None:
    """The directory of the corpus `name` under `corpora`, or None if it is not built."""
    directory = corpora / name / VERSION
    complete = directory / "dataset_info.json" if is_remote(directory) else directory  # which is renamed when complete
    return directory if complete.exists() else None


def build(
    spec: CorpusSpec, corpora: AnyPath, workers: int | None = None, log: Callable[[str], None] | None = None
) -> AnyPath:
    """Build a corpus under the directory `corpora`, unless it exists.

    Args:
        corpora: Local, or on an object store.
        workers: Maximum number of processes; None for the number of cores.
        log: Called with lines that report the progress and the result.

    Returns:
        The directory of the corpus.

    Raises:
        UserError: Another corpus has this name, the files contain no document, or `corpora` cannot be written.
        RetryableError: A store does not respond.
    """
    log = log or (lambda line: None)
    if is_remote(corpora):
        return _build_on_store(spec, epath.Path(corpora), workers, log)
    corpora = Path(corpora)
    directory, building = corpora / spec.name / VERSION, corpora / spec.name / f"{VERSION}.building"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.directory = {corpora.parent}: cannot be written ({error.strerror}); try one that can"
        ) from error
    lock = exclusive_lock(
        directory.parent / ".lock", lambda: log(f"waiting for another process that is building {directory.parent}")
    )
    with lock as exclusive, disk_errors(corpora.parent):
        if not exclusive:  # without locks, a build shares its directory with no other
            building = building.with_name(f"{building.name}.{uuid.uuid4().hex}")
        exists = directory.exists()
        if not exists:
            _build_in(building, spec, workers, log)
            try:
                building.rename(directory)
            except OSError:
                if not directory.exists():
                    raise
                shutil.rmtree(building)  # without locks, another process has built it in the meantime
            sync(directory.parent)
        metadata = _check_identity(directory, spec)
        if exists:
            log(f"{spec.name} exists already, built from the same files")
    _log_summary(spec, directory, metadata, log)
    return directory


def _check_identity(directory: AnyPath, spec: CorpusSpec) -> dict[str, Any]:
    """The metadata of a complete corpus. Raises UserError if it is not that of `spec`."""
    if not is_built(directory):
        raise UserError(
            f"NAME = {spec.name!r}: {directory} exists, and mot data build did not write it; try another name"
        )
    metadata = read_metadata(directory)
    if metadata.get("plan") != spec.identity():
        raise UserError(
            f"NAME = {spec.name!r}: {directory} was built from other files or options, or from files that have "
            "changed since, or by another version; try another name, or delete that directory"
        )
    return metadata


def _log_summary(spec: CorpusSpec, directory: AnyPath, metadata: dict[str, Any], log: Callable[[str], None]) -> None:
    for line in summary_lines(metadata):
        log(line)
    if spec.validation and spec.splits[1] not in metadata["counts"]:
        log(f"no document was assigned to {spec.splits[1]}; try a larger --validation and another name")
    log(f"corpus directory: {directory}")


def _build_on_store(
    spec: CorpusSpec, corpora: epath.Path, workers: int | None, log: Callable[[str], None]
) -> epath.Path:
    """Build a corpus on the local disk, upload it, and remove it from the local disk."""
    directory, place = corpora / spec.name / VERSION, stores.local_copy(corpora.parent) / "building"
    requests = functools.partial(store_errors, "data.directory", corpora)
    with requests():
        exists = built_directory(corpora, spec.name) is not None
    if not exists:
        make_directory("data.directory", corpora)  # fails now rather than after the build
        with stores.one_process_at_a_time(place / spec.name, f"is building {directory}"):
            with requests():
                exists = not _begin_upload(spec, corpora)
            if not exists:
                local = build(spec, place, workers)
                names = sorted(path.name for path in local.iterdir())
                last = [_CONTENTS, "features.json", "metadata.json", "dataset_info.json"]
                stores.upload(local, directory, names, last)
                shutil.rmtree(local)
                with requests():
                    (directory / PLAN).unlink(missing_ok=True)
    with requests():
        metadata = _check_identity(directory, spec)
    if exists:
        log(f"{spec.name} exists already, built from the same files")
    _log_summary(spec, directory, metadata, log)
    return directory


def _begin_upload(spec: CorpusSpec, corpora: epath.Path) -> bool:
    """Create the plan of a corpus on a store. Returns False if the corpus is complete.

    Raises UserError if it has the plan of another one.
    """
    directory, identity = corpora / spec.name / VERSION, spec.identity()
    plan, present = directory / PLAN, None
    while not create_file(plan, identity.encode()):
        with contextlib.suppress(FileNotFoundError):  # removed since, by a build that has finished
            present = plan.read_text()
            break
        if built_directory(corpora, spec.name) is not None:
            return False
    if present not in (None, identity):
        raise UserError(
            f"NAME = {spec.name!r}: {directory} is being written, or was left incomplete, by a build from "
            f"other files or options; try another name, or {stores.removal(directory)}"
        )
    if built_directory(corpora, spec.name) is not None:  # completed before the plan was created
        plan.unlink(missing_ok=True)
        return False
    return True


def is_built(directory: AnyPath) -> bool:
    """Whether `build` wrote the data set in a directory, even if it is damaged now; TFDS and others write some, too."""
    try:
        return bool(json.loads((directory / "dataset_info.json").read_text())["description"] == DESCRIPTION)
    except (OSError, ValueError, KeyError, TypeError):
        return (directory / _CONTENTS).exists()


def read_metadata(directory: AnyPath, copied_from: stores.StoredDirectory | None = None) -> dict[str, Any]:
    """The metadata that the build of a corpus wrote. Raises UserError for an incomplete or damaged corpus.

    Args:
        copied_from: The directory on a store, if `directory` is a copy of its metadata.
    """
    listed = stores.StoredDirectory(directory) if is_remote(directory) else copied_from
    stored = None if listed is None else listed.files

    def read(name: str) -> dict[str, Any]:
        try:
            content = json.loads((directory / name).read_text())
            if not isinstance(content, dict):
                raise ValueError("no JSON object")
        except (FileNotFoundError, ValueError) as error:
            raise damaged_corpus(directory, name, error_words(error), copied_from) from None
        return content

    _, _, metadata = map(read, ("dataset_info.json", "features.json", "metadata.json"))
    if metadata.get("format", 1) != 1 or (directory / _CONTENTS).exists():  # corpora of version 1 have no such file
        for name, expected in read(_CONTENTS).items():
            path = directory / name
            exists = path.exists() if stored is None else name in stored
            if not exists:
                raise damaged_corpus(directory, name, "missing", copied_from)
            if (_state_of(path) if stored is None or path.suffix == ".json" else stored[name].size) != expected:
                raise damaged_corpus(directory, name, "it is not as it was built", copied_from)
    return metadata


def _state_of(path: AnyPath) -> int | str:
    """The digest of a file of metadata; the size of a shard, whose records have checksums of their own."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".json" else os.stat(path).st_size


def damaged_corpus(
    directory: AnyPath, file: str, words: str, copied_from: stores.StoredDirectory | None = None
) -> UserError:
    """The error for a damaged file of a corpus, with the commands that build it again, or copy it from a store."""
    if copied_from is not None:
        return UserError(
            f"{directory / file}: is damaged ({words}); try rm -r {directory}, then this command again; if it is "
            f"damaged again, so is {copied_from.path}/{file}"
        )
    if not is_built(directory):
        return UserError(
            f"{directory / file}: is damaged ({words}); try another copy of it, or tfds build --overwrite "
            "--file_format=array_record on a machine with TensorFlow"
        )
    name, place = directory.parent.name, directory.parent.parent
    command = f"mot data build {name} FILES" if place.name == "corpora" else "this command"
    if command != "this command" and is_remote(directory):
        command += f" --directory {place.parent}"
    return UserError(f"{directory / file}: is damaged ({words}); try {stores.removal(directory)}, then {command} again")


def summary_lines(metadata: dict[str, Any]) -> list[str]:
    """The counts of a build as lines of text."""
    lines = [
        f"{split}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, "
        f"the longest {counts['longest']:,} ({counts['longest'] / counts['bytes']:.2%})"
        for split, counts in metadata["counts"].items()
    ]
    lines += [f"{count:,} {REASONS[reason]}" for reason, count in metadata["skipped"].items()]
    for words, key in (("no documents in", "left_out"), ("documents missing from", "incomplete")):
        reasons = list(metadata.get(key, {}).items())
        for reason, (count, names) in reasons[:_NAMED]:
            more = f" and {count - len(names):,} more (left_out.jsonl)" if count > len(names) else ""
            lines.append(f"{words} {', '.join(names)}{more}: {reason}")
        if others := sum(count for _, (count, _) in reasons[_NAMED:]):
            lines.append(f"{words} {others:,} more, for other reasons (left_out.jsonl)")
    return lines


# --- pieces -----------------------------------------------------------------------------------------------------------


class BuildPiece(NamedTuple):
    """A unit of work for one process: some of the file parts of a corpus."""

    number: int
    total: int
    spec: CorpusSpec  # with only the parts of this piece

    @property
    def marker(self) -> str:
        return f"piece-{self.number:05d}.json"


def _piece_bytes(total: int) -> int:
    return max(PIECE_BYTES, total // _MAX_PIECES)


def _split_into_pieces(spec: CorpusSpec) -> list[BuildPiece]:
    size, filled = _piece_bytes(spec.total_bytes), 0
    groups: list[list[FilePart]] = [[]]
    for part in spec.parts:
        if filled >= size:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += part.size
    return [BuildPiece(i, len(groups), dataclasses.replace(spec, parts=tuple(g))) for i, g in enumerate(groups)]


def _shard_files(spec: CorpusSpec, directory: Path, split: str) -> tfds.core.ShardedFileTemplate:
    dataset = spec.name.partition("/")[0]
    return tfds.core.ShardedFileTemplate(directory, dataset_name=dataset, split=split, filetype_suffix="array_record")


def _features() -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()})


def _write_piece(directory: Path, piece: BuildPiece, advance: pool.Advance) -> None:
    """Write the shards of a piece, then its marker."""
    spec = piece.spec
    place = {"shard_index": piece.number, "num_shards": piece.total}
    paths = {split: Path(_shard_files(spec, directory, split).sharded_filepath(**place)) for split in spec.splits}
    writers = {split: ArrayRecordWriter(os.fspath(path), "group_size:1,zstd:1") for split, path in paths.items()}
    digest, reports = hashlib.sha256(spec.salt.encode()), defaultdict[str, ReadReport](ReadReport)
    counts = {split: Counter(documents=0, bytes=0, longest=0, stored=0) for split in spec.splits}
    for part in spec.parts:
        report = ReadReport()
        for name, text in read_part(part, spec.documents, spec.feature, report):
            label = name.encode(errors="replace")  # file names need not be UTF-8
            split = part.split or spec.splits[_hash_fraction(text) < spec.validation]
            record = _record({"name": label, "text": text})
            writers[split].write(record)
            digest.update(b"\0%s %s %d\0" % (split.encode(), label, len(text)))
            digest.update(text)
            count = counts[split]
            count.update(documents=1, bytes=len(text), stored=len(record))
            count["longest"] = max(count["longest"], len(text))
        reports[part.path] += report
        advance(part.size)
    for writer in writers.values():
        writer.close()
    files = {path: (report.documents, report.skipped, report.reason) for path, report in reports.items()}
    shards = {path.name: path.stat().st_size for path in paths.values()}
    for path in paths.values():
        sync(path)
    finished = {"digest": digest.hexdigest(), "counts": counts, "files": files, "shards": shards}
    replace_file(epath.Path(directory / piece.marker), strict_json.dumps(finished).encode())


def _finished(directory: Path, piece: BuildPiece) -> dict[str, Any] | None:
    """The content of a piece's marker; None without a marker, or if a shard is not complete."""
    try:
        result = json.loads((directory / piece.marker).read_text())
        complete = all((directory / name).stat().st_size == size for name, size in result["shards"].items())
    except (OSError, ValueError, KeyError):
        return None
    return result if complete else None


def _record(features: dict[str, bytes]) -> bytes:
    """A serialized TFDS example, byte for byte as TFDS's serializer writes it, in a seventh of the time."""
    example = tf_example_pb2.Example()
    for name, value in features.items():
        example.features.feature[name].bytes_list.value.append(value)
    return example.SerializeToString(deterministic=True)


def _hash_fraction(text: bytes) -> float:
    """A number from 0 to 1 by the hash of the text, so that equal documents go to the same split."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) / 2**64


# --- the data set -----------------------------------------------------------------------------------------------------


def _build_in(directory: Path, spec: CorpusSpec, workers: int | None, log: Callable[[str], None]) -> None:
    """Build the data set in `directory`, starting from its finished pieces."""
    identity = spec.identity()
    plan = directory / PLAN
    if directory.exists() and not (plan.exists() and plan.read_text() == identity):
        shutil.rmtree(directory)
    directory.mkdir(exist_ok=True)
    replace_file(epath.Path(plan), identity.encode())
    pieces = _split_into_pieces(spec)
    missing = [piece for piece in pieces if _finished(directory, piece) is None]
    if len(missing) < len(pieces):
        log(f"{spec.name}: {len(pieces) - len(missing)} of {len(pieces)} pieces were finished by an earlier build")
    size = sum(piece.spec.total_bytes for piece in missing)
    start = time.perf_counter()
    workers = 1 if len(missing) < 6 else workers  # starting a process takes as long as writing some pieces
    pool.run_in_processes(
        functools.partial(_write_piece, directory), missing, workers, f"building {spec.name}, bytes", size
    )
    seconds = time.perf_counter() - start
    results = [json.loads((directory / piece.marker).read_text()) for piece in pieces]
    new = sum(c["bytes"] for piece in missing for c in results[piece.number]["counts"].values())
    log(f"{spec.name}: {new / 1e6:,.1f} MB of text in {seconds:.1f} s, {new / seconds / 1e6:.1f} MB/s")
    reports = _combined_reports(spec, results)
    metadata = _combined_metadata(spec, results, reports) | {"plan": identity}
    if not metadata["counts"]:
        shutil.rmtree(directory)
        reasons = [f"{', '.join(names)}: {reason}" for reason, (_, names) in metadata["left_out"].items()]
        raise UserError(f"NAME = {spec.name!r}: no document in the files; " + "; ".join(reasons[:_NAMED]))
    left_out = [
        {"file": path, "documents": report.documents, "reason": report.why_incomplete()}
        for path, report in reports.items()
        if report.incomplete
    ]
    if left_out:
        lines = "".join(f"{strict_json.dumps(entry)}\n" for entry in left_out)
        replace_file(epath.Path(directory / "left_out.jsonl"), lines.encode())
    _write_tfds_metadata(directory, spec, results, metadata)
    for name in [PLAN, *(piece.marker for piece in pieces)]:
        (directory / name).unlink()
    states = {path.name: _state_of(path) for path in sorted(directory.iterdir())}
    replace_file(epath.Path(directory / _CONTENTS), strict_json.dumps(states, indent=1).encode())
    for path in directory.iterdir():
        sync(path)
    sync(directory)


def _combined_reports(spec: CorpusSpec, results: list[dict[str, Any]]) -> dict[str, ReadReport]:
    """The report on each file, by its path."""
    reports = {part.path: ReadReport() for part in spec.parts}
    for result in results:
        for path, (documents, skipped, reason) in result["files"].items():
            reports[path] += ReadReport(documents, Counter(skipped), reason)
    return reports


def _combined_metadata(
    spec: CorpusSpec, results: list[dict[str, Any]], reports: dict[str, ReadReport]
) -> dict[str, Any]:
    """Fingerprint and counts of the whole corpus; splits without documents are omitted."""
    skipped = sum((report.skipped for report in reports.values()), Counter[str]())
    names = {part.path: part.name for part in spec.parts}
    by_reason: dict[str, dict[str, list[str]]] = {"left_out": defaultdict(list), "incomplete": defaultdict(list)}
    for path, report in reports.items():
        if report.incomplete:
            key = "incomplete" if report.documents else "left_out"
            by_reason[key][report.why_incomplete()].append(_printable(names[path]))
    digests = [result["digest"] for result in results]
    counts = {}
    for split in spec.splits:
        split_counts = [result["counts"][split] for result in results]
        total = {field: sum(count[field] for count in split_counts) for field in ("documents", "bytes")}
        if total["documents"]:
            counts[split] = total | {"longest": max(count["longest"] for count in split_counts)}
    return {
        "fingerprint": digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        "counts": counts,
        "skipped": {reason: skipped[reason] for reason in REASONS if skipped[reason]},
        **{
            key: {reason: [len(of_reason), of_reason[:_NAMED]] for reason, of_reason in reasons.items()}
            for key, reasons in by_reason.items()
        },
        "format": FORMAT_VERSION,
    }


def _printable(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _write_tfds_metadata(
    directory: Path, spec: CorpusSpec, results: list[dict[str, Any]], metadata: dict[str, Any]
) -> None:
    """Write the metadata with which TFDS reads the shards; delete the shards of splits without documents."""
    infos = []
    for split in spec.splits:
        template, counts = _shard_files(spec, directory, split), [result["counts"][split] for result in results]
        if split in metadata["counts"]:
            lengths = [count["documents"] for count in counts]
            infos.append(tfds.core.SplitInfo(split, lengths, sum(count["stored"] for count in counts), template))
        else:
            for shard in template.sharded_filepaths(len(results)):
                shard.unlink(missing_ok=True)
    dataset, _, config = spec.name.partition("/")
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(dataset, tfds.core.Version(VERSION), os.fspath(directory), "", config),
        description=DESCRIPTION,
        features=_features(),
        metadata=tfds.core.MetadataDict(metadata),
        disable_shuffling=True,  # documents are stored in the order of the files
    )
    info.set_file_format("array_record")
    info.set_splits(tfds.core.SplitDict(infos))
    info.write_to_directory(directory)
