"""What the operator keeps in memory: something small for each job that is there, and nothing for others."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from builders import NOW, SETTINGS
from test_pace import Cluster, Silent

from finetune_operator.kube import Kind
from finetune_operator.metrics import Metrics
from finetune_operator.reconcile import Key, Reconciler

JOBS = 50
OBJECT = 200_000
"""Bytes of an object that nobody needs twice."""


class LargeObjects(Cluster):
    async def get(self, kind: Kind, namespace: str, name: str) -> dict[str, Any] | None:
        found = await super().get(kind, namespace, name)
        metadata = {"namespace": namespace, "managedFields": [bytearray(OBJECT)]}
        return found and {**found, "metadata": found["metadata"] | metadata}

    async def list(self, kind: Kind, *_: Any, **__: Any) -> list[dict[str, Any]]:
        items = await super().list(kind)
        return [{**item, "managedFields": [bytearray(OBJECT)]} for item in items]


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def held() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def test_it_keeps_no_objects_and_forgets_jobs_that_are_gone(traced: None) -> None:
    cluster, metrics = LargeObjects(), Metrics()
    reconcile = Reconciler(
        cluster,  # type: ignore[arg-type]
        Silent(),
        SETTINGS,
        metrics,
        lambda *_: None,
        clock=lambda: NOW,
    )

    async def look(names: list[str]) -> None:
        for name in names:
            await reconcile(Key(name, "bot"))
        metrics.exposition()

    names = [str(number) for number in range(JOBS + 1)]
    await look(names[:1])  # what is kept for all of them
    before = held()
    await look(names[1:])
    assert 1000 < (held() - before) / JOBS < OBJECT / 10
    cluster.deleted = set(names)
    await look(names[1:])
    assert (held() - before) / JOBS < 1000
