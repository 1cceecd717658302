"""Another release of the operator takes over while jobs are in every stage, and disturbs none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import later_release
import pytest
from aiohttp import web
from api_client import Client, eventually
from conftest import TestServer
from fault_proxy import Exchange, FaultProxy, fault_proxy
from finetune_job import STAGES, Job, play, play_before
from operator_process import OperatorProcess
from scripted import ScriptedKubelet, agent

from finetune_api.names import DOCUMENT_FILE
from finetune_api.report import Outcome, StepProgress
from finetune_api.status import CheckpointResult, Resolved

LEASE = "finetune-operator"
OLD, NEW = "scripted/trainer:old", "scripted/trainer:new"
NEW_SETTINGS = {
    "FINETUNE_TRAINER_IMAGE": NEW,
    "FINETUNE_IMAGE_PULL_POLICY": "Always",
    "FINETUNE_IMAGE_PULL_SECRETS": "registry",
    "FINETUNE_HTTPS_PROXY": "http://proxy:3128",
    "FINETUNE_S3_ENDPOINT": "http://s3:9000",
    "FINETUNE_S3_REGION": "eu-central-1",
    "FINETUNE_SPOT_LABELS": "cloud=spot",
    "FINETUNE_GPU_TYPE_LABELS": "nvidia.com=cloud/gpu",
    "FINETUNE_STALL_SECONDS": "60",
    "FINETUNE_WORKERS": "2",
    "FINETUNE_LOG_FORMAT": "json",
    "FINETUNE_RESYNC_SECONDS": "1",
}


class LaterRelease(OperatorProcess):
    program = (later_release.__file__,)


@dataclass(frozen=True)
class World:
    """What a job is played with."""

    client: Client
    namespace: str
    kubelet: ScriptedKubelet
    exits: ExitStack

    def pod(self, job: Job, stage: str, attempt: int = 1) -> dict[str, Any]:
        return self.kubelet.pod(stage, attempt, job=job.name)

    def run(self, job: Job, stage: str) -> dict[str, Any]:
        pod = self.pod(job, stage)
        self.kubelet.run(pod)
        return pod

    def succeed(self, pod: dict[str, Any]) -> None:
        self.kubelet.succeed(pod, self.kubelet.report(pod, outcome=Outcome.SUCCEEDED))

    def play(self, job: Job, *stages: str, attempt: int = 1) -> None:
        for stage in stages:
            play(job, self.kubelet, stage, attempt)

    def admit(self, job: Job, stage: str) -> None:
        """As a queue starts a Job."""
        path = f"/apis/batch/v1/namespaces/{self.namespace}/jobs/{job.name}-{stage}-1"
        eventually(lambda: self.client.patch(path, {"spec": {"suspend": False}}).code == 200)


# The lives of jobs. The upgrade comes where they yield.


def waiting(job: Job, world: World) -> Iterator[None]:
    job.create()
    # A node has it, so that no scheduler has anything to say of it.
    world.kubelet.bind(world.pod(job, "prepare"))
    job.until_condition("Validated", "Unknown", "WaitingForPod")
    yield
    world.play(job, *STAGES)


def queued(job: Job, world: World) -> Iterator[None]:
    job.create(scheduling={"queueName": "gpus"})
    world.play(job, "prepare")
    job.until(phase="Queued")
    yield
    world.admit(job, "train")
    world.play(job, "train", "export")


def preparing(job: Job, world: World) -> Iterator[None]:
    job.create()
    pod = world.run(job, "prepare")
    job.until(phase="Preparing")
    yield
    world.succeed(pod)
    world.play(job, "train", "export")


def training(job: Job, world: World) -> Iterator[None]:
    # With limits, which an upgrade begins anew neither for the job nor for the attempt.
    job.create(activeDeadlineSeconds=3600, preRunningDeadlineSeconds=3600)
    # From the size of the model follows what the pod asks for.
    play(job, world.kubelet, "prepare", resolved=Resolved(weight_bytes=16 << 30, parameters=8 * 10**9))
    pod = world.pod(job, "train")
    speaker = world.exits.enter_context(agent())
    speaker.report = world.kubelet.report(
        pod,
        phase="Training",
        progress=StepProgress(step=5, total_steps=10, loss=2.5, step_seconds=1.0),
        checkpoint=CheckpointResult(step=4, uri="s3://w/4"),
        resumed_from_step=0,
    )
    world.kubelet.run(pod, speaker.address)
    eventually(lambda: job.status().get("progress", {}).get("currentStep") == 5)
    yield
    world.kubelet.succeed(pod, speaker.report)
    world.play(job, "export")


def pausing(job: Job, world: World) -> Iterator[None]:
    job.create(failurePolicy={"backoffSeconds": 600})
    world.play(job, "prepare")
    world.kubelet.fail(world.run(job, "train"), 137)
    job.until(phase="Restarting")
    yield
    # The pause is over.
    over = {"status": {"restartTime": "2020-01-01T00:00:00Z"}}
    assert world.client.patch(f"{job.path}/status", over).code == 200
    world.play(job, "train", attempt=2)
    world.play(job, "export")


def suspended(job: Job, world: World) -> Iterator[None]:
    job.create()
    world.play(job, "prepare")
    pod = world.run(job, "train")
    job.until(phase="Running")
    job.change(suspend=True)
    world.kubelet.end_stopped(pod)
    job.until(phase="Suspended")
    yield
    job.change(suspend=False)
    world.play(job, "train", attempt=2)
    world.play(job, "export")


def exporting(job: Job, world: World) -> Iterator[None]:
    job.create()
    play_before(job, world.kubelet, "export")
    pod = world.run(job, "export")
    job.until_condition("Exported", "Unknown", "Exporting")
    yield
    world.succeed(pod)


def succeeded(job: Job, world: World) -> Iterator[None]:
    job.create()
    world.play(job, *STAGES)
    job.until(phase="Succeeded")
    yield


def failed(job: Job, world: World) -> Iterator[None]:
    job.create()
    world.kubelet.fail(world.run(job, "prepare"), 65)
    job.until(phase="Failed")
    yield


LIVES: dict[Callable[[Job, World], Iterator[None]], dict[str, str]] = {
    waiting: {"prepare-1": OLD, "train-1": NEW, "export-1": NEW},
    queued: {"prepare-1": OLD, "train-1": OLD, "export-1": NEW},
    preparing: {"prepare-1": OLD, "train-1": NEW, "export-1": NEW},
    training: {"prepare-1": OLD, "train-1": OLD, "export-1": NEW},
    pausing: {"prepare-1": OLD, "train-1": OLD, "train-2": NEW, "export-1": NEW},
    suspended: {"prepare-1": OLD, "train-2": NEW, "export-1": NEW},
    exporting: {"prepare-1": OLD, "train-1": OLD, "export-1": OLD},
    succeeded: {"prepare-1": OLD, "train-1": OLD, "export-1": OLD},
    failed: {"prepare-1": OLD},
}
"""And the image of each child Job that is there in the end: that of the release that began the attempt."""

RUNNING = (preparing, training, exporting)
"""That these still run is written now and then."""


@pytest.fixture
def world(scripted_server: TestServer, namespace: str, kubelet: ScriptedKubelet) -> Iterator[World]:
    with ExitStack() as exits:
        yield World(scripted_server.client, namespace, kubelet, exits)


@pytest.fixture
def proxy(scripted_server: TestServer, tmp_path: Path) -> Iterator[FaultProxy]:
    with fault_proxy(scripted_server.client, tmp_path / "proxy.kubeconfig") as proxy:
        yield proxy


def start(
    program: type[OperatorProcess], world: World, kubeconfig: Path, log: Path, **settings: str
) -> OperatorProcess:
    operator = program(kubeconfig, world.namespace, log, **settings)
    world.exits.callback(operator.close)
    operator.start(wait=False)
    eventually(lambda: operator.is_healthy("/readyz"), 60, operator.log)
    return operator


def test_a_rolling_upgrade_disturbs_no_job_in_any_stage(
    scripted_server: TestServer, world: World, proxy: FaultProxy, tmp_path: Path
) -> None:
    lease = {"FINETUNE_LEASE_NAME": LEASE, "FINETUNE_LEASE_NAMESPACE": world.namespace, "FINETUNE_LEASE_SECONDS": "10"}
    old = start(
        OperatorProcess,
        world,
        scripted_server.kubeconfig,
        tmp_path / "old.log",
        FINETUNE_TRAINER_IMAGE=OLD,
        FINETUNE_POD_NAME="old",
        **lease,
    )
    jobs = {life: Job(world.client, world.namespace, life.__name__) for life in LIVES}
    lives = {life: life(job, world) for life, job in jobs.items()}
    for life in lives.values():
        next(life)
    settings = {**NEW_SETTINGS, **lease, "FINETUNE_POD_NAME": "new"}
    new = start(LaterRelease, world, proxy.kubeconfig, tmp_path / "new.log", **settings)
    before = {life: (job.body(), children(job)) for life, job in jobs.items()}

    assert old.stop() == 0
    eventually(new.leads, 60, new.log)
    assert f'version="{later_release.VERSION}"' in new.get("/metrics")

    def looks(job: Job) -> int:
        return sum(item.path == job.path for item in proxy.seen)

    # The second look at a job begins when the first one has written all that it wanted to.
    eventually(lambda: all(looks(job) >= 2 for job in jobs.values()), 60, new.log)
    allowed = (f"/leases/{LEASE}", *(f"{jobs[life].path}/status" for life in RUNNING))
    assert not [item for item in proxy.writes() if not item.path.endswith(allowed)]
    for life, job in jobs.items():
        body, its = before[life]
        assert children(job) == its
        if life in RUNNING:
            assert without_seen_time(job.body()) == without_seen_time(body)
        else:
            assert job.body() == body

    for life in lives.values():
        assert next(life, None) is None
    for life, job in jobs.items():
        if life in (succeeded, failed):
            assert job.body() == before[life][0]
            continue
        status = job.until(60, phase="Succeeded")
        assert status["restarts"] == {"charged": 1 if life is pausing else 0, "preemptions": 0, "outOfMemory": 0}
        attempts = 4 if life in (pausing, suspended) else 3
        assert len(status["history"]) == attempts, status["history"]
        assert made(job) == LIVES[life]
    assert made(jobs[failed]) == LIVES[failed]


def test_what_kill_9_left_half_done_is_gone_on_with_by_the_next_release(
    scripted_server: TestServer, world: World, proxy: FaultProxy, tmp_path: Path
) -> None:
    """The old release has created a Job and not said so, or a document and not its Job."""
    untold, torn = (Job(world.client, world.namespace, name) for name in ("untold", "torn"))
    cut = {("PATCH", "status")}

    async def fault(exchange: Exchange) -> web.StreamResponse | None:
        request = exchange.seen.method, exchange.seen.path.rpartition("/")[2]
        return exchange.cut() if request in cut else None

    proxy.fault = fault
    old = start(OperatorProcess, world, proxy.kubeconfig, tmp_path / "old.log", FINETUNE_TRAINER_IMAGE=OLD)
    untold.create()
    pod = world.pod(untold, "prepare")
    cut.add(("POST", "jobs"))
    torn.create()
    eventually(lambda: torn.children("configmaps"), describe=old.log)
    old.kill()
    assert not any("status" in job.body() for job in (untold, torn))
    assert not torn.children()

    start(LaterRelease, world, scripted_server.kubeconfig, tmp_path / "new.log", **NEW_SETTINGS)
    world.play(untold, *STAGES)
    world.play(torn, *STAGES)
    for job in (untold, torn):
        status = job.until(60, phase="Succeeded")
        assert status["restarts"] == {"charged": 0, "preemptions": 0, "outOfMemory": 0}
        assert [(past["stage"], past["number"]) for past in status["history"]] == [(stage, 1) for stage in STAGES]
    assert world.pod(untold, "prepare")["metadata"]["uid"] == pod["metadata"]["uid"]
    assert made(untold) == {"prepare-1": OLD, "train-1": NEW, "export-1": NEW}
    assert made(torn) == {"prepare-1": NEW, "train-1": NEW, "export-1": NEW}


def children(job: Job) -> dict[str, Any]:
    """All that belongs to a job, without what the cluster says of it."""
    found = {}
    for plural in ("jobs", "pods", "configmaps"):
        for item in job.children(plural):
            metadata = {k: v for k, v in item["metadata"].items() if k not in ("resourceVersion", "managedFields")}
            content = {key: value for key, value in item.items() if key not in ("metadata", "status")}
            found[f"{plural}/{metadata['name']}"] = {"metadata": metadata, **content}
    return found


def made(job: Job) -> dict[str, str]:
    """The image of each child Job. All of a child, and its document, is of one release."""
    documents = {item["metadata"]["name"]: item for item in job.children("configmaps")}
    images = {}
    for child in job.children():
        template = child["spec"]["template"]
        image = template["spec"]["containers"][0]["image"]
        (name,) = [volume["configMap"]["name"] for volume in template["spec"]["volumes"] if "configMap" in volume]
        assert f'"trainerImage": "{image}"' in documents[name]["data"][DOCUMENT_FILE]
        for item in (child, template, documents[name]):
            assert (later_release.LABEL in item["metadata"]["labels"]) == (image == NEW)
        images[child["metadata"]["name"].removeprefix(f"{job.name}-")] = image
    return images


def without_seen_time(body: dict[str, Any]) -> dict[str, Any]:
    status = body["status"]
    attempt = {key: value for key, value in status["attempt"].items() if key != "seenTime"}
    metadata = {k: v for k, v in body["metadata"].items() if k not in ("resourceVersion", "managedFields")}
    return {**body, "metadata": metadata, "status": {**status, "attempt": attempt}}
