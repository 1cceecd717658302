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
from finetune_api.status import (
    MAX_NODES,
    AttemptOutcome,
    ConditionType,
    Failure,
    FineTuneJobStatus,
    QueueStatus,
    Reason,
)
from finetune_operator import children, pods, waiting
from finetune_operator.classify import Cause, cause_of
from finetune_operator.config import Settings
from finetune_operator.observe import ChildJob, ChildPod, Observation, Outcome
from finetune_operator.pace import WAITING_SECONDS, Pace, pace_of
from finetune_operator.resource import FineTuneJob, format_time, parse_time
from finetune_operator.status import MAX_FAILURE_MESSAGE, STAGE_CONDITION, Draft, Note, cut

NO_PODS_SECONDS = 10.0
"""A Job without pods for so long has been refused them, and a pod that is created for so long waits for volumes; their
events say why."""
NEW_SECONDS = 60.0
"""What keeps a child from having pods that run is usually there from the beginning, and somebody looks on."""

SEEN_SECONDS = 60.0
STOPPING_SEEN_SECONDS = 10.0
"""How often it is written that a pod runs; what nobody saw is not counted."""

UNREACHABLE_SECONDS = 30.0
"""Words that are missed once are no trouble."""

NODE_LOST_SECONDS = 60.0
"""A pod that is there so long after the end of its grace period is on a node that does not answer."""

_STOPPED = (FailureClass.TERMINATED, FailureClass.KILLED, FailureClass.PREEMPTED, FailureClass.NODE_LOST)
"""How a pod ends that was told to stop."""
_SAID_OTHERWISE = {
    Reason.WAITING_FOR_POD,
    Reason.RESTARTING,
    Reason.SUSPENDED,
    Reason.PUBLISHED,
    Reason.WAITING_FOR_CLEANUP,
}
"""Reasons of a stage that are no events of their own: others say it, or it is over in a moment."""


@dataclass(frozen=True)
class Plan:
    status: FineTuneJobStatus
    create: tuple[dict[str, Any], ...] = ()
    """Children that should exist, in order."""
    delete: tuple[ChildJob, ...] = ()
    """Children that should go, if they are still as they were seen. The status has said why since an earlier look."""
    expired: bool = False
    """The job itself should go: it has been over for as long as it was to be kept."""
    notes: tuple[Note, ...] = ()
    """Events, once the status is written."""
    look_again: float | None = None
    """Seconds until time alone may change something; None waits for events."""
    needs_events_of: tuple[str, str] | None = None
    """Kind and name of an object whose events should be read before the next plan: a Job without pods, or a pod that
    does not start."""
    needs_workload_of: ChildJob | None = None
    """A Job that a queue keeps back, whose Workload should be read before the next plan."""


def plan(job: FineTuneJob, seen: Observation, settings: Settings, now: datetime, pace: Pace | None = None) -> Plan:
    """Decide what should be, from what was asked and what was seen."""
    draft = Draft(job, now)
    if job.deleting or job.status_problem:
        # The garbage collector removes the children of a deleted job. Of one whose status says what this operator does
        # not understand, nothing is known.
        return Plan(job.status)
    if draft.terminal:
        return _after_the_end(draft, seen, now)
    if job.spec_problem and job.status.attempt is not None:
        # It was readable when it was started, so that this operator is older than its API. A newer one goes on.
        return Plan(job.status)
    problem = job.spec_problem or (_impossible(job.spec, settings) if job.status.attempt is None else "")
    if job.spec is None or problem:
        draft.fail(_invalid(problem, now))
        draft.derive_phase(Stage.PREPARE, running=False)
        return Plan(draft.status, notes=tuple(draft.notes))
    stage = next((stage for stage in Stage if not draft.finished(stage)), Stage.EXPORT)
    return _Stage(stage, draft, job.spec, seen, settings, now, pace or pace_of(settings)).advance()


def _after_the_end(draft: Draft, seen: Observation, now: datetime) -> Plan:
    """Nothing may run any more, and the job may have a time to live."""
    delete = tuple(child for child in seen.jobs if not child.finished and not child.deleting)
    spec, ended = draft.job.spec, draft.status.completion_time
    ttl = None
    if spec is not None:
        ttl = spec.ttl_seconds_after_finished
        if draft.is_true(ConditionType.FAILED) and spec.ttl_seconds_after_failed is not None:
            ttl = spec.ttl_seconds_after_failed
    if ttl is None or ended is None:
        return Plan(draft.status, delete=delete)
    left = ttl - (now - parse_time(ended)).total_seconds()
    return Plan(draft.status, delete=delete, expired=left <= 0, look_again=left if left > 0 else None)


def _impossible(spec: FineTuneJobSpec | None, settings: Settings) -> str:
    """What the schema cannot know because it depends on where the operator runs."""
    if spec is None or settings.allow_files:
        return ""
    uris = [spec.model.uri, spec.output.uri, *(file.uri for file in spec.dataset.train)]
    uris += [file.uri for file in spec.dataset.validation or []]
    uris += [uri for uri in (spec.storage.work_uri,) if uri is not None]
    local = next((uri for uri in uris if uri.startswith("file://")), None)
    if local is None:
        return ""
    return f"{local} names a local file, which the pods of a cluster cannot see: upload it to S3 and use an s3:// URI."


def _invalid(problem: str, now: datetime, stage: Stage = Stage.PREPARE) -> Failure:
    return _final(FailureClass.USER_ERROR, problem, now, stage, 0)


def _final(failure_class: FailureClass, message: str, now: datetime, stage: Stage, attempt: int) -> Failure:
    return Failure.model_validate(
        {
            "class": failure_class.value,
            "message": cut(message, MAX_FAILURE_MESSAGE),
            "disposition": "Terminal",
            "stage": stage.value,
            "attempt": attempt,
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
    pace: Pace

    def advance(self) -> Plan:
        attempt = max(self.draft.attempt_number(self.stage), self.seen.newest_attempt(self.stage))
        if attempt == 0:
            return self._start(1)
        child = self.seen.job(self.stage, attempt)
        present = self.seen
        if child is not None and child.queue and child.outcome is Outcome.RUNNING:
            present = present.without_stopped()
        pod = present.pod(self.stage, attempt)
        # Of several pods the last one says whether all run, and since when.
        last = present.last_pod(self.stage, attempt, child.nodes if child else 1)
        if self.draft.attempt_number(self.stage) != attempt:
            # The Job was created, and the operator died before it could say so.
            self.draft.start(self.stage, attempt)
            self.draft.set(resolved=pods.resolved(self.spec, self.draft.status, self.stage))
            if self._stopping:
                self._resumed()  # that was said of another one
        if not self.spec.suspend and self.draft.is_true(ConditionType.SUSPENDED):
            self._resumed()
        if self.draft.attempt_ended:
            return self._next(attempt, child)
        if present is not self.seen:
            self._note_missed(self.seen.last_pod(self.stage, attempt, child.nodes if child else 1))
        self._note_eviction(child, present, last)
        self._note_start(last, present)
        self._note_overdue()
        if (ended := self._ended(attempt)) is not None:
            self.draft.note_seen(ended)
        report = self._report(attempt, pod)
        if report is not None and (report is not self.seen.live or self.draft.is_due(report, self.pace.progress)):
            self.draft.learn(report)
        if child is not None and child.outcome is Outcome.COMPLETE:
            return self._finish(child, pod)
        if child is None or child.deleting:
            # Deleted, by this operator to suspend the job, or by somebody.
            if any(not pod.finished and not self._lost(pod) for pod in self.seen.pods_of(self.stage, attempt)):
                return self._wait_for_end(attempt, pod)
            return self._failed(attempt, Cause(FailureClass.TERMINATED), self._ended(attempt), pod)
        if child.outcome is not Outcome.RUNNING:
            cause = cause_of(child)
            if child.nodes == 1:
                return self._failed(attempt, cause, (pod.ended if pod else None) or child.ended, pod)
            return self._one_failed(attempt, child, cause, pod)
        if lost := next(filter(self._lost, self.seen.pods_of(self.stage, attempt)), None):
            return self._failed(attempt, self._node_lost(lost), lost.delete_by, lost)
        if child.ended is not None:
            # It has succeeded, and its controller is about to say so.
            return self._plan(running=True, look_again=self.pace.waiting)
        if failure := self._overdue(child, last):
            self.draft.set(failure=failure)
            self.draft.end_attempt(AttemptOutcome.FAILED, self.now, failure)
            self.draft.fail(failure)
            return self._plan(running=False)
        if self.spec.suspend:
            return self._stop(child)
        if self._stopping:
            self._resumed()
        return self._wait(child, pod, last)

    # Starting

    def _start(self, attempt: int) -> Plan:
        if self.spec.suspend:
            return self._suspended()
        if self.draft.condition(ConditionType.SUSPENDED) is not None:
            self._resumed()
        if failure := self._overdue(None, None):
            self.draft.fail(failure)
            return self._plan(running=False)
        if self.seen.conflict is not None:
            self._say("False", *waiting.for_name(self.seen.conflict))
            return self._plan(running=False, look_again=2.0 if self.seen.conflict.stale else 30.0)
        if self.seen.create_invalid:
            message = f"The cluster cannot make what spec asks for: {self.seen.create_error}. Create the job anew."
            self.draft.fail(_invalid(message, self.now, self.stage))
            return self._plan(running=False)
        if self.seen.create_error:
            name = child_name(self.draft.job.name, self.stage, attempt)
            self._say("False", *waiting.for_admission(name, self.seen.create_error))
            return self._plan(running=False, look_again=30.0)
        self.draft.start(self.stage, attempt)
        # Children are built from the status as it will be: export names the attempt that training ended with.
        job = replace(self.draft.job, status=self.draft.status)
        objects = children.build(job, self.spec, self.stage, attempt, self.settings)
        self.draft.set(resolved=pods.resolved(self.spec, job.status, self.stage))
        self._say("Unknown" if self.stage is not Stage.TRAIN else "False", *waiting.for_pod(self.stage))
        return self._plan(running=False, create=objects, look_again=WAITING_SECONDS)

    # Suspending

    @property
    def _stopping(self) -> bool:
        """The status says that the present attempt is told to stop, so that its end is no failure."""
        condition = self.draft.condition(ConditionType.SUSPENDED)
        return condition is not None and condition.reason == Reason.SUSPENDING

    def _stop(self, child: ChildJob) -> Plan:
        """The child is deleted instead of suspended: its failure policy would call the end of a suspended pod a
        failure, and a queue owns the field where there is one."""
        if self._stopping:
            return self._plan(running=True, delete=(child,), look_again=self.pace.waiting)
        text = f"{self.stage.capitalize()} attempt {child.attempt} is told to stop"
        if self.stage is Stage.TRAIN:
            text += f", and has {self.spec.checkpoint.grace_period_seconds} s to save"
        self.draft.set_condition(ConditionType.SUSPENDED, "False", Reason.SUSPENDING, text + ".")
        self.draft.note(Reason.SUSPENDING, text + ".")
        return self._plan(running=True, look_again=0.0)

    def _suspended(self) -> Plan:
        if not self.draft.is_true(ConditionType.SUSPENDED):
            text = "No pod of the job is left"
            if self.stage is Stage.TRAIN and self.draft.status.checkpoint is not None:
                text += f"; the checkpoint of step {self.draft.status.checkpoint.step} is stored"
            text += ". Set spec.suspend to false to go on."
            self.draft.set_condition(ConditionType.SUSPENDED, "True", Reason.SUSPENDED_BY_USER, text)
            self.draft.note(Reason.SUSPENDED_BY_USER, text)
        status = "False" if self.stage is Stage.TRAIN else "Unknown"
        self._say(status, Reason.SUSPENDED, "The job is suspended.")
        return self._plan(running=False)

    def _resumed(self) -> None:
        condition = self.draft.condition(ConditionType.SUSPENDED)
        if condition is not None and condition.reason != Reason.RESUMED:
            text = "spec.suspend is false again; the job goes on."
            self.draft.set_condition(ConditionType.SUSPENDED, "False", Reason.RESUMED, text)
            self.draft.note(Reason.RESUMED, text)

    # Clocks

    def _overdue(self, child: ChildJob | None, pod: ChildPod | None) -> Failure | None:
        """The failure of a job that has used up a time that it was given."""
        number = child.attempt if child else self.draft.attempt_number(self.stage)
        limit = self.spec.active_deadline_seconds
        if limit is not None and self.draft.active_seconds() >= limit:
            text = (
                f"The pods of the job ran for {limit} s, as long as activeDeadlineSeconds allows. Create the job anew "
                "with a higher limit, or with fewer steps."
            )
            return _final(FailureClass.DEADLINE_EXCEEDED, text, self.now, self.stage, number)
        limit = self.spec.pre_running_deadline_seconds
        if limit is not None and not self._runs(pod) and self._waited(child) >= limit:
            before = self.draft.condition(STAGE_CONDITION[self.stage])
            why = f" {before.message}" if before is not None else ""
            text = f"No {self.stage} pod came to run in {limit} s, as long as preRunningDeadlineSeconds allows.{why}"
            return _final(FailureClass.PRE_RUNNING_DEADLINE_EXCEEDED, text, self.now, self.stage, number)
        return None

    def _runs(self, pod: ChildPod | None) -> bool:
        """Whether the present attempt has come to run, though its pod may be gone again."""
        attempt = self.draft.status.attempt
        started = attempt is not None and attempt.start_time is not None and attempt.outcome is None
        return started or (pod is not None and pod.started is not None)

    def _waited(self, child: ChildJob | None) -> float:
        """Seconds that the present attempt, or the next one, has waited for its pod."""
        since = child.created if child else self.draft.job.created
        if child is None:
            status = self.draft.status
            ended = status.attempt.end_time if status.attempt else None
            since = max([since, *(parse_time(text) for text in (ended, status.restart_time) if text)])
        elif child.queue and self.draft.status.history:
            # It may have run before, and have been put back into the queue.
            since = max(since, parse_time(self.draft.status.history[-1].end_time))
        suspended = self.draft.condition(ConditionType.SUSPENDED)
        if suspended is not None and suspended.status == "False":
            since = max(since, parse_time(suspended.last_transition_time))
        return (self.now - since).total_seconds()

    def _look_by(self, child: ChildJob, pod: ChildPod | None, usual: float) -> float:
        """Seconds until the next look: as usual, or when a limit is reached."""
        left = [usual]
        if self.spec.active_deadline_seconds is not None and self._runs(pod):
            left.append(self.spec.active_deadline_seconds - self.draft.active_seconds())
        if self.spec.pre_running_deadline_seconds is not None and not self._runs(pod):
            left.append(self.spec.pre_running_deadline_seconds - self._waited(child))
        return max(0.1, min(left))

    # Running

    def _note_eviction(self, child: ChildJob | None, present: Observation, last: ChildPod | None) -> None:
        """A queue that needs the room suspends the Job, and may start it again before anybody has looked. The Job of a
        queue also makes another pod by itself when somebody deleted one, and there may be no room for it."""
        attempt = self.draft.status.attempt
        if child is None or not child.queue or attempt is None or attempt.start_time is None or child.ended is not None:
            return
        taken = not present.pods_of(self.stage, child.attempt)
        started = parse_time(attempt.start_time)
        # What pods say that were stopped, but not in an earlier life of the Job, is still to be known.
        stopped = [pod for pod in self.seen.pods_of(self.stage, child.attempt) if pod not in present.pods]
        ends = [pod.ended for pod in stopped if pod.ended is not None and pod.ended >= started]
        for pod in stopped:
            if pod.index == 0 and pod.ended in ends:
                self.draft.learn(self._report(child.attempt, pod))
        begins = [pod.started for pod in present.pods_of(self.stage, child.attempt)]
        if child.nodes == 1:
            replaced = last is not None and (
                last.started not in (None, started) or (last.waits and last.created > started)
            )
        else:
            # Where one was replaced, the others end as well: it has begun again when all have.
            replaced = last is not None and all(begin is not None and begin > started for begin in begins)
        if ends and (taken or replaced):
            self.draft.note_seen(max(ends))
        if (taken and child.suspended) or replaced:
            self.draft.requeue()

    def _note_missed(self, last: ChildPod | None) -> None:
        """Pods of a queue may have begun and been stopped before anybody looked."""
        history = self.draft.status.history
        known = parse_time(history[-1].end_time) if history else None
        if last is not None and last.started is not None and (known is None or last.started > known):
            self._note_start(last, self.seen)

    def _note_start(self, last: ChildPod | None, present: Observation) -> None:
        attempt = self.draft.status.attempt
        if last is None or last.started is None or attempt is None or attempt.start_time is not None:
            return
        for past in self.draft.status.history[-1:]:
            same = (past.stage, past.number) == (attempt.stage, attempt.number)
            if same and last.started < parse_time(past.end_time):
                # The queue took this pod away, and its time is counted.
                return
        started = format_time(last.started)
        nodes = [cut(node, 63) for node in present.nodes_of(self.stage, attempt.number)[:MAX_NODES]]
        self.draft.set(attempt=attempt.model_copy(update={"start_time": started, "nodes": nodes or None}))
        if self.draft.status.start_time is None:
            self.draft.set(start_time=started)

    def _report(self, attempt: int, pod: ChildPod | None) -> Report | None:
        """What this attempt says: its last words, or its live ones, which are those of its first pod. Another pod's
        words do not count."""
        live = self.seen.live if pod is None or pod.index == 0 else None
        report = pod.report if pod is not None and pod.report is not None else live
        if report is None:
            return None
        mine = (report.job_uid, report.stage, report.attempt) == (self.draft.job.uid, self.stage, attempt)
        return report if mine else None

    def _wait(self, child: ChildJob, pod: ChildPod | None, last: ChildPod | None) -> Plan:
        if pod is None or last is None or last.started is None:
            return self._wait_for_pod(child, last)
        if not pod.running:
            # The pod has ended, and the Job controller is about to say how.
            return self._plan(running=True, look_again=self.pace.waiting)
        report = self._report(child.attempt, pod)
        self._queue(child)
        self.draft.note_running(SEEN_SECONDS)
        if self.stage is Stage.TRAIN:
            doing = report.phase if report else "Starting"
            where = f"pod {pod.name}" if child.nodes == 1 else f"{child.nodes} pods, of which {pod.name} is the first"
            before = self.draft.condition(ConditionType.RUNNING)
            due = report is not None and self.draft.is_due(report, self.pace.progress)
            if due or before is None or before.reason != Reason.TRAINING:
                self._say("True", Reason.TRAINING, f"Train attempt {child.attempt} runs in {where} ({doing}).")
            self._watch(report, pod)
        else:
            text = f"{self.stage.capitalize()} attempt {child.attempt} runs in pod {pod.name}"
            doing = f" ({report.phase})." if report else "."
            reason = Reason.PREPARING if self.stage is Stage.PREPARE else Reason.EXPORTING
            self._say("Unknown", reason, text + doing)
        return self._plan(running=True, look_again=self._look_by(child, pod, self.pace.poll))

    def _watch(self, report: Report | None, pod: ChildPod) -> None:
        """Silence is never failure: whether training stalls is judged in the pod."""
        if report is not None:
            self.draft.set_condition(
                ConditionType.PROGRESS_AVAILABLE, "True", Reason.PROGRESS_RECEIVED, "The train pod answers."
            )
            self.draft.progress(report, self.pace.progress, final=False)
        elif self.seen.silent_seconds >= UNREACHABLE_SECONDS and pod.delete_by is None:
            text = (
                f"The operator cannot read the progress ({self.seen.unreachable}); training goes on. Let the network "
                "policy allow it to reach the metrics port of the pods."
            )
            before = self.draft.condition(ConditionType.PROGRESS_AVAILABLE)
            if before is None or before.reason != Reason.UNREACHABLE:
                self.draft.note(Reason.UNREACHABLE, text, warning=True)
            self.draft.set_condition(ConditionType.PROGRESS_AVAILABLE, "False", Reason.UNREACHABLE, text)

    def _wait_for_pod(self, child: ChildJob, pod: ChildPod | None) -> Plan:
        status = "False" if self.stage is Stage.TRAIN else "Unknown"
        reason, message = waiting.for_pod(self.stage)
        events: tuple[str, str] | None = None
        asked_in = 0.0
        if child.suspended:
            reason, message = waiting.for_queue(child, self.seen.workload, self.seen.no_kueue)
        elif pod is None:
            asked_in = NO_PODS_SECONDS - (self.now - child.created).total_seconds()
            if asked_in <= 0:
                events = ("Job", child.name)
                if self.seen.warnings:
                    reason, message = waiting.for_admission(child.name, self.seen.warnings[0].message)
        elif pod.waiting is not None:
            reason, message = waiting.for_start(pod, self.stage)
            if pod.waiting.reason == "ContainerCreating":
                asked_in = NO_PODS_SECONDS - (self.now - pod.created).total_seconds()
                if asked_in <= 0:
                    events = ("Pod", pod.name)
                    if self.seen.warnings:
                        reason, message = waiting.for_containers(pod, self.seen.warnings[0])
        if child.nodes > 1 and not child.suspended:
            message += f" {self._running(child)} of {child.nodes} pods run."
        self._queue(child)
        self._say(status, reason, message)
        new = (self.now - child.created).total_seconds() < NEW_SECONDS
        usual = WAITING_SECONDS if new else self.pace.waiting
        return self._plan(
            running=False,
            queued=child.suspended,
            look_again=self._look_by(child, pod, min(usual, asked_in) if asked_in > 0 else usual),
            needs_events_of=events,
            needs_workload_of=child if child.suspended and child.queue else None,
        )

    def _running(self, child: ChildJob) -> int:
        return sum(pod.running for pod in self.seen.pods_of(self.stage, child.attempt))

    def _queue(self, child: ChildJob) -> None:
        """Mirror what Kueue says; what it has said stays while the pod runs."""
        workload = self.seen.workload
        if not child.queue:
            self.draft.set(queue=None)
        elif child.suspended and workload is not None:
            cluster_queue = workload.cluster_queue or None
            self.draft.set(
                queue=QueueStatus(
                    name=child.queue,
                    workload=workload.name,
                    cluster_queue=cluster_queue,
                    position=workload.position if cluster_queue is None else None,
                )
            )
        elif not child.suspended and self.draft.status.queue is not None:
            self.draft.set(queue=self.draft.status.queue.model_copy(update={"position": None}))

    def _wait_for_end(self, attempt: int, pod: ChildPod | None) -> Plan:
        """The Job is gone, and its pods save what they have."""
        report = self._report(attempt, pod)
        if self.stage is Stage.TRAIN and report is not None:
            self.draft.progress(report, self.pace.progress, final=False)
        self.draft.note_running(STOPPING_SEEN_SECONDS)
        return self._plan(running=True, look_again=self.pace.poll)

    def _note_overdue(self) -> None:
        attempt = self.draft.attempt_number(self.stage)
        self.draft.note_overdue(
            any(
                pod.delete_by is not None and pod.delete_by < self.now and pod.name not in self.seen.alive
                for pod in self.seen.pods_of(self.stage, attempt)
                if not pod.finished
            )
        )

    def _lost(self, pod: ChildPod) -> bool:
        """Its node does not say that it has ended, long after it must have, and it has not answered either."""
        attempt = self.draft.status.attempt
        if pod.finished or pod.delete_by is None or pod.delete_by >= self.now or attempt is None:
            return False
        if pod.name in self.seen.alive:
            return False
        if attempt.overdue_time is None:
            return False
        # The attempt's time is that of the pod that was overdue first.
        since = max(parse_time(attempt.overdue_time), pod.delete_by)
        return (self.now - since).total_seconds() > NODE_LOST_SECONDS

    def _node_lost(self, pod: ChildPod) -> Cause:
        assert pod.delete_by is not None
        text = (
            f"Pod {pod.name} should have ended by {format_time(pod.delete_by)}, and node {pod.node} does not say that "
            "it has: the node is probably lost."
        )
        return Cause(FailureClass.NODE_LOST, pod=pod.name, message=text)

    # Ending

    def _ended(self, attempt: int) -> datetime | None:
        """When the last pod of an attempt ended; None while one has not."""
        pods = self.seen.pods_of(self.stage, attempt)
        if any(pod.ended is None and not pod.finished for pod in pods):
            return None
        return max((pod.ended for pod in pods if pod.ended is not None), default=None)

    def _finish(self, child: ChildJob, pod: ChildPod | None) -> Plan:
        """Record what the stage came to. The next one begins with the next look, when the status has it."""
        report = self._report(child.attempt, pod)
        if self.stage is Stage.TRAIN and report is not None:
            self.draft.progress(report, 0.0, final=True)
        self.draft.end_attempt(AttemptOutcome.SUCCEEDED, self._ended(child.attempt) or child.ended)
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
            self.draft.set(trained_attempt=child.attempt)
            self._say("False", Reason.FINISHED, "Training has reached its last step.")
        else:
            self._say("True", Reason.PUBLISHED, f"The model is published at {self.spec.output.uri}.")
            self.draft.complete(
                Reason.TRAINING_COMPLETE, f"The tuned model is verified and published at {self.spec.output.uri}."
            )
        return self._plan(running=True, look_again=0.0)

    def _one_failed(self, attempt: int, child: ChildJob, cause: Cause, first: ChildPod | None) -> Plan:
        """One of several pods has failed, and the others are removed."""
        pods = self.seen.pods_of(self.stage, attempt)
        lost = next(filter(self._lost, pods), None)
        if cause.failure_class in (*_STOPPED, FailureClass.COMMUNICATION):
            if any(not pod.finished and not self._lost(pod) for pod in pods):
                # They save together, and what they saved is said at the end.
                text = f"A pod of train attempt {attempt} has ended ({cause.pod}); the others save and end."
                self._say("True", Reason.TRAINING, text)
                return self._wait_for_end(attempt, first)
            if cause.failure_class is FailureClass.COMMUNICATION and lost is not None:
                # That is what the others could see of it.
                return self._failed(attempt, self._node_lost(lost), child.ended, lost)
        # A pod that was deleted before it ran is not named.
        culprit = self.seen.pod_named(cause.pod) if cause.pod else None
        return self._failed(attempt, cause, self._ended(attempt) or child.ended, culprit)

    def _failed(self, attempt: int, cause: Cause, at: datetime | None, pod: ChildPod | None) -> Plan:
        """Record the failure of a pod as soon as it is known; what follows from it begins when it is in the status, so
        that it is counted."""
        child = self.seen.job(self.stage, attempt)
        report = self._report(attempt, self.seen.pod(self.stage, attempt))
        if self.stage is Stage.TRAIN and report is not None:
            self.draft.progress(report, 0.0, final=True)
        if self._stopping and cause.failure_class in _STOPPED:
            self.draft.end_attempt(AttemptOutcome.SUSPENDED, at)
            return self._plan(running=False, look_again=0.0)
        said = self._report(attempt, pod) if pod is not None or child is None or child.nodes == 1 else None
        self.draft.fail_attempt(cause, at, pod, said)
        if not self.draft.terminal:
            failure = self.draft.status.failure
            assert failure is not None
            self._say("False", Reason.RESTARTING, f"Attempt {attempt} failed: {failure.message}")
        return self._plan(running=False, look_again=0.0)

    def _next(self, attempt: int, child: ChildJob | None) -> Plan:
        """The attempt has ended. The next one starts when the old pods are gone, so that no two run at once, and when
        the pause is over."""
        self._note_overdue()
        pods = [pod for pod in self.seen.pods_of(self.stage, attempt) if not pod.finished]
        unaware = child is not None and child.outcome is Outcome.RUNNING
        waits_in_vain = child is not None and not child.finished and bool(pods) and all(map(self._lost, pods))
        if child is not None and not child.deleting and (unaware or waits_in_vain):
            return self._plan(running=bool(pods), delete=(child,), look_again=self.pace.waiting)
        over = (child is None or child.finished or child.deleting) and all(map(self._lost, pods))
        if not over:
            return self._plan(running=bool(pods), look_again=self.pace.waiting)
        pause = self._pause()
        if pause > 0 and not self.spec.suspend and self._overdue(None, None) is None:
            return self._plan(running=bool(pods), look_again=max(pause, 0.5))
        return self._start(attempt + 1)

    def _pause(self) -> float:
        until = self.draft.status.restart_time
        return (parse_time(until) - self.now).total_seconds() if until else 0.0

    # Helpers

    def _say(self, status: str, reason: Reason, message: str) -> None:
        before = self.draft.condition(STAGE_CONDITION[self.stage])
        if reason not in _SAID_OTHERWISE and (before is None or before.reason != reason):
            self.draft.note(reason, message, warning=reason in waiting.NEEDS_SOMEBODY)
        self.draft.set_condition(STAGE_CONDITION[self.stage], status, reason, message)

    def _plan(
        self,
        *,
        running: bool,
        queued: bool = False,
        create: Iterable[dict[str, Any]] = (),
        delete: tuple[ChildJob, ...] = (),
        look_again: float | None = None,
        needs_events_of: tuple[str, str] | None = None,
        needs_workload_of: ChildJob | None = None,
    ) -> Plan:
        self.draft.derive_phase(self.stage, running, queued)
        if self.draft.terminal:
            look_again = 0.0  # for what is to be done after the end
        return Plan(
            self.draft.status,
            create=tuple(create),
            delete=delete,
            notes=tuple(self.draft.notes),
            look_again=look_again,
            needs_events_of=needs_events_of,
            needs_workload_of=needs_workload_of,
        )
