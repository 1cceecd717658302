"""What should be: the next children, the next status, the next look. Pure, so that every path is a line in a table.

The stages follow each other: prepare, train, export. Of each there is at most one attempt at a time; the next one is
created only when the one before has failed and its pods are gone. What one look decides is in the status before the
next look builds on it, and every name is deterministic, so that an operator that dies between any two writes finds its
own work again and counts nothing twice or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from finetune_api.failures import FailureClass
from finetune_api.names import Stage, child_name
from finetune_api.report import Report
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ConditionType, Failure, FineTuneJobStatus, Reason
from finetune_operator import children, pods
from finetune_operator.classify import Cause, cause_of
from finetune_operator.config import Settings
from finetune_operator.observe import ChildJob, ChildPod, Conflict, Observation, Outcome
from finetune_operator.resource import FineTuneJob, format_time, parse_time
from finetune_operator.status import Draft, Note

NO_PODS_SECONDS = 10.0
"""A Job without pods for so long has been refused them; its events say why."""
WAITING_LOOK_SECONDS = 10.0
"""How often a pod that does not start is looked at: not all reasons come with an event."""

NODE_LOST_SECONDS = 60.0
"""A pod that is there so long after the end of its grace period is on a node that does not answer."""

STAGE_CONDITION = {
    Stage.PREPARE: ConditionType.VALIDATED,
    Stage.TRAIN: ConditionType.RUNNING,
    Stage.EXPORT: ConditionType.EXPORTED,
}
_NEEDS_SOMEBODY = {
    Reason.NAME_CONFLICT,
    Reason.PODS_REFUSED,
    Reason.UNSCHEDULABLE,
    Reason.IMAGE_PULL_FAILED,
    Reason.CONTAINER_CONFIG_ERROR,
    Reason.NODE_LOST,
}
"""What a job waits for that does not come by itself, so that an event says it too."""
_IMAGE_REASONS = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
_CONFIG_REASONS = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError"}


@dataclass(frozen=True)
class Plan:
    status: FineTuneJobStatus
    create: tuple[dict[str, Any], ...] = ()
    """Children that should exist, in order."""
    notes: tuple[Note, ...] = ()
    """Events, once the status is written."""
    look_again: float | None = None
    """Seconds until time alone may change something; None waits for events."""
    needs_refusals_of: str = ""
    """Name of a Job whose events should be read before the next plan: it has no pods."""


def plan(job: FineTuneJob, seen: Observation, settings: Settings, now: datetime) -> Plan:
    """Decide what should be, from what was asked and what was seen."""
    draft = Draft(job, now)
    if job.deleting or job.status_problem:
        # The garbage collector removes the children of a deleted job. Of one whose status says what this operator does
        # not understand, nothing is known.
        return Plan(job.status)
    if draft.terminal:
        return Plan(draft.status)
    if job.spec_problem and job.status.attempt is not None:
        # It was readable when it was started, so that this operator is older than its API. A newer one goes on.
        return Plan(job.status)
    problem = job.spec_problem or _impossible(job.spec, settings)
    if job.spec is None or problem:
        draft.fail(_invalid(problem, now))
        draft.derive_phase(running=False)
        return Plan(draft.status, notes=tuple(draft.notes))
    stage = next((stage for stage in Stage if not draft.finished(stage)), Stage.EXPORT)
    return _Stage(stage, draft, job.spec, seen, settings, now).advance()


def _impossible(spec: FineTuneJobSpec | None, settings: Settings) -> str:
    """What the schema cannot know because it depends on where the operator runs."""
    if spec is None or settings.allow_files:
        return ""
    uris = [spec.model.uri, spec.output.uri, *(file.uri for file in spec.dataset.train)]
    uris += [file.uri for file in spec.dataset.validation or []]
    local = next((uri for uri in uris if uri.startswith("file://")), None)
    if local is None:
        return ""
    return f"{local} names a local file, which the pods of a cluster cannot see: upload it to S3 and use an s3:// URI."


def _invalid(problem: str, now: datetime, stage: Stage = Stage.PREPARE) -> Failure:
    return Failure.model_validate(
        {
            "class": FailureClass.USER_ERROR.value,
            "message": problem,
            "disposition": "Terminal",
            "stage": stage.value,
            "attempt": 0,
            "time": format_time(now),
        }
    )


@dataclass
class _Stage:
    """One stage of one job at one moment."""

    stage: Stage
    draft: Draft
    spec: FineTuneJobSpec
    seen: Observation
    settings: Settings
    now: datetime

    def advance(self) -> Plan:
        attempt = max(self.draft.attempt_number(self.stage), self.seen.newest_attempt(self.stage))
        if attempt == 0:
            return self._start(1)
        child = self.seen.job(self.stage, attempt)
        pod = self.seen.pod(self.stage, attempt)
        if self.draft.attempt_number(self.stage) != attempt:
            # The Job was created, and the operator died before it could say so.
            self.draft.start(self.stage, attempt)
        self._note_start(pod)
        self.draft.learn(self._report(attempt, pod))
        if child is None or child.deleting:
            return self._vanished(attempt, child, pod)
        if child.outcome is Outcome.COMPLETE:
            return self._finish(attempt, pod)
        if child.outcome is Outcome.RUNNING:
            return self._wait(child, pod)
        return self._failed(attempt, cause_of(child), pod, gone=child.outcome is Outcome.FAILED)

    # Starting

    def _start(self, attempt: int) -> Plan:
        if self.seen.conflict is not None:
            return self._blocked(self.seen.conflict)
        if self.seen.create_invalid:
            message = f"The cluster cannot make what spec asks for: {self.seen.create_error}. Create the job anew."
            self.draft.fail(_invalid(message, self.now, self.stage))
            return self._plan(running=False)
        if self.seen.create_error:
            name = child_name(self.draft.job.name, self.stage, attempt)
            self._say("False", Reason.PODS_REFUSED, _refused(name, self.seen.create_error))
            return self._plan(running=False, look_again=30.0)
        self.draft.start(self.stage, attempt)
        # Children are built from the status as it will be: export names the attempt that training ended with.
        job = replace(self.draft.job, status=self.draft.status)
        objects = children.build(job, self.spec, self.stage, attempt, self.settings)
        self.draft.set(resolved=pods.resolved(self.spec, job.status, self.stage))
        self._say("Unknown" if self.stage is not Stage.TRAIN else "False", *self._waiting_for_pod())
        return self._plan(running=False, create=objects, look_again=WAITING_LOOK_SECONDS)

    def _blocked(self, conflict: Conflict) -> Plan:
        if conflict.stale:
            reason, text = Reason.WAITING_FOR_CLEANUP, "is still being removed after an earlier job of this name."
        else:
            reason = Reason.NAME_CONFLICT
            text = f"belongs to {conflict.owner}, so it is not touched: delete it, or rename the job."
        self._say("False", reason, f"{conflict.kind} {conflict.name} {text}")
        return self._plan(running=False, look_again=2.0 if conflict.stale else 30.0)

    # Running

    def _note_start(self, pod: ChildPod | None) -> None:
        attempt = self.draft.status.attempt
        if pod is None or pod.started is None or attempt is None or attempt.start_time is not None:
            return
        started = format_time(pod.started)
        self.draft.set(attempt=attempt.model_copy(update={"start_time": started}))
        if self.draft.status.start_time is None:
            self.draft.set(start_time=started)

    def _report(self, attempt: int, pod: ChildPod | None) -> Report | None:
        """What this attempt says: its last words, or its live ones. Another pod's words do not count."""
        report = pod.report if pod is not None and pod.report is not None else self.seen.live
        if report is None:
            return None
        mine = (report.job_uid, report.stage, report.attempt) == (self.draft.job.uid, self.stage, attempt)
        return report if mine else None

    def _wait(self, child: ChildJob, pod: ChildPod | None) -> Plan:
        if pod is None or pod.started is None:
            return self._wait_for_pod(child, pod)
        if not pod.running:
            # The pod has ended, and the Job controller is about to say how.
            return self._plan(running=True, look_again=WAITING_LOOK_SECONDS)
        if pod.delete_by is not None and (self.now - pod.delete_by).total_seconds() > NODE_LOST_SECONDS:
            self._say(
                "Unknown",
                Reason.NODE_LOST,
                f"Pod {pod.name} should have ended by {format_time(pod.delete_by)}, and node {pod.node} does not say "
                "that it has: the node is probably lost. Delete the Node object when the machine is off, and the job "
                "goes on elsewhere.",
            )
            return self._plan(running=False, look_again=WAITING_LOOK_SECONDS)
        report = self._report(child.attempt, pod)
        if self.stage is Stage.TRAIN:
            doing = report.phase if report else "Starting"
            self._say("True", Reason.TRAINING, f"Train attempt {child.attempt} runs in pod {pod.name} ({doing}).")
            self._watch(report)
        else:
            text = f"{self.stage.capitalize()} attempt {child.attempt} runs in pod {pod.name}"
            doing = f" ({report.phase})." if report else "."
            reason = Reason.PREPARING if self.stage is Stage.PREPARE else Reason.EXPORTING
            self._say("Unknown", reason, text + doing)
        return self._plan(running=True, look_again=self.settings.poll_seconds)

    def _watch(self, report: Report | None) -> None:
        """Silence is never failure: whether training stalls is judged in the pod."""
        if report is not None:
            self.draft.set_condition(
                ConditionType.PROGRESS_AVAILABLE, "True", Reason.PROGRESS_RECEIVED, "The train pod answers."
            )
            self.draft.progress(report, self.settings.progress_seconds, final=False)
        elif self.seen.unreachable:
            self.draft.set_condition(
                ConditionType.PROGRESS_AVAILABLE,
                "False",
                Reason.UNREACHABLE,
                f"The operator cannot read the progress ({self.seen.unreachable}); training goes on. Let the network "
                "policy allow it to reach the metrics port of the pods.",
            )

    def _wait_for_pod(self, child: ChildJob, pod: ChildPod | None) -> Plan:
        status = "False" if self.stage is Stage.TRAIN else "Unknown"
        reason, message = self._waiting_for_pod()
        needs = ""
        if pod is None:
            if (self.now - child.created).total_seconds() >= NO_PODS_SECONDS:
                needs = child.name
                if self.seen.refusals:
                    reason, message = Reason.PODS_REFUSED, _refused(child.name, self.seen.refusals[0])
        elif pod.waiting is not None:
            reason, message = _waiting_reason(pod, self.stage)
        self._say(status, reason, message)
        return self._plan(running=False, look_again=WAITING_LOOK_SECONDS, needs_refusals_of=needs)

    def _waiting_for_pod(self) -> tuple[Reason, str]:
        return Reason.WAITING_FOR_POD, f"Waiting for the {self.stage} pod to start."

    # Ending

    def _finish(self, attempt: int, pod: ChildPod | None) -> Plan:
        """Record what the stage came to. The next one begins with the next look, when the status has it."""
        report = self._report(attempt, pod)
        self.draft.set(failure=None)
        if self.stage is Stage.PREPARE:
            self._say("True", Reason.VALIDATED, "Access, data, model and output were checked.")
            if report is not None and report.already_published:
                self.draft.set_condition(
                    ConditionType.EXPORTED, "True", Reason.ALREADY_PUBLISHED, "The model was published before."
                )
                self.draft.complete(
                    Reason.ALREADY_PUBLISHED,
                    f"{self.spec.output.uri} already holds the verified result of this specification.",
                )
        elif self.stage is Stage.TRAIN:
            if report is not None:
                self.draft.progress(report, 0.0, final=True)
            self.draft.set(trained_attempt=attempt)
            self._say("False", Reason.FINISHED, "Training has reached its last step.")
        else:
            self._say("True", Reason.PUBLISHED, f"The model is published at {self.spec.output.uri}.")
            self.draft.complete(
                Reason.TRAINING_COMPLETE, f"The tuned model is verified and published at {self.spec.output.uri}."
            )
        return self._plan(running=True, look_again=None if self.draft.terminal else 0.0)

    def _vanished(self, attempt: int, child: ChildJob | None, pod: ChildPod | None) -> Plan:
        """Somebody deleted the Job."""
        gone = child is None and (pod is None or pod.finished)
        return self._failed(attempt, Cause(FailureClass.TERMINATED), pod, gone=gone)

    def _failed(self, attempt: int, cause: Cause, pod: ChildPod | None, *, gone: bool) -> Plan:
        """Record the failure as soon as it is known. Start again when it is in the status, so that it is counted; when
        the old pods are gone, so that no two attempts run at once; and when the pause is over."""
        if self.draft.failure_of(self.stage, attempt) is None:
            report = self._report(attempt, pod)
            if self.stage is Stage.TRAIN and report is not None:
                self.draft.progress(report, 0.0, final=True)
            self.draft.fail_attempt(self.stage, attempt, cause, pod, report)
            if not self.draft.terminal:
                failure = self.draft.status.failure
                assert failure is not None
                self._say("False", Reason.RESTARTING, f"Attempt {attempt} failed: {failure.message}")
            return self._plan(running=False, look_again=None if self.draft.terminal else 0.0)
        pause = self._pause()
        if pause > 0 or not gone:
            return self._plan(running=False, look_again=max(pause, 0.5) if gone else WAITING_LOOK_SECONDS)
        return self._start(attempt + 1)

    def _pause(self) -> float:
        until = self.draft.status.restart_time
        return (parse_time(until) - self.now).total_seconds() if until else 0.0

    # Helpers

    def _say(self, status: str, reason: Reason, message: str) -> None:
        before = self.draft.condition(STAGE_CONDITION[self.stage])
        if reason in _NEEDS_SOMEBODY and (before is None or before.reason != reason):
            self.draft.note(reason, message, warning=True)
        self.draft.set_condition(STAGE_CONDITION[self.stage], status, reason, message)

    def _plan(
        self,
        *,
        running: bool,
        create: Iterable[dict[str, Any]] = (),
        look_again: float | None = None,
        needs_refusals_of: str = "",
    ) -> Plan:
        self.draft.derive_phase(running)
        return Plan(self.draft.status, tuple(create), tuple(self.draft.notes), look_again, needs_refusals_of)


def _refused(name: str, why: str) -> str:
    return (
        f"The cluster refuses the pod of Job {name}: {why}. Mend the quota, policy or webhook that it names; it is "
        "tried again by itself."
    )


def _waiting_reason(pod: ChildPod, stage: Stage) -> tuple[Reason, str]:
    assert pod.waiting is not None
    told = f"{pod.waiting.reason}: {pod.waiting.message}" if pod.waiting.message else pod.waiting.reason
    if pod.waiting.reason in _IMAGE_REASONS:
        return Reason.IMAGE_PULL_FAILED, (
            f"Pod {pod.name} cannot get its image ({told}). Check podTemplate.image or the operator's trainer image, "
            "and the pull secrets."
        )
    if pod.waiting.reason in _CONFIG_REASONS:
        return Reason.CONTAINER_CONFIG_ERROR, (
            f"Pod {pod.name} cannot start ({told}). Create what it names, for example the Secret of storage.secretRef."
        )
    if pod.waiting.reason == "Unschedulable":
        field = "resources, or widen spec.scheduling" if stage is Stage.TRAIN else f"stages.{stage}"
        return Reason.UNSCHEDULABLE, (
            f"No node can take pod {pod.name} ({pod.waiting.message}). Lower spec.{field}, or add nodes."
        )
    return Reason.WAITING_FOR_POD, f"Waiting for pod {pod.name} to start ({told})."
