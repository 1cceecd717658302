"""Examples that are there twice. An example is told by digests of 64 bits over its tokens, so that a million of them
take some megabytes; two different ones share a digest once in ten million data sets of that size."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.prepared import content
from finetune_trainer.data.token_rows import PreparedRow, sequences

Mask = npt.NDArray[np.bool_]


def digest(rows: Iterable[PreparedRow]) -> int:
    """Of the rows of one example, and what is learnt of them."""
    hashed = blake2b(digest_size=8)
    for row in rows:
        for part in content(row):
            hashed.update(part)
    return int.from_bytes(hashed.digest())


def text_digest(rows: Iterable[PreparedRow]) -> int:
    """Of what a model sees of one example, whatever is learnt of it."""
    hashed = blake2b(digest_size=8)
    for row in rows:
        for ids in sorted(sequence.input_ids for sequence in sequences(row)):
            hashed.update(len(ids).to_bytes(4, "little"))
            hashed.update(array("i", ids).tobytes())
    return int.from_bytes(hashed.digest())


def repeated(digests: array[int]) -> Mask:
    """For each example whether it is equal to one before it."""
    values = np.frombuffer(digests, dtype=np.uint64)
    order = np.argsort(values, kind="stable")
    again = np.zeros(len(values), dtype=bool)
    again[order[1:]] = values[order[1:]] == values[order[:-1]]
    return again


def among(digests: array[int], others: array[int]) -> Mask:
    """For each example whether it is one of the others."""
    mask: Mask = np.isin(np.frombuffer(digests, dtype=np.uint64), np.frombuffer(others, dtype=np.uint64))
    return mask
