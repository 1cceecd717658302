"""Names of the work files below `document.work_uri`, and of the files a pod keeps on its own disk.

prepare/job.json                          names the job that all this belongs to
prepare/plan.json, train.arrow, validation.arrow
prepare/report.md, report.json            the data report
evaluation/base.json                      measured once, never overwritten
evaluation/reference-<set>-<format>.safetensors   what the base says of the answers, computed once
train/<attempt>/checkpoints/<step>/…      manifest.json last
train/<attempt>/final/…                   manifest.json last
train/<attempt>/checkpoints/<step>/part-<node>-<life>.json   what another pod has added to it
<stage>/<attempt>/report.json, log.txt
<stage>/<attempt>/report-<node>.json, log-<node>.txt         of further pods

`finetune gc` removes only what has one of these names: finetune_operator/cli/gc.py knows them, too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from finetune_api.names import ENV_WORK_DIR, WORK_MOUNT, Stage

PREPARE = "prepare"
PLAN = f"{PREPARE}/plan.json"
DATA_REPORT = f"{PREPARE}/report.md"
DATA_REPORT_JSON = f"{PREPARE}/report.json"
PUBLISHED = f"{PREPARE}/published.json"
"""Exists when prepare found the result of the same specification at output.uri."""
BASE_EVALUATION = "evaluation/base.json"
MANIFEST = "manifest.json"
LOG_FILE = "log.txt"


def reference(name: str, compute: str) -> str:
    """Log-probabilities of a set's answers under the base, in the number format of the training."""
    return f"evaluation/reference-{name}-{compute.lower()}.safetensors"


def attempt_prefix(stage: Stage, attempt: int) -> str:
    return f"{stage}/{attempt}"


def checkpoints_prefix(attempt: int) -> str:
    return f"{attempt_prefix(Stage.TRAIN, attempt)}/checkpoints"


def final_prefix(attempt: int) -> str:
    return f"{attempt_prefix(Stage.TRAIN, attempt)}/final"


def last_words(node: int) -> tuple[str, str]:
    """Names of the log and the report of one of the attempt's pods."""
    suffix = f"-{node}" if node else ""
    return f"log{suffix}.txt", f"report{suffix}.json"


@dataclass(frozen=True)
class PodDisk:
    """The pod's own disk. It is gone with the pod."""

    root: Path

    @classmethod
    def from_environment(cls) -> PodDisk:
        return cls(Path(os.environ.get(ENV_WORK_DIR, WORK_MOUNT)))

    @property
    def base(self) -> Path:
        """The base model."""
        return self.root / "base"

    @property
    def data(self) -> Path:
        """Downloaded rows, or the prepared set."""
        return self.root / "data"

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that training resumes from."""
        return self.root / "checkpoint"

    @property
    def training(self) -> Path:
        """Where the trainer writes checkpoints before they are uploaded."""
        return self.root / "training"

    @property
    def final(self) -> Path:
        """What training hands over to export."""
        return self.root / "final"

    @property
    def quantized(self) -> Path:
        """The 4-bit base, on its way to storage."""
        return self.root / "quantized"

    @property
    def output(self) -> Path:
        """The model as it will be published."""
        return self.root / "output"

    @property
    def run(self) -> Path:
        """Where the agent and its children meet: report, failures, log."""
        return self.root / "run"
