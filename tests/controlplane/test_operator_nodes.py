"""The real operator with attempts of several pods, on a server whose pods the test plays."""

from __future__ import annotations

from typing import Any

import pytest
from api_client import eventually
from conftest import TestServer
from finetune_job import Job, play
from operator_process import OperatorProcess
from scripted import ScriptedKubelet, agent

from finetune_api.failures import FailureClass
from finetune_api.report import Outcome, ReportedFailure, StepProgress

NODES = 3


def train(job: Job, kubelet: ScriptedKubelet, attempt: int = 1) -> list[dict[str, Any]]:
    """The pods of an attempt to train, as the Job controller has made them."""
    return [kubelet.pod("train", attempt, index=index) for index in range(NODES)]


def start(job: Job, kubelet: ScriptedKubelet) -> list[dict[str, Any]]:
    job.create(resources={"nodes": NODES, "gpusPerNode": 0}, hyperparameters={"batchSize": 6})
    play(job, kubelet, "prepare")
    return train(job, kubelet)


def conditions(server: TestServer, namespace: str) -> list[str]:
    """What the Job controller says of the first attempt to train."""
    items = server.client.get(f"/apis/batch/v1/namespaces/{namespace}/jobs/bot-train-1").body["status"]
    return [item["type"] for item in items.get("conditions", []) if item["status"] == "True"]


def test_several_pods_run_as_one(
    scripted_server: TestServer, namespace: str, job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess
) -> None:
    pods = start(job, kubelet)
    assert [pod["spec"]["hostname"] for pod in pods] == [f"bot-train-1-{index}" for index in range(NODES)]
    service = scripted_server.client.get(f"/api/v1/namespaces/{namespace}/services/bot-train").body
    assert service["spec"]["selector"].items() <= pods[0]["metadata"]["labels"].items()
    assert {pod["spec"]["subdomain"] for pod in pods} == {service["metadata"]["name"]}
    with agent() as first, agent() as other:
        # Those of the first pod count, and nobody asks the others.
        first.report = kubelet.report(pods[0], phase="Training", progress=StepProgress(step=4, total_steps=9))
        other.report = kubelet.report(pods[1], phase="Training", progress=StepProgress(step=8, total_steps=9))
        kubelet.run(pods[1], other.address)
        kubelet.run(pods[2], other.address)

        def waits() -> bool:
            message = next((c["message"] for c in job.status()["conditions"] if c["type"] == "Running"), "")
            return "2 of 3 pods run." in str(message)

        eventually(waits, 30, lambda: str(job.status()))
        assert job.status()["phase"] == "Starting"
        kubelet.run(pods[0], first.address)
        job.until(phase="Running")
        eventually(lambda: job.status().get("progress", {}).get("currentStep") == 4, 30, lambda: str(job.status()))
    for pod in pods:
        kubelet.succeed(pod, kubelet.report(pod, outcome=Outcome.SUCCEEDED))
    play(job, kubelet, "export")
    assert job.until(phase="Succeeded")["restarts"] == {"charged": 0, "preemptions": 0, "outOfMemory": 0}


@pytest.mark.parametrize("away", [False, True])
def test_one_lost_pod_ends_the_attempt_and_is_named(
    scripted_server: TestServer,
    namespace: str,
    job: Job,
    kubelet: ScriptedKubelet,
    operator: OperatorProcess,
    away: bool,
) -> None:
    """FailureTarget comes with the first failed pod, Failed when the others are gone, too."""
    pods = start(job, kubelet)
    for pod in pods:
        kubelet.bind(pod)
        kubelet.run(pod)
    job.until(phase="Running")
    if away:
        operator.kill()
    said = ReportedFailure(failure_class=FailureClass.OUT_OF_MEMORY_HOST, message="Too much.", exit_code=81, rank=1)
    kubelet.fail(pods[1], 81, kubelet.report(pods[1], outcome=Outcome.FAILED, failure=said))
    eventually(lambda: "FailureTarget" in conditions(scripted_server, namespace))
    # The controller removes the others, which lost it in a collective, or saved.
    for pod in (pods[0], pods[2]):
        assert "Failed" not in conditions(scripted_server, namespace)
        lost = ReportedFailure(failure_class=FailureClass.COMMUNICATION, message="lost", exit_code=84, rank=0)
        kubelet.fail(pod, 84, kubelet.report(pod, outcome=Outcome.FAILED, failure=lost))
        kubelet.remove(pod)
    eventually(lambda: "Failed" in conditions(scripted_server, namespace))
    if away:
        operator.start()
    again = train(job, kubelet, 2)
    failure = job.status()["failure"]
    assert (failure["class"], failure["exitCode"]) == ("OutOfMemoryHost", 81)
    assert (failure["pod"], failure["rank"]) == (pods[1]["metadata"]["name"], 1)
    assert job.status()["restarts"]["charged"] == 1
    for pod in again:
        kubelet.run(pod)
        kubelet.succeed(pod, kubelet.report(pod, outcome=Outcome.SUCCEEDED))
    play(job, kubelet, "export")
    job.until(phase="Succeeded")


def test_a_drained_pod_costs_nothing_though_the_others_end_like_any_that_was_stopped(
    scripted_server: TestServer, namespace: str, job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess
) -> None:
    pods = start(job, kubelet)
    for pod in pods:
        kubelet.bind(pod)
        kubelet.run(pod)
    kubelet.disrupt(pods[2])
    # The others hold until they are removed, so that the controller sees this one first.
    eventually(lambda: "FailureTarget" in conditions(scripted_server, namespace))
    for pod in pods[:2]:
        kubelet.fail(pod, 75)
        kubelet.remove(pod)
    train(job, kubelet, 2)
    status = job.status()
    assert (status["failure"]["class"], status["failure"]["pod"]) == ("Preempted", pods[2]["metadata"]["name"])
    assert status["restarts"] == {"charged": 0, "preemptions": 1, "outOfMemory": 0}


def test_somebody_elses_service_is_left_alone(
    scripted_server: TestServer, namespace: str, job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess
) -> None:
    path = f"/api/v1/namespaces/{namespace}/services"
    theirs = {"metadata": {"name": "bot-train"}, "spec": {"ports": [{"port": 80}]}}
    assert scripted_server.client.create(path, theirs).code == 201
    job.create(resources={"nodes": NODES, "gpusPerNode": 0}, hyperparameters={"batchSize": 6})
    play(job, kubelet, "prepare")
    job.until_condition("Running", "False", "NameConflict")
    assert "ports" in scripted_server.client.get(f"{path}/bot-train").body["spec"]
    scripted_server.client.delete(f"{path}/bot-train")
    train(job, kubelet)
