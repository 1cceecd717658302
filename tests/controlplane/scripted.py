"""A kubelet that follows a script: it says what pods do by patching their status, on any API server.

And a stand-in for an agent: it serves a report at the address that the pod is given, as the trainer's agent does.
"""

from __future__ import annotations

import itertools
import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from api_client import Client, eventually

from finetune_api.names import (
    AGENT_PORT,
    COMPLETION_INDEX,
    CONTAINER,
    DOCUMENT_FILE,
    LABEL_ATTEMPT,
    LABEL_JOB_NAME,
    LABEL_STAGE,
)
from finetune_api.report import Report

_ADDRESSES = itertools.count(2)


def _now(ago: float = 0) -> str:
    return (datetime.now(UTC) - timedelta(seconds=ago)).strftime("%Y-%m-%dT%H:%M:%SZ")


class ScriptedKubelet:
    """Plays the pods of one namespace."""

    def __init__(self, client: Client, namespace: str) -> None:
        self._client = client
        self._pods = f"/api/v1/namespaces/{namespace}/pods"
        self._config_maps = f"/api/v1/namespaces/{namespace}/configmaps"

    def pod(self, stage: str, attempt: int = 1, seconds: float = 30, index: int = 0, job: str = "") -> dict[str, Any]:
        """The pod of an attempt, as soon as the Job controller has made it; of several the one with an index. `job`
        names its FineTuneJob where there are several."""
        selector = f"{LABEL_STAGE}={stage},{LABEL_ATTEMPT}={attempt},{COMPLETION_INDEX}={index}"
        if job:
            selector += f",{LABEL_JOB_NAME}={job}"

        def find() -> dict[str, Any] | None:
            items = self._client.get(self._pods, labelSelector=selector).body["items"]
            return items[0] if items else None

        found: dict[str, Any] = eventually(find, seconds, lambda: f"no pod for {stage} attempt {attempt}")
        return found

    def document(self, pod: dict[str, Any]) -> dict[str, Any]:
        """The job document that the pod is given."""
        (name,) = [v["configMap"]["name"] for v in pod["spec"]["volumes"] if "configMap" in v]
        loaded: dict[str, Any] = json.loads(self._client.get(f"{self._config_maps}/{name}").body["data"][DOCUMENT_FILE])
        return loaded

    def report(self, pod: dict[str, Any], **fields: Any) -> Report:
        """A report as the pod's agent would write it."""
        document = self.document(pod)
        return Report(job_uid=document["job"]["uid"], stage=document["stage"], attempt=document["attempt"], **fields)

    def bind(self, pod: dict[str, Any]) -> None:
        """A node takes the pod: when it is deleted from now on, its object stays until the node says that it ended."""
        # One that was never named before: a real controller removes the pods of nodes that it has long not seen.
        target = {"apiVersion": "v1", "kind": "Node", "name": f"node-{secrets.token_hex(4)}"}
        body = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod["metadata"]["name"]}, "target": target}
        answer = self._client.create(f"{self._pods}/{pod['metadata']['name']}/binding", body)
        assert answer.code == 201, answer.body

    def run(self, pod: dict[str, Any], ip: str = "127.0.0.1", ago: float = 0) -> None:
        """Its container runs, since so many seconds."""
        state = {"running": {"startedAt": _now(ago)}}
        self._patch(pod, "Running", state, podIP=ip, podIPs=[{"ip": ip}], startTime=_now())

    def succeed(self, pod: dict[str, Any], report: Report | None = None) -> None:
        self._patch(pod, "Succeeded", _terminated(0, report))

    def fail(self, pod: dict[str, Any], code: int, report: Report | None = None, reason: str = "Error") -> None:
        self._patch(pod, "Failed", _terminated(code, report, reason))

    def disrupt(self, pod: dict[str, Any], code: int = 75) -> None:
        """The cluster takes the pod away: a drain, a preemption, an eviction."""
        condition = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "PreemptionByScheduler",
            "message": "making room",
            "lastTransitionTime": _now(),
        }
        self._patch(pod, "Failed", _terminated(code), conditions=[condition])

    def remove(self, pod: dict[str, Any]) -> None:
        """The pod's object goes, as it does within a second of most ends."""
        self._client.delete(f"{self._pods}/{pod['metadata']['name']}", {"gracePeriodSeconds": 0})

    def end_stopped(self, pod: dict[str, Any]) -> None:
        """A pod that was told to stop saves, ends, and goes. One that no node had taken is gone already."""
        path = f"{self._pods}/{pod['metadata']['name']}"
        eventually(lambda: not self.exists(pod) or "deletionTimestamp" in self._client.get(path).body["metadata"])
        if self.exists(pod):
            self.fail(pod, 75)
            self.remove(pod)
        eventually(lambda: not self.exists(pod))

    def exists(self, pod: dict[str, Any]) -> bool:
        return bool(self._client.get(f"{self._pods}/{pod['metadata']['name']}").code == 200)

    def _patch(self, pod: dict[str, Any], phase: str, state: dict[str, Any], **more: Any) -> None:
        status = {
            "phase": phase,
            "containerStatuses": [
                {
                    "name": CONTAINER,
                    "state": state,
                    "ready": phase == "Running",
                    "restartCount": 0,
                    "image": "scripted",
                    "imageID": "",
                }
            ],
            **more,
        }
        answer = self._client.patch(f"{self._pods}/{pod['metadata']['name']}/status", {"status": status})
        assert answer.code == 200, answer.body


def _terminated(code: int, report: Report | None = None, reason: str = "") -> dict[str, Any]:
    ended = {"exitCode": code, "reason": reason or "Completed", "startedAt": _now(), "finishedAt": _now()}
    if report is not None:
        ended["message"] = report.encode().decode()
    return {"terminated": ended}


class Agent:
    """Answers /progress with what the test puts into `report`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.report: Report | None = None


@contextmanager
def agent() -> Iterator[Agent]:
    """An agent at a loopback address of its own."""
    speaker = Agent(f"127.0.71.{next(_ADDRESSES)}")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = speaker.report.encode() if speaker.report else b""
            self.send_response(200 if body else 503)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = ThreadingHTTPServer((speaker.address, AGENT_PORT), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield speaker
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
