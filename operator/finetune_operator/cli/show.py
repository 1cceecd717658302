"""How jobs look on a terminal. Pure: everything here makes text or rich renderables out of a job."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_api.status import ConditionType, FineTuneJobStatus, Phase, Reason, Restarts, Usage
from finetune_operator.resource import FineTuneJob, parse_time
from finetune_operator.status import format_duration

_STYLES = {
    Phase.SUCCEEDED: "green",
    Phase.FAILED: "red",
    Phase.RESTARTING: "yellow",
    Phase.QUEUED: "yellow",
    Phase.SUSPENDED: "yellow",
    Phase.RUNNING: "cyan",
}


def phase_text(phase: Phase | None) -> Text:
    return Text(str(phase or Phase.PENDING), style=_STYLES.get(phase or Phase.PENDING, ""))


def age(created: str, now: datetime) -> str:
    return format_duration(int((now - parse_time(created)).total_seconds()))


def jobs_table(jobs: Iterable[tuple[FineTuneJob, str]], *, namespaces: bool) -> Table:
    """`jobs` are pairs of a job and its creation time."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ["NAME", "PHASE", "REASON", "PROGRESS", "ETA", "LOSS", "PERPLEXITY", "RESTARTS", "AGE"]
    for column in (["NAMESPACE"] if namespaces else []) + columns:
        table.add_column(column)
    now = datetime.now(UTC)
    for job, created in jobs:
        progress = job.status.progress
        tuned = job.status.evaluation.tuned if job.status.evaluation else None
        cells: list[RenderableType] = [
            job.name,
            phase_text(job.status.phase),
            job.status.reason or "",
            progress.percent if progress else "",
            (progress.eta if progress and job.status.phase is Phase.RUNNING else "") or "",
            (progress.loss if progress else "") or "",
            tuned.perplexity if tuned else "",
            str(job.status.restarts.charged) if job.status.restarts else "0",
            age(created, now),
        ]
        table.add_row(*([job.namespace] if namespaces else []), *cells)
    return table


def what_it_does(status: FineTuneJobStatus) -> str:
    """The message of the condition that speaks of the present."""
    by_type = {condition.type: condition for condition in status.conditions}
    for kind in (ConditionType.FAILED, ConditionType.COMPLETE):
        if kind in by_type and by_type[kind].status == "True":
            return by_type[kind].message
    suspended = by_type.get(ConditionType.SUSPENDED)
    if suspended is not None and (suspended.status == "True" or suspended.reason == Reason.SUSPENDING):
        return suspended.message
    stage = status.attempt.stage if status.attempt else "prepare"
    current = {"prepare": ConditionType.VALIDATED, "train": ConditionType.RUNNING, "export": ConditionType.EXPORTED}
    condition = by_type.get(current[stage])
    return condition.message if condition else "Waiting for the operator to see the job."


def live(job: FineTuneJob, width: int = 40) -> RenderableType:
    """What `finetune watch` shows while the job goes on."""
    status = job.status
    headline = Text.assemble((job.name, "bold"), "  ", phase_text(status.phase))
    if status.restarts and (status.restarts.charged or status.restarts.preemptions):
        headline.append(f"  {_restarts(status.restarts)}", "yellow")
    progress = status.progress
    if progress is None:
        return Group(headline, Text(what_it_does(status), style="dim"))
    grid = Table.grid(padding=(0, 1))
    facts = [f"{progress.current_step}/{progress.total_steps} steps"]
    if progress.loss:
        facts.append(f"loss {progress.loss}")
    if progress.tokens_per_second:
        facts.append(f"{float(progress.tokens_per_second):.0f} tokens/s")
    if progress.eta and status.phase is Phase.RUNNING:
        facts.append(f"ETA {progress.eta}")
    bar = ProgressBar(total=max(1, progress.total_steps), completed=progress.current_step, width=width)
    grid.add_row(bar, Text(progress.percent), Text("  ".join(facts)))
    return Group(headline, grid, Text(what_it_does(status), style="dim"))


def line(job: FineTuneJob) -> str:
    """The same on one plain line, for logs and pipes."""
    status = job.status
    parts = [str(status.phase or Phase.PENDING)]
    if status.progress is not None:
        progress = status.progress
        parts.append(f"{progress.percent} step {progress.current_step}/{progress.total_steps}")
        if progress.loss:
            parts.append(f"loss {progress.loss}")
        if progress.eta and status.phase is Phase.RUNNING:
            parts.append(f"ETA {progress.eta}")
    if status.phase in (None, Phase.PENDING, Phase.QUEUED, Phase.STARTING, Phase.RESTARTING, Phase.SUSPENDED):
        parts.append(what_it_does(status))
    return "  ".join(parts)


def summary(job: FineTuneJob) -> Text:
    """Everything a person wants to know about one job, a fact on each line."""
    status = job.status
    facts: list[tuple[str, str | Text]] = [
        ("Name", f"{job.namespace}/{job.name}"),
        ("Phase", phase_text(status.phase)),
        ("Now", what_it_does(status)),
    ]
    if job.spec:
        facts.append(("Model", job.spec.model.uri))
        facts.append(("Method", f"{job.spec.method.type} {job.spec.method.adapter.type}"))
    if status.dataset:
        data = status.dataset
        learnt = f"{data.supervised_tokens} of {data.train_tokens} tokens learnt"
        counts = (
            (data.skipped_rows, "skipped"),
            (data.overlong_rows, "too long"),
            (data.duplicate_rows, "there twice"),
            (data.leaked_rows, "of the validation set left out"),
        )
        remarks = "".join(f", {count} {what}" for count, what in counts if count)
        rows = f"{data.train_rows} train rows ({learnt}), {data.validation_rows} validation rows{remarks}"
        facts.append(("Data", rows))
        if data.report_uri:
            facts.append(("Data report", data.report_uri))
    if status.progress:
        progress = status.progress
        loss = f", loss {progress.loss}" if progress.loss else ""
        facts.append(("Progress", f"{progress.percent}, step {progress.current_step} of {progress.total_steps}{loss}"))
    if status.evaluation:
        measured = {
            "base": status.evaluation.base,
            "base in 4 bits": status.evaluation.quantized_base,
            "tuned": status.evaluation.tuned,
        }
        for title, field in (("Perplexity", "perplexity"), ("Accuracy", "accuracy"), ("Margin", "margin")):
            values = {name: getattr(value, field) for name, value in measured.items() if value}
            if shown := ", ".join(f"{name} {value}" for name, value in values.items() if value is not None):
                facts.append((title, shown))
    if status.checkpoint:
        facts.append(("Checkpoint", f"step {status.checkpoint.step}: {status.checkpoint.uri}"))
    if status.restarts and (status.restarts.charged or status.restarts.preemptions):
        facts.append(("Restarts", _restarts(status.restarts)))
    if status.usage and status.usage.gpu_seconds:
        facts.append(("GPU time", _gpu_time(status.usage)))
    if status.verification:
        facts.append(("Verified", f"mean KL {status.verification.mean_kl} nats from the trained model"))
    for artifact in status.artifacts:
        size = f" ({format_size(artifact.size_bytes)})" if artifact.size_bytes else ""
        facts.append((artifact.name, f"{artifact.uri}{size}"))
    if status.failure:
        failure = status.failure
        where = f"{failure.failure_class} in {failure.stage} attempt {failure.attempt}"
        facts.append(("Failure", Text(f"{where}: {failure.message}", style="red")))
        if failure.log_uri:
            facts.append(("Log", failure.log_uri))
    lines = (Text.assemble((f"{label:<12}", "bold"), value) for label, value in facts)
    return Text("\n").join(lines)


def _restarts(restarts: Restarts) -> str:
    def count(number: int, word: str) -> str:
        return f"{number} {word}{'' if number == 1 else 's'}"

    return f"{count(restarts.charged, 'restart')} after failures, {count(restarts.preemptions, 'preemption')}"


def _gpu_time(usage: Usage) -> str:
    return (
        f"{format_duration(usage.gpu_seconds)}, {format_duration(usage.wasted_gpu_seconds)} of it without a step that "
        "the result has"
    )


def format_size(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
