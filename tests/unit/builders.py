"""Objects as the API server would return them, for the tables of the pure core."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api import API_VERSION, KIND
from finetune_api.failures import FailureClass, exit_code_of
from finetune_api.names import (
    COMPLETION_INDEX,
    CONTAINER,
    LABEL_ATTEMPT,
    LABEL_JOB_NAME,
    LABEL_JOB_UID,
    LABEL_QUEUE,
    LABEL_STAGE,
    Stage,
    child_name,
)
from finetune_api.report import Outcome, Report, ReportedFailure
from finetune_api.status import FineTuneJobStatus
from finetune_operator.config import Settings
from finetune_operator.observe import Observation, read_jobs, read_pods
from finetune_operator.plan import Plan, plan
from finetune_operator.resource import FineTuneJob, format_time
from finetune_operator.status import Note

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
UID = "3a977917-7975-406a-8fc5-389d3592b800"
SETTINGS = Settings(trainer_image="trainer:test")


def spec(**changes: Any) -> dict[str, Any]:
    return {
        "model": {"uri": "s3://models/base"},
        "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
        "output": {"uri": "s3://models/tuned"},
        **changes,
    }


def job_body(status: dict[str, Any] | None = None, *, deleting: bool = False, **spec_changes: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "name": "bot",
        "namespace": "team",
        "uid": UID,
        "generation": 3,
        "resourceVersion": "7",
        "creationTimestamp": format_time(NOW),
    }
    if deleting:
        metadata["deletionTimestamp"] = format_time(NOW)
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": metadata,
        "spec": spec(**spec_changes),
        "status": status or {},
    }


def labels(stage: Stage, attempt: int) -> dict[str, str]:
    return {LABEL_JOB_NAME: "bot", LABEL_JOB_UID: UID, LABEL_STAGE: stage, LABEL_ATTEMPT: str(attempt)}


def child_job(
    stage: Stage,
    attempt: int = 1,
    *conditions: tuple[str, str, str],
    age: float = 60,
    deleting: bool = False,
    suspended: bool = False,
    queue: str = "",
    ended: datetime = NOW,
    nodes: int = 1,
) -> dict[str, Any]:
    """Conditions are (type, reason, message), all True."""
    metadata: dict[str, Any] = {
        "name": child_name("bot", stage, attempt),
        "namespace": "team",
        "uid": f"{stage}-{attempt}",
        "resourceVersion": "1",
        "labels": labels(stage, attempt) | ({LABEL_QUEUE: queue} if queue else {}),
        "creationTimestamp": format_time(NOW - timedelta(seconds=age)),
    }
    if deleting:
        metadata["deletionTimestamp"] = format_time(NOW)
    when = format_time(ended)
    found = [
        {"type": kind, "status": "True", "reason": reason, "message": text, "lastTransitionTime": when}
        for kind, reason, text in conditions
    ]
    status: dict[str, Any] = {"startTime": metadata["creationTimestamp"]} | ({"conditions": found} if found else {})
    return {"metadata": metadata, "spec": {"suspend": suspended, "completions": nodes}, "status": status}


def complete(stage: Stage, attempt: int = 1) -> dict[str, Any]:
    return child_job(
        stage,
        attempt,
        ("SuccessCriteriaMet", "CompletionsReached", "Reached expected number of succeeded pods"),
        ("Complete", "CompletionsReached", "Reached expected number of succeeded pods"),
    )


def exited(stage: Stage, attempt: int, code: int, *, gone: bool = True) -> dict[str, Any]:
    """A Job whose pod ended with an exit code; the words are those of a real Job controller."""
    pod = f"team/{child_name('bot', stage, attempt)}-0-x7k2p"
    text = f"Container {CONTAINER} for pod {pod} failed with exit code {code} matching FailJob rule at index 1"
    return _failed(stage, attempt, "PodFailurePolicy", text, gone=gone)


def failed(stage: Stage, attempt: int, failure_class: FailureClass, *, gone: bool = True) -> dict[str, Any]:
    return exited(stage, attempt, exit_code_of(failure_class), gone=gone)


def disrupted(stage: Stage, attempt: int, *, gone: bool = True) -> dict[str, Any]:
    name = child_name("bot", stage, attempt)
    text = f"Pod team/{name}-0-x7k2p has condition DisruptionTarget matching FailJob rule at index 0"
    return _failed(stage, attempt, "PodFailurePolicy", text, gone=gone)


def deleted_while_pending(stage: Stage, attempt: int) -> dict[str, Any]:
    return _failed(stage, attempt, "BackoffLimitExceeded", "Job has reached the specified backoff limit", gone=True)


def _failed(stage: Stage, attempt: int, reason: str, text: str, *, gone: bool) -> dict[str, Any]:
    conditions = [("FailureTarget", reason, text)] + ([("Failed", reason, text)] if gone else [])
    return child_job(stage, attempt, *conditions)


def child_pod(
    stage: Stage,
    attempt: int = 1,
    *,
    phase: str = "Pending",
    state: dict[str, Any] | None = None,
    conditions: list[dict[str, Any]] | None = None,
    ip: str = "10.0.0.7",
    delete_by: datetime | None = None,
) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "name": f"{child_name('bot', stage, attempt)}-0-x7k2p",
        "labels": labels(stage, attempt),
        "creationTimestamp": format_time(NOW - timedelta(seconds=30)),
    }
    if delete_by is not None:
        metadata["deletionTimestamp"] = format_time(delete_by)
    status: dict[str, Any] = {"phase": phase, "podIP": ip, "conditions": conditions or []}
    if state is not None:
        status["containerStatuses"] = [{"name": CONTAINER, "state": state}]
    return {"metadata": metadata, "spec": {"nodeName": "node1"}, "status": status}


def running_pod(
    stage: Stage, attempt: int = 1, delete_by: datetime | None = None, since: datetime | None = None
) -> dict[str, Any]:
    started = format_time(since or NOW - timedelta(seconds=20))
    return child_pod(stage, attempt, phase="Running", state={"running": {"startedAt": started}}, delete_by=delete_by)


def ended_pod(
    stage: Stage, attempt: int = 1, code: int = 0, report: Report | None = None, reason: str = ""
) -> dict[str, Any]:
    terminated: dict[str, Any] = {
        "exitCode": code,
        "startedAt": format_time(NOW - timedelta(seconds=20)),
        "finishedAt": format_time(NOW),
        "reason": reason or ("Completed" if code == 0 else "Error"),
    }
    if report is not None:
        terminated["message"] = report.encode().decode()
    phase = "Succeeded" if code == 0 else "Failed"
    return child_pod(stage, attempt, phase=phase, state={"terminated": terminated})


def of_node(index: int, pod: dict[str, Any]) -> dict[str, Any]:
    """The pod as the one of an Indexed Job with that index."""
    name = pod["metadata"]["name"].replace("-0-x7k2p", f"-{index}-x7k2p")
    pod["metadata"] |= {"name": name, "annotations": {COMPLETION_INDEX: str(index)}}
    pod["spec"]["nodeName"] = f"node{index + 1}"
    return pod


def report(stage: Stage, attempt: int = 1, **fields: Any) -> Report:
    return Report(job_uid=UID, stage=stage, attempt=attempt, **fields)


def failure_report(stage: Stage, attempt: int, failure_class: FailureClass, message: str, **fields: Any) -> Report:
    failure = ReportedFailure(
        failure_class=failure_class,
        message=message,
        exit_code=exit_code_of(failure_class),
        rank=0,
        log_tail="last words",
    )
    return report(stage, attempt, outcome=Outcome.FAILED, failure=failure, **fields)


def observe(
    jobs: list[dict[str, Any]] | None = None, pods: list[dict[str, Any]] | None = None, **fields: Any
) -> Observation:
    return Observation(read_jobs(jobs or []), read_pods(pods or []), **fields)


class Story:
    """A job through time: each `look` plans on what is seen, and keeps the status, as the operator would."""

    def __init__(self, **spec_changes: Any) -> None:
        self.body = job_body(**spec_changes)
        self.now = NOW

    @property
    def job(self) -> FineTuneJob:
        return FineTuneJob.parse(self.body)

    def look(
        self,
        jobs: list[dict[str, Any]] | None = None,
        pods: list[dict[str, Any]] | None = None,
        *,
        after: float = 0,
        settings: Settings = SETTINGS,
        **fields: Any,
    ) -> Plan:
        """Plan until nothing more follows at once, as the queue would have it; the last plan, with all notes."""
        self.now += timedelta(seconds=after)
        notes: tuple[Note, ...] = ()
        while True:
            job = self.job
            planned = plan(job, observe(jobs, pods, **fields), settings, self.now)
            self.written(job, planned.status)
            self.body["status"] = planned.status.to_json_dict()
            notes += planned.notes
            if planned.look_again != 0.0:
                return replace(planned, notes=notes)

    def written(self, job: FineTuneJob, status: FineTuneJobStatus) -> None:
        """For those who want to see each change."""

    def condition(self, kind: str) -> tuple[str, str] | None:
        """(status, reason) of a condition."""
        for condition in self.body["status"].get("conditions", []):
            if condition["type"] == kind:
                return condition["status"], condition["reason"]
        return None

    def prepared(self) -> None:
        """Until train attempt 1 was created."""
        self.look()
        self.look([complete(Stage.PREPARE)], [ended_pod(Stage.PREPARE)])

    def trained(self) -> None:
        """Until export attempt 1 was created."""
        self.prepared()
        self.look([complete(Stage.PREPARE), complete(Stage.TRAIN)])


def deleted(planned: Plan) -> list[str]:
    return [child.name for child in planned.delete]


def created(planned: Plan) -> list[str]:
    """Kinds and names, without the digest that ends the name of a ConfigMap."""
    names = [f"{item['kind']}/{item['metadata']['name']}" for item in planned.create]
    return [re.sub("-[0-9a-f]{8}$", "", name) if name.startswith("ConfigMap/") else name for name in names]
