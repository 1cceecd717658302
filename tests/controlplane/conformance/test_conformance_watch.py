"""What watches send, and when they end."""

from __future__ import annotations

from typing import Any

import pytest
from api_client import TABLE, Client
from conftest import TestServer
from objects import manifest


@pytest.fixture
def client(server: TestServer) -> Client:
    return server.client


@pytest.fixture
def tunes(namespace: str) -> str:
    return f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"


def labelled(name: str, **labels: str) -> dict[str, Any]:
    body = manifest(name)
    body["metadata"]["labels"] = labels
    return body


def seen(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(event["type"], event["object"]["metadata"].get("name", "")) for event in events]


def test_without_a_version_the_present_comes_first(client: Client, tunes: str) -> None:
    client.create(tunes, manifest("a"))
    with client.watch(tunes) as watched:
        watched.until(lambda events: len(events) == 1)
        client.create(tunes, manifest("b"))
        client.delete(f"{tunes}/a")
        events = watched.until(lambda events: len(events) == 3)
    assert seen(events) == [("ADDED", "a"), ("ADDED", "b"), ("DELETED", "a")]


def test_from_a_version_only_what_is_newer(client: Client, tunes: str) -> None:
    client.create(tunes, manifest("a"))
    version = client.get(tunes).body["metadata"]["resourceVersion"]
    client.patch(f"{tunes}/a", {"metadata": {"labels": {"x": "y"}}})
    with client.watch(tunes, resourceVersion=version) as watched:
        events = watched.until(lambda events: len(events) == 1)
        assert seen(events) == [("MODIFIED", "a")]
        client.delete(f"{tunes}/a")
        events = watched.until(lambda events: len(events) == 2)
    assert events[1]["type"] == "DELETED"
    assert int(events[1]["object"]["metadata"]["resourceVersion"]) > int(
        events[0]["object"]["metadata"]["resourceVersion"]
    )


def test_leaving_a_selection_is_a_deletion(client: Client, tunes: str) -> None:
    client.create(tunes, labelled("a", app="x"))
    with client.watch(tunes, labelSelector="app=x") as watched:
        watched.until(lambda events: len(events) == 1)
        client.patch(f"{tunes}/a", {"metadata": {"labels": {"app": "y"}}})
        client.patch(f"{tunes}/a", {"metadata": {"labels": {"unseen": "1"}}})
        client.patch(f"{tunes}/a", {"metadata": {"labels": {"app": "x"}}})
        events = watched.until(lambda events: len(events) == 3)
    assert seen(events) == [("ADDED", "a"), ("DELETED", "a"), ("ADDED", "a")]
    # The deletion shows the object as it was selected last.
    assert events[1]["object"]["metadata"]["labels"] == {"app": "x"}


def test_fields_select_events(client: Client, tunes: str) -> None:
    with client.watch(tunes, fieldSelector="status.phase=Running", resourceVersion="0") as watched:
        client.create(tunes, manifest("a"))
        client.create(tunes, manifest("b"))
        for name in ("b", "a"):
            client.patch(f"{tunes}/{name}/status", {"status": {"phase": "Running"}})
        client.patch(f"{tunes}/b/status", {"status": {"phase": "Succeeded"}})
        events = watched.until(lambda events: len(events) == 3)
    assert seen(events) == [("ADDED", "b"), ("ADDED", "a"), ("DELETED", "b")]


def test_initial_events_end_with_a_marked_bookmark(client: Client, tunes: str) -> None:
    client.create(tunes, manifest("a"))
    options = {
        "sendInitialEvents": "true",
        "resourceVersionMatch": "NotOlderThan",
        "allowWatchBookmarks": "true",
    }
    with client.watch(tunes, **options) as watched:
        events = watched.until(lambda events: len(events) == 2)
    assert seen(events) == [("ADDED", "a"), ("BOOKMARK", "")]
    bookmark = events[1]["object"]
    assert bookmark["kind"] == "FineTuneJob"
    assert bookmark["metadata"]["annotations"]["k8s.io/initial-events-end"] == "true"
    assert int(bookmark["metadata"]["resourceVersion"]) >= int(events[0]["object"]["metadata"]["resourceVersion"])


def test_initial_events_need_a_match(client: Client, tunes: str) -> None:
    answer = client.get(tunes, watch="true", sendInitialEvents="true", timeoutSeconds=1)
    assert answer.code == 422
    assert answer.causes == {
        (
            "FieldValueForbidden",
            "resourceVersionMatch",
            "Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
        )
    }


def test_a_watch_ends_after_its_timeout(client: Client, tunes: str) -> None:
    answer = client.get(tunes, watch="true", timeoutSeconds=1)
    assert answer.code == 200
    assert answer.body == ""


def test_tables_are_watched_row_by_row(client: Client, tunes: str) -> None:
    client.create(tunes, manifest("a"))
    with client.watch(tunes, accept=TABLE) as watched:
        watched.until(lambda events: len(events) == 1)
        client.patch(f"{tunes}/a/status", {"status": {"phase": "Running", "reason": "Training"}})
        events = watched.until(lambda events: len(events) == 2)
    first, second = (event["object"] for event in events)
    assert first["kind"] == second["kind"] == "Table"
    assert [column["name"] for column in first["columnDefinitions"]][:3] == ["Name", "Phase", "Reason"]
    assert not second.get("columnDefinitions")
    assert [row["cells"][:4] for row in first["rows"]] == [["a", None, None, "QLoRA"]]
    assert [row["cells"][:4] for row in second["rows"]] == [["a", "Running", "Training", "QLoRA"]]
