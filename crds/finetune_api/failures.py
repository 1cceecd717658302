"""Failure classes, their exit codes, and what follows from each.

The exit code is the one signal that survives everything: the Job controller copies it into the Job's own condition,
where it can be read after the pod, its termination message and its log are gone. Codes follow sysexits(3) where it
has a word for the case. They are API between operator and trainer: never reused, never renumbered.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Disposition(StrEnum):
    FAIL = "Fail"
    """Another attempt would end the same way."""
    RESTART = "Restart"
    """Another attempt may succeed; it is charged to failurePolicy.maxRestarts."""
    RESTART_FREE = "RestartFree"
    """The cluster took the pod away; another attempt costs the job nothing."""


class FailureClass(StrEnum):
    USER_ERROR = "UserError"
    DATA_ERROR = "DataError"
    MODEL_ERROR = "ModelError"
    MODEL_CHANGED = "ModelChanged"
    ACCESS_DENIED = "AccessDenied"
    NOT_FOUND = "NotFound"
    OUTPUT_EXISTS = "OutputExists"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    DISK_FULL = "DiskFull"
    OUT_OF_MEMORY_GPU = "OutOfMemoryGPU"
    OUT_OF_MEMORY_HOST = "OutOfMemoryHost"
    LOSS_DIVERGED = "LossDiverged"
    NO_PROGRESS = "NoProgress"
    COMMUNICATION = "Communication"
    VERIFICATION_FAILED = "VerificationFailed"
    TERMINATED = "Terminated"
    PREEMPTED = "Preempted"
    NODE_LOST = "NodeLost"
    KILLED = "Killed"
    UNKNOWN = "Unknown"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    PRE_RUNNING_DEADLINE_EXCEEDED = "PreRunningDeadlineExceeded"


class _Rule(NamedTuple):
    exit_code: int | None
    """None: never an exit code of ours; concluded from the Job's condition or from a signal."""
    disposition: Disposition
    sentence: str
    """What is said when nothing more is known than the class, with a remedy."""


EXIT_UNKNOWN = 70

RULES: dict[FailureClass, _Rule] = {
    FailureClass.USER_ERROR: _Rule(
        64, Disposition.FAIL, "The job asks for something that cannot work; the log says what to change."
    ),
    FailureClass.DATA_ERROR: _Rule(
        65, Disposition.FAIL, "The data cannot be used; the log names file, row and reason. Mend the rows."
    ),
    FailureClass.MODEL_ERROR: _Rule(
        66, Disposition.FAIL, "The base model cannot be used; the log names what is missing. Mend the model folder."
    ),
    FailureClass.NOT_FOUND: _Rule(
        67, Disposition.FAIL, "A bucket, object or repository does not exist; the log names it. Correct the URI."
    ),
    FailureClass.STORAGE_UNAVAILABLE: _Rule(
        69, Disposition.RESTART, "The storage did not answer. Check endpoint and network; it is tried again."
    ),
    FailureClass.UNKNOWN: _Rule(
        EXIT_UNKNOWN, Disposition.RESTART, "The process failed in a way that has no class; see the log."
    ),
    FailureClass.OUTPUT_EXISTS: _Rule(
        73,
        Disposition.FAIL,
        "output.uri already holds another job's model. Choose another folder, or set output.onExisting to Overwrite.",
    ),
    FailureClass.DISK_FULL: _Rule(
        74,
        Disposition.FAIL,
        "The pod's disk is full. Raise ephemeralStorage of this stage, or name a storageClassName.",
    ),
    FailureClass.TERMINATED: _Rule(
        75, Disposition.RESTART, "The pod was stopped from outside, for example by kubectl delete pod."
    ),
    FailureClass.ACCESS_DENIED: _Rule(
        77,
        Disposition.FAIL,
        "The storage refused access. Check storage.secretRef or the service account, and its rights.",
    ),
    FailureClass.OUT_OF_MEMORY_GPU: _Rule(
        80,
        Disposition.RESTART,
        "The GPU ran out of memory. Lower hyperparameters.microBatchSize or dataset.maxLength.",
    ),
    FailureClass.OUT_OF_MEMORY_HOST: _Rule(
        81, Disposition.RESTART, "The pod ran out of memory. Raise the memory of this stage."
    ),
    FailureClass.LOSS_DIVERGED: _Rule(
        82, Disposition.FAIL, "The loss is not a finite number any more. Lower the learning rate or check the data."
    ),
    FailureClass.NO_PROGRESS: _Rule(83, Disposition.RESTART, "Training made no step for too long."),
    FailureClass.COMMUNICATION: _Rule(84, Disposition.RESTART, "The training processes lost each other."),
    FailureClass.VERIFICATION_FAILED: _Rule(
        85, Disposition.FAIL, "The exported model is not the trained one, so it was not published."
    ),
    FailureClass.MODEL_CHANGED: _Rule(
        86,
        Disposition.FAIL,
        "The base model changed while the job ran. Create the job anew, and do not write to the folder meanwhile.",
    ),
    FailureClass.PREEMPTED: _Rule(
        None, Disposition.RESTART_FREE, "The cluster took the pod away (preemption, drain, eviction or node loss)."
    ),
    FailureClass.NODE_LOST: _Rule(
        None, Disposition.RESTART_FREE, "The node of the pod does not answer any more; the attempt is taken for lost."
    ),
    FailureClass.DEADLINE_EXCEEDED: _Rule(
        None, Disposition.FAIL, "The job ran as long as it may. Raise activeDeadlineSeconds, or train fewer steps."
    ),
    FailureClass.PRE_RUNNING_DEADLINE_EXCEEDED: _Rule(
        None, Disposition.FAIL, "No pod came to run in time. Raise preRunningDeadlineSeconds, or make room."
    ),
    FailureClass.KILLED: _Rule(
        None,
        Disposition.RESTART,
        "The container was killed; most often it was out of memory, or over its limit of ephemeralStorage. Raise it "
        "for this stage if that repeats.",
    ),
}

RULED_CLASSES = [
    name.value
    for name in FailureClass
    if name not in (FailureClass.DEADLINE_EXCEEDED, FailureClass.PRE_RUNNING_DEADLINE_EXCEEDED)
]
"""Classes that failurePolicy.rules may name: those that an attempt can end with."""

STOPPED_CODES = (75, 143)
"""How a pod ends that was told to stop: the agent after it has saved, and a process without an agent's care."""

_BY_EXIT_CODE = {rule.exit_code: name for name, rule in RULES.items() if rule.exit_code is not None}


def exit_code_of(failure_class: FailureClass) -> int:
    """The exit code that stands for a class; Unknown's for a class that has none."""
    return RULES[failure_class].exit_code or EXIT_UNKNOWN


def class_of_exit_code(exit_code: int) -> FailureClass:
    """The class that a container's exit code stands for. 137 and 143 are deaths by SIGKILL and SIGTERM."""
    if exit_code in _BY_EXIT_CODE:
        return _BY_EXIT_CODE[exit_code]
    if exit_code == 137:
        return FailureClass.KILLED
    if exit_code == 143:
        return FailureClass.TERMINATED
    return FailureClass.UNKNOWN


def disposition_of(failure_class: FailureClass) -> Disposition:
    return RULES[failure_class].disposition


class JobError(Exception):
    """A failure whose class is known where it happens.

    The message is one or two sentences for the user: what is wrong, and what to do about it. It may name URIs, files
    and row numbers, never secrets or the content of rows.
    """

    def __init__(self, failure_class: FailureClass, message: str) -> None:
        super().__init__(message)
        self.failure_class = failure_class
        self.message = message
