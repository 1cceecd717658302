"""Merge an adapter into the base it was trained on, one whole tensor at a time.

For QLoRA that base is the dequantised one: merged into it, the published model is the trained model. Merged into the
original weights it would be another one (on a small model hundreds of times further away in KL than rounding to 16
bits).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from finetune_api.failures import FailureClass, JobError
from finetune_trainer.base_model import BaseModel, TensorInfo
from finetune_trainer.models import TORCH_DTYPES
from finetune_trainer.quantized import QuantizedWeights
from finetune_trainer.shards import TensorSpec

FLOATS = set(TORCH_DTYPES)


class LoraDeltas:
    """What a LoRA adapter adds to each weight it adapts: scaling * B @ A, in float32."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        self._scaling = config["lora_alpha"] / config["r"]
        self._transposed = bool(config.get("fan_in_fan_out"))
        self._path = folder / "adapter_model.safetensors"
        self._keys: dict[str, dict[str, str]] = {}
        with safe_open(self._path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                module, _, matrix = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
                if matrix not in ("lora_A", "lora_B"):
                    raise JobError(
                        FailureClass.MODEL_ERROR,
                        f"The adapter holds {key}, which the merge does not know how to apply.",
                    )
                self._keys.setdefault(f"{module}.weight", {})[matrix] = key

    @property
    def names(self) -> set[str]:
        return set(self._keys)

    def delta(self, name: str) -> torch.Tensor:
        """
        Raises:
            JobError: VerificationFailed, when training left this weight's adapter at zero.
        """
        with safe_open(self._path, "pt") as file:
            a = file.get_tensor(self._keys[name]["lora_A"]).float()
            b = file.get_tensor(self._keys[name]["lora_B"]).float()
        if not b.any():
            raise JobError(
                FailureClass.VERIFICATION_FAILED,
                f"The adapter of {name} is zero: training changed nothing. Raise hyperparameters.learningRate.",
            )
        delta = self._scaling * (b @ a)
        return delta.T if self._transposed else delta


class Merge:
    """The tensors of the merged model, in the order of the base model's files."""

    def __init__(
        self, base: BaseModel, deltas: LoraDeltas, quantized: QuantizedWeights | None, dtype: str, disk: Path
    ) -> None:
        """
        Raises:
            JobError: ModelError, when the adapter and the base do not fit.
        """
        self._base = base
        self._deltas = deltas
        self._quantized = quantized
        self._dtype = dtype
        self._disk = disk
        names = {tensor.name for tensor in base.tensors}
        adapted = deltas.names | (quantized.names if quantized else set())
        if missing := adapted - names:
            raise JobError(
                FailureClass.MODEL_ERROR,
                f"The adapter changes {min(missing)}, which the base model's files do not hold under this name, so it "
                "cannot be merged tensor by tensor. Publish the adapter alone (output.artifacts: [Adapter]).",
            )

    @property
    def specs(self) -> list[TensorSpec]:
        return [output_spec(tensor, self._dtype) for tensor in self._base.tensors]

    def tensors(self) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
        """Each base file is fetched when its turn comes and removed after; one that holds only weights that are kept in
        4 bits is not fetched at all."""
        for shard in self._base.shards:
            path = self._disk / shard
            tensors = [tensor for tensor in self._base.tensors if tensor.file == shard]
            if any(not self._is_quantized(tensor.name) for tensor in tensors):
                self._base.download(self._disk, [shard])
            for tensor in tensors:
                spec = output_spec(tensor, self._dtype)
                yield spec, self._merged(tensor, path).to(TORCH_DTYPES.get(spec.dtype))
            path.unlink(missing_ok=True)

    def _is_quantized(self, name: str) -> bool:
        return self._quantized is not None and name in self._quantized

    def _merged(self, tensor: TensorInfo, path: Path) -> torch.Tensor:
        if self._quantized is not None and tensor.name in self._quantized:
            value = self._quantized.dequantized(tensor.name)
        else:
            with safe_open(path, "pt") as file:
                value = file.get_tensor(tensor.name)
        if tensor.name in self._deltas.names:
            value = value.float() + self._deltas.delta(tensor.name)
        return value


def output_spec(tensor: TensorInfo, dtype: str) -> TensorSpec:
    """A tensor as it is published: numbers in the chosen format, anything else as it is."""
    return TensorSpec(tensor.name, dtype if tensor.dtype in FLOATS else tensor.dtype, tensor.shape)
