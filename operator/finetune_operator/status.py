"""Deriving the next status from the last one and what was seen. Pure: time comes in as an argument."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from finetune_api.failures import RULES, Disposition, FailureClass
from finetune_api.names import Stage, child_name
from finetune_api.report import Report, StepProgress
from finetune_api.status import (
    MAX_HISTORY,
    MAX_MESSAGE,
    MAX_PAST_MESSAGE,
    Attempt,
    AttemptOutcome,
    CheckpointResult,
    Condition,
    ConditionType,
    EvaluationResult,
    Failure,
    FineTuneJobStatus,
    PastAttempt,
    Phase,
    Progress,
    Reason,
    Resolved,
    Restarts,
    Usage,
)
from finetune_operator.classify import Cause
from finetune_operator.observe import ChildPod
from finetune_operator.resource import FineTuneJob, format_time, parse_time
from finetune_operator.restarts import decide

STAGE_CONDITION = {
    Stage.PREPARE: ConditionType.VALIDATED,
    Stage.TRAIN: ConditionType.RUNNING,
    Stage.EXPORT: ConditionType.EXPORTED,
}
_OF_ONE_POD = ("start_time", "seen_time", "nodes", "resumed_from_step", "checkpoint_failures")
"""Fields of an attempt that speak of its pod."""
MAX_FAILURE_MESSAGE = 2048
"""Characters of status.failure.message."""


@dataclass(frozen=True)
class Note:
    """An event to record on the FineTuneJob: one for each transition, never one for each look."""

    reason: str
    message: str
    warning: bool = False


@dataclass
class Draft:
    """The status that is being written, and the events that go with it."""

    job: FineTuneJob
    now: datetime
    status: FineTuneJobStatus = field(init=False)
    notes: list[Note] = field(default_factory=list)

    def __post_init__(self) -> None:
        generation = {"observed_generation": self.job.generation}
        # Each look is at the whole spec. `kubectl wait` waits for ever for a condition that speaks of an older one.
        conditions = [condition.model_copy(update=generation) for condition in self.job.status.conditions]
        self.status = self.job.status.model_copy(update={**generation, "conditions": conditions})

    def set(self, **fields: Any) -> None:
        self.status = self.status.model_copy(update=fields)

    # Conditions

    def condition(self, kind: ConditionType) -> Condition | None:
        return next((condition for condition in self.status.conditions if condition.type == kind), None)

    def is_true(self, kind: ConditionType) -> bool:
        condition = self.condition(kind)
        return condition is not None and condition.status == "True"

    def set_condition(self, kind: ConditionType, status: str, reason: str, message: str) -> None:
        """lastTransitionTime changes only when the status does, as in all of Kubernetes."""
        before = self.condition(kind)
        since = format_time(self.now)
        if before is not None and before.status == status:
            since = before.last_transition_time
        condition = Condition.model_validate(
            {
                "type": kind.value,
                "status": status,
                "observedGeneration": self.job.generation,
                "lastTransitionTime": since,
                "reason": str(reason),
                "message": cut(message, MAX_MESSAGE),
            }
        )
        others = [other for other in self.status.conditions if other.type != kind]
        position = next((i for i, other in enumerate(self.status.conditions) if other.type == kind), len(others))
        self.set(conditions=[*others[:position], condition, *others[position:]])

    def note(self, reason: str, message: str, *, warning: bool = False) -> None:
        self.notes.append(Note(str(reason), cut(message, MAX_MESSAGE), warning))

    # Where the job is

    @property
    def terminal(self) -> bool:
        return self.is_true(ConditionType.COMPLETE) or self.is_true(ConditionType.FAILED)

    def finished(self, stage: Stage) -> bool:
        if stage is Stage.PREPARE:
            return self.is_true(ConditionType.VALIDATED)
        if stage is Stage.TRAIN:
            return self.status.trained_attempt is not None
        return self.is_true(ConditionType.EXPORTED)

    def attempt_number(self, stage: Stage) -> int:
        """The attempt of this stage that was started last, as far as the status knows; 0 before the first."""
        attempt = self.status.attempt
        return attempt.number if attempt is not None and attempt.stage is stage else 0

    @property
    def attempt_ended(self) -> bool:
        """The present attempt has ended, and is counted."""
        attempt, failure, history = self.status.attempt, self.status.failure, self.status.history
        if attempt is None:
            return False
        mine = (attempt.stage, attempt.number)
        if attempt.outcome is not None and history and (history[-1].stage, history[-1].number) == mine:
            # An older operator that starts the next attempt leaves the outcome of the last one in its place.
            return True
        # Operators before there was an outcome said it with the failure alone.
        return failure is not None and (failure.stage, failure.attempt) == mine

    @property
    def gpus(self) -> int:
        """GPUs that the present attempt holds."""
        attempt, spec = self.status.attempt, self.job.spec
        if attempt is None or attempt.stage is not Stage.TRAIN or spec is None:
            return 0
        return attempt.gpus if attempt.gpus is not None else spec.resources.gpus_per_node

    # What happens

    def start(self, stage: Stage, attempt: int) -> None:
        assert self.job.spec is not None
        name = child_name(self.job.name, stage, attempt)
        resources = self.job.spec.resources
        gpus = resources.gpus_per_node * resources.nodes if stage is Stage.TRAIN else 0
        self.set(
            attempt=Attempt.model_validate({"stage": stage.value, "number": attempt, "jobName": name, "gpus": gpus}),
            # What the last attempt measured says nothing of this one.
            progress=self.status.progress and self.status.progress.model_copy(update={"step_seconds": None}),
            queue=None,
            restart_time=None,
            restarts=self.status.restarts or Restarts(),
        )
        self.note(Reason.STAGE_STARTED, f"Started {stage} attempt {attempt} as Job {name}")

    def end_attempt(self, outcome: AttemptOutcome, at: datetime | None, failure: Failure | None = None) -> None:
        """The present attempt has ended."""
        ended = self._account(outcome, at, failure)
        assert self.status.attempt is not None
        self.set(attempt=self.status.attempt.model_copy(update={"end_time": ended, "outcome": outcome}))
        self._no_time_left()

    def requeue(self) -> None:
        """A queue has taken the pod of the present attempt away. The attempt goes on with another pod when it is
        admitted again."""
        self._account(AttemptOutcome.PREEMPTED, None, None)
        attempt, restarts = self.status.attempt, self.status.restarts or Restarts()
        assert attempt is not None
        self.set(
            attempt=attempt.model_copy(update=dict.fromkeys(_OF_ONE_POD)),
            restarts=restarts.model_copy(update={"preemptions": restarts.preemptions + 1}),
            progress=self.status.progress and self.status.progress.model_copy(update={"attempt": None}),
        )
        self._no_time_left()
        text = f"The queue took the pod of {attempt.stage} attempt {attempt.number} away."
        self.note(FailureClass.PREEMPTED, f"{text} It goes on when it is admitted again.", warning=True)

    def _account(self, outcome: AttemptOutcome, at: datetime | None, failure: Failure | None) -> str:
        """Take the time of the present attempt's pod into account and put it into the history; returns when it ended.
        Without a time of its end it ended when it was last heard of; a pod that nobody saw run counts nothing."""
        attempt, progress = self.status.attempt, self.status.progress
        assert attempt is not None
        # What is not known to be this attempt's is that of the one before.
        spoke = attempt.stage is Stage.TRAIN and attempt.resumed_from_step is not None
        started = parse_time(attempt.start_time) if attempt.start_time else None
        if at is None and started is not None:
            at = max(started, parse_time(attempt.seen_time) if attempt.seen_time else started)
        ended = format_time(at or self.now)
        usage = self.status.usage or Usage()
        if started is not None and at is not None:
            seconds = max(0, round((at - started).total_seconds()))
            useful = min(seconds, self._useful_seconds(outcome))
            usage = Usage(
                active_seconds=usage.active_seconds + seconds,
                gpu_seconds=usage.gpu_seconds + seconds * self.gpus,
                wasted_gpu_seconds=usage.wasted_gpu_seconds + (seconds - useful) * self.gpus,
            )
        preempted = FailureClass.PREEMPTED if outcome is AttemptOutcome.PREEMPTED else None
        past = PastAttempt.model_validate(
            {
                "stage": attempt.stage.value,
                "number": attempt.number,
                "outcome": outcome.value,
                "class": failure.failure_class if failure else preempted,
                "message": cut(failure.message, MAX_PAST_MESSAGE) if failure else None,
                "startTime": attempt.start_time,
                "endTime": ended,
                "fromStep": attempt.resumed_from_step,
                "toStep": progress.current_step if progress is not None and spoke else None,
                "exitCode": failure.exit_code if failure else None,
                "rank": failure.rank if failure else None,
                "pod": cut(failure.pod, 63) if failure and failure.pod else None,
                "node": cut(failure.node, 63) if failure and failure.node else None,
            }
        )
        self.set(usage=usage, history=[*self.status.history, past][-MAX_HISTORY:])
        return ended

    def _useful_seconds(self, outcome: AttemptOutcome) -> int:
        """Time of the present attempt that went into steps that the result has."""
        attempt, progress, checkpoint = self.status.attempt, self.status.progress, self.status.checkpoint
        if attempt is None or attempt.stage is not Stage.TRAIN or attempt.resumed_from_step is None:
            return 0
        if progress is None or progress.step_seconds is None:
            return 0
        first = attempt.resumed_from_step
        last = checkpoint.step if checkpoint is not None else first
        if outcome is AttemptOutcome.SUCCEEDED:
            last = progress.total_steps
        return round(max(0, last - first) * float(progress.step_seconds))

    def note_running(self, every: float) -> None:
        """The pod of the present attempt was seen to run."""
        attempt = self.status.attempt
        if attempt is None or attempt.start_time is None:
            return
        before = parse_time(attempt.seen_time or attempt.start_time)
        if (self.now - before).total_seconds() >= every:
            self.note_seen(self.now)

    def note_seen(self, at: datetime) -> None:
        """The pod of the present attempt ran until then at least."""
        attempt, seen = self.status.attempt, format_time(at)
        # Written times have whole seconds and one zone, so that their order is that of their text.
        if attempt is not None and attempt.start_time is not None and (attempt.seen_time or "") < seen:
            self.set(attempt=attempt.model_copy(update={"seen_time": seen}))

    def note_overdue(self, overdue: bool) -> None:
        """The pod of the present attempt should have ended, and is silent. Since when that is seen counts: whose clock
        said until when it had time is not known."""
        attempt = self.status.attempt
        if attempt is not None and overdue != (attempt.overdue_time is not None):
            self.set(attempt=attempt.model_copy(update={"overdue_time": format_time(self.now) if overdue else None}))

    def active_seconds(self) -> float:
        """Time in which pods of the job ran until now."""
        before = self.status.usage.active_seconds if self.status.usage else 0
        attempt = self.status.attempt
        if attempt is None or attempt.start_time is None or attempt.end_time is not None:
            return before
        return before + max(0.0, (self.now - parse_time(attempt.start_time)).total_seconds())

    def fail_attempt(self, cause: Cause, at: datetime | None, pod: ChildPod | None, report: Report | None) -> None:
        """Record why the present attempt failed and decide what follows."""
        assert self.job.spec is not None
        attempt = self.status.attempt
        assert attempt is not None
        decision = decide(self.job.spec, self.status, self.job.uid, cause, self.gpus)
        failure_class = cause.failure_class
        if failure_class is FailureClass.KILLED and pod is not None and pod.oom_killed:
            failure_class = FailureClass.OUT_OF_MEMORY_HOST
        said = report.failure if report is not None else None
        message = cause.message or RULES[failure_class].sentence
        if said is not None and said.failure_class == failure_class:
            message = said.message
        message = f"{message} {decision.because}".strip()
        final = decision.disposition is Disposition.FAIL
        failure = Failure.model_validate(
            {
                "class": failure_class.value,
                "message": cut(message, MAX_FAILURE_MESSAGE),
                "disposition": "Terminal" if final else "WillRestart",
                "stage": attempt.stage.value,
                "attempt": attempt.number,
                "time": format_time(self.now),
                "exitCode": cause.exit_code,
                "rank": said.rank if said else None,
                "pod": cause.pod or (pod.name if pod else None),
                "node": (pod.node if pod else self._node_of(cause.pod)) or None,
                "logTail": said.log_tail if said else None,
                "logURI": report.log_uri if report else None,
            }
        )
        free = decision.disposition is Disposition.RESTART_FREE
        self.set(failure=failure)
        self.end_attempt(AttemptOutcome.PREEMPTED if free else AttemptOutcome.FAILED, at, failure)
        if final:
            self.fail(failure)
            return
        self.set(
            restarts=decision.restarts,
            restart_time=format_time(self.now + timedelta(seconds=decision.pause)),
            micro_batch_limit=decision.micro_batch_limit,
        )
        allowed = self.job.spec.failure_policy.max_restarts
        what = "It is started again" if free else f"Restart {decision.restarts.charged} of {allowed}"
        self.note(
            failure_class,
            f"{attempt.stage} attempt {attempt.number}: {message} {what} {_in(decision.pause)}.",
            warning=True,
        )

    def _node_of(self, pod: str | None) -> str | None:
        """The node of a pod of the present attempt whose object is gone."""
        attempt = self.status.attempt
        nodes = attempt.nodes or [] if attempt is not None else []
        if attempt is None or pod is None:
            return nodes[0] if len(nodes) == 1 else None
        index = pod.removeprefix(f"{attempt.job_name}-").partition("-")[0]
        return nodes[int(index)] if index.isdecimal() and int(index) < len(nodes) else None

    def fail(self, failure: Failure) -> None:
        """The job ends without a model."""
        self.set(failure=failure, completion_time=format_time(self.now), restart_time=None)
        self.set_condition(STAGE_CONDITION[failure.stage], "False", failure.failure_class, failure.message)
        self._not_watched()
        self.set_condition(ConditionType.FAILED, "True", failure.failure_class, failure.message)
        self.note(failure.failure_class, failure.message, warning=True)

    def complete(self, reason: Reason, message: str) -> None:
        self.set(completion_time=format_time(self.now), failure=None, restart_time=None)
        self._not_watched()
        self.set_condition(ConditionType.COMPLETE, "True", reason, message)
        self.note(reason, message)

    def _no_time_left(self) -> None:
        """Nothing runs that could be estimated."""
        if self.status.progress is not None:
            gone = {"eta": None, "estimated_remaining_seconds": None}
            self.set(progress=self.status.progress.model_copy(update=gone))

    def _not_watched(self) -> None:
        if self.condition(ConditionType.PROGRESS_AVAILABLE) is not None:
            self.set_condition(ConditionType.PROGRESS_AVAILABLE, "False", Reason.FINISHED, "No pod runs any more.")

    # What the pods say

    def learn(self, report: Report | None) -> None:
        """Take over what a report adds to what is known; a report never takes anything away."""
        if report is None:
            return
        if report.resolved:
            before = self.status.resolved or Resolved()
            self.set(resolved=before.model_copy(update=_given(report.resolved)))
        if report.evaluation:
            evaluation = self.status.evaluation or EvaluationResult()
            self.set(evaluation=evaluation.model_copy(update=_given(report.evaluation)))
        for name in ("dataset", "artifacts", "verification"):
            value = getattr(report, name)
            if value is not None:
                self.set(**{name: value})
        if report.checkpoint and report.checkpoint != self.status.checkpoint:
            self._learn_checkpoint(report.checkpoint)
        attempt = self.status.attempt
        if attempt and report.resumed_from_step is not None and attempt.resumed_from_step is None:
            attempt = attempt.model_copy(update={"resumed_from_step": report.resumed_from_step})
            self.set(attempt=attempt)
        failures = report.checkpoint_failures or 0
        if attempt and failures > (attempt.checkpoint_failures or 0):
            if not attempt.checkpoint_failures:
                text = (
                    f"A checkpoint of {attempt.stage} attempt {attempt.number} could not be stored; its log says why."
                )
                self.note(Reason.CHECKPOINT_FAILED, f"{text} Training goes on.", warning=True)
            self.set(attempt=attempt.model_copy(update={"checkpoint_failures": failures}))

    def _learn_checkpoint(self, checkpoint: CheckpointResult) -> None:
        """Each is written down; only the first, and the first that is slow, are events."""
        self.set(checkpoint=checkpoint)
        before = self.condition(ConditionType.CHECKPOINTED)
        reason, text = Reason.CHECKPOINT_SAVED, f"The checkpoint of step {checkpoint.step} is stored."
        grace = self.job.spec.checkpoint.grace_period_seconds if self.job.spec is not None else None
        # Times around the limit are one trouble, not many.
        slow = before is not None and before.reason == Reason.CHECKPOINT_SLOW
        if grace is not None and float(checkpoint.save_seconds or 0) > (0.8 * grace if slow else grace):
            reason = Reason.CHECKPOINT_SLOW
            text += (
                f" That took {checkpoint.save_seconds} s, and a pod that is told to stop has {grace} s: set "
                "checkpoint.gracePeriodSeconds higher, or steps are lost."
            )
        self.set_condition(ConditionType.CHECKPOINTED, "True", reason, text)
        if before is None or before.reason != reason:
            self.note(reason, text, warning=reason is Reason.CHECKPOINT_SLOW)

    def is_due(self, report: Report, interval: float) -> bool:
        """Whether what a pod says while it runs is written: every `interval` seconds, and at once an attempt's first
        words, its first step and its last."""
        before, attempt = self.status.progress, self.status.attempt
        if report.progress is None or before is None or attempt is None or before.attempt != attempt.number:
            return True
        step = report.progress.step
        age = (self.now - parse_time(before.last_updated_time)).total_seconds()
        return age >= interval or (before.current_step == 0 and step > 0) or step >= report.progress.total_steps

    def progress(self, report: Report, interval: float, *, final: bool) -> None:
        """Take over the progress if it is due, or the last that will be said. Last words may be older than what was
        said before; an attempt does not lose steps that it has made."""
        attempt, before = self.status.attempt, self.status.progress
        if report.progress is None or attempt is None or not (final or self.is_due(report, interval)):
            return
        after = _progress(report.progress, attempt.number, self.now)
        if before is not None:
            if before.attempt == attempt.number and after.current_step < before.current_step:
                return
            if after.model_copy(update={"last_updated_time": before.last_updated_time}) == before:
                return
        if after.current_step > 0 and (before is None or before.current_step == 0):
            self.note(Reason.FIRST_STEP, f"The first of {after.total_steps} steps is done.")
        self.set(progress=after)

    # For people

    def derive_phase(self, stage: Stage, running: bool, queued: bool = False) -> None:
        """`stage`: the one that goes on, or comes next. `running`: the pod of the present attempt runs. `queued`:
        somebody keeps it from having one."""
        self.set(phase=self._phase(running, queued), reason=self._reason(stage))

    def _reason(self, stage: Stage) -> str | None:
        ends = (ConditionType.COMPLETE, ConditionType.FAILED, ConditionType.SUSPENDED)
        condition = self.condition(next(filter(self.is_true, ends), STAGE_CONDITION[stage]))
        if condition is not None and condition.reason == Reason.RESTARTING and self.status.failure is not None:
            return self.status.failure.failure_class
        return condition.reason if condition is not None else None

    def _phase(self, running: bool, queued: bool) -> Phase:
        if self.is_true(ConditionType.COMPLETE):
            return Phase.SUCCEEDED
        if self.is_true(ConditionType.FAILED):
            return Phase.FAILED
        if self.is_true(ConditionType.SUSPENDED):
            return Phase.SUSPENDED
        attempt = self.status.attempt
        if attempt is None:
            return Phase.PENDING
        if queued:
            return Phase.QUEUED
        if self.status.restart_time is not None:
            return Phase.RESTARTING
        if attempt.stage is Stage.PREPARE:
            return Phase.PREPARING if running else Phase.PENDING
        if attempt.stage is Stage.TRAIN:
            return Phase.RUNNING if running else Phase.STARTING
        return Phase.EXPORTING


def _given(model: Any) -> dict[str, Any]:
    """The fields of a model that say something."""
    return {name: value for name in type(model).model_fields if (value := getattr(model, name)) is not None}


def _progress(step: StepProgress, attempt: int, now: datetime) -> Progress:
    remaining = None
    if step.step_seconds is not None and step.step < step.total_steps:
        remaining = round((step.total_steps - step.step) * step.step_seconds)
    share = step.step / step.total_steps if step.total_steps else 0.0
    return Progress(
        attempt=attempt,
        percent=f"{int(100 * share)}%",
        current_step=step.step,
        total_steps=step.total_steps,
        epoch=_decimal(step.epoch, ".2f"),
        loss=_decimal(step.loss, ".4f"),
        learning_rate=_decimal(step.learning_rate, ".2e"),
        tokens_per_second=_decimal(step.tokens_per_second, ".1f"),
        trained_tokens=step.trained_tokens,
        step_seconds=_decimal(step.step_seconds, ".3f"),
        estimated_remaining_seconds=remaining,
        eta=None if remaining is None else format_duration(remaining),
        last_updated_time=format_time(now),
    )


def _in(seconds: int) -> str:
    return f"in {seconds} s" if seconds else "at once"


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _decimal(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def format_duration(seconds: int) -> str:
    """The two largest units, as kubectl prints ages: 45s, 1m30s, 1h12m, 2d3h."""
    minutes, seconds = divmod(max(0, seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (seconds, "s")]
    while len(parts) > 1 and parts[0][0] == 0:
        parts.pop(0)
    return "".join(f"{value}{unit}" for value, unit in parts[:2] if value or (value, unit) == parts[0])
