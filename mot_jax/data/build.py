"""Builds a TFDS data set out of files, in many processes, and goes on where a killed build stopped.

The input is cut into pieces, each written by one process into a shard of its own for every split. A finished piece
leaves a marker, and is never written again. Which documents a piece holds depends on the files alone, so the result is
the same for any number of processes and kills.

    <directory>/corpora/NAME/1.0.0.building/    plan (what is being built), piece-00003.json (finished), shards
    <directory>/corpora/NAME/1.0.0/             the same renamed, with TFDS's metadata: the data set
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from mot_jax.data import pool
from mot_jax.data.files import Documents, Part, cut, find_files, read_part
from mot_jax.errors import UserError

FORMAT_VERSION = 1
VERSION = "1.0.0"
PIECE_BYTES = 1 << 24  # of text, about
_MOST_PIECES = 256  # readers keep all shards of a split open, and systems allow about 1,000 open files
_REASONS = {
    "other_files": "files of other kinds left out",
    "damaged_files": "damaged files, read as far as possible",
    "too_long": "documents or lines of more than 64 MiB left out",
    "not_json": "lines left out that are not JSON",
    "no_feature": "lines or rows left out that have no such text",
    "empty": "empty documents left out",
    "damaged_utf8": "documents with damaged UTF-8, mended with U+FFFD",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that decides a corpus' content.

    splits: names; where a part names none, a document goes by its hash to the second split, with the probability
    `validation`, or to the first. salt: goes into the fingerprint. other_files: how many were left out.
    """

    name: str
    parts: tuple[Part, ...]
    splits: tuple[str, ...] = ("train", "validation")
    documents: Documents = "file"
    feature: str = "text"
    validation: float = 0.0
    salt: str = ""
    other_files: int = 0

    def identity(self) -> str:
        fields = [FORMAT_VERSION, PIECE_BYTES, [dataclasses.astuple(part) for part in self.parts]]
        fields += [getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "parts"]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()

    @property
    def total_bytes(self) -> int:
        return sum(part.size for part in self.parts)


def plan_files(
    name: str, files: Iterable[str], documents: Documents = "file", feature: str = "text", validation: float = 0.01
) -> Plan:
    """The plan of a corpus out of the user's files, patterns and directories. Raises UserError."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "python_source":
        good = re.sub(r"^[^a-z]+|\W", "", name.lower().replace("-", "_"))
        raise UserError(
            f"NAME = {name!r}: must be small letters, digits and underscores, begin with a letter, and not be "
            f"python_source; try {good if good not in ('', 'python_source') else 'mine'}"
        )
    if not 0 <= validation < 1:
        raise UserError(f"--validation = {validation:g}: must be at least 0 and below 1; try 0.01")
    found, others = find_files(files)
    size = _piece_bytes(sum(map(os.path.getsize, found)))
    parts = tuple(part for path, label in found.items() for part in cut(path, label, documents, size))
    return Plan(name, parts, documents=documents, feature=feature, validation=validation, other_files=others)


def prepared(corpora: Path, name: str) -> Path | None:
    """The directory of the corpus `name` under `corpora`, if it is whole."""
    directory = corpora / name / VERSION
    return directory if (directory / "dataset_info.json").exists() else None


def build(plan: Plan, corpora: Path, workers: int | None = None, say: Callable[[str], None] | None = None) -> Path:
    """The directory of the corpus under `corpora`, which is filled if it is not there yet.

    workers: processes, at most; None is as many as there are cores. say: is told what comes of it, in lines.
    Raises UserError where another corpus has that name, and where no document is left.
    """
    say = say or (lambda line: None)
    directory, building = corpora / plan.name / VERSION, corpora / plan.name / f"{VERSION}.building"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.directory = {corpora.parent}: cannot be written ({error.strerror}); try one that can"
        ) from error
    with _lock(directory.parent / ".lock", say):
        if prepared(corpora, plan.name):
            if json.loads((directory / "metadata.json").read_text()).get("plan") != plan.identity():
                raise UserError(
                    f"NAME = {plan.name!r}: {directory} holds a corpus of other files or options, or of files that "
                    f"have changed; try another name, or remove that directory"
                )
            say(f"{plan.name} is built already, out of the same files")
        else:
            pieces = _fill(building, plan, workers, say)
            building.rename(directory)
            for name in ["plan", *(piece.marker for piece in pieces)]:
                (directory / name).unlink()
    metadata = json.loads((directory / "metadata.json").read_text())
    for line in summary(metadata):
        say(line)
    if plan.validation and plan.splits[1] not in metadata["counts"]:
        say(f"no document fell to {plan.splits[1]}; try a larger --validation, under another name")
    say(f"it lies in {directory}")
    return directory


def summary(metadata: dict[str, Any]) -> list[str]:
    """What a build counted, in lines."""
    lines = [
        f"{split}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, "
        f"the longest {counts['longest']:,} ({counts['longest'] / counts['bytes']:.2%})"
        for split, counts in metadata["counts"].items()
    ]
    return lines + [f"{count:,} {_REASONS[reason]}" for reason, count in metadata["skipped"].items()]


# --- pieces -----------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """What one process does at a time: some of a plan's parts."""

    number: int
    of: int
    plan: Plan  # with the parts of this piece alone

    @property
    def marker(self) -> str:
        return f"piece-{self.number:05d}.json"


def _piece_bytes(total: int) -> int:
    return max(PIECE_BYTES, total // _MOST_PIECES)


def _pieces(plan: Plan) -> list[Piece]:
    size, filled = _piece_bytes(plan.total_bytes), 0
    groups: list[list[Part]] = [[]]
    for part in plan.parts:
        if filled >= size:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += part.size
    return [Piece(i, len(groups), dataclasses.replace(plan, parts=tuple(g))) for i, g in enumerate(groups)]


def _shards(plan: Plan, directory: Path, split: str) -> tfds.core.ShardedFileTemplate:
    dataset = plan.name.partition("/")[0]
    return tfds.core.ShardedFileTemplate(directory, dataset_name=dataset, split=split, filetype_suffix="array_record")


def _features() -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()})


def _write_piece(directory: Path, piece: Piece, advance: pool.Advance) -> None:
    """Writes the shards of a piece, and its marker."""
    plan = piece.plan
    writers = {}
    for split in plan.splits:
        shard = _shards(plan, directory, split).sharded_filepath(shard_index=piece.number, num_shards=piece.of)
        writers[split] = ArrayRecordWriter(os.fspath(shard), "group_size:1,zstd:1")
    digest, skipped = hashlib.sha256(plan.salt.encode()), Counter[str]()
    counts = {split: Counter(documents=0, bytes=0, longest=0, stored=0) for split in plan.splits}
    for part in plan.parts:
        for name, text in read_part(part, plan.documents, plan.feature, skipped):
            label = name.encode(errors="replace")  # file names need not be UTF-8
            split = part.split or plan.splits[_fraction(text) < plan.validation]
            record = _record({"name": label, "text": text})
            writers[split].write(record)
            digest.update(b"\0%s %s %d\0" % (split.encode(), label, len(text)))
            digest.update(text)
            count = counts[split]
            count.update(documents=1, bytes=len(text), stored=len(record))
            count["longest"] = max(count["longest"], len(text))
        advance(part.size)
    for writer in writers.values():
        writer.close()
    finished = json.dumps({"digest": digest.hexdigest(), "counts": counts, "skipped": skipped})
    temporary = directory / f"{piece.marker}.writing"
    temporary.write_text(finished)
    temporary.rename(directory / piece.marker)


def _record(features: dict[str, bytes]) -> bytes:
    """What TFDS's serializer makes of texts, in a seventh of the time."""
    example = tf_example_pb2.Example()
    for name, value in features.items():
        example.features.feature[name].bytes_list.value.append(value)
    return example.SerializeToString(deterministic=True)


def _fraction(text: bytes) -> float:
    """0 to 1 by the text's hash, so that equal documents land in the same split."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) / 2**64


# --- the whole --------------------------------------------------------------------------------------------------------


def _fill(directory: Path, plan: Plan, workers: int | None, say: Callable[[str], None]) -> list[Piece]:
    """Makes the data set in `directory`, out of what is there of it already; its pieces."""
    identity = plan.identity()
    with contextlib.suppress(FileNotFoundError):
        if (directory / "plan").read_text() != identity:
            shutil.rmtree(directory)
    directory.mkdir(exist_ok=True)
    (directory / "plan").write_text(identity)
    pieces = _pieces(plan)
    missing = [piece for piece in pieces if not (directory / piece.marker).exists()]
    if len(missing) < len(pieces):
        say(f"{plan.name}: {len(pieces) - len(missing)} of {len(pieces)} pieces are there from an earlier build")
    size = sum(piece.plan.total_bytes for piece in missing)
    start = time.perf_counter()
    workers = 1 if len(missing) < 6 else workers  # a process takes as long to start as some pieces take
    pool.run(functools.partial(_write_piece, directory), missing, workers, f"building {plan.name}, bytes", size)
    seconds = time.perf_counter() - start
    results = [json.loads((directory / piece.marker).read_text()) for piece in pieces]
    new = sum(c["bytes"] for piece in missing for c in results[piece.number]["counts"].values())
    say(f"{plan.name}: {new / 1e6:,.1f} MB of text in {seconds:.1f} s, {new / seconds / 1e6:.1f} MB/s")
    metadata = _metadata(plan, results) | {"plan": identity}
    if not metadata["counts"]:
        shutil.rmtree(directory)
        counted = "; ".join(f"{count:,} {_REASONS[reason]}" for reason, count in metadata["skipped"].items())
        raise UserError(
            f"NAME = {plan.name!r}: not one document in the files ({counted or 'which are empty'}); here --text-feature is "
            f"{plan.feature!r} and --documents is {plan.documents!r}; try others, or other files"
        )
    _describe(directory, plan, results, metadata)
    return pieces


def _metadata(plan: Plan, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Fingerprint and counts of the whole corpus; splits without a document are left out."""
    skipped = sum((Counter(result["skipped"]) for result in results), Counter(other_files=plan.other_files))
    digests = [result["digest"] for result in results]
    counts = {}
    for split in plan.splits:
        found = [result["counts"][split] for result in results]
        total = {field: sum(count[field] for count in found) for field in ("documents", "bytes")}
        if total["documents"]:
            counts[split] = total | {"longest": max(count["longest"] for count in found)}
    return {
        "fingerprint": digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        "counts": counts,
        "skipped": {reason: skipped[reason] for reason in _REASONS if skipped[reason]},
    }


def _describe(directory: Path, plan: Plan, results: list[dict[str, Any]], metadata: dict[str, Any]) -> None:
    """Writes what TFDS needs to read the shards, and removes those of splits without a document."""
    infos = []
    for split in plan.splits:
        template, counts = _shards(plan, directory, split), [result["counts"][split] for result in results]
        if split in metadata["counts"]:
            lengths = [count["documents"] for count in counts]
            infos.append(tfds.core.SplitInfo(split, lengths, sum(count["stored"] for count in counts), template))
        else:
            for shard in template.sharded_filepaths(len(results)):
                shard.unlink(missing_ok=True)
    dataset, _, config = plan.name.partition("/")
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(dataset, tfds.core.Version(VERSION), os.fspath(directory), "", config),
        description="Text, as mot_jax built it.",
        features=_features(),
        metadata=tfds.core.MetadataDict(metadata),
        disable_shuffling=True,  # documents stay in the order of the files
    )
    info.set_file_format("array_record")
    info.set_splits(tfds.core.SplitDict(infos))
    info.write_to_directory(directory)


@contextlib.contextmanager
def _lock(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One process at a time, where the file system has locks."""
    with open(path, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that builds {path.parent}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
