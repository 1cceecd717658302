"""The clients that the operator is made of: real kopf, and the Python client.

The server has a loop of its own: when kopf stops, it cancels every task of its loop that is younger than itself.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

import kopf
import pytest
import yaml
from conftest import TestServer
from kubernetes.aio import client as kube
from kubernetes.aio import config, watch
from objects import job, manifest

GROUP, VERSION, PLURAL = "finetune.dev", "v1alpha1", "finetunejobs"


@pytest.fixture
async def api(embedded: TestServer) -> AsyncIterator[kube.ApiClient]:
    configuration = kube.Configuration()
    await config.load_kube_config(str(embedded.kubeconfig), client_configuration=configuration)
    async with kube.ApiClient(configuration) as client:
        yield client


async def eventually(check: Callable[[], Any], seconds: float = 20) -> Any:
    async with asyncio.timeout(seconds):
        while not (result := check()):
            await asyncio.sleep(0.01)
    return result


@contextlib.asynccontextmanager
async def operator(registry: kopf.OperatorRegistry, namespace: str) -> AsyncIterator[None]:
    """A real kopf operator beside the server."""

    stop = asyncio.Event()
    settings = kopf.OperatorSettings()
    settings.posting.enabled = True
    settings.persistence.finalizer = f"{GROUP}/test"
    settings.scanning.disabled = True
    # By default an idle worker lingers for five seconds, also when the operator stops.
    settings.queueing.idle_timeout = 0.1
    task = asyncio.create_task(
        kopf.operator(registry=registry, settings=settings, namespaces=[namespace], stop_flag=stop)
    )
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait_for(task, 20)


def login_with(server: TestServer, registry: kopf.OperatorRegistry) -> None:
    """An explicit registry has no login handler of its own."""
    content = yaml.safe_load(server.kubeconfig.read_text())
    info = kopf.ConnectionInfo(
        server=content["clusters"][0]["cluster"]["server"],
        ca_data=base64.b64decode(content["clusters"][0]["cluster"]["certificate-authority-data"]),
        token=content["users"][0]["user"]["token"],
    )

    @kopf.on.login(registry=registry)
    def login(**_: Any) -> kopf.ConnectionInfo:
        return info


async def test_kopf_sees_events_of_the_resource_and_of_labelled_jobs(
    embedded: TestServer, api: kube.ApiClient, namespace: str
) -> None:
    seen: list[tuple[str, str | None, str]] = []
    registry = kopf.OperatorRegistry()
    login_with(embedded, registry)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def tune(event: kopf.RawEvent, name: str | None, **_: Any) -> None:
        seen.append(("tune", event["type"], str(name)))

    @kopf.on.event("batch", "v1", "jobs", labels={f"{GROUP}/job-uid": kopf.PRESENT}, registry=registry)
    async def child(event: kopf.RawEvent, name: str | None, **_: Any) -> None:
        seen.append(("job", event["type"], str(name)))

    custom, batch = kube.CustomObjectsApi(api), kube.BatchV1Api(api)
    await custom.create_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, manifest("before"))
    async with operator(registry, namespace):
        await eventually(lambda: ("tune", None, "before") in seen)
        await custom.create_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, manifest("a"))
        body = job("child", suspend=True)
        body["metadata"]["labels"] = {f"{GROUP}/job-uid": "1"}
        await batch.create_namespaced_job(namespace, body)
        await batch.create_namespaced_job(namespace, job("stranger", suspend=True))
        await eventually(lambda: {("tune", "ADDED", "a"), ("job", "ADDED", "child")} <= set(seen))
        await custom.patch_namespaced_custom_object_status(
            GROUP, VERSION, namespace, PLURAL, "a", {"status": {"phase": "Running"}}
        )
        await eventually(lambda: ("tune", "MODIFIED", "a") in seen)
        await custom.delete_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, "a")
        await batch.delete_namespaced_job("child", namespace, propagation_policy="Background")
        await eventually(lambda: {("tune", "DELETED", "a"), ("job", "DELETED", "child")} <= set(seen))
    assert not any(name == "stranger" for _, _, name in seen)


async def test_kopf_handlers_with_a_finalizer_run_to_the_end(
    embedded: TestServer, api: kube.ApiClient, namespace: str
) -> None:
    called: list[str] = []
    registry = kopf.OperatorRegistry()
    login_with(embedded, registry)

    @kopf.on.create(GROUP, VERSION, PLURAL, registry=registry)
    async def created(body: kopf.Body, patch: kopf.Patch, **_: Any) -> None:
        patch.status["phase"] = "Preparing"
        kopf.event(body, type="Normal", reason="Seen", message="hello")
        called.append("created")

    @kopf.on.update(GROUP, VERSION, PLURAL, field="spec", registry=registry)
    async def updated(**_: Any) -> None:
        called.append("updated")

    @kopf.on.delete(GROUP, VERSION, PLURAL, registry=registry)
    async def deleted(**_: Any) -> None:
        called.append("deleted")

    custom, core = kube.CustomObjectsApi(api), kube.CoreV1Api(api)

    path = f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}/a"

    def stored() -> dict[str, Any] | None:
        answer = embedded.client.get(path)
        return answer.body if answer.code == 200 else None

    async with operator(registry, namespace):
        await custom.create_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, manifest("a"))
        await eventually(lambda: called == ["created"])
        found = await eventually(lambda: (obj := stored()) and obj.get("status") and obj)
        assert found["status"]["phase"] == "Preparing"
        assert found["metadata"]["finalizers"] == [f"{GROUP}/test"]
        await custom.patch_namespaced_custom_object(
            GROUP, VERSION, namespace, PLURAL, "a", {"spec": {"failurePolicy": {"maxRestarts": 0}}}
        )
        await eventually(lambda: called == ["created", "updated"])
        await custom.delete_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, "a")
        await eventually(lambda: stored() is None)
        assert called == ["created", "updated", "deleted"]
        events = await core.list_namespaced_event(namespace, field_selector="reason=Seen")
        assert [event.message for event in events.items] == ["hello"]


async def test_the_python_client_reads_writes_and_watches(api: kube.ApiClient, namespace: str) -> None:
    core, batch, custom = kube.CoreV1Api(api), kube.BatchV1Api(api), kube.CustomObjectsApi(api)
    name = f"m-{secrets.token_hex(3)}"
    body = kube.V1ConfigMap(metadata=kube.V1ObjectMeta(name=name), data={"k": "v"}, immutable=True)
    created = await core.create_namespaced_config_map(namespace, body)
    assert created.metadata.uid
    with pytest.raises(kube.ApiException) as refused:
        await core.create_namespaced_config_map(namespace, body)
    assert refused.value.status == 409
    listed = await core.list_namespaced_config_map(namespace, field_selector=f"metadata.name={name}")
    assert [item.data for item in listed.items] == [{"k": "v"}]
    typed = await batch.create_namespaced_job(namespace, job("typed", suspend=True))
    assert typed.spec.backoff_limit == 0
    patched = await batch.patch_namespaced_job("typed", namespace, {"metadata": {"labels": {"a": "b"}}})
    assert patched.metadata.labels["a"] == "b"
    stream = watch.Watch().stream(
        batch.list_namespaced_job, namespace, resource_version=listed.metadata.resource_version, timeout_seconds=5
    )
    async for event in stream:
        assert (event["type"], event["object"].metadata.name) == ("ADDED", "typed")
        break
    await custom.create_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, manifest("a"))
    with pytest.raises(kube.ApiException) as refused:
        await custom.create_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, manifest("b", model={}))
    assert refused.value.status == 422
    await core.delete_namespaced_config_map(
        name, namespace, body=kube.V1DeleteOptions(preconditions=kube.V1Preconditions(uid=created.metadata.uid))
    )
    with pytest.raises(kube.ApiException) as refused:
        await core.read_namespaced_config_map(name, namespace)
    assert refused.value.status == 404


async def test_leader_election_works_on_leases(api: kube.ApiClient, namespace: str) -> None:
    leases = kube.CoordinationV1Api(api)
    spec = {"holderIdentity": "a", "leaseDurationSeconds": 15, "renewTime": "2026-01-01T00:00:00.123456Z"}
    created = await leases.create_namespaced_lease(namespace, {"metadata": {"name": "leader"}, "spec": spec})
    body = api.sanitize_for_serialization(created)
    body["spec"]["holderIdentity"] = "b"
    taken = await leases.replace_namespaced_lease("leader", namespace, body)
    assert taken.spec.holder_identity == "b"
    body["spec"]["holderIdentity"] = "c"
    with pytest.raises(kube.ApiException) as refused:
        await leases.replace_namespaced_lease("leader", namespace, body)
    assert refused.value.status == 409
