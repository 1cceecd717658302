"""A cluster in this process: `async with LocalCluster() as cluster: ... cluster.kubeconfig`.

    python -m finetune_operator.local.cluster --kubeconfig FILE [--state DIR] [--no-runner] [--port N]

runs one until SIGINT or SIGTERM. With a state directory, objects, pod logs and what pods wrote survive a restart.
Without a runner nothing executes pods: tests patch their status themselves, while the Job controller does its work.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import logging
import secrets
import signal
import sys
import tempfile
from collections.abc import Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from finetune_api import crd
from finetune_operator.local.apiserver.api import Api
from finetune_operator.local.apiserver.certificates import Identity
from finetune_operator.local.apiserver.gc import GarbageCollector
from finetune_operator.local.apiserver.server import HOST, Server
from finetune_operator.local.apiserver.store import Store
from finetune_operator.local.jobs import JobController
from finetune_operator.local.runner import Runner

logger = logging.getLogger(__name__)

NAMESPACES = ("default", "kube-system")


class ClusterRunningError(Exception):
    """The state directory is in use."""


class LocalCluster:
    """API server, Job controller, garbage collector and, unless told otherwise, a runner of pods.

    Give it an event loop without kopf: an operator that stops cancels all tasks of its loop that are younger than it.
    """

    def __init__(
        self,
        state_dir: Path | None = None,
        *,
        runner: bool = True,
        port: int = 0,
        kubeconfig: Path | None = None,
        pod_environment: Mapping[str, str] | None = None,
    ) -> None:
        """`state_dir`: where everything is kept; None keeps it in a temporary folder for the life of this object.
        `port`: 0 takes a free one. `kubeconfig`: where clients find it; None is a file in the state directory.
        `pod_environment`: variables that every container has, unless it sets them itself."""
        self._temporary = tempfile.TemporaryDirectory(prefix="finetune-") if state_dir is None else None
        self._state = Path(self._temporary.name) if self._temporary else Path(str(state_dir))
        self._with_runner = runner
        self._port = port
        self._pod_environment = pod_environment or {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stack = contextlib.AsyncExitStack()
        self.kubeconfig = kubeconfig or self._state / "kubeconfig"
        self.url = ""
        self.api: Api

    async def __aenter__(self) -> Self:
        self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        if self._temporary:
            self._stack.callback(self._temporary.cleanup)
        self._lock()
        store = Store(self._state / "journal.jsonl")
        self._stack.callback(store.close)
        self.api = Api(store)
        self._seed()
        runner = Runner(self.api, self._state / "pods", self._pod_environment) if self._with_runner else None
        identity = Identity(HOST)
        token = secrets.token_urlsafe(32)
        server = Server(self.api, identity.server_context(), token, self._port, logs=runner)
        await server.start()
        self._stack.push_async_callback(server.stop)
        self.url = server.url
        if runner:
            await runner.start()
            # Before the server stops, so that its last words about the pods are stored.
            self._stack.push_async_callback(runner.stop)
        self._run("garbage collector", GarbageCollector(self.api).run())
        self._run("Job controller", JobController(self.api).run())
        self._stack.push_async_callback(self._stop_tasks)
        identity.write_kubeconfig(self.kubeconfig, self.url, token)

    def _lock(self) -> None:
        """Two clusters in one folder would spoil each other's journal and kill each other's pods."""
        file = self._stack.enter_context((self._state / "lock").open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterRunningError(f"another local cluster runs in {self._state}: stop it first") from None

    def _seed(self) -> None:
        """What a new cluster has. The CRD is brought up to date in an old one too."""
        for name in NAMESPACES:
            if self.api.find(self.api.namespaces, "", name) is None:
                self.api.create(self.api.namespaces, "", {"metadata": {"name": name}})
        definition = crd.load()
        crds = self.api.resource("apiextensions.k8s.io", "v1", "customresourcedefinitions")
        name = definition["metadata"]["name"]
        if self.api.find(crds, "", name) is None:
            self.api.create(crds, "", definition)
        else:
            self.api.update(crds, "", name, lambda stored: {**stored, "spec": definition["spec"]})

    def _run(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_report)
        self._tasks.append(task)

    async def _stop_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _report(task: asyncio.Task[None]) -> None:
    """A controller that ends by itself has a bug; nobody awaits it, so it is said here."""
    if not task.cancelled() and task.exception():
        logger.error("%s stopped", task.get_name(), exc_info=task.exception())


async def _serve(arguments: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    cluster = LocalCluster(
        arguments.state, runner=not arguments.no_runner, port=arguments.port, kubeconfig=arguments.kubeconfig
    )
    async with cluster:
        logger.info("serving at %s, kubeconfig in %s", cluster.url, cluster.kubeconfig)
        await stop.wait()


def main(argv: list[str] | None = None) -> None:
    """Run a cluster until a signal."""
    parser = argparse.ArgumentParser(prog="python -m finetune_operator.local.cluster", description=__doc__)
    parser.add_argument("--kubeconfig", type=Path, required=True, help="where to write the kubeconfig")
    parser.add_argument("--state", type=Path, help="folder that keeps the state over restarts")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--no-runner", action="store_true", help="do not run pods")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(_serve(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
