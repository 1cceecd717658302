"""Which files `spec.dataset` names (files, folders, patterns), each pinned as it was found, and how often each source's
examples are learnt."""

from __future__ import annotations

import functools
import logging
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from random import Random
from urllib.parse import quote

from finetune_api.document import StorageSettings
from finetune_api.failures import FailureClass, JobError
from finetune_api.spec import DataFile, Dataset, TrainFile
from finetune_api.uri import FileLocation, HubLocation, Location, S3Location, parse
from finetune_trainer.data.containers import ENDINGS, kind_of
from finetune_trainer.plan import SourceFile
from finetune_trainer.storage import Folder, open_location
from finetune_trainer.storage.base import ObjectInfo

log = logging.getLogger(__name__)

MAX_FILES = 10_000
SHOWN = 5
"""Names of other files in a message that nothing was found."""
_ABOUT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files that the library datasets writes beside its data."""


def find(dataset: Dataset, storage: StorageSettings) -> tuple[list[SourceFile], list[SourceFile]]:
    """The files to learn from and to measure with, in the order of the sources and then of their names.

    Raises:
        JobError: NotFound, or UserError when a file is named twice or there are too many.
    """
    seen: dict[object, str] = {}
    train = _find_all(dataset.train, storage, seen)
    return train, _find_all(dataset.validation or [], storage, seen)


def _find_all(entries: Iterable[DataFile], storage: StorageSettings, seen: dict[object, str]) -> list[SourceFile]:
    """`seen` has the files that were found before, and grows."""
    found = []
    for entry in entries:
        files = _find(entry.uri, storage)
        if len(seen) + len(files) > MAX_FILES:
            raise JobError(
                FailureClass.USER_ERROR,
                f"The dataset has more than {MAX_FILES} files: {entry.uri} names {len(files)}, and those before it "
                f"{len(seen)}. Put their rows into fewer files.",
            )
        for file in files:
            if file.size == 0:
                raise JobError(FailureClass.DATA_ERROR, f"The data file {file.uri} is empty. Upload rows.")
            identity = _identity(file)
            if identity in seen:
                raise JobError(
                    FailureClass.USER_ERROR,
                    f"The data file {file.uri} is named twice, by {seen[identity]} and by {entry.uri}. Name it once; "
                    "the weight of a source says how often its rows are learnt.",
                )
            seen[identity] = entry.uri
        found += files
    return found


def _identity(file: SourceFile) -> object:
    location = parse(file.uri)
    # A commit has several names; what is the same path and content is the same file.
    return (location.repo, location.path, file.version) if isinstance(location, HubLocation) else location


@dataclass(frozen=True)
class _Source:
    """A URI of a source, taken apart."""

    location: Location
    folder: Location
    """The folder below which its files are."""
    pattern: re.Pattern[str] | None
    """What the whole path of a file matches; None where the URI is that of one file."""

    def names(self, location: Location) -> bool:
        path = _path(location)
        if self.pattern is None:
            return location == self.location
        return _at(self.location, path) == location and bool(self.pattern.fullmatch(path)) and _is_data(path)


@functools.lru_cache(maxsize=256)
def _source(uri: str) -> _Source:
    try:
        location = parse(uri)
    except ValueError as error:
        raise JobError(FailureClass.USER_ERROR, str(error)) from error
    path = _path(location)
    if uri.endswith("/") or not path:
        return _Source(location, location, _pattern(f"{path}/**" if path else "**"))
    parent = path.partition("*")[0].rpartition("/")[0]
    return _Source(location, _at(location, parent), _pattern(path) if "*" in path else None)


_NAME = r"(?![._])[^/]+"
"""A name that a wildcard matches: what begins with a dot or an underscore is not meant to be read as data."""


def _pattern(path: str) -> re.Pattern[str]:
    """`*` is any part of a name, `**` any number of folders."""
    parts = []
    segments = re.sub(r"(^|/)\*\*(?=[^/])", r"\1**/*", path).split("/")
    for segment in segments:
        if segment == "**":
            parts.append(f"(?:{_NAME}/)*")
            continue
        text = "".join("[^/]*" if piece.startswith("*") else re.escape(piece) for piece in re.split(r"(\*+)", segment))
        parts.append(f"(?![._]){text}/" if segment.startswith("*") else f"{text}/")
    last = parts.pop()
    return re.compile("".join(parts) + (last + _NAME if segments[-1] == "**" else last.removesuffix("/")))


def _is_data(path: str) -> bool:
    return kind_of(path) is not None and path.rpartition("/")[2] not in _ABOUT_DATA


def _path(location: Location) -> str:
    return location.key if isinstance(location, S3Location) else location.path


def _at(location: Location, path: str) -> Location:
    """The same bucket, repository or disk at another path."""
    match location:
        case S3Location():
            return replace(location, key=path)
        case HubLocation():
            return replace(location, path=path)
        case FileLocation():
            return FileLocation(path or "/")


def _find(uri: str, storage: StorageSettings) -> list[SourceFile]:
    source = _source(uri)
    if source.pattern is None:
        return [_one_file(uri, source, storage)]
    folder = open_location(source.folder, storage)
    base = _path(source.folder).rstrip("/")
    found, others = [], []
    for info in folder.list():
        location = _at(source.location, f"{base}/{info.key}" if base or _path(source.folder) else info.key)
        if source.names(location):
            found.append(SourceFile(uri=_text(location), size=info.size, version=info.version))
        else:
            others.append(info.key)
    if not found:
        there = f"there is only {_some(others)}" if others else "there is nothing"
        raise JobError(
            FailureClass.NOT_FOUND, f"{uri} names no data file: below {folder.uri} {there}. Correct the URI. {ENDINGS}."
        )
    log.info("%s: %d files, %d bytes", uri, len(found), sum(file.size for file in found))
    if others:
        log.info("%s: left out %s, because they are no data files or the pattern does not match", uri, _some(others))
    return found


def _one_file(uri: str, source: _Source, storage: StorageSettings) -> SourceFile:
    if kind_of(uri) is None:
        raise JobError(
            FailureClass.USER_ERROR, f"{uri} has an ending that is unknown. {ENDINGS}. The URI of a folder ends in /."
        )
    info = open_location(source.folder, storage).stat(_path(source.location).rpartition("/")[2])
    if info is None:
        raise JobError(FailureClass.NOT_FOUND, f"The data file {uri} does not exist. Correct the URI.")
    return SourceFile(uri=uri, size=info.size, version=info.version)


def _text(location: Location) -> str:
    return f"file://{quote(location.path)}" if isinstance(location, FileLocation) else str(location)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(sorted(names)[:SHOWN]) + more


def entry_of(uri: str, entries: Sequence[DataFile]) -> int:
    """Which of the sources names a file; no two do."""
    location = parse(uri)
    return next(number for number, entry in enumerate(entries) if _source(entry.uri).names(location))


def download(files: Sequence[SourceFile], target: Path, storage: StorageSettings) -> list[tuple[str, Path]]:
    """Fetch data files as they were pinned; pairs of the name a user knows and the local path."""
    opened: dict[Location, Folder] = {}
    fetched = []
    for number, file in enumerate(files):
        location = parse(file.uri)
        # A repository is asked once for all its files.
        parent = "" if isinstance(location, HubLocation) else _path(location).rpartition("/")[0]
        root = _at(location, parent)
        if root not in opened:
            opened[root] = open_location(root, storage)
        key = _path(location).removeprefix(parent).lstrip("/")
        path = target / str(number)
        opened[root].download(ObjectInfo(key, file.size, file.version), path)
        fetched.append((file.uri, path))
    return fetched


def is_weighted(entries: Iterable[TrainFile]) -> bool:
    return any(Fraction(entry.weight or 1) != 1 for entry in entries)


def copies(sources: Sequence[int], entries: Sequence[TrainFile], left_out: Sequence[bool], seed: int) -> array[int]:
    """How often each example is learnt in an epoch. `sources` has the number of each example's source.

    The part of a weight behind the point chooses examples by the seed and the source's own URI, so that other sources
    and their order change nothing.
    """
    result = array("B", bytes(len(sources)))
    members = [array("L") for _ in entries]
    for example, source in enumerate(sources):
        if not left_out[example]:
            members[source].append(example)
    for entry, examples in zip(entries, members, strict=True):
        whole, part = divmod(Fraction(entry.weight or 1), 1)
        for example in examples:
            result[example] = whole
        for example in Random(f"{seed} {entry.uri}").sample(examples, int(part * len(examples) + Fraction(1, 2))):
            result[example] += 1
    return result
