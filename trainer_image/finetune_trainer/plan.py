"""The plan: what prepare decided, for the stages after it. It is stored as plan.json when everything it names is."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from finetune_api import SCHEMA_VERSION
from finetune_api.base import ApiModel
from finetune_api.document import JobDocument
from finetune_api.failures import FailureClass, JobError
from finetune_trainer import layout
from finetune_trainer.base_model import ModelPin
from finetune_trainer.data.prepared import TRAIN_FILE, VALIDATION_FILE
from finetune_trainer.storage import Folder, open_folder


class SourceFile(ApiModel):
    """A data file as it was read."""

    uri: str
    size: int
    version: str


class PreparedSet(ApiModel):
    """One of the two sets of rows."""

    rows: int
    tokens: int
    supervised_tokens: int
    longest: int
    sha256: str
    file_sha256: str
    """Of the stored file."""


class DataPlan(ApiModel):
    format: str
    train_sources: list[SourceFile]
    validation_sources: list[SourceFile]
    skipped_rows: int
    overlong_rows: int = 0
    duplicate_rows: int = 0
    leaked_rows: int = 0
    split_conversations: int
    """Conversations that became one row per assistant turn, because the template rewrites earlier turns."""
    template_date: str
    train: PreparedSet
    validation: PreparedSet


class TrainingPlan(ApiModel):
    schema_version: int = SCHEMA_VERSION
    document_digest: str
    model: ModelPin
    model_type: str
    parameters: int
    weight_dtype: str
    """Number format of the base model's weights, as safetensors writes it."""
    data: DataPlan
    stop_ids: list[int]
    """Tokens that end an assistant turn."""
    total_steps: int
    learning_rate: str
    artifacts: list[str]
    dtype: str
    """Number format of the published weights, as safetensors writes it."""


def load_plan(document: JobDocument) -> TrainingPlan | None:
    """The stored plan of this job, or None when prepare has not finished."""
    work = open_folder(document.work_uri, document.storage)
    if work.stat(layout.PLAN) is None:
        return None
    try:
        return TrainingPlan.model_validate(json.loads(work.read(layout.PLAN)))
    except (ValueError, ValidationError):
        return None


def require_plan(document: JobDocument) -> TrainingPlan:
    """
    Raises:
        JobError: NotFound, when there is no plan.

    It is this job's: the folder of work files holds its uid, and its specification cannot change.
    """
    plan = load_plan(document)
    if plan is None:
        raise JobError(
            FailureClass.NOT_FOUND,
            f"{document.work_uri}/{layout.PLAN} does not exist: the prepare stage has not finished, or its files were "
            "deleted. Create the job anew.",
        )
    return plan


def fetch_prepared(work: Folder, plan: TrainingPlan, target: Path) -> None:
    """Download both sets; what arrives must be what was prepared."""
    from finetune_trainer.storage.s3 import sha256_file

    for name, prepared in ((TRAIN_FILE, plan.data.train), (VALIDATION_FILE, plan.data.validation)):
        info = work.stat(f"{layout.PREPARE}/{name}")
        if info is None:
            raise JobError(
                FailureClass.NOT_FOUND, f"{work.uri}/{layout.PREPARE}/{name} was deleted. Create the job anew."
            )
        work.download(info, target / name)
        if sha256_file(target / name) != prepared.file_sha256:
            raise JobError(
                FailureClass.DATA_ERROR,
                f"{work.uri}/{layout.PREPARE}/{name} is not what was prepared. Create the job anew.",
            )
