"""Why an attempt failed, from the Job's own condition alone.

The pod's object is gone within a second of its end, and the operator may have been down. The Job's podFailurePolicy
makes the Job controller write the cause into the Job's condition, where it stays: a disruption, or the exit code.
What a report or a pod status adds is detail, and never changes what happens next.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from finetune_api.failures import FailureClass, class_of_exit_code
from finetune_operator.observe import ChildJob

_EXIT_CODE = re.compile(r"Container \S+ for pod (?P<pod>\S+) failed with exit code (?P<code>\d+)")
_DISRUPTED = re.compile(r"Pod (?P<pod>\S+) has condition DisruptionTarget")


@dataclass(frozen=True)
class Cause:
    failure_class: FailureClass
    exit_code: int | None = None
    pod: str = ""
    """Name of the pod, without its namespace."""
    message: str = ""
    """What is known beyond the class's own sentence."""


def cause_of(job: ChildJob) -> Cause:
    """The cause of a failed Job, from what outlives its pods."""
    cause = _stated(job)
    stopped = (FailureClass.TERMINATED, FailureClass.KILLED, FailureClass.COMMUNICATION)
    if job.suspended and cause.failure_class in stopped:
        # A queue took the pods away by suspending the Job; what they then exit with is not their own doing.
        return replace(cause, failure_class=FailureClass.PREEMPTED)
    return cause


def _stated(job: ChildJob) -> Cause:
    if job.reason == "PodFailurePolicy":
        if match := _DISRUPTED.search(job.message):
            return Cause(FailureClass.PREEMPTED, pod=_name(match["pod"]))
        if match := _EXIT_CODE.search(job.message):
            code = int(match["code"])
            return Cause(class_of_exit_code(code), code, _name(match["pod"]))
    if job.reason == "BackoffLimitExceeded":
        # Every exit code has a rule, so a pod that is counted without one never had an exit code: it was deleted
        # before its container ran.
        return Cause(FailureClass.TERMINATED)
    return Cause(FailureClass.UNKNOWN)


def _name(namespaced: str) -> str:
    return namespaced.rpartition("/")[2]
