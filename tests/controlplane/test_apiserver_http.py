"""The embedded server's own door: who gets in, what a client that hangs costs, how far back a watch may reach."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import stat
from pathlib import Path

import pytest
from api_client import Client, eventually
from conftest import TestServer
from objects import manifest

from finetune_operator.local.apiserver import server as server_module
from finetune_operator.local.apiserver import store as store_module
from finetune_operator.local.apiserver import watch as watch_module
from finetune_operator.local.cluster import LocalCluster


def test_no_token_no_answer(embedded: TestServer) -> None:
    client = embedded.client
    for headers in (
        {"Authorization": ""},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {client.token}"},
    ):
        answer = client.get("/api/v1/pods", headers=headers)
        assert (answer.code, answer.body["reason"]) == (401, "Unauthorized")
    assert client.get("/api/v1/pods").code == 200


@pytest.mark.parametrize("host", ["evil.example.com", "evil.example.com:{port}", "127.0.0.1:1", "10.0.0.1:{port}"])
def test_another_host_name_is_refused(embedded: TestServer, host: str) -> None:
    """A web page whose name was rebound to 127.0.0.1 sends its own name, even with a token."""
    answer = embedded.client.get("/api/v1/pods", headers={"Host": host.format(port=embedded.client.port)})
    assert answer.code == 421
    assert embedded.client.get("/version", headers={"Host": f"localhost:{embedded.client.port}"}).code == 200


def test_plain_http_is_not_spoken(embedded: TestServer) -> None:
    with socket.create_connection((embedded.client.host, embedded.client.port), timeout=5) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        assert not connection.recv(100).startswith(b"HTTP/1.1 200")


def test_a_stranger_s_certificate_is_not_taken(embedded: TestServer) -> None:
    context = ssl.create_default_context()
    with (
        socket.create_connection((embedded.client.host, embedded.client.port), timeout=5) as connection,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        context.wrap_socket(connection, server_hostname="127.0.0.1")


def test_the_kubeconfig_is_for_its_owner_only(embedded: TestServer) -> None:
    assert stat.S_IMODE(embedded.kubeconfig.stat().st_mode) == 0o600
    assert stat.S_IMODE(embedded.kubeconfig.parent.stat().st_mode) == 0o700


def test_server_side_apply_is_refused_with_a_sentence(embedded: TestServer, namespace: str) -> None:
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs/a"
    answer = embedded.client.patch(path, manifest("a"), "application/apply-patch+yaml", fieldManager="x")
    assert answer.code == 415
    assert answer.message == (
        "the embedded API server has no server-side apply: use kubectl apply without --server-side"
    )


def test_logs_need_a_runner(embedded: TestServer, namespace: str) -> None:
    pods = f"/api/v1/namespaces/{namespace}/pods"
    embedded.client.create(pods, {"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a", "image": "b"}]}})
    assert embedded.client.get(f"{pods}/p/log").code == 503


def test_a_hung_watch_blocks_nobody(embedded: TestServer, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that takes nothing gets no queue of its own, and is cut off after a while."""
    monkeypatch.setattr(server_module, "WRITE_SECONDS", 0.5)
    client = embedded.client
    maps = f"/api/v1/namespaces/{namespace}/configmaps"
    raw = socket.create_connection((client.host, client.port), timeout=30)
    context = ssl._create_unverified_context()
    with context.wrap_socket(raw) as hung:
        request = (
            f"GET {maps}?watch=true HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\nAuthorization: Bearer {client.token}"
        )
        hung.sendall(f"{request}\r\n\r\n".encode())
        client.create(maps, {"metadata": {"name": "big"}, "data": {"k": ""}})
        with client.watch(maps) as watched:
            # More than the buffers of two sockets hold.
            for number in range(80):
                answer = client.patch(f"{maps}/big", {"data": {"k": f"{number:03}" * 100_000}})
                assert answer.code == 200
            watched.until(lambda events: events and events[-1]["object"]["data"]["k"].startswith("079"))
        # The server gives up on it: what was on its way ends before the last event.
        assert b'"k":"079' not in rest(hung)


def rest(connection: ssl.SSLSocket) -> bytes:
    """What still comes until the other side has closed."""
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except (ConnectionResetError, ssl.SSLError):
        pass
    return received


def test_too_old_a_version_is_gone(embedded: TestServer, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "HISTORY", 5)
    maps = f"/api/v1/namespaces/{namespace}/configmaps"
    first = embedded.client.create(maps, {"metadata": {"name": "a"}}).body["metadata"]["resourceVersion"]
    for number in range(10):
        embedded.client.patch(f"{maps}/a", {"data": {"k": str(number)}})
    with embedded.client.watch(maps, resourceVersion=first) as watched:
        (event,) = watched.until(lambda events: len(events) == 1)
    assert event["type"] == "ERROR"
    assert (event["object"]["code"], event["object"]["reason"]) == (410, "Expired")
    version = embedded.client.get(maps).body["metadata"]["resourceVersion"]
    with embedded.client.watch(maps, resourceVersion=version) as watched:
        embedded.client.delete(f"{maps}/a")
        assert watched.until(lambda events: len(events) == 1)[0]["type"] == "DELETED"


def test_quiet_watches_get_bookmarks(embedded: TestServer, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "BOOKMARK_SECONDS", 0.05)
    maps = f"/api/v1/namespaces/{namespace}/configmaps"
    version = embedded.client.create(maps, {"metadata": {"name": "a"}}).body["metadata"]["resourceVersion"]
    with embedded.client.watch(maps, resourceVersion=version, allowWatchBookmarks="true") as watched:
        events = watched.until(lambda events: len(events) >= 2)
    assert {event["type"] for event in events} == {"BOOKMARK"}
    assert int(events[-1]["object"]["metadata"]["resourceVersion"]) >= int(version)
    assert events[0]["object"]["kind"] == "ConfigMap"


def test_a_large_body_is_refused(embedded: TestServer, namespace: str) -> None:
    maps = f"/api/v1/namespaces/{namespace}/configmaps"
    answer = embedded.client.create(maps, {"metadata": {"name": "a"}, "data": {"k": "x" * 4_000_000}})
    assert answer.code == 413


@pytest.mark.parametrize(
    "query", [{"resourceVersion": "x"}, {"limit": "-1"}, {"watch": "true", "timeoutSeconds": "soon"}]
)
def test_nonsense_in_a_query_is_a_bad_request(embedded: TestServer, query: dict[str, str]) -> None:
    assert embedded.client.get("/api/v1/pods", **query).code == 400


@pytest.mark.parametrize("body", [[], "x", {"gracePeriodSeconds": "soon"}])
def test_nonsense_in_delete_options_is_a_bad_request(embedded: TestServer, namespace: str, body: object) -> None:
    maps = f"/api/v1/namespaces/{namespace}/configmaps"
    embedded.client.create(maps, {"metadata": {"name": "a"}})
    assert embedded.client.delete(f"{maps}/a", body).code == 400


def test_many_watches_see_the_same(embedded: TestServer, namespace: str) -> None:
    client = embedded.client
    maps = f"/api/v1/namespaces/{namespace}/configmaps"
    with contextlib.ExitStack() as stack:
        watches = [stack.enter_context(client.watch(maps)) for _ in range(30)]
        for name in ("a", "b"):
            client.create(maps, {"metadata": {"name": name}})
        for watched in watches:
            events = watched.until(lambda events: len(events) == 2)
            assert [event["object"]["metadata"]["name"] for event in events] == ["a", "b"]


async def test_the_state_is_gone_with_a_temporary_cluster() -> None:
    async with LocalCluster(runner=False) as cluster:
        kubeconfig = cluster.kubeconfig
        assert kubeconfig.exists()
    assert not kubeconfig.parent.exists()


async def test_a_cluster_starts_on_the_port_it_is_told(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with LocalCluster(tmp_path / "state", runner=False, port=port, kubeconfig=tmp_path / "config") as cluster:
        assert cluster.url == f"https://127.0.0.1:{port}"
        client = Client(tmp_path / "config")
        answer = await asyncio.to_thread(client.get, "/version")
        assert answer.body["major"] == "1"
    assert not (tmp_path / "state" / "kubeconfig").exists()


def test_a_deleted_namespace_takes_everything_along(embedded: TestServer, namespace: str) -> None:
    client = embedded.client
    root = f"/api/v1/namespaces/{namespace}"
    client.create(f"{root}/configmaps", {"metadata": {"name": "a", "finalizers": ["example.com/hold"]}})
    answer = client.delete(root)
    assert answer.body["status"]["phase"] == "Terminating"
    eventually(lambda: "deletionTimestamp" in client.get(f"{root}/configmaps/a").body["metadata"])
    refused = client.create(f"{root}/configmaps", {"metadata": {"name": "b"}})
    assert (refused.code, refused.body["reason"]) == (403, "Forbidden")
    client.patch(f"{root}/configmaps/a", {"metadata": {"finalizers": None}})
    eventually(lambda: client.get(root).code == 404)


def test_dependents_go_with_their_owner(embedded: TestServer, namespace: str) -> None:
    client = embedded.client
    maps = f"/api/v1/namespaces/{namespace}/configmaps"

    def owned(name: str, *owners: dict[str, str]) -> None:
        references = [
            {"apiVersion": "v1", "kind": "ConfigMap", "name": owner["name"], "uid": owner["uid"]} for owner in owners
        ]
        assert client.create(maps, {"metadata": {"name": name, "ownerReferences": references}}).code == 201

    first, second = (client.create(maps, {"metadata": {"name": name}}).body["metadata"] for name in ("x", "y"))
    owned("of-x", first)
    owned("of-both", first, second)
    grandchild = client.get(f"{maps}/of-x").body["metadata"]
    owned("of-of-x", grandchild)
    client.delete(f"{maps}/x")
    eventually(lambda: client.get(f"{maps}/of-of-x").code == 404)
    assert client.get(f"{maps}/of-x").code == 404
    assert client.get(f"{maps}/of-both").code == 200
    client.delete(f"{maps}/y", propagationPolicy="Orphan")
    eventually(lambda: client.get(f"{maps}/y").code == 404)
    assert "ownerReferences" not in client.get(f"{maps}/of-both").body["metadata"]
    # An owner that never was: its uid is another's.
    owned("of-nobody", {"name": "of-both", "uid": "00000000-0000-0000-0000-000000000000"})
    eventually(lambda: client.get(f"{maps}/of-nobody").code == 404)
