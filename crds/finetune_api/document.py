"""The job document: everything one attempt of one stage is told, as JSON in an immutable ConfigMap.

The trainer reads nothing else about the job. Secrets are not in it; they reach the pod as environment variables.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import Field

from finetune_api import SCHEMA_VERSION
from finetune_api.base import ApiModel
from finetune_api.names import Stage
from finetune_api.spec import AddressingStyle, FineTuneJobSpec

#: Fields of the spec that decide what the result is. The others say where, when and how often it is tried.
RESULT_FIELDS = ("model", "dataset", "method", "hyperparameters", "output")


DEFAULT_MICRO_BATCH = 8


class JobIdentity(ApiModel):
    """The FineTuneJob that the document belongs to."""

    namespace: str
    name: str
    uid: str


class StorageSettings(ApiModel):
    """How to reach S3, with the operator's defaults filled in. Credentials come from the environment."""

    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None
    """None leaves it to boto3."""
    allow_files: bool = False
    """file:// URIs are allowed: the pod shares a file system with the user (local mode)."""


def path_style(style: AddressingStyle, endpoint: str | None) -> bool | None:
    """Whether the bucket is in the path; None leaves it to boto3. Servers other than AWS rarely have a host name for
    each bucket."""
    named = {AddressingStyle.PATH: True, AddressingStyle.VIRTUAL: False}.get(style)
    return True if named is None and endpoint else named


class JobDocument(ApiModel):
    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION
    stage: Stage
    attempt: Annotated[int, Field(ge=1)]
    """Counts from 1 in each stage."""
    job: JobIdentity
    spec: FineTuneJobSpec
    work_uri: str
    """Folder of this job's work files; holds the job's uid, so that no two jobs share one."""
    storage: StorageSettings = StorageSettings()
    processes: Annotated[int, Field(ge=1)] = 1
    """Training processes in each pod: one for each GPU, or one on CPU."""
    nodes: Annotated[int, Field(ge=1)] = 1
    """Pods that train together."""
    earlier_attempts: list[int] = []
    """Train: attempts whose checkpoints may be read, newest first. Export: the one attempt to export."""
    trainer_image: str = ""
    stall_seconds: Annotated[int, Field(ge=1)] = 1800
    """Training that makes no step for so long is ended as NoProgress."""
    micro_batch_limit: Annotated[int, Field(ge=1)] | None = None
    """The GPU ran out of memory with more rows at once."""

    @property
    def digest(self) -> str:
        return spec_digest(self.spec)

    @property
    def world_size(self) -> int:
        """Training processes of all pods."""
        return self.processes * self.nodes

    @property
    def micro_batch_size(self) -> int:
        return micro_batch_size(self.spec, self.world_size, self.micro_batch_limit)


def micro_batch_size(spec: FineTuneJobSpec, processes: int, limit: int | None = None) -> int:
    """Rows that one process computes at once: the largest divisor of its share of the batch that is not above what was
    asked for, eight when nothing was, nor above the limit."""
    share = spec.hyperparameters.batch_size // processes
    most = min(spec.hyperparameters.micro_batch_size or DEFAULT_MICRO_BATCH, limit or share, share)
    return max(size for size in range(1, most + 1) if share % size == 0)


def spec_digest(spec: FineTuneJobSpec) -> str:
    """sha256 over the canonical JSON of the fields that decide the result: equal digests ask for the same model.

    Defaults are left out, so that a version with one field more finds what an earlier one published.
    """
    values = spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
    fields = {name: value for name, value in values.items() if name in RESULT_FIELDS}
    fields["output"] = {key: value for key, value in fields["output"].items() if key != "onExisting"}
    return hashlib.sha256(canonical_json(fields)).hexdigest()


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
