"""Two real operators and one Lease: one works, and the other one goes on when it is gone, however it went."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from api_client import eventually
from conftest import TestServer
from fault_proxy import Exchange, FaultProxy, down, fault_proxy
from finetune_job import STAGES, Job, play
from operator_process import OperatorProcess
from scripted import ScriptedKubelet

LEASE = "finetune-operator"


class Replica(OperatorProcess):
    """An operator whose requests go through a proxy of its own."""

    def __init__(self, name: str, proxy: FaultProxy, namespace: str, log: Path, **settings: str) -> None:
        super().__init__(proxy.kubeconfig, namespace, log, FINETUNE_POD_NAME=name, **settings)
        self.name = name
        self.proxy = proxy


class Replicas:
    """Two of them, which are started again when they end, as a Deployment does."""

    def __init__(self, server: TestServer, namespace: str, both: list[Replica]) -> None:
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/{LEASE}"
        self._server = server
        self.both = both

    def lease(self) -> dict[str, Any]:
        spec: dict[str, Any] = self._server.client.get(self._path).body["spec"]
        return spec

    def leader(self, other_than: Replica | None = None) -> Replica:
        def find() -> Replica | None:
            for replica in self.both:
                if replica.ended() is not None:
                    replica.start(wait=False)
            return next((replica for replica in self.both if replica.leads() and replica is not other_than), None)

        found: Replica = eventually(find, 60, self.logs)
        return found

    def other(self, replica: Replica) -> Replica:
        return next(item for item in self.both if item is not replica)

    def logs(self) -> str:
        return "\n\n".join(replica.log() for replica in self.both)


Start = Callable[[int], Replicas]


@pytest.fixture
def start(scripted_server: TestServer, namespace: str, tmp_path: Path) -> Iterator[Start]:
    """Starts two replicas whose lease lasts so many seconds."""
    with ExitStack() as exits:

        def start(seconds: int) -> Replicas:
            both = []
            for name in ("a", "b"):
                proxy = exits.enter_context(fault_proxy(scripted_server.client, tmp_path / f"{name}.kubeconfig"))
                settings = {
                    "FINETUNE_LEASE_NAME": LEASE,
                    "FINETUNE_LEASE_NAMESPACE": namespace,
                    "FINETUNE_LEASE_SECONDS": str(seconds),
                }
                replica = Replica(name, proxy, namespace, tmp_path / f"{name}.log", **settings)
                replica.start(wait=False)
                exits.callback(replica.close)
                both.append(replica)
            for replica in both:
                eventually(lambda r=replica: r.is_healthy("/readyz"), 60, replica.log)
            return Replicas(scripted_server, namespace, both)

        yield start


def test_one_works_and_the_other_only_reads_the_lease(start: Start, job: Job, kubelet: ScriptedKubelet) -> None:
    replicas = start(30)
    leader = replicas.leader()
    standby = replicas.other(leader)
    job.create()
    play(job, kubelet, "prepare")
    kubelet.pod("train")
    assert not standby.leads()
    assert standby.is_healthy("/healthz")
    assert standby.is_healthy("/readyz")
    assert {(item.method, item.path.rpartition("/")[2]) for item in standby.proxy.seen} <= {
        ("GET", LEASE),
        ("POST", "leases"),  # both were asked to lead at the same time
    }
    # An order to stop, with the SIGCONT that systemd and timeout send after it. What is in the lease when the process
    # is gone says whether the other one has to wait.
    leader.send(signal.SIGTERM)
    leader.send(signal.SIGCONT)
    assert eventually(lambda: leader.ended() is not None, 60, leader.log)
    assert leader.ended() == 0, leader.log()
    assert "Traceback" not in leader.log()
    assert not replicas.lease()["holderIdentity"].startswith(f"{leader.name}_")
    eventually(standby.leads, 60, replicas.logs)
    kubelet.run(kubelet.pod("train"))
    job.until(phase="Running")
    assert standby.stop() == 0
    assert replicas.lease()["holderIdentity"] == ""
    assert replicas.lease()["leaseTransitions"] == 1


def test_an_order_to_stop_waits_for_the_look_in_hand(start: Start, job: Job) -> None:
    replicas = start(30)
    leader = replicas.leader()
    held, goes_on = threading.Event(), threading.Event()

    async def hold_the_job(exchange: Exchange) -> web.StreamResponse | None:
        if (exchange.seen.method, exchange.seen.path.rpartition("/")[2]) == ("POST", "jobs"):
            held.set()
            await asyncio.to_thread(goes_on.wait, 60)
        return None

    leader.proxy.fault = hold_the_job
    job.create()
    assert held.wait(60)
    leader.send(signal.SIGTERM)
    eventually(lambda: "SIGTERM" in leader.log(), 60, leader.log)
    goes_on.set()
    assert eventually(lambda: leader.ended() is not None, 60, leader.log)
    assert leader.ended() == 0
    # The look went on to its end: the child, then the status that says so, then what goes with it; and then the lease.
    written = [f"{item.method} {item.path.rpartition('/')[2]}" for item in leader.proxy.writes()]
    assert written[-1] == f"PUT {LEASE}"
    rest = [item for item in written[written.index("POST jobs") :] if item != f"PUT {LEASE}"]
    assert rest == ["POST jobs", "PATCH status", "POST events"]
    assert job.status()["attempt"]["jobName"] == "bot-prepare-1"


def test_kill_9_of_the_leader_in_every_stage_loses_and_doubles_nothing(
    scripted_server: TestServer, namespace: str, start: Start, job: Job, kubelet: ScriptedKubelet
) -> None:
    replicas = start(4)
    path = f"/apis/batch/v1/namespaces/{namespace}/jobs"
    with scripted_server.client.watch(path) as watched:
        job.create()
        for stage in STAGES:
            pod = kubelet.pod(stage, seconds=60)
            leader = replicas.leader()
            leader.kill()
            play(job, kubelet, stage)
            assert replicas.leader(other_than=leader) is not leader
            assert pod["metadata"]["uid"] == kubelet.pod(stage)["metadata"]["uid"]
        job.until(60, phase="Succeeded")
    assert "failure" not in job.status()
    created = [event["object"]["metadata"]["name"] for event in watched.events if event["type"] == "ADDED"]
    assert sorted(created) == [f"bot-{stage}-1" for stage in sorted(STAGES)]
    assert replicas.lease()["leaseTransitions"] >= len(STAGES)


def test_a_leader_that_was_frozen_beyond_its_lease_ends_without_a_write(
    start: Start, job: Job, kubelet: ScriptedKubelet
) -> None:
    replicas = start(6)
    leader = replicas.leader()
    job.create()
    kubelet.run(kubelet.pod("prepare"))
    job.until(phase="Preparing")
    leader.send(signal.SIGSTOP)
    try:
        eventually(replicas.other(leader).leads, 60, replicas.logs)
        # Work is waiting for it when it comes back.
        play(job, kubelet, "prepare")
        kubelet.pod("train", seconds=60)
        written = len(leader.proxy.writes())
    finally:
        leader.send(signal.SIGCONT)
    assert eventually(leader.ended, 60, leader.log) == 1
    assert "no longer leading" in leader.log()
    assert len(leader.proxy.writes()) == written


def test_a_leader_cut_off_from_the_api_server_ends_and_the_other_one_goes_on(
    start: Start, job: Job, kubelet: ScriptedKubelet
) -> None:
    replicas = start(6)
    leader = replicas.leader()
    leader.proxy.fault = down
    assert eventually(leader.ended, 60, leader.log) == 1
    leader.proxy.fault = None
    job.create()
    kubelet.pod("prepare", seconds=60)


def test_a_short_outage_of_the_api_server_changes_nothing(start: Start, job: Job, kubelet: ScriptedKubelet) -> None:
    replicas = start(15)
    leader = replicas.leader()
    failed = []

    async def outage(exchange: Exchange) -> web.StreamResponse | None:
        if exchange.seen.path.endswith(LEASE):
            failed.append(exchange.seen)
        return await down(exchange)

    replicas.other(leader).proxy.fault = down
    leader.proxy.fault = outage
    eventually(lambda: failed)
    for replica in replicas.both:
        replica.proxy.fault = None
    job.create()
    kubelet.pod("prepare", seconds=60)
    assert leader.leads()
    assert replicas.lease()["leaseTransitions"] == 0
    holder = replicas.lease()["holderIdentity"]
    assert replicas.other(leader).stop() == 0
    assert replicas.lease()["holderIdentity"] == holder, "a standby that goes releases nothing"
