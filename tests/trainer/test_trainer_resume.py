"""An interrupted training ends in the weights of an unbroken one, bit by bit; broken checkpoints are passed over."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trained
from safetensors.torch import load_file
from trainer_lab import INJECT, AgentRun, Bucket, TestJob
from trainer_servers import Fault, MotoServer, Proxy

from finetune_api.failures import FailureClass, JobError
from finetune_api.report import Outcome
from finetune_api.status import CheckpointResult
from finetune_trainer import bundle, checkpoints, models
from finetune_trainer.checkpoints import CheckpointUploader, StoredCheckpoint, fetch_newest
from finetune_trainer.errors import classify
from finetune_trainer.plan import require_plan
from finetune_trainer.reporting import Reporter, now
from finetune_trainer.storage import Folder, open_folder
from finetune_trainer.storage.base import BrokenObject

MakeJob = Callable[..., TestJob]


def settings(adapter: str) -> dict[str, Any]:
    """Two steps of accumulation, three passes over the data, and dropout where there is one: all that has a state."""
    lora = {} if adapter == "Full" else {"lora": {"dropout": "0.1"}}
    return {
        "method": {"adapter": {"type": adapter, **lora}},
        "hyperparameters": {"maxSteps": 12, "batchSize": 12, "microBatchSize": 6, "warmupRatio": "0.2"},
        "checkpoint": {"everySteps": 2},
    }


def start(job: TestJob, attempt: int, earlier: tuple[int, ...], patch: str, pause_at: int) -> tuple[AgentRun, Path]:
    """A train pod that halts at a step."""
    module, script = patch.split(":")
    marker = job.root / f"halted-{attempt}"
    environment = {
        "TEST_INJECT": f"{module}={INJECT / script}",
        "TEST_PAUSE_AT": str(pause_at),
        "TEST_MARKER": str(marker),
    }
    run = job.agent("train", attempt, earlier, environment=environment)
    run.until(marker.exists)
    return run, marker


STEP = "finetune_trainer.training:pause_before_step.py"
MANIFEST = "finetune_trainer.bundle:pause_before_manifest.py"


def is_stored(job: TestJob, attempt: int, step: int) -> bool:
    return f"{job.work}/train/{attempt}/checkpoints/{step}/manifest.json" in job.bucket.keys(job.work)


def handed_over(job: TestJob, attempt: int, target: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The trained weights, and the losses of all steps."""
    prefix = f"{job.work}/train/{attempt}/final"
    job.bucket.fetch_folder(prefix, target)
    folder = target / ("adapter" if (target / "adapter").is_dir() else "weights")
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    history = [json.loads(line) for line in (target / "history.jsonl").read_text().splitlines()]
    return tensors, [
        {name: entry[name] for name in ("step", "loss", "grad_norm", "learning_rate")}
        for entry in history
        if "loss" in entry
    ]


def interrupted_once(job: TestJob) -> None:
    """Attempt 1 is told to stop in its sixth step, and stops after it."""
    run, _ = start(job, 1, (), STEP, 5)
    run.signal(signal.SIGTERM)
    assert run.wait() == 75, run.text()
    report = run.report
    assert report.outcome is Outcome.FAILED
    assert report.failure is not None
    assert report.failure.failure_class is FailureClass.TERMINATED
    assert report.failure.message == ("The pod was stopped from outside after step 6 of 12; a checkpoint was saved.")
    assert report.checkpoint is not None
    assert report.checkpoint.step == 6
    assert is_stored(job, 1, 6)
    assert f"{job.work}/train/1/final/manifest.json" not in job.bucket.keys(job.work)
    stored = job.bucket.json(f"{job.work}/train/1/report.json")
    assert stored["failure"]["class"] == "Terminated"


def child_killed(job: TestJob) -> None:
    """In attempt 2 the training process dies at once, after the checkpoint of step 8."""
    run, _ = start(job, 2, (1,), STEP, 9)
    run.until(lambda: run.report.resumed_from_step == 6)
    run.until(lambda: is_stored(job, 2, 8))
    (child,) = run.children()
    os.kill(child, signal.SIGKILL)
    assert run.wait() == 70, run.text()
    assert run.report.failure is not None
    assert run.report.failure.message == "The process was killed (SIGKILL) by something outside it."
    assert run.report.failure.rank == 0


def all_killed(job: TestJob) -> None:
    """In attempt 2 the whole pod dies while the checkpoint of step 10 is on its way."""
    run, _ = start(job, 2, (1,), MANIFEST, 10)
    run.until(lambda: run.report.checkpoint is not None and run.report.checkpoint.step == 8)
    run.kill_all()
    assert is_stored(job, 2, 8)
    assert not is_stored(job, 2, 10)
    assert f"{job.work}/train/2/checkpoints/10/optimizer.pt" in job.bucket.keys(job.work)
    # What the pod leaves behind: the report of its last moment.
    assert run.report.outcome is Outcome.RUNNING
    # The steps after 10 went on beside the halted upload; the last of them may wait for it.
    assert run.report.phase in ("Training", "Saving")
    assert run.report.progress is not None
    assert run.report.progress.step >= 8


@pytest.mark.parametrize(
    ("adapter", "second_end"), [("Full", child_killed), ("LoRA", all_killed), ("QLoRA", child_killed)]
)
def test_interrupted_training_ends_in_the_same_weights(
    train: Callable[..., Trained],
    make_job: MakeJob,
    adapter: str,
    second_end: Callable[[TestJob], None],
    tmp_path: Path,
) -> None:
    unbroken = train(**settings(adapter))
    job = make_job(**settings(adapter))
    job.run("prepare")
    interrupted_once(job)
    second_end(job)
    report = job.run("train", 3, (2, 1))
    assert report.resumed_from_step == 8
    assert report.progress is not None
    assert unbroken.report.progress is not None
    assert report.progress.trained_tokens == unbroken.report.progress.trained_tokens
    weights, losses = handed_over(job, 3, tmp_path / "interrupted")
    expected_weights, expected_losses = handed_over(unbroken.job, 1, tmp_path / "unbroken")
    assert [entry["step"] for entry in expected_losses] == list(range(1, 13))
    assert losses == expected_losses
    assert weights.keys() == expected_weights.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected_weights[name])] == []
    # The base was measured once, by the first attempt.
    assert report.evaluation is not None
    assert report.evaluation == unbroken.report.evaluation


def test_a_smaller_micro_batch_goes_on_with_the_same_rows(
    train: Callable[..., Trained], make_job: MakeJob, tmp_path: Path
) -> None:
    """After the GPU ran out of memory: the losses of all steps are those of the run before, but for rounding."""
    unbroken = train(**settings("Full"))
    job = make_job(**settings("Full"))
    job.run("prepare")
    interrupted_once(job)
    job.overrides["micro_batch_limit"] = 3
    report = job.run("train", 2, (1,))
    assert report.resumed_from_step == 6
    assert report.resolved is not None
    assert (report.resolved.micro_batch_size, report.resolved.gradient_accumulation_steps) == (3, 4)
    _, losses = handed_over(job, 2, tmp_path / "smaller")
    _, expected = handed_over(unbroken.job, 1, tmp_path / "unbroken")
    assert [entry["step"] for entry in losses] == list(range(1, 13))
    assert [entry["loss"] for entry in losses] == pytest.approx([entry["loss"] for entry in expected], rel=1e-3)


def test_sigterm_before_the_first_step(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to save, and it is not said that there was."""
    job = make_job()
    job.run("prepare")
    load = models.load_for_training

    def stopped_while_loading(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return load(*arguments)

    monkeypatch.setattr(models, "load_for_training", stopped_while_loading)
    with pytest.raises(JobError, match=r"^The pod was stopped from outside before a step was made\.$") as caught:
        job.run("train")
    assert caught.value.failure_class is FailureClass.TERMINATED
    assert job.bucket.keys(f"{job.work}/train/") == []


def test_the_last_checkpoints_are_kept(trained: Callable[[str], Trained]) -> None:
    """Of every third step of twelve the last two, and no file of the others."""
    job = trained("LoRA").job
    prefix = f"{job.work}/train/1/checkpoints/"
    assert {key.removeprefix(prefix).split("/")[0] for key in job.bucket.keys(prefix)} == {"9", "12"}
    report = trained("LoRA").report
    assert report.checkpoint == CheckpointResult(
        step=12,
        uri=job.bucket.uri(f"{prefix}12"),
        time=report.checkpoint.time if report.checkpoint else None,
        save_seconds=report.checkpoint.save_seconds if report.checkpoint else None,
    )


def test_a_checkpoint_holds_no_pickled_arguments(trained: Callable[[str], Trained]) -> None:
    job = trained("LoRA").job
    names = {key.rpartition("/")[2] for key in job.bucket.keys(f"{job.work}/train/1/checkpoints/12/")}
    assert "training_args.bin" not in names
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names


DATA = "d" * 64


@pytest.fixture
def job(make_job: MakeJob) -> TestJob:
    return make_job()


@pytest.fixture
def work(job: TestJob) -> Folder:
    return open_folder(job.bucket.uri(job.work), job.bucket.settings)


def store(work: Folder, tmp_path: Path, attempt: int, step: int, data: str = DATA, content: bytes = b"state") -> str:
    """A small checkpoint; its prefix."""
    folder = tmp_path / f"{attempt}-{step}"
    folder.mkdir()
    (folder / "trainer_state.json").write_bytes(content)
    (folder / "optimizer.pt").write_bytes(b"optimizer")
    prefix = StoredCheckpoint(attempt, step).prefix
    bundle.publish(work, prefix, bundle.upload_files(folder, work, prefix), {"data": data, "step": step})
    return prefix


class TestWhichCheckpoint:
    def newest(self, job: TestJob, work: Folder, target: Path, attempt: int, *earlier: int) -> tuple[int, int] | None:
        found = fetch_newest(work, job.document("train", attempt, earlier), DATA, target)
        assert target.exists() == (found is not None)
        return (found.attempt, found.step) if found else None

    def test_none(self, job: TestJob, work: Folder, tmp_path: Path) -> None:
        assert self.newest(job, work, tmp_path / "x", 1) is None

    def test_the_most_advanced_one(self, job: TestJob, work: Folder, tmp_path: Path) -> None:
        for attempt, step in ((1, 90), (1, 100), (2, 95), (2, 20)):
            store(work, tmp_path, attempt, step)
        assert self.newest(job, work, tmp_path / "x", 3, 2, 1) == (1, 100)
        assert (tmp_path / "x" / "trainer_state.json").read_bytes() == b"state"

    def test_of_equal_ones_that_of_the_newest_attempt(self, job: TestJob, work: Folder, tmp_path: Path) -> None:
        store(work, tmp_path, 1, 10, content=b"old")
        store(work, tmp_path, 2, 10, content=b"new")
        assert self.newest(job, work, tmp_path / "x", 3, 1, 2) == (2, 10)

    def test_that_of_this_attempt_when_its_pod_was_restarted(self, job: TestJob, work: Folder, tmp_path: Path) -> None:
        store(work, tmp_path, 2, 10)
        assert self.newest(job, work, tmp_path / "x", 2) == (2, 10)

    def test_only_attempts_that_the_document_names(self, job: TestJob, work: Folder, tmp_path: Path) -> None:
        """A process of an old attempt that nobody could kill may write what it likes."""
        store(work, tmp_path, 1, 10)
        store(work, tmp_path, 2, 999)
        store(work, tmp_path, 11, 999)
        assert self.newest(job, work, tmp_path / "x", 3, 1) == (1, 10)

    @pytest.mark.parametrize("harm", ["no manifest", "manifest cut", "file missing", "file changed", "other data"])
    def test_a_broken_one_is_passed_over(
        self, job: TestJob, work: Folder, tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        store(work, tmp_path, 1, 10)
        prefix = store(work, tmp_path, 2, 20, data="e" * 64 if harm == "other data" else DATA)
        if harm == "no manifest":
            work.delete([f"{prefix}/manifest.json"])
        elif harm == "manifest cut":
            work.write(f"{prefix}/manifest.json", b'{"files": [')
        elif harm == "file missing":
            work.delete([f"{prefix}/optimizer.pt"])
        elif harm == "file changed":
            work.write(f"{prefix}/optimizer.pt", b"optimizeR")
        assert self.newest(job, work, tmp_path / "x", 3, 2, 1) == (1, 10)
        assert (tmp_path / "x" / "optimizer.pt").read_bytes() == b"optimizer"
        # It is said why; one without a manifest does not exist.
        assert (f"{prefix} is not used: " in caplog.text) == (harm != "no manifest")

    def test_when_all_are_broken_training_starts_anew(self, job: TestJob, work: Folder, tmp_path: Path) -> None:
        store(work, tmp_path, 1, 10, data="e" * 64)
        assert self.newest(job, work, tmp_path / "x", 2, 1) is None


class TestUploader:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"optimizer")
        return folder

    def uploader(self, job: TestJob, work: Folder, attempt: int) -> tuple[CheckpointUploader, Reporter]:
        document = job.document("train", attempt)
        reporter = Reporter(document, job.disk("train", attempt).run)
        return CheckpointUploader(work, document, reporter, {"data": DATA}), reporter

    def test_it_does_not_touch_other_attempts(self, job: TestJob, work: Folder, tmp_path: Path, folder: Path) -> None:
        for step in (1, 2, 3):
            store(work, tmp_path, 2, step)
        before = set(work.list("train/2/"))
        uploader, _ = self.uploader(job, work, 1)
        uploader.submit(folder, 50, 0.0)
        uploader.close()
        assert set(work.list("train/2/")) == before
        assert checkpoints.find(work, [1]) == [StoredCheckpoint(1, 50)]

    def test_a_restarted_attempt_rotates_what_it_finds(
        self, job: TestJob, work: Folder, tmp_path: Path, folder: Path
    ) -> None:
        for step in (5, 10):
            store(work, tmp_path, 1, step)
        uploader, reporter = self.uploader(job, work, 1)
        before = now()
        uploader.submit(folder, 15, 0.5)
        uploader.close()
        assert [checkpoint.step for checkpoint in checkpoints.find(work, [1])] == [15, 10]
        assert work.list("train/1/checkpoints/5/") == []
        assert reporter.report.checkpoint is not None
        assert reporter.report.checkpoint.step == 15
        assert before <= (reporter.report.checkpoint.time or "") <= now()
        assert float(reporter.report.checkpoint.save_seconds or 0) >= 0.5
        assert not folder.exists()

    def test_a_failed_upload_is_counted_and_training_goes_on(
        self, job: TestJob, inputs: Bucket, moto: MotoServer, folder: Path
    ) -> None:
        with Proxy(moto.endpoint) as proxy:
            body = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
            proxy.faults.append(Fault(lambda request: request.method == "PUT", times=1, answer=(403, body)))
            settings = inputs.settings.model_copy(update={"endpoint": proxy.endpoint})
            work = open_folder(job.bucket.uri(job.work), settings)
            uploader, reporter = self.uploader(job, work, 1)
            uploader.submit(folder, 5, 0.0)
            uploader.wait()
            assert reporter.report.checkpoint_failures == 1
            assert reporter.report.checkpoint is None
            folder.mkdir()
            (folder / "optimizer.pt").write_bytes(b"optimizer")
            uploader.submit(folder, 10, 0.0)
            uploader.close()
            assert [checkpoint.step for checkpoint in checkpoints.find(work, [1])] == [10]
        assert reporter.report.checkpoint_failures == 1

    def test_a_deleted_bundle_never_looks_whole(self, job: TestJob, moto: MotoServer, tmp_path: Path) -> None:
        """Its manifest goes first."""
        with Proxy(moto.endpoint) as proxy:
            work = open_folder(
                job.bucket.uri(job.work), job.bucket.settings.model_copy(update={"endpoint": proxy.endpoint})
            )
            prefix = store(work, tmp_path, 1, 10)
            bundle.delete(work, prefix)
            deleted = [request.path for request in proxy.requests if request.method == "DELETE"]
        assert deleted[0].endswith("/manifest.json")
        assert len(deleted) == 3
        assert job.bucket.keys(f"{job.work}/{prefix}") == []


@pytest.mark.parametrize(
    ("problem", "passed_over"),
    [
        (BrokenObject("other bytes"), True),
        (JobError(FailureClass.NOT_FOUND, "deleted"), True),
        (JobError(FailureClass.STORAGE_UNAVAILABLE, "slow down"), False),
        (JobError(FailureClass.ACCESS_DENIED, "no"), False),
    ],
)
def test_only_a_broken_checkpoint_is_passed_over(
    trained: Callable[[str], Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    problem: JobError,
    passed_over: bool,
) -> None:
    """A storage that is down for a moment must not send training back to an older step, or to the first."""
    job = trained("LoRA").job
    document = job.document("train", 2, (1,))
    work = open_folder(document.work_uri, document.storage)
    sha256 = require_plan(document).data.train.sha256
    newest = fetch_newest(work, document, sha256, tmp_path / "whole")
    assert newest is not None
    original = bundle.download

    def download(folder: Folder, prefix: str, stored: bundle.Bundle, target: Path) -> None:
        if prefix == newest.prefix:
            raise problem
        original(folder, prefix, stored, target)

    monkeypatch.setattr(bundle, "download", download)
    if passed_over:
        found = fetch_newest(work, document, sha256, tmp_path / "older")
        assert found is not None
        assert found.step < newest.step
    else:
        with pytest.raises(JobError) as caught:
            fetch_newest(work, document, sha256, tmp_path / "older")
        assert caught.value is problem


def test_torch_on_a_full_disk() -> None:
    """It has no type and no number for it: should the words change, this is where it shows."""
    with pytest.raises(RuntimeError) as caught:
        torch.save({"weights": torch.ones(1000)}, "/dev/full")
    assert classify(caught.value)[0] is FailureClass.DISK_FULL
