"""The base model's layers without its weights: whether the adapter that is asked for can be trained and merged is known
before a GPU is taken."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from finetune_api.failures import FailureClass, JobError
from finetune_api.spec import Adapter, AdapterType


def require_adaptable(folder: Path, adapter: Adapter, stored: set[str], *, merge: bool) -> None:
    """
    Args:
        folder: has the model's config.
        stored: names of the tensors in the model's files.
        merge: the adapter will be merged, tensor by tensor.

    Raises:
        JobError: UserError, when a name in targetModules is no linear layer, or the output head; ModelError, when the
            merge would not find the weights.
    """
    layers, head = _linear_layers(folder)
    asked = adapter.lora.target_modules if adapter.lora else None
    adapted = layers
    if asked is not None:
        chosen = {target: _matching(target, layers | head) for target in asked}
        unknown = [target for target, found in chosen.items() if not found]
        if unknown:
            there = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise JobError(
                FailureClass.USER_ERROR,
                f"lora.targetModules names {', '.join(unknown)}, which the model does not have. Its linear layers are "
                f"{there}.",
            )
        # Training computes the output from the head's weight alone, so that an adapter on it would do nothing.
        if on_head := [target for target, found in chosen.items() if found & head]:
            raise JobError(
                FailureClass.USER_ERROR,
                f"lora.targetModules names {', '.join(on_head)}, the model's output head, which cannot be adapted. "
                "Remove it.",
            )
        adapted = set().union(*chosen.values())
    if not merge:
        return
    if adapter.type is AdapterType.QLORA:
        adapted = adapted | layers  # all of them are kept in 4 bits, and written out again
    missing = {f"{name}.weight" for name in adapted} - stored
    if missing:
        raise JobError(
            FailureClass.MODEL_ERROR,
            f"An adapter of this model cannot be merged: its layer {min(missing)} is stored under another name. Set "
            "output.artifacts to [Adapter].",
        )


def _linear_layers(folder: Path) -> tuple[set[str], set[str]]:
    """Names of the linear layers that "all linear layers" means, and of the output head."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise JobError(
            FailureClass.MODEL_ERROR, f"No model can be built from config.json: {error}. Upload it again."
        ) from error
    output = model.get_output_embeddings()
    layers, head = set(), set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            (head if module is output else layers).add(name)
    return layers, head


def _matching(target: str, names: set[str]) -> set[str]:
    """As peft matches a name in a list."""
    return {name for name in names if name == target or name.endswith(f".{target}")}
