"""Rows and jobs of preference learning, shared by the tests of its methods."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from conftest import Trained
from safetensors.torch import load_file
from trainer_lab import short_rows

TRAIN_ROWS, VALIDATION_ROWS = 24, 7


def turns(start: int, count: int) -> list[tuple[str, str]]:
    """What a user says, and the right answer."""
    rows = [row["messages"] for row in short_rows(count, start=start)]
    return [(messages[-2]["content"], messages[-1]["content"]) for messages in rows]


def pair_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """The right answer, and that of the ticket behind it in capitals; every second row as messages."""
    answers = turns(start, count + 1)
    rows: list[dict[str, Any]] = []
    for number, ((said, right), (_, other)) in enumerate(itertools.pairwise(answers)):
        row = {"prompt": said, "chosen": right, "rejected": other.upper()}
        if number % 2:
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            row = {name: [{"role": roles[name], "content": text}] for name, text in row.items()}  # type: ignore[misc]
        rows.append(row)
    return rows


def sequence_log_prob(model: Any, prompt: list[int], answer: list[int]) -> float:
    """By hand: token by token, one sequence at a time."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer))


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def stored(run: Trained, folder: str, target: Any) -> dict[str, torch.Tensor]:
    """All tensors below a folder of what training handed over."""
    run.job.bucket.fetch_folder(f"{run.final}/{folder}", target)
    return {name: tensor for path in sorted(target.rglob("*.safetensors")) for name, tensor in load_file(path).items()}


def labelled_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Both answers of each pair in rows of their own."""
    rows: list[dict[str, Any]] = []
    for pair in pair_rows(count, start):
        rows.append({"prompt": pair["prompt"], "completion": pair["chosen"], "label": True})
        rows.append({"prompt": pair["prompt"], "completion": pair["rejected"], "label": False})
    return rows


def require_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """But for rounding. AdamW makes steps of one size, so that rounding may turn one round whose gradient is next to
    nothing: single numbers may differ by more."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).float().norm() <= 5e-3 * tensor.float().norm(), name
