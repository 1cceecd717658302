"""`finetune-operator`: run the operator against the cluster of the service account or the kubeconfig."""

from __future__ import annotations

import asyncio
import logging
import sys

import kopf
import prometheus_client

from finetune_operator.config import Settings
from finetune_operator.handlers import Operator, build_registry

log = logging.getLogger(__name__)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("aiohttp.access", "kopf.objects", "kopf.activities"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a line for each event would drown what matters
    try:
        settings = Settings.from_environment()
    except ValueError as error:
        log.error("%s", error)
        return 64
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    operator = Operator(settings)
    log.info("watching %s", ", ".join(settings.namespaces) or "all namespaces")
    asyncio.run(
        kopf.operator(
            registry=build_registry(operator),
            namespaces=settings.namespaces,
            clusterwide=not settings.namespaces,
            standalone=True,
            # Else kopf asks for the user's name, which an arbitrary user id does not have.
            identity="finetune-operator",  # type: ignore[arg-type]
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
