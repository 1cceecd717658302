"""Fetch: bring all that training needs onto the pod's disk, in one process, before any training process starts.

The training processes then find everything local: none waits for another one's download at a barrier.
"""

from __future__ import annotations

import json
import logging

from finetune_api.document import JobDocument
from finetune_trainer import layout
from finetune_trainer.base_model import open_pinned
from finetune_trainer.checkpoints import fetch_newest
from finetune_trainer.layout import PodDisk
from finetune_trainer.plan import TrainingPlan, fetch_prepared, require_plan
from finetune_trainer.reporting import Reporter, write_atomically
from finetune_trainer.storage import open_folder

log = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
"""Beside the report: the plan, so that the training processes need no storage to start."""
RESUMED_FILE = "resumed.json"
"""Beside it: attempt and step of the checkpoint that is resumed from; zeros without one."""


def run(document: JobDocument, disk: PodDisk, reporter: Reporter) -> None:
    reporter.phase("Downloading")
    work = open_folder(document.work_uri, document.storage)
    if work.stat(layout.PUBLISHED) is not None:
        log.info("the result of this specification is published already; there is nothing to train")
        reporter.update(already_published=True)
        return
    plan = require_plan(document)
    model = open_pinned(plan.model, document.storage)
    fetch_prepared(work, plan, disk.data)
    checkpoint = fetch_newest(work, document, plan.data.train.sha256, disk.checkpoint)
    model.download(disk.base)
    write_atomically(disk.run / PLAN_FILE, plan.model_dump_json(by_alias=True).encode())
    resumed = checkpoint.step if checkpoint else 0
    found = [checkpoint.attempt, checkpoint.step] if checkpoint else [0, 0]
    write_atomically(disk.run / RESUMED_FILE, json.dumps(found).encode())
    reporter.update(resumed_from_step=resumed)
    log.info("base model and data are here; training starts from step %d", resumed)


def read_resumed(disk: PodDisk) -> tuple[int, int]:
    """Attempt and step of the checkpoint that this pod has fetched."""
    attempt, step = json.loads((disk.run / RESUMED_FILE).read_bytes())
    return attempt, step


def read_plan(disk: PodDisk) -> TrainingPlan:
    return TrainingPlan.model_validate_json((disk.run / PLAN_FILE).read_bytes())
