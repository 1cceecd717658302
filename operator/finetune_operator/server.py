"""/metrics, /healthz and /readyz of the operator."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from finetune_operator.metrics import Metrics


async def serve(host: str, port: int, metrics: Metrics, unhealthy: Callable[[], str]) -> web.AppRunner:
    """Start answering. `unhealthy` says what is wrong, or nothing."""

    async def exposition(request: web.Request) -> web.Response:
        return web.Response(body=metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def health(request: web.Request) -> web.Response:
        problem = unhealthy()
        return web.Response(text=problem or "ok\n", status=503 if problem else 200)

    application = web.Application()
    application.router.add_get("/metrics", exposition)
    application.router.add_get("/healthz", health)
    application.router.add_get("/readyz", health)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
