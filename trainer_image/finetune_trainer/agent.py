"""The agent: process 1 of every pod of a job. It never imports torch.

It launches the steps of the stage, one process for each GPU while training, with the variables that torch and
accelerate read (no torchrun: it exits 1 whatever happened, and kills workers on its own clock). It serves /metrics,
/progress and /healthz, forwards SIGTERM, reaps orphans, names the process that failed first as the cause, watches for
training that makes no step, keeps the termination message up to date, stores log and report, and exits with the code
of the failure's class.

All decisions are taken in one thread, in `Agent.run`; other threads only copy output and answer HTTP.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

from finetune_api.document import JobDocument
from finetune_api.failures import RULES, FailureClass, JobError, exit_code_of
from finetune_api.names import (
    AGENT_PORT,
    ENV_COMPLETION_INDEX,
    ENV_DOCUMENT,
    ENV_MAIN_ADDRESS,
    ENV_MAIN_PORT,
    ENV_POD_IP,
    ENV_POD_NAME,
    ENV_TERMINATION_PATH,
    TERMINATION_PATH,
    Stage,
)
from finetune_api.report import MAX_LOG_TAIL_BYTES, Outcome, Report, ReportedFailure
from finetune_trainer import layout, peers
from finetune_trainer.layout import PodDisk
from finetune_trainer.metrics import exposition
from finetune_trainer.peers import Peers
from finetune_trainer.redact import Redactor
from finetune_trainer.reporting import Reporter, failure_file, now, read_report

log = logging.getLogger(__name__)

STEPS: dict[Stage, tuple[str, ...]] = {
    Stage.PREPARE: ("prepare",),
    Stage.TRAIN: ("fetch", "train"),
    Stage.EXPORT: ("export",),
}
TICK_SECONDS = 0.5
PEER_GRACE_SECONDS = 5.0
"""After one process failed the others can save nothing any more; they get this long before SIGKILL."""
STORE_SECONDS = 20.0
"""Log and report are stored best-effort: a storage that hangs must not hold the GPUs."""
HOLD_SECONDS = 15.0
"""A pod that lost another one waits so long for its own removal, so that the other one is seen to be the cause."""
ALONE = "Saving"
"""The phase in which the first pod needs no other one."""
WATCHED = {
    "Training": "Training made no step",
    "MeasuringBase": "The evaluation of the base measured no row",
    "Evaluating": "The evaluation measured no row",
}
"""Phases in which a hang shows. Loading and saving have nothing to count; what hangs in them is a disk, or the storage,
whose client gives up by itself."""
CONNECTING = "Connecting"
"""The phase in which the training processes look for each other."""


@dataclass
class Child:
    rank: int
    process: subprocess.Popen[bytes]
    reader: threading.Thread
    exit_code: int | None = None
    """Negative: ended by that signal."""


def run_agent(document: JobDocument, document_path: Path) -> int:
    return Agent(document, document_path, PodDisk.from_environment()).run()


class Agent:
    def __init__(self, document: JobDocument, document_path: Path, disk: PodDisk) -> None:
        self._document = document
        self._document_path = document_path
        self._disk = disk
        self._redact = Redactor(
            secret_names={
                variable.name
                for variable in document.spec.pod_template.env or []
                if variable.value_from and variable.value_from.secret_key_ref
            }
        )
        self._children: list[Child] = []
        self._ended: list[Child] = []
        """In the order in which they ended: the first one to fail is the cause."""
        self._terminating = False
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._nodes = document.nodes if document.stage is Stage.TRAIN else 1
        self._node = int(os.environ[ENV_COMPLETION_INDEX]) if self._nodes > 1 else 0
        self._peers = (
            Peers(document, self._node, os.environ[ENV_POD_NAME], os.environ[ENV_MAIN_ADDRESS])
            if self._nodes > 1
            else None
        )
        self._log = _Log(disk.run / layout.LOG_FILE, self._redact)
        self._termination = Path(os.environ.get(ENV_TERMINATION_PATH, TERMINATION_PATH))
        self._final: Report | None = None
        self._last_message = b""
        self._oom_kills = _oom_kills()
        self._last_seen: Any = None
        """How far training was when it was looked at last; None while it does what is not watched."""
        self._last_seen_at = 0.0

    def run(self) -> int:
        """Run the stage; returns the exit code."""
        self._disk.run.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, self._on_terminate)
        signal.signal(signal.SIGINT, self._on_terminate)
        # Which process failed first can only be told when each is collected as it ends.
        signal.signal(signal.SIGCHLD, lambda *_: self._wake.put(None))
        server = serve(self.report, exposition(self.report), self._peers.hear if self._peers else None)
        if self._peers:
            self._peers.start()
        self._write_termination_message()
        failure = None
        for step in STEPS[self._document.stage]:
            failure = (self._meet() if step == "train" else None) or self._run_step(step)
            if failure is not None or self.report().already_published:
                break
        if self._peers:
            self._peers.close()
        failure = self._judged(failure)
        self._final = self._concluded(failure)
        self._write_termination_message()
        self._store()
        self._write_termination_message()  # now with logURI, if the log was stored
        self._hold(failure)
        if (judged := self._judged(failure)) is not failure:
            failure = judged
            self._final = self._concluded(failure)
            self._write_termination_message()
        if server is not None:
            server.shutdown()
        return 0 if failure is None else failure.exit_code

    def report(self) -> Report:
        """What is known now."""
        if self._final is not None:
            return self._final
        return read_report(self._disk.run) or Report(
            job_uid=self._document.job.uid, stage=self._document.stage, attempt=self._document.attempt
        )

    # Processes

    def _run_step(self, step: str) -> ReportedFailure | None:
        """Run one step to its end; the failure of the process that failed first, or None."""
        if self._terminating:
            return self._terminated("before its work began")
        count = self._document.processes if step == "train" else 1
        port = _free_port() if count > 1 and self._nodes == 1 else 0
        self._ended = []
        self._children = [self._launch(step, local_rank, count, port) for local_rank in range(count)]
        if self._terminating:
            # It was asked for while they were launched, when they were not known yet.
            self._signal(signal.SIGTERM)
        cause: Child | None = None
        stalled = ""
        lost = ""
        kill_at: float | None = None
        while any(child.exit_code is None for child in self._children):
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=TICK_SECONDS)
            self._reap()
            failed = [child for child in self._ended if child.exit_code != 0]
            if failed and cause is None:
                cause = failed[0]
                stopped = self._class_said(cause) is FailureClass.TERMINATED
                if stopped and not self._terminating and self._nodes > 1:
                    # Another pod was told to stop, and all save together. Nobody else would end one that hangs.
                    kill_at = time.monotonic() + self._document.spec.checkpoint.grace_period_seconds
                # When all were asked to stop, the others have the whole grace period to save.
                elif not (stopped and self._terminating):
                    self._signal(signal.SIGTERM)
                    kill_at = time.monotonic() + PEER_GRACE_SECONDS
            if not stalled and cause is None and step == "train" and (stalled := self._stalled()):
                log.error("%s Stacks follow.", stalled)
                self._signal(signal.SIGUSR1)  # faulthandler prints the stacks
                kill_at = time.monotonic() + PEER_GRACE_SECONDS
            if not lost and cause is None and step == "train" and (lost := self._lost_peers() or self._unconnected()):
                # They wait for what will never come, and would not hear a SIGTERM.
                log.error("%s", lost)
                self._signal(signal.SIGUSR1)
                kill_at = time.monotonic() + PEER_GRACE_SECONDS
            if kill_at is not None and time.monotonic() >= kill_at:
                self._signal(signal.SIGKILL)
            self._write_termination_message()
        for child in self._children:
            # A grandchild may hold the pipe open for ever.
            child.reader.join(timeout=2)
        if stalled:
            return self._failure(FailureClass.NO_PROGRESS, stalled, rank=None)
        if lost:
            return self._failure(FailureClass.COMMUNICATION, lost, rank=None)
        return self._cause_of(self._root_of(cause)) if cause is not None else None

    def _launch(self, step: str, local_rank: int, count: int, port: int) -> Child:
        rank = self._node * count + local_rank
        size = self._nodes * count
        failure_file(self._disk.run, rank).unlink(missing_ok=True)
        environment = os.environ | {ENV_DOCUMENT: str(self._document_path), "PYTHONUNBUFFERED": "1", "RANK": str(rank)}
        if step == "train" and size > 1:
            environment |= {
                "LOCAL_RANK": str(local_rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(count),
                "NODE_RANK": str(self._node),
            }
            if self._nodes == 1:
                environment |= {ENV_MAIN_ADDRESS: "127.0.0.1", ENV_MAIN_PORT: str(port)}
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
        process = subprocess.Popen(
            [sys.executable, "-m", "finetune_trainer.main", step],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        reader = threading.Thread(target=self._log.copy, args=(process.stdout, rank, size), daemon=True)
        reader.start()
        return Child(rank, process, reader)

    def _reap(self) -> None:
        """Collect ended children, and orphans that became ours because we are process 1.

        `Popen.poll` is not used: waiting for any child would take its status away.
        """
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for child in self._children:
                if child.process.pid == pid:
                    child.exit_code = child.process.returncode = os.waitstatus_to_exitcode(status)
                    self._ended.append(child)

    def _signal(self, number: signal.Signals) -> None:
        for child in self._children:
            if child.exit_code is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.process.pid, number)

    def _on_terminate(self, number: int, frame: Any) -> None:
        self._terminating = True
        if self._peers:
            self._peers.close()
        self._signal(signal.SIGTERM)
        self._wake.put(None)

    def _stalled(self) -> str:
        """What does not go on though it should; empty when nothing does. The time begins anew when training comes back
        from something else, such as saving; and the clock is our own, since that of the node may be set."""
        report = self.report()
        what = WATCHED.get(report.phase)
        if what is None:
            self._last_seen = None
            return ""
        step = report.progress and (report.progress.step, report.progress.last_step_time)
        seen = (report.phase, step, report.measured_rows)
        if seen != self._last_seen:
            self._last_seen, self._last_seen_at = seen, time.monotonic()
        if time.monotonic() - self._last_seen_at <= self._document.stall_seconds:
            return ""
        return f"{what} for {self._document.stall_seconds} s."

    # Other pods

    @property
    def _taken_away(self) -> bool:
        """Whether this pod was told to stop, or another one was: only such a pod is ever replaced."""
        return self._terminating or bool(self._peers and self._peers.replaced)

    def _meet(self) -> ReportedFailure | None:
        """Wait until all can begin: no process begins to wait for one that may never come."""
        if self._peers is None:
            return None
        reporter = Reporter(self._document, self._disk.run)
        reporter.phase("WaitingForNodes")
        self._peers.ready()
        deadline = time.monotonic() + self._document.stall_seconds
        while self._peers.awaited:
            if self._terminating:
                return self._terminated("before its work began")
            if (missing := self._peers.missing) and time.monotonic() > deadline:
                text = f"{_pods(missing)} did not come in {self._document.stall_seconds} s, and training needs all of"
                return self._failure(
                    FailureClass.COMMUNICATION,
                    f"{text} them. Make room for {self._nodes} pods at once, or let the network policy allow them to "
                    "reach each other.",
                    rank=None,
                )
            if lost := self._lost_peers():
                return self._failure(FailureClass.COMMUNICATION, lost, rank=None)
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=TICK_SECONDS)
            self._write_termination_message()
        self._peers.settle()
        reporter.close()
        return None

    def _lost_peers(self) -> str:
        """Which pods are gone without whom training cannot go on; empty when none is."""
        if self._peers is None or (self._node == 0 and self.report().phase == ALONE):
            return ""
        if replaced := self._peers.replaced:
            return f"{_pods(replaced)} came back as another pod."
        seconds = peers.SILENCE_SECONDS_AT_THE_END if self._terminating else peers.SILENCE_SECONDS
        silent = self._peers.silent(seconds)
        return f"{_pods(silent)} did not answer for {seconds:.0f} s." if silent else ""

    def _unconnected(self) -> str:
        """What to do when the agents reach each other and the training processes do not; empty while they may. torch
        would try for a day."""
        report = self.report()
        if (
            self._peers is None
            or report.phase != CONNECTING
            or _age(report.update_time) <= self._document.stall_seconds
        ):
            return ""
        return (
            f"The training processes did not reach each other in {self._document.stall_seconds} s. Let the network "
            "policy allow all ports between the pods of the job."
        )

    def _judged(self, failure: ReportedFailure | None) -> ReportedFailure | None:
        """The failure as it counts: pods are not told to stop at the same moment, and one that lost another one because
        of it was stopped, too."""
        if self._peers is None or failure is None or not self._taken_away:
            return failure
        if failure.failure_class is not FailureClass.COMMUNICATION:
            return failure
        stopped = FailureClass.TERMINATED
        return failure.model_copy(update={"failure_class": stopped, "exit_code": exit_code_of(stopped)})

    def _hold(self, failure: ReportedFailure | None) -> None:
        """Let the pod end first that is the cause. When it has, this one is told to stop, too. The Job of a queue goes
        on, and removes nobody: there the other one falls silent, or is replaced."""
        if self._peers is None or failure is None:
            return
        seconds = {
            FailureClass.COMMUNICATION: HOLD_SECONDS,
            # Another pod was told to stop, and all have saved. It may not have sent its part yet.
            FailureClass.TERMINATED: float(self._document.spec.checkpoint.grace_period_seconds),
        }.get(failure.failure_class, 0.0)
        started = time.monotonic()
        while not self._taken_away and (held := time.monotonic() - started) < seconds:
            if held > HOLD_SECONDS and self._peers.silent(HOLD_SECONDS):
                return
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=TICK_SECONDS)

    # Failures

    def _root_of(self, first: Child) -> Child:
        """The process to blame: the first that failed, unless it failed because another one was gone. That one may take
        longer to end than its peers take to notice."""
        if self._class_said(first) is FailureClass.TERMINATED:
            # All were stopped; the main process knows what was saved.
            return min((child for child in self._ended if self._class_said(child)), key=lambda child: child.rank)
        consequences = (None, FailureClass.COMMUNICATION, FailureClass.TERMINATED)
        if self._class_said(first) is not FailureClass.COMMUNICATION:
            return first
        return next((child for child in self._ended if self._class_said(child) not in consequences), first)

    def _class_said(self, child: Child) -> FailureClass | None:
        said = self._said(child)
        return said.failure_class if said else None

    def _said(self, child: Child) -> ReportedFailure | None:
        """The failure that the process left behind."""
        try:
            return ReportedFailure.model_validate_json(failure_file(self._disk.run, child.rank).read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def _cause_of(self, child: Child) -> ReportedFailure:
        """Why the process failed: what it said itself, else what its end shows."""
        said = self._said(child)
        if said is not None:
            return self._failure(said.failure_class, said.message, child.rank)
        if self._terminating and (child.exit_code == -signal.SIGTERM or child.exit_code == 143):
            return self._terminated("before it could save a checkpoint")
        code = child.exit_code or 0
        if code == exit_code_of(FailureClass.DISK_FULL):
            # The one failure that may leave no room to say so.
            return self._failure(FailureClass.DISK_FULL, RULES[FailureClass.DISK_FULL].sentence, child.rank)
        if code == -signal.SIGKILL:
            if _oom_kills() > self._oom_kills:
                return self._failure(
                    FailureClass.OUT_OF_MEMORY_HOST,
                    "The pod ran out of memory and the kernel killed the process. Raise the memory of this stage.",
                    rank=child.rank,
                )
            return self._failure(
                FailureClass.UNKNOWN, "The process was killed (SIGKILL) by something outside it.", rank=child.rank
            )
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if code == -signal.SIGABRT and self._nodes > 1:
            text = "The process ended itself (SIGABRT), as NCCL does when it loses another one; see the log."
            return self._failure(FailureClass.COMMUNICATION, text, rank=child.rank)
        return self._failure(
            FailureClass.UNKNOWN, f"The process died ({name}) without saying why; see the log.", rank=child.rank
        )

    def _terminated(self, when: str) -> ReportedFailure:
        return self._failure(FailureClass.TERMINATED, f"The pod was stopped from outside {when}.", rank=None)

    def _failure(self, failure_class: FailureClass, message: str, rank: int | None) -> ReportedFailure:
        return ReportedFailure(
            failure_class=failure_class,
            message=self._redact(message),
            exit_code=exit_code_of(failure_class),
            rank=rank,
            log_tail=self._log.tail(),
        )

    # What stays

    def _concluded(self, failure: ReportedFailure | None) -> Report:
        outcome = Outcome.FAILED if failure else Outcome.SUCCEEDED
        return self.report().model_copy(update={"outcome": outcome, "failure": failure, "update_time": now()})

    def _write_termination_message(self) -> None:
        """Keep the termination message valid at any instant: a killed pod leaves the last one.

        The file is a mount in a pod and cannot be replaced, so it is overwritten in one call and then cut to length;
        a reader ignores what follows the first JSON value.
        """
        message = self.report().encode()
        if message == self._last_message:
            return
        try:
            descriptor = os.open(self._termination, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(descriptor, message, 0)
                os.ftruncate(descriptor, len(message))
            finally:
                os.close(descriptor)
            self._last_message = message
        except OSError as error:
            log.warning("the termination message cannot be written: %s", error)

    def _store(self) -> None:
        """Put log and report beside the attempt's files, without waiting long for a storage that does not answer."""
        thread = threading.Thread(target=self._store_now, daemon=True)
        thread.start()
        thread.join(timeout=STORE_SECONDS)
        if thread.is_alive():
            log.warning("log and report could not be stored in %d s", STORE_SECONDS)

    def _store_now(self) -> None:
        from finetune_trainer.storage import open_folder

        assert self._final is not None
        prefix = layout.attempt_prefix(self._document.stage, self._document.attempt)
        try:
            work = open_folder(self._document.work_uri, self._document.storage)
            self._log.flush()
            log_file, report_file = layout.last_words(self._node)
            work.upload(self._log.path, f"{prefix}/{log_file}")
            self._final = self._final.model_copy(update={"log_uri": f"{work.uri}/{prefix}/{log_file}"})
            work.write(f"{prefix}/{report_file}", self._final.encode(limit=64 * 1024))
        except JobError as error:
            log.warning("log and report could not be stored: %s", error.message)


class _Log:
    """Copies the children's output to our own and to a file, line by line, without secrets."""

    def __init__(self, path: Path, redact: Redactor) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._redact = redact
        self._tail: deque[str] = deque(maxlen=40)
        self._lock = threading.Lock()

    def copy(self, stream: IO[bytes], rank: int, count: int) -> None:
        prefix = f"[rank {rank}] " if count > 1 else ""
        for raw in stream:
            line = prefix + self._redact(raw.decode(errors="replace").rstrip("\n"))
            with self._lock:
                self._tail.append(line)
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
                # A process whose output nobody reads any more would hang, for a disk that is full.
                with contextlib.suppress(OSError):
                    self._file.write(line + "\n")

    def flush(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._file.flush()

    def tail(self) -> str:
        """The last lines, at most MAX_LOG_TAIL_BYTES of UTF-8."""
        with self._lock:
            data = "\n".join(line[:300] for line in self._tail).encode()[-MAX_LOG_TAIL_BYTES:]
        return data.decode(errors="ignore")


def _pods(nodes: list[int]) -> str:
    return f"Pod {nodes[0]} of the attempt" + (f" and {len(nodes) - 1} more" if len(nodes) > 1 else "")


def _age(time_of_report: str | None) -> float:
    """Seconds since then."""
    if time_of_report is None:
        return 0.0
    return (datetime.now(UTC) - datetime.fromisoformat(time_of_report)).total_seconds()


def serve(report: Any, metrics: Any, hear: Callable[[str], str] | None = None) -> ThreadingHTTPServer | None:
    """Answer /metrics, /progress and /healthz on the pod's address; None when the port is taken. `hear` takes the
    heartbeats of other pods.

    A job does not depend on being watched, so that a port that cannot be had is a warning.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            if path == "/metrics":
                self._answer(metrics(), "text/plain; version=0.0.4; charset=utf-8")
            elif path == "/progress":
                self._answer(report().encode(limit=32 * 1024), "application/json")
            elif path == "/healthz":
                self._answer(b"ok\n", "text/plain; charset=utf-8")
            elif path == peers.PATH and hear is not None and (answer := hear(query)):
                self._answer(answer.encode(), "text/plain; charset=utf-8")
            else:
                self.send_error(404)

        def _answer(self, body: bytes, content_type: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            return

    address = os.environ.get(ENV_POD_IP) or "0.0.0.0"

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        daemon_threads = True

    try:
        server = Server((address, AGENT_PORT), Handler)
    except OSError as error:
        log.warning("progress and metrics are not served: %s:%d cannot be used (%s)", address, AGENT_PORT, error)
        return None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _oom_kills() -> int:
    """How often the kernel killed a process of this container for memory; 0 where it does not say."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(path).read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0
