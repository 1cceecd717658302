"""An operator that dies at any write, just before or just after the API server has done it, loses nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pytest
from api_client import eventually
from conftest import TestServer
from objects import manifest
from scripted import ScriptedKubelet

from finetune_operator.config import Settings
from finetune_operator.kube import Kind, Kube, load_client_of_user
from finetune_operator.metrics import Metrics
from finetune_operator.progress import ProgressReader
from finetune_operator.reconcile import Key, Reconciler

STAGES = ("prepare", "train", "export")


class Death(BaseException):
    """The process is gone: nothing of it may catch this."""


class MortalKube(Kube):
    """Dies at the n-th write, before or after it has happened."""

    writes = 0
    dies_at: tuple[int, str] | None = None

    async def _request(
        self,
        method: str,
        kind: Kind,
        path: str,
        query: Mapping[str, str] | None = None,
        body: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        if method == "GET":
            return await super()._request(method, kind, path, query, body)
        self.writes += 1
        if self.dies_at == (self.writes, "before"):
            raise Death
        answer = await super()._request(method, kind, path, query, body)
        if self.dies_at == (self.writes, "after"):
            raise Death
        return answer


async def live(server: TestServer, namespace: str, name: str, dies_at: tuple[int, str] | None) -> int:
    """Play a whole life, with a preemption and a suspension in it, with an operator that dies once; returns how often
    it wrote."""
    client = server.client
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"
    assert client.create(path, manifest(name, failurePolicy={"backoffSeconds": 0})).code == 201
    kubelet = ScriptedKubelet(client, namespace)
    api, _ = await load_client_of_user(str(server.kubeconfig), None)
    kube = MortalKube(api)
    kube.dies_at = dies_at
    reader = ProgressReader()
    settings = Settings(trainer_image="scripted/trainer:test")
    key = Key(namespace, name)

    async def look() -> dict[str, Any]:
        """A look of an operator without any memory."""
        reconciler = Reconciler(kube, reader, settings, Metrics(), lambda key, delay: None)
        try:
            await reconciler(key)
        except Death:
            kube.dies_at = None
        status: dict[str, Any] = client.get(f"{path}/{name}").body.get("status", {})
        return status

    def jobs() -> list[dict[str, Any]]:
        items = client.get(f"/apis/batch/v1/namespaces/{namespace}/jobs").body["items"]
        return [item for item in items if item["metadata"]["name"].startswith(f"{name}-")]

    def active(stage: str) -> list[str]:
        return [
            item["metadata"]["name"]
            for item in jobs()
            if item["metadata"]["labels"]["finetune.dev/stage"] == stage
            and not any(c["type"] in ("Failed", "Complete") for c in item.get("status", {}).get("conditions", []))
        ]

    try:
        script = [
            ("prepare", 1, "succeed"),
            ("train", 1, "disrupt"),
            ("train", 2, "suspend"),
            ("train", 3, "succeed"),
            ("export", 1, "succeed"),
        ]
        for stage, attempt, end in script:
            for _ in range(20):
                await look()
                assert len(active(stage)) <= 1
                if f"{name}-{stage}-{attempt}" in active(stage):
                    break
            pod = kubelet.pod(stage, attempt)
            kubelet.run(pod)
            await look()
            if end == "suspend":
                assert client.patch(f"{path}/{name}", {"spec": {"suspend": True}}).code == 200
                for _ in range(20):
                    await look()
                    if not active(stage):
                        break
                kubelet.remove(pod)
                eventually(lambda p=pod: not kubelet.exists(p))
                for _ in range(20):
                    if (await look()).get("phase") == "Suspended" and kube.dies_at is None:
                        break
                assert client.patch(f"{path}/{name}", {"spec": {"suspend": False}}).code == 200
            else:
                getattr(kubelet, end)(pod)
            eventually(lambda s=stage: not active(s))
        for _ in range(20):
            status = await look()
            if status.get("phase") == "Succeeded" and kube.dies_at is None:
                break
            if dies_at is None and status.get("phase") == "Succeeded":
                break
        assert status["phase"] == "Succeeded"
        assert status["restarts"] == {"charged": 0, "preemptions": 1, "outOfMemory": 0}
        assert [(past["stage"], past["number"], past["outcome"]) for past in status["history"]] == [
            ("prepare", 1, "Succeeded"),
            ("train", 1, "Preempted"),
            ("train", 2, "Suspended"),
            ("train", 3, "Succeeded"),
            ("export", 1, "Succeeded"),
        ]
        assert sorted(item["metadata"]["name"] for item in jobs()) == [
            f"{name}-export-1",
            f"{name}-prepare-1",
            f"{name}-train-1",
            f"{name}-train-3",
        ]
        return kube.writes
    finally:
        client.delete(f"{path}/{name}")
        await reader.close()
        await api.close()


async def test_death_at_every_write(scripted_server: TestServer, namespace: str) -> None:
    writes = await live(scripted_server, namespace, "whole", None)
    assert writes > 15, "children, status and events of four attempts"
    every = int(os.environ.get("FINETUNE_TEST_CRASH_STRIDE", "1"))
    for number in range(1, writes + 1, every):
        for moment in ("before", "after"):
            await live(scripted_server, namespace, f"j{number}{moment[0]}", (number, moment))


async def test_a_status_that_changed_in_between_is_planned_again(scripted_server: TestServer, namespace: str) -> None:
    """Somebody labels the job between the look and the write: 409, and nothing of the stale plan is written."""
    client = scripted_server.client
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"
    assert client.create(path, manifest("bot")).code == 201
    api, _ = await load_client_of_user(str(scripted_server.kubeconfig), None)

    class MeddledKube(Kube):
        meddled = False

        async def create(self, kind: Kind, namespace: str, body: dict[str, Any], **query: str) -> dict[str, Any]:
            made = await super().create(kind, namespace, body, **query)
            if not self.meddled:
                self.meddled = True
                client.patch(f"{path}/bot", {"metadata": {"labels": {"hello": "world"}}})
            return made

    reader, again = ProgressReader(), []
    kube = MeddledKube(api)
    reconciler = Reconciler(kube, reader, Settings(), Metrics(), lambda key, delay: again.append(delay))
    await reconciler(Key(namespace, "bot"))
    assert "status" not in client.get(f"{path}/bot").body
    assert again == [0.1]
    await reconciler(Key(namespace, "bot"))
    assert client.get(f"{path}/bot").body["status"]["attempt"]["jobName"] == "bot-prepare-1"
    await reader.close()
    await api.close()


@pytest.mark.parametrize("code", [429, 500, 503])
async def test_an_api_server_that_fails_is_asked_again_later(code: int) -> None:
    from finetune_operator.kube import ApiError

    class FailingKube:
        async def get(self, *_: Any) -> dict[str, Any]:
            raise ApiError(code, "not now", retry_after=7 if code == 429 else None)

    again: list[float] = []
    metrics = Metrics()
    reconciler = Reconciler(FailingKube(), ProgressReader(), Settings(), metrics, lambda k, d: again.append(d))  # type: ignore[arg-type]
    for _ in range(6):
        await reconciler(Key("n", "j"))
    if code == 429:
        assert all(delay >= 7 * 0.8 for delay in again), "Retry-After is honoured"
    else:
        assert again[0] < 2 < again[3] < again[5], "the pauses grow"
    assert metrics.reconciles.labels("error")._value.get() == 6
