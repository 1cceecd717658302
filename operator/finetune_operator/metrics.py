"""The operator's Prometheus metrics. Names and labels are API; series of a job go when the job goes."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from finetune_api.failures import FailureClass
from finetune_api.names import Stage
from finetune_api.status import (
    MAX_HISTORY,
    AttemptOutcome,
    ConditionType,
    FineTuneJobStatus,
    PastAttempt,
    Phase,
    Reason,
)
from finetune_operator.resource import FineTuneJob, format_time, parse_time

_LATE = [0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300]
_HOURS = [60, 300, 900, 1800, 3600, 2 * 3600, 4 * 3600, 8 * 3600, 24 * 3600, 72 * 3600]
_WAITS = [5, 15, 30, 60, 120, 300, 900, 3600, 4 * 3600, 24 * 3600, 72 * 3600]
_SECONDS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 900]

_RESTARTS = {AttemptOutcome.FAILED: "charged", AttemptOutcome.PREEMPTED: "preemption"}
"""What an attempt was that comes after one that ended so."""
_OWN_DECISIONS = (FailureClass.DEADLINE_EXCEEDED, FailureClass.PRE_RUNNING_DEADLINE_EXCEEDED)
"""Failures that are no pod's: there was nothing to detect."""


@dataclass(frozen=True)
class _Known:
    """What the series of one job are made of."""

    uid: str
    method: str
    queue: str
    status: FineTuneJobStatus


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        build = Gauge(
            "finetune_operator_build_info",
            "1, with the versions.",
            ["version", "kopf", "python"],
            registry=self.registry,
        )
        build.labels(version("finetune-operator"), version("kopf"), platform.python_version()).set(1)
        self.is_leader = Gauge(
            "finetune_operator_is_leader", "1 when this process works, 0 when it stands by.", registry=self.registry
        )
        self.reconciles = Counter(
            "finetune_operator_reconcile_total", "Looks at a job by result.", ["result"], registry=self.registry
        )
        for result in ("success", "conflict", "error"):
            self.reconciles.labels(result)
        self.reconcile_seconds = Histogram(
            "finetune_operator_reconcile_duration_seconds", "Duration of a look at a job.", registry=self.registry
        )
        self.queue_depth = Gauge(
            "finetune_operator_queue_depth", "Jobs that wait for a look, due or not.", registry=self.registry
        )
        self.lateness = Histogram(
            "finetune_operator_queue_wait_seconds",
            "How late looks at jobs begin, and with them deadlines and times to live.",
            buckets=_LATE,
            registry=self.registry,
        )
        self.last_resync = Gauge(
            "finetune_operator_last_successful_resync_timestamp_seconds",
            "When all jobs were last listed.",
            registry=self.registry,
        )
        self.requests = Counter(
            "finetune_operator_kube_requests_total",
            "Requests to the API server.",
            ["verb", "resource", "code"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "finetune_operator_kube_request_duration_seconds",
            "Duration of requests to the API server.",
            ["verb"],
            registry=self.registry,
        )
        self.throttled_seconds = Counter(
            "finetune_operator_kube_throttled_seconds_total",
            "Time that requests to the API server waited, for our own limit or because it asked for it.",
            ["by"],
            registry=self.registry,
        )
        for by in ("client", "server"):
            self.throttled_seconds.labels(by)
        self.created = Counter(
            "finetune_jobs_created_total", "Jobs that this operator was the first to look at.", registry=self.registry
        )
        self.finished = Counter(
            "finetune_jobs_finished_total",
            "Jobs that ended while this operator watched, by result and reason.",
            ["result", "reason"],
            registry=self.registry,
        )
        self.restarted = Counter(
            "finetune_jobs_restarted_total",
            "Restarts after a failure, charged to failurePolicy.maxRestarts, by the failure's class.",
            ["reason"],
            registry=self.registry,
        )
        self.preempted = Counter(
            "finetune_jobs_preempted_total",
            "Restarts because the cluster took the pod away, which are free, by the failure's class.",
            ["reason"],
            registry=self.registry,
        )
        self.duration = Histogram(
            "finetune_job_duration_seconds",
            "Time from the first pod to the end.",
            ["result"],
            buckets=_HOURS,
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "finetune_job_stage_duration_seconds",
            "Time that the attempt ran that completed a stage; attempts before it are not in it.",
            ["stage"],
            buckets=[10, 30, *_HOURS],
            registry=self.registry,
        )
        self.queue_wait = Histogram(
            "finetune_job_queue_wait_seconds",
            "Time that a stage waited until its pods ran, be it for the operator, a queue, a node or an image: since "
            "the job was created, the stage before had ended, or the job was no longer suspended.",
            ["stage"],
            buckets=_WAITS,
            registry=self.registry,
        )
        self.restart_seconds = Histogram(
            "finetune_restart_latency_seconds",
            "Time from the end of an attempt that failed or was preempted until the pods of the next one ran, with the "
            "pause that backoffSeconds asks for and the wait in a queue.",
            ["kind"],
            buckets=_WAITS,
            registry=self.registry,
        )
        self.detection_seconds = Histogram(
            "finetune_fault_detection_seconds",
            "Time from the end of a failed or preempted pod, or from when it was last heard of, until the operator "
            "knew of it.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.finished.labels("succeeded", "")
        for reason in FailureClass:
            self.finished.labels("failed", reason)
            self.restarted.labels(reason)
        for reason in (FailureClass.PREEMPTED, FailureClass.NODE_LOST):
            self.preempted.labels(reason)
        for result in ("succeeded", "failed"):
            self.duration.labels(result)
        for stage in Stage:
            self.stage_seconds.labels(stage)
            self.queue_wait.labels(stage)
        for kind in _RESTARTS.values():
            self.restart_seconds.labels(kind)
        self._known: dict[tuple[str, str], _Known] = {}
        self._gpu_seconds: dict[tuple[str, str], float] = {}
        self.registry.register(_Jobs(self._known, self._gpu_seconds))

    def request(self, verb: str, resource: str, code: int, seconds: float) -> None:
        self.requests.labels(verb, resource, str(code)).inc()
        self.request_seconds.labels(verb).observe(seconds)

    def throttled(self, by: str, seconds: float) -> None:
        self.throttled_seconds.labels(by).inc(seconds)

    def observe(self, job: FineTuneJob, status: FineTuneJobStatus) -> None:
        """Take note of a job's new status. What is counted is a difference to the status before, so that an operator
        that starts later does not count it again."""
        key = (job.namespace, job.name)
        if key in self._known and self._known[key].uid != job.uid:
            self.forget(*key)  # nobody looked while there was no job of this name
        method, queue = ("", "") if job.spec is None else (job.spec.method.adapter.type, job.spec.scheduling.queue_name)
        self._known[key] = _Known(job.uid, method, queue or "", status)
        if job.status.observed_generation is None and status.observed_generation is not None:
            self.created.inc()
        ended = _ended(job.status, status)
        self._count_restarts(job.status, status, ended)
        self._measure(job, status, ended)
        if status.completion_time is None or job.status.completion_time is not None:
            return
        succeeded = status.phase is Phase.SUCCEEDED
        reason = "" if succeeded or status.failure is None else status.failure.failure_class
        result = "succeeded" if succeeded else "failed"
        self.finished.labels(result, reason).inc()
        if status.start_time is not None:
            self.duration.labels(result).observe(_seconds(status.start_time, status.completion_time))

    def _count_restarts(self, before: FineTuneJobStatus, after: FineTuneJobStatus, ended: list[PastAttempt]) -> None:
        charged = _charged(after) - _charged(before)
        if charged > 0 and after.failure is not None:
            self.restarted.labels(after.failure.failure_class).inc(charged)
        for past in ended:
            if past.outcome is AttemptOutcome.PREEMPTED:
                self.preempted.labels(past.failure_class or FailureClass.PREEMPTED).inc()

    def _measure(self, job: FineTuneJob, status: FineTuneJobStatus, ended: list[PastAttempt]) -> None:
        """All times are those of the status: the operator may have been away."""
        for past in ended:
            if past.outcome is AttemptOutcome.SUCCEEDED and past.start_time is not None:
                self.stage_seconds.labels(past.stage).observe(_seconds(past.start_time, past.end_time))
        for stage, started, last in _begun(job.status, status, ended):
            free = format_time(job.created) if last is None else last.end_time
            # Written times have whole seconds and one zone, so that their order is that of their text.
            since = max(free, _resumed(status) or "")
            if last is not None and last.outcome in _RESTARTS and since == free:
                self.restart_seconds.labels(_RESTARTS[last.outcome]).observe(_seconds(since, started))
            else:
                self.queue_wait.labels(stage).observe(_seconds(since, started))
        failure = status.failure
        if failure is None or failure == job.status.failure or failure.failure_class in _OWN_DECISIONS:
            return
        # An attempt that had no pod had nothing that could be detected.
        if ended and ended[-1].start_time is not None:
            self.detection_seconds.observe(_seconds(ended[-1].end_time, failure.time))

    def forget(self, namespace: str, name: str) -> None:
        """The job is gone, and its series with it."""
        self._known.pop((namespace, name), None)
        self._gpu_seconds.pop((namespace, name), None)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


class _Jobs(Collector):
    """Gauges made from the last known status of every job."""

    def __init__(self, known: dict[tuple[str, str], _Known], gpu_seconds: dict[tuple[str, str], float]) -> None:
        self._known = known
        self._shown = gpu_seconds
        """A counter must not go back where the clocks of nodes do not agree."""

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        counts: dict[tuple[str, str], int] = {}
        per_job = ["namespace", "name"]
        info = GaugeMetricFamily(
            "finetune_job_info",
            "1, with what a job is; the model is its architecture, once that is known.",
            labels=[*per_job, "uid", "model", "method", "queue"],
        )
        progress = GaugeMetricFamily("finetune_job_progress_ratio", "Share of the steps that are done.", labels=per_job)
        step = GaugeMetricFamily("finetune_job_step", "Optimiser steps done.", labels=per_job)
        loss = GaugeMetricFamily("finetune_job_loss", "Training loss of the last known step.", labels=per_job)
        eta = GaugeMetricFamily("finetune_job_eta_seconds", "Time to the last step.", labels=per_job)
        restarts = GaugeMetricFamily("finetune_job_restarts", "Restarts so far.", labels=[*per_job, "kind"])
        evaluation = GaugeMetricFamily(
            "finetune_job_eval_loss", "Token-weighted loss on the validation rows.", labels=[*per_job, "model"]
        )
        accuracy = GaugeMetricFamily(
            "finetune_job_eval_accuracy",
            "Share of the validation rows of judged answers that are told apart rightly.",
            labels=[*per_job, "model"],
        )
        margin = GaugeMetricFamily(
            "finetune_job_eval_margin",
            "Mean reward of the better answers less that of the others.",
            labels=[*per_job, "model"],
        )
        gpu = CounterMetricFamily("finetune_job_gpu_seconds", "GPUs times the seconds they were held.", labels=per_job)
        wasted = CounterMetricFamily(
            "finetune_job_wasted_gpu_seconds",
            "Those of attempts that have ended in which no step was made that the result has.",
            labels=per_job,
        )
        for (namespace, name), known in self._known.items():
            key, status = [namespace, name], known.status
            model = (status.resolved and status.resolved.model_type) or ""
            info.add_metric([*key, known.uid, model, known.method, known.queue], 1)
            self._shown[namespace, name] = max(_gpu_seconds(status), self._shown.get((namespace, name), 0.0))
            gpu.add_metric(key, self._shown[namespace, name])
            wasted.add_metric(key, status.usage.wasted_gpu_seconds if status.usage else 0)
            phase = (namespace, str(status.phase or Phase.PENDING))
            counts[phase] = counts.get(phase, 0) + 1
            if status.progress is not None:
                total = status.progress.total_steps
                progress.add_metric(key, status.progress.current_step / total if total else 0.0)
                step.add_metric(key, status.progress.current_step)
                if status.progress.loss is not None:
                    loss.add_metric(key, float(status.progress.loss))
                if status.progress.estimated_remaining_seconds is not None and status.completion_time is None:
                    eta.add_metric(key, status.progress.estimated_remaining_seconds)
            if status.restarts is not None:
                restarts.add_metric([*key, "charged"], status.restarts.charged)
                restarts.add_metric([*key, "preemption"], status.restarts.preemptions)
            for which in ("base", "quantized_base", "tuned"):
                measured = getattr(status.evaluation, which, None)
                if measured is not None:
                    evaluation.add_metric([*key, which], float(measured.loss))
                    if measured.accuracy is not None:
                        accuracy.add_metric([*key, which], float(measured.accuracy))
                    if measured.margin is not None:
                        margin.add_metric([*key, which], float(measured.margin))
        jobs = GaugeMetricFamily("finetune_jobs", "Jobs by phase.", labels=["namespace", "phase"])
        for (namespace, name), count in sorted(counts.items()):
            jobs.add_metric([namespace, name], count)
        yield from (jobs, info, progress, step, loss, eta, restarts, evaluation, accuracy, margin, gpu, wasted)


def _gpu_seconds(status: FineTuneJobStatus) -> float:
    """Of the attempts that have ended, and of the one that runs as far as it is known to."""
    seconds = float(status.usage.gpu_seconds if status.usage else 0)
    attempt, progress = status.attempt, status.progress
    if attempt is None or attempt.start_time is None or attempt.end_time is not None or progress is None:
        return seconds
    return seconds + (attempt.gpus or 0) * _seconds(attempt.start_time, progress.last_updated_time)


def _ended(before: FineTuneJobStatus, after: FineTuneJobStatus) -> list[PastAttempt]:
    """What a change adds to the history, of which only the end is kept."""
    for added in range(len(after.history) + 1):
        old, new = after.history[: len(after.history) - added], after.history[len(after.history) - added :]
        if [*before.history, *new][-MAX_HISTORY:] == [*old, *new]:
            return new
    return after.history


def _begun(
    before: FineTuneJobStatus, after: FineTuneJobStatus, ended: list[PastAttempt]
) -> Iterator[tuple[Stage, str, PastAttempt | None]]:
    """Of all whose pods have begun to run: stage and time, and the attempt before. A queue may begin one more than
    once, and one may be over when it is first seen."""
    was, now = before.attempt, after.attempt
    known = (was.stage, was.number, was.start_time) if was is not None else None
    last = before.history[-1] if before.history else None
    for past in ended:
        if past.start_time is not None and (past.stage, past.number, past.start_time) != known:
            yield past.stage, past.start_time, last
        last = past
    if now is None or now.start_time is None or now.end_time is not None:
        return
    if (now.stage, now.number, now.start_time) != known:
        yield now.stage, now.start_time, last


def _resumed(status: FineTuneJobStatus) -> str | None:
    """When the job was last set to go on."""
    times = [
        condition.last_transition_time
        for condition in status.conditions
        if condition.type == ConditionType.SUSPENDED and condition.reason == Reason.RESUMED
    ]
    return times[0] if times else None


def _charged(status: FineTuneJobStatus) -> int:
    return status.restarts.charged if status.restarts is not None else 0


def _seconds(since: str, until: str) -> float:
    """Times come from different clocks, so that one may seem to be before its cause."""
    return max(0.0, (parse_time(until) - parse_time(since)).total_seconds())
