"""How late the operator is, and how much progress it writes: `python benchmarks/lateness.py [ROUNDS] [JOBS ...]`.

Runs the real operator with its default settings against an embedded API server, whose Job controller and garbage
collector do their work; pods are played by this script, which also answers for their agents. Measured is, over ROUNDS
rounds, the time

- from each limit of a job to what it leads to: its failure, or its removal;
- from the end of a pod, as the API server has it, to the condition that says what follows;

and, with each number of JOBS that train a step a second, the writes of their statuses in a minute.
"""

from __future__ import annotations

import asyncio
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from aiohttp import web
from take_over import Operator, free_ports

from finetune_api import API_VERSION, KIND
from finetune_api.failures import FailureClass, exit_code_of
from finetune_api.names import AGENT_PORT, CONTAINER, Stage, child_name
from finetune_api.report import Outcome, Report, StepProgress
from finetune_operator.kube import FINETUNE_JOBS, PODS, Kube, load_client_of_user
from finetune_operator.local.cluster import LocalCluster
from finetune_operator.resource import parse_time

NAMESPACE = "default"
LIMIT_SECONDS = 12
STEPS = 100_000
LOOK_SECONDS = 0.02

Object = dict[str, Any]


class Agents:
    """Answers for the agents of all pods, each of which has an address of its own on this machine."""

    def __init__(self) -> None:
        self._pods: dict[str, tuple[str, float]] = {}
        application = web.Application()
        application.router.add_get("/progress", self.answer)
        self._runner = web.AppRunner(application, access_log=None)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def address(self, uid: str) -> str:
        """An address for the pod that trains the job with this uid, from now on."""
        count = len(self._pods)
        address = f"127.99.{count // 250}.{1 + count % 250}"
        self._pods[address] = (uid, time.monotonic())
        await web.TCPSite(self._runner, address, AGENT_PORT).start()
        return address

    async def answer(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        uid, started = self._pods[request.transport.get_extra_info("sockname")[0]]
        step = StepProgress(step=int(time.monotonic() - started), total_steps=STEPS, loss=1.0, step_seconds=1.0)
        report = Report(job_uid=uid, stage=Stage.TRAIN, attempt=1, phase="Training", progress=step)
        return web.Response(body=report.encode())


class Lab:
    def __init__(self, kube: Kube, agents: Agents) -> None:
        self._kube = kube
        self._agents = agents
        self._count = 0

    async def create(self, **spec: Any) -> str:
        """A new job; its name."""
        self._count += 1
        name = f"job-{self._count}"
        basics = {
            "model": {"uri": "s3://models/base"},
            "dataset": {"train": [{"uri": "s3://datasets/train.jsonl"}]},
            "output": {"uri": f"s3://models/{name}"},
        }
        manifest = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": basics | spec}
        await self._kube.create(FINETUNE_JOBS, NAMESPACE, manifest)
        return name

    async def job(self, name: str) -> Object | None:
        return await self._kube.get(FINETUNE_JOBS, NAMESPACE, name)

    async def pod(self, name: str, stage: Stage) -> Object:
        """The pod of the first attempt of a stage."""
        query = {"labelSelector": f"batch.kubernetes.io/job-name={child_name(name, stage, 1)}"}
        while not (pods := await self._kube.list(PODS, NAMESPACE, **query)):
            await asyncio.sleep(LOOK_SECONDS)
        return pods[0]

    async def run(self, pod: Object, ip: str = "") -> datetime:
        """The pod begins to run; when that was."""
        now = datetime.now(UTC).replace(microsecond=0)
        await self._patch(pod, "Running", {"running": {"startedAt": now.isoformat()}}, ip)
        return now

    async def end(self, pod: Object, code: int, **report: Any) -> None:
        labels = pod["metadata"]["labels"]
        message = ""
        if report:
            uid, stage = labels["finetune.dev/job-uid"], Stage(labels["finetune.dev/stage"])
            message = Report(job_uid=uid, stage=stage, attempt=1, **report).encode().decode()
        now = datetime.now(UTC).isoformat()
        ended = {"exitCode": code, "startedAt": now, "finishedAt": now, "message": message}
        await self._patch(pod, "Failed" if code else "Succeeded", {"terminated": ended})

    async def train(self, **spec: Any) -> tuple[str, Object, datetime]:
        """A job whose train pod runs: its name, the pod, and since when."""
        name = await self.create(**spec)
        prepare = await self.pod(name, Stage.PREPARE)
        await self.run(prepare)
        await self.end(prepare, 0, outcome=Outcome.SUCCEEDED)
        train = await self.pod(name, Stage.TRAIN)
        address = await self._agents.address(train["metadata"]["labels"]["finetune.dev/job-uid"])
        return name, train, await self.run(train, address)

    async def _patch(self, pod: Object, phase: str, state: Object, ip: str = "") -> None:
        container = {"name": CONTAINER, "state": state, "ready": False, "restartCount": 0, "image": "", "imageID": ""}
        status = {"phase": phase, "podIP": ip, "containerStatuses": [container]}
        await self._kube.patch_status(PODS, NAMESPACE, pod["metadata"]["name"], {"status": status})


async def until(check: Callable[[], Awaitable[bool]]) -> datetime:
    """When it became so."""
    while not await check():
        await asyncio.sleep(LOOK_SECONDS)
    return datetime.now(UTC)


async def has_condition(lab: Lab, name: str, kind: str, status: str, reason: str) -> bool:
    job = await lab.job(name)
    conditions = ((job or {}).get("status") or {}).get("conditions") or []
    return any((c["type"], c["status"], c["reason"]) == (kind, status, reason) for c in conditions)


async def active_deadline(lab: Lab) -> float:
    name = await lab.create(activeDeadlineSeconds=LIMIT_SECONDS)
    since = await lab.run(await lab.pod(name, Stage.PREPARE))
    at = await until(lambda: has_condition(lab, name, "Failed", "True", "DeadlineExceeded"))
    return (at - since).total_seconds() - LIMIT_SECONDS


async def waiting_deadline(lab: Lab) -> float:
    name = await lab.create(preRunningDeadlineSeconds=LIMIT_SECONDS)
    await lab.pod(name, Stage.PREPARE)
    at = await until(lambda: has_condition(lab, name, "Failed", "True", "PreRunningDeadlineExceeded"))
    job = await lab.job(name)
    assert job is not None
    return (at - parse_time(job["metadata"]["creationTimestamp"])).total_seconds() - LIMIT_SECONDS


async def time_to_live(lab: Lab) -> float:
    name = await lab.create(ttlSecondsAfterFinished=LIMIT_SECONDS)
    await lab.end(await lab.pod(name, Stage.PREPARE), exit_code_of(FailureClass.USER_ERROR))
    await until(lambda: has_condition(lab, name, "Failed", "True", "UserError"))
    job = await lab.job(name)
    assert job is not None
    ended = parse_time(job["status"]["completionTime"])

    async def gone() -> bool:
        return await lab.job(name) is None

    return (await until(gone) - ended).total_seconds() - LIMIT_SECONDS


async def detection(lab: Lab) -> float:
    name, pod, _ = await lab.train()
    await until(lambda: has_condition(lab, name, "Running", "True", "Training"))
    started = datetime.now(UTC)
    await lab.end(pod, exit_code_of(FailureClass.TERMINATED))
    return (await until(lambda: has_condition(lab, name, "Running", "False", "Restarting")) - started).total_seconds()


async def writes(lab: Lab, operator: Operator, jobs: int) -> tuple[float, float]:
    """Status writes of each job in a minute, and all requests in a second."""

    async def train() -> None:
        name, _, _ = await lab.train()
        await until(lambda: has_condition(lab, name, "Running", "True", "Training"))

    await asyncio.gather(*(train() for _ in range(jobs)))

    async def counts() -> tuple[float, float]:
        text = await operator.ask("/metrics")
        found = re.findall(r"^finetune_operator_kube_requests_total\{(.*)\} (\S+)$", text, re.MULTILINE)
        everything = sum(float(value) for _, value in found)
        return sum(float(value) for labels, value in found if 'verb="PATCH"' in labels), everything

    # Each job writes every so often: only whole rounds tell.
    await asyncio.sleep(30)
    before, since = await counts(), time.monotonic()
    await asyncio.sleep(max(60, jobs))
    after, seconds = await counts(), time.monotonic() - since
    return (after[0] - before[0]) * 60 / seconds / jobs, (after[1] - before[1]) / seconds


async def main(rounds: int, loads: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with LocalCluster(runner=False) as cluster, Agents() as agents:
            api, _ = await load_client_of_user(str(cluster.kubeconfig), None)
            lab = Lab(Kube(api), agents)
            operator = Operator(Path(folder), "operator", *free_ports(1), cluster.kubeconfig)
            await operator.start()
            try:
                sys.stdout.write(f"{rounds} rounds, seconds late\n")
                for what in (active_deadline, waiting_deadline, time_to_live, detection):
                    found = await asyncio.gather(*(_later(0.7 * count, what, lab) for count in range(rounds)))
                    low, middle, high = min(found), statistics.median(found), max(found)
                    sys.stdout.write(f"{what.__name__}: median {middle:.2f}, from {low:.2f} to {high:.2f}\n")
                    sys.stdout.flush()
                for jobs in loads:
                    each, requests = await writes(lab, operator, jobs)
                    sys.stdout.write(
                        f"{jobs} more jobs: {each:.1f} status writes a minute each, {requests:.0f} requests/s\n"
                    )
                    sys.stdout.flush()
            finally:
                operator.send(signal.SIGKILL)
                await operator.wait()
                await api.close()


async def _later(seconds: float, what: Callable[[Lab], Awaitable[float]], lab: Lab) -> float:
    """Not all at the same moment of a second, or of a look."""
    await asyncio.sleep(seconds)
    return await what(lab)


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:]] or [10, 20, 200]
    asyncio.run(main(numbers[0], numbers[1:]))
