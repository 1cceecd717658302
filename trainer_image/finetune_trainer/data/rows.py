"""Read rows from files, one at a time, each with the number a person finds it by.

Nothing is lost silently: a row that cannot be read comes out as a row with a problem, and `Problems` counts it. What
makes the rest of a file unreadable ends the job. Memory does not grow with the number of rows.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.failures import FailureClass, JobError
from finetune_api.spec import RowPolicy
from finetune_trainer.data.containers import BLOCK, ENDINGS, Kind, Unreadable, kind_of, open_text, require_parquet

MAX_ROW_BYTES = 64 << 20
"""A larger row is a bad row, which is passed over without being held in memory."""
MAX_EXAMPLES = 10
MAX_REASONS = 1000
"""Different reasons that are counted one by one."""
PARQUET_BATCH_ROWS = 1000
PARQUET_BATCH_BYTES = 8 << 20

_TOO_LARGE = f"is larger than {MAX_ROW_BYTES >> 20} MiB"
_NOT_UTF8 = "not UTF-8 text"
_NUL = "holds a NUL byte"
_AGAIN = "Upload it again"


@dataclass(frozen=True)
class Row:
    file: str
    number: int
    """Line of a .jsonl file, position from 1 in a .json array, record from 1 in other files."""
    value: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    file: str
    number: int
    reason: str
    """A short phrase, the same for all rows with this problem; never the content of the row."""

    def __str__(self) -> str:
        return f"{self.file} row {self.number}: {self.reason}"


class RowError(ValueError):
    """A row cannot be used; the message is the reason."""


@dataclass
class Problems:
    """Counts bad rows, keeps the first few of them, and says when there are too many."""

    policy: RowPolicy
    limit: int
    count: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[BadRow] = field(default_factory=list)

    def add(self, row: BadRow) -> None:
        self.count += 1
        known = row.reason in self.reasons or len(self.reasons) < MAX_REASONS
        self.reasons[row.reason if known else "other reasons"] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(row)

    def check(self, total: int) -> None:
        """Call when all `total` rows were seen.

        Raises:
            JobError: DataError, when the policy does not allow this many bad rows.
        """
        if self.count == 0 or (self.policy is RowPolicy.SKIP and self.count <= self.limit):
            return
        if self.policy is RowPolicy.SKIP:
            verdict = f"{self.count} of {total} rows cannot be used, and dataset.invalidRows.limit is {self.limit}"
            remedy = "Mend them, or raise the limit."
        else:
            verdict = f"{self.count} of {total} rows cannot be used"
            remedy = "Mend them, or set dataset.invalidRows.policy to Skip."
        shown = "; ".join(map(str, self.examples))
        more = f"; and {self.count - len(self.examples)} more" if self.count > len(self.examples) else ""
        counts = ", ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common(10))
        raise JobError(FailureClass.DATA_ERROR, f"{verdict}: {shown}{more}. In all: {counts}. {remedy}")


def read_rows(path: Path, name: str) -> Iterator[Row | BadRow]:
    """All rows of a file. `name` is what the user calls it; its ending tells the container.

    Raises:
        JobError: DataError, when the file as a whole or the rest of it cannot be read.
    """
    number = 0
    try:
        kind = kind_of(name)
        if kind is None:
            raise Unreadable("has an ending that is unknown", ENDINGS)
        for number, value in _rows(path, kind):
            yield BadRow(name, number, value.reason) if isinstance(value, _Bad) else Row(name, number, value)
        if number == 0:
            raise Unreadable("holds no row", "Upload rows, or take the file out of the dataset")
    except Unreadable as error:
        place = f" (after row {number})" if number else ""
        raise JobError(FailureClass.DATA_ERROR, f"{name} {error.problem}{place}. {error.remedy}.") from error


@dataclass(frozen=True)
class _Bad:
    reason: str


_Numbered = Iterator[tuple[int, dict[str, Any] | _Bad]]
"""Rows with their numbers, which rise."""


def _rows(path: Path, kind: Kind) -> _Numbered:
    if kind.container == ".parquet":
        yield from _parquet(path)
        return
    with open_text(path, kind) as stream:
        match kind.container:
            case ".jsonl" | ".ndjson":
                yield from _json_lines(stream)
            case ".json":
                yield from _json_array(stream)
            case _:
                yield from _separated(stream, "," if kind.container == ".csv" else "\t")


# JSON


def _json_lines(stream: io.BufferedReader) -> _Numbered:
    head = stream.peek(BLOCK).removeprefix(BOM_UTF8)
    spread = re.match(rb"\s*(\[\s*(\{|$)|\{\s*\n)", head) is not None
    held: tuple[int, _Bad] | None = None
    for number, raw in _lines(stream):
        value: dict[str, Any] | _Bad | None = _Bad(_TOO_LARGE) if raw is None else _line(raw, first=number == 1)
        if value is None:
            continue
        if spread:
            # Several lines of lists are rows of the wrong shape; one list is a .json file.
            if value != _NOT_AN_OBJECT:
                raise _not_lines()
            held, spread = (number, _NOT_AN_OBJECT), False
            continue
        if held:
            yield held
            held = None
        yield number, value
    if held:
        raise _not_lines()


def _not_lines() -> Unreadable:
    return Unreadable(
        "is JSON over several lines, or one list, and not one object on each line",
        "Write each object on a line of its own, or let the name of a list of objects end in .json",
    )


def _lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes | None]]:
    """Lines with their numbers; None in place of one that is too long."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            yield number, None
            while line and not line.endswith(b"\n"):
                line = stream.readline(BLOCK)
        else:
            yield number, line


def _line(raw: bytes, *, first: bool) -> dict[str, Any] | _Bad | None:
    """A row, or None for a blank line."""
    raw = raw.removeprefix(BOM_UTF8) if first else raw
    value = _object(raw) if raw.strip() else None
    return None if isinstance(value, _Bad) and not raw.decode("utf-8", "replace").strip() else value


def _object(raw: bytes) -> dict[str, Any] | _Bad:
    try:
        value = _DECODER.decode(raw.decode().strip())
    except RowError as error:
        return _Bad(str(error))
    except UnicodeDecodeError:
        return _Bad(_NOT_UTF8)
    except RecursionError:
        return _Bad("is nested too deeply")
    except ValueError:
        return _Bad(_NUL if b"\0" in raw else "not JSON")
    return value if isinstance(value, dict) else _NOT_AN_OBJECT


_NOT_AN_OBJECT = _Bad("not an object")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json keeps the last of equal keys and loses the others without a word."""
    value = dict(pairs)
    if len(value) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise RowError(f"has the key {key[:40]!r} twice")
    return value


def _no_constant(literal: str) -> Any:
    raise RowError(f"holds {literal}, which is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _json_array(stream: io.BufferedReader) -> _Numbered:
    """One element after the other. A damaged one is passed over: where it ends, brackets and quotes tell."""
    if not _skip_space(stream, BOM_UTF8):
        return
    if stream.read(1) != b"[":
        raise Unreadable(
            "is not a list of objects, [{...}, {...}]",
            "Write such a list, or let the name of a file with one object on each line end in .jsonl",
        )
    elements = _Elements(stream)
    number = 0
    while not elements.ended:
        raw = elements.next()
        if number == 0 and elements.ended and raw is not None and not raw.strip():
            break
        number += 1
        yield number, _Bad(_TOO_LARGE) if raw is None else _object(raw)
    if elements.rest.strip() or _skip_space(stream):
        raise Unreadable("has something behind the end of its list", "Write one list of all objects")


def _skip_space(stream: io.BufferedReader, prefix: bytes = b"") -> bool:
    """Go on to what is not white space; whether there is something."""
    if prefix and stream.peek(len(prefix)).startswith(prefix):
        stream.read(len(prefix))
    while head := stream.peek(1):
        space = len(head) - len(head.lstrip())
        stream.read(space)
        if space < len(head):
            return True
    return False


class _Elements:
    """Cuts an array into the texts of its elements, with no more than one of them in memory."""

    _OUTSIDE = re.compile(rb'["\[\]{},]')
    _INSIDE = re.compile(rb'["\\]')

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._window = bytearray()
        self._start = 0
        """Where in the window the next element begins."""
        self.ended = False
        """The array's closing bracket was found."""

    @property
    def rest(self) -> bytes:
        """What was read behind the elements."""
        return bytes(self._window[self._start :])

    def next(self) -> bytes | None:
        """The text of the next element; None when it is too large."""
        window, position = self._window, self._start
        depth = 0
        inside = too_large = False
        while True:
            found = (self._INSIDE if inside else self._OUTSIDE).search(window, position)
            mark = found[0] if found else b""
            if found is None or (mark == b"\\" and found.end() == len(window)):
                # Drop what was cut off before, and a too large element as far as it was looked at.
                position = found.start() if found else len(window)
                too_large = too_large or position - self._start > MAX_ROW_BYTES
                drop = position if too_large else self._start
                del window[:drop]
                self._start, position = 0, position - drop
                block = self._stream.read1(BLOCK)
                if not block:
                    raise Unreadable("is cut off before its list ends, or lacks a quotation mark or bracket", _AGAIN)
                window += block
                continue
            position = found.end()
            if mark == b"\\":
                position += 1
            elif mark == b'"':
                inside = not inside
            elif mark in b"[{":
                depth += 1
            elif mark in b"]}" and depth:
                depth -= 1
            elif mark in b",]" and not depth:
                self.ended = mark == b"]"
                start, self._start = self._start, position
                return None if too_large else bytes(window[start : position - 1])


# CSV


def _separated(stream: io.BufferedReader, delimiter: str) -> _Numbered:
    csv.field_size_limit(MAX_ROW_BYTES)
    with io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="") as text:
        lines = _RecordLines(text)
        records = filter(None, csv.reader(lines, delimiter=delimiter, strict=True))
        try:
            header = next(records, None)
            if header is None:
                return
            _check_header(header, delimiter)
            lines.begin()
            for number, fields in enumerate(records, start=1):
                lines.begin()
                yield number, _record(header, fields)
        except csv.Error as error:
            raise Unreadable(f"is not CSV ({error})", "Mend the record behind it, or upload the file again") from error


class _RecordLines:
    """Lines of a file of records. A quotation mark that is missing would make one record of all that follows."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self._left = MAX_ROW_BYTES

    def begin(self) -> None:
        """A record ended."""
        self._left = MAX_ROW_BYTES

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(self._left + 1)
        if not line:
            raise StopIteration
        self._left -= len(line)
        if self._left < 0:
            raise Unreadable(f"has a record that {_TOO_LARGE}", "Look for a quotation mark that is missing")
        return line


def _check_header(header: list[str], delimiter: str) -> None:
    name, remedy = header[0].lstrip(), "Name each column once in the first line"
    if isinstance(_record(header, header), _Bad):
        raise Unreadable("has a first line that is not UTF-8 text", "Save it as UTF-8")
    if name.startswith(("{", "[")):
        raise Unreadable("is JSON and not CSV", "Let its name end in .jsonl, or in .json where it is one list")
    if len(set(header)) < len(header):
        ((column, _),) = Counter(header).most_common(1)
        raise Unreadable(f"has the column {column[:40]!r} twice", remedy)
    other = next((mark for mark in ",;\t" if mark in name and mark != delimiter), None)
    if len(header) == 1 and other:
        where = {",": "let its name end in .csv", "\t": "let its name end in .tsv", ";": "separate them by commas"}
        raise Unreadable(f"has columns that are separated by {other!r}", f"Write {delimiter!r}, or {where[other]}")


def _record(header: list[str], fields: list[str]) -> dict[str, Any] | _Bad:
    if len(fields) != len(header):
        return _Bad("has another number of fields than the header")
    for text in fields:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                return _Bad(_NOT_UTF8)
        if "\0" in text:
            return _Bad(_NUL)
    return dict(zip(header, fields, strict=True))


# Parquet


def _parquet(path: Path) -> _Numbered:
    require_parquet(path)
    count = 0
    try:
        with pq.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                ((column, _),) = Counter(names).most_common(1)
                raise Unreadable(f"has the column {column[:40]!r} twice", "Name each column once")
            for batch in file.iter_batches(batch_size=_batch_rows(file.metadata)):
                for value in _values(_plain(batch)):
                    count += 1
                    yield count, value
            total = file.metadata.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise Unreadable("is a Parquet file that is damaged or cut off", _AGAIN) from error
    if count != total:
        raise Unreadable(f"is a damaged Parquet file: it says that it has {total} rows", _AGAIN)


def _batch_rows(metadata: pq.FileMetaData) -> int:
    size = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    return max(1, min(PARQUET_BATCH_ROWS, PARQUET_BATCH_BYTES * metadata.num_rows // max(size, 1)))


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Times of nanoseconds as numbers: Python has no such times."""
    for index, column in enumerate(batch.schema):
        if pa.types.is_temporal(column.type) and getattr(column.type, "unit", "") == "ns":
            batch = batch.set_column(index, column.name, batch.column(index).cast(pa.int64()))
    return batch


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | _Bad]:
    """Rows of a batch: together, or one by one where one of them cannot be used."""
    values = None
    if batch.nbytes <= MAX_ROW_BYTES:
        with contextlib.suppress(*_NO_VALUE):
            values = [_without_gaps(value) for value in batch.to_pylist(maps_as_pydicts="strict")]
    yield from values if values is not None else (_value(batch.slice(index, 1)) for index in range(batch.num_rows))


_NO_VALUE = (ValueError, KeyError, TypeError, OverflowError, pa.ArrowException)


def _without_gaps(value: dict[str, Any]) -> dict[str, Any]:
    """A struct has the members of all rows, and those that a row does not have are null in it."""
    return {name: _members(item) for name, item in value.items()}


def _members(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _members(item) for name, item in value.items() if item is not None}
    return [_members(item) for item in value] if isinstance(value, list) else value


def _value(row: pa.RecordBatch) -> dict[str, Any] | _Bad:
    if row.nbytes > MAX_ROW_BYTES:
        return _Bad(_TOO_LARGE)
    try:
        value: dict[str, Any] = _without_gaps(row.to_pylist(maps_as_pydicts="strict")[0])
    except UnicodeDecodeError:
        return _Bad(_NOT_UTF8)
    except _NO_VALUE:
        return _Bad("has a value that cannot be read, or a key twice")
    return value
