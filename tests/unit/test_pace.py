"""How often jobs are looked at."""

from __future__ import annotations

from typing import Any

import pytest
from builders import NOW, SETTINGS, UID, Story, child_job, child_pod, observe, running_pod

from finetune_api.names import Stage
from finetune_api.report import Report
from finetune_api.status import Phase
from finetune_operator.kube import JOBS, Kind
from finetune_operator.metrics import Metrics
from finetune_operator.pace import LOOKS_SHARE, PROGRESS_SHARE, REQUESTS, Pace, pace_of
from finetune_operator.plan import plan
from finetune_operator.progress import ProgressReader
from finetune_operator.reconcile import Key, Reconciler


def test_few_jobs_are_looked_at_as_often_as_was_asked_for() -> None:
    expected = Pace(poll=SETTINGS.poll_seconds, waiting=10.0, progress=SETTINGS.progress_seconds)
    assert pace_of(SETTINGS) == pace_of(SETTINGS, [Phase.RUNNING] * 30 + [Phase.QUEUED] * 60) == expected


def test_jobs_that_are_over_or_suspended_cost_nothing() -> None:
    assert pace_of(SETTINGS, [Phase.SUCCEEDED, Phase.FAILED, Phase.SUSPENDED] * 1000) == pace_of(SETTINGS)


@pytest.mark.parametrize("running", [100, 1000])
@pytest.mark.parametrize("waiting", [100, 1000])
def test_looks_and_writes_of_many_keep_to_their_shares(running: int, waiting: int) -> None:
    found = pace_of(SETTINGS, [Phase.RUNNING] * running + [Phase.PENDING] * waiting)
    looks = running / found.poll + waiting / found.waiting
    assert looks * REQUESTS <= 2 * LOOKS_SHARE * SETTINGS.kube_qps + 1e-9
    assert running / found.progress <= PROGRESS_SHARE * SETTINGS.kube_qps + 1e-9
    # Those that wait do not slow those that run.
    assert found.poll == pace_of(SETTINGS, [Phase.RUNNING] * running).poll


@pytest.mark.parametrize(("age", "expected"), [(30, 10.0), (61, 160.0)])
def test_a_new_job_learns_soon_why_it_waits(age: float, expected: float) -> None:
    story = Story()
    story.look()
    seen = observe([child_job(Stage.PREPARE, age=age)], [child_pod(Stage.PREPARE)])
    slow = pace_of(SETTINGS, [Phase.STARTING] * 1000)
    assert plan(story.job, seen, SETTINGS, NOW, slow).look_again == pytest.approx(expected)


class Cluster:
    """A job in each namespace, and all of them train until they are deleted."""

    def __init__(self) -> None:
        story = Story()
        story.prepared()
        story.look([child_job(Stage.TRAIN)], [running_pod(Stage.TRAIN)])
        self._body = story.body
        self.deleted: set[str] = set()

    async def get(self, kind: Kind, namespace: str, name: str) -> dict[str, Any] | None:
        return None if namespace in self.deleted else self._body

    async def list(self, kind: Kind, *_: Any, **__: Any) -> list[dict[str, Any]]:
        item = child_job(Stage.TRAIN) if kind is JOBS else running_pod(Stage.TRAIN)
        item["metadata"]["ownerReferences"] = [{"kind": "Job", "name": "bot-train-1", "uid": UID}]
        return [item]

    async def patch_status(self, *_: Any) -> None:
        pass

    async def create(self, *_: Any) -> None:
        pass


class Silent(ProgressReader):
    async def read(self, ip: str) -> tuple[Report | None, str]:
        return None, "it does not answer"


async def test_each_job_slows_the_others_while_it_is_there() -> None:
    cluster, again = Cluster(), dict[str, float]()
    reconcile = Reconciler(
        cluster,  # type: ignore[arg-type]
        Silent(),
        SETTINGS,
        Metrics(),
        lambda key, delay: again.__setitem__(key.namespace, delay),
        clock=lambda: NOW,
    )
    names = [str(number) for number in range(200)]
    for name in names:
        await reconcile(Key(name, "bot"))
    assert again["0"] == SETTINGS.poll_seconds
    assert again["199"] == pace_of(SETTINGS, [Phase.RUNNING] * 199).poll > 30
    cluster.deleted = set(names[1:])
    for name in names:
        await reconcile(Key(name, "bot"))
    await reconcile(Key("0", "bot"))
    assert again["0"] == SETTINGS.poll_seconds
