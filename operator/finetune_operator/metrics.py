"""The operator's Prometheus metrics. Names and labels are API; series of a job go when the job goes."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from finetune_api.status import FineTuneJobStatus, Phase
from finetune_operator.resource import FineTuneJob, parse_time

_LATE = [0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300]
_HOURS = [60, 300, 900, 1800, 3600, 2 * 3600, 4 * 3600, 8 * 3600, 24 * 3600, 72 * 3600]


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
        self.queue_wait = Histogram(
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
        self.finished = Counter(
            "finetune_jobs_finished_total",
            "Jobs that ended while this operator watched, by result and reason.",
            ["result", "reason"],
            registry=self.registry,
        )
        self.duration = Histogram(
            "finetune_job_duration_seconds",
            "Time from the first pod to the end.",
            ["result"],
            buckets=_HOURS,
            registry=self.registry,
        )
        self._statuses: dict[tuple[str, str], FineTuneJobStatus] = {}
        self._gpu_seconds: dict[tuple[str, str], float] = {}
        self.registry.register(_Jobs(self._statuses, self._gpu_seconds))

    def request(self, verb: str, resource: str, code: int, seconds: float) -> None:
        self.requests.labels(verb, resource, str(code)).inc()
        self.request_seconds.labels(verb).observe(seconds)

    def throttled(self, by: str, seconds: float) -> None:
        self.throttled_seconds.labels(by).inc(seconds)

    def observe(self, job: FineTuneJob, status: FineTuneJobStatus) -> None:
        """Take note of a job's new status."""
        self._statuses[job.namespace, job.name] = status
        if status.completion_time is None or job.status.completion_time is not None:
            return
        succeeded = status.phase is Phase.SUCCEEDED
        reason = "" if succeeded or status.failure is None else status.failure.failure_class
        result = "succeeded" if succeeded else "failed"
        self.finished.labels(result, reason).inc()
        if status.start_time is not None:
            seconds = (parse_time(status.completion_time) - parse_time(status.start_time)).total_seconds()
            self.duration.labels(result).observe(seconds)

    def forget(self, namespace: str, name: str) -> None:
        """The job is gone, and its series with it."""
        self._statuses.pop((namespace, name), None)
        self._gpu_seconds.pop((namespace, name), None)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


class _Jobs(Collector):
    """Gauges made from the last known status of every job."""

    def __init__(
        self, statuses: dict[tuple[str, str], FineTuneJobStatus], gpu_seconds: dict[tuple[str, str], float]
    ) -> None:
        self._statuses = statuses
        self._shown = gpu_seconds
        """A counter must not go back where the clocks of nodes do not agree."""

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        counts: dict[tuple[str, str], int] = {}
        per_job = ["namespace", "name"]
        progress = GaugeMetricFamily("finetune_job_progress_ratio", "Share of the steps that are done.", labels=per_job)
        step = GaugeMetricFamily("finetune_job_step", "Optimiser steps done.", labels=per_job)
        loss = GaugeMetricFamily("finetune_job_loss", "Training loss of the last known step.", labels=per_job)
        eta = GaugeMetricFamily("finetune_job_eta_seconds", "Time to the last step.", labels=per_job)
        restarts = GaugeMetricFamily("finetune_job_restarts", "Restarts so far.", labels=[*per_job, "kind"])
        evaluation = GaugeMetricFamily(
            "finetune_job_eval_loss", "Token-weighted loss on the validation rows.", labels=[*per_job, "model"]
        )
        gpu = CounterMetricFamily("finetune_job_gpu_seconds", "GPUs times the seconds they were held.", labels=per_job)
        wasted = CounterMetricFamily(
            "finetune_job_wasted_gpu_seconds",
            "Those of attempts that have ended in which no step was made that the result has.",
            labels=per_job,
        )
        for (namespace, name), status in self._statuses.items():
            key = [namespace, name]
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
            for model in ("base", "quantized_base", "tuned"):
                measured = getattr(status.evaluation, model, None)
                if measured is not None:
                    evaluation.add_metric([*key, model], float(measured.loss))
        jobs = GaugeMetricFamily("finetune_jobs", "Jobs by phase.", labels=["namespace", "phase"])
        for (namespace, name), count in sorted(counts.items()):
            jobs.add_metric([namespace, name], count)
        yield from (jobs, progress, step, loss, eta, restarts, evaluation, gpu, wasted)


def _gpu_seconds(status: FineTuneJobStatus) -> float:
    """Of the attempts that have ended, and of the one that runs as far as it is known to."""
    seconds = float(status.usage.gpu_seconds if status.usage else 0)
    attempt, progress = status.attempt, status.progress
    if attempt is None or attempt.start_time is None or attempt.end_time is not None or progress is None:
        return seconds
    ran = (parse_time(progress.last_updated_time) - parse_time(attempt.start_time)).total_seconds()
    return seconds + (attempt.gpus or 0) * max(0.0, ran)
