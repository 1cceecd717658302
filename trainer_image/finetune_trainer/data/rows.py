"""Read rows from .jsonl, .json and .csv files, one at a time, each with the number a person finds it by.

Nothing is lost silently: a row that cannot be read comes out as a row with a problem, and `Problems` counts it.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.failures import FailureClass, JobError
from finetune_api.spec import RowPolicy

MAX_JSON_BYTES = 1 << 30
"""A .json file is one value and must be read whole; .jsonl is read line by line and has no limit."""
MAX_EXAMPLES = 10


@dataclass(frozen=True)
class Row:
    file: str
    number: int
    """Line of a .jsonl file, position from 1 in a .json array, record from 1 in a .csv file."""
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
        self.reasons[row.reason] += 1
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
        JobError: DataError, when the file as a whole cannot be read.
    """
    ending = Path(name).suffix.lower()
    if ending in (".jsonl", ".ndjson"):
        yield from _read_json_lines(path, name)
    elif ending == ".json":
        yield from _read_json(path, name)
    elif ending == ".csv":
        yield from _read_csv(path, name)
    else:
        raise JobError(
            FailureClass.DATA_ERROR, f"{name}: the ending {ending!r} is unknown. Use a .jsonl, .json or .csv file."
        )


def _read_json_lines(path: Path, name: str) -> Iterator[Row | BadRow]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                yield BadRow(name, number, "not UTF-8 text")
                continue
            if not line:
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                yield BadRow(name, number, "not JSON")
                continue
            yield _row(name, number, value)


def _read_json(path: Path, name: str) -> Iterator[Row | BadRow]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise JobError(
            FailureClass.DATA_ERROR,
            f"{name} is larger than {MAX_JSON_BYTES >> 30} GiB, and a .json file must be read whole. Write it as "
            ".jsonl, one object on each line.",
        )
    try:
        values = json.loads(path.read_text("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise JobError(FailureClass.DATA_ERROR, f"{name} is not UTF-8 text. Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        hint = " It looks like JSON Lines: name it .jsonl." if error.msg == "Extra data" else " Is the file cut off?"
        raise JobError(
            FailureClass.DATA_ERROR, f"{name} is not JSON from line {error.lineno} column {error.colno} on.{hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise JobError(
            FailureClass.DATA_ERROR,
            f"{name} is not JSON that can be read: it is nested too deeply, or holds a number of thousands of digits. "
            "Write it as .jsonl, so that only the row in question is refused.",
        ) from error
    if not isinstance(values, list):
        raise JobError(FailureClass.DATA_ERROR, f"{name} must hold a list of objects: write [{{...}}, {{...}}].")
    for number, value in enumerate(values, start=1):
        yield _row(name, number, value)


def _read_csv(path: Path, name: str) -> Iterator[Row | BadRow]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        number = 0
        try:
            for value in reader:
                number += 1
                if None in value or None in value.values():
                    yield BadRow(name, number, "has another number of fields than the header")
                    continue
                yield Row(name, number, dict(value))
        except UnicodeDecodeError as error:
            raise JobError(
                FailureClass.DATA_ERROR, f"{name} is not UTF-8 text after row {number}. Save it as UTF-8."
            ) from error
        except csv.Error as error:
            raise JobError(FailureClass.DATA_ERROR, f"{name} is not CSV after row {number}: {error}.") from error


def _row(name: str, number: int, value: Any) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(name, number, "not an object")
    return Row(name, number, value)
