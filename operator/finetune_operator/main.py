"""`finetune-operator`: run the operator against the cluster of the service account or the kubeconfig."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Coroutine
from typing import Any

import kopf
import prometheus_client

from finetune_operator import logs
from finetune_operator.config import Settings
from finetune_operator.handlers import Operator, build_registry

log = logging.getLogger(__name__)


def main() -> int:
    try:
        settings = Settings.from_environment()
    except ValueError as error:
        logs.configure("text", "INFO")
        log.error("%s", error)
        return 64
    logs.configure(settings.log_format, settings.log_level)
    if unknown := Settings.unknown():
        # No reason to end: Kubernetes makes such variables for Services, and a newer chart may know newer settings.
        log.warning("no settings of this operator: %s", ", ".join(unknown))
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    try:
        asyncio.run(run(settings))
    except Exception:
        log.critical("the operator ended", exc_info=True)
        return 1
    return 0


async def run(settings: Settings) -> None:
    """Stand by until this replica leads, then work until told to stop."""
    operator = Operator(settings)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, operator.stopping.set)
    try:
        await operator.open()
        if not await _before(operator.stopping, operator.lead()):
            return
        log.info("watching %s", ", ".join(settings.namespaces) or "all namespaces")
        await kopf.operator(
            registry=build_registry(operator),
            namespaces=settings.namespaces,
            clusterwide=not settings.namespaces,
            standalone=True,
            stop_flag=operator.stopping,
            # Else kopf asks for the user's name, which an arbitrary user id does not have.
            identity="finetune-operator",  # type: ignore[arg-type]
        )
    finally:
        await operator.stop()


async def _before(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Whether some work was done before the order to stop, which ends it."""
    tasks = [asyncio.create_task(work), asyncio.create_task(stop.wait())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    if not tasks[0].cancelled():
        tasks[0].result()
    return not stop.is_set()


if __name__ == "__main__":
    sys.exit(main())
