"""Training on two nodes of the local cluster: the result is that of one node, whichever of them dies."""

from __future__ import annotations

from typing import Any

import psutil
import pytest
from conftest import manifest
from local_up import LocalUp, eventually
from test_deaths import kill_all, losses, report

SPEC: dict[str, Any] = {
    "method": {"adapter": {"type": "LoRA"}},
    "hyperparameters": {"maxSteps": 40, "batchSize": 4, "learningRate": "0.005"},
    "checkpoint": {"everySteps": 10},
}
TWO = {"resources": {"nodes": 2, "gpusPerNode": 0}}


@pytest.fixture(scope="module")
def alone(up: LocalUp) -> str:
    """The name of a job on one node."""
    up.apply(manifest("one-node", **SPEC))
    up.succeeded("one-node")
    return "one-node"


def processes_of(up: LocalUp, name: str, node: int) -> list[psutil.Process]:
    """Agent and training process of one of the pods."""
    found = up.processes("finetune", up.job(name)["metadata"]["uid"])
    return [process for process in found if process.environ().get("JOB_COMPLETION_INDEX") == str(node)]


@pytest.mark.parametrize("lost", [1, 0])
def test_a_pod_that_is_killed_costs_the_steps_since_the_last_checkpoint(up: LocalUp, alone: str, lost: int) -> None:
    name = f"two-nodes-{lost}"
    up.apply(manifest(name, **SPEC, **TWO))
    work = f"out/{name}/.finetune/{up.job(name)['metadata']['uid']}/train/1/checkpoints/10/manifest.json"
    eventually(lambda: work in up.all_keys("models"), "a checkpoint is stored")
    victims = processes_of(up, name, lost)
    assert len(victims) == 2
    kill_all(victims)
    failure = up.until(name, lambda s: s.get("failure"), "a failure")["failure"]
    assert failure["class"] == "Killed", failure
    assert failure["pod"].startswith(f"{name}-train-1-{lost}-")
    status = up.succeeded(name)
    assert status["restarts"] == {"charged": 1, "preemptions": 0, "outOfMemory": 0}
    assert status["resolved"]["worldSize"] == 2
    assert report(up, name, attempt=2)["resumedFromStep"] >= 10
    assert up.jobs(name) == [f"{name}-{child}" for child in ("export-1", "prepare-1", "train-1", "train-2")]
    ours, theirs = losses(up, name), losses(up, alone)
    assert [step for step, _ in ours] == [step for step, _ in theirs] == list(range(1, 41))
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=1e-3)
