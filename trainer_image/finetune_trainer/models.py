"""Load the base model for training: as it is, with an adapter, or in 4 bits with an adapter.

Adapter weights and optimiser state are float32 in every mode. TRL would make the adapters of a quantised base bfloat16,
and a resumed run would turn them to float32, so that it no longer continued the same training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finetune_api.spec import Adapter, AdapterType, FineTuneJobSpec, LoRA, Precision, Quantization, Switch
from finetune_trainer.world import World

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def precision(spec: FineTuneJobSpec, world: World) -> str:
    """BF16 or F32: what was asked for, or what the hardware is good at. CPUs without AMX are slower in BF16."""
    asked = spec.hyperparameters.precision
    if asked is not Precision.AUTO:
        return str(asked)
    return "BF16" if world.device.type == "cuda" and torch.cuda.is_bf16_supported() else "F32"


def activation_checkpointing(spec: FineTuneJobSpec, world: World) -> bool:
    """Whether activations are recomputed. On CPU it costs time and memory is plenty."""
    asked = spec.hyperparameters.activation_checkpointing
    return world.device.type == "cuda" if asked is Switch.AUTO else asked is Switch.ENABLED


def fits(parameters: int, compute: str, world: World) -> bool:
    """Whether that many weights leave a GPU some room to compute in. On CPU the pod's memory is made to fit."""
    if world.device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(world.device)
    return 1.1 * parameters * TORCH_DTYPES[compute].itemsize + (2 << 30) <= free


def load_base(folder: Path, compute: str, world: World) -> Any:
    """The base model in the number format of the computation."""
    return _load(folder, dtype=TORCH_DTYPES[compute], device_map={"": world.device})


def load_streamed(folder: Path, scratch: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model with its weights left on disk: each layer is read when its turn comes, so that memory holds one.

    The weights are read in place from the safetensors files; `scratch` stays empty.
    """
    return _load(folder, dtype=dtype, device_map={"": "disk"}, offload_folder=str(scratch))


def load_for_training(folder: Path, spec: FineTuneJobSpec, compute: str, world: World) -> Any:
    """The model whose weights, or whose adapter's weights, are trained."""
    adapter = spec.method.adapter
    if adapter.type is AdapterType.FULL:
        # Mixed precision keeps the weights themselves in float32; the computation is cast by autocast.
        return load_base(folder, "F32", world)
    quantization = None
    if adapter.type is AdapterType.QLORA:
        quantization = _quantization(adapter.quantization or Quantization(), TORCH_DTYPES[compute])
    base = _load(folder, dtype=TORCH_DTYPES[compute], device_map={"": world.device}, quantization_config=quantization)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 a forward pass in evaluation mode would repack the weights for bfloat16
            # inference and leave them so: other numbers, and no gradient when training goes on.
            module.support_avx512bf16_for_cpu = False
    return get_peft_model(base, lora_config(adapter))


def _load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, attn_implementation="sdpa", **options
    )


def _quantization(settings: Quantization, compute: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.type.lower(),
        bnb_4bit_use_double_quant=settings.double_quantization == "Enabled",
        bnb_4bit_compute_dtype=compute,
    )


def lora_config(adapter: Adapter) -> LoraConfig:
    lora = adapter.lora or LoRA()
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=float(lora.dropout),
        target_modules=lora.target_modules or "all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )
