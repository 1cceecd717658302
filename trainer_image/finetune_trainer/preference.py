"""Answers measured: how much more the model is inclined to them than the base is.

The reward of an answer is beta times the logarithm of how much likelier the model makes it than its reference, the
base. What the reference says is computed before the first step and stored: later there may be no base any more.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from safetensors.torch import load, save

from finetune_api.spec import DPO, KTO, DPOLoss, Method, MethodType
from finetune_api.status import Measurement
from finetune_trainer import evaluate
from finetune_trainer.data.token_rows import answered
from finetune_trainer.world import World

OTHER = "KL_completion_ids"
"""Column of an answer to another prompt, as TRL names it."""
PARTNERS = 100
"""Other answers that are tried, until one fits behind the prompt."""


class Evaluation(ABC):
    """Measures on the validation rows, against the model before its first step."""

    answers: ClassVar[tuple[str, str]]
    """Columns of the two answers of each row."""
    reference_columns: ClassVar[tuple[str, str]]
    """Columns in which TRL looks for what the reference says of them."""

    def __init__(self, rows: Dataset, world: World, compute: str) -> None:
        self.rows = rows
        self.world = world
        self.compute = compute
        self.reference: torch.Tensor | None = None
        """Log-probabilities of the answers under the model before its first step."""

    def base(self, model: Any, measured: Callable[[int], None]) -> Measurement | None:
        """A base compared with itself: no answer is rewarded. The model that will be trained has been run for the
        reference already."""
        if len(self.rows) == 0:
            return None
        found = self.reference if self.reference is not None else self.log_probs(model, self.rows, measured)
        return self.measurement(found, found)

    def tuned(self, model: Any, measured: Callable[[int], None]) -> Measurement | None:
        if len(self.rows) == 0:
            return None
        assert self.reference is not None
        return self.measurement(self.log_probs(model, self.rows, measured), self.reference)

    def log_probs(self, model: Any, rows: Dataset, measured: Callable[[int], None]) -> torch.Tensor:
        """In the number format of the training, so that rounding is no reward."""
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.compute == "BF16"):
            return log_probs(model, rows, self.answers, self.world, measured=measured)

    def with_reference(self, rows: Dataset, found: torch.Tensor) -> Dataset:
        """The rows with what the reference says of their answers."""
        for number, name in enumerate(self.reference_columns):
            rows = rows.add_column(name, found[:, number].tolist())
        return rows

    @abstractmethod
    def measurement(self, found: torch.Tensor, reference: torch.Tensor) -> Measurement:
        """What the log-probabilities of a model come to."""


class PairEvaluation(Evaluation):
    answers = ("chosen_ids", "rejected_ids")
    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")

    def __init__(self, rows: Dataset, world: World, compute: str, settings: DPO) -> None:
        super().__init__(rows, world, compute)
        self._settings = settings

    def measurement(self, found: torch.Tensor, reference: torch.Tensor) -> Measurement:
        ratios, counts = found - reference, torch.stack([lengths(self.rows, name) for name in self.answers], dim=1)
        margins = float(self._settings.beta) * (ratios[:, 0] - ratios[:, 1])
        return _measurement(
            float(found[:, 0].sum()),
            int(counts[:, 0].sum()),
            dpo_losses(ratios, counts, self._settings),
            margins,
            float(margins.mean()),
        )


class LabelledEvaluation(Evaluation):
    answers = ("completion_ids", OTHER)
    reference_columns = ("ref_logps", "ref_KL_logps")

    def __init__(self, rows: Dataset, world: World, compute: str, settings: KTO) -> None:
        super().__init__(rows, world, compute)
        self._settings = settings

    def measurement(self, found: torch.Tensor, reference: torch.Tensor) -> Measurement:
        good = torch.tensor(self.rows["label"])
        ratios = found - reference
        # How far the model has moved, from answers to other prompts: what an answer is compared with.
        average = ratios[:, 1].mean().clamp(min=0)
        beta = float(self._settings.beta)
        distance = beta * torch.where(good, ratios[:, 0] - average, average - ratios[:, 0])
        weights = torch.where(good, float(self._settings.desirable_weight), float(self._settings.undesirable_weight))
        rewards = beta * ratios[:, 0]
        return _measurement(
            float(found[good, 0].sum()),
            int(lengths(self.rows, "completion_ids")[good].sum()),
            weights * (1 - torch.sigmoid(distance)),
            distance,
            float(rewards[good].mean() - rewards[~good].mean()) if not good.all() else None,
        )


def evaluation_of(method: Method, rows: Dataset, world: World, compute: str) -> Evaluation | None:
    """How a method that compares with a reference measures; None for one that does not."""
    match method.type:
        case MethodType.DPO:
            return PairEvaluation(rows, world, compute, method.dpo or DPO())
        case MethodType.KTO:
            return LabelledEvaluation(rows, world, compute, method.kto or KTO())
        case _:
            return None


@dataclass(frozen=True)
class _Answers(Sequence[dict[str, Any]]):
    """The sequences of all rows: at 2n the first answer of row n, behind it the second one."""

    rows: Dataset
    columns: tuple[str, str]

    def __len__(self) -> int:
        return 2 * len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:  # type: ignore[override]
        row = self.rows[number // 2]
        sequence = answered(row["prompt_ids"], row[self.columns[number % 2]])
        return {"input_ids": sequence.input_ids, "labels": sequence.labels, "number": number}


def log_probs(
    model: Any,
    rows: Dataset,
    columns: tuple[str, str],
    world: World,
    batch_tokens: int = evaluate.BATCH_TOKENS,
    measured: Callable[[int], None] = evaluate.unseen,
) -> torch.Tensor:
    """Log-probability of both answers of each row, shape (rows, 2), float64 on the CPU: the same in all processes,
    which share the work, and however many answers are computed at once."""
    answers = _Answers(rows.select_columns(["prompt_ids", *columns]), columns)
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


def lengths(rows: Dataset, column: str) -> torch.Tensor:
    """Tokens in each row of a column."""
    return torch.tensor(pc.list_value_length(_column(rows, column)).to_pylist(), dtype=torch.float64)


def _column(rows: Dataset, name: str) -> pa.ChunkedArray:
    return rows.with_format("arrow")[:][name]


def with_others(rows: Dataset, seed: int) -> Dataset:
    """Each row with the answer to another prompt: that of the row before it in an order drawn once, or of one further
    back, until prompt and answer are together no longer than the longest row.

    TRL takes the answer of the neighbour in the micro-batch, so that how the batch is cut would decide what is learnt.
    """
    prompts, answers = (lengths(rows, name).int().tolist() for name in ("prompt_ids", "completion_ids"))
    # Several answers to one prompt are usual.
    asked = [hash(tuple(ids.as_py())) for chunk in _column(rows, "prompt_ids").chunks for ids in chunk]
    longest = max((p + a for p, a in zip(prompts, answers, strict=True)), default=0)
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    partner = [0] * len(rows)
    for place, row in enumerate(order):
        nearby = (order[place - back] for back in range(1, min(PARTNERS, len(rows) - 1) + 1))
        fitting = (other for other in nearby if prompts[row] + answers[other] <= longest)
        partner[row] = next((other for other in fitting if asked[other] != asked[row]), row)
    taken = _column(rows, "completion_ids").take(pa.array(partner, pa.int64()))
    return rows.add_column(OTHER, taken.combine_chunks())


def dpo_losses(ratios: torch.Tensor, lengths: torch.Tensor, settings: DPO) -> torch.Tensor:
    """Loss of each pair, from the logarithms of how much likelier the model makes its answers than the reference."""
    beta = float(settings.beta)
    margins = beta * (ratios[:, 0] - ratios[:, 1])
    agrees = torch.nn.functional.softplus(-margins)
    match settings.loss:
        case DPOLoss.SIGMOID:
            return agrees
        case DPOLoss.HINGE:
            return torch.relu(1 - margins)
        case DPOLoss.IPO:
            by_token = ratios / lengths
            return (by_token[:, 0] - by_token[:, 1] - 1 / (2 * beta)) ** 2
        case DPOLoss.ROBUST:
            wrong = float(settings.label_smoothing or 0)
            return ((1 - wrong) * agrees - wrong * torch.nn.functional.softplus(margins)) / (1 - 2 * wrong)


def _measurement(
    total: float, tokens: int, losses: torch.Tensor, distance: torch.Tensor, margin: float | None
) -> Measurement:
    """`distance` is how far each row is on the right side."""
    right = (distance > 0).double() + 0.5 * (distance == 0).double()
    return evaluate.measurement(-total, tokens).model_copy(
        update={
            "method_loss": evaluate.format_number(float(losses.mean())),
            "accuracy": evaluate.format_number(float(right.mean())),
            "margin": None if margin is None else evaluate.format_number(margin),
        }
    )


def encode(found: torch.Tensor) -> bytes:
    return save({"log_probs": found})


def decode(data: bytes) -> torch.Tensor:
    return load(data)["log_probs"]
