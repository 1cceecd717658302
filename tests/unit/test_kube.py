"""The client against a server that puts requests off, over real HTTP; and the limit that it keeps by itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio import client

from finetune_operator.kube import CONFIG_MAPS, PATIENCE, RETRIES, ApiError, Kube
from finetune_operator.limiter import TokenBucket
from finetune_operator.metrics import Metrics


@dataclass
class Server:
    """Answers with what it is told, one after the other, and then as if all were well."""

    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    asked: list[tuple[str, bytes]] = field(default_factory=list)
    url: str = ""

    async def answer(self, request: web.BaseRequest) -> web.Response:
        self.asked.append((request.method, await request.read()))
        code, headers = self.answers.pop(0) if self.answers else (200, {})
        return web.json_response({"message": "said the server", "items": []}, status=code, headers=headers)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    runner = web.ServerRunner(web.Server(server.answer))  # type: ignore[arg-type]
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


@pytest.fixture
async def api(server: Server) -> AsyncIterator[client.ApiClient]:
    api = client.ApiClient(client.Configuration(host=server.url))
    yield api
    await api.close()


BODY = {"metadata": {"name": "x"}}
VERBS: dict[str, Any] = {
    "get": lambda kube: kube.get(CONFIG_MAPS, "ns", "x"),
    "list": lambda kube: kube.list(CONFIG_MAPS, "ns"),
    "create": lambda kube: kube.create(CONFIG_MAPS, "ns", BODY),
    "replace": lambda kube: kube.replace(CONFIG_MAPS, "ns", "x", BODY),
    "patch": lambda kube: kube.patch_status(CONFIG_MAPS, "ns", "x", BODY),
    "delete": lambda kube: kube.delete(CONFIG_MAPS, "ns", "x"),
}


@pytest.mark.parametrize("code", [429, 503])
@pytest.mark.parametrize("verb", VERBS)
async def test_what_is_put_off_is_sent_again(server: Server, api: client.ApiClient, verb: str, code: int) -> None:
    server.answers = [(code, {"Retry-After": "0.01"})] * RETRIES
    metrics = Metrics()
    await VERBS[verb](Kube(api, metrics))
    assert len(server.asked) == RETRIES + 1
    assert len(set(server.asked)) == 1, "each time the same"
    assert metrics.throttled_seconds.labels("server")._value.get() >= RETRIES * 0.01
    assert metrics.throttled_seconds.labels("client")._value.get() == 0


async def test_not_for_ever(server: Server, api: client.ApiClient) -> None:
    server.answers = [(429, {"Retry-After": "0.01"})] * (RETRIES + 1)
    with pytest.raises(ApiError, match="429: said the server"):
        await VERBS["create"](Kube(api))
    assert len(server.asked) == RETRIES + 1


@pytest.mark.parametrize(
    ("code", "headers"),
    [
        (429, {}),
        (503, {}),
        (429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
        (429, {"Retry-After": str(PATIENCE + 1)}),
        (429, {"Retry-After": "-1"}),
        (500, {"Retry-After": "0.01"}),
        (409, {"Retry-After": "0.01"}),
    ],
)
async def test_everything_else_is_for_the_caller(
    server: Server, api: client.ApiClient, code: int, headers: dict[str, str]
) -> None:
    server.answers = [(code, headers)]
    with pytest.raises(ApiError) as refused:
        await VERBS["create"](Kube(api))
    assert refused.value.status == code
    assert len(server.asked) == 1


async def test_what_has_changed_since_it_was_seen_is_not_deleted(server: Server, api: client.ApiClient) -> None:
    await Kube(api).delete(CONFIG_MAPS, "ns", "x", uid="u", version="7")
    await VERBS["delete"](Kube(api))
    first, second = (json.loads(body) for _, body in server.asked)
    assert first["preconditions"] == {"uid": "u", "resourceVersion": "7"}
    assert "preconditions" not in second


async def test_a_renewal_of_a_lease_does_not_wait(server: Server, api: client.ApiClient) -> None:
    server.answers = [(429, {"Retry-After": "0.01"})]
    with pytest.raises(ApiError):
        await VERBS["replace"](Kube(api, retries=0))
    assert len(server.asked) == 1


async def test_no_write_passes_the_guard(server: Server, api: client.ApiClient) -> None:
    """It is asked before each time of sending: the lease may expire while a request is put off."""
    asked = 0

    def guard() -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise SystemExit("no longer leading")

    kube = Kube(api, guard=guard)
    await VERBS["get"](kube)
    assert asked == 0
    server.answers = [(429, {"Retry-After": "0.01"})]
    with pytest.raises(SystemExit):
        await VERBS["create"](kube)
    assert [method for method, _ in server.asked] == ["GET", "POST"]


async def test_requests_wait_for_the_limit(server: Server, api: client.ApiClient) -> None:
    metrics = Metrics()
    kube = Kube(api, metrics, limiter=TokenBucket(rate=10, burst=2))
    # All at once: one after the other they might be slower than the limit.
    await asyncio.gather(*(VERBS["get"](kube) for _ in range(4)))
    assert len(server.asked) == 4
    assert metrics.throttled_seconds.labels("client")._value.get() > 0


class TestTokenBucket:
    def test_a_burst_is_free_and_then_the_rate_holds(self) -> None:
        now = 0.0
        bucket = TokenBucket(rate=10, burst=3, clock=lambda: now)
        assert [bucket.reserve() for _ in range(5)] == pytest.approx([0, 0, 0, 0.1, 0.2])
        now = 0.25
        assert bucket.reserve() == pytest.approx(0.05), "two of those before were let through meanwhile"

    def test_a_quiet_time_fills_it_again_but_no_more_than_that(self) -> None:
        now = 0.0
        bucket = TokenBucket(rate=10, burst=3, clock=lambda: now)
        for _ in range(3):
            bucket.reserve()
        now = 1000.0
        assert [bucket.reserve() for _ in range(4)] == pytest.approx([0, 0, 0, 0.1])

    def test_over_any_time_no_more_than_the_rate_and_one_burst(self) -> None:
        now = 0.0
        bucket = TokenBucket(rate=50, burst=100, clock=lambda: now)
        sent = []
        for step in range(5000):
            now = step * 0.001
            sent.append(now + bucket.reserve())
        assert sent == sorted(sent)
        assert sum(moment <= 5 for moment in sent) <= 50 * 5 + 100 + 1
