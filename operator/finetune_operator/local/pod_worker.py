"""One pod from its first container to its last word."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable

from finetune_operator.local.apiserver.api import Api, DeleteOptions, timestamp
from finetune_operator.local.apiserver.errors import ApiError
from finetune_operator.local.apiserver.store import Object
from finetune_operator.local.events import EventRecorder
from finetune_operator.local.pod_files import ConfigError, Launch, MountError, PodFiles
from finetune_operator.local.pod_status import (
    ContainerState,
    pod_status,
    running,
    terminated,
    termination_message,
    waiting,
)
from finetune_operator.local.processes import Leader, holds_more, kill_all, start
from finetune_operator.sizes import quantity_bytes

logger = logging.getLogger(__name__)

RETRY_SECONDS = 10.0
"""How often a pod looks again for what it lacks, besides whenever a ConfigMap, Secret or claim changes."""
BACKOFF_SECONDS = 10.0
MAX_BACKOFF_SECONDS = 300.0
START_ERROR = 128
MEMORY_SECONDS = 1.0
"""How often it is looked whether a container keeps to its limit of memory. A kernel would be faster."""
NEVER = "1970-01-01T00:00:00Z"


class PodWorker:
    """Runs a pod as a task, from creation on."""

    def __init__(self, api: Api, events: EventRecorder, files: PodFiles, pod: Object, ip: str, gpus: list[int]) -> None:
        self._api = api
        self._events = events
        self._pod = pod
        self._files = files
        self._leaders: list[Leader] = []
        self._stopping = asyncio.Event()
        self._hurried = asyncio.Event()
        self._changed = asyncio.Event()
        self._deadline = float("inf")
        self.key = pod["metadata"]["namespace"], pod["metadata"]["name"]
        self.uid: str = pod["metadata"]["uid"]
        self.ip = ip
        self.gpus = gpus
        spec = pod["spec"]
        first = "PodInitializing" if spec.get("initContainers") else "ContainerCreating"
        before = {item["name"]: item["restartCount"] + 1 for item in pod["status"].get("containerStatuses", ())}
        self._states = {
            container["name"]: ContainerState(waiting(first), before.get(container["name"], 0))
            for container in [*spec.get("initContainers", ()), *spec["containers"]]
        }
        self.task = asyncio.create_task(self._run(), name=f"pod {'/'.join(self.key)}")

    def stop(self, grace_seconds: float) -> None:
        """Ask the processes to end, and kill them after the grace period; a later call can only hurry."""
        deadline = asyncio.get_running_loop().time() + grace_seconds
        if deadline < self._deadline:
            self._deadline = deadline
            self._stopping.set()
            self._hurried.set()

    def shut_down(self, most_seconds: float) -> None:
        """Stop because the node goes away: the pod is marked as disrupted first, so that nobody blames it."""
        condition = {
            "type": "DisruptionTarget",
            "status": "True",
            "lastTransitionTime": timestamp(self._api.now()),
            "reason": "TerminationByKubelet",
            "message": "Pod was terminated in response to imminent node shutdown.",
        }

        def change(pod: Object) -> Object:
            others = [item for item in pod["status"].get("conditions", ()) if item["type"] != "DisruptionTarget"]
            return {**pod, "status": {**pod["status"], "conditions": [*others, condition]}}

        with contextlib.suppress(ApiError):
            self._api.update(self._api.pods, *self.key, change, "status")
        self.stop(min(most_seconds, self._pod["spec"]["terminationGracePeriodSeconds"]))

    def configuration_changed(self) -> None:
        """Something that the pod may be waiting for was written."""
        self._changed.set()

    # -- life

    async def _run(self) -> None:
        try:
            await self._live()
        except Exception as error:
            logger.exception("pod %s cannot be run", "/".join(self.key))
            self._end_all("RunnerError", str(error))
        await kill_all(self.uid, self._leaders)
        self._close()

    async def _live(self) -> None:
        spec = self._pod["spec"]
        self._publish()
        if not await self._mount():
            return
        for container in spec.get("initContainers", ()):
            await self._run_container(container, "OnFailure" if spec["restartPolicy"] == "Always" else None)
            if self._states[container["name"]].exit_code != 0:
                return
        async with asyncio.TaskGroup() as group:
            for container in spec["containers"]:
                group.create_task(self._run_container(container))

    async def _mount(self) -> bool:
        """Make the volumes, however long it takes until all that they need is there."""
        while not self._stopping.is_set():
            self._changed.clear()
            try:
                self._files.mount()
            except MountError as error:
                self._events.record(self._pod, "Warning", "FailedMount", str(error))
                await self._first(self._changed.wait(), self._stopping.wait(), timeout=RETRY_SECONDS)
            else:
                return True
        return False

    async def _run_container(self, container: Object, policy: str | None = None) -> None:
        """Run a container, again and again where its restart policy says so."""
        policy = policy or self._pod["spec"]["restartPolicy"]
        item = self._states[container["name"]]
        while not self._stopping.is_set():
            launch = await self._configure(container)
            if launch is None:
                return
            await self._run_once(container, launch)
            if self._stopping.is_set():
                return
            if policy == "Never" or (policy == "OnFailure" and item.exit_code == 0):
                self._publish()
                return
            item.last, item.restarts = item.state, item.restarts + 1
            pause = min(BACKOFF_SECONDS * 2 ** (item.restarts - 1), MAX_BACKOFF_SECONDS)
            item.state = waiting("CrashLoopBackOff", f"back-off {pause:g}s restarting failed container")
            self._publish()
            await self._first(self._stopping.wait(), timeout=pause)

    async def _configure(self, container: Object) -> Launch | None:
        """What to start, once everything it refers to is there; None when the pod was stopped before."""
        item = self._states[container["name"]]
        while not self._stopping.is_set():
            self._changed.clear()
            try:
                return self._files.launch(container, self.ip, self.gpus)
            except ConfigError as error:
                state = waiting("CreateContainerConfigError", str(error))
                if item.state != state:
                    item.state = state
                    self._publish()
                self._events.record(self._pod, "Warning", "Failed", f"Error: {error}")
                await self._first(self._changed.wait(), self._stopping.wait(), timeout=RETRY_SECONDS)
        return None

    async def _run_once(self, container: Object, launch: Launch) -> None:
        item = self._states[container["name"]]
        launch.log.write_bytes(b"")
        try:
            process, leader = await start(launch.argv, launch.environment, launch.folder, launch.log)
        except OSError as error:
            what = error.strerror or "cannot be started"
            if isinstance(error, FileNotFoundError) and error.filename != str(launch.folder):
                what = "executable file not found in $PATH"
            message = f'exec: "{launch.argv[0]}": {what}'
            self._events.record(self._pod, "Warning", "Failed", f"Error: {message}")
            item.state = terminated(START_ERROR, "StartError", NEVER, self._api.now(), message)
            return
        leader.save(launch.leader)
        self._leaders.append(leader)
        started = timestamp(self._api.now())
        item.state = running(self._api.now())
        self._publish()
        self._events.record(self._pod, "Normal", "Started", "Container started")
        guard = asyncio.create_task(self._guard(process, memory_limit(container)))
        try:
            code = await self._wait(container, process)
            killed = guard.done() and guard.exception() is None
        finally:
            guard.cancel()
        out_of_memory = killed and code == 128 + signal.SIGKILL
        # The first process was the container: nothing of its session lives on.
        await kill_all(f"{self.uid}/{container['name']}", [leader])
        self._leaders.remove(leader)
        message = termination_message(container, launch.termination, launch.log, code)
        reason = "OOMKilled" if out_of_memory else "Error" if code else "Completed"
        item.state = terminated(code, reason, started, self._api.now(), message)

    async def _guard(self, process: asyncio.subprocess.Process, limit: float) -> None:
        """Kill a container that holds more memory than it may; what it started is killed with it."""
        while not holds_more(process.pid, limit):
            await asyncio.sleep(MEMORY_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            process.kill()

    async def _wait(self, container: Object, process: asyncio.subprocess.Process) -> int:
        """The exit code, as a shell counts: 128 and the signal for a process that was killed."""
        loop = asyncio.get_running_loop()
        exited = asyncio.ensure_future(process.wait())
        await self._first(exited, self._stopping.wait())
        if not exited.done():
            self._events.record(self._pod, "Normal", "Killing", f"Stopping container {container['name']}")
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        while not exited.done():
            self._hurried.clear()
            left = self._deadline - loop.time()
            if left <= 0:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                break
            await self._first(exited, self._hurried.wait(), timeout=left)
        code = await exited
        return code if code >= 0 else 128 - code

    async def _first(self, *work: Awaitable[object], timeout: float | None = None) -> None:
        """Wait until one of several things happens; the others are given up, except for futures."""
        tasks = [asyncio.ensure_future(item) for item in work]
        try:
            await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task, item in zip(tasks, work, strict=True):
                if task is not item:
                    task.cancel()

    # -- status

    def _publish(self, *, over: bool = False) -> None:
        """Write down what is true now. The pod may be gone by force; then nobody is interested."""

        def change(pod: Object) -> Object:
            return {**pod, "status": pod_status(pod, self._states, self.ip, self._api.now(), over=over)}

        with contextlib.suppress(ApiError):
            stored = self._api.find(self._api.pods, *self.key)
            if stored and stored["metadata"]["uid"] == self.uid:
                self._api.update(self._api.pods, *self.key, change, "status")

    def _close(self) -> None:
        """The last word, and the end of the object if somebody asked for it."""
        if self._stopping.is_set():
            self._end_all("ContainerStatusUnknown", "The container could not be located when the pod was terminated")
        self._publish(over=True)
        pod = self._api.find(self._api.pods, *self.key)
        if pod and pod["metadata"]["uid"] == self.uid and "deletionTimestamp" in pod["metadata"]:
            self._api.delete(self._api.pods, *self.key, DeleteOptions(grace_seconds=0, uid=self.uid))

    def _end_all(self, reason: str, message: str) -> None:
        """Containers that have not said themselves how they ended."""
        for item in self._states.values():
            if item.exit_code is None:
                item.state = terminated(137, reason, NEVER, self._api.now(), message)


def memory_limit(container: Object) -> float:
    """Bytes of memory that a container may hold."""
    limit = container["resources"].get("limits", {}).get("memory")
    return quantity_bytes(limit) if limit else float("inf")
