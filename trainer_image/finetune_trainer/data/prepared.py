"""The prepared set: rows as Arrow streams that training maps into memory, with one hash over their content."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from finetune_trainer.data.token_rows import (
    IGNORED,
    LabelledRow,
    PairRow,
    PreparedRow,
    RowKind,
    TokenRow,
    answered,
    sequences,
)

TRAIN_FILE = "train.arrow"
VALIDATION_FILE = "validation.arrow"


_IDS = pa.list_(pa.int32())
SCHEMAS: dict[RowKind, pa.Schema] = {
    TokenRow: pa.schema({"input_ids": _IDS, "labels": _IDS}),
    PairRow: pa.schema({"prompt_ids": _IDS, "chosen_ids": _IDS, "rejected_ids": _IDS}),
    LabelledRow: pa.schema({"prompt_ids": _IDS, "completion_ids": _IDS, "label": pa.bool_()}),
}
BATCH_TOKENS = 1 << 20
"""Rows are collected up to so many tokens: Python's lists of them take a hundred times the bytes of the file."""


@dataclass(frozen=True)
class SetSummary:
    rows: int
    tokens: int
    """Of all sequences that a model sees in one pass."""
    supervised_tokens: int
    longest: int
    """Tokens of the longest sequence; 0 in an empty set."""
    sha256: str


def write_rows(rows: Iterable[PreparedRow], path: Path, kind: RowKind) -> SetSummary:
    """Write a set. The hash covers the content of all rows in order, whatever the file format does."""
    count = tokens = flushed = supervised = longest = 0
    digest = hashlib.sha256()
    batch: list[PreparedRow] = []
    schema = SCHEMAS[kind]

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:

        def flush() -> None:
            columns = {name: [getattr(row, name) for row in batch] for name in schema.names}
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
            batch.clear()

        for row in rows:
            count += 1
            for sequence in sequences(row):
                tokens += len(sequence.input_ids)
                supervised += sum(label != IGNORED for label in sequence.labels[1:])
                longest = max(longest, len(sequence.input_ids))
            for part in content(row):
                digest.update(part)
            batch.append(row)
            if tokens - flushed >= BATCH_TOKENS:
                flush()
                flushed = tokens
        if batch or not count:
            flush()
    return SetSummary(count, tokens, supervised, longest, digest.hexdigest())


def content(row: PreparedRow) -> Iterator[bytes]:
    """Bytes that tell a row from every other one of its kind."""
    if isinstance(row, TokenRow):
        # As long as each other.
        yield len(row.input_ids).to_bytes(4, "little")
        yield array("i", row.input_ids).tobytes()
        yield array("i", row.labels).tobytes()
        return
    for field in fields(row):
        value = getattr(row, field.name)
        if isinstance(value, bool):
            yield bytes([value])
        else:
            yield len(value).to_bytes(4, "little")
            yield array("i", value).tobytes()


def batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The stored batches of a set one after the other. Nothing is mapped: pages of a mapped file count as memory."""
    with pa.OSFile(str(path)) as source, pa.ipc.open_stream(source) as reader:
        yield from reader


def read_rows(path: Path) -> Dataset:
    """The set as a memory-mapped `datasets.Dataset` with the columns of its kind."""
    return Dataset.from_file(str(path))


def learnt(row: dict[str, Any]) -> dict[str, list[int]]:
    """A stored row as one sequence with labels; of a pair the chosen one, which is what the model should say."""
    if "labels" in row:
        return row
    answer = row["chosen_ids"] if "chosen_ids" in row else row["completion_ids"]
    sequence = answered(row["prompt_ids"], answer)
    return {"input_ids": sequence.input_ids, "labels": sequence.labels}
