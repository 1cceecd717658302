"""Pairs measured: how much more the model is inclined to the chosen answer than the base is.

The reward of an answer is beta times the logarithm of how much likelier the model makes it than its reference, the
base. What the reference says is computed before the first step and stored: later there may be no base any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load, save

from finetune_api.spec import DPO, DPOLoss
from finetune_api.status import Measurement
from finetune_trainer import evaluate
from finetune_trainer.data.token_rows import PairRow, answered
from finetune_trainer.world import World

CHOSEN, REJECTED = 0, 1


@dataclass(frozen=True)
class _Answers(Sequence[dict[str, Any]]):
    """The sequences of all pairs: at 2n the chosen answer of row n, behind it the rejected one."""

    rows: Dataset

    def __len__(self) -> int:
        return 2 * len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:  # type: ignore[override]
        row = PairRow(**self.rows[number // 2])
        sequence = answered(row.prompt_ids, row.rejected_ids if number % 2 else row.chosen_ids)
        return {"input_ids": sequence.input_ids, "labels": sequence.labels, "number": number}


@dataclass
class PairEvaluation:
    rows: Dataset
    world: World
    settings: DPO
    compute: str
    reference: torch.Tensor | None = None
    """Log-probabilities of the answers under the model before its first step."""

    def base(self, model: Any, measured: Callable[[int], None]) -> Measurement | None:
        """A base compared with itself: neither answer is rewarded. The model that will be trained has been run for the
        reference already."""
        found = self.reference if self.reference is not None else self.log_probs(model, self.rows, measured)
        return measurement(found, found, self.rows, self.settings)

    def tuned(self, model: Any, measured: Callable[[int], None]) -> Measurement | None:
        assert self.reference is not None
        return measurement(self.log_probs(model, self.rows, measured), self.reference, self.rows, self.settings)

    def log_probs(self, model: Any, rows: Dataset, measured: Callable[[int], None]) -> torch.Tensor:
        """In the number format of the training, so that rounding is no reward."""
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.compute == "BF16"):
            return log_probs(model, rows, self.world, measured=measured)


def log_probs(
    model: Any,
    rows: Dataset,
    world: World,
    batch_tokens: int = evaluate.BATCH_TOKENS,
    measured: Callable[[int], None] = evaluate.unseen,
) -> torch.Tensor:
    """Log-probability of both answers of each pair, shape (rows, 2), float64 on the CPU: the same in all processes,
    which share the work, and however many answers are computed at once."""
    answers = _Answers(rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]))
    found = torch.zeros(len(answers), dtype=torch.float64)
    done = 0
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for batch in evaluate.batches(answers, range(world.rank, len(answers), world.size), batch_tokens):
            found[[answer["number"] for answer in batch]] = -evaluate.row_losses(model, batch)
            done += len(batch)
            measured(done)
    model.train(was_training)
    return torch.tensor(world.sum(*found.tolist()), dtype=torch.float64).reshape(-1, 2)


def lengths(rows: Dataset) -> torch.Tensor:
    """Tokens of both answers of each pair."""
    chosen, rejected = (map(len, rows[name]) for name in ("chosen_ids", "rejected_ids"))
    return torch.tensor(list(zip(chosen, rejected, strict=True)), dtype=torch.float64).reshape(-1, 2)


def losses(ratios: torch.Tensor, lengths: torch.Tensor, settings: DPO) -> torch.Tensor:
    """Loss of each pair, from the logarithms of how much likelier the model makes its answers than the reference."""
    beta = float(settings.beta)
    margins = beta * (ratios[:, CHOSEN] - ratios[:, REJECTED])
    agrees = torch.nn.functional.softplus(-margins)
    match settings.loss:
        case DPOLoss.SIGMOID:
            return agrees
        case DPOLoss.HINGE:
            return torch.relu(1 - margins)
        case DPOLoss.IPO:
            by_token = ratios / lengths
            return (by_token[:, CHOSEN] - by_token[:, REJECTED] - 1 / (2 * beta)) ** 2
        case DPOLoss.ROBUST:
            wrong = float(settings.label_smoothing or 0)
            return ((1 - wrong) * agrees - wrong * torch.nn.functional.softplus(margins)) / (1 - 2 * wrong)


def measurement(found: torch.Tensor, reference: torch.Tensor, rows: Dataset, settings: DPO) -> Measurement | None:
    """What the log-probabilities of a model come to; None without rows."""
    if len(rows) == 0:
        return None
    ratios, counts = found - reference, lengths(rows)
    margins = float(settings.beta) * (ratios[:, CHOSEN] - ratios[:, REJECTED])
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    return evaluate.measurement(-float(found[:, CHOSEN].sum()), int(counts[:, CHOSEN].sum())).model_copy(
        update={
            "method_loss": evaluate.format_number(float(losses(ratios, counts, settings).mean())),
            "accuracy": evaluate.format_number(float(right.mean())),
            "margin": evaluate.format_number(float(margins.mean())),
        }
    )


def encode(found: torch.Tensor) -> bytes:
    return save({"log_probs": found})


def decode(data: bytes) -> torch.Tensor:
    return load(data)["log_probs"]
