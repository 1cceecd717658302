"""What can be read off a Job and its pods: pure functions under the Job controller."""

from __future__ import annotations

import copy
from datetime import datetime
from typing import Any

from finetune_operator.local.apiserver.api import timestamp
from finetune_operator.local.apiserver.kinds import JOB_TRACKING_FINALIZER
from finetune_operator.local.apiserver.store import Key, Object

COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"

TERMINAL = ("Succeeded", "Failed")
FINISHED = ("Complete", "Failed")


def key_of(obj: Object) -> Key:
    return obj["metadata"]["namespace"], obj["metadata"]["name"]


def job_of(pod: Object) -> dict[str, Any] | None:
    """The owner reference of the Job that controls a pod."""
    for owner in pod["metadata"].get("ownerReferences", ()):
        if owner.get("controller") and (owner["apiVersion"], owner["kind"]) == ("batch/v1", "Job"):
            reference: dict[str, Any] = owner
            return reference
    return None


def phase_of(pod: Object) -> str:
    return str(pod["status"].get("phase"))


def deleting(pod: Object) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def has_finalizer(pod: Object) -> bool:
    return JOB_TRACKING_FINALIZER in pod["metadata"].get("finalizers", ())


def is_ready(pod: Object) -> bool:
    return any(item["type"] == "Ready" and item["status"] == "True" for item in pod["status"].get("conditions", ()))


def readiness(pod: Object) -> tuple[bool, bool, bool]:
    """Pods that have got least far are deleted first."""
    return bool(pod["spec"].get("nodeName")), phase_of(pod) == "Running", is_ready(pod)


def is_failed(pod: Object, job: Object) -> bool:
    """A pod that is being deleted counts as failed at once, unless pods are replaced only when they have ended."""
    if phase_of(pod) == "Failed":
        return True
    if job["spec"]["podReplacementPolicy"] == "Failed":
        return False
    return deleting(pod) and phase_of(pod) != "Succeeded"


def is_finished(job: Object) -> bool:
    return any(true_condition(job["status"], kind) for kind in FINISHED)


def true_condition(status: Object, kind: str) -> Object | None:
    matches = (item for item in status.get("conditions", ()) if item["type"] == kind and item["status"] == "True")
    return next(matches, None)


def new_condition(kind: str, reason: str, message: str, now: datetime, status: str = "True") -> Object:
    moment = timestamp(now)
    return {
        "type": kind,
        "status": status,
        "lastProbeTime": moment,
        "lastTransitionTime": moment,
        "reason": reason,
        "message": message,
    }


def set_condition(status: Object, condition: Object) -> bool:
    """Put a condition into the list; says whether that changed anything. One that never was True is not made False."""
    conditions = status.get("conditions", [])
    for position, old in enumerate(conditions):
        if old["type"] == condition["type"]:
            if all(old[key] == condition[key] for key in ("status", "reason", "message")):
                return False
            conditions[position] = condition
            return True
    if condition["status"] == "False":
        return False
    status["conditions"] = [*conditions, condition]
    return True


def set_or_drop(status: Object, key: str, value: Any) -> None:
    """Zero and empty are absent, as in the API of Jobs."""
    if value:
        status[key] = value
    else:
        status.pop(key, None)


def set_counts(status: Object, *, active: int, ready: int, terminating: int) -> None:
    set_or_drop(status, "active", active)
    status["ready"] = ready
    status["terminating"] = terminating


def settle(status: Object, pods: list[Object]) -> None:
    """Move pods that have lost their finalizer from the uncounted to the counters."""
    held = {pod["metadata"]["uid"] for pod in pods if has_finalizer(pod)}
    uncounted = status["uncountedTerminatedPods"]
    for outcome in ("succeeded", "failed"):
        left = [uid for uid in uncounted.get(outcome, ()) if uid in held]
        set_or_drop(status, outcome, status.get(outcome, 0) + len(uncounted.get(outcome, ())) - len(left))
        set_or_drop(uncounted, outcome, left)


def completion_index(pod: Object) -> int | None:
    index = pod["metadata"].get("annotations", {}).get(COMPLETION_INDEX)
    return None if index is None else int(index)


def completed_indexes(status: Object) -> list[int]:
    """`0,2-4` as numbers."""
    indexes: list[int] = []
    for part in filter(None, status.get("completedIndexes", "").split(",")):
        first, _, last = part.partition("-")
        indexes.extend(range(int(first), int(last or first) + 1))
    return indexes


def format_indexes(indexes: set[int]) -> str:
    parts: list[list[int]] = []
    for index in sorted(indexes):
        if parts and parts[-1][-1] == index - 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    # Two neighbours are written as a list, three and more as a range, as the real controller does.
    return ",".join(
        f"{part[0]}-{part[-1]}" if len(part) > 2 else ",".join(str(index) for index in part) for part in parts
    )


def fail_job_message(job: Object, pods: list[Object]) -> str | None:
    for pod in pods:
        if is_failed(pod, job):
            action, message = match_failure_policy(job, pod)
            if action == "FailJob":
                return message
    return None


def counts_against_limit(job: Object, pod: Object) -> bool:
    """Whether a failed pod counts against backoffLimit."""
    return match_failure_policy(job, pod)[0] != "Ignore"


def match_failure_policy(job: Object, pod: Object) -> tuple[str, str]:
    """Action and message of the first rule that a failed pod matches; without a match it is counted."""
    name = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
    for number, rule in enumerate(job["spec"].get("podFailurePolicy", {}).get("rules", ())):
        action: str = rule["action"]
        matching = f"matching {action} rule at index {number}"
        if "onExitCodes" in rule:
            for status in [
                *pod["status"].get("containerStatuses", ()),
                *pod["status"].get("initContainerStatuses", ()),
            ]:
                code = status.get("state", {}).get("terminated", {}).get("exitCode", 0)
                if code and matches_exit_code(rule["onExitCodes"], status["name"], code):
                    what = f"Container {status['name']} for pod {name} failed with exit code {code} {matching}"
                    return action, what
        else:
            for condition in pod["status"].get("conditions", ()):
                for pattern in rule["onPodConditions"]:
                    if (condition["type"], condition["status"]) == (pattern["type"], pattern["status"]):
                        return action, f"Pod {name} has condition {condition['type']} {matching}"
    return "Count", ""


def matches_exit_code(rule: Object, container: str, code: int) -> bool:
    if rule.get("containerName", container) != container:
        return False
    return bool((code in rule["values"]) == (rule["operator"] == "In"))


def new_pod(job: Object, index: int | None) -> Object:
    """A pod from the Job's template."""
    template = copy.deepcopy(job["spec"]["template"])
    name = job["metadata"]["name"]
    metadata: Object = template.get("metadata", {})
    spec: Object = template["spec"]
    metadata["generateName"] = f"{name}-"
    metadata["finalizers"] = [*metadata.get("finalizers", ()), JOB_TRACKING_FINALIZER]
    metadata["ownerReferences"] = [
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "name": name,
            "uid": job["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]
    if index is not None:
        metadata["generateName"] = f"{name}-{index}-"
        metadata.setdefault("annotations", {})[COMPLETION_INDEX] = str(index)
        metadata.setdefault("labels", {})[COMPLETION_INDEX] = str(index)
        spec["hostname"] = f"{name}-{index}"
        variable = {
            "name": "JOB_COMPLETION_INDEX",
            "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": f"metadata.labels['{COMPLETION_INDEX}']"}},
        }
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            container["env"] = [*container.get("env", ()), variable]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
