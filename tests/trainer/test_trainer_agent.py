"""The agent: real processes that end in every way a process can, and what is known of it afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainer_lab import INJECT, SECRET, AgentRun, TestJob, step_source
from trainer_servers import Fault, MotoServer, Proxy

from finetune_api.document import StorageSettings
from finetune_api.failures import FailureClass, exit_code_of
from finetune_api.pod import PodTemplate
from finetune_api.report import MAX_LOG_TAIL_BYTES, MAX_REPORT_BYTES, Outcome, Report, decode

PROMTOOL = Path(__file__).parents[2] / ".tools" / "bin" / "promtool"
PRELUDE = """
import faulthandler, json, logging, os, pathlib, signal, subprocess, sys, time
from finetune_api.failures import FailureClass, JobError
from finetune_api.report import StepProgress
RANK = int(os.environ.get("RANK", "-1"))  # the agent has none

def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)

def fetch(document, disk, reporter):
    pass
"""


@pytest.fixture
def job(make_job: Callable[..., TestJob]) -> TestJob:
    return make_job()


@pytest.fixture
def start(job: TestJob) -> Callable[..., AgentRun]:
    """Starts an agent whose steps are the test's own: the bodies of functions of (document, disk, reporter)."""

    def run(stage: str = "prepare", *, environment: dict[str, str] | None = None, **steps: Any) -> AgentRun:
        names = {"prepare", "fetch", "train", "export"} & steps.keys()
        source = PRELUDE
        for name in names:
            source += step_source(name, steps.pop(name))
        path = job.root / "stages.py"
        path.write_text(source)
        injected = {
            "TEST_INJECT": f"finetune_trainer.layout={INJECT / 'stages_of_the_test.py'}",
            "TEST_STAGES": str(path),
            **(environment or {}),
        }
        return job.agent(stage, environment=injected, **steps)

    return run


def ended(run: AgentRun) -> Report:
    """The agent's last word, after checks that hold for every end."""
    code = run.wait()
    report = run.report
    assert len(run.message) <= MAX_REPORT_BYTES
    assert (report.outcome is Outcome.SUCCEEDED) == (code == 0), run.text()
    assert (report.failure is None) == (code == 0)
    if report.failure:
        assert report.failure.exit_code == code
        assert exit_code_of(report.failure.failure_class) == code
        assert len((report.failure.log_tail or "").encode()) <= MAX_LOG_TAIL_BYTES
    return report


class TestEnds:
    def test_success(self, start: Callable[..., AgentRun], job: TestJob) -> None:
        report = ended(start(prepare="reporter.phase('Working'); print('some output')"))
        assert report.phase == "Working"
        assert report.log_uri == job.bucket.uri(f"{job.work}/prepare/1/log.txt")
        assert job.bucket.get(f"{job.work}/prepare/1/log.txt") == b"some output\n"
        assert decode(job.bucket.get(f"{job.work}/prepare/1/report.json")) == report

    @pytest.mark.parametrize(
        "failure_class",
        [
            FailureClass.DATA_ERROR,
            FailureClass.ACCESS_DENIED,
            FailureClass.OUTPUT_EXISTS,
            FailureClass.STORAGE_UNAVAILABLE,
            FailureClass.MODEL_CHANGED,
        ],
    )
    def test_a_typed_failure(self, start: Callable[..., AgentRun], failure_class: FailureClass) -> None:
        report = ended(start(prepare=f"raise JobError(FailureClass('{failure_class}'), 'It is so. Do this.')"))
        assert report.failure is not None
        assert (report.failure.failure_class, report.failure.message) == (failure_class, "It is so. Do this.")
        assert report.failure.rank == 0
        # The reason is in the log too, without a traceback: it is the user's to mend.
        assert report.failure.log_tail is not None
        assert f"{failure_class}: It is so. Do this." in report.failure.log_tail
        assert "Traceback" not in report.failure.log_tail

    def test_an_unknown_exception(self, start: Callable[..., AgentRun]) -> None:
        report = ended(start(prepare="raise ValueError('strange')"))
        assert report.failure is not None
        assert (report.failure.failure_class, report.failure.message) == (FailureClass.UNKNOWN, "ValueError: strange")
        assert report.failure.log_tail is not None
        assert "Traceback" in report.failure.log_tail

    @pytest.mark.parametrize(
        ("end", "failure_class", "words"),
        [
            ("os._exit(3)", FailureClass.UNKNOWN, "The process died (exit code 3) without saying why"),
            ("os._exit(65)", FailureClass.UNKNOWN, "The process died (exit code 65) without saying why"),
            ("os.kill(os.getpid(), signal.SIGKILL)", FailureClass.UNKNOWN, "was killed (SIGKILL) by something outside"),
            ("os.kill(os.getpid(), signal.SIGSEGV)", FailureClass.UNKNOWN, "The process died (SIGSEGV)"),
            ("raise MemoryError", FailureClass.OUT_OF_MEMORY_HOST, "Raise the memory of this stage"),
            ("raise OSError(28, 'No space left on device')", FailureClass.DISK_FULL, "Raise ephemeralStorage"),
            ("os._exit(74)", FailureClass.DISK_FULL, "Raise ephemeralStorage"),  # it had no room to say more
            ("sys.exit(0)", FailureClass.UNKNOWN, "SystemExit: 0"),
        ],
    )
    def test_other_ends(
        self, start: Callable[..., AgentRun], end: str, failure_class: FailureClass, words: str
    ) -> None:
        report = ended(start(prepare=end))
        assert report.failure is not None
        assert report.failure.failure_class is failure_class
        assert words in report.failure.message

    def test_what_an_earlier_step_left_is_not_taken_for_the_cause(self, start: Callable[..., AgentRun]) -> None:
        report = ended(
            start(
                "train",
                fetch="(disk.run / 'failure-0.json').write_text("
                """'{"class": "DataError", "message": "old", "exitCode": 65}')""",
                train="os._exit(9)",
            )
        )
        assert report.failure is not None
        assert report.failure.failure_class is FailureClass.UNKNOWN

    def test_a_full_disk_does_not_keep_it_from_saying_so(self, start: Callable[..., AgentRun], tmp_path: Path) -> None:
        """Neither the reason of the failure nor the log has room; there is more output than a pipe holds."""
        patch = tmp_path / "full.py"
        patch.write_text(
            textwrap.dedent("""
            def apply(agent):
                class Log(agent._Log):
                    def __init__(self, *arguments):
                        super().__init__(*arguments)
                        self._file = open("/dev/full", "a")
                agent._Log = Log
        """)
        )
        run = start(
            prepare="""
            from finetune_trainer import reporting
            def no_room(path, data):
                raise OSError(28, 'No space left on device')
            reporting.write_atomically = no_room
            for _ in range(20_000):
                print('much to say')
            reporter.phase('Working')
            """,
            environment={"TEST_INJECT_ALSO": f"finetune_trainer.agent={patch}"},
        )
        report = ended(run)
        assert report.failure is not None
        assert report.failure.failure_class is FailureClass.DISK_FULL
        assert "Raise ephemeralStorage" in report.failure.message
        assert report.failure.log_tail is not None
        assert "No space left on device" in report.failure.log_tail

    def test_a_failed_step_is_the_last(self, start: Callable[..., AgentRun]) -> None:
        run = start("train", fetch="raise JobError(FailureClass.NOT_FOUND, 'Gone.')", train="print('never')")
        assert ended(run).failure is not None
        assert "never" not in run.text()

    def test_a_grandchild_that_keeps_the_output_open(self, start: Callable[..., AgentRun]) -> None:
        run = start(prepare="p = subprocess.Popen(['sleep', '600']); print('pid', p.pid)")
        try:
            assert ended(run).failure is None
        finally:
            os.kill(int(run.text().split("pid ")[1].split()[0]), signal.SIGKILL)


class TestTermination:
    def test_before_the_work_began(self, start: Callable[..., AgentRun]) -> None:
        """The first step ends in spite of the signal; the second is not begun."""
        run = start(
            "train",
            fetch="""
            stopped = []
            signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
            os.kill(os.getppid(), signal.SIGTERM)
            wait_for(lambda: stopped)
            """,
            train="print('never')",
        )
        report = ended(run)
        assert report.failure is not None
        assert report.failure.failure_class is FailureClass.TERMINATED
        assert report.failure.exit_code == 75
        assert report.failure.message == "The pod was stopped from outside before its work began."
        assert "never" not in run.text()

    def test_of_a_step_that_saves_nothing(self, start: Callable[..., AgentRun]) -> None:
        report = ended(start(prepare="os.kill(os.getppid(), signal.SIGTERM); wait_for(lambda: False)"))
        assert report.failure is not None
        assert report.failure.failure_class is FailureClass.TERMINATED
        assert "before it could save a checkpoint" in report.failure.message

    def test_a_step_that_says_it_itself(self, start: Callable[..., AgentRun]) -> None:
        report = ended(
            start(
                prepare="""
                stopped = []
                signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
                os.kill(os.getppid(), signal.SIGTERM)
                wait_for(lambda: stopped)
                raise JobError(FailureClass.TERMINATED, 'Stopped after step 7; a checkpoint was saved.')
                """
            )
        )
        assert report.failure is not None
        assert report.failure.message == "Stopped after step 7; a checkpoint was saved."

    def test_while_processes_are_launched(self, start: Callable[..., AgentRun], job: TestJob, tmp_path: Path) -> None:
        """The signal comes when the first of two is there and the agent does not know it yet."""
        patch = tmp_path / "patch.py"
        patch.write_text(
            textwrap.dedent(
                """
                import os, signal
                def apply(agent):
                    original = agent.Agent._launch
                    def launch(self, step, rank, count, port):
                        child = original(self, step, rank, count, port)
                        if step == "train" and rank == 0:
                            os.kill(os.getpid(), signal.SIGTERM)
                        return child
                    agent.Agent._launch = launch
                """
            )
        )
        run = start(
            "train",
            train="wait_for(lambda: False)",
            processes=2,
            environment={"TEST_INJECT_ALSO": f"finetune_trainer.agent={patch}"},
        )
        report = ended(run)
        assert report.failure is not None
        assert report.failure.failure_class is FailureClass.TERMINATED


@pytest.fixture
def hasty(tmp_path: Path) -> dict[str, str]:
    """An agent that gives peers half a second to end."""
    patch = tmp_path / "hasty.py"
    patch.write_text("def apply(agent):\n    agent.PEER_GRACE_SECONDS = 0.5\n")
    return {"TEST_INJECT_ALSO": f"finetune_trainer.agent={patch}"}


HANG = "signal.signal(signal.SIGTERM, signal.SIG_IGN); wait_for(lambda: False)"


class TestSeveralProcesses:
    def test_the_variables_that_torch_reads(self, start: Callable[..., AgentRun]) -> None:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
        run = start("train", train=f"print(*[os.environ[n] for n in {names}], os.environ['MASTER_PORT'])", processes=2)
        assert ended(run).failure is None
        lines = sorted(line for line in run.text().splitlines() if "127.0.0.1" in line)
        assert lines[0].startswith("[rank 0] 0 0 2 2 127.0.0.1 ")
        assert lines[1].startswith("[rank 1] 1 1 2 2 127.0.0.1 ")
        assert lines[0].split()[-1] == lines[1].split()[-1]

    def test_the_first_to_fail_is_the_cause(self, start: Callable[..., AgentRun], hasty: dict[str, str]) -> None:
        """And the others, which would wait for it for ever, are ended."""
        run = start(
            "train",
            train=f"""
            if RANK == 1:
                raise JobError(FailureClass.LOSS_DIVERGED, 'nan')
            {HANG}
            """,
            processes=2,
            environment=hasty,
        )
        report = ended(run)
        assert report.failure is not None
        assert (report.failure.failure_class, report.failure.rank) == (FailureClass.LOSS_DIVERGED, 1)
        assert run.children() == []

    def test_a_process_that_still_saves_is_given_the_whole_grace_period(
        self, start: Callable[..., AgentRun], hasty: dict[str, str]
    ) -> None:
        """The others have nothing to save, and are gone long before it."""
        run = start(
            "train",
            train="""
            stopped = []
            signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
            print('ready')
            wait_for(lambda: stopped)
            if RANK == 0:
                time.sleep(3)
                raise JobError(FailureClass.TERMINATED, 'a checkpoint was saved')
            raise JobError(FailureClass.TERMINATED, 'stopped')
            """,
            processes=2,
            environment=hasty,
        )
        run.until(lambda: run.text().count("ready") == 2)
        run.signal(signal.SIGTERM)
        report = ended(run)
        assert report.failure is not None
        assert (report.failure.message, report.failure.rank) == ("a checkpoint was saved", 0)

    NEIGHBOUR = """
            def peer():
                mine = os.getpid()
                pids = pathlib.Path(f'/proc/{os.getppid()}/task/{os.getppid()}/children').read_text().split()
                return [int(pid) for pid in pids if int(pid) != mine]
            def gone(pid):
                try:
                    return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
                except OSError:
                    return True
    """

    def test_a_peer_that_fails_right_after_is_not(self, start: Callable[..., AgentRun]) -> None:
        """Both are dead when the agent looks; the kernel hands out the older process first."""
        run = start(
            "train",
            train=f"""
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            {self.NEIGHBOUR}
            started = disk.run / f'started-{{RANK}}'
            started.touch()
            wait_for(lambda: len(list(disk.run.glob('started-*'))) == 2)
            if RANK == 1:
                os._exit(7)
            (other,) = peer() or [0]
            wait_for(lambda: gone(other))
            raise JobError(FailureClass.COMMUNICATION, 'The training processes lost each other.')
            """,
            processes=2,
        )
        report = ended(run)
        assert report.failure is not None
        assert report.failure.rank == 1
        assert "exit code 7" in report.failure.message

    def test_a_peer_that_ends_faster_than_the_cause(self, start: Callable[..., AgentRun]) -> None:
        """A process that failed closes its connections first and takes a while to end."""
        run = start(
            "train",
            train="""
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if RANK == 1:
                import atexit
                other = disk.run / 'failure-0.json'
                atexit.register(lambda: wait_for(other.exists))
                raise JobError(FailureClass.DATA_ERROR, 'The rows are bad.')
            wait_for((disk.run / 'failure-1.json').exists)
            raise JobError(FailureClass.COMMUNICATION, 'The training processes lost each other.')
            """,
            processes=2,
        )
        report = ended(run)
        assert report.failure is not None
        assert (report.failure.failure_class, report.failure.rank) == (FailureClass.DATA_ERROR, 1)


STEPPED = """
reporter.phase('Training')
reporter.update(progress=StepProgress(step=1, total_steps=9, last_step_time='2026-01-01T00:00:00Z'))
"""


class TestStalls:
    @pytest.mark.parametrize("before_first_step", [False, True])
    def test_training_that_makes_no_step(
        self, start: Callable[..., AgentRun], before_first_step: bool, hasty: dict[str, str]
    ) -> None:
        step = "2026-01-01T00:00:00Z"
        progress = f"step=1, total_steps=9, last_step_time={None if before_first_step else step!r}"
        run = start(
            "train",
            train=f"""
            reporter.phase('Training')
            reporter.update(progress=StepProgress({progress}), checkpoint_failures=0)
            def waiting_for_a_peer():
                {HANG}
            waiting_for_a_peer()
            """,
            stall_seconds=1,
            environment=hasty,
        )
        report = ended(run)
        assert report.failure is not None
        assert (report.failure.failure_class, report.failure.exit_code) == (FailureClass.NO_PROGRESS, 83)
        assert report.failure.message == "Training made no step for 1 s."
        # The stacks say where it hung.
        assert report.failure.log_tail is not None
        assert "in waiting_for_a_peer" in report.failure.log_tail

    @pytest.mark.parametrize("phase", ["MeasuringBase", "Evaluating"])
    def test_an_evaluation_that_measures_nothing(
        self, start: Callable[..., AgentRun], phase: str, hasty: dict[str, str]
    ) -> None:
        run = start("train", train=f"reporter.phase({phase!r})\n{HANG}", stall_seconds=1, environment=hasty)
        report = ended(run)
        assert report.failure is not None
        assert report.failure.failure_class is FailureClass.NO_PROGRESS
        assert report.failure.message.endswith("measured no row for 1 s.")

    def test_an_evaluation_of_many_rows(self, start: Callable[..., AgentRun]) -> None:
        run = start(
            "train",
            train="""
            reporter.phase('Evaluating')
            for rows in range(1, 9):
                time.sleep(0.3)
                reporter.measured(rows)
            """,
            stall_seconds=1,
        )
        assert ended(run).failure is None

    def test_other_phases_may_take_their_time(self, start: Callable[..., AgentRun]) -> None:
        run = start(
            "train",
            train="""
            reporter.update(progress=StepProgress(step=9, total_steps=9, last_step_time='2026-01-01T00:00:00Z'))
            reporter.phase('Saving')
            started = time.monotonic()
            wait_for(lambda: time.monotonic() - started > 2)
            """,
            stall_seconds=1,
        )
        assert ended(run).failure is None

    def test_training_has_its_time_again_when_it_comes_back(self, start: Callable[..., AgentRun]) -> None:
        """The last step was long ago by the clock of the node, which may also have been set."""
        run = start(
            "train",
            train="""
            reporter.update(progress=StepProgress(step=8, total_steps=9, last_step_time='2026-01-01T00:00:00Z'))
            reporter.phase('Saving')
            reporter.phase('Training')
            started = time.monotonic()
            wait_for(lambda: time.monotonic() - started > 1.5)
            """,
            stall_seconds=60,
        )
        assert ended(run).failure is None


class TestSecrets:
    def test_they_leave_the_pod_nowhere(self, start: Callable[..., AgentRun], job: TestJob) -> None:
        token = "hf_abcdefghijklmnopqrstuvwxyz"
        other = "another/secret+value=="
        hub = "named like nothing secret"
        variable = {"name": "HUB", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "key"}}}
        template = PodTemplate.model_validate({"env": [variable]})
        run = start(
            prepare="""
            print('key', os.environ['AWS_SECRET_ACCESS_KEY'], flush=True)
            print('token', os.environ['HF_TOKEN'], file=sys.stderr)
            print('hub', os.environ['HUB'])
            print('Authorization: Bearer abcdefgh12345')
            raise RuntimeError('refused ' + os.environ['MY_PASSWORD'])
            """,
            environment={"HF_TOKEN": token, "MY_PASSWORD": other, "HUB": hub},
            spec=job.spec.model_copy(update={"pod_template": template}),
        )
        report = ended(run)
        places = [
            run.text(),
            run.message.decode(),
            job.bucket.get(f"{job.work}/prepare/1/log.txt").decode(),
            job.bucket.get(f"{job.work}/prepare/1/report.json").decode(),
        ]
        for place in places:
            assert "[redacted]" in place
            assert not any(secret in place for secret in (SECRET, token, other, hub, "abcdefgh12345"))
        assert report.failure is not None
        assert report.failure.message == "RuntimeError: refused [redacted]"


class TestReports:
    def test_the_longest_log_fits(self, start: Callable[..., AgentRun], job: TestJob) -> None:
        run = start(
            prepare="""
            for number in range(300):
                print('日' * 200, number)
            raise JobError(FailureClass.DATA_ERROR, 'w' * 5000)
            """
        )
        report = ended(run)
        assert report.failure is not None
        assert report.failure.message.startswith("w" * 500)
        # The whole of it is in storage.
        assert len(job.bucket.get(f"{job.work}/prepare/1/log.txt").splitlines()) >= 300

    def test_the_termination_message_is_valid_at_any_time(self, start: Callable[..., AgentRun], job: TestJob) -> None:
        run = start(
            prepare="""
            for number in range(400):
                reporter.phase('x' * (1 + number * 7 % 50))
                reporter.update(checkpoint_failures=number)
                print('line')
            """
        )
        seen = []
        while run.process.poll() is None:
            message = run.message
            if message:
                seen.append((message, decode(message)))
        assert seen
        assert [message for message, report in seen if report is None or report.job_uid != job.uid] == []
        assert ended(run).checkpoint_failures == 399

    def test_there_is_one_from_the_start(self, start: Callable[..., AgentRun], job: TestJob) -> None:
        """Kill process 1 itself: what it wrote until then is all there is."""
        run = start(prepare=HANG)
        run.until(lambda: run.message)
        children = run.until(run.children)
        run.process.kill()
        for child in children:
            os.kill(child, signal.SIGKILL)
        run.process.wait(30)
        assert (run.report.job_uid, run.report.attempt) == (job.uid, 1)
        assert run.report.outcome is Outcome.RUNNING

    def test_a_termination_file_that_cannot_be_written(self, start: Callable[..., AgentRun], tmp_path: Path) -> None:
        run = start(prepare="pass", environment={"FINETUNE_TERMINATION_PATH": str(tmp_path / "no" / "folder")})
        assert run.wait() == 0
        assert "the termination message cannot be written" in run.text()


class TestServer:
    @pytest.fixture
    def running(self, start: Callable[..., AgentRun], job: TestJob) -> Any:
        run = start(
            "train",
            train="""
            reporter.phase('Training')
            reporter.update(progress=StepProgress(step=3, total_steps=9, loss=1.5), checkpoint_failures=2)
            (disk.run / 'ready').touch()
            wait_for((disk.run / 'go').exists)
            """,
        )
        run.until((run.disk.run / "ready").exists)
        yield run
        (run.disk.run / "go").touch()
        assert ended(run).failure is None

    def test_progress(self, running: AgentRun, job: TestJob) -> None:
        status, kind, body = running.get("/progress")
        assert (status, kind) == (200, "application/json")
        data = json.loads(body)
        assert (data["jobUID"], data["attempt"], data["stage"], data["outcome"]) == (job.uid, 1, "train", "Running")
        assert data["phase"] == "Training"
        assert data["progress"] == {"step": 3, "totalSteps": 9, "loss": 1.5}
        assert decode(body) is not None

    def test_metrics(self, running: AgentRun) -> None:
        status, kind, body = running.get("/metrics")
        assert status == 200
        assert kind.startswith("text/plain; version=0.0.4")
        assert b"finetune_trainer_step 3.0" in body
        assert b"finetune_checkpoint_failures_total 2.0" in body
        program = str(PROMTOOL) if PROMTOOL.exists() else shutil.which("promtool")
        if program is None:
            pytest.skip("no promtool: install Debian's prometheus, or put promtool into .tools/bin")
        done = subprocess.run([program, "check", "metrics"], input=body, capture_output=True, timeout=30, check=False)
        assert (done.returncode, done.stderr) == (0, b"")

    def test_health_and_nothing_else(self, running: AgentRun) -> None:
        assert running.get("/healthz") == (200, "text/plain; charset=utf-8", b"ok\n")
        assert running.get("/etc/passwd")[0] == 404
        assert running.get("/progress?x=1")[0] == 200

    def test_a_taken_port_stops_nothing(self, running: AgentRun, start: Callable[..., AgentRun]) -> None:
        second = start(prepare="pass", environment={"POD_IP": running.address})
        assert ended(second).failure is None
        assert "progress and metrics are not served" in second.text()


class TestProcessOne:
    def test_orphans_are_reaped(self, start: Callable[..., AgentRun], job: TestJob) -> None:
        if os.geteuid() != 0 or shutil.which("unshare") is None:
            pytest.skip("a process namespace needs root and unshare")
        namespace = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        probe = subprocess.run([*namespace, "true"], capture_output=True, check=False)
        if probe.returncode != 0:
            pytest.skip(f"no process namespace here: {probe.stderr.decode().strip()}")
        run = start(
            prepare="""
            assert os.getppid() == 1, os.getppid()
            # The shell ends at once; its child becomes process 1's, and ends too.
            output = subprocess.run(['sh', '-c', 'sleep 0.05 & echo $!'], capture_output=True, text=True).stdout
            orphan = int(output)
            wait_for(lambda: not pathlib.Path(f'/proc/{orphan}').exists())
            print('reaped', orphan)
            """,
            command=namespace,
        )
        assert ended(run).failure is None
        assert "reaped" in run.text()


class TestStorage:
    @pytest.fixture
    def patience(self, tmp_path: Path) -> dict[str, str]:
        """An agent that waits half a second for its storage."""
        patch = tmp_path / "patience.py"
        patch.write_text("def apply(agent):\n    agent.STORE_SECONDS = 0.5\n")
        return {"TEST_INJECT_ALSO": f"finetune_trainer.agent={patch}"}

    def test_that_hangs_does_not_hold_the_pod(
        self, start: Callable[..., AgentRun], job: TestJob, moto: MotoServer, patience: dict[str, str]
    ) -> None:
        with Proxy(moto.endpoint) as proxy:
            proxy.faults.append(Fault(lambda _: True, hang=True))
            job.storage = StorageSettings(endpoint=proxy.endpoint, path_style=True)
            run = start(prepare="raise JobError(FailureClass.DATA_ERROR, 'Bad rows.')", environment=patience)
            report = ended(run)
        assert report.failure is not None
        assert report.failure.exit_code == 65
        assert report.log_uri is None
        assert "log and report could not be stored" in run.text()

    def test_that_refuses_changes_nothing(self, start: Callable[..., AgentRun], job: TestJob) -> None:
        job.overrides = {"work_uri": "s3://no-such-bucket-here/work"}
        run = start(prepare="pass")
        report = ended(run)
        assert report.failure is None
        assert report.log_uri is None
        assert "log and report could not be stored: s3://no-such-bucket-here/work" in run.text()


def test_a_document_of_a_newer_operator(start: Callable[..., AgentRun], job: TestJob) -> None:
    """Fields that this trainer does not know are ignored."""
    path = job.root / "newer.json"
    data = json.loads(job.document("prepare").model_dump_json(by_alias=True))
    path.write_text(json.dumps({**data, "futureField": {"x": 1}, "job": {**data["job"], "labels": {}}}))
    from finetune_api.document import JobDocument

    assert JobDocument.model_validate_json(path.read_bytes()) == job.document("prepare")


def test_a_whole_job_through_agents(make_job: Callable[..., TestJob]) -> None:
    """The three stages as three pods; the termination message is readable whenever one looks."""
    job = make_job(hyperparameters={"maxSteps": 2})
    for stage, earlier in (("prepare", ()), ("train", ()), ("export", (1,))):
        run = job.agent(stage, 1, earlier)
        seen: set[bytes] = set()

        def watch(run: AgentRun = run, seen: set[bytes] = seen) -> None:
            while run.process.poll() is None:
                seen.add(run.message)
                time.sleep(0.002)  # leaves the core to the pod

        watcher = threading.Thread(target=watch)
        watcher.start()
        report = ended(run)
        watcher.join()
        assert [message for message in seen if message and decode(message) is None] == []
        assert report.phase == "Done"
        assert job.bucket.get(f"{job.work}/{stage}/1/log.txt")
    assert [artifact.name for artifact in report.artifacts or []] == ["Merged", "Adapter", "Manifest"]
    assert f"{job.output}/manifest.json" in job.bucket.keys(job.output)
