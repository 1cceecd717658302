"""Weights are written one tensor at a time, as safetensors' own writer would have written them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune_trainer.shards import TensorSpec, write_model

NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, NAMES[tensor.dtype], tuple(tensor.shape))


def write(tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> None:
    specs = [spec(name, tensor) for name, tensor in tensors.items()]
    folder.mkdir(exist_ok=True)
    write_model(zip(specs, tensors.values(), strict=True), specs, folder, **options)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).to(torch.bfloat16),
    "c": torch.randn(2, 2, 2).to(torch.float16),
    "numbers": torch.arange(4),
    "flags": torch.tensor([True, False]),
    "scalar": torch.tensor(3.5),
    "transposed": torch.randn(4, 6).T,
    "empty": torch.zeros(0, 4),
}


def test_it_is_what_safetensors_writes(tmp_path: Path) -> None:
    write(TENSORS, tmp_path / "ours")
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "theirs", {"format": "pt"})
    ours = tmp_path / "ours" / "model.safetensors"
    assert same(load_file(ours), load_file(tmp_path / "theirs"))
    assert same(load_file(ours), TENSORS)
    with safe_open(ours, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["model.safetensors"]


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((10,), float(number)) for number in range(7)} | {"big": torch.ones(100)}
    write(tensors, tmp_path / "m", max_shard_bytes=100)
    names = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert names == [f"model-{number:05d}-of-00005.safetensors" for number in range(1, 6)]
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    assert index["weight_map"].keys() == tensors.keys()
    for name in names:
        shard = load_file(tmp_path / "m" / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == set(shard)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 100 or list(shard) == ["big"]
        assert same(shard, {key: tensors[key] for key in shard})


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=8),
    dtype=st.sampled_from(list(NAMES)),
    limit=st.integers(1, 200),
)
def test_any_model_comes_back(tmp_path: Path, shapes: list[list[int]], dtype: torch.dtype, limit: int) -> None:
    folder = tmp_path / "m"
    for path in folder.glob("*"):
        path.unlink()
    tensors = {f"layer.{number}": (torch.rand(tuple(shape)) * 9).to(dtype) for number, shape in enumerate(shapes)}
    write(tensors, folder, max_shard_bytes=limit)
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    assert same(found, tensors)


@pytest.mark.parametrize(
    "value",
    [("b", torch.zeros(2)), ("a", torch.zeros(3)), ("a", torch.zeros(2, dtype=torch.bfloat16))],
    ids=["another tensor", "another shape", "another type"],
)
def test_a_tensor_that_was_not_announced(tmp_path: Path, value: tuple[str, torch.Tensor]) -> None:
    name, tensor = value
    announced = TensorSpec("a", "F32", (2,))
    given = TensorSpec(name, "F32", (2,)) if tensor.shape == (2,) and tensor.dtype == torch.float32 else announced
    with pytest.raises(ValueError, match="was due, or in another shape or type"):
        write_model([(given, tensor)], [announced], tmp_path)
