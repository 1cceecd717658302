"""The 4-bit weights that QLoRA trained on, kept for export.

Export must merge into exactly these weights. Quantising the base again would not do: bitsandbytes' CPU and CUDA kernels
need not round alike. The packed weights and their statistics are a quarter of the base model in 16 bits, are stored
while training already runs, and spare export the download of the tensors that they stand for. The layout is that of a
4-bit checkpoint of transformers: `<name>.weight` beside `<name>.weight.absmax` and so on.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from safetensors.torch import save_file

SHARD_BYTES = 1 << 30


def store(model: Any, folder: Path) -> int:
    """Write all 4-bit weights of a model, in shards, under their names in the base model; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    count = shard_number = size = 0
    shard: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        weight = f"{_base_name(name)}.weight"
        tensors = {weight: module.weight.data.cpu()}
        state = module.weight.quant_state.as_dict(packed=True)
        tensors |= {f"{weight}.{key}": value.cpu().contiguous() for key, value in state.items()}
        shard |= tensors
        size += sum(tensor.nbytes for tensor in tensors.values())
        count += 1
        if size >= SHARD_BYTES:
            save_file(shard, folder / f"{shard_number:05d}.safetensors")
            shard, size, shard_number = {}, 0, shard_number + 1
    if shard:
        save_file(shard, folder / f"{shard_number:05d}.safetensors")
    return count


def _base_name(name: str) -> str:
    """A module's name in the base model: without what peft wraps around it."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


class QuantizedWeights:
    """Stored 4-bit weights, dequantised one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        self._keys: dict[str, list[str]] = defaultdict(list)
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    name = key[: key.index(".weight") + len(".weight")]
                    self._keys[name].append(key)
                    self._files[name] = path

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def dequantized(self, name: str) -> torch.Tensor:
        """A weight in float32 with its original shape."""
        with safe_open(self._files[name], "pt") as file:
            tensors = {key: file.get_tensor(key) for key in self._keys[name]}
        packed = tensors.pop(name)
        state = QuantState.from_dict(
            {key.removeprefix(f"{name}."): value for key, value in tensors.items()}, device=torch.device("cpu")
        )
        state.dtype = torch.float32
        return dequantize_4bit(packed, state)
