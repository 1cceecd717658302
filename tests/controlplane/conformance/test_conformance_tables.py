"""The tables that `kubectl get` prints."""

from __future__ import annotations

from typing import Any

import pytest
from api_client import TABLE, Client
from conftest import TestServer
from objects import job, manifest, pod_spec


@pytest.fixture
def client(server: TestServer) -> Client:
    return server.client


def columns(table: dict[str, Any]) -> list[str]:
    return [column["name"] for column in table["columnDefinitions"]]


def test_custom_columns(client: Client, namespace: str) -> None:
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"
    client.create(path, manifest())
    status = {"phase": "Running", "reason": "Training", "restarts": {"charged": 2, "preemptions": 3}}
    client.patch(f"{path}/support-bot/status", {"status": status})
    table = client.get(path, accept=TABLE).body
    assert (table["kind"], table["apiVersion"]) == ("Table", "meta.k8s.io/v1")
    assert columns(table) == [
        *("Name", "Phase", "Reason", "Method", "Progress", "ETA", "Loss", "Restarts", "Age"),
        *("Preemptions", "Queued", "Step", "Perplexity", "Output"),
    ]
    assert [column["priority"] for column in table["columnDefinitions"]] == [0] * 9 + [1] * 5
    (row,) = table["rows"]
    age = row["cells"].pop(8)
    assert age.endswith("s")
    assert row["cells"] == [
        "support-bot",
        "Running",
        "Training",
        "QLoRA",
        None,
        None,
        None,
        2,
        3,
        None,
        None,
        None,
        "s3://models/support-bot",
    ]
    assert row["object"]["kind"] == "PartialObjectMetadata"
    assert row["object"]["metadata"]["name"] == "support-bot"


def test_one_object_is_a_table_too(client: Client, namespace: str) -> None:
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"
    client.create(path, manifest())
    table = client.get(f"{path}/support-bot", accept=TABLE, includeObject="Object").body
    assert [row["object"]["kind"] for row in table["rows"]] == ["FineTuneJob"]
    table = client.get(f"{path}/support-bot", accept=TABLE, includeObject="None").body
    assert [row.get("object") for row in table["rows"]] == [None]


def test_pods_and_jobs(client: Client, namespace: str) -> None:
    # Nothing fits this, so the pod stays as it is.
    resources = {"limits": {"example.com/none": "1"}}
    pods, jobs = f"/api/v1/namespaces/{namespace}/pods", f"/apis/batch/v1/namespaces/{namespace}/jobs"
    body = {"metadata": {"name": "p"}, "spec": pod_spec("true", container={"resources": resources})}
    assert client.create(pods, body).code == 201
    table = client.get(pods, accept=TABLE).body
    assert columns(table) == [
        *("Name", "Ready", "Status", "Restarts", "Age"),
        *("IP", "Node", "Nominated Node", "Readiness Gates"),
    ]
    cells = table["rows"][0]["cells"]
    assert [str(cell) for cell in cells[:4]] == ["p", "0/1", "Pending", "0"]
    assert cells[5:] == ["<none>"] * 4
    client.create(jobs, job("j", suspend=True))
    table = client.get(jobs, accept=TABLE).body
    assert columns(table) == ["Name", "Status", "Completions", "Duration", "Age", "Containers", "Images", "Selector"]
    cells = table["rows"][0]["cells"]
    assert cells[0] == "j"
    assert cells[1] in ("Running", "Suspended")
    assert cells[2] == "0/1"
    assert cells[5] == "main"


def test_config_maps_and_secrets(client: Client, namespace: str) -> None:
    for kind in ("configmaps", "secrets"):
        path = f"/api/v1/namespaces/{namespace}/{kind}"
        client.create(path, {"metadata": {"name": "a", "labels": {"table": "yes"}}, "data": {"k": "dg=="}})
        table = client.get(path, accept=TABLE, labelSelector="table").body
        assert columns(table) == (["Name", "Data", "Age"] if kind == "configmaps" else ["Name", "Type", "Data", "Age"])
        assert table["rows"][0]["cells"][:-1] == (["a", 1] if kind == "configmaps" else ["a", "Opaque", 1])
