"""Storage, disk and memory that fail under real pods. One job meets it all, and completes; what it says of each is
looked at in tests of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import manifest
from local_up import LocalUp, eventually
from test_deaths import losses, report
from trainer_lab import INJECT
from trainer_servers import Fault, Proxy, Request

NAME = "afflicted"
STEPS = 75
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


def writes(part: str) -> Callable[[Request], bool]:
    """Matches what stores an object with these words in its key."""
    return lambda request: request.method == "PUT" and part in request.path


def small_disk(folder: Path) -> bool:
    """Put a `finetune-trainer` into a folder that runs with a small disk of its own as the pod's work directory. False
    where a user may not mount one."""
    mount = 'mount -t tmpfs -o size=48m small "$FINETUNE_WORK_DIR"'
    environment = os.environ | {"FINETUNE_WORK_DIR": str(folder)}
    try:
        subprocess.run(["unshare", "-rm", "sh", "-c", mount], env=environment, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    program = folder / "finetune-trainer"
    trainer = f"{shlex.quote(sys.executable)} -m finetune_trainer.main"
    program.write_text(f'#!/bin/sh\nexec unshare -rm sh -c \'{mount} && exec "$@"\' sh {trainer} "$@"\n')
    program.chmod(0o755)
    return True


class Trouble:
    """The job after all of it."""

    def __init__(self, up: LocalUp, faults: list[str], template: dict[str, Any], s3: Proxy) -> None:
        self.faults = faults
        """What the train attempts ran out of, in this order."""
        go_on = threading.Event()
        s3.faults += [
            Fault(lambda _: True, times=3, answer=(503, SLOW_DOWN)),
            Fault(lambda request: request.method == "GET", times=1, cut_response_after=300),
            Fault(writes("/train/1/checkpoints/10/"), times=1, first=lambda: go_on.wait(50) and None),
            Fault(writes("/train/1/checkpoints/20/"), times=1, first=s3.go_away),
            Fault(writes(f"/models/out/{NAME}/model.safetensors"), times=1, first=s3.go_away),
        ]
        rules = [{"class": "DiskFull", "action": "Restart"}]
        up.apply(
            manifest(
                NAME,
                hyperparameters={"maxSteps": STEPS, "batchSize": 4, "microBatchSize": 4, "learningRate": "0.005"},
                checkpoint={"everySteps": 10},
                resources={"gpusPerNode": 0, "memory": "1536Mi"},
                storage={"endpoint": s3.endpoint},
                podTemplate=template,
                failurePolicy={"backoffSeconds": 0, "maxRestarts": 10, "rules": rules},
            )
        )
        self.halted = up.until(NAME, lambda s: s.get("progress", {}).get("currentStep", 0) >= 15, "past a checkpoint")
        """The status while the first checkpoint could not be stored."""
        go_on.set()
        selector = f"finetune.dev/job-name={NAME},finetune.dev/stage=train"
        words = "the checkpoint of step 20 was not stored"
        eventually(lambda: words in up.kubectl("logs", "-l", selector, "--tail=-1", check=False), words)
        s3.come_back()
        up.kubectl("wait", "ftj", NAME, "--for=jsonpath={.status.failure.stage}=export", "--timeout=280s")
        self.failure: dict[str, Any] = up.status(NAME)["failure"]
        """The export's."""
        self.published = up.keys(f"s3://models/out/{NAME}")
        """What was there of the model then."""
        s3.come_back()
        up.kubectl("wait", "ftj", NAME, "--for=condition=Complete", "--timeout=280s")
        self.status = up.status(NAME)

    def attempts(self, stage: str) -> list[dict[str, Any]]:
        return [past for past in self.status["history"] if past["stage"] == stage]

    def attempt(self, fault: str) -> dict[str, Any]:
        """How the attempt ended that ran out of this."""
        if fault not in self.faults:
            pytest.skip("a small disk needs the right to mount one in a user namespace")
        return self.attempts("train")[self.faults.index(fault)]


@pytest.fixture(scope="module")
def trouble(up: LocalUp, tmp_path_factory: pytest.TempPathFactory) -> Trouble:
    faults = ["gpu", "memory"]
    variables = {
        # A value that begins with the path of one of the pod's volumes would be translated.
        "PYTHONPATH": f"/nowhere{os.pathsep}{INJECT}",
        "TEST_INJECT": f"finetune_trainer.training={INJECT / 'run_out_of_room.py'}",
        "TEST_INJECT_ALSO": f"botocore.retries.standard={INJECT / 'short_pauses.py'}",
    }
    programs = tmp_path_factory.mktemp("programs")
    if small_disk(programs):
        faults.insert(0, "disk")
        variables["PATH"] = os.pathsep.join(["/usr/bin", str(programs), os.environ["PATH"]])
    variables["TEST_FAULTS"] = ",".join(faults)
    template = {"env": [{"name": name, "value": value} for name, value in variables.items()]}
    with Proxy(up.description["s3_endpoint"]) as s3:
        return Trouble(up, faults, template, s3)


def test_every_step_was_made_once_and_no_finished_stage_again(up: LocalUp, trouble: Trouble) -> None:
    trained = [f"train-{number + 1}" for number in range(len(trouble.faults) + 1)]
    assert up.jobs(NAME) == [f"{NAME}-{child}" for child in ("export-1", "export-2", "prepare-1", *trained)]
    assert [step for step, _ in losses(up, NAME)] == list(range(1, STEPS + 1))
    charged = len(trouble.faults) + 1
    assert trouble.status["restarts"] == {"charged": charged, "preemptions": 0, "outOfMemory": 1}
    (_, *later) = trouble.attempts("train")
    assert all(past["fromStep"] >= 10 for past in later)


def test_storage_that_is_slow_is_waited_for(trouble: Trouble) -> None:
    (prepare,) = trouble.attempts("prepare")
    assert prepare["outcome"] == "Succeeded"
    assert "checkpoint" not in trouble.halted, "training went on while its checkpoint was on its way"


def test_storage_that_is_away_while_training_costs_a_checkpoint(up: LocalUp, trouble: Trouble) -> None:
    assert report(up, NAME, attempt=1)["checkpointFailures"] >= 1
    first = trouble.attempts("train")[0]
    assert first["class"] != "StorageUnavailable"


def test_storage_that_is_away_while_exporting(trouble: Trouble) -> None:
    failure = trouble.failure
    assert (failure["stage"], failure["class"], failure["exitCode"]) == ("export", "StorageUnavailable", 69)
    assert failure["disposition"] == "WillRestart"
    assert "cannot reach the S3 server" in failure["message"]
    assert "Check storage.endpoint and the network" in failure["message"]
    assert "manifest.json" not in trouble.published, "what is not whole is not published"
    first, second = trouble.attempts("export")
    assert [first["outcome"], second["outcome"]] == ["Failed", "Succeeded"]


def test_a_full_disk(up: LocalUp, trouble: Trouble) -> None:
    past = trouble.attempt("disk")
    assert (past["class"], past["exitCode"]) == ("DiskFull", 74)
    assert "Raise ephemeralStorage of this stage, or name a storageClassName." in past["message"]
    work = trouble.status["resolved"]["workURI"]
    complete = {key for key in up.keys(f"{work}/train/1") if key.endswith("manifest.json")}
    assert complete <= {f"checkpoints/{step}/manifest.json" for step in (10, 30, 40)}


def test_a_gpu_that_is_too_small_halves_the_micro_batch(trouble: Trouble) -> None:
    past = trouble.attempt("gpu")
    assert (past["class"], past["exitCode"]) == ("OutOfMemoryGPU", 80)
    assert trouble.status["microBatchLimit"] == 2
    resolved = trouble.status["resolved"]
    assert (resolved["microBatchSize"], resolved["gradientAccumulationSteps"]) == (2, 2)
    assert trouble.attempts("train")[trouble.faults.index("gpu") + 1]["fromStep"] == 50


def test_a_pod_that_exceeds_its_memory(trouble: Trouble) -> None:
    past = trouble.attempt("memory")
    assert (past["class"], past["exitCode"]) == ("OutOfMemoryHost", 137)
    assert past["message"] == "The pod ran out of memory. Raise the memory of this stage."
    assert trouble.attempts("train")[-1]["fromStep"] in (50, 60), "the last one was perhaps still on its way"
