"""The trainer's metrics are a rendering of the report, and what Prometheus expects."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from finetune_api.names import Stage
from finetune_api.report import Report, StepProgress
from finetune_api.status import CheckpointResult, EvaluationResult, Measurement
from finetune_trainer.metrics import exposition

TOOLS = Path(__file__).parents[2] / ".tools" / "bin" / "promtool"
EMPTY = Report(job_uid="uid-1", stage=Stage.PREPARE, attempt=1)
FULL = Report(
    job_uid="uid-1",
    stage=Stage.TRAIN,
    attempt=2,
    phase="Training",
    progress=StepProgress(
        step=7,
        total_steps=20,
        epoch=0.5,
        loss=1.25,
        learning_rate=2e-4,
        grad_norm=0.5,
        tokens_per_second=100.0,
        trained_tokens=12345,
        step_seconds=0.25,
        last_step_time="2026-01-01T00:00:00Z",
        gpu_memory_peak_bytes=1024,
    ),
    evaluation=EvaluationResult(
        base=Measurement(loss="2.5000", perplexity="12.18", tokens=10),
        tuned=Measurement(loss="1.5000", perplexity="4.48", tokens=10, accuracy="0.7500", margin="-0.2500"),
    ),
    checkpoint=CheckpointResult(step=5, uri="s3://b/x", time="2026-01-01T00:00:00Z", save_seconds="1.5"),
    checkpoint_failures=3,
    phase_seconds={"Downloading": 1.5, "Loading": 0.5},
)


def lines(report: Report) -> set[str]:
    return set(exposition(lambda: report)().decode().splitlines())


def test_values() -> None:
    assert {
        'finetune_trainer_info{attempt="2",job_uid="uid-1",stage="train"} 1.0',
        'finetune_trainer_phase{phase="Training"} 1.0',
        'finetune_trainer_phase_seconds_total{phase="Downloading"} 1.5',
        "finetune_trainer_step 7.0",
        "finetune_trainer_max_steps 20.0",
        "finetune_trainer_loss 1.25",
        "finetune_trainer_learning_rate 0.0002",
        "finetune_trainer_tokens_total 12345.0",
        "finetune_trainer_last_step_timestamp_seconds 1.7672256e+09",
        'finetune_trainer_eval_loss{model="base"} 2.5',
        'finetune_trainer_eval_loss{model="tuned"} 1.5',
        'finetune_trainer_eval_accuracy{model="tuned"} 0.75',
        'finetune_trainer_eval_margin{model="tuned"} -0.25',
        "finetune_checkpoint_step 5.0",
        "finetune_checkpoint_last_success_timestamp_seconds 1.7672256e+09",
        "finetune_checkpoint_save_seconds 1.5",
        "finetune_checkpoint_failures_total 3.0",
    } <= lines(FULL)


def test_what_is_not_known_is_not_there() -> None:
    text = "\n".join(lines(EMPTY))
    assert "finetune_trainer_step" not in text
    assert "finetune_trainer_loss" not in text
    # Only methods that learn from pairs have it.
    assert 'finetune_trainer_eval_accuracy{model="base"}' not in "\n".join(lines(FULL))
    assert "finetune_checkpoint_step" not in text
    assert "finetune_checkpoint_failures_total 0.0" in text


def test_each_scrape_sees_the_report_of_its_moment() -> None:
    reports = [EMPTY, FULL]
    render = exposition(lambda: reports[0])
    assert b'stage="prepare"' in render()
    reports.pop(0)
    assert b'stage="train"' in render()


@pytest.mark.parametrize("report", [EMPTY, FULL], ids=["empty", "full"])
def test_promtool_accepts_them(report: Report) -> None:
    program = str(TOOLS) if TOOLS.exists() else shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool: install Debian's prometheus, or put promtool into .tools/bin")
    done = subprocess.run(
        [program, "check", "metrics"], input=exposition(lambda: report)(), capture_output=True, timeout=30, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    assert done.stderr == b""
