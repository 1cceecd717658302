"""Proof that the published model is the trained one, without having both in memory.

Training stores the log-probabilities of the trained model at a few positions of some rows; export runs the written
files on the same rows, one layer in memory at a time, and compares.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file

from finetune_trainer.data.render import IGNORED
from finetune_trainer.evaluate import supervised_logits

ROWS = 16
POSITIONS_PER_ROW = 8
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
    return [_thinned(row) for row in chosen]


def _thinned(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """Keep the labels of evenly spread positions only: a distribution over the vocabulary is stored for each."""
    labelled = [i for i, label in enumerate(row["labels"]) if label != IGNORED and i > 0]
    step = max(1, -(-len(labelled) // POSITIONS_PER_ROW))
    kept = set(labelled[::step])
    return {
        "input_ids": row["input_ids"],
        "labels": [label if i in kept else IGNORED for i, label in enumerate(row["labels"])],
    }


def log_probs(model: Any, rows: list[dict[str, list[int]]]) -> torch.Tensor:
    """Log-probabilities over the vocabulary, shape (positions, vocabulary), float32 on the CPU."""
    was_training = model.training
    model.eval()
    parts = []
    with torch.inference_mode():
        for row in rows:
            logits, _, _ = supervised_logits(model, [row])
            parts.append(torch.log_softmax(logits.float(), dim=-1).cpu())
    model.train(was_training)
    return torch.cat(parts)


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
