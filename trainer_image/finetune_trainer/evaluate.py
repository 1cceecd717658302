"""Token-weighted loss: the sum of all negative log-likelihoods over the number of supervised tokens.

`Trainer.evaluate` averages over batches, so that its result depends on the batch size; this one does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from datasets import Dataset

from finetune_api.status import Measurement
from finetune_trainer.data.token_rows import IGNORED
from finetune_trainer.world import World

BATCH_TOKENS = 2048
"""Padded tokens that are computed at once."""


def unseen(rows: int) -> None:
    """Nobody wants to know how far an evaluation is."""


class Evaluation(Protocol):
    """Measures models on the validation rows, as a method has it. The results do not depend on the number of processes,
    nor on how many rows are computed at once."""

    def base(self, model: Any, measured: Callable[[int], None]) -> Measurement | None:
        """The base, in whatever precision; None without rows."""

    def tuned(self, model: Any, measured: Callable[[int], None]) -> Measurement | None:
        """The model that is trained."""


@dataclass(frozen=True)
class TokenEvaluation:
    """Of rows that are learnt token by token."""

    rows: Dataset
    world: World

    def base(self, model: Any, measured: Callable[[int], None]) -> Measurement | None:
        return measure(model, self.rows, self.world, measured=measured)

    tuned = base


def measure(
    model: Any,
    rows: Dataset,
    world: World,
    batch_tokens: int = BATCH_TOKENS,
    measured: Callable[[int], None] = unseen,
) -> Measurement | None:
    """Loss and perplexity of the model on the rows, shared among all processes; None without rows. `measured` is told
    the number of this process's rows that are done, after each batch."""
    if len(rows) == 0:
        return None
    total, tokens, done = 0.0, 0, 0
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for batch in batches(rows, range(world.rank, len(rows), world.size), batch_tokens):
            batch_total, batch_tokens_seen = _sums(model, batch)
            total += batch_total
            tokens += batch_tokens_seen
            done += len(batch)
            measured(done)
    model.train(was_training)
    total, count = world.sum(total, tokens)
    return measurement(total, int(count))


def measurement(total: float, tokens: int) -> Measurement:
    loss = total / tokens
    return Measurement(loss=f"{loss:.4f}", perplexity=format_perplexity(loss), tokens=tokens)


def format_perplexity(loss: float) -> str:
    return f"{math.exp(loss):.4g}" if loss < 700 else "inf"


def format_number(value: float) -> str:
    """At most twelve characters."""
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"


def batches(
    rows: Dataset | Sequence[dict[str, Any]], indices: Sequence[int], batch_tokens: int
) -> Iterator[list[dict[str, Any]]]:
    """Group rows of similar length, so that little is padded; each batch stays under the limit where it can."""
    by_length = sorted(indices, key=lambda index: len(rows[index]["input_ids"]))
    batch: list[dict[str, Any]] = []
    for index in by_length:
        row = rows[index]
        if batch and (len(batch) + 1) * len(row["input_ids"]) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def collate(batch: list[dict[str, list[int]]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded (input_ids, attention_mask, labels), each of shape (rows, longest)."""
    longest = max(len(row["input_ids"]) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for number, row in enumerate(batch):
        length = len(row["input_ids"])
        ids[number, :length] = torch.tensor(row["input_ids"])
        mask[number, :length] = 1
        labels[number, :length] = torch.tensor(row["labels"])
    return ids.to(device), mask.to(device), labels.to(device)


def supervised_logits(
    model: Any, batch: list[dict[str, list[int]]], part: slice = slice(None)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits where something is learnt: (logits, targets, row numbers), with one entry per supervised token.

    Only those positions go through the output head: the logits of whole rows would be the largest tensor by far.
    `part` takes some of the positions only.
    """
    ids, mask, labels = collate(batch, _input_device(model))
    # Position p predicts token p + 1.
    targets = labels[:, 1:]
    positions = (targets != IGNORED).any(dim=0).nonzero().flatten()[part]
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=positions, use_cache=False).logits
    kept = targets[:, positions]
    rows, columns = (kept != IGNORED).nonzero(as_tuple=True)
    return logits[rows, columns].float(), kept[rows, columns], rows


def _sums(model: Any, batch: list[dict[str, list[int]]]) -> tuple[float, int]:
    """Sum of the losses, and their number."""
    total, tokens = 0.0, 0
    for losses, _ in _losses(model, batch):
        total += float(losses.sum())
        tokens += losses.numel()
    return total, tokens


def row_losses(model: Any, batch: list[dict[str, Any]]) -> torch.Tensor:
    """Sum of the losses of each row, float64 on the CPU."""
    sums = torch.zeros(len(batch), dtype=torch.float64)
    for losses, rows in _losses(model, batch):
        sums.index_add_(0, rows.cpu(), losses.cpu())
    return sums


def _losses(model: Any, batch: list[dict[str, list[int]]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Losses of the supervised tokens in float64, and the rows they belong to. Of rows that are longer than a batch may
    be, the logits are computed in parts, each with a forward pass of its own: all at once they could be larger than
    what training itself needs."""
    at_once = max(1, BATCH_TOKENS // len(batch))
    for start in range(0, max(len(row["input_ids"]) for row in batch), at_once):
        logits, targets, rows = supervised_logits(model, batch, slice(start, start + at_once))
        if not targets.numel():
            break
        yield torch.nn.functional.cross_entropy(logits, targets, reduction="none").double(), rows


def _input_device(model: Any) -> torch.device:
    """Where inputs go. Weights streamed from disk are on the meta device between calls."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
