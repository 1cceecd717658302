"""Checkpoints in storage: found, fetched, written in the background, and rotated.

A checkpoint lives under the attempt that wrote it, so that a process of an old attempt that nobody managed to kill
cannot change what a newer attempt reads. A reader looks only at the attempts its document names.
"""

from __future__ import annotations

import logging
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.document import JobDocument
from finetune_api.failures import FailureClass, JobError
from finetune_api.status import CheckpointResult
from finetune_trainer import bundle, layout
from finetune_trainer.bundle import BundleFile
from finetune_trainer.reporting import Reporter, now
from finetune_trainer.storage import Folder
from finetune_trainer.storage.base import BrokenObject

log = logging.getLogger(__name__)

PART_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class StoredCheckpoint:
    attempt: int
    step: int

    @property
    def prefix(self) -> str:
        return f"{layout.checkpoints_prefix(self.attempt)}/{self.step}"


def find(work: Folder, attempts: list[int]) -> list[StoredCheckpoint]:
    """Complete checkpoints of these attempts, the most advanced first; of equal ones that of the newest attempt."""
    found = []
    for attempt in attempts:
        prefix = layout.checkpoints_prefix(attempt)
        for info in work.list(f"{prefix}/"):
            step, _, name = info.key.removeprefix(f"{prefix}/").partition("/")
            if name == layout.MANIFEST and step.isdigit():
                found.append(StoredCheckpoint(attempt, int(step)))
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.attempt), reverse=True)


def fetch_newest(work: Folder, document: JobDocument, data_sha256: str, target: Path) -> StoredCheckpoint | None:
    """Download the newest usable checkpoint of this attempt and the earlier ones its document names.

    One that turns out broken is passed over for the next, and said so.
    """
    for checkpoint in find(work, [document.attempt, *document.earlier_attempts]):
        stored = bundle.read(work, checkpoint.prefix)
        problem = "its manifest cannot be read"
        if stored is not None:
            if stored.facts.get("data") != data_sha256:
                problem = "it was trained on other data"
            else:
                try:
                    bundle.download(work, checkpoint.prefix, stored, target)
                    return checkpoint
                except JobError as error:
                    if not isinstance(error, BrokenObject) and error.failure_class is not FailureClass.NOT_FOUND:
                        # The storage's trouble, not the checkpoint's: another attempt may read it.
                        raise
                    problem = error.message
        log.warning("checkpoint %s/%s is not used: %s", work.uri, checkpoint.prefix, problem)
        shutil.rmtree(target, ignore_errors=True)
    return None


class CheckpointUploader:
    """Uploads checkpoints on one thread while training goes on; keeps the last few of its attempt.

    A failed upload does not stop training: it is reported, and the next checkpoint tries again.

    Of several pods each uploads what its processes wrote and says so in a part of its own; the first one waits for
    all parts, and writes the manifest.
    """

    def __init__(
        self,
        work: Folder,
        document: JobDocument,
        reporter: Reporter | None,
        facts: dict[str, Any],
        node: int = 0,
        life: int = 0,
    ) -> None:
        """
        Args:
            reporter: of the main process; the other pods have none.
            node: which of the attempt's pods this is.
            life: a number that all pods have drawn together. Parts of pods that ran before under the name of this
                attempt do not count.
        """
        self._work = work
        self._document = document
        self._reporter = reporter
        self._facts = facts
        self._node = node
        self._life = life
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-upload")
        self._running: Future[None] | None = None
        self._stored = sorted(checkpoint.step for checkpoint in find(work, [document.attempt]))

    @property
    def newest(self) -> int | None:
        """Step of the newest checkpoint of this attempt that is stored."""
        return self._stored[-1] if self._stored else None

    def submit(self, folder: Path, step: int, save_seconds: float) -> None:
        """Upload the checkpoint in `folder` and remove it from the disk. Waits for the upload before it, so that at
        most one is under way."""
        self.wait()
        self._running = self._pool.submit(self._upload, folder, step, save_seconds)

    def wait(self) -> None:
        """Return when nothing is under way."""
        if self._running is not None:
            self._running.result()
            self._running = None

    def close(self) -> None:
        self.wait()
        self._pool.shutdown()

    def _upload(self, folder: Path, step: int, save_seconds: float) -> None:
        started = time.monotonic()
        checkpoint = StoredCheckpoint(self._document.attempt, step)
        # A pickle that nobody reads, and the one file in a checkpoint that could carry code.
        (folder / "training_args.bin").unlink(missing_ok=True)
        try:
            files = bundle.upload_files(folder, self._work, checkpoint.prefix)
            if self._node > 0:
                bundle.publish_part(self._work, checkpoint.prefix, self._part(self._node), files)
            else:
                files += self._await_parts(checkpoint.prefix)
                bundle.publish(self._work, checkpoint.prefix, files, {**self._facts, "step": step})
        except JobError as error:
            log.error("the checkpoint of step %d was not stored: %s", step, error.message)
            if self._reporter:
                failures = (self._reporter.report.checkpoint_failures or 0) + 1
                self._reporter.update(checkpoint_failures=failures)
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if self._reporter is None:
            return
        seconds = save_seconds + time.monotonic() - started
        self._reporter.update(
            checkpoint=CheckpointResult(
                step=step, uri=f"{self._work.uri}/{checkpoint.prefix}", time=now(), save_seconds=f"{seconds:.1f}"
            )
        )
        grace = self._document.spec.checkpoint.grace_period_seconds
        if seconds > grace:
            log.warning(
                "saving a checkpoint took %.0f s, but a pod that is stopped has %d s: raise "
                "checkpoint.gracePeriodSeconds, or steps will be lost",
                seconds,
                grace,
            )
        log.info("checkpoint of step %d stored in %.1f s", step, seconds)
        self._rotate(step)

    def _part(self, node: int) -> str:
        return f"{node}-{self._life}"

    def _await_parts(self, prefix: str) -> list[BundleFile]:
        # Half of the time that a pod has when it is stopped, for all together: what never comes must not take it all.
        seconds = self._document.spec.checkpoint.grace_period_seconds / 2
        deadline = time.monotonic() + seconds
        files: list[BundleFile] = []
        for node in range(1, self._document.nodes):
            while (part := bundle.read_part(self._work, prefix, self._part(node))) is None:
                if time.monotonic() > deadline:
                    raise JobError(
                        FailureClass.STORAGE_UNAVAILABLE, f"Pod {node} has not stored its part in {seconds:g} s."
                    )
                time.sleep(PART_POLL_SECONDS)
            files += part
        return files

    def _rotate(self, step: int) -> None:
        self._stored = [*(old for old in self._stored if old != step), step]
        while len(self._stored) > self._document.spec.checkpoint.keep_last:
            old = self._stored.pop(0)
            try:
                bundle.delete(self._work, StoredCheckpoint(self._document.attempt, old).prefix)
            except JobError as error:
                log.warning("the old checkpoint of step %d was not deleted: %s", old, error.message)
