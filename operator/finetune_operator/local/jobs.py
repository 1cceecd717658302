"""The Job controller: creates the pods of batch/v1 Jobs, counts how they end, and concludes.

The order of steps is that of the real controller, because its intermediate states are what an operator sees: pods keep
a finalizer until they are counted, `FailureTarget` comes before `Failed` and `SuccessCriteriaMet` before `Complete`,
and the terminal condition waits until no pod is left terminating. Messages are the real ones, word for word.
Everything is derived from the stored Job and pods; only the delays between retries are kept in memory.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from finetune_operator.local.apiserver.api import Api, DeleteOptions, timestamp
from finetune_operator.local.apiserver.errors import ApiError
from finetune_operator.local.apiserver.kinds import JOB_TRACKING_FINALIZER
from finetune_operator.local.apiserver.store import Event, Key, Object
from finetune_operator.local.events import EventRecorder
from finetune_operator.local.job_state import (
    FINISHED,
    TERMINAL,
    completed_indexes,
    completion_index,
    counts_against_limit,
    deleting,
    fail_job_message,
    format_indexes,
    has_finalizer,
    is_failed,
    is_finished,
    is_ready,
    job_of,
    key_of,
    new_condition,
    new_pod,
    phase_of,
    readiness,
    set_condition,
    set_counts,
    set_or_drop,
    settle,
    true_condition,
)

logger = logging.getLogger(__name__)

RETRY_SECONDS = 10.0
"""Pause after the first failed pod; it doubles with each further one."""
MAX_RETRY_SECONDS = 600.0
CREATE_RETRY_SECONDS = 1.0
"""Pause after pods were refused; it doubles with each further refusal."""
MAX_CREATE_RETRY_SECONDS = 60.0


@dataclass
class _Retries:
    """Failures since the last success, for the pause before the next pod."""

    failures: int
    last: datetime


@dataclass
class _Sync:
    """One look at a Job: what is true of it, and the status that is being written."""

    job: Object
    status: Object
    pods: list[Object]
    now: datetime
    counted: list[Object] = field(default_factory=list)
    """Pods whose end is accounted for in this round, and which may lose their finalizer."""

    @property
    def spec(self) -> Object:
        spec: Object = self.job["spec"]
        return spec

    @property
    def active(self) -> list[Object]:
        return [pod for pod in self.pods if phase_of(pod) not in TERMINAL and not deleting(pod)]

    @property
    def terminating(self) -> list[Object]:
        return [pod for pod in self.pods if phase_of(pod) not in TERMINAL and deleting(pod)]

    @property
    def indexed(self) -> bool:
        return bool(self.spec["completionMode"] == "Indexed")

    @property
    def suspended(self) -> bool:
        return bool(self.spec["suspend"])


class JobController:
    """Runs as a task until it is cancelled."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._events = EventRecorder(api, "job-controller")
        self._retries: dict[str, _Retries] = {}
        self._refusals: dict[str, int] = {}
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._dirty: dict[Key, None] = {}
        self._wake = asyncio.Event()
        api.store.listen(self._notice)

    async def run(self) -> None:
        """Look at every Job once, then at each that changes."""
        for job in self._api.objects(self._api.jobs):
            self._mark(key_of(job))
        for pod in self._api.objects(self._api.pods):
            self._notice_pod(pod)
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._dirty:
                key = next(iter(self._dirty))
                del self._dirty[key]
                try:
                    self._sync(key)
                except ApiError as error:
                    # The Job or a pod changed under us, or is gone: that write marks the Job again.
                    logger.debug("job %s: %s", "/".join(key), error)
                except Exception:
                    # One Job that cannot be handled must not take the others along.
                    logger.exception("job %s", "/".join(key))
                await asyncio.sleep(0)

    def _notice(self, kind: str, event: Event) -> None:
        if kind == self._api.jobs.key:
            if event.type == "DELETED":
                self._retries.pop(event.object["metadata"]["uid"], None)
                self._refusals.pop(event.object["metadata"]["uid"], None)
            self._mark(key_of(event.object))
        elif kind == self._api.pods.key:
            self._notice_pod(event.object)

    def _notice_pod(self, pod: Object) -> None:
        owner = job_of(pod)
        if owner:
            self._mark((pod["metadata"]["namespace"], owner["name"]))

    def _mark(self, key: Key) -> None:
        self._dirty[key] = None
        self._wake.set()

    def _mark_later(self, key: Key, seconds: float) -> None:
        """One timer for each Job is enough: whoever is woken too early asks again."""
        loop = asyncio.get_running_loop()
        when = loop.time() + max(seconds, 0.0) + 0.01
        timer = self._timers.get(key)
        if timer and loop.time() < timer.when() <= when:
            return
        if timer:
            timer.cancel()
        self._timers[key] = loop.call_at(when, self._ring, key)

    def _ring(self, key: Key) -> None:
        self._timers.pop(key, None)
        self._mark(key)

    # -- one Job

    def _sync(self, key: Key) -> None:
        job = self._api.find(self._api.jobs, *key)
        pods = [pod for pod in self._api.objects(self._api.pods, key[0]) if (job_of(pod) or {}).get("name") == key[1]]
        if job is None or is_finished(job):
            self._release(pods)
            if job:
                self._expire(job)
            return
        uid = job["metadata"]["uid"]
        foreign = [pod for pod in pods if (job_of(pod) or {})["uid"] != uid]
        self._release(foreign)
        own = [pod for pod in pods if pod not in foreign]
        status = copy.deepcopy(job["status"])
        status.setdefault("uncountedTerminatedPods", {})
        if "startTime" not in status and not job["spec"]["suspend"]:
            status["startTime"] = timestamp(self._api.now())
        sync = _Sync(job, status, own, self._api.now())
        self._note_ends(sync)
        conclusion = self._conclusion(sync)
        active = len(sync.active)
        ready = sum(is_ready(pod) for pod in sync.active)
        terminating = len(sync.terminating)
        if conclusion:
            for pod in sync.active:
                self._delete_pod(sync.job, pod)
                terminating += 1
            active = ready = 0
        else:
            if "deletionTimestamp" not in job["metadata"]:
                active, removed = self._manage(sync)
                terminating += len(removed)
                ready -= sum(is_ready(pod) for pod in removed)
            if _is_complete(sync, active):
                conclusion = new_condition(
                    "SuccessCriteriaMet", "CompletionsReached", "Reached expected number of succeeded pods", sync.now
                )
            elif "deletionTimestamp" not in job["metadata"]:
                self._note_suspension(sync)
        set_counts(status, active=active, ready=ready, terminating=terminating)
        self._account(sync, conclusion)

    def _release(self, pods: Iterable[Object]) -> None:
        """Pods whose Job is over or gone need not be counted any more."""
        for pod in pods:
            self._remove_finalizer(pod)

    def _expire(self, job: Object) -> None:
        lifetime = job["spec"].get("ttlSecondsAfterFinished")
        if lifetime is None or "deletionTimestamp" in job["metadata"]:
            return
        finished = max(item["lastTransitionTime"] for item in job["status"]["conditions"] if item["type"] in FINISHED)
        left = datetime.fromisoformat(finished) + timedelta(seconds=lifetime) - self._api.now()
        if left > timedelta(0):
            self._mark_later(key_of(job), left.total_seconds())
        else:
            options = DeleteOptions(propagation="Foreground", uid=job["metadata"]["uid"])
            self._api.delete(self._api.jobs, *key_of(job), options)

    def _conclusion(self, sync: _Sync) -> Object | None:
        """The condition that ends the Job, if it is time: first what was concluded before, then failures."""
        met = true_condition(sync.status, "SuccessCriteriaMet")
        if met:
            return met
        target = true_condition(sync.status, "FailureTarget")
        if target:
            return new_condition("Failed", target["reason"], target["message"], sync.now)
        message = fail_job_message(sync.job, sync.pods)
        if message:
            return new_condition("FailureTarget", "PodFailurePolicy", message, sync.now)
        if _failed(sync) > sync.spec["backoffLimit"] or _restarts_exceeded(sync):
            message = "Job has reached the specified backoff limit"
            return new_condition("FailureTarget", "BackoffLimitExceeded", message, sync.now)
        deadline = sync.spec.get("activeDeadlineSeconds")
        if deadline is not None and not sync.suspended:
            left = datetime.fromisoformat(sync.status["startTime"]) + timedelta(seconds=deadline) - sync.now
            if left <= timedelta(0):
                message = "Job was active longer than specified deadline"
                return new_condition("FailureTarget", "DeadlineExceeded", message, sync.now)
            self._mark_later(key_of(sync.job), left.total_seconds())
        return None

    # -- pods

    def _manage(self, sync: _Sync) -> tuple[int, list[Object]]:
        """Create or delete pods towards what the spec wants. Returns how many are active, and which were deleted."""
        active = sync.active
        if sync.suspended:
            surplus = active
        else:
            wanted = _wanted(sync, len(active))
            surplus = sorted(active, key=readiness)[: max(len(active) - wanted, 0)]
        if surplus or sync.suspended:
            for pod in surplus:
                # Without the finalizer first: a pod that we stop ourselves is not counted as failed.
                self._remove_finalizer(pod)
                self._delete_pod(sync.job, pod)
            return len(active) - len(surplus), surplus
        occupied = len(active)
        if sync.spec["podReplacementPolicy"] == "Failed":
            occupied += len(sync.terminating)
        missing = wanted - occupied
        if missing > 0:
            pause = self._pause(sync)
            if pause > 0:
                self._mark_later(key_of(sync.job), pause)
                return 0, []
            return len(active) + self._create_pods(sync, missing), []
        return len(active), []

    def _note_ends(self, sync: _Sync) -> None:
        """A failure makes the next pod wait, a success forgets all failures."""
        uid = sync.job["metadata"]["uid"]
        if any(has_finalizer(pod) and phase_of(pod) == "Succeeded" for pod in sync.pods):
            self._retries.pop(uid, None)
        elif failures := len(_newly_failed(sync)):
            before = self._retries.get(uid)
            self._retries[uid] = _Retries((before.failures if before else 0) + failures, sync.now)

    def _pause(self, sync: _Sync) -> float:
        retries = self._retries.get(sync.job["metadata"]["uid"])
        if retries is None:
            return 0.0
        pause: float = min(RETRY_SECONDS * 2 ** (retries.failures - 1), MAX_RETRY_SECONDS)
        return pause - (sync.now - retries.last).total_seconds()

    def _create_pods(self, sync: _Sync, count: int) -> int:
        indexes: list[int | None] = [None] * count
        if sync.indexed:
            indexes = list(_pending_indexes(sync)[:count])
        created, uid = 0, sync.job["metadata"]["uid"]
        for index in indexes:
            try:
                pod = self._api.create(self._api.pods, sync.job["metadata"]["namespace"], new_pod(sync.job, index))
            except ApiError as error:
                self._events.record(sync.job, "Warning", "FailedCreate", f"Error creating: {error}")
                refusals = self._refusals.get(uid, 0)
                self._refusals[uid] = refusals + 1
                pause = min(CREATE_RETRY_SECONDS * 2**refusals, MAX_CREATE_RETRY_SECONDS)
                self._mark_later(key_of(sync.job), pause)
                break
            self._refusals.pop(uid, None)
            created += 1
            self._events.record(sync.job, "Normal", "SuccessfulCreate", f"Created pod: {pod['metadata']['name']}")
        return created

    def _delete_pod(self, job: Object, pod: Object) -> None:
        if self._api.find(self._api.pods, *key_of(pod)):
            self._api.delete(self._api.pods, *key_of(pod), DeleteOptions(uid=pod["metadata"]["uid"]))
        self._events.record(job, "Normal", "SuccessfulDelete", f"Deleted pod: {pod['metadata']['name']}")

    def _remove_finalizer(self, pod: Object) -> None:
        def change(stored: Object) -> Object:
            metadata = stored["metadata"]
            metadata["finalizers"] = [name for name in metadata["finalizers"] if name != JOB_TRACKING_FINALIZER]
            return stored

        stored = self._api.find(self._api.pods, *key_of(pod))
        if stored and stored["metadata"]["uid"] == pod["metadata"]["uid"] and has_finalizer(stored):
            self._api.update(self._api.pods, *key_of(pod), change)

    # -- status

    def _note_suspension(self, sync: _Sync) -> None:
        if sync.suspended:
            if set_condition(sync.status, new_condition("Suspended", "JobSuspended", "Job suspended", sync.now)):
                self._events.record(sync.job, "Normal", "Suspended", "Job suspended")
                sync.status.pop("startTime", None)
        else:
            resumed = new_condition("Suspended", "JobResumed", "Job resumed", sync.now, "False")
            if set_condition(sync.status, resumed):
                self._events.record(sync.job, "Normal", "Resumed", "Job resumed")
                sync.status["startTime"] = timestamp(sync.now)

    def _account(self, sync: _Sync, conclusion: Object | None) -> None:
        """Count pods that ended: first write down which, then remove their finalizers, then count. A controller that
        stops in between neither forgets a pod nor counts it twice."""
        status = sync.status
        settle(status, sync.pods)
        self._count(sync, conclusion)
        if conclusion and conclusion["type"] == "FailureTarget":
            status.setdefault("conditions", []).append(conclusion)
            conclusion = {**conclusion, "type": "Failed"}
        elif conclusion and conclusion["type"] == "SuccessCriteriaMet":
            if not true_condition(status, "SuccessCriteriaMet"):
                status.setdefault("conditions", []).append(conclusion)
            conclusion = new_condition("Complete", conclusion["reason"], conclusion["message"], sync.now)
        self._flush(sync)
        for pod in sync.counted:
            self._remove_finalizer(pod)
        settle(status, self._own_pods(sync))
        uncounted = status["uncountedTerminatedPods"]
        finished = conclusion is not None and not uncounted and not status["terminating"]
        if conclusion and finished:
            set_condition(status, conclusion)
            if conclusion["type"] == "Complete":
                status["completionTime"] = conclusion["lastTransitionTime"]
        self._flush(sync)
        if conclusion and finished:
            if conclusion["type"] == "Complete":
                self._events.record(sync.job, "Normal", "Completed", "Job completed")
            else:
                self._events.record(sync.job, "Warning", conclusion["reason"], conclusion["message"])

    def _count(self, sync: _Sync, conclusion: Object | None) -> None:
        """Note the pods that have ended, by uid, or by index where the Job is Indexed and they succeeded."""
        uncounted = sync.status["uncountedTerminatedPods"]
        failing = conclusion is not None and conclusion["type"] != "SuccessCriteriaMet"
        over = conclusion is not None or "deletionTimestamp" in sync.job["metadata"]
        succeeded_indexes = set(completed_indexes(sync.status))
        for pod in sync.pods:
            uid, phase = pod["metadata"]["uid"], phase_of(pod)
            failed = is_failed(pod, sync.job)
            if not has_finalizer(pod) or not (over or failed or phase == "Succeeded"):
                continue
            sync.counted.append(pod)
            index = completion_index(pod)
            valid = not sync.indexed or (index is not None and index < sync.spec["completions"])
            if phase == "Succeeded":
                if sync.indexed and valid and index is not None:
                    succeeded_indexes.add(index)
                elif not sync.indexed and uid not in uncounted.get("succeeded", ()):
                    uncounted.setdefault("succeeded", []).append(uid)
            elif (
                (failed or failing)
                and valid
                and uid not in uncounted.get("failed", ())
                and counts_against_limit(sync.job, pod)
            ):
                uncounted.setdefault("failed", []).append(uid)
        if sync.indexed:
            set_or_drop(sync.status, "completedIndexes", format_indexes(succeeded_indexes))
            set_or_drop(sync.status, "succeeded", len(succeeded_indexes))

    def _own_pods(self, sync: _Sync) -> list[Object]:
        stored = (self._api.find(self._api.pods, *key_of(pod)) for pod in sync.pods)
        return [pod for pod in stored if pod]

    def _flush(self, sync: _Sync) -> None:
        if sync.status != sync.job["status"]:
            sync.job = self._api.update_status(self._api.jobs, sync.job, copy.deepcopy(sync.status))


def _newly_failed(sync: _Sync) -> list[Object]:
    """Failed pods that count against the limit and are in no counter yet."""
    uncounted = sync.status["uncountedTerminatedPods"].get("failed", [])
    return [
        pod
        for pod in sync.pods
        if has_finalizer(pod)
        and pod["metadata"]["uid"] not in uncounted
        and is_failed(pod, sync.job)
        and counts_against_limit(sync.job, pod)
    ]


def _failed(sync: _Sync) -> int:
    counted: int = sync.status.get("failed", 0)
    return counted + len(sync.status["uncountedTerminatedPods"].get("failed", [])) + len(_newly_failed(sync))


def _is_complete(sync: _Sync, active: int) -> bool:
    succeeded = _succeeded(sync)
    wanted: int = sync.spec.get("completions", 1)
    return succeeded >= wanted and active == 0


def _wanted(sync: _Sync, active: int) -> int:
    parallelism: int = sync.spec["parallelism"]
    if "completions" not in sync.spec:
        return active if _succeeded(sync) else parallelism
    left: int = sync.spec["completions"] - _succeeded(sync)
    return max(min(left, parallelism), 0)


def _succeeded(sync: _Sync) -> int:
    if sync.indexed:
        return len(_succeeded_indexes(sync))
    uncounted = sync.status["uncountedTerminatedPods"].get("succeeded", [])
    new = [
        pod
        for pod in sync.pods
        if has_finalizer(pod) and phase_of(pod) == "Succeeded" and pod["metadata"]["uid"] not in uncounted
    ]
    succeeded: int = sync.status.get("succeeded", 0)
    return succeeded + len(uncounted) + len(new)


def _succeeded_indexes(sync: _Sync) -> set[int]:
    ended = {completion_index(pod) for pod in sync.pods if has_finalizer(pod) and phase_of(pod) == "Succeeded"}
    known = set(completed_indexes(sync.status)) | {index for index in ended if index is not None}
    return {index for index in known if index < sync.spec["completions"]}


def _pending_indexes(sync: _Sync) -> list[int]:
    taken = _succeeded_indexes(sync) | {index for pod in sync.active if (index := completion_index(pod)) is not None}
    if sync.spec["podReplacementPolicy"] == "Failed":
        taken |= {index for pod in sync.terminating if (index := completion_index(pod)) is not None}
    return [index for index in range(sync.spec["completions"]) if index not in taken]


def _restarts_exceeded(sync: _Sync) -> bool:
    """With restartPolicy OnFailure the containers' restarts count against the limit."""
    if sync.spec["template"]["spec"]["restartPolicy"] != "OnFailure":
        return False
    restarts: int = sum(
        status["restartCount"]
        for pod in sync.pods
        if phase_of(pod) in ("Running", "Pending")
        for status in pod["status"].get("containerStatuses", ())
    )
    limit: int = sync.spec["backoffLimit"]
    return restarts > 0 if limit == 0 else restarts >= limit
