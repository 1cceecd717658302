"""A typed view of a FineTuneJob as the API server returned it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus


@dataclass(frozen=True)
class FineTuneJob:
    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    created: datetime
    deleting: bool
    spec: FineTuneJobSpec | None
    """None when it cannot be read; then `spec_problem` says why."""
    spec_problem: str
    status: FineTuneJobStatus
    status_problem: str = ""
    """Why the status cannot be read. Then nothing is known of the job, and nothing may be done."""

    @classmethod
    def parse(cls, body: dict[str, Any]) -> FineTuneJob:
        metadata = body["metadata"]
        spec, problem, status_problem = None, "", ""
        try:
            spec = FineTuneJobSpec.model_validate(body.get("spec") or {})
        except ValidationError as error:
            problem = _first(error, "spec")
        try:
            status = FineTuneJobStatus.model_validate(body.get("status") or {})
        except ValidationError as error:
            status, status_problem = FineTuneJobStatus(), _first(error, "status")
        return cls(
            namespace=metadata["namespace"],
            name=metadata["name"],
            uid=metadata["uid"],
            generation=metadata.get("generation", 0),
            resource_version=metadata["resourceVersion"],
            created=parse_time(metadata["creationTimestamp"]),
            deleting="deletionTimestamp" in metadata,
            spec=spec,
            spec_problem=problem,
            status=status,
            status_problem=status_problem,
        )


def _first(error: ValidationError, root: str) -> str:
    first = error.errors()[0]
    return f"{'.'.join([root, *map(str, first['loc'])])}: {first['msg']}"


def format_time(moment: datetime) -> str:
    """As Kubernetes writes it: seconds, UTC."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> datetime:
    return datetime.fromisoformat(text)
