"""/metrics, /healthz and /readyz of the operator."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from finetune_operator.metrics import Metrics


async def serve(
    host: str, port: int, metrics: Metrics, unhealthy: Callable[[], str], unready: Callable[[], str]
) -> web.AppRunner:
    """Start answering. `unhealthy` and `unready` say what is wrong, or nothing."""

    async def exposition(request: web.Request) -> web.Response:
        return web.Response(body=metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4"})

    def probe(judge: Callable[[], str]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            problem = judge()
            return web.Response(text=problem or "ok\n", status=503 if problem else 200)

        return answer

    application = web.Application()
    application.router.add_get("/metrics", exposition)
    application.router.add_get("/healthz", probe(unhealthy))
    application.router.add_get("/readyz", probe(unready))
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
