"""How a stage speaks to the agent in its pod: two small files, replaced atomically.

`report.json` is what is known so far; the agent serves it while the stage runs. `failure-<rank>.json` says why a
process is about to exit; the agent reads it when the process is gone. Files survive the death of either side.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_api.document import JobDocument
from finetune_api.failures import FailureClass, exit_code_of
from finetune_api.report import Report, ReportedFailure, decode
from finetune_api.status import EvaluationResult, Resolved

REPORT_FILE = "report.json"
MERE_PROGRESS = {"progress", "measured_rows"}
MIN_INTERVAL = 0.2
"""Seconds between two writes of mere progress."""


def now() -> str:
    """The time as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


def failure_file(run_dir: Path, rank: int) -> Path:
    return run_dir / f"failure-{rank}.json"


def write_failure(run_dir: Path, rank: int, failure_class: FailureClass, message: str) -> int:
    """Leave the reason of a failure for the agent; returns the exit code to use. On a full disk that code has to do."""
    code = exit_code_of(failure_class)
    failure = ReportedFailure(failure_class=failure_class, message=message, exit_code=code, rank=rank)
    with contextlib.suppress(OSError):
        write_atomically(failure_file(run_dir, rank), failure.model_dump_json(by_alias=True).encode())
    return code


def read_report(run_dir: Path) -> Report | None:
    try:
        return decode((run_dir / REPORT_FILE).read_bytes())
    except FileNotFoundError:
        return None


class Reporter:
    """Collects what a stage has to say. Only rank 0 has one; the phases of one pod continue one report."""

    def __init__(self, document: JobDocument, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._report = read_report(run_dir) or Report(
            job_uid=document.job.uid, stage=document.stage, attempt=document.attempt
        )
        self._report = self._report.model_copy(update={"phase": "Starting"})
        self._phase_started = time.monotonic()
        self._written = 0.0
        # Checkpoints are reported from the thread that uploads them.
        self._lock = threading.RLock()

    @property
    def report(self) -> Report:
        return self._report

    def phase(self, name: str) -> None:
        """A new phase begins, such as Downloading; the time of the one before is added up."""
        with self._lock:
            begun = {"phase_seconds": self.phase_seconds(), "phase": name, "measured_rows": None}
            self._report = self._report.model_copy(update=begun)
            self._phase_started = time.monotonic()
            self._write()

    def phase_seconds(self) -> dict[str, float]:
        spent = dict(self._report.phase_seconds or {})
        elapsed = time.monotonic() - self._phase_started
        spent[self._report.phase] = round(spent.get(self._report.phase, 0.0) + elapsed, 1)
        return spent

    def resolved(self, **fields: Any) -> None:
        """Add to what Auto and absent values became."""
        with self._lock:
            before = self._report.resolved or Resolved()
            self.update(resolved=before.model_copy(update=fields))

    def evaluation(self, **fields: Any) -> None:
        with self._lock:
            before = self._report.evaluation or EvaluationResult()
            self.update(evaluation=before.model_copy(update=fields))

    def measured(self, rows: int) -> None:
        self.update(measured_rows=rows)

    def update(self, **fields: Any) -> None:
        """Replace fields of the report."""
        with self._lock:
            self._report = self._report.model_copy(update=fields)
            if not set(fields) <= MERE_PROGRESS or time.monotonic() - self._written >= MIN_INTERVAL:
                self._write()

    def close(self) -> None:
        """Write what is not written yet, with the last phase's time."""
        with self._lock:
            self._report = self._report.model_copy(update={"phase_seconds": self.phase_seconds()})
            self._phase_started = time.monotonic()
            self._write()

    def _write(self) -> None:
        self._report = self._report.model_copy(update={"update_time": now()})
        write_atomically(self._run_dir / REPORT_FILE, self._report.encode(limit=64 * 1024))
        self._written = time.monotonic()
