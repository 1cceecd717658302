"""The only module that knows kopf: which events make which job dirty, and how the operator lives.

Everything is `on.event`: no finalizer and no annotation of kopf's is put on any object, so that an operator that is
uninstalled strands nothing. Handlers only mark a job dirty, and return None: kopf would write a returned value into the
status of the object.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import secrets
import signal
import socket
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import kopf

from finetune_api import GROUP, PLURAL, VERSION
from finetune_api.names import LABEL_JOB_NAME, LABEL_JOB_UID
from finetune_operator import server
from finetune_operator.config import Settings
from finetune_operator.election import Election
from finetune_operator.kube import FINETUNE_JOBS, JOBS, PODS, Kind, Kube, load_client
from finetune_operator.limiter import TokenBucket
from finetune_operator.metrics import Metrics
from finetune_operator.progress import ProgressReader
from finetune_operator.reconcile import Key, Reconciler
from finetune_operator.watches import Name, Watch
from finetune_operator.work_queue import WorkQueue

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""How long an order to stop waits for the looks in hand."""


class Operator:
    """What lives as long as the process: the queue, the clients, the lease, the resync."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.queue: WorkQueue[Key] = WorkQueue(late=self.metrics.lateness.observe)
        self.stopping = asyncio.Event()
        self._exits = contextlib.AsyncExitStack()
        self._reader = ProgressReader()
        self._election: Election | None = None
        self._leads = False
        self._tasks: list[asyncio.Task[None]] = []
        """Those without which nothing works."""
        self._resynced = time.monotonic()
        self._ready = False
        self._namespaces = settings.namespaces or (None,)
        self._watches = {
            (kind.plural, namespace): Watch() for kind in (FINETUNE_JOBS, JOBS, PODS) for namespace in self._namespaces
        }
        self.metrics.queue_depth.set_function(lambda: float(len(self.queue)))

    def watched(self, plural: str, namespace: str | None, name: str | None, version: str | None) -> None:
        """A watch has shown a version of an object."""
        if namespace and name and version:
            watch = self._watches[plural, namespace if self.settings.namespaces else None]
            watch.show((namespace, name), version)

    def mark(self, namespace: str | None, name: str | None) -> None:
        if namespace and name:
            self.queue.add(Key(namespace, name))

    async def open(self) -> None:
        """What a standby has too: a client, and somebody who answers probes."""
        self._api = await load_client()
        self._exits.push_async_callback(self._api.close)
        self._exits.push_async_callback(self._reader.close)
        settings = self.settings
        runner = await server.serve(settings.http_host, settings.http_port, self.metrics, self.unhealthy, self.unready)
        self._exits.push_async_callback(runner.cleanup)

    async def lead(self) -> None:
        """Return when this process is the one that works."""
        if self.settings.lease_name:
            # A client of its own, without limit and retries: a renewal must not wait behind other requests.
            api = await load_client()
            self._exits.push_async_callback(api.close)
            self._election = Election(
                Kube(api, self.metrics, retries=0),
                self.settings.lease_namespace,
                self.settings.lease_name,
                f"{self.settings.pod_name or socket.gethostname()}_{secrets.token_hex(4)}",
                self.settings.lease_seconds,
            )
            self._exits.push_async_callback(self._election.release)
            # A process that was stopped looks at its lease before it does anything else.
            signal.signal(signal.SIGCONT, lambda *_: self.check())
            self._exits.callback(signal.signal, signal.SIGCONT, signal.SIG_DFL)
            await self._election.win()
            self._run("lease", self._election.keep())
        self._leads, self._resynced = True, time.monotonic()
        self.metrics.is_leader.set(1)

    def check(self) -> None:
        """Does not return when another one may lead."""
        if self._election is not None:
            self._election.check()

    async def start(self) -> None:
        limiter = TokenBucket(self.settings.kube_qps, self.settings.kube_burst)
        kube = Kube(self._api, self.metrics, self.check, limiter)
        reconciler = Reconciler(kube, self._reader, self.settings, self.metrics, self.queue.add)
        workers = self._run("workers", self.queue.run(reconciler, self.settings.workers))
        self._exits.push_async_callback(self._finish, workers)
        self._run("resync", self._resync(kube))

    async def stop(self) -> None:
        """Undo it all, in reverse order; once more does nothing."""
        self.stopping.set()  # kopf waits for its task that waits for this
        await self._exits.aclose()

    def _run(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.append(task)
        self._exits.push_async_callback(_end, task)
        return task

    async def _finish(self, workers: asyncio.Task[None]) -> None:
        self.queue.close()
        _, late = await asyncio.wait({workers}, timeout=STOP_SECONDS)
        if late:
            log.warning("some jobs were still looked at after %.0f s; the next operator looks again", STOP_SECONDS)

    def unready(self) -> str:
        """Why this process does not do its part, be it to work or to stand by; empty when it does."""
        if self._leads:
            return self.unhealthy() or ("" if self._ready else "no resync has succeeded yet\n")
        return self._election.problem() if self._election else "starting\n"

    def unhealthy(self) -> str:
        """What a new process would mend; empty when there is nothing. A standby has nothing to be late with."""
        if not self._leads:
            return ""
        dead = [task.get_name() for task in self._tasks if task.done()]
        if dead:
            return f"{dead[0]} ended\n"
        for (plural, namespace), watch in self._watches.items():
            if watch.silent:
                return f"the watch of {plural} in {namespace or 'all namespaces'} shows no changes\n"
        age = time.monotonic() - self._resynced
        if age > 3 * self.settings.resync_seconds + 30:
            return f"the last successful resync was {age:.0f} s ago\n"
        return ""

    async def _resync(self, kube: Kube) -> None:
        """Look at every job now and then: events can be missed, and time passes without any."""
        while True:
            lost = 0
            for namespace in self._namespaces:
                try:
                    for name in await self._compare(kube, FINETUNE_JOBS, namespace):
                        # Not all at once, but for the first time: nobody knows what this process has missed.
                        later = random.uniform(0, self.settings.resync_seconds) if self._ready else 0.0
                        self.queue.add(Key(*name), later)
                    for kind in (JOBS, PODS):
                        await self._compare(kube, kind, namespace, labelSelector=LABEL_JOB_UID)
                except Exception as error:
                    # One namespace that was deleted, and its role with it, must not stop the others.
                    lost += 1
                    log.warning("resync of %s failed: %s", namespace or "all namespaces", error)
            if lost < len(self._namespaces):
                self._resynced, self._ready = time.monotonic(), True
                self.metrics.last_resync.set_to_current_time()
            await asyncio.sleep(self.settings.resync_seconds)

    async def _compare(self, kube: Kube, kind: Kind, namespace: str | None, **query: str) -> set[Name]:
        """List objects, and judge the watch that should have shown them. Returns their names, and those of objects that
        are gone since the last list: that they were deleted may have been missed."""
        found = await kube.versions(kind, namespace, **query)
        return self._watches[kind.plural, namespace].compare(found) | found.keys()


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def build_registry(operator: Operator) -> kopf.OperatorRegistry:
    """All handlers. An explicit registry has no login handler of its own."""
    registry = kopf.OperatorRegistry()
    children = {LABEL_JOB_UID: kopf.PRESENT}

    @kopf.on.login(registry=registry)
    def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        account = kopf.login_with_service_account(**kwargs)
        if account is None:
            return kopf.login_with_kubeconfig(**kwargs)
        # By its address, as other clients have it: kopf's name for the server needs a DNS that answers.
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
        return replace(account, server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}")

    @kopf.on.startup(registry=registry)
    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings, operator.settings)
        await operator.start()

    @kopf.on.cleanup(registry=registry)
    async def stop(**_: Any) -> None:
        await operator.stop()

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def job_changed(namespace: str | None, name: str | None, meta: kopf.Meta, **_: Any) -> None:
        operator.watched(PLURAL, namespace, name, meta.get("resourceVersion"))
        operator.mark(namespace, name)

    @kopf.on.event("batch", "v1", "jobs", labels=children, registry=registry)
    @kopf.on.event("", "v1", "pods", labels=children, registry=registry)
    async def child_changed(
        resource: kopf.Resource, namespace: str | None, name: str | None, meta: kopf.Meta, labels: kopf.Labels, **_: Any
    ) -> None:
        operator.watched(resource.plural, namespace, name, meta.get("resourceVersion"))
        operator.mark(namespace, labels.get(LABEL_JOB_NAME))

    return registry


def configure(settings: kopf.OperatorSettings, ours: Settings) -> None:
    # Names of our own: kopf's default finalizer is shared by all kopf operators, and each removes it from the others'
    # objects (nolar/kopf#664). We never set it, but an `on.event` operator would still strip it.
    settings.persistence.finalizer = f"{GROUP}/finalizer"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=GROUP)
    # The server filters: without this, kopf streams every Job and Pod of the cluster.
    for resource in (("batch", "jobs"), ("", "pods")):
        settings.watching.label_selectors[resource] = LABEL_JOB_UID
    # Streams that went silent are opened anew (nolar/kopf#1267); the resync is the net below.
    settings.watching.inactivity_timeout = 70
    settings.watching.server_timeout = 300
    settings.networking.request_timeout = 30
    # Listing CRDs and namespaces needs cluster-wide rights that a namespaced install does not have.
    settings.scanning.disabled = True
    # Logs are logs; events are recorded explicitly.
    settings.posting.enabled = False
    settings.peering.standalone = True
    # Above all that a stop waits for, and below the pod's terminationGracePeriodSeconds.
    settings.process.ultimate_exiting_timeout = 25
