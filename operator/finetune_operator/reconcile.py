"""Look, plan, write: the only module that sequences I/O.

Reads go to the API server each time: an old picture could start a second Job, and names alone would not notice. Writes
are idempotent: children have deterministic names, the status carries the resourceVersion it was planned on, events have
names made from what they say. Whether a status was written is known from its answer, or from the next look.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp

from finetune_api import API_VERSION, KIND
from finetune_api.names import LABEL_JOB_UID, LABEL_QUEUED_JOB_UID, MANAGER
from finetune_api.report import Report
from finetune_api.status import Phase
from finetune_operator import logs
from finetune_operator.config import Settings
from finetune_operator.kube import (
    BY_NAME,
    EVENTS,
    FINETUNE_JOBS,
    JOBS,
    PENDING,
    PODS,
    WORKLOADS,
    ApiError,
    Kube,
    merge_patch,
)
from finetune_operator.metrics import Metrics
from finetune_operator.observe import (
    ChildJob,
    Conflict,
    Observation,
    own_jobs,
    own_pods,
    read_jobs,
    read_pods,
    read_position,
    read_warnings,
    read_workload,
)
from finetune_operator.pace import pace_of
from finetune_operator.plan import Plan, plan
from finetune_operator.progress import ProgressReader
from finetune_operator.resource import FineTuneJob, format_time
from finetune_operator.status import Note

log = logging.getLogger(__name__)

ERROR_DELAYS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Seconds before a job is looked at again after errors in a row."""
EVENT_DELAY = 30.0
"""Seconds after which events that could not be recorded are tried again."""
REFUSED_SECONDS = 10.0
"""How long a refusal is believed: its text may differ each time, and each new text is a write, which makes us look."""


@dataclass(frozen=True, order=True)
class Key:
    """A FineTuneJob by name; its uid is whatever lives there now."""

    namespace: str
    name: str


class Reconciler:
    def __init__(
        self,
        kube: Kube,
        reader: ProgressReader,
        settings: Settings,
        metrics: Metrics,
        again: Callable[[Key, float], None],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._kube = kube
        self._reader = reader
        self._settings = settings
        self._metrics = metrics
        self._again = again
        self._clock = clock
        self._errors: dict[Key, int] = {}
        self._phases: dict[Key, Phase | None] = {}
        self._unsure: dict[Key, tuple[FineTuneJob, Plan]] = {}
        """Statuses that were written, as far as we know."""
        self._unsaid: dict[Key, list[dict[str, Any]]] = {}
        """Events that are to be recorded."""
        self._events_from: dict[Key, datetime] = {}
        """When those that could not be recorded may be tried again."""
        self._refused: dict[Key, tuple[datetime, tuple[str, str], dict[str, Any]]] = {}
        """Until when which child, by its job's uid and its name, is known to be refused, and why."""
        self._silent_since: dict[Key, datetime] = {}
        """Since when a running pod has not answered."""

    async def __call__(self, key: Key) -> None:
        """Bring one job forward. Never raises; what fails is tried again."""
        with logs.about(namespace=key.namespace, job=key.name), self._metrics.reconcile_seconds.time():
            try:
                delay = await self._reconcile(key)
            except Exception as error:
                delay = self._retry(key, error)
            else:
                self._errors.pop(key, None)
                self._metrics.reconciles.labels("success").inc()
        if delay is not None:
            self._again(key, delay)

    def _forget(self, key: Key) -> None:
        for known in (self._phases, self._unsure, self._unsaid, self._events_from, self._refused, self._silent_since):
            known.pop(key, None)

    def _retry(self, key: Key, error: Exception) -> float:
        count = self._errors[key] = self._errors.get(key, 0) + 1
        if isinstance(error, ApiError) and error.status == 409:
            # Somebody wrote in between: look again at once, what was planned may be wrong.
            self._metrics.reconciles.labels("conflict").inc()
            return 0.1
        self._metrics.reconciles.labels("error").inc()
        delay = ERROR_DELAYS[min(count, len(ERROR_DELAYS)) - 1]
        if isinstance(error, ApiError) and error.retry_after:
            delay = max(delay, error.retry_after)
        expected = isinstance(error, ApiError | aiohttp.ClientError | OSError | TimeoutError)
        log.warning("%s/%s: %s; trying again in %.0f s", key.namespace, key.name, error, delay, exc_info=not expected)
        return delay * random.uniform(0.8, 1.2)

    async def _reconcile(self, key: Key) -> float | None:
        body = await self._kube.get(FINETUNE_JOBS, key.namespace, key.name)
        if body is None:
            self._metrics.forget(key.namespace, key.name)
            self._forget(key)
            return None
        job = FineTuneJob.parse(body)
        logs.add(uid=job.uid)
        if key in self._unsure:
            before, planned = self._unsure.pop(key)
            if (before.uid, planned.status.to_json_dict()) == (job.uid, job.status.to_json_dict()):
                self._is_written(key, before, planned)
        if job.spec_problem and job.status.attempt is not None:
            log.warning("%s/%s is left alone: %s", job.namespace, job.name, job.spec_problem)
        if job.status_problem:
            log.warning("%s/%s is left alone: %s", job.namespace, job.name, job.status_problem)
        seen = await self._observe(job)
        planned = self._plan(job, seen)
        if planned.status.attempt is not None:
            logs.add(stage=planned.status.attempt.stage, attempt=planned.status.attempt.number)
        if planned.needs_events_of is not None:
            kind, name = planned.needs_events_of
            selector = f"involvedObject.kind={kind},involvedObject.name={name}"
            events = await self._kube.list(EVENTS, job.namespace, fieldSelector=selector)
            seen = replace(seen, warnings=read_warnings(events))
            planned = self._plan(job, seen)
        if planned.needs_workload_of is not None:
            seen = replace(seen, **await self._ask_kueue(job, planned.needs_workload_of))
            planned = self._plan(job, seen)
        obstacle = await self._create(job, planned)
        if obstacle is not None:
            planned = self._plan(job, replace(seen, **obstacle))
        for child in planned.delete:
            await self._kube.delete(JOBS, job.namespace, child.name, child.uid, child.resource_version)
            log.info("%s/%s: deleted Job %s", job.namespace, job.name, child.name)
        # Also when it fails: the answer may be what was lost.
        self._unsure[key] = (job, planned)
        await self._write_status(job, planned)
        del self._unsure[key]
        self._is_written(key, job, planned)
        all_said = await self._record_events(key)
        if planned.expired:
            await self._kube.delete(FINETUNE_JOBS, job.namespace, job.name, job.uid, job.resource_version)
            log.info("%s/%s: deleted, its time to live is over", job.namespace, job.name)
        if not all_said:
            return EVENT_DELAY if planned.look_again is None else min(EVENT_DELAY, planned.look_again)
        return planned.look_again

    def _is_written(self, key: Key, job: FineTuneJob, planned: Plan) -> None:
        """Take note of a change once: the next look will see a status in which nothing has changed."""
        self._metrics.observe(job, planned.status)
        self._phases[key] = planned.status.phase
        if planned.notes:
            self._unsaid.setdefault(key, []).extend(self._event(job, note) for note in planned.notes)

    def _plan(self, job: FineTuneJob, seen: Observation) -> Plan:
        return plan(job, seen, self._settings, self._clock(), pace_of(self._settings, self._phases.values()))

    # Looking

    async def _observe(self, job: FineTuneJob) -> Observation:
        selector = f"{LABEL_JOB_UID}={job.uid}"
        jobs = read_jobs(
            own_jobs(await self._kube.list(JOBS, job.namespace, labelSelector=selector), job.name, job.uid)
        )
        pods = read_pods(own_pods(await self._kube.list(PODS, job.namespace, labelSelector=selector), job.name))
        live: Report | None = None
        unreachable = ""
        # Of the newest attempt the first one speaks: an older one may be on a node that is lost. A pod that was told to
        # stop still speaks while it saves.
        running = next((pod for pod in reversed(pods) if pod.running and pod.ip and pod.index == 0), None)
        # Of the others, those that should end soon: a pod that answers is not on a lost node.
        asked = [pod for pod in pods if pod is running or (pod.running and pod.ip and pod.delete_by is not None)]
        answers = dict(zip(asked, await self._reader.read_all([pod.ip for pod in asked]), strict=True))
        if running is not None:
            live, unreachable = answers[running]
        key = Key(job.namespace, job.name)
        silent_seconds = 0.0
        if unreachable:
            since = self._silent_since.setdefault(key, self._clock())
            silent_seconds = (self._clock() - since).total_seconds()
        else:
            self._silent_since.pop(key, None)
        alive = frozenset(
            pod.name
            for pod, (said, _) in answers.items()
            if said is not None and (said.job_uid, said.stage, said.attempt) == (job.uid, pod.stage, pod.attempt)
        )
        return Observation(jobs, pods, live=live, unreachable=unreachable, silent_seconds=silent_seconds, alive=alive)

    async def _ask_kueue(self, job: FineTuneJob, child: ChildJob) -> dict[str, Any]:
        """What Kueue says of a Job, as fields of the observation."""
        for workloads, pending in zip(WORKLOADS, PENDING, strict=True):
            try:
                selector = f"{LABEL_QUEUED_JOB_UID}={child.uid}"
                found = await self._kube.list(workloads, job.namespace, labelSelector=selector)
            except ApiError as error:
                if error.status == 404:
                    continue
                if error.status == 403:
                    return {}  # an operator that may not look; the job waits all the same
                raise
            if not found:
                return {"workload": None}
            workload = read_workload(found[0])
            try:
                waiting = await self._kube.get(pending, job.namespace, child.queue, "pendingworkloads")
            except ApiError:
                waiting = None  # the place in the queue is a courtesy of an optional server
            return {"workload": replace(workload, position=read_position(waiting or {}, workload.name))}
        return {"no_kueue": True}

    # Writing

    async def _create(self, job: FineTuneJob, planned: Plan) -> dict[str, Any] | None:
        """Create the children; what stands in the way comes back as fields of the observation."""
        key = Key(job.namespace, job.name)
        for child in planned.create:
            kind = BY_NAME[child["kind"]]
            name = child["metadata"]["name"]
            until, refused, why = self._refused.get(key, (job.created, ("", ""), {}))
            if refused == (job.uid, name) and self._clock() < until:
                return why
            try:
                await self._kube.create(kind, job.namespace, child)
                log.info("%s/%s: created %s %s", job.namespace, job.name, child["kind"], name)
            except ApiError as error:
                if error.status == 409 and not _is_policy(error):
                    conflict = await self._conflict(job, child["kind"], name)
                    if conflict is not None:
                        return {"conflict": conflict}
                elif error.status in (400, 403, 422) or _is_policy(error):
                    # Quota, a webhook, or missing rights: waiting for a person.
                    invalid = error.status == 422 and not _is_policy(error)
                    why = {"create_error": error.message, "create_invalid": invalid}
                    self._refused[key] = (self._clock() + timedelta(seconds=REFUSED_SECONDS), (job.uid, name), why)
                    return why
                else:
                    raise
        return None

    async def _conflict(self, job: FineTuneJob, kind: str, name: str) -> Conflict | None:
        """Whose object has the name we need; None when it is our own from before we could say so."""
        existing = await self._kube.get(BY_NAME[kind], job.namespace, name)
        if existing is None:
            raise ApiError(409, f"{kind} {name} was there and is gone")
        metadata = existing["metadata"]
        owners = metadata.get("ownerReferences") or []
        if any(owner.get("uid") == job.uid for owner in owners):
            if "deletionTimestamp" in metadata:
                return Conflict(kind, name, stale=True, owner=job.name)
            return None
        earlier = any(owner.get("kind") == KIND and owner.get("name") == job.name for owner in owners)
        owner = f"{owners[0].get('kind')} {owners[0].get('name')}" if owners else "nobody"
        return Conflict(kind, name, stale=earlier or "deletionTimestamp" in metadata, owner=owner)

    async def _write_status(self, job: FineTuneJob, planned: Plan) -> None:
        before = job.status.to_json_dict()
        after = planned.status.to_json_dict()
        if before == after:
            return
        await self._kube.patch_status(
            FINETUNE_JOBS,
            job.namespace,
            job.name,
            {
                "metadata": {"resourceVersion": job.resource_version, "uid": job.uid},
                "status": merge_patch(before, after),
            },
        )
        if job.status.phase != planned.status.phase:
            log.info("%s/%s: %s", job.namespace, job.name, planned.status.phase)

    def _event(self, job: FineTuneJob, note: Note) -> dict[str, Any]:
        """Its name is made from what it says, so that saying it again changes nothing."""
        now = format_time(self._clock())
        attempt = f"{job.status.attempt}"
        digest = hashlib.sha256(f"{job.uid}/{note.reason}/{note.message}/{attempt}".encode()).hexdigest()[:16]
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{job.name}.{digest}", "namespace": job.namespace},
            "type": "Warning" if note.warning else "Normal",
            "reason": note.reason,
            "message": note.message,
            "involvedObject": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "namespace": job.namespace,
                "name": job.name,
                "uid": job.uid,
                "resourceVersion": job.resource_version,
            },
            "source": {"component": MANAGER},
            "reportingComponent": MANAGER,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }

    async def _record_events(self, key: Key) -> bool:
        """Record what is to be said, in its order; whether all was. No job waits for its events."""
        until = self._events_from.get(key)
        if until is not None and self._clock() < until:
            return False
        self._events_from.pop(key, None)
        events = self._unsaid.pop(key, [])
        while events:
            try:
                await self._kube.create(EVENTS, key.namespace, events[0])
            except (ApiError, aiohttp.ClientError, OSError, TimeoutError) as error:
                refused = isinstance(error, ApiError) and 400 <= error.status < 500 and error.status != 429
                if not (isinstance(error, ApiError) and error.status == 409):
                    log.warning("%s/%s: event %s: %s", key.namespace, key.name, events[0]["reason"], error)
                if not refused:
                    self._unsaid[key] = events
                    self._events_from[key] = self._clock() + timedelta(seconds=EVENT_DELAY)
                    return False
            del events[0]
        return True


def _is_policy(error: ApiError) -> bool:
    """A webhook or an admission policy refuses, with whatever status it likes, or a webhook does not answer."""
    said = ("admission webhook", "failed calling webhook", "AdmissionPolicy")
    return any(words in error.message for words in said)
