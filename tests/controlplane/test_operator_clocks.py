"""Suspending, limits and memory with the real operator against an API server, with pods that follow a script."""

from __future__ import annotations

from typing import Any

import pytest
from api_client import eventually
from conftest import Kubectl, TestServer
from finetune_job import STAGES, Job, play, play_before
from operator_process import OperatorProcess
from scripted import ScriptedKubelet, agent

from finetune_api.failures import FailureClass, exit_code_of
from finetune_api.report import StepProgress
from finetune_api.status import CheckpointResult


def stopped(job: Job, kubelet: ScriptedKubelet, pod: dict[str, Any]) -> None:
    """The Job goes, and then its pod."""
    name = pod["metadata"]["ownerReferences"][0]["name"]
    eventually(lambda: name not in [child["metadata"]["name"] for child in job.children()])
    kubelet.remove(pod)
    eventually(lambda: pod["metadata"]["name"] not in [item["metadata"]["name"] for item in job.children("pods")], 60)


@pytest.mark.parametrize("stage", STAGES)
def test_suspend_and_resume_in_any_stage(
    job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess, stage: str
) -> None:
    job.create()
    play_before(job, kubelet, stage)
    pod = kubelet.pod(stage)
    kubelet.run(pod)
    job.until(phase={"prepare": "Preparing", "train": "Running", "export": "Exporting"}[stage])
    job.change(suspend=True)
    stopped(job, kubelet, pod)
    status = job.until(phase="Suspended")
    assert job.conditions()["Suspended"] == ("True", "SuspendedByUser")
    assert status["restarts"]["charged"] == 0
    job.change(suspend=False)
    play(job, kubelet, stage, 2)
    for later in STAGES[STAGES.index(stage) + 1 :]:
        play(job, kubelet, later)
    job.until(phase="Succeeded")
    reasons = [reason for _, reason in job.events()]
    assert [reasons.count(reason) for reason in ("Suspending", "SuspendedByUser", "Resumed")] == [1, 1, 1]


def test_an_operator_that_dies_while_it_suspends(job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess) -> None:
    job.create()
    play(job, kubelet, "prepare")
    pod = kubelet.pod("train")
    kubelet.run(pod)
    job.until(phase="Running")
    operator.kill()
    job.change(suspend=True)
    operator.start()
    stopped(job, kubelet, pod)
    operator.kill()
    operator.start()
    assert job.until(phase="Suspended")["restarts"] == {"charged": 0, "preemptions": 0, "outOfMemory": 0}


def test_a_suspended_job_can_be_given_other_resources(
    job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess
) -> None:
    job.create(suspend=True)
    job.until(phase="Suspended")
    assert job.children() == []
    job.change(resources={"gpusPerNode": 0}, suspend=False)
    play(job, kubelet, "prepare")
    pod = kubelet.pod("train")
    assert kubelet.document(pod)["spec"]["resources"]["gpusPerNode"] == 0
    assert kubelet.document(pod)["processes"] == 1


def test_a_job_that_reaches_its_deadline_fails_and_its_pod_is_stopped(
    job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess
) -> None:
    job.create(activeDeadlineSeconds=2)
    pod = kubelet.pod("prepare")
    kubelet.run(pod)
    status = job.until(phase="Failed")
    assert status["failure"]["class"] == "DeadlineExceeded"
    assert status["usage"]["activeSeconds"] >= 2
    stopped(job, kubelet, pod)


def test_a_job_that_cannot_start_in_time_says_what_it_waited_for(
    scripted_server: TestServer, namespace: str, job: Job, operator: OperatorProcess
) -> None:
    quota = {"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    path = f"/api/v1/namespaces/{namespace}/resourcequotas"
    assert scripted_server.client.create(path, quota).code == 201
    eventually(lambda: scripted_server.client.get(f"{path}/none").body.get("status", {}).get("hard"))
    job.create(preRunningDeadlineSeconds=14)
    status = job.until(60, phase="Failed")
    assert status["failure"]["class"] == "PreRunningDeadlineExceeded"
    assert "exceeded quota" in status["failure"]["message"]
    eventually(lambda: job.children() == [])


def test_a_finished_job_goes_with_its_children(
    scripted_server: TestServer, job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess
) -> None:
    job.create(ttlSecondsAfterFailed=1)
    pod = kubelet.pod("prepare")
    kubelet.run(pod)
    kubelet.fail(pod, 65)
    eventually(lambda: scripted_server.client.get(job.path).code == 404, 60, operator.log)
    eventually(lambda: not any(job.children(plural) for plural in ("jobs", "configmaps", "pods")), 60)


def test_a_gpu_that_runs_out_of_memory_gets_less_at_once(
    job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess
) -> None:
    job.create(hyperparameters={"batchSize": 16})
    play(job, kubelet, "prepare")
    for attempt, limit in ((1, None), (2, 4), (3, 2)):
        pod = kubelet.pod("train", attempt)
        assert kubelet.document(pod).get("microBatchLimit") == limit
        kubelet.run(pod)
        kubelet.fail(pod, exit_code_of(FailureClass.OUT_OF_MEMORY_GPU))
    status = job.until(phase="Failed")
    assert status["failure"]["class"] == "OutOfMemoryGPU"
    assert "halved 2 times" in status["failure"]["message"]


def test_a_child_that_is_kept_back_is_queued(
    scripted_server: TestServer, namespace: str, job: Job, operator: OperatorProcess
) -> None:
    """As a queue does it: the operator never touches the field."""
    operator.kill()
    job.create()
    operator.start()
    (child,) = eventually(job.children)
    path = f"/apis/batch/v1/namespaces/{namespace}/jobs/{child['metadata']['name']}"
    assert scripted_server.client.patch(path, {"spec": {"suspend": True}}).code == 200
    job.until(phase="Queued")
    assert scripted_server.client.patch(path, {"spec": {"suspend": False}}).code == 200
    job.until(phase="Pending")


def test_accounts_are_in_status_and_metrics(job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess) -> None:
    job.create(resources={"gpusPerNode": 4})
    play(job, kubelet, "prepare")
    with agent() as speaker:
        pod = kubelet.pod("train")
        speaker.report = kubelet.report(
            pod,
            phase="Training",
            resumed_from_step=0,
            progress=StepProgress(step=3, total_steps=10, step_seconds=0.5),
            checkpoint=CheckpointResult(step=2, uri="s3://w/2"),
        )
        kubelet.run(pod, speaker.address, ago=10)
        eventually(lambda: job.status().get("progress", {}).get("currentStep") == 3)
        kubelet.disrupt(pod)
        kubelet.pod("train", 2)
    status = job.status()
    usage = status["usage"]
    (past,) = [entry for entry in status["history"] if entry["stage"] == "train"]
    assert (past["outcome"], past["fromStep"], past["toStep"]) == ("Preempted", 0, 3)
    assert usage["gpuSeconds"] >= 40
    assert usage["wastedGPUSeconds"] == usage["gpuSeconds"] - 4, "two steps of half a second on 4 GPUs"
    for name, value in (("gpu", "gpuSeconds"), ("wasted_gpu", "wastedGPUSeconds")):
        sample = f'finetune_job_{name}_seconds_total{{name="bot",namespace="{job.body()["metadata"]["namespace"]}"}}'
        expected = f"{sample} {float(usage[value])}"
        eventually(lambda e=expected: e in operator.get("/metrics"), describe=lambda: operator.get("/metrics"))
    text = operator.get("/metrics")
    for counted in (
        "finetune_jobs_created_total",
        'finetune_jobs_preempted_total{reason="Preempted"}',
        'finetune_job_stage_duration_seconds_count{stage="prepare"}',
        'finetune_job_queue_wait_seconds_count{stage="train"}',
        "finetune_fault_detection_seconds_count",
    ):
        assert f"\n{counted} 1.0\n" in text, counted


def test_kubectl_patches_suspend(kubectl: Kubectl, job: Job, operator: OperatorProcess) -> None:
    job.create()
    job.until(phase="Pending")
    kubectl.run("patch", "ftj", "bot", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    job.until(phase="Suspended")
    assert "SuspendedByUser" in kubectl.run("describe", "ftj", "bot")
    columns = ("get", "ftj", "bot", "--no-headers")
    assert "Suspended" in kubectl.run(*columns)
    kubectl.run("patch", "ftj", "bot", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    job.until(phase="Pending")
    # The newest condition is still the one about suspending.
    assert "Suspended" not in kubectl.run(*columns)
