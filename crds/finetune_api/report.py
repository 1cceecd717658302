"""The report: what one attempt has to say, while it runs and after.

The agent serves it at /progress, keeps it in the termination message (at most 3,500 bytes, since the kubelet keeps
only the last 4,096 of it), and stores it as report.json beside the attempt's files. It only adds detail: whether and
how an attempt failed is decided by the Job's conditions alone.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, ValidationError

from finetune_api import SCHEMA_VERSION
from finetune_api.base import ApiModel
from finetune_api.failures import FailureClass
from finetune_api.names import Stage
from finetune_api.status import (
    ArtifactResult,
    CheckpointResult,
    DatasetResult,
    EvaluationResult,
    Resolved,
    Verification,
)

MAX_REPORT_BYTES = 3500
MAX_LOG_TAIL_BYTES = 1500


class Outcome(StrEnum):
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class StepProgress(ApiModel):
    """Numbers of the last optimiser step."""

    step: Annotated[int, Field(ge=0)]
    total_steps: Annotated[int, Field(ge=0)]
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    """Of this attempt, without the time before its first step."""
    trained_tokens: int | None = None
    """Over all attempts."""
    step_seconds: float | None = None
    """Median duration of this attempt's steps."""
    last_step_time: str | None = None
    gpu_memory_peak_bytes: int | None = None
    """Of the first GPU, in this attempt."""


class ReportedFailure(ApiModel):
    failure_class: Annotated[FailureClass, Field(alias="class")]
    message: str
    exit_code: int
    rank: int | None = None
    log_tail: str | None = None


class Report(ApiModel):
    """All parts are optional: a provisional report is a valid one."""

    schema_version: int = SCHEMA_VERSION
    job_uid: str
    stage: Stage
    attempt: int
    outcome: Outcome = Outcome.RUNNING
    phase: str = "Starting"
    """What it does now, such as Downloading or Training."""
    measured_rows: int | None = None
    """Validation rows that this evaluation has measured so far, by the first process."""
    update_time: str | None = None
    progress: StepProgress | None = None
    resumed_from_step: int | None = None
    already_published: bool | None = None
    """Prepare found a verified result of the same document at output.uri."""
    dataset: DatasetResult | None = None

    resolved: Resolved | None = None
    evaluation: EvaluationResult | None = None
    checkpoint: CheckpointResult | None = None
    checkpoint_failures: int | None = None
    """Checkpoints of this attempt that could not be stored."""
    artifacts: list[ArtifactResult] | None = None
    verification: Verification | None = None
    phase_seconds: dict[str, float] | None = None
    """How long each phase took; a train pod holds its GPUs in all of them."""
    failure: ReportedFailure | None = None
    log_uri: str | None = None

    def encode(self, limit: int = MAX_REPORT_BYTES) -> bytes:
        """JSON of at most `limit` bytes. What does not fit is left out, least important first."""
        data = self.to_json_dict()
        for drop in (*_DROP_ORDER, None):
            encoded = _encoded(data)
            if len(encoded) <= limit or drop is None:
                break
            drop(data)
        return encoded


def _encoded(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _shorten_log_tail(data: dict[str, Any]) -> None:
    failure = data.get("failure") or {}
    while len(_encoded(failure.get("logTail"))) > 500:
        failure["logTail"] = failure["logTail"][len(failure["logTail"]) // 10 + 1 :]


def _drop_log_tail(data: dict[str, Any]) -> None:
    (data.get("failure") or {}).pop("logTail", None)


def _shorten_message(data: dict[str, Any]) -> None:
    failure = data.get("failure") or {}
    message = failure.get("message", "")
    while len(_encoded(failure.get("message"))) > 1000:
        message = message[: len(message) * 9 // 10]
        failure["message"] = message + "…"


def _keep_essentials(data: dict[str, Any]) -> None:
    for key in ("phaseSeconds", "resolved", "artifacts", "checkpoint", "logURI"):
        data.pop(key, None)


_DROP_ORDER = (_shorten_log_tail, _drop_log_tail, _shorten_message, _keep_essentials)


def decode(text: str | bytes | None) -> Report | None:
    """Read a report; None when there is none or it is not one.

    A writer killed between its two system calls leaves the tail of a longer, older report behind the new one, so
    whatever follows the first JSON value is ignored.
    """
    if not text:
        return None
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    try:
        value, _ = json.JSONDecoder().raw_decode(text.lstrip())
        report = Report.model_validate(value)
    except (ValueError, ValidationError):
        return None
    return report if 1 <= report.schema_version <= SCHEMA_VERSION else None
