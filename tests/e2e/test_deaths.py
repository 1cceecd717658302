"""Real processes killed with real signals: the job completes, resumed from its checkpoint, as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import signal
from typing import Any

import psutil
import pytest
from conftest import manifest
from local_up import LocalUp, eventually

STEPS = 150
SPEC: dict[str, Any] = {
    "hyperparameters": {"maxSteps": STEPS, "batchSize": 4, "learningRate": "0.005"},
    "checkpoint": {"everySteps": 10},
}


def losses(up: LocalUp, name: str) -> list[tuple[int, float]]:
    """(step, loss) of the whole run, from what training handed over."""
    status = up.status(name)
    path = f"{status['resolved']['workURI']}/train/{status['trainedAttempt']}/final/history.jsonl"
    entries = [json.loads(line) for line in up.read(path).splitlines()]
    return [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]


def weights(up: LocalUp, name: str) -> str:
    """Hash of the published weights."""
    published = json.loads(up.read(f"s3://models/out/{name}/manifest.json"))
    return {file["path"]: file["sha256"] for file in published["files"]}["model.safetensors"]


@pytest.fixture(scope="module")
def unbroken(up: LocalUp) -> str:
    """The name of a job that nobody disturbed."""
    up.apply(manifest("unbroken", **SPEC))
    up.succeeded("unbroken")
    return "unbroken"


def in_mid_training(up: LocalUp, name: str) -> str:
    """Start a job and wait until it has a checkpoint and is past it; returns its uid."""
    up.apply(manifest(name, **SPEC))
    uid: str = up.job(name)["metadata"]["uid"]
    work = f"out/{name}/.finetune/{uid}/train/1/checkpoints/10/manifest.json"
    eventually(lambda: work in up.all_keys("models"), "a checkpoint is stored")
    up.until(name, lambda s: s.get("progress", {}).get("currentStep", 0) > 10, "past it")
    return uid


def kill_all(processes: list[psutil.Process]) -> None:
    """Kill them so that none sees another one die."""
    for process in processes:
        process.suspend()
    for process in processes:
        process.kill()


def report(up: LocalUp, name: str, attempt: int) -> dict[str, Any]:
    """What an attempt to train said last."""
    found: dict[str, Any] = json.loads(up.read(f"{up.status(name)['resolved']['workURI']}/train/{attempt}/report.json"))
    return found


def resumed(up: LocalUp, name: str, unbroken: str, failure: str) -> dict[str, Any]:
    """The job went on from a checkpoint and came to exactly the unbroken run's losses and weights."""
    status = up.until(name, lambda s: s.get("attempt", {}).get("number") == 2 or s.get("failure"), "a restart")
    assert status["failure"]["class"] == failure, status["failure"]
    status = up.succeeded(name)
    assert report(up, name, attempt=2)["resumedFromStep"] >= 10
    assert status["restarts"] == {"charged": 1, "preemptions": 0, "outOfMemory": 0}
    assert up.jobs(name) == [f"{name}-{child}" for child in ("export-1", "prepare-1", "train-1", "train-2")]
    assert losses(up, name) == losses(up, unbroken)
    assert weights(up, name) == weights(up, unbroken)
    return status


def test_the_training_process_is_killed(up: LocalUp, unbroken: str) -> None:
    uid = in_mid_training(up, "killed-child")
    (process,) = up.processes("finetune_trainer.main train", uid)
    process.kill()
    resumed(up, "killed-child", unbroken, "Unknown")


def test_agent_and_children_are_killed_together(up: LocalUp, unbroken: str) -> None:
    """As the kernel does when a container is out of memory."""
    kill_all(up.processes("finetune", in_mid_training(up, "killed-all")))
    resumed(up, "killed-all", unbroken, "Killed")


def test_a_pod_that_is_deleted_saves_its_last_step(up: LocalUp, unbroken: str) -> None:
    in_mid_training(up, "deleted-pod")
    up.kubectl("delete", "pod", up.pod("deleted-pod", "train"), "--wait=false")
    resumed(up, "deleted-pod", unbroken, "Terminated")
    last = report(up, "deleted-pod", attempt=1)
    assert last["failure"]["class"] == "Terminated"
    assert last["checkpoint"]["step"] == last["progress"]["step"], "no step is lost"


def test_an_eviction_is_free(up: LocalUp, unbroken: str) -> None:
    in_mid_training(up, "evicted")
    pod = up.kubectl(
        "get", "pods", "-l", "finetune.dev/job-name=evicted,finetune.dev/stage=train", "-o", "name"
    ).strip()
    name = pod.removeprefix("pod/")
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": "default"}}
    path = f"/api/v1/namespaces/default/pods/{name}/eviction"
    up.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))
    status = up.succeeded("evicted")
    assert status["restarts"] == {"charged": 0, "preemptions": 1, "outOfMemory": 0}
    assert losses(up, "evicted") == losses(up, unbroken)


def test_a_job_that_is_suspended_loses_no_step(up: LocalUp, unbroken: str) -> None:
    in_mid_training(up, "suspended")
    up.finetune("suspend", "suspended", "--wait")
    status = up.status("suspended")
    assert status["phase"] == "Suspended"
    assert (
        up.kubectl("get", "pods", "-l", "finetune.dev/job-name=suspended,finetune.dev/stage=train", "-o", "name") == ""
    )
    last = report(up, "suspended", attempt=1)
    assert last["checkpoint"]["step"] == last["progress"]["step"], "no step is lost"
    up.finetune("resume", "suspended")
    status = up.succeeded("suspended")
    assert report(up, "suspended", attempt=2)["resumedFromStep"] == last["progress"]["step"]
    assert status["restarts"] == {"charged": 0, "preemptions": 0, "outOfMemory": 0}
    assert losses(up, "suspended") == losses(up, unbroken)
    assert weights(up, "suspended") == weights(up, unbroken)


@pytest.mark.parametrize("stage", ["prepare", "train", "export"])
def test_the_operator_is_killed_in_each_stage(up: LocalUp, unbroken: str, stage: str) -> None:
    name = f"operator-{stage}"
    up.apply(manifest(name, **SPEC))
    uid = up.job(name)["metadata"]["uid"]
    step = {"prepare": "main prepare", "train": "main train", "export": "main export"}[stage]
    eventually(lambda: up.processes(f"finetune_trainer.{step}", uid), f"{stage} runs")
    up.kill_operator()
    status = up.succeeded(name)
    assert status["restarts"] == {"charged": 0, "preemptions": 0, "outOfMemory": 0}
    assert up.jobs(name) == [f"{name}-export-1", f"{name}-prepare-1", f"{name}-train-1"]
    assert weights(up, name) == weights(up, unbroken)


def test_an_operator_that_was_away_when_a_pod_died_goes_on_as_if_it_had_been_there(up: LocalUp, unbroken: str) -> None:
    uid = in_mid_training(up, "away")
    (operator,) = up.processes("finetune_operator.main")
    operator.send_signal(signal.SIGSTOP)
    try:
        kill_all(up.processes("finetune", uid))
        selector = ["-l", "finetune.dev/job-name=away,finetune.dev/stage=train"]
        up.kubectl("wait", "job", "away-train-1", "--for=condition=Failed", "--timeout=60s")
        up.kubectl("delete", "pods", *selector, "--now")
        operator.kill()
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            operator.send_signal(signal.SIGCONT)
    resumed(up, "away", unbroken, "Killed")


def test_death_after_the_last_step_makes_no_further_one(up: LocalUp, unbroken: str) -> None:
    """Between the last step and the hand-over: nothing is left to train, and nothing more is trained."""
    up.apply(manifest("at-the-end", **SPEC))
    uid = up.job("at-the-end")["metadata"]["uid"]
    work = f"out/at-the-end/.finetune/{uid}/train/1/checkpoints/{STEPS}/manifest.json"
    eventually(lambda: work in up.all_keys("models"), "the last checkpoint is stored")
    kill_all(up.processes("finetune", uid))
    status = up.succeeded("at-the-end")
    if "at-the-end-train-2" in up.jobs("at-the-end"):
        assert report(up, "at-the-end", attempt=2)["resumedFromStep"] == STEPS
    assert status["progress"]["currentStep"] == STEPS
    assert losses(up, "at-the-end") == losses(up, unbroken)
    assert weights(up, "at-the-end") == weights(up, unbroken)
