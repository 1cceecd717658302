"""The Job controller with pods whose status the test writes: what no real pod can be made to do in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from objects import job

from finetune_operator.local.apiserver.api import Api, DeleteOptions
from finetune_operator.local.apiserver.gc import GarbageCollector
from finetune_operator.local.apiserver.store import Object, Store
from finetune_operator.local.job_state import completed_indexes, format_indexes, match_failure_policy
from finetune_operator.local.jobs import JobController


class Lab:
    """An API with a Job controller and a clock that the test sets; the kubelet is the test."""

    def __init__(self, journal: Path | None = None) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.store = Store(journal)
        self.api = Api(self.store, lambda: self.now)
        if self.api.find(self.api.namespaces, "", "default") is None:
            self.api.create(self.api.namespaces, "", {"metadata": {"name": "default"}})
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(JobController(self.api).run()),
            asyncio.create_task(GarbageCollector(self.api).run()),
        ]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def settle(self) -> None:
        """Let the controllers run until nobody writes any more."""
        quiet = 0
        while quiet < 20:
            version = self.store.version
            await asyncio.sleep(0)
            quiet = quiet + 1 if self.store.version == version else 0

    async def create(self, name: str = "j", **spec: Any) -> Object:
        self.api.create(self.api.jobs, "default", job(name, **spec))
        await self.settle()
        return self.job(name)

    def job(self, name: str = "j") -> Object:
        return self.api.get(self.api.jobs, "default", name)

    def conditions(self, name: str = "j") -> list[str]:
        return [item["type"] for item in self.job(name)["status"].get("conditions", []) if item["status"] == "True"]

    def pods(self) -> list[Object]:
        return self.api.objects(self.api.pods, "default")

    def bind(self, pod: Object) -> Object:
        return self.api.bind("default", pod["metadata"]["name"], "node")

    async def set_pod(self, pod: Object, phase: str, exit_code: int | None = None, **status: Any) -> None:
        """What a kubelet would write."""
        state = {"running": {}} if exit_code is None else {"terminated": {"exitCode": exit_code}}
        container = {
            "name": "main",
            "image": "x",
            "imageID": "",
            "ready": exit_code is None,
            "restartCount": 0,
            "state": state,
        }
        ready = {"type": "Ready", "status": "True" if phase == "Running" else "False"}
        wanted = {"phase": phase, "containerStatuses": [container], "conditions": [ready], **status}

        def change(stored: Object) -> Object:
            return {**stored, "status": {**stored["status"], **wanted}}

        self.api.update(self.api.pods, "default", pod["metadata"]["name"], change, "status")
        await self.settle()

    def delete(self, pod: Object, **options: Any) -> None:
        self.api.delete(self.api.pods, "default", pod["metadata"]["name"], DeleteOptions(**options))


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    created = Lab()
    created.start()
    yield created
    await created.stop()


async def test_the_counts_follow_the_pods(lab: Lab) -> None:
    status = (await lab.create(completions=3, parallelism=2))["status"]
    assert (status["active"], status["ready"], status["terminating"]) == (2, 0, 0)
    first, second = lab.pods()
    await lab.set_pod(first, "Running")
    assert lab.job()["status"]["ready"] == 1
    await lab.set_pod(first, "Succeeded", 0)
    assert (lab.job()["status"]["succeeded"], lab.job()["status"]["active"]) == (1, 2)
    third = next(
        pod for pod in lab.pods() if pod["metadata"]["uid"] not in {p["metadata"]["uid"] for p in (first, second)}
    )
    await lab.set_pod(second, "Succeeded", 0)
    assert len(lab.pods()) == 3
    await lab.set_pod(third, "Succeeded", 0)
    assert lab.conditions() == ["SuccessCriteriaMet", "Complete"]
    assert lab.job()["status"]["succeeded"] == 3
    assert all("finalizers" not in pod["metadata"] for pod in lab.pods())


async def test_a_failed_pod_is_replaced_after_a_pause(lab: Lab) -> None:
    await lab.create(backoffLimit=2)
    (first,) = lab.pods()
    await lab.set_pod(first, "Failed", 1)
    assert lab.job()["status"]["failed"] == 1
    assert len(lab.pods()) == 1
    lab.now += timedelta(seconds=11)
    await lab.set_pod(first, "Failed", 1, reason="Again")
    assert len(lab.pods()) == 2


async def test_ignored_failures_do_not_count(lab: Lab) -> None:
    rule = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    await lab.create(podFailurePolicy={"rules": [rule]})
    (first,) = lab.pods()
    condition = {"type": "DisruptionTarget", "status": "True"}
    await lab.set_pod(first, "Failed", 137, conditions=[condition])
    assert "failed" not in lab.job()["status"]
    assert lab.conditions() == []
    (replacement,) = [pod for pod in lab.pods() if pod["status"]["phase"] == "Pending"]
    await lab.set_pod(replacement, "Succeeded", 0)
    assert lab.conditions() == ["SuccessCriteriaMet", "Complete"]


async def test_without_a_policy_a_deleted_pod_counts_at_once(lab: Lab) -> None:
    await lab.create()
    (pod,) = lab.pods()
    lab.bind(pod)
    await lab.set_pod(pod, "Running")
    lab.delete(pod)
    await lab.settle()
    # The conclusion is drawn, and waits for the pod to be gone.
    assert lab.conditions() == ["FailureTarget"]
    assert lab.job()["status"]["terminating"] == 1
    await lab.set_pod(pod, "Failed", 143)
    lab.delete(pod, grace_seconds=0)
    await lab.settle()
    assert lab.conditions() == ["FailureTarget", "Failed"]
    assert lab.pods() == []


async def test_with_a_policy_a_deleted_pod_counts_when_it_has_ended(lab: Lab) -> None:
    rule = {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [0]}}
    await lab.create(podFailurePolicy={"rules": [rule]})
    (pod,) = lab.pods()
    lab.bind(pod)
    await lab.set_pod(pod, "Running")
    lab.delete(pod)
    await lab.settle()
    assert lab.conditions() == []
    # A lost node keeps its pod Terminating for as long as it is away: no replacement, no conclusion.
    lab.now += timedelta(hours=1)
    await lab.settle()
    assert (len(lab.pods()), lab.conditions()) == (1, [])
    await lab.set_pod(pod, "Failed", 75)
    assert lab.conditions() == ["FailureTarget", "Failed"]


async def test_a_pod_removed_by_force_is_counted(lab: Lab) -> None:
    await lab.create()
    (pod,) = lab.pods()
    lab.bind(pod)
    await lab.set_pod(pod, "Running")
    lab.delete(pod, grace_seconds=0)
    await lab.settle()
    assert lab.conditions() == ["FailureTarget", "Failed"]
    assert lab.pods() == []


async def test_a_deadline_counts_from_the_start(lab: Lab) -> None:
    await lab.create(activeDeadlineSeconds=60)
    (pod,) = lab.pods()
    lab.bind(pod)
    await lab.set_pod(pod, "Running")
    lab.now += timedelta(seconds=59)
    await lab.set_pod(pod, "Running", reason="still")
    assert lab.conditions() == []
    lab.now += timedelta(seconds=1)
    await lab.set_pod(pod, "Running", reason="late")
    assert lab.conditions() == ["FailureTarget"]
    (condition,) = lab.job()["status"]["conditions"]
    assert condition["reason"] == "DeadlineExceeded"


async def test_a_suspended_job_has_no_clock(lab: Lab) -> None:
    created = await lab.create(suspend=True, activeDeadlineSeconds=1)
    assert "startTime" not in created["status"]
    assert lab.pods() == []
    lab.now += timedelta(hours=1)
    change: Callable[[Object], Object] = lambda found: {**found, "spec": {**found["spec"], "suspend": False}}  # noqa: E731
    lab.api.update(lab.api.jobs, "default", "j", change)
    await lab.settle()
    assert lab.job()["status"]["startTime"] == "2026-01-01T01:00:00Z"
    assert len(lab.pods()) == 1


async def test_fewer_pods_when_parallelism_falls(lab: Lab) -> None:
    await lab.create(completions=3, parallelism=3)
    running = lab.bind(lab.pods()[1])
    await lab.set_pod(running, "Running")
    lab.api.update(lab.api.jobs, "default", "j", lambda found: {**found, "spec": {**found["spec"], "parallelism": 1}})
    await lab.settle()
    # Those that have got least far go first, and their going is no failure.
    assert [pod["metadata"]["uid"] for pod in lab.pods()] == [running["metadata"]["uid"]]
    assert "failed" not in lab.job()["status"]


async def test_a_controller_that_was_away_counts_once(tmp_path: Path) -> None:
    before = Lab(tmp_path / "journal")
    before.start()
    await before.create(completions=2, parallelism=2, backoffLimit=5)
    await before.stop()
    first, second = before.pods()
    await before.set_pod(first, "Succeeded", 0)
    await before.set_pod(second, "Failed", 3)
    before.store.close()
    after = Lab(tmp_path / "journal")
    after.start()
    await after.settle()
    assert (after.job()["status"]["succeeded"], after.job()["status"]["failed"]) == (1, 1)
    await after.stop()
    after.store.close()
    again = Lab(tmp_path / "journal")
    again.start()
    await again.settle()
    assert (again.job()["status"]["succeeded"], again.job()["status"]["failed"]) == (1, 1)
    await again.stop()


async def test_a_deleted_job_lets_its_pods_go(lab: Lab) -> None:
    await lab.create()
    (pod,) = lab.pods()
    lab.bind(pod)
    await lab.set_pod(pod, "Running")
    lab.api.delete(lab.api.jobs, "default", "j", DeleteOptions(propagation="Background"))
    await lab.settle()
    (left,) = lab.pods()
    # Its kubelet still has to stop it; the Job no longer holds it.
    assert "deletionTimestamp" in left["metadata"]
    assert "finalizers" not in left["metadata"]
    lab.delete(pod, grace_seconds=0)
    assert lab.pods() == []


@pytest.mark.parametrize(
    ("indexes", "text"),
    [(set(), ""), ({0}, "0"), ({0, 1}, "0,1"), ({0, 1, 2}, "0-2"), ({0, 2, 3, 5, 6, 7}, "0,2,3,5-7")],
)
def test_indexes_are_written_as_ranges(indexes: set[int], text: str) -> None:
    assert format_indexes(indexes) == text
    assert set(completed_indexes({"completedIndexes": text})) == indexes


def test_rules_are_matched_in_order() -> None:
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": "main", "operator": "In", "values": [1, 2]}},
        {"action": "Count", "onExitCodes": {"operator": "NotIn", "values": [3]}},
    ]
    owner = {"spec": {"podFailurePolicy": {"rules": rules}}}

    def pod(code: int, container: str = "main", *conditions: dict[str, str]) -> Object:
        status = {"name": container, "state": {"terminated": {"exitCode": code}}}
        return {
            "metadata": {"name": "p", "namespace": "n"},
            "status": {"containerStatuses": [status], "conditions": list(conditions)},
        }

    disrupted = {"type": "DisruptionTarget", "status": "True"}
    assert match_failure_policy(owner, pod(1, "main", disrupted))[0] == "Ignore"
    assert match_failure_policy(owner, pod(1)) == (
        "FailJob",
        "Container main for pod n/p failed with exit code 1 matching FailJob rule at index 1",
    )
    assert match_failure_policy(owner, pod(1, "other"))[0] == "Count"
    assert match_failure_policy(owner, pod(3)) == ("Count", "")
    assert match_failure_policy(owner, pod(1, "main", {**disrupted, "status": "False"}))[0] == "FailJob"
