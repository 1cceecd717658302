"""Processes of pods: starting one, and finding every process that a pod left behind.

The first process of a container leads a session of its own, and all of a pod's processes inherit a mark in their
environment. Session and mark together find what has to go, also a daemon that left the session, and also after this
program was killed and started again: pid and start time are on disk. (Without /proc there is the process group only.)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

MARK = "FINETUNE_POD"
"""Environment variable of all processes of a pod; its value is `<uid>/<container>`."""
_KILL_SECONDS = 30.0


@dataclass(frozen=True)
class Leader:
    """The first process of a container. The start time tells it from a later process with the same pid."""

    pid: int
    started: str

    def save(self, path: Path) -> None:
        """Remember it over our own death."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Leader | None:
        """What was saved; None where there is nothing readable."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None


async def start(
    argv: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path
) -> tuple[asyncio.subprocess.Process, Leader]:
    """Start a session leader whose output goes to the log. Raises OSError where there is no such program."""
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *argv,
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, Leader(process.pid, _started(process.pid) or "")


async def kill_all(owner: str, leaders: Sequence[Leader]) -> None:
    """Kill every process of a pod (its uid) or a container (`<uid>/<container>`) and wait until none is left.

    A process that the kernel does not let go of is given up after half a minute, and said so."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _KILL_SECONDS
    left: list[int] = []
    while loop.time() < deadline:
        left = await asyncio.to_thread(survivors, owner, leaders)
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        # A killed process needs a moment to be gone, and one that was forking may have left a child.
        await asyncio.sleep(0.01)
    logger.error("processes of pod %s cannot be killed: %s", owner, left)


def survivors(owner: str, leaders: Sequence[Leader]) -> list[int]:
    """Living processes that belong to a pod or a container."""
    # A pid that now belongs to a younger process says nothing about its session.
    sessions = {leader.pid for leader in leaders if _started(leader.pid) in (None, leader.started)}
    if sys.platform != "linux":
        return group_members(sessions)
    mark = f"{MARK}={owner}".encode()
    return [pid for pid in _pids() if _belongs(pid, sessions, mark)]


def holds_more(pid: int, limit: float) -> bool:
    """Whether a process and its children hold more bytes than that which the kernel could not take back. Without /proc
    nobody knows."""
    pids = list(_family(pid))
    # What processes share counts for each of them at first: to tell how much that is takes the kernel long.
    if sum(_held(pid, "status", ("RssAnon:", "RssShmem:")) for pid in pids) <= limit:
        return False
    return sum(_held(pid, "smaps_rollup", ("Pss_Anon:", "Pss_Shmem:")) for pid in pids) > limit


def _family(pid: int) -> Iterator[int]:
    yield pid
    # Gone in between, or no /proc.
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from _family(int(child))


def _held(pid: int, file: str, names: tuple[str, ...]) -> int:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(names))


def group_members(groups: set[int]) -> list[int]:
    """Living processes of process groups: all that systems without /proc tell of another process."""
    answer = subprocess.run(["ps", "-A", "-o", "pid=,pgid=,stat="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in answer.stdout.splitlines()]
    return [int(pid) for pid, group, state in rows if int(group) in groups and not state.startswith("Z")]


def _belongs(pid: int, sessions: set[int], mark: bytes) -> bool:
    try:
        state, session = _stat(pid)[0], int(_stat(pid)[3])
        if state == "Z":
            return False
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return session in sessions or any(item == mark or item.startswith(mark + b"/") for item in environment)
    except (OSError, IndexError):
        # Gone in between, or another user's.
        return False


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat after the program's name, which may itself hold spaces and brackets."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _started(pid: int) -> str | None:
    """When a process started, in whatever unit the system has; None when there is none."""
    if sys.platform == "linux":
        try:
            return _stat(pid)[19]
        except OSError:
            return None
    answer = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None
