"""Bugs to be found: each is a mistake that was made in one of the peers, or nearly in this operator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from finetune_api.failures import Disposition
from finetune_operator import children, observe, plan, reconcile, status
from finetune_operator.kube import ApiError
from finetune_operator.resource import format_time


def a_restart_is_not_counted(patch: pytest.MonkeyPatch) -> None:
    decide = status.decide

    def forgetful(*arguments: Any) -> Any:
        decision = decide(*arguments)
        before = arguments[1].restarts
        return replace(decision, restarts=before) if before is not None else decision

    patch.setattr(status, "decide", forgetful)


def preemptions_are_charged_beyond_the_limit(patch: pytest.MonkeyPatch) -> None:
    decide = status.decide

    def strict(*arguments: Any) -> Any:
        decision = decide(*arguments)
        if decision.disposition is Disposition.RESTART_FREE:
            restarts = decision.restarts
            return replace(decision, restarts=restarts.model_copy(update={"charged": restarts.charged + 1}))
        return decision

    patch.setattr(status, "decide", strict)


def the_next_attempt_does_not_wait_for_the_old_pods(patch: pytest.MonkeyPatch) -> None:
    def hasty(self: Any, attempt: int, child: Any) -> Any:
        return self._start(attempt + 1) if self._pause() <= 0 else self._plan(running=False, look_again=self._pause())

    patch.setattr(plan._Stage, "_next", hasty)


def a_failed_job_may_be_tried_again(patch: pytest.MonkeyPatch) -> None:
    from finetune_api.status import ConditionType

    patch.setattr(status.Draft, "terminal", property(lambda self: self.is_true(ConditionType.COMPLETE)))


def suspended_is_said_before_the_pods_are_gone(patch: pytest.MonkeyPatch) -> None:
    stop = plan._Stage._stop

    def early(self: Any, child: Any) -> Any:
        if self._stopping:
            self._suspended()
            return self._plan(running=False, delete=(child,), look_again=10.0)
        return stop(self, child)

    patch.setattr(plan._Stage, "_stop", early)


def the_deadline_runs_from_the_creation(patch: pytest.MonkeyPatch) -> None:
    end = status.Draft.end_attempt

    def from_creation(self: Any, outcome: Any, at: Any, failure: Any = None) -> None:
        created = format_time(self.job.created)
        self.set(attempt=self.status.attempt.model_copy(update={"start_time": created}))
        end(self, outcome, at, failure)

    patch.setattr(status.Draft, "end_attempt", from_creation)


def export_takes_the_newest_attempt(patch: pytest.MonkeyPatch) -> None:
    build = children.build_document

    def newest(job: Any, spec: Any, stage: Any, attempt: int, settings: Any) -> Any:
        document = build(job, spec, stage, attempt, settings)
        return document.model_copy(update={"earlier_attempts": [attempt]}) if stage == "export" else document

    patch.setattr(children, "build_document", newest)


def the_status_is_written_over_whatever_is_there(patch: pytest.MonkeyPatch) -> None:
    """A next attempt is created in the look that decides it, and a conflict is taken for success."""
    write = reconcile.Reconciler._write_status

    async def careless(self: Any, job: Any, planned: Any) -> None:
        with contextlib.suppress(ApiError):
            await write(self, job, planned)

    decided = plan._Stage._failed

    def at_once(self: Any, attempt: int, cause: Any, at: Any, pod: Any) -> Any:
        result = decided(self, attempt, cause, at, pod)
        if self.draft.terminal or self.draft.status.attempt.outcome == "Suspended":
            return result
        return self._start(attempt + 1)

    patch.setattr(reconcile.Reconciler, "_write_status", careless)
    patch.setattr(plan._Stage, "_failed", at_once)


def a_lost_node_is_believed_too_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plan, "NODE_LOST_SECONDS", -timedelta(hours=1).total_seconds())


def nothing_is_deleted_after_the_end(patch: pytest.MonkeyPatch) -> None:
    end = plan._after_the_end
    patch.setattr(plan, "_after_the_end", lambda *arguments: replace(end(*arguments), delete=()))


def no_time_is_counted(patch: pytest.MonkeyPatch) -> None:
    account = status.Draft._account

    def free(self: Any, *arguments: Any) -> Any:
        before = self.status.usage
        result = account(self, *arguments)
        self.set(usage=before)
        return result

    patch.setattr(status.Draft, "_account", free)


def no_job_expires(patch: pytest.MonkeyPatch) -> None:
    end = plan._after_the_end
    patch.setattr(plan, "_after_the_end", lambda *arguments: replace(end(*arguments), expired=False))


def a_job_expires_at_once(patch: pytest.MonkeyPatch) -> None:
    end = plan._after_the_end
    patch.setattr(plan, "_after_the_end", lambda *arguments: replace(end(*arguments), expired=True))


def nothing_is_learnt_from_reports(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(status.Draft, "learn", lambda *_: None)


def a_job_is_left_when_its_attempt_has_ended(patch: pytest.MonkeyPatch) -> None:
    following = plan._Stage._next
    patch.setattr(plan._Stage, "_next", lambda *arguments: replace(following(*arguments), delete=()))


def what_a_lost_answer_was_about_is_not_told(patch: pytest.MonkeyPatch) -> None:
    retry = reconcile.Reconciler._retry

    def forgetful(self: Any, key: Any, error: Exception) -> float:
        self._unsure.pop(key, None)
        return retry(self, key, error)

    patch.setattr(reconcile.Reconciler, "_retry", forgetful)


def events_are_not_tried_again(patch: pytest.MonkeyPatch) -> None:
    record = reconcile.Reconciler._record_events

    async def once(self: Any, key: Any) -> bool:
        said = await record(self, key)
        self._unsaid.pop(key, None)
        return said

    patch.setattr(reconcile.Reconciler, "_record_events", once)


def a_pod_that_was_taken_away_is_counted_twice(patch: pytest.MonkeyPatch) -> None:
    """Once when the queue suspends its Job, and once when the Job controller has said what it makes of its end."""

    def without_stopped(self: Any) -> Any:
        return replace(self, pods=tuple(pod for pod in self.pods if not pod.finished or pod.exit_code != 75))

    patch.setattr(observe.Observation, "without_stopped", without_stopped)
    note = plan._Stage._note_eviction

    def hasty(self: Any, child: Any, present: Any, last: Any) -> None:
        note(self, child, present, last)
        attempt = self.draft.status.attempt
        if child is None or not child.queue or attempt is None or attempt.start_time is None or child.ended is not None:
            return
        if not present.pods_of(self.stage, child.attempt) and self.seen.pods_of(self.stage, child.attempt):
            self.draft.requeue()

    patch.setattr(plan._Stage, "_note_eviction", hasty)


BUGS: list[Callable[[pytest.MonkeyPatch], None]] = [
    a_restart_is_not_counted,
    preemptions_are_charged_beyond_the_limit,
    the_next_attempt_does_not_wait_for_the_old_pods,
    a_failed_job_may_be_tried_again,
    suspended_is_said_before_the_pods_are_gone,
    the_deadline_runs_from_the_creation,
    export_takes_the_newest_attempt,
    the_status_is_written_over_whatever_is_there,
    a_lost_node_is_believed_too_early,
    nothing_is_deleted_after_the_end,
    no_time_is_counted,
    no_job_expires,
    a_job_expires_at_once,
    nothing_is_learnt_from_reports,
    a_job_is_left_when_its_attempt_has_ended,
    what_a_lost_answer_was_about_is_not_told,
    events_are_not_tried_again,
    a_pod_that_was_taken_away_is_counted_twice,
]
