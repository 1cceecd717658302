"""The real operator on a bad line to its API server: whatever is late, cut, refused or lost, a job is done once."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from aiohttp import web
from api_client import eventually
from conftest import TestServer
from fault_proxy import Exchange, Fault, FaultProxy, fault_proxy
from finetune_job import STAGES, Job, play
from operator_process import OperatorProcess
from scripted import ScriptedKubelet

Start = Callable[[Fault], OperatorProcess]


@pytest.fixture
def proxy(scripted_server: TestServer, tmp_path: Path) -> Iterator[FaultProxy]:
    with fault_proxy(scripted_server.client, tmp_path / "kubeconfig") as proxy:
        yield proxy


@pytest.fixture
def start(proxy: FaultProxy, namespace: str, tmp_path: Path) -> Iterator[Start]:
    """Starts an operator behind the proxy."""
    with ExitStack() as exits:

        def start(fault: Fault) -> OperatorProcess:
            proxy.fault = fault
            operator = OperatorProcess(
                proxy.kubeconfig, namespace, tmp_path / "operator.log", FINETUNE_RESYNC_SECONDS="1"
            )
            exits.callback(operator.close)
            operator.start()
            return operator

        yield start


def refused(code: int, **headers: str) -> web.Response:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": "not now"}
    return web.json_response(body, status=code, headers={key.replace("_", "-"): text for key, text in headers.items()})


async def late(exchange: Exchange) -> web.StreamResponse | None:
    await asyncio.sleep(0.5)
    return None


async def cut(exchange: Exchange) -> web.StreamResponse | None:
    return exchange.cut()


async def lost(exchange: Exchange) -> web.StreamResponse | None:
    """Carried out, and the answer is lost."""
    await exchange.carry_out()
    return exchange.cut()


async def throttled(exchange: Exchange) -> web.StreamResponse | None:
    return refused(429, Retry_After="1")


async def broken(exchange: Exchange) -> web.StreamResponse | None:
    return refused(500)


async def short(exchange: Exchange) -> web.StreamResponse | None:
    """A watch that ends without a word."""
    asyncio.get_running_loop().call_later(0.5, exchange.cut)
    return None


def test_a_job_is_done_once_on_a_bad_line(
    scripted_server: TestServer, proxy: FaultProxy, namespace: str, start: Start, job: Job, kubelet: ScriptedKubelet
) -> None:
    dice = random.Random(7)
    kinds = itertools.cycle((late, cut, lost, throttled, broken))
    happened: Counter[Any] = Counter()

    async def weather(exchange: Exchange) -> web.StreamResponse | None:
        if exchange.seen.is_watch:
            kind = short
        elif dice.random() < 0.1:
            kind = next(kinds)
        else:
            return None
        happened[kind] += 1
        return await kind(exchange)

    operator = start(weather)
    path = f"/apis/batch/v1/namespaces/{namespace}/jobs"
    with scripted_server.client.watch(path) as watched:
        job.create()
        for stage in STAGES:
            pod = kubelet.pod(stage, seconds=120)
            kubelet.run(pod)
            kubelet.succeed(pod, kubelet.report(pod))
        # The operator looks at the job for as long as it is there.
        job.until(120, phase="Succeeded")
        eventually(lambda: len(happened) == 6, 60, lambda: f"{happened} {operator.log()}")
    created = [event["object"]["metadata"]["name"] for event in watched.events if event["type"] == "ADDED"]
    assert sorted(created) == [f"bot-{stage}-1" for stage in sorted(STAGES)]
    assert job.status()["restarts"] == {"charged": 0, "preemptions": 0, "outOfMemory": 0}
    assert "failure" not in job.status()
    asked = [seen for seen in proxy.seen if not seen.is_write and seen.path.endswith(("/jobs", "/pods"))]
    assert any(seen.is_watch for seen in asked)
    assert all("labelSelector=finetune.dev" in unquote(seen.query) for seen in asked), "those of others are many"


def test_a_job_is_done_once_when_no_write_is_ever_answered(
    scripted_server: TestServer, namespace: str, start: Start, job: Job, kubelet: ScriptedKubelet
) -> None:
    answers = Counter[int]()

    async def lost_when_done(exchange: Exchange) -> web.StreamResponse | None:
        if not exchange.seen.is_write:
            return None
        code, body = await exchange.carry_out()
        answers[code] += 1
        # A refusal is answered: without a word about either, nothing could ever be known.
        return exchange.cut() if code < 300 else web.Response(body=body, status=code, content_type="application/json")

    operator = start(lost_when_done)
    path = f"/apis/batch/v1/namespaces/{namespace}/jobs"
    with scripted_server.client.watch(path) as watched:
        job.create()
        for stage in STAGES:
            pod = kubelet.pod(stage, seconds=120)
            kubelet.run(pod)
            kubelet.succeed(pod, kubelet.report(pod))
        job.until(120, phase="Succeeded")
    created = [event["object"]["metadata"]["name"] for event in watched.events if event["type"] == "ADDED"]
    assert sorted(created) == [f"bot-{stage}-1" for stage in sorted(STAGES)]
    assert job.status()["restarts"] == {"charged": 0, "preemptions": 0, "outOfMemory": 0}
    assert answers[201] >= 6, "each ConfigMap and each Job"
    assert answers[409] >= 3, "each ConfigMap again, for want of an answer"
    assert "Traceback" not in operator.log(), "a bad line is no bug of ours"


def test_a_watch_that_falls_silent_is_found_and_costs_no_job(
    proxy: FaultProxy, namespace: str, start: Start, job: Job, kubelet: ScriptedKubelet
) -> None:
    expected = f"the watch of pods in {namespace} shows no changes\n"
    mended = threading.Event()

    async def silent(exchange: Exchange) -> web.StreamResponse | None:
        if exchange.seen.is_watch and exchange.seen.path.endswith("/pods"):
            await asyncio.to_thread(mended.wait, 120)
            return exchange.cut()
        return None

    operator = start(silent)
    try:
        job.create()
        kubelet.run(kubelet.pod("prepare"))
        eventually(lambda: operator.probe("/healthz") == (503, expected), 60, operator.log)
        assert operator.probe("/readyz") == (503, expected)
        job.until(60, phase="Preparing")
    finally:
        proxy.fault = None
        mended.set()
    eventually(lambda: operator.probe("/healthz") == (200, "ok\n"), 60, operator.log)
    play(job, kubelet, "prepare")
    kubelet.pod("train")
