"""Runs pods as processes of this machine: scheduler and kubelet of the local cluster in one.

Each container of a pod is one process in a session of its own (see `processes`), in the pod's own folder, with the
paths of its volumes translated (see `pod_files`). The pod's image, its security context and probes are ignored.
On Linux every pod has its own loopback address, so that each can listen on the same port; elsewhere all share
127.0.0.1.

A pod is stopped as a kubelet stops it: SIGTERM to the first process of each container, and after the grace period
SIGKILL to everything that is left. The order of events is the kubelet's: deletionTimestamp, terminated with its
message, gone. A container that holds more memory than its limit is killed as the kernel would (see `pod_worker`).

What a runner finds from an earlier life it treats like a kubelet after a reboot: the processes are killed, and a pod
that is not restarted has failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import shutil
import sys
from collections import deque
from collections.abc import AsyncIterator, Collection, Mapping
from pathlib import Path

from finetune_operator.local.addresses import loopback, named_address
from finetune_operator.local.apiserver import errors
from finetune_operator.local.apiserver.api import Api, DeleteOptions, timestamp
from finetune_operator.local.apiserver.errors import ApiError
from finetune_operator.local.apiserver.store import Event, Key, Object
from finetune_operator.local.events import EventRecorder
from finetune_operator.local.pod_files import PodFiles, container_folder, pod_folder
from finetune_operator.local.pod_status import terminated
from finetune_operator.local.pod_worker import PodWorker
from finetune_operator.local.processes import Leader, kill_all
from finetune_operator.local.scheduler import (
    GPU,
    NODE,
    Hardware,
    detect,
    node_object,
    obstacles,
    requested,
    unschedulable_condition,
    unschedulable_message,
)

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 10.0
"""Pods get no longer than this to stop when the whole cluster stops."""
_TERMINAL = ("Succeeded", "Failed")
_LOG_CHUNK = 64 * 1024
_LOG_POLL_SECONDS = 0.1


class Runner:
    """Schedules and runs the pods of one API, below one folder."""

    def __init__(self, api: Api, root: Path, environment: Mapping[str, str]) -> None:
        """`environment`: variables that every container has, unless it sets them itself."""
        self._api = api
        self._root = root
        self._environment = environment
        self._hardware = Hardware()
        self._events = EventRecorder(api, "kubelet")
        self._scheduler_events = EventRecorder(api, "default-scheduler")
        self._workers: dict[str, PodWorker] = {}
        self._dirty: dict[Key, None] = {}
        self._gone: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._cleanups: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Register the node, clean up after an earlier life, and run pods from now on."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._hardware = await detect()
        self._register_node(self._hardware)
        await self._recover()
        self._api.store.listen(self._notice)
        for pod in self._api.objects(self._api.pods):
            self._mark(pod)
        self._task = asyncio.create_task(self._run(), name="runner")

    async def stop(self) -> None:
        """Stop all pods, as a node does that shuts down: they count as disrupted, not as failed by themselves."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        workers = list(self._workers.values())
        for worker in workers:
            worker.shut_down(SHUTDOWN_SECONDS)
        await asyncio.gather(*(worker.task for worker in workers), return_exceptions=True)
        await asyncio.gather(*self._cleanups, return_exceptions=True)

    # -- logs

    async def read(self, pod: Object, container: str, *, follow: bool, tail_lines: int | None) -> AsyncIterator[bytes]:
        """What a container wrote, and with `follow` what it writes until it ends."""
        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        state = self._container_state(pod, container)
        if "waiting" in state:
            reason = state["waiting"].get("reason", "PodInitializing")
            raise errors.bad_request(f'container "{container}" in pod "{name}" is waiting to start: {reason}')
        path = container_folder(pod_folder(self._root, uid), container) / "log"
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(path.open("rb"))
            except FileNotFoundError:
                return
            if tail_lines is not None:
                file.seek(await asyncio.to_thread(_tail_position, path, tail_lines))
            while True:
                # Asked before reading: what was written before the end is read after it.
                current = self._api.find(self._api.pods, *_key(pod))
                ended = current is None or "running" not in self._container_state(current, container)
                while chunk := file.read(_LOG_CHUNK):
                    yield chunk
                if not follow or ended:
                    return
                await asyncio.sleep(_LOG_POLL_SECONDS)

    def _container_state(self, pod: Object, container: str) -> Object:
        spec, status = pod["spec"], pod["status"]
        known = [item["name"] for item in [*spec["containers"], *spec.get("initContainers", ())]]
        if container not in known:
            name = pod["metadata"]["name"]
            raise errors.bad_request(f"container {container} is not valid for pod {name}")
        statuses = [*status.get("containerStatuses", ()), *status.get("initContainerStatuses", ())]
        states = {item["name"]: item["state"] for item in statuses}
        state: Object = states.get(container, {"waiting": {"reason": "ContainerCreating"}})
        return state

    # -- the loop

    def _notice(self, kind: str, event: Event) -> None:
        if kind == self._api.pods.key:
            self._mark(event.object)
            if event.type == "DELETED":
                self._gone[event.object["metadata"]["uid"]] = None
            if event.type == "DELETED" or event.object["status"].get("phase") in _TERMINAL:
                # Its GPUs are free: others may fit now.
                self._mark_unscheduled()
        elif kind == "nodes":
            self._mark_unscheduled()
        elif kind in ("configmaps", "secrets", "persistentvolumeclaims"):
            for worker in self._workers.values():
                worker.configuration_changed()

    def _mark_unscheduled(self) -> None:
        for pod in self._api.objects(self._api.pods):
            if "nodeName" not in pod["spec"]:
                self._mark(pod)

    def _mark(self, pod: Object) -> None:
        self._dirty[_key(pod)] = None
        self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._gone:
                uid = next(iter(self._gone))
                del self._gone[uid]
                self._clean_up(uid)
            while self._dirty:
                key = next(iter(self._dirty))
                del self._dirty[key]
                try:
                    self._look(key)
                except ApiError as error:
                    # The pod changed or went in between; that write marks it again.
                    logger.debug("pod %s: %s", "/".join(key), error)
                except Exception:
                    # One pod that cannot be handled must not take the others along.
                    logger.exception("pod %s", "/".join(key))
                await asyncio.sleep(0)

    def _look(self, key: Key) -> None:
        pod = self._api.find(self._api.pods, *key)
        if pod is None:
            return
        metadata, phase = pod["metadata"], pod["status"].get("phase")
        deleting = "deletionTimestamp" in metadata
        worker = self._workers.get(metadata["uid"])
        if "nodeName" not in pod["spec"]:
            if not deleting:
                self._schedule(pod)
        elif pod["spec"]["nodeName"] != NODE:
            return
        elif worker:
            if deleting:
                worker.stop(metadata["deletionGracePeriodSeconds"])
        elif deleting and metadata["deletionGracePeriodSeconds"] != 0:
            self._finish_deletion(pod)
        elif not deleting and phase not in _TERMINAL:
            self._launch(pod)

    def _schedule(self, pod: Object) -> None:
        metadata = pod["metadata"]
        reasons = obstacles(self._api, pod, self._hardware)
        if not reasons:
            bound = self._api.bind(metadata["namespace"], metadata["name"], NODE)
            where = f"{metadata['namespace']}/{metadata['name']}"
            self._scheduler_events.record(bound, "Normal", "Scheduled", f"Successfully assigned {where} to {NODE}")
            # Others may have waited for its company.
            self._mark_unscheduled()
            return
        message = unschedulable_message(reasons)
        if any(item.get("message") == message for item in pod["status"].get("conditions", ())):
            return
        conditions = [unschedulable_condition(self._api, message)]
        self._api.update_status(self._api.pods, pod, {**pod["status"], "conditions": conditions})
        self._scheduler_events.record(pod, "Warning", "FailedScheduling", message)

    def _launch(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        taken = {worker.ip for worker in self._workers.values()}
        files = PodFiles(self._api, self._root, pod, self._environment)
        address = named_address(pod) or _address(uid, taken)
        worker = PodWorker(self._api, self._events, files, pod, address, self._free_gpus(pod))
        self._workers[uid] = worker
        worker.task.add_done_callback(lambda task: self._ended(worker, task))

    def _free_gpus(self, pod: Object) -> list[int]:
        taken = {gpu for worker in self._workers.values() for gpu in worker.gpus}
        free = [gpu for gpu in range(self._hardware.gpus) if gpu not in taken]
        return free[: requested(pod).get(GPU, 0)]

    def _ended(self, worker: PodWorker, task: asyncio.Task[None]) -> None:
        self._workers.pop(worker.uid, None)
        if not task.cancelled() and task.exception():
            logger.error("pod %s", "/".join(worker.key), exc_info=task.exception())
        pod = self._api.find(self._api.pods, *worker.key)
        if pod:
            self._mark(pod)

    def _clean_up(self, uid: str) -> None:
        """The object is gone: so must be its processes and files."""
        worker = self._workers.get(uid)
        if worker:
            worker.stop(0)

        async def work() -> None:
            if worker:
                await asyncio.gather(worker.task, return_exceptions=True)
            await asyncio.to_thread(shutil.rmtree, pod_folder(self._root, uid), ignore_errors=True)

        task = asyncio.create_task(work())
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)

    def _finish_deletion(self, pod: Object) -> None:
        """A pod that never ran here, or has ended."""
        if pod["status"].get("phase") not in _TERMINAL:
            pod = self._api.update_status(self._api.pods, pod, {**pod["status"], "phase": "Failed"})
        self._api.delete(self._api.pods, *_key(pod), DeleteOptions(grace_seconds=0, uid=pod["metadata"]["uid"]))

    # -- an earlier life

    def _register_node(self, hardware: Hardware) -> None:
        nodes = self._api.resource("", "v1", "nodes")
        wanted = node_object(self._api, hardware)
        if self._api.find(nodes, "", NODE) is None:
            self._api.create(nodes, "", wanted)
            return
        self._api.update(nodes, "", NODE, lambda old: {**old, "metadata": {**old["metadata"], **wanted["metadata"]}})
        self._api.update(nodes, "", NODE, lambda old: {**old, "status": wanted["status"]}, "status")

    async def _recover(self) -> None:
        for folder in [path for path in self._root.iterdir() if path.name != "claims"]:
            leaders = [leader for path in folder.glob("containers/*/process.json") if (leader := Leader.load(path))]
            await kill_all(folder.name, leaders)
        pods = self._api.objects(self._api.pods)
        for pod in pods:
            started = pod["spec"].get("nodeName") == NODE and "containerStatuses" in pod["status"]
            if started and pod["status"]["phase"] not in _TERMINAL and pod["spec"]["restartPolicy"] == "Never":
                self._fail_lost(pod)
        uids = {pod["metadata"]["uid"] for pod in pods}
        for path in self._root.iterdir():
            if path.name not in uids and path.name != "claims":
                await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    def _fail_lost(self, pod: Object) -> None:
        """What a kubelet says of a container that it finds dead after a reboot."""
        now = self._api.now()
        statuses = []
        for status in pod["status"]["containerStatuses"]:
            if "terminated" not in status["state"]:
                started = status["state"].get("running", {}).get("startedAt", timestamp(now))
                state = terminated(255, "Unknown", started, now)
                status = {**status, "state": state, "ready": False, "started": False}
            statuses.append(status)
        conditions = [
            {**item, "status": "False", "reason": "PodFailed"} if item["type"] in ("Ready", "ContainersReady") else item
            for item in pod["status"].get("conditions", ())
        ]
        self._api.update_status(
            self._api.pods,
            pod,
            {**pod["status"], "phase": "Failed", "containerStatuses": statuses, "conditions": conditions},
        )


def _key(pod: Object) -> Key:
    return pod["metadata"]["namespace"], pod["metadata"]["name"]


def _address(uid: str, taken: Collection[str]) -> str:
    """A loopback address of the pod's own, the same whenever it can be."""
    addresses = (loopback(f"{uid}{attempt}") for attempt in itertools.count())
    return next(address for address in addresses if address not in taken or sys.platform != "linux")


def _tail_position(path: Path, lines: int) -> int:
    """Where the last lines of a file begin."""
    starts: deque[int] = deque(maxlen=lines)
    position = 0
    with path.open("rb") as file:
        for line in file:
            starts.append(position)
            position += len(line)
    return starts[0] if starts else position
