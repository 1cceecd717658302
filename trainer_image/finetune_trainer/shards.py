"""Write safetensors files one tensor at a time, so that memory holds one tensor and never a whole shard.

`safetensors.torch.save_file` wants all tensors of a file at once. The format is made for writing them in sequence: the
header only needs names, types and shapes, which are known beforehand.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from finetune_trainer.base_model import DTYPE_BYTES, INDEX, SINGLE
from finetune_trainer.models import TORCH_DTYPES

MAX_SHARD_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class TensorSpec:
    name: str
    dtype: str
    """As safetensors writes it."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def write_model(
    tensors: Iterable[tuple[TensorSpec, torch.Tensor]],
    specs: list[TensorSpec],
    folder: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write model files as transformers names them.

    Args:
        tensors: values in the order of `specs`; each is dropped before the next is asked for.
        specs: all tensors of the model.
        folder: an existing folder.
        max_shard_bytes: a shard is closed before it grows beyond this; a larger tensor has a shard of its own.
    """
    shards = list(_split(specs, max_shard_bytes))
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    values = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            _write_header(file, shard)
            for expected in shard:
                spec, value = next(values)
                _write_tensor(file, expected, spec, value)
                del value
    if len(shards) > 1:
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(spec.size for spec in specs)},
            "weight_map": {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=1))


def _split(specs: list[TensorSpec], limit: int) -> Iterator[list[TensorSpec]]:
    shard: list[TensorSpec] = []
    for spec in specs:
        if shard and sum(other.size for other in shard) + spec.size > limit:
            yield shard
            shard = []
        shard.append(spec)
    if shard:
        yield shard


def _write_header(file: BinaryIO, shard: list[TensorSpec]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in shard:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.size],
        }
        offset += spec.size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of eight
    file.write(struct.pack("<Q", len(encoded)))
    file.write(encoded)


def _write_tensor(file: BinaryIO, expected: TensorSpec, spec: TensorSpec, value: torch.Tensor) -> None:
    if spec != expected or tuple(value.shape) != spec.shape or value.dtype != TORCH_DTYPES.get(spec.dtype, value.dtype):
        raise ValueError(f"tensor {spec.name} came where {expected.name} was due, or in another shape or type")
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy()
    if data.nbytes != spec.size:
        raise ValueError(f"tensor {spec.name} has {data.nbytes} bytes instead of {spec.size}")
    file.write(memoryview(data))
