"""A queue that admits and evicts as Kueue does: it makes a Workload for each suspended Job, and flips its `suspend`."""

from __future__ import annotations

from typing import Any

import pytest
from api_client import Client, eventually
from conftest import TestServer
from finetune_job import Job, play
from operator_process import OperatorProcess
from scripted import ScriptedKubelet

from finetune_api.names import LABEL_QUEUE, LABEL_QUEUED_JOB_UID, LABEL_STAGE

GROUP = "/apis/kueue.x-k8s.io/v1beta2"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
OPEN = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
WORKLOADS = {
    "metadata": {
        "name": "workloads.kueue.x-k8s.io",
        # An API server wants a word of approval for groups of the Kubernetes project.
        "annotations": {"api-approved.kubernetes.io": "unapproved, a stand-in for tests"},
    },
    "spec": {
        "group": "kueue.x-k8s.io",
        "scope": "Namespaced",
        "names": {"kind": "Workload", "listKind": "WorkloadList", "plural": "workloads", "singular": "workload"},
        "versions": [
            {
                "name": "v1beta2",
                "served": True,
                "storage": True,
                "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": OPEN, "status": OPEN}}},
            }
        ],
    },
}


class Queue:
    """Plays Kueue for one Job at a time."""

    def __init__(self, client: Client, namespace: str) -> None:
        self._client = client
        self._jobs = f"/apis/batch/v1/namespaces/{namespace}/jobs"
        self._workloads = f"{GROUP}/namespaces/{namespace}/workloads"

    def job(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._client.get(f"{self._jobs}/{name}").body
        return found

    def workloads(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._client.get(self._workloads).body["items"]
        return found

    def see(self, name: str, message: str) -> None:
        """Make the Workload of a Job, which waits."""
        eventually(lambda: self._client.get(f"{self._jobs}/{name}").code == 200)
        job = self.job(name)["metadata"]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job["uid"], "controller": True}
        body = {
            "apiVersion": "kueue.x-k8s.io/v1beta2",
            "kind": "Workload",
            "metadata": {
                "name": f"job-{name}",
                "labels": {LABEL_QUEUED_JOB_UID: job["uid"]},
                "ownerReferences": [owner],
            },
            "spec": {"queueName": job["labels"][LABEL_QUEUE], "active": True},
        }
        assert self._client.create(self._workloads, body).code == 201
        self._say(name, {"conditions": [_reserved("False", message)]})

    def admit(self, name: str) -> None:
        admission = {"clusterQueue": "gpus"}
        self._say(name, {"conditions": [_reserved("True", "Quota reserved")], "admission": admission})
        self._suspend(name, False)

    def evict(self, name: str) -> None:
        self._say(name, {"conditions": [_reserved("False", "Preempted to accommodate a workload")], "admission": None})
        self._suspend(name, True)

    def _say(self, name: str, status: dict[str, Any]) -> None:
        answer = self._client.patch(f"{self._workloads}/job-{name}/status", {"status": status})
        assert answer.code == 200, answer.body

    def _suspend(self, name: str, value: bool) -> None:
        assert self._client.patch(f"{self._jobs}/{name}", {"spec": {"suspend": value}}).code == 200


def _reserved(status: str, message: str) -> dict[str, str]:
    return {
        "type": "QuotaReserved",
        "status": status,
        "reason": "QuotaReserved" if status == "True" else "Pending",
        "message": message,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }


@pytest.fixture
def queue(scripted_server: TestServer, namespace: str) -> Queue:
    client = scripted_server.client
    if client.get(f"{CRDS}/workloads.kueue.x-k8s.io").code == 404:
        answer = client.create(
            CRDS, {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition"} | WORKLOADS
        )
        assert answer.code in (201, 409), answer.body
    eventually(lambda: client.get(f"{GROUP}/namespaces/{namespace}/workloads").code == 200)
    return Queue(client, namespace)


def message(job: Job) -> str:
    found: list[str] = [c["message"] for c in job.status().get("conditions", []) if c["type"] == "Running"]
    return found[0] if found else ""


def test_a_job_waits_in_a_queue_is_evicted_and_comes_back(
    queue: Queue, job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess
) -> None:
    job.create(scheduling={"queueName": "team-a"})
    play(job, kubelet, "prepare")
    status = job.until(phase="Queued")
    child = queue.job("bot-train-1")
    assert child["spec"]["suspend"] is True
    assert not [pod for pod in job.children("pods") if pod["metadata"]["labels"][LABEL_STAGE] == "train"]

    queue.see("bot-train-1", "insufficient unused quota for nvidia.com/gpu")
    eventually(lambda: "insufficient unused quota" in message(job), 60, lambda: message(job))
    assert job.status()["queue"] == {"name": "team-a", "workload": "job-bot-train-1"}

    queue.admit("bot-train-1")
    pod = kubelet.pod("train")
    kubelet.run(pod)
    job.until(phase="Running")

    queue.evict("bot-train-1")
    kubelet.end_stopped(pod)
    status = job.until(phase="Queued")
    assert status["restarts"] == {"charged": 0, "preemptions": 1, "outOfMemory": 0}
    assert (status["attempt"]["number"], queue.job("bot-train-1")["metadata"]["uid"]) == (1, child["metadata"]["uid"])
    eventually(lambda: "Preempted to accommodate" in message(job), 60, lambda: message(job))

    queue.admit("bot-train-1")
    again = kubelet.pod("train")
    assert again["metadata"]["uid"] != pod["metadata"]["uid"]
    kubelet.run(again)
    job.until(phase="Running")
    assert job.status()["queue"].items() >= {"name": "team-a", "workload": "job-bot-train-1"}.items()
    kubelet.succeed(again, kubelet.report(again))
    play(job, kubelet, "export")
    job.until(phase="Succeeded")
    assert sorted(item["metadata"]["name"] for item in job.children()) == [
        "bot-export-1",
        "bot-prepare-1",
        "bot-train-1",
    ]


def test_an_operator_that_was_away_during_an_eviction(
    queue: Queue, job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess
) -> None:
    job.create(scheduling={"queueName": "team-a"})
    play(job, kubelet, "prepare")
    queue.see("bot-train-1", "wait")
    queue.admit("bot-train-1")
    pod = kubelet.pod("train")
    kubelet.run(pod, ago=30)
    job.until(phase="Running")
    operator.kill()
    queue.evict("bot-train-1")
    kubelet.end_stopped(pod)
    queue.admit("bot-train-1")
    again = kubelet.pod("train")
    kubelet.run(again)
    operator.start()
    eventually(lambda: job.status()["restarts"]["preemptions"] == 1, 30, operator.log)
    assert job.status()["attempt"]["number"] == 1


def test_a_job_that_waits_in_a_queue_is_suspended_by_its_user(
    queue: Queue, job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess
) -> None:
    job.create(scheduling={"queueName": "team-a", "cpuQueueName": "team-a-cpu"})
    job.until(phase="Queued")
    assert queue.job("bot-prepare-1")["metadata"]["labels"][LABEL_QUEUE] == "team-a-cpu"
    queue.see("bot-prepare-1", "wait")
    queue.admit("bot-prepare-1")
    job.until(phase="Pending")
    # Its pod is not ready in time. The attempt stays, and is neither a failure nor a preemption.
    queue.evict("bot-prepare-1")
    status = job.until(phase="Queued")
    assert (status["attempt"]["number"], status["restarts"]["preemptions"]) == (1, 0)
    job.change(suspend=True)
    job.until(phase="Suspended")
    assert job.children() == []
    # With the Workload goes the quota that it has.
    eventually(lambda: queue.workloads() == [])
    job.change(suspend=False)
    job.until(phase="Queued")
    assert [item["metadata"]["name"] for item in job.children()] == ["bot-prepare-2"]
