"""What is true now, from the objects that the API server returned. Pure; nothing is remembered."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from finetune_api.failures import STOPPED_CODES
from finetune_api.names import (
    COMPLETION_INDEX,
    CONTAINER,
    LABEL_ATTEMPT,
    LABEL_QUEUE,
    LABEL_STAGE,
    Stage,
    child_name,
)
from finetune_api.report import Report, decode
from finetune_operator.resource import parse_time

NEVER = datetime.max.replace(tzinfo=UTC)


class Outcome(StrEnum):
    RUNNING = "Running"
    FAILING = "Failing"
    """The Job controller has decided (FailureTarget), pods may still be there."""
    FAILED = "Failed"
    COMPLETE = "Complete"


@dataclass(frozen=True)
class ChildJob:
    name: str
    stage: Stage
    attempt: int
    created: datetime
    deleting: bool
    outcome: Outcome
    reason: str = ""
    """Of the condition that decided."""
    message: str = ""
    ended: datetime | None = None
    """When the outcome was decided."""
    suspended: bool = False
    """Somebody, a queue for example, keeps it from having pods."""
    queue: str = ""
    """Kueue's LocalQueue that it was created for."""
    nodes: int = 1
    """Pods that it has at the same time."""
    uid: str = ""
    resource_version: str = ""

    @property
    def finished(self) -> bool:
        """It has no pods and will have none."""
        return self.outcome in (Outcome.FAILED, Outcome.COMPLETE)


@dataclass(frozen=True)
class Waiting:
    """Why a pod does not run."""

    reason: str
    """As Kubernetes says it: Unschedulable, ImagePullBackOff, CreateContainerConfigError, ..."""
    message: str


@dataclass(frozen=True)
class ChildPod:
    name: str
    stage: Stage
    attempt: int
    created: datetime
    node: str
    ip: str
    finished: bool
    """It will never run again."""
    delete_by: datetime | None
    """When it is being deleted: the end of its grace period."""
    started: datetime | None
    """When its container began to run."""
    ended: datetime | None
    """When its container ended."""
    running: bool
    waiting: Waiting | None
    exit_code: int | None
    oom_killed: bool
    report: Report | None
    """From its termination message."""
    index: int = 0
    """Which of the attempt's pods it is. The first one speaks for all."""
    disrupted: bool = False
    """The cluster took it away, for which its Job ends."""

    @property
    def waits(self) -> bool:
        """It has not run yet, and may."""
        return self.started is None and self.exit_code is None and not self.finished


@dataclass(frozen=True)
class Workload:
    """What Kueue says of a Job."""

    name: str
    cluster_queue: str = ""
    """That has reserved its quota."""
    active: bool = True
    message: str = ""
    """Why it waits."""
    position: int | None = None


@dataclass(frozen=True)
class Conflict:
    """An object with the name of one of our children that is not ours."""

    kind: str
    name: str
    stale: bool
    """It belonged to a deleted job and is being removed; else it is somebody's and is never touched."""
    owner: str


@dataclass(frozen=True)
class Observation:
    jobs: tuple[ChildJob, ...] = ()
    pods: tuple[ChildPod, ...] = ()
    warnings: tuple[Waiting, ...] = ()
    """Of the Job that has no pods, or the pod that does not start: what its Warning events say, newest first. Quota,
    Pod Security and webhooks speak nowhere else, nor do volumes that cannot be mounted."""
    workload: Workload | None = None
    """Of the Job that a queue keeps back."""
    no_kueue: bool = False
    """The cluster does not know Kueue."""
    conflict: Conflict | None = None
    create_error: str = ""
    """Why the API server refuses to create a child."""
    create_invalid: bool = False
    """It refuses because the child is not valid, so that no waiting helps."""
    live: Report | None = None
    """What the running pod says."""
    alive: frozenset[str] = frozenset()
    """Names of the pods that have answered."""
    unreachable: str = ""
    """Why the running pod could not be asked; empty when it was not tried or answered."""
    silent_seconds: float = 0.0
    """How long it has not answered."""

    def job(self, stage: Stage, attempt: int) -> ChildJob | None:
        return next((job for job in self.jobs if (job.stage, job.attempt) == (stage, attempt)), None)

    def pod(self, stage: Stage, attempt: int) -> ChildPod | None:
        """The pod that speaks for an attempt: the newest of its first node, and one that still can run before one that
        cannot."""
        return self._pod(stage, attempt, 0)

    def last_pod(self, stage: Stage, attempt: int, nodes: int) -> ChildPod | None:
        """Of the pods of an attempt the one that is, or was, the last to run; None while one is missing. When it runs
        all do."""
        found = [self._pod(stage, attempt, index) for index in range(nodes)]
        pods = [pod for pod in found if pod is not None]
        if len(pods) < nodes:
            return None
        return max(pods, key=lambda pod: (pod.started is None, pod.started or NEVER, -pod.index))

    def _pod(self, stage: Stage, attempt: int, index: int) -> ChildPod | None:
        pods = [pod for pod in self.pods_of(stage, attempt) if pod.index == index]
        return next((pod for pod in pods if not pod.finished), pods[-1] if pods else None)

    def without_stopped(self) -> Observation:
        """Without pods that ended as they were told to. A queue may then start the Job again, which makes others; but
        not where the cluster took one away, for which the Job controller is about to end the Job."""

        def stopped(pod: ChildPod) -> bool:
            return pod.finished and pod.exit_code in STOPPED_CODES and not pod.disrupted

        return replace(self, pods=tuple(pod for pod in self.pods if not stopped(pod)))

    def pod_named(self, name: str) -> ChildPod | None:
        return next((pod for pod in self.pods if pod.name == name), None)

    def pods_of(self, stage: Stage, attempt: int) -> tuple[ChildPod, ...]:
        return tuple(pod for pod in self.pods if (pod.stage, pod.attempt) == (stage, attempt))

    def nodes_of(self, stage: Stage, attempt: int) -> list[str]:
        """Of the pods of an attempt, by their index."""
        indexes = sorted({pod.index for pod in self.pods_of(stage, attempt)})
        return [pod.node for index in indexes if (pod := self._pod(stage, attempt, index)) is not None]

    def newest_attempt(self, stage: Stage) -> int:
        return max((job.attempt for job in self.jobs if job.stage is stage), default=0)


def own_jobs(objects: Iterable[dict[str, Any]], name: str, uid: str) -> list[dict[str, Any]]:
    """Those that belong to a FineTuneJob. Labels alone prove nothing: a copy of a child has them too."""
    return [
        item
        for item in objects
        if any(owner.get("uid") == uid for owner in item["metadata"].get("ownerReferences") or [])
        and item["metadata"]["name"] == _child_name(item, name)
    ]


def own_pods(objects: Iterable[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Those that belong to a Job with the name of a child, be it there or gone."""
    return [
        item
        for item in objects
        if any(
            owner.get("kind") == "Job" and owner.get("name") == _child_name(item, name)
            for owner in item["metadata"].get("ownerReferences") or []
        )
    ]


def _child_name(item: dict[str, Any], job_name: str) -> str | None:
    position = _position(item["metadata"])
    return child_name(job_name, *position) if position else None


def read_jobs(objects: Iterable[dict[str, Any]]) -> tuple[ChildJob, ...]:
    jobs = (_read_job(item) for item in objects)
    return tuple(sorted((job for job in jobs if job), key=lambda job: (job.stage, job.attempt)))


def read_pods(objects: Iterable[dict[str, Any]]) -> tuple[ChildPod, ...]:
    ordered = sorted(objects, key=lambda item: str(item["metadata"].get("creationTimestamp")))
    return tuple(pod for pod in map(_read_pod, ordered) if pod)


def _position(metadata: dict[str, Any]) -> tuple[Stage, int] | None:
    """Stage and attempt from the labels; None for an object that somebody labelled by hand."""
    labels = metadata.get("labels") or {}
    try:
        return Stage(labels.get(LABEL_STAGE, "")), int(labels.get(LABEL_ATTEMPT, ""))
    except ValueError:
        return None


def _read_job(item: dict[str, Any]) -> ChildJob | None:
    metadata = item["metadata"]
    position = _position(metadata)
    if position is None:
        return None
    outcome, reason, message = Outcome.RUNNING, "", ""
    status = item.get("status") or {}
    conditions = {
        condition["type"]: condition
        for condition in status.get("conditions") or []
        if condition.get("status") == "True"
    }
    # Failed comes after FailureTarget, when the pods are gone; both carry the same words.
    for kind, found in (
        ("FailureTarget", Outcome.FAILING),
        ("Failed", Outcome.FAILED),
        ("Complete", Outcome.COMPLETE),
    ):
        if kind in conditions:
            outcome = found
            reason = conditions[kind].get("reason") or ""
            message = conditions[kind].get("message") or ""
    # The first one that decides: until the last one, the controller only waits for the pods to go.
    decided = ("FailureTarget", "Failed", "SuccessCriteriaMet", "Complete")
    times = [conditions[kind].get("lastTransitionTime") for kind in decided if kind in conditions]
    return ChildJob(
        name=metadata["name"],
        stage=position[0],
        attempt=position[1],
        created=parse_time(metadata["creationTimestamp"]),
        deleting="deletionTimestamp" in metadata,
        outcome=outcome,
        reason=reason,
        message=message,
        ended=min((parse_time(time) for time in times if time), default=None),
        suspended=bool((item.get("spec") or {}).get("suspend")),
        queue=(metadata.get("labels") or {}).get(LABEL_QUEUE) or "",
        nodes=(item.get("spec") or {}).get("completions") or 1,
        uid=metadata.get("uid") or "",
        resource_version=metadata.get("resourceVersion") or "",
    )


def _read_pod(item: dict[str, Any]) -> ChildPod | None:
    metadata = item["metadata"]
    position = _position(metadata)
    if position is None:
        return None
    status = item.get("status") or {}
    container: dict[str, Any] = next(
        (entry for entry in status.get("containerStatuses") or [] if entry.get("name") == CONTAINER), {}
    )
    state = container.get("state") or {}
    running, ended = state.get("running"), state.get("terminated")
    started = (running or ended or {}).get("startedAt")
    return ChildPod(
        name=metadata["name"],
        stage=position[0],
        attempt=position[1],
        created=parse_time(metadata["creationTimestamp"]),
        node=(item.get("spec") or {}).get("nodeName") or "",
        ip=status.get("podIP") or "",
        finished=status.get("phase") in ("Succeeded", "Failed"),
        delete_by=parse_time(metadata["deletionTimestamp"]) if "deletionTimestamp" in metadata else None,
        started=parse_time(started) if started else None,
        ended=parse_time(ended["finishedAt"]) if ended and ended.get("finishedAt") else None,
        running=running is not None,
        waiting=_waiting(status, state),
        exit_code=ended.get("exitCode") if ended else None,
        oom_killed=bool(ended and ended.get("reason") == "OOMKilled"),
        report=decode(ended.get("message")) if ended else None,
        index=_index(metadata),
        disrupted=any(
            condition.get("type") == "DisruptionTarget" and condition.get("status") == "True"
            for condition in status.get("conditions") or []
        ),
    )


def _index(metadata: dict[str, Any]) -> int:
    text = (metadata.get("annotations") or {}).get(COMPLETION_INDEX) or ""
    return int(text) if text.isdecimal() else 0


def _waiting(status: dict[str, Any], state: dict[str, Any]) -> Waiting | None:
    if waiting := state.get("waiting"):
        return Waiting(waiting.get("reason") or "", waiting.get("message") or "")
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return Waiting(condition.get("reason") or "", condition.get("message") or "")
    return None


def read_workload(item: dict[str, Any]) -> Workload:
    spec, status = item.get("spec") or {}, item.get("status") or {}
    conditions = {condition["type"]: condition for condition in status.get("conditions") or []}
    waits = conditions.get("QuotaReserved") or {}
    return Workload(
        name=item["metadata"]["name"],
        cluster_queue=(status.get("admission") or {}).get("clusterQueue") or "",
        active=spec.get("active") is not False,
        message=(waits.get("message") or "") if waits.get("status") != "True" else "",
    )


def read_position(pending: dict[str, Any], workload: str) -> int | None:
    """Place of a Workload in its LocalQueue, from Kueue's list of those that wait; 1 is next."""
    for item in pending.get("items") or []:
        if item["metadata"]["name"] == workload:
            position = item.get("positionInLocalQueue")
            return position + 1 if isinstance(position, int) else None
    return None


def read_warnings(events: Iterable[dict[str, Any]]) -> tuple[Waiting, ...]:
    """What keeps a Job from having pods, or a pod from having containers; newest first. Other warnings, such as that of
    a scheduler which has found a node since, say nothing of it."""
    telling = [event for event in events if event.get("type") == "Warning" and event.get("reason") in _OBSTACLES]
    newest = sorted(telling, key=_time_of_event, reverse=True)
    return tuple(Waiting(event["reason"], str(event.get("message") or "")) for event in newest)


_OBSTACLES = {"FailedCreate", "FailedMount", "FailedAttachVolume", "FailedMapVolume", "FailedCreatePodSandBox"}


def _time_of_event(event: dict[str, Any]) -> str:
    series = event.get("series") or {}
    return str(series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime") or "")
