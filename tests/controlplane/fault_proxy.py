"""A proxy between an operator and its API server, which notes each request and spoils those that a test names."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import yaml
from aiohttp import web
from api_client import Client


@dataclass(frozen=True)
class Seen:
    """One request, as the operator sent it."""

    method: str
    path: str
    query: str

    @property
    def is_watch(self) -> bool:
        return "watch=true" in self.query

    @property
    def is_write(self) -> bool:
        return self.method != "GET"


Fault = Callable[["Exchange"], Awaitable[web.StreamResponse | None]]
"""What happens to a request: an answer of its own, or None to let the request through."""


@dataclass
class Exchange:
    """A request on its way."""

    seen: Seen
    request: web.BaseRequest
    carry_out: Callable[[], Awaitable[tuple[int, bytes]]]
    """Sends it to the server and reads the answer, which nobody else sees."""

    def cut(self) -> web.StreamResponse:
        """Reset the connection: the operator gets no answer."""
        if self.request.transport is not None:
            self.request.transport.abort()
        return web.Response()


@dataclass
class FaultProxy:
    kubeconfig: Path
    fault: Fault | None = None
    seen: list[Seen] = field(default_factory=list)

    def writes(self) -> list[Seen]:
        return [item for item in self.seen if item.is_write]


async def down(exchange: Exchange) -> web.StreamResponse:
    """No answer to anything."""
    return exchange.cut()


@contextmanager
def fault_proxy(client: Client, kubeconfig: Path) -> Iterator[FaultProxy]:
    """A proxy in front of the server of a client; `kubeconfig` is written, and leads to the proxy."""
    proxy = FaultProxy(kubeconfig)
    started = threading.Event()
    stop = asyncio.Event()
    loop: asyncio.AbstractEventLoop
    port = 0

    async def serve() -> None:
        nonlocal loop, port
        loop = asyncio.get_running_loop()
        async with aiohttp.ClientSession(
            f"https://{client.host}:{client.port}",
            connector=aiohttp.TCPConnector(ssl=client.tls, limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        ) as session:
            server = web.Server(lambda request: _answer(proxy, client, session, request))  # type: ignore[arg-type]
            runner = web.ServerRunner(server, handler_cancellation=True, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            started.set()
            await stop.wait()
            await runner.cleanup()
        await asyncio.sleep(0.1)  # the connections to the server say goodbye

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(30)
    kubeconfig.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "proxy", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
                "users": [{"name": "nobody", "user": {"token": "of-the-proxy"}}],
                "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "nobody"}}],
                "current-context": "proxy",
            }
        )
    )
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)


async def _answer(
    proxy: FaultProxy, client: Client, session: aiohttp.ClientSession, request: web.BaseRequest
) -> web.StreamResponse:
    body = await request.read()
    seen = Seen(request.method, request.path, request.query_string)

    @contextlib.asynccontextmanager
    async def upstream() -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {key: request.headers[key] for key in ("Accept", "Content-Type") if key in request.headers}
        if client.token:
            headers["Authorization"] = f"Bearer {client.token}"
        async with session.request(seen.method, request.path_qs, headers=headers, data=body or None) as answer:
            yield answer

    async def carry_out() -> tuple[int, bytes]:
        async with upstream() as answer:
            return answer.status, await answer.read()

    proxy.seen.append(seen)
    if proxy.fault is not None:
        spoiled = await proxy.fault(Exchange(seen, request, carry_out))
        if spoiled is not None:
            return spoiled
    async with upstream() as source:
        answer = web.StreamResponse(status=source.status)
        for key in ("Content-Type", "Retry-After"):
            if key in source.headers:
                answer.headers[key] = source.headers[key]
        # Either side may go away in the middle.
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):
            await answer.prepare(request)
            async for piece in source.content.iter_any():
                await answer.write(piece)
            await answer.write_eof()
        return answer
