"""The trainer's Prometheus metrics, made from the last report at each scrape.

Series carry no job labels: the scraper's target labels (pod, finetune.dev/job-name) say whose they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from finetune_api.report import Report

#: name, help, field of `StepProgress`
_PROGRESS_GAUGES = [
    ("finetune_trainer_step", "Optimiser steps done.", "step"),
    ("finetune_trainer_max_steps", "Optimiser steps to do.", "total_steps"),
    ("finetune_trainer_epoch", "Passes over the data.", "epoch"),
    ("finetune_trainer_loss", "Training loss of the last logged step.", "loss"),
    ("finetune_trainer_learning_rate", "Learning rate of the last logged step.", "learning_rate"),
    ("finetune_trainer_grad_norm", "Gradient norm of the last logged step, before clipping.", "grad_norm"),
    ("finetune_trainer_step_duration_seconds", "Median duration of the last steps.", "step_seconds"),
    ("finetune_trainer_gpu_memory_peak_bytes", "Highest memory use of the first GPU.", "gpu_memory_peak_bytes"),
]

#: name, help, field of `Measurement`
_EVALUATION_GAUGES = [
    ("finetune_trainer_eval_loss", "Token-weighted loss on the validation rows.", "loss"),
    (
        "finetune_trainer_eval_accuracy",
        "Share of the validation rows of judged answers that are told apart rightly.",
        "accuracy",
    ),
    ("finetune_trainer_eval_margin", "Mean reward of the better answers less that of the others.", "margin"),
]


class ReportCollector(Collector):
    def __init__(self, report: Callable[[], Report]) -> None:
        self._report = report

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily | InfoMetricFamily]:
        report = self._report()
        yield InfoMetricFamily(
            "finetune_trainer",
            "The attempt that this process works on.",
            {"stage": report.stage, "attempt": str(report.attempt), "job_uid": report.job_uid},
        )
        phase = GaugeMetricFamily("finetune_trainer_phase", "1 for the phase that runs now.", labels=["phase"])
        phase.add_metric([report.phase], 1)
        yield phase
        spent = CounterMetricFamily(
            "finetune_trainer_phase_seconds", "Time spent in each phase that is over.", labels=["phase"]
        )
        for name, seconds in (report.phase_seconds or {}).items():
            spent.add_metric([name], seconds)
        yield spent
        if report.progress:
            for name, text, field in _PROGRESS_GAUGES:
                value = getattr(report.progress, field)
                if value is not None:
                    yield GaugeMetricFamily(name, text, value)
            if report.progress.trained_tokens is not None:
                yield CounterMetricFamily(
                    "finetune_trainer_tokens",
                    "Input tokens learnt from, over all attempts.",
                    report.progress.trained_tokens,
                )
            if report.progress.last_step_time:
                yield GaugeMetricFamily(
                    "finetune_trainer_last_step_timestamp_seconds",
                    "When the last step ended.",
                    _timestamp(report.progress.last_step_time),
                )
        yield from _evaluation(report)
        if report.checkpoint:
            yield GaugeMetricFamily(
                "finetune_checkpoint_step", "Step of the newest checkpoint.", report.checkpoint.step
            )
            if report.checkpoint.time:
                yield GaugeMetricFamily(
                    "finetune_checkpoint_last_success_timestamp_seconds",
                    "When the newest checkpoint was complete.",
                    _timestamp(report.checkpoint.time),
                )
            if report.checkpoint.save_seconds:
                yield GaugeMetricFamily(
                    "finetune_checkpoint_save_seconds",
                    "Time that saving and uploading it took.",
                    float(report.checkpoint.save_seconds),
                )
        yield CounterMetricFamily(
            "finetune_checkpoint_failures", "Checkpoints that could not be stored.", report.checkpoint_failures or 0
        )


def _evaluation(report: Report) -> Iterator[GaugeMetricFamily]:
    if report.evaluation is None:
        return
    for metric, help_text, field in _EVALUATION_GAUGES:
        family = GaugeMetricFamily(metric, help_text, labels=["model"])
        for name in ("base", "quantized_base", "tuned"):
            value = getattr(getattr(report.evaluation, name), field, None)
            if value is not None:
                family.add_metric([name], float(value))
        if family.samples:
            yield family


def _timestamp(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def exposition(report: Callable[[], Report]) -> Callable[[], bytes]:
    """A function that renders /metrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ReportCollector(report))
    return lambda: generate_latest(registry)
