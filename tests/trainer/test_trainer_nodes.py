"""Training on several nodes: pods as processes, each with its agent, an address and a disk of its own."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainer_agent import HANG, PRELUDE
from trainer_lab import INJECT, AgentRun, Nodes, TestJob, step_source

from finetune_api.failures import FailureClass
from finetune_api.report import Outcome, ReportedFailure, decode
from finetune_trainer import bundle
from finetune_trainer.checkpoints import CheckpointUploader, find
from finetune_trainer.peers import PATH, Peers
from finetune_trainer.reporting import Reporter
from finetune_trainer.storage import Folder, open_folder

MakeJob = Callable[..., TestJob]
IMPATIENT = """
def apply(agent):
    agent.HOLD_SECONDS = {hold}
    agent.PEER_GRACE_SECONDS = 0.5
    peers = agent.peers
    peers.BEAT_SECONDS = 0.1
    peers.SILENCE_SECONDS = {silence}
    peers.SILENCE_SECONDS_AT_THE_END = {at_the_end}
"""
EVER = 3600.0


@pytest.fixture
def job(make_job: MakeJob) -> TestJob:
    return make_job()


@pytest.fixture
def nodes(job: TestJob, tmp_path: Path) -> Callable[..., Nodes]:
    """Pods whose steps are the test's own, as in the tests of the agent."""

    def build(
        train: str,
        fetch: str = "pass",
        silence: float = EVER,
        at_the_end: float = EVER,
        hold: float = 15,
        **options: Any,
    ) -> Nodes:
        source, patch = tmp_path / "stages.py", tmp_path / "impatient.py"
        source.write_text(PRELUDE + step_source("fetch", fetch) + step_source("train", train))
        patch.write_text(IMPATIENT.format(silence=silence, at_the_end=at_the_end, hold=hold))
        environment = {
            "TEST_INJECT": f"finetune_trainer.layout={INJECT / 'stages_of_the_test.py'}",
            "TEST_STAGES": str(source),
            "TEST_INJECT_ALSO": f"finetune_trainer.agent={patch}",
        }
        return job.nodes(environment=environment, **options)

    return build


def failure_of(run: AgentRun) -> ReportedFailure:
    failure = run.report.failure
    assert failure is not None
    return failure


def has_fetched(run: AgentRun) -> bool:
    report = decode(run.message)
    return report is not None and report.phase == "WaitingForNodes"


def has_ended(run: AgentRun) -> bool:
    """Its work is over, and the pod may still be there."""
    report = decode(run.message)
    return report is not None and report.outcome is not Outcome.RUNNING and report.log_uri is not None


class TestMeeting:
    def test_the_variables_that_torch_reads(self, nodes: Callable[..., Nodes]) -> None:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
        pods = nodes(f"print(*[os.environ[n] for n in {names}])", processes=2)
        runs = pods.start_all()
        assert [run.wait() for run in runs] == [0, 0], [run.text() for run in runs]
        meeting = f"{pods.addresses[0]} {pods.port}"
        lines = {line for run in runs for line in run.text().splitlines() if meeting in line}
        assert lines == {
            f"[rank 0] 0 0 4 2 0 {meeting}",
            f"[rank 1] 1 1 4 2 0 {meeting}",
            f"[rank 2] 2 0 4 2 1 {meeting}",
            f"[rank 3] 3 1 4 2 1 {meeting}",
        }

    @pytest.mark.parametrize("there", [0, 1])
    def test_a_pod_that_never_comes(self, nodes: Callable[..., Nodes], there: int) -> None:
        run = nodes("print('trained alone')", stall_seconds=1).start(there)
        run.until(lambda: has_ended(run))
        assert run.report.phase == "WaitingForNodes"
        failure = failure_of(run)
        assert failure.failure_class is FailureClass.COMMUNICATION
        assert failure.message.startswith(f"Pod {1 - there} of the attempt did not come in 1 s")
        assert "trained alone" not in run.text()
        run.kill_all()

    def test_a_pod_that_still_fetches_is_waited_for(self, nodes: Callable[..., Nodes], tmp_path: Path) -> None:
        """Longer than for one that is not there: it will come."""
        fetched = tmp_path / "fetched"
        pods = nodes(
            "print('trains')",
            fetch=f"""
            if os.environ['JOB_COMPLETION_INDEX'] == '1':
                wait_for(pathlib.Path({str(fetched)!r}).exists)
            """,
            stall_seconds=6,
            count=3,
        )
        runs = pods.start_all()
        for run in (runs[0], runs[2]):
            run.until(lambda run=run: has_fetched(run))
        time.sleep(8)
        assert [run.process.poll() for run in runs] == [None] * 3, [run.text() for run in runs]
        assert not any("trains" in run.text() for run in runs), "all begin together"
        fetched.touch()
        assert [run.wait() for run in runs] == [0, 0, 0], [run.text() for run in runs]

    def test_a_pod_that_is_gone_before_it_was_ready(self, nodes: Callable[..., Nodes]) -> None:
        first, second = nodes(
            "pass", fetch="wait_for(lambda: os.environ['JOB_COMPLETION_INDEX'] == '0')", silence=5, stall_seconds=3600
        ).start_all()
        for run in (first, second):
            run.until(lambda run=run: run.children() or has_fetched(run))
        time.sleep(1)
        second.kill_all()
        first.until(lambda: has_ended(first))
        assert failure_of(first).failure_class is FailureClass.COMMUNICATION
        assert failure_of(first).message == "Pod 1 of the attempt did not answer for 5 s."
        first.kill_all()

    def test_processes_that_do_not_reach_each_other(self, nodes: Callable[..., Nodes]) -> None:
        """The agents do: a network policy may know of their port only."""
        first, second = nodes(
            f"""
            if RANK == 0:
                reporter.phase('Connecting')
            {HANG}
            """,
            stall_seconds=10,
        ).start_all()
        first.until(lambda: has_ended(first))
        assert failure_of(first).failure_class is FailureClass.COMMUNICATION
        assert "Let the network policy allow all ports between the pods" in failure_of(first).message
        assert first.children() == []
        first.kill_all()
        second.kill_all()

    def test_a_pod_that_is_stopped_while_it_waits(self, nodes: Callable[..., Nodes]) -> None:
        run = nodes("print('trained alone')").start(0)
        run.until(lambda: has_fetched(run))
        run.signal(signal.SIGTERM)
        assert run.wait() == 75

    def test_words_of_another_attempt_do_not_count(self, job: TestJob) -> None:
        peers = Peers(job.document("train", 2, nodes=3), 0, "a", "unused")
        ours, pod = f"uid={job.uid}&attempt=2", "node=1&pod=b"
        for query in (f"uid={job.uid}&attempt=1&{pod}", f"uid=other&attempt=2&{pod}", ours, f"{ours}&node=1", pod, ""):
            assert not peers.hear(query)
        assert not peers.hear(f"{ours}&node=3&pod=b"), "there are three, counted from 0"
        assert peers.missing == [1, 2]
        assert peers.hear(f"{ours}&node=2&pod=b")
        assert peers.missing == [1]

    def test_a_pod_alone_hears_nobody(self, nodes: Callable[..., Nodes], job: TestJob) -> None:
        run = nodes("wait_for(lambda: False)", count=1).start(0)
        run.until(lambda: run.message)
        status, _, _ = run.get(f"{PATH}?uid={job.uid}&attempt=1&node=1&pod=b")
        run.kill_all()
        assert status == 404


class TestEnds:
    def test_the_pod_that_failed_ends_first(self, nodes: Callable[..., Nodes]) -> None:
        """The other one lost it, and waits to be told so, for the Job names the first pod that ends."""
        pods = nodes(
            """
            if RANK == 1:
                raise JobError(FailureClass.LOSS_DIVERGED, 'nan')
            raise JobError(FailureClass.COMMUNICATION, 'The training processes lost each other.')
            """,
            hold=5,
        )
        first, second = pods.start_all()
        assert second.wait() == 82
        assert (failure_of(second).failure_class, failure_of(second).rank) == (FailureClass.LOSS_DIVERGED, 1)
        first.until(lambda: has_ended(first))
        assert failure_of(first).failure_class is FailureClass.COMMUNICATION
        assert first.wait() == 84, "nobody has told it to stop"

    def test_last_words_of_each_pod_are_kept(self, nodes: Callable[..., Nodes], job: TestJob) -> None:
        runs = nodes("print('rank', RANK)").start_all()
        assert [run.wait() for run in runs] == [0, 0]
        for suffix, rank in (("", 0), ("-1", 1)):
            text = job.bucket.get(f"{job.work}/train/1/log{suffix}.txt").decode()
            assert f"[rank {rank}] rank {rank}" in text
            assert job.bucket.json(f"{job.work}/train/1/report{suffix}.json")["outcome"] == "Succeeded"

    @pytest.mark.parametrize("lost", [0, 1])
    def test_a_node_that_is_gone_is_noticed(self, nodes: Callable[..., Nodes], lost: int) -> None:
        """Its processes halt and its connections stay: as when a cable is pulled."""
        runs = nodes(f"print('ready'); {HANG}", silence=5).start_all()
        for run in runs:
            run.until(lambda run=run: "ready" in run.text())
        runs[lost].signal(signal.SIGSTOP)
        other = runs[1 - lost]
        other.until(lambda: has_ended(other))
        assert failure_of(other).failure_class is FailureClass.COMMUNICATION
        assert failure_of(other).message == f"Pod {lost} of the attempt did not answer for 5 s."
        assert other.children() == []
        other.signal(signal.SIGTERM)
        assert other.wait() == 75
        runs[lost].kill_all()

    def test_what_the_first_pod_does_alone_needs_no_other(self, nodes: Callable[..., Nodes]) -> None:
        """The others end when all has been saved on their side, and the first one has more to do."""
        first, second = nodes(
            """
            if RANK == 1:
                wait_for((disk.run.parent.parent / 'saving').exists)
            else:
                reporter.phase('Saving')
                (disk.run.parent.parent / 'saving').touch()
                started = time.monotonic()
                wait_for(lambda: time.monotonic() - started > 9)
            """,
            silence=5,
        ).start_all()
        assert second.wait() == 0, second.text()
        assert first.wait() == 0, first.text()

    def test_a_pod_that_is_removed_does_not_wait_for_one_that_is_gone(self, nodes: Callable[..., Nodes]) -> None:
        """It hangs in a collective and does not hear SIGTERM; the grace period would be two minutes."""
        first, second = nodes(f"print('ready'); {HANG}", at_the_end=2).start_all()
        for run in (first, second):
            run.until(lambda run=run: "ready" in run.text())
        second.kill_all()
        time.sleep(3)
        assert first.process.poll() is None, "a minute has not passed"
        first.signal(signal.SIGTERM)
        assert first.wait(60) == 75
        assert failure_of(first).failure_class is FailureClass.TERMINATED
        assert failure_of(first).message == "Pod 1 of the attempt did not answer for 2 s."

    def test_a_pod_that_was_not_told_to_stop_may_save(self, nodes: Callable[..., Nodes]) -> None:
        """Of its processes only the first has something to save; the others are gone long before it."""
        first, second = nodes(
            """
            told = []
            signal.signal(signal.SIGTERM, lambda *_: told.append(1))
            if RANK == 0:
                time.sleep(3)
                raise JobError(FailureClass.TERMINATED, 'interrupted' if told else 'a checkpoint was saved')
            raise JobError(FailureClass.TERMINATED, 'stopped')
            """,
            processes=2,
        ).start_all()
        first.until(lambda: has_ended(first))
        failure = failure_of(first)
        assert (failure.failure_class, failure.message) == (FailureClass.TERMINATED, "a checkpoint was saved")
        first.kill_all()
        second.kill_all()

    def test_a_pod_that_was_not_told_to_stop_may_not_save_for_ever(
        self, nodes: Callable[..., Nodes], job: TestJob
    ) -> None:
        checkpoint = job.spec.checkpoint.model_copy(update={"grace_period_seconds": 10})
        first, second = nodes(
            f"""
            if RANK == 0:
                {HANG}
            raise JobError(FailureClass.TERMINATED, 'stopped')
            """,
            processes=2,
            spec=job.spec.model_copy(update={"checkpoint": checkpoint}),
        ).start_all()
        assert [first.wait(60), second.wait(60)] == [75, 75]

    def test_the_first_pod_waits_for_the_others_in_the_end(self, nodes: Callable[..., Nodes]) -> None:
        """All has been handed over, and one does not come to the last barrier."""
        first, second = nodes(
            f"""
            if RANK == 0:
                reporter.phase('Done')
            {HANG}
            """,
            silence=5,
        ).start_all()
        first.until(lambda: first.message and first.report.phase == "Done")
        second.kill_all()
        first.until(lambda: has_ended(first))
        assert failure_of(first).message == "Pod 1 of the attempt did not answer for 5 s."
        first.kill_all()


BY_NAME = """
import pathlib, runpy, socket

def apply(agent):
    runpy.run_path({impatient!r})["apply"](agent)
    resolve = socket.getaddrinfo

    def getaddrinfo(host, *arguments, **options):
        if host == "first-pod":
            host = pathlib.Path({names!r}).read_text()
            if not host:
                raise socket.gaierror(socket.EAI_AGAIN, "the name service does not answer")
        return resolve(host, *arguments, **options)

    socket.getaddrinfo = getaddrinfo
"""


class TestNames:
    """Of host names, and of pods that come in the place of others."""

    @pytest.fixture
    def names(self, tmp_path: Path) -> Path:
        """The name service: the address of the first pod, or nothing."""
        return tmp_path / "names"

    @pytest.fixture
    def by_name(self, tmp_path: Path, names: Path) -> dict[str, str]:
        """The environment of a pod that asks it."""
        patch = tmp_path / "by_name.py"
        patch.write_text(BY_NAME.format(impatient=str(tmp_path / "impatient.py"), names=str(names)))
        return {"MASTER_ADDR": "first-pod", "TEST_INJECT_ALSO": f"finetune_trainer.agent={patch}"}

    def test_a_name_service_that_is_away(
        self, nodes: Callable[..., Nodes], tmp_path: Path, names: Path, by_name: dict[str, str]
    ) -> None:
        go = tmp_path / "go"
        pods = nodes(f"print('trains'); wait_for(pathlib.Path({str(go)!r}).exists)", silence=4)
        names.write_text(pods.addresses[0])
        runs = [pods.start(0), pods.start(1, **by_name)]
        for run in runs:
            run.until(lambda run=run: "trains" in run.text())
        names.write_text("")
        time.sleep(6)
        go.touch()
        assert [run.wait() for run in runs] == [0, 0], [run.text() for run in runs]

    def test_the_first_pod_is_replaced(self, nodes: Callable[..., Nodes], names: Path, by_name: dict[str, str]) -> None:
        """The one in its place has another address and waits; the one that has met the first ends, to be replaced."""
        pods = nodes(f"print('trains'); {HANG}")
        names.write_text(pods.addresses[0])
        first, second = pods.start(0), pods.start(1, **by_name)
        for run in (first, second):
            run.until(lambda run=run: "trains" in run.text())
        first.kill_all()
        again = pods.replace(0)
        names.write_text(again.address)
        assert second.wait(60) == 75
        assert failure_of(second).message == "Pod 0 of the attempt came back as another pod."
        again.until(lambda: has_fetched(again))
        assert "trains" not in again.text()
        third = pods.replace(1, **by_name)
        for run in (again, third):
            run.until(lambda run=run: "trains" in run.text())
        again.kill_all()
        third.kill_all()

    def test_another_pod_is_replaced(self, nodes: Callable[..., Nodes]) -> None:
        pods = nodes(f"print('trains'); {HANG}")
        first, second = pods.start_all()
        for run in (first, second):
            run.until(lambda run=run: "trains" in run.text())
        second.kill_all()
        again = pods.replace(1)
        assert first.wait(60) == 75
        assert failure_of(first).message == "Pod 1 of the attempt came back as another pod."
        again.kill_all()

    def test_a_pod_that_is_told_to_stop_meets_nobody(self, nodes: Callable[..., Nodes], job: TestJob) -> None:
        run = nodes("pass", fetch=f"print('fetches'); {HANG}").start(0)
        run.until(lambda: "fetches" in run.text())
        beat = f"{PATH}?uid={job.uid}&attempt=1&node=1&pod=b"
        assert run.get(beat)[0] == 200
        run.signal(signal.SIGTERM)
        run.until(lambda: run.get(beat)[0] == 404)
        run.kill_all()

    @pytest.mark.parametrize("then", ["silent", "replaced"])
    def test_a_pod_that_stopped_with_another_does_not_wait_for_ever(
        self, nodes: Callable[..., Nodes], then: str
    ) -> None:
        """In a queue nobody removes it: the Job goes on with new pods."""
        pods = nodes("raise JobError(FailureClass.TERMINATED, 'saved')", hold=3 if then == "silent" else EVER)
        first, second = pods.start_all()
        for run in (first, second):
            run.until(lambda run=run: has_ended(run))
        time.sleep(4)
        assert first.process.poll() is None, "the other one is still there"
        second.kill_all()
        again = pods.replace(1) if then == "replaced" else None
        assert first.wait(60) == 75
        if again:
            again.kill_all()

    def test_a_beat_for_the_pod_before_this_one(self, job: TestJob) -> None:
        """It gets an answer, to learn that there is another one, and does not count."""
        document = job.document("train", nodes=2)
        before, first, second = (Peers(document, node, pod, "unused") for node, pod in ((0, "a"), (0, "b"), (1, "c")))
        for peers in (before, first, second):
            peers.ready()
        assert second.hear(before.hear(second.hear(before._words(1))))
        second.settle()
        answer = first.hear(second._words(0))
        assert answer
        assert first.missing == [1]
        assert not second.hear(answer)
        assert second.replaced == [0]


class TestParts:
    """A checkpoint is there when each pod has stored its part."""

    @pytest.fixture
    def work(self, job: TestJob) -> Folder:
        return open_folder(job.bucket.uri(job.work), job.bucket.settings)

    def uploader(self, job: TestJob, work: Folder, node: int, life: int = 7) -> CheckpointUploader:
        spec = job.spec.model_copy(
            update={"checkpoint": job.spec.checkpoint.model_copy(update={"grace_period_seconds": 2})}
        )
        document = job.document("train", nodes=2, spec=spec)
        reporter = Reporter(document, job.disk("train").run) if node == 0 else None
        return CheckpointUploader(work, document, reporter, {"data": "d"}, node, life)

    def folder(self, tmp_path: Path, name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(name)
        return folder

    def test_the_manifest_names_the_files_of_all(self, job: TestJob, work: Folder, tmp_path: Path) -> None:
        second = self.uploader(job, work, 1)
        second.submit(self.folder(tmp_path, "rng_state_1.pth"), 10, 0.0)
        second.close()
        assert find(work, [1]) == [], "one part is no checkpoint"
        first = self.uploader(job, work, 0)
        first.submit(self.folder(tmp_path, "rng_state_0.pth"), 10, 0.0)
        first.close()
        (stored,) = find(work, [1])
        found = bundle.read(work, stored.prefix)
        assert found is not None
        assert sorted(file.path for file in found.files) == ["rng_state_0.pth", "rng_state_1.pth"]
        bundle.download(work, stored.prefix, found, tmp_path / "fetched")
        assert (tmp_path / "fetched" / "rng_state_1.pth").read_text() == "rng_state_1.pth"
        bundle.delete(work, stored.prefix)
        assert work.list("train/1/checkpoints/") == []

    @pytest.mark.parametrize("left", ["nothing", "a part of an earlier life"])
    def test_without_a_part_there_is_no_checkpoint(self, job: TestJob, work: Folder, tmp_path: Path, left: str) -> None:
        if left != "nothing":
            earlier = self.uploader(job, work, 1, life=6)
            earlier.submit(self.folder(tmp_path, "rng_state_1.pth"), 10, 0.0)
            earlier.close()
        first = self.uploader(job, work, 0)
        first.submit(self.folder(tmp_path, "rng_state_0.pth"), 10, 0.0)
        first.close()
        assert find(work, [1]) == []
        assert first.newest is None


SPEC: dict[str, Any] = {
    "hyperparameters": {"maxSteps": 4, "batchSize": 8},
    "method": {"adapter": {"type": "LoRA", "lora": {"dropout": "0.1"}}},
    "checkpoint": {"everySteps": 2},
}


def final(job: TestJob, attempt: int, target: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The trained weights, and the losses of all steps."""
    prefix = f"{job.work}/train/{attempt}/final"
    job.bucket.fetch_folder(prefix, target)
    history = [json.loads(line) for line in (target / "history.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return load_file(target / "adapter" / "adapter_model.safetensors"), losses


class TestTraining:
    @pytest.fixture(scope="class")
    @staticmethod
    def unbroken(make_job: MakeJob) -> TestJob:
        job = make_job(**SPEC)
        job.run("prepare", nodes=2)
        runs = job.nodes().start_all()
        assert [run.wait(300) for run in runs] == [0, 0], [run.text() for run in runs]
        return job

    def test_two_nodes_are_two_processes(self, unbroken: TestJob, make_job: MakeJob, tmp_path: Path) -> None:
        """Where the processes are changes nothing."""
        job = make_job(**SPEC)
        job.run("prepare", processes=2)
        run = job.agent("train", processes=2)
        assert run.wait(300) == 0, run.text()
        weights, losses = final(job, 1, tmp_path / "processes")
        expected, expected_losses = final(unbroken, 1, tmp_path / "nodes")
        assert losses == expected_losses
        assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []

    def test_one_node_is_told_to_stop(self, unbroken: TestJob, make_job: MakeJob, tmp_path: Path) -> None:
        """All save together; the one that was told ends first, and the next attempt ends as if nothing had been."""
        job = make_job(**SPEC)
        job.run("prepare", nodes=2)
        marker = tmp_path / "halted"
        pause = {
            "TEST_INJECT": f"finetune_trainer.training={INJECT / 'pause_before_step.py'}",
            "TEST_PAUSE_AT": "2",
            "TEST_MARKER": str(marker),
        }
        pods = job.nodes()
        first = pods.start(0)
        second = pods.start(1, **pause)
        second.until(marker.exists, 300)
        second.signal(signal.SIGTERM)
        assert second.wait(300) == 75, second.text()
        first.until(lambda: has_ended(first), 300)
        assert "after step 3 of 4; a checkpoint was saved" in failure_of(first).message
        first.signal(signal.SIGTERM)
        assert first.wait() == 75
        names = {key.rpartition("/")[2] for key in job.bucket.keys(f"{job.work}/train/1/checkpoints/3/")}
        assert {"rng_state_0.pth", "rng_state_1.pth", "manifest.json"} <= names
        runs = job.nodes(2, (1,)).start_all()
        assert [run.wait(300) for run in runs] == [0, 0], [run.text() for run in runs]
        assert runs[0].report.resumed_from_step == 3
        weights, losses = final(job, 2, tmp_path / "resumed")
        expected, expected_losses = final(unbroken, 1, tmp_path / "unbroken")
        assert losses == expected_losses
        assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []

    def test_another_number_of_nodes_goes_on(self, unbroken: TestJob, tmp_path: Path) -> None:
        """From the checkpoint of two nodes on one; the last step is done again, as if it had been lost."""
        unbroken.bucket.delete(f"{unbroken.work}/train/1/checkpoints/4/manifest.json")
        run = unbroken.agent("train", 2, (1,))
        assert run.wait(300) == 0, run.text()
        assert run.report.resumed_from_step == 2
        _, losses = final(unbroken, 2, tmp_path / "one")
        _, expected = final(unbroken, 1, tmp_path / "two")
        # Dropout is drawn anew.
        assert losses == pytest.approx(expected, rel=0.05)
        assert losses[:2] == expected[:2]

    def test_a_process_that_is_killed_is_the_cause(self, make_job: MakeJob, tmp_path: Path) -> None:
        """The other one loses it in a collective of gloo, and does not blame itself."""
        # The first one waits for half of the grace for what the other one would have added to the checkpoint.
        job = make_job(**SPEC | {"checkpoint": {"everySteps": 2, "gracePeriodSeconds": 10}})
        job.run("prepare", nodes=2)
        marker = tmp_path / "halted"
        pods = job.nodes()
        first = pods.start(0)
        second = pods.start(
            1,
            TEST_INJECT=f"finetune_trainer.training={INJECT / 'pause_before_step.py'}",
            TEST_PAUSE_AT="2",
            TEST_MARKER=str(marker),
        )
        second.until(marker.exists, 300)
        second.kill_all()
        first.until(lambda: has_ended(first), 120)
        assert failure_of(first).failure_class is FailureClass.COMMUNICATION
        assert failure_of(first).rank == 0
        # Told so in the end: in a queue that takes all pods away, the other one was told a moment before.
        first.signal(signal.SIGTERM)
        assert first.wait(10) == 75
        assert (failure_of(first).failure_class, failure_of(first).exit_code) == (FailureClass.TERMINATED, 75)


def test_training_whose_processes_do_not_reach_each_other(make_job: MakeJob) -> None:
    """torch would try for a day."""
    job = make_job(**SPEC)
    job.run("prepare", nodes=2)
    pods = job.nodes(stall_seconds=10)
    first = pods.start(0)
    second = pods.start(1, MASTER_PORT="9")
    first.until(lambda: has_ended(first), 120)
    assert (first.report.phase, failure_of(first).failure_class) == ("Connecting", FailureClass.COMMUNICATION)
    assert "Let the network policy allow all ports" in failure_of(first).message
    first.kill_all()
    second.kill_all()


def test_pods_that_would_go_on_from_different_checkpoints_do_not(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(**SPEC)
    job.run("prepare", nodes=2)
    patch = tmp_path / "other.py"
    patch.write_text("def apply(fetch):\n    fetch.read_resumed = lambda disk: (1, 2)\n")
    pods = job.nodes()
    runs = [pods.start(0), pods.start(1, TEST_INJECT=f"finetune_trainer.stages.fetch={patch}")]
    for run in runs:
        run.until(lambda run=run: has_ended(run), 300)
        assert failure_of(run).failure_class is FailureClass.COMMUNICATION
        assert "different checkpoints" in failure_of(run).message
        run.signal(signal.SIGTERM)
        assert run.wait() == 75
