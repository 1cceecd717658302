"""The probe compares weights, not number formats: it is computed in float32 whatever the model is kept in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from trainer_lab import BASE_SPEC, merged

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer import models, probe
from finetune_trainer.data.token_rows import IGNORED
from finetune_trainer.world import World

ROWS = [
    {"input_ids": list(range(10, 10 + length)), "labels": [IGNORED] * 4 + list(range(14, 10 + length))}
    for length in (9, 30, 12, 7, 21)
]


def in_bfloat16(tiny_model: Path, adapter: str) -> Any:
    """A model as BF16 training holds it: the base in bfloat16 or 4 bits, the adapter in float32 and not zero."""
    base = {"model": {"uri": "s3://a/b"}, "dataset": {"train": [{"uri": "s3://a/c"}]}, "output": {"uri": "s3://a/d"}}
    spec = FineTuneJobSpec.model_validate(merged(merged(BASE_SPEC, base), {"method": {"adapter": {"type": adapter}}}))
    model = models.load_for_training(tiny_model, spec, "BF16", World(0, 1, 0))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("adapter", ["LoRA", "QLoRA"])
def test_it_is_that_of_the_same_weights_in_float32(tiny_model: Path, adapter: str) -> None:
    model = in_bfloat16(tiny_model, adapter)
    before = {name: (parameter.dtype, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        found = probe.log_probs(model, ROWS)
    assert {name: (parameter.dtype, parameter.data_ptr()) for name, parameter in model.named_parameters()} == before
    for module in model.modules():
        if isinstance(module, Linear4bit):
            assert module.compute_dtype is torch.bfloat16
            module.compute_dtype = torch.float32
    # The same, with all weights cast at once; the packed ones are no floating point numbers.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    expected = probe.log_probs(model, ROWS)
    mean, highest = probe.divergence(expected, found)
    assert abs(mean) < 1e-9
    assert highest < 1e-8


def test_a_long_row_is_cut_to_a_window_with_something_to_compare() -> None:
    labels = [IGNORED] * 3000 + list(range(2000))
    row = probe._thinned({"input_ids": list(range(5000)), "labels": labels})
    assert len(row["input_ids"]) == len(row["labels"]) == probe.TOKENS_PER_ROW
    kept = [(i, label) for i, label in enumerate(row["labels"]) if label != IGNORED]
    assert 1 <= len(kept) <= probe.POSITIONS_PER_ROW
    assert all(label == row["input_ids"][i] - 3000 for i, label in kept)
