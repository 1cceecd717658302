"""Everything that `finetune local` runs: the embedded cluster, an S3 server, and the real operator.

All of it lives in one state folder and belongs to one process, which holds a lock on the folder; other commands find
the running stack through `stack.json`. The operator is a process of its own, as in a cluster, and is started again when
it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune_operator.local.cluster import LocalCluster

logger = logging.getLogger(__name__)

START_SECONDS = 30.0
RESTART_SECONDS = 1.0
STOP_SECONDS = 10.0


class StackError(RuntimeError):
    """The stack cannot be started; the message says why and what to do."""


@dataclass(frozen=True)
class Stack:
    """How to reach a running stack."""

    kubeconfig: str
    s3_endpoint: str
    s3_folder: str
    """The buckets as plain files."""
    metrics_url: str
    """Of the operator."""
    access_key: str
    secret_key: str

    @property
    def s3_environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL_S3": self.s3_endpoint,
            "AWS_REGION": "us-east-1",
        }


def _description(state: Path) -> Path:
    return state / "stack.json"


def running(state: Path) -> Stack | None:
    """The stack that runs on this state folder, or None."""
    try:
        with _locked(state):
            return None
    except StackError:
        with contextlib.suppress(OSError, ValueError):
            return Stack(**json.loads(_description(state).read_text()))
        raise


@contextlib.contextmanager
def _locked(state: Path) -> Iterator[None]:
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (state / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StackError(f"{state} is in use by another finetune local: stop it, or use its cluster") from error
        yield


@contextlib.asynccontextmanager
async def start(state: Path, *, with_cluster: bool = True) -> AsyncIterator[Stack]:
    """Run a stack as long as the context lasts. Without a cluster there is only the S3 server.

    Raises:
        StackError: the folder is in use, or a part does not start.
    """
    state = state.resolve()
    async with contextlib.AsyncExitStack() as exits:
        exits.enter_context(_locked(state))
        kept = _kept(state)
        stack = Stack(
            kubeconfig=str(state / "kubeconfig"),
            s3_endpoint=f"http://127.0.0.1:{_port(kept.get('s3_port'))}",
            s3_folder=str(state / "s3"),
            metrics_url=f"http://127.0.0.1:{_port(kept.get('metrics_port'))}/metrics",
            access_key=kept["access_key"],
            secret_key=kept["secret_key"],
        )
        _keep(state, kept | {"s3_port": _port_of(stack.s3_endpoint), "metrics_port": _port_of(stack.metrics_url)})
        await exits.enter_async_context(_s3(stack, state))
        if with_cluster:
            cluster = LocalCluster(
                state / "cluster", kubeconfig=Path(stack.kubeconfig), pod_environment=stack.s3_environment
            )
            await exits.enter_async_context(cluster)
            await exits.enter_async_context(_operator(stack, state))
        _write_private(_description(state), json.dumps(asdict(stack)))
        exits.callback(_description(state).unlink, missing_ok=True)
        yield stack


def _kept(state: Path) -> dict[str, Any]:
    """What stays the same when a stack starts again: keys, and ports where they are still free."""
    try:
        kept: dict[str, Any] = json.loads((state / "kept.json").read_text())
    except FileNotFoundError:
        kept = {"access_key": f"LOCAL{secrets.token_hex(8).upper()}", "secret_key": secrets.token_urlsafe(30)}
    return kept


def _keep(state: Path, kept: dict[str, Any]) -> None:
    _write_private(state / "kept.json", json.dumps(kept))


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def _port(wanted: int | None) -> int:
    """The wanted port when it is free, else any free one."""
    for port in (wanted or 0, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return int(probe.getsockname()[1])
    raise StackError("there is no free port on 127.0.0.1")


def _port_of(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


@contextlib.asynccontextmanager
async def _s3(stack: Stack, state: Path) -> AsyncIterator[None]:
    port = _port_of(stack.s3_endpoint)
    arguments = ["-m", "finetune_operator.local.s3", "--port", str(port), "--folder", stack.s3_folder]
    process = await _spawn(arguments, stack.s3_environment, state / "s3.log")
    try:
        await _until_open(port, process, state / "s3.log")
        yield
    finally:
        await _end(process)


@contextlib.asynccontextmanager
async def _operator(stack: Stack, state: Path) -> AsyncIterator[None]:
    environment = {
        "KUBECONFIG": stack.kubeconfig,
        "FINETUNE_TRAINER_IMAGE": "local",
        "FINETUNE_S3_ENDPOINT": stack.s3_endpoint,
        "FINETUNE_S3_REGION": "us-east-1",
        "FINETUNE_ALLOW_FILES": "true",
        "FINETUNE_HTTP_HOST": "127.0.0.1",
        "FINETUNE_HTTP_PORT": str(_port_of(stack.metrics_url)),
        # Nobody shares this API server, so that progress may come as often as a person looks.
        "FINETUNE_POLL_SECONDS": "1",
        "FINETUNE_PROGRESS_SECONDS": "2",
    }
    supervisor = asyncio.create_task(_supervise(environment, state / "operator.log"))
    try:
        yield
    finally:
        supervisor.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await supervisor


async def _supervise(environment: dict[str, str], log: Path) -> None:
    """Run the operator, and run it again when it ends, as a Deployment would."""
    while True:
        process = await _spawn(["-m", "finetune_operator.main"], environment, log)
        try:
            code = await process.wait()
        finally:
            await _end(process)
        logger.warning("the operator ended with %s; starting it again", code)
        await asyncio.sleep(RESTART_SECONDS)


async def _spawn(arguments: list[str], environment: dict[str, str], log: Path) -> asyncio.subprocess.Process:
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            env=os.environ | environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # Ctrl-C ends the foreground process, which ends the others in order.
            start_new_session=True,
        )


async def _until_open(port: int, process: asyncio.subprocess.Process, log: Path) -> None:
    deadline = asyncio.get_running_loop().time() + START_SECONDS
    while asyncio.get_running_loop().time() < deadline and process.returncode is None:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)
        else:
            writer.close()
            return
    raise StackError(f"a part of the stack did not start; see {log}")


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
