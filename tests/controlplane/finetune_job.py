"""A FineTuneJob on a server, as tests look at it, and its life played by a scripted kubelet."""

from __future__ import annotations

from typing import Any

from api_client import Client, eventually
from objects import manifest
from scripted import ScriptedKubelet

from finetune_api.names import LABEL_JOB_NAME
from finetune_api.report import Outcome

STAGES = ("prepare", "train", "export")


class Job:
    """A FineTuneJob on a server, and what became of it."""

    def __init__(self, client: Client, namespace: str, name: str = "bot") -> None:
        self._client = client
        self._namespace = namespace
        self.name = name
        self.path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs/{name}"

    def create(self, **spec: Any) -> None:
        body = manifest(self.name, **{"failurePolicy": {"backoffSeconds": 0}, **spec})
        answer = self._client.create(self.path.rpartition("/")[0], body)
        assert answer.code == 201, answer.body

    def change(self, **spec: Any) -> None:
        answer = self._client.patch(self.path, {"spec": spec})
        assert answer.code == 200, answer.body

    def body(self) -> dict[str, Any]:
        found: dict[str, Any] = self._client.get(self.path).body
        return found

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.body().get("status", {})
        return found

    def conditions(self) -> dict[str, tuple[str, str]]:
        return {c["type"]: (c["status"], c["reason"]) for c in self.status().get("conditions", [])}

    def until(self, seconds: float = 30, **wanted: Any) -> dict[str, Any]:
        """The status, as soon as fields have these values."""

        def check() -> dict[str, Any] | None:
            status = self.status()
            return status if all(status.get(key) == value for key, value in wanted.items()) else None

        found: dict[str, Any] = eventually(check, seconds, lambda: f"wanted {wanted}: {self.status()}")
        return found

    def until_condition(self, kind: str, status: str, reason: str) -> None:
        eventually(lambda: self.conditions().get(kind) == (status, reason), 30, lambda: f"{kind}: {self.conditions()}")

    def children(self, plural: str = "jobs") -> list[dict[str, Any]]:
        group = "/apis/batch/v1" if plural == "jobs" else "/api/v1"
        path = f"{group}/namespaces/{self._namespace}/{plural}"
        items: list[dict[str, Any]] = self._client.get(path, labelSelector=f"{LABEL_JOB_NAME}={self.name}").body[
            "items"
        ]
        return items

    def events(self) -> list[tuple[str, str]]:
        path = f"/api/v1/namespaces/{self._namespace}/events"
        items = self._client.get(path, fieldSelector=f"involvedObject.name={self.name}").body["items"]
        return [(item["type"], item["reason"]) for item in sorted(items, key=lambda i: i["firstTimestamp"])]


def play(job: Job, kubelet: ScriptedKubelet, stage: str, attempt: int = 1, **report: Any) -> None:
    """One stage from its pod's start to its success."""
    pod = kubelet.pod(stage, attempt, job=job.name)
    kubelet.run(pod)
    kubelet.succeed(pod, kubelet.report(pod, outcome=Outcome.SUCCEEDED, **report))


def play_before(job: Job, kubelet: ScriptedKubelet, stage: str) -> None:
    """All stages before this one."""
    for earlier in STAGES[: STAGES.index(stage)]:
        play(job, kubelet, earlier)
