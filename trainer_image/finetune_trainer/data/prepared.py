"""The prepared set: token rows as Arrow streams that training maps into memory, with one hash over their content."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from finetune_trainer.data.render import IGNORED, TokenRow

TRAIN_FILE = "train.arrow"
VALIDATION_FILE = "validation.arrow"

SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
BATCH_TOKENS = 1 << 20
"""Rows are collected up to so many tokens: Python's lists of them take a hundred times the bytes of the file."""


@dataclass(frozen=True)
class SetSummary:
    rows: int
    tokens: int
    supervised_tokens: int
    longest: int
    """Tokens of the longest row; 0 in an empty set."""
    sha256: str


def write_rows(rows: Iterable[TokenRow], path: Path) -> SetSummary:
    """Write a set. The hash covers ids and labels of all rows in order, whatever the file format does."""
    count = tokens = flushed = supervised = longest = 0
    digest = hashlib.sha256()
    batch: list[TokenRow] = []

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:

        def flush() -> None:
            columns = {"input_ids": [row.input_ids for row in batch], "labels": [row.labels for row in batch]}
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=SCHEMA))
            batch.clear()

        for row in rows:
            count += 1
            tokens += len(row.input_ids)
            supervised += sum(label != IGNORED for label in row.labels[1:])
            longest = max(longest, len(row.input_ids))
            digest.update(len(row.input_ids).to_bytes(4, "little"))
            digest.update(array("i", row.input_ids).tobytes())
            digest.update(array("i", row.labels).tobytes())
            batch.append(row)
            if tokens - flushed >= BATCH_TOKENS:
                flush()
                flushed = tokens
        if batch or not count:
            flush()
    return SetSummary(count, tokens, supervised, longest, digest.hexdigest())


def read_rows(path: Path) -> Dataset:
    """The set as a memory-mapped `datasets.Dataset` with the columns input_ids and labels."""
    return Dataset.from_file(str(path))
