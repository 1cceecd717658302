"""The operator's I/O against servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from builders import SETTINGS, UID, job_body, report

from finetune_api.names import Stage
from finetune_operator import handlers, progress
from finetune_operator.cli import commands
from finetune_operator.handlers import Operator
from finetune_operator.kube import ApiError
from finetune_operator.progress import ProgressReader


@contextlib.asynccontextmanager
async def agent(answer: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[int]:
    """A server that reads a request and answers as told; its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await answer(writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


class TestProgress:
    async def ask(self, port: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
        monkeypatch.setattr(progress, "AGENT_PORT", port)
        reader = ProgressReader()
        try:
            return await reader.read("127.0.0.1")
        finally:
            await reader.close()

    async def test_an_answer_in_several_segments_is_read_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        body = report(Stage.TRAIN, 1).encode()

        async def answer(writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
            for start in range(0, len(body), 20):
                await writer.drain()
                await asyncio.sleep(0.01)
                writer.write(body[start : start + 20])

        async with agent(answer) as port:
            found, problem = await self.ask(port, monkeypatch)
        assert problem == ""
        assert found.job_uid == UID

    async def test_an_endless_answer_is_not_read_to_its_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def answer(writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b"x" * 65536)
                    await writer.drain()

        async with agent(answer) as port:
            assert await self.ask(port, monkeypatch) == (None, "no report in the answer")

    async def test_silence_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(progress, "TIMEOUT_SECONDS", 0.2)

        async def answer(writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(1)

        async with agent(answer) as port:
            found, problem = await self.ask(port, monkeypatch)
        assert found is None
        assert "Timeout" in problem


class Cluster:
    """Answers `get` and `list` as told, one after the other; an exception is raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    async def get(self, *_: Any) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class TestFollowing:
    ENDED = job_body(
        {
            "conditions": [
                {
                    "type": "Complete",
                    "status": "True",
                    "reason": "TrainingComplete",
                    "message": "done",
                    "lastTransitionTime": "2026-01-01T00:00:00Z",
                }
            ]
        }
    )

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(commands, "POLL_SECONDS", 0.001)

    @pytest.mark.parametrize("error", [ApiError(500, "etcdserver: leader changed"), ApiError(429, ""), TimeoutError()])
    async def test_a_hiccup_of_the_cluster_is_no_end(self, error: Exception) -> None:
        cluster = Cluster(job_body(), error, error, self.ENDED)
        seen = [job async for job in commands.states(cluster, "team", "bot")]  # type: ignore[arg-type]
        assert len(seen) == 2

    async def test_a_cluster_that_stays_away_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(commands, "PATIENCE_SECONDS", 0.002)
        cluster = Cluster(*[ApiError(500, "gone")] * 10)
        with pytest.raises(ApiError):
            [job async for job in commands.states(cluster, "team", "bot")]  # type: ignore[arg-type]
        assert len(cluster.answers) > 5

    async def test_a_refusal_is_one_at_once(self) -> None:
        cluster = Cluster(ApiError(403, "forbidden"), self.ENDED)
        with pytest.raises(ApiError):
            [job async for job in commands.states(cluster, "team", "bot")]  # type: ignore[arg-type]


async def test_a_namespace_that_is_gone_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Namespaces:
        async def list(self, kind: Any, namespace: str) -> list[dict[str, Any]]:
            if namespace == "gone":
                raise ApiError(403, "forbidden")
            return [job_body()]

    operator = Operator(type(SETTINGS)(namespaces=("gone", "team"), resync_seconds=0.01))
    operator._resynced = 0.0
    task = asyncio.create_task(operator._resync(Namespaces()))  # type: ignore[arg-type]
    await asyncio.sleep(0.05)
    task.cancel()
    assert len(operator.queue) == 1
    assert operator._resynced > 0


async def test_a_look_that_does_not_end_holds_up_a_stop_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asyncio.Event()

    class Silent:
        async def param_serialize(self, *_: Any, **__: Any) -> tuple[()]:
            return ()

        async def call_api(self, **_: Any) -> None:
            asked.set()
            await asyncio.sleep(3600)

        async def close(self) -> None:
            pass

    async def load_client() -> Silent:
        return Silent()

    monkeypatch.setattr(handlers, "load_client", load_client)
    monkeypatch.setattr(handlers, "STOP_SECONDS", 0.01)
    operator = Operator(type(SETTINGS)(http_host="127.0.0.1", http_port=0))
    await operator.open()
    await operator.lead()
    await operator.start()
    operator.mark("team", "bot")
    await asked.wait()
    async with asyncio.timeout(30):
        await operator.stop()
