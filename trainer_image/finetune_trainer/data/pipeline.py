"""From data files to the two prepared sets: read, understand, render, split, and leave out what is there twice.

Memory does not grow with the rows but for some bytes for each example.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune_api.failures import FailureClass, JobError
from finetune_api.spec import METHOD_FORMATS, DataFile, Dataset, DuplicatePolicy, MethodType
from finetune_trainer.data import duplicates, prepared, sources
from finetune_trainer.data.formats import RowFormat, row_format
from finetune_trainer.data.prepared import TRAIN_FILE, VALIDATION_FILE, SetSummary
from finetune_trainer.data.render import Renderer
from finetune_trainer.data.rows import BadRow, Problems, Row, RowError, read_rows
from finetune_trainer.data.token_rows import LabelledRow, PairRow, PreparedRow, RowKind, TokenRow

ROWS: dict[MethodType, RowKind] = {
    MethodType.SFT: TokenRow,
    MethodType.DPO: PairRow,
    MethodType.KTO: LabelledRow,
}
"""What a method learns from."""

DEFAULT_SPLIT = 0.05
DEFAULT_SPLIT_MAX_ROWS = 200
DEFAULT_SPLIT_MIN_ROWS = 40
"""Fewer train rows than this are not split unless the user says so: a handful of rows would measure nothing."""

Files = Sequence[tuple[str, Path]]
"""Names that a user knows, and local paths."""


@dataclass(frozen=True)
class SourceCounts:
    """What was found in one source."""

    uri: str
    format: str
    rows: int
    examples: int


@dataclass(frozen=True)
class PreparedData:
    train: SetSummary
    validation: SetSummary
    problems: Problems
    train_sources: list[SourceCounts]
    validation_sources: list[SourceCounts]
    duplicates: int
    """Train examples that are equal to another one before them."""
    leaked: int
    """Train examples that are in the validation set, too, and are not learnt for that."""

    @property
    def formats(self) -> list[str]:
        found = {source.format for source in (*self.train_sources, *self.validation_sources)}
        return sorted(name for item in found for name in item.split(", ") if name)


def prepare(
    dataset: Dataset, method: MethodType, seed: int, renderer: Renderer, train: Files, validation: Files, folder: Path
) -> PreparedData:
    """Write both sets into `folder`.

    Raises:
        JobError: DataError, when the files or their rows cannot be used.
    """
    kind = ROWS[method]
    rows = _Rows(dataset, method, renderer)
    train_path, validation_path, both = folder / TRAIN_FILE, folder / VALIDATION_FILE, folder / "all.arrow"
    learnt = prepared.write_rows(rows.read(train, dataset.train), both, kind)
    count = rows.count
    measured = prepared.write_rows(rows.read(validation, dataset.validation or []), validation_path, kind)
    rows.problems.check(rows.seen)
    texts, others = rows.texts[:count], rows.texts[count:]
    held = np.zeros(count, dtype=bool)
    if not validation:
        first = np.flatnonzero(~duplicates.repeated(texts))
        held[held_out(first, dataset.validation_split, seed, np.frombuffer(rows.labels, dtype=np.int8)[first])] = True
        others = array("Q", np.frombuffer(texts, dtype=np.uint64)[held].tobytes())
        measured = prepared.write_rows(_select(both, kind, rows.owners, held.__getitem__), validation_path, kind)
    leaked = duplicates.among(texts, others) & ~held
    again = duplicates.repeated(rows.digests[:count]) & ~held & ~leaked
    left_out = held | leaked
    if dataset.duplicates is DuplicatePolicy.REMOVE:
        left_out |= again
    if left_out.any() or sources.is_weighted(dataset.train):
        copies = sources.copies(rows.sources[:count], dataset.train, left_out, seed)
        learnt = prepared.write_rows(_select(both, kind, rows.owners, copies.__getitem__), train_path, kind)
        both.unlink()
    else:
        both.replace(train_path)
    if count and learnt.rows == 0:
        raise JobError(
            FailureClass.DATA_ERROR,
            f"Of {count} examples to learn from none is left: {int(leaked.sum())} of them are in the validation set, "
            "too, and the weights of the sources choose none of the others. Name other validation rows, or higher "
            "weights.",
        )
    _require_rows(learnt, measured, dataset)
    if kind is LabelledRow:
        _require_labels(train_path, validation_path)
    return PreparedData(
        train=learnt,
        validation=measured,
        problems=rows.problems,
        train_sources=rows.found[: len(dataset.train)],
        validation_sources=rows.found[len(dataset.train) :],
        duplicates=int(again.sum()),
        leaked=int(leaked.sum()),
    )


class _Rows:
    """Streams prepared rows out of files, counting what cannot be used."""

    def __init__(self, dataset: Dataset, method: MethodType, renderer: Renderer) -> None:
        self._dataset = dataset
        self._method = method
        self._renderer = renderer
        self.problems = Problems(dataset.invalid_rows.policy, dataset.invalid_rows.limit)
        self.seen = 0
        self.count = 0
        """Examples."""
        self.owners = array("L")
        """For each prepared row the number of its example: rows of one conversation stay on one side of a split."""
        self.sources = array("H")
        """For each example the number of its source."""
        self.digests = array("Q")
        """For each example what tells it from others."""
        self.texts = array("Q")
        """And what tells what a model sees of it."""
        self.labels = array("b")
        """And whether it is judged good, where that is so."""
        self.found: list[SourceCounts] = []

    def read(self, files: Files, entries: Sequence[DataFile]) -> Iterator[PreparedRow]:
        """The rows of all files; what each source held is in `found` when they are over."""
        formats: list[set[str]] = [set() for _ in entries]
        rows, examples = [0] * len(entries), [0] * len(entries)
        for name, path in files:
            number = sources.entry_of(name, entries)
            seen, count = self.seen, self.count
            yield from self._read_file(name, path, entries[number], number, formats[number])
            rows[number] += self.seen - seen
            examples[number] += self.count - count
        for number, entry in enumerate(entries):
            shown = ", ".join(sorted(formats[number]))
            self.found.append(SourceCounts(entry.uri, shown, rows[number], examples[number]))

    def _read_file(
        self, name: str, path: Path, entry: DataFile, number: int, formats: set[str]
    ) -> Iterator[PreparedRow]:
        asked = entry if entry.format else self._dataset
        shape: RowFormat | None = None
        for row in read_rows(path, name):
            self.seen += 1
            if isinstance(row, BadRow):
                self.problems.add(row)
                continue
            if shape is None:
                shape = row_format(asked.format or self._dataset.format, asked.columns, row)
                self._require_learnable(name, shape)
                formats.add(str(shape.format))
            yield from self._rows_of(row, shape, number)

    def _require_learnable(self, name: str, shape: RowFormat) -> None:
        learnable = METHOD_FORMATS[self._method]
        if shape.format not in learnable:
            raise JobError(
                FailureClass.DATA_ERROR,
                f"{name}: its rows are of format {shape.format}, and method.type {self._method} learns from "
                f"{', '.join(learnable)}. Choose another method, or name the format of the rows in dataset.format.",
            )

    def _rows_of(self, row: Row, shape: RowFormat, source: int) -> Iterator[PreparedRow]:
        try:
            rows = self._renderer.rows(shape.parse(row))
        except RowError as error:
            self.problems.add(BadRow(row.file, row.number, str(error)))
            return
        if not rows:
            return  # too long, and counted
        self.owners.extend([self.count] * len(rows))
        self.sources.append(source)
        self.digests.append(duplicates.digest(rows))
        self.texts.append(duplicates.text_digest(rows))
        self.labels.append(any(isinstance(row, LabelledRow) and row.label for row in rows))
        self.count += 1
        yield from rows


def held_out(examples: Sequence[int], split: str | None, seed: int, labels: Sequence[int]) -> list[int]:
    """The examples that are measured instead of learnt. Of answers that are judged, good and bad ones are held out in
    the same share, and one of each at least."""
    total = len(examples)
    if split is None:
        count = min(DEFAULT_SPLIT_MAX_ROWS, round(total * DEFAULT_SPLIT))
        count = count if total >= DEFAULT_SPLIT_MIN_ROWS else 0
    else:
        fraction = float(split)
        count = min(total - 1, max(1, round(total * fraction))) if fraction and total else 0
    groups: list[Sequence[int]] = [range(total)]
    shares = [count]
    if count > 1 and any(labels) and not all(labels):
        groups = [[place for place in range(total) if bool(labels[place]) is kind] for kind in (True, False)]
        good = min(count - 1, max(1, round(count * len(groups[0]) / total)), len(groups[0]))
        shares = [good, min(count - good, len(groups[1]))]
    drawn = random.Random(seed)
    places = [place for group, share in zip(groups, shares, strict=True) for place in drawn.sample(group, share)]
    return [int(examples[place]) for place in places]


def _select(path: Path, kind: RowKind, owners: array[int], copies: Callable[[int], int]) -> Iterator[PreparedRow]:
    """The rows of a set as often as `copies` says of their example."""
    number = 0
    for batch in prepared.batches(path):
        for place in range(batch.num_rows):
            times = int(copies(owners[number]))
            number += 1
            if times:
                (row,) = batch.slice(place, 1).to_pylist()
                yield from times * [kind(**row)]


def _require_rows(train: SetSummary, validation: SetSummary, dataset: Dataset) -> None:
    if train.rows == 0:
        raise JobError(FailureClass.DATA_ERROR, "dataset.train has no usable row. Upload rows to learn from.")
    if dataset.validation and validation.rows == 0:
        raise JobError(
            FailureClass.DATA_ERROR, "dataset.validation has no usable row. Upload rows, or remove dataset.validation."
        )


def _require_labels(train: Path, validation: Path) -> None:
    """What is good is learnt from what is not, and measured on what is good."""
    labels = prepared.read_rows(train)["label"]
    if all(labels) or not any(labels):
        raise JobError(
            FailureClass.DATA_ERROR,
            f"The label of all train rows is {str(labels[0]).lower()}. Add rows with the other label.",
        )
    measured = prepared.read_rows(validation)["label"]
    if len(measured) and not any(measured):
        raise JobError(
            FailureClass.DATA_ERROR,
            "No validation row has the label true, so that nothing could be said of good answers. Add some, or hold "
            "out more rows.",
        )
