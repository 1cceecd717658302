"""Proof that the published model is the trained one, without having both in memory.

Training stores the log-probabilities of the trained model at a few positions of some rows; export runs the written
files on the same rows, one layer in memory at a time, and compares.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file

from finetune_trainer.data.prepared import learnt
from finetune_trainer.data.token_rows import IGNORED
from finetune_trainer.evaluate import supervised_logits

ROWS = 16
POSITIONS_PER_ROW = 8
TOKENS_PER_ROW = 512
"""A long row would teach nothing more, and costs export a pass over it in float32."""
ROWS_AT_ONCE = 4
"""Export reads all weights from disk for each batch; logits of all rows at once would be too large."""
MAX_MEAN_KL = 1e-3
"""Nats. A merge into another base than the trained one is a hundred times above it."""
ROWS_FILE = "probe.json"
LOG_PROBS_FILE = "probe.safetensors"


def choose(train: Dataset, validation: Dataset, seed: int) -> list[dict[str, list[int]]]:
    """Probe rows: validation rows first, filled up with train rows; of each at most a few supervised positions."""
    chosen = []
    for rows in (validation, train):
        wanted = min(ROWS - len(chosen), len(rows))
        chosen += [rows[index] for index in random.Random(seed).sample(range(len(rows)), wanted)]
    return [_thinned(learnt(row)) for row in chosen]


def _thinned(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """A window of the row around the first token that is learnt, and in it the labels of evenly spread positions only:
    a distribution over the vocabulary is stored for each."""
    first = next(i for i, label in enumerate(row["labels"]) if label != IGNORED and i > 0)
    start = max(0, first - TOKENS_PER_ROW // 2)
    ids = row["input_ids"][start : start + TOKENS_PER_ROW]
    labels = row["labels"][start : start + TOKENS_PER_ROW]
    labelled = [i for i, label in enumerate(labels) if label != IGNORED and i > 0]
    step = max(1, -(-len(labelled) // POSITIONS_PER_ROW))
    kept = set(labelled[::step])
    return {"input_ids": ids, "labels": [label if i in kept else IGNORED for i, label in enumerate(labels)]}


def log_probs(model: Any, rows: list[dict[str, list[int]]]) -> torch.Tensor:
    """Log-probabilities over the vocabulary, shape (positions, vocabulary), float32 on the CPU.

    Computed in float32 whatever the weights are kept in: what is compared is the weights, and the noise of bfloat16
    alone can be as large as a wrong merge.
    """
    was_training = model.training
    model.eval()
    parts = []
    device = next(model.parameters()).device.type
    with torch.no_grad(), torch.autocast("cpu" if device == "meta" else device, enabled=False), _in_float32(model):
        for start in range(0, len(rows), ROWS_AT_ONCE):
            logits, _, _ = supervised_logits(model, rows[start : start + ROWS_AT_ONCE])
            parts.append(torch.log_softmax(logits.float(), dim=-1).cpu())
    model.train(was_training)
    return torch.cat(parts)


@contextlib.contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """Each layer's weights are cast when its turn comes and restored behind it, so that memory holds one layer more."""
    original: dict[torch.nn.Parameter, torch.Tensor] = {}

    def cast(module: torch.nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != torch.float32 and parameter not in original:
                original[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in original:
                parameter.data = original.pop(parameter)

    hooks = []
    compute_types = {module: module.compute_dtype for module in model.modules() if isinstance(module, Linear4bit)}
    for module in model.modules():
        if any(parameter.device.type != "meta" for parameter in module.parameters(recurse=False)):
            hooks += [
                module.register_forward_pre_hook(cast),
                module.register_forward_hook(restore, always_call=True),
            ]
    for module in compute_types:
        module.compute_dtype = torch.float32
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, compute_type in compute_types.items():
            module.compute_dtype = compute_type


def store(folder: Path, rows: list[dict[str, list[int]]], values: torch.Tensor) -> None:
    (folder / ROWS_FILE).write_text(json.dumps(rows))
    save_file({"log_probs": values.contiguous()}, folder / LOG_PROBS_FILE)


def load(folder: Path) -> tuple[list[dict[str, list[int]]], torch.Tensor]:
    rows = json.loads((folder / ROWS_FILE).read_text())
    with safe_open(folder / LOG_PROBS_FILE, "pt") as file:
        return rows, file.get_tensor("log_probs")


def divergence(trained: torch.Tensor, published: torch.Tensor) -> tuple[float, float]:
    """Mean and maximum over the positions of KL(trained || published), in nats."""
    per_position = (trained.double().exp() * (trained.double() - published.double())).sum(dim=-1)
    return float(per_position.mean()), float(per_position.max())
