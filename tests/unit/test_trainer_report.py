"""What a stage says: files that are replaced atomically, and a report that fits into a termination message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.document import JobDocument, JobIdentity
from finetune_api.failures import FailureClass, exit_code_of
from finetune_api.names import Stage
from finetune_api.report import MAX_REPORT_BYTES, Outcome, Report, ReportedFailure, StepProgress, decode
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import (
    ArtifactResult,
    CheckpointResult,
    DatasetResult,
    EvaluationResult,
    Measurement,
    Resolved,
    Verification,
)
from finetune_trainer.reporting import Reporter, failure_file, read_report, write_failure

URI = "s3://" + "b" * 63 + "/" + "k" * 950


def fullest(message: str, log_tail: str) -> Report:
    """A report with every field, each as long as it may be."""
    longest = "9" * 32
    measurement = Measurement(
        loss=longest, perplexity=longest, tokens=10**12, method_loss="9" * 12, accuracy="9" * 12, margin="9" * 12
    )
    return Report(
        job_uid="0" * 36,
        stage=Stage.TRAIN,
        attempt=10**6,
        outcome=Outcome.FAILED,
        phase="MeasuringBase",
        update_time="2026-01-01T00:00:00Z",
        progress=StepProgress(
            step=10**8,
            total_steps=10**8,
            epoch=1e4 / 3,
            loss=1 / 3,
            learning_rate=1 / 3e5,
            grad_norm=1 / 3,
            tokens_per_second=1e6 / 3,
            trained_tokens=10**15,
            step_seconds=1 / 3,
            last_step_time="2026-01-01T00:00:00Z",
            gpu_memory_peak_bytes=10**12,
        ),
        resumed_from_step=10**8,
        already_published=True,
        dataset=DatasetResult(
            format="Alpaca, Chat, QuestionAnswer, Text",
            train_rows=10**12,
            validation_rows=10**12,
            skipped_rows=10**9,
            train_tokens=10**15,
            supervised_tokens=10**15,
            sha256="f" * 64,
        ),
        resolved=Resolved(
            model_type="m" * 64,
            model_revision="f" * 64,
            parameters=10**12,
            learning_rate="1e-5",
            total_steps=10**8,
            batch_size=65536,
            micro_batch_size=4096,
            gradient_accumulation_steps=65536,
            world_size=16,
            precision="BF16",
            activation_checkpointing="Enabled",
            device="NVIDIA H200",
            artifacts=["Merged", "Adapter"],
            dtype="BF16",
            work_uri=URI,
        ),
        evaluation=EvaluationResult(base=measurement, quantized_base=measurement, tuned=measurement),
        checkpoint=CheckpointResult(step=10**8, uri=URI, time="2026-01-01T00:00:00Z", save_seconds="9" * 32),
        checkpoint_failures=10**6,
        artifacts=[
            ArtifactResult(name=name, uri=URI, size_bytes=10**13, sha256="f" * 64)
            for name in ("Merged", "Adapter", "Manifest")
        ],
        verification=Verification(mean_kl="1.00e-03", max_kl="1.00e-03", positions=128),
        phase_seconds={f"Phase{number}": 99999.9 for number in range(9)},
        failure=ReportedFailure(
            failure_class=FailureClass.OUT_OF_MEMORY_HOST, message=message, exit_code=81, rank=15, log_tail=log_tail
        ),
        log_uri=URI,
    )


@pytest.mark.parametrize(
    ("message", "log_tail"),
    [
        ("m" * 300, "t" * 1500),
        ("m" * 20_000, "t" * 1500),
        ("m" * 1000, '"\\\n\t' * 375),
        ("x" * 300, "日" * 500),
        ("x" * 300, "\x01" * 1500),
        ("日" * 1000, "t" * 1500),
    ],
    ids=[
        "usual",
        "long message",
        "escapes",
        "three bytes each",
        "control characters",
        "long message, three bytes each",
    ],
)
def test_the_fullest_report_fits(message: str, log_tail: str) -> None:
    encoded = fullest(message, log_tail).encode()
    assert len(encoded) <= MAX_REPORT_BYTES
    report = decode(encoded)
    assert report is not None
    assert report.failure is not None
    assert report.failure.failure_class is FailureClass.OUT_OF_MEMORY_HOST
    assert report.failure.message[:290] == message[:290]


@settings(deadline=None, max_examples=40)
@given(message=st.text(max_size=3000), log_tail=st.text(max_size=1500))
def test_any_message_fits(message: str, log_tail: str) -> None:
    message, log_tail = (text.encode("utf-8", "replace").decode() for text in (message, log_tail))
    encoded = fullest(message, log_tail).encode()
    assert len(encoded) <= MAX_REPORT_BYTES
    assert decode(encoded) is not None


def test_a_small_report_is_whole() -> None:
    report = fullest("m", "t").model_copy(
        update={"artifacts": None, "resolved": None, "checkpoint": None, "log_uri": None}
    )
    assert decode(report.encode()) == report


def test_what_follows_the_report_is_ignored() -> None:
    """A writer that was killed between its two system calls leaves the end of a longer, older message."""
    new = Report(job_uid="u", stage=Stage.TRAIN, attempt=2)
    assert decode(new.encode() + b'","phase":"Training"}') == new


@pytest.mark.parametrize("text", [None, "", b"", "killed", "{", "[]", '{"jobUID": "u"}', b"\xff"])
def test_anything_else_is_no_report(text: Any) -> None:
    assert decode(text) is None


def test_a_newer_schema_is_no_report() -> None:
    data = json.loads(Report(job_uid="u", stage=Stage.TRAIN, attempt=2).encode())
    assert decode(json.dumps({**data, "schemaVersion": 2})) is None


@pytest.fixture
def document() -> JobDocument:
    spec = {
        "model": {"uri": "s3://b/m"},
        "dataset": {"train": [{"uri": "s3://b/x.jsonl"}]},
        "output": {"uri": "s3://b/out"},
    }
    return JobDocument(
        stage=Stage.TRAIN,
        attempt=3,
        job=JobIdentity(namespace="n", name="j", uid="uid-7"),
        spec=FineTuneJobSpec.model_validate(spec),
        work_uri="s3://b/work",
    )


class TestReporter:
    def test_the_steps_of_a_pod_continue_one_report(self, tmp_path: Path, document: JobDocument) -> None:
        fetch = Reporter(document, tmp_path)
        fetch.phase("Downloading")
        fetch.update(resumed_from_step=7)
        fetch.close()
        train = Reporter(document, tmp_path)
        train.phase("Training")
        train.resolved(precision="F32")
        train.resolved(device="CPU")
        train.close()
        report = read_report(tmp_path)
        assert report is not None
        assert (report.job_uid, report.attempt, report.phase) == ("uid-7", 3, "Training")
        assert report.resumed_from_step == 7
        assert report.resolved == Resolved(precision="F32", device="CPU")
        assert report.phase_seconds is not None
        assert set(report.phase_seconds) == {"Starting", "Downloading", "Training"}

    def test_progress_is_not_written_at_every_step(self, tmp_path: Path, document: JobDocument) -> None:
        reporter = Reporter(document, tmp_path)
        reporter.phase("Training")
        reporter._written += 1000  # as if just written
        reporter.update(progress=StepProgress(step=1, total_steps=9))
        written = read_report(tmp_path)
        assert written is not None
        assert written.progress is None
        # Anything but mere progress is written at once, and the last progress at the end.
        reporter.update(checkpoint_failures=1)
        written = read_report(tmp_path)
        assert written is not None
        assert written.progress == StepProgress(step=1, total_steps=9)
        reporter._written += 1000
        reporter.update(progress=StepProgress(step=9, total_steps=9))
        reporter.close()
        written = read_report(tmp_path)
        assert written is not None
        assert written.progress == StepProgress(step=9, total_steps=9)

    def test_nothing_but_whole_files(self, tmp_path: Path, document: JobDocument) -> None:
        reporter = Reporter(document, tmp_path)
        reporter.phase("Training")
        assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("failure_class", list(FailureClass))
def test_a_failure_is_left_for_the_agent(tmp_path: Path, failure_class: FailureClass) -> None:
    code = write_failure(tmp_path, 3, failure_class, "Do this.")
    assert code == exit_code_of(failure_class)
    said = ReportedFailure.model_validate_json(failure_file(tmp_path, 3).read_bytes())
    assert (said.failure_class, said.message, said.rank, said.exit_code) == (failure_class, "Do this.", 3, code)
