"""What survives: the journal, also when the process is killed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from api_client import Client, eventually
from conftest import TestServer
from objects import manifest

from finetune_operator.local.apiserver import store as store_module
from finetune_operator.local.apiserver.store import Expired, Store
from finetune_operator.local.cluster import ClusterRunningError, LocalCluster


def config_map(name: str, **data: str) -> dict[str, object]:
    return {"metadata": {"namespace": "default", "name": name}, "data": data}


def names(store: Store) -> list[str]:
    return [obj["metadata"]["name"] for obj in store.objects("configmaps")]


def test_a_store_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    store = Store(path)
    kept = store.put("configmaps", config_map("kept"))
    store.put("configmaps", {**kept, "data": {"k": "v"}})
    store.remove("configmaps", store.put("configmaps", config_map("removed")))
    version = store.version
    store.close()
    again = Store(path)
    assert names(again) == ["kept"]
    assert again.get("configmaps", "default", "kept") == store.get("configmaps", "default", "kept")
    # Also the version of a deletion is not given away a second time.
    assert again.version == version
    with pytest.raises(Expired):
        again.events_since("configmaps", version - 1)
    assert again.events_since("configmaps", version) == []
    again.close()


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    store = Store(path)
    store.put("configmaps", config_map("whole"))
    store.put("configmaps", config_map("cut"))
    store.close()
    path.write_bytes(path.read_bytes()[:-5])
    again = Store(path)
    assert names(again) == ["whole"]
    again.put("configmaps", config_map("new"))
    again.close()
    assert names(Store(path)) == ["new", "whole"]


def test_the_journal_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "COMPACT_AFTER", 100)
    path = tmp_path / "journal"
    store = Store(path)
    for number in range(1000):
        store.put("configmaps", config_map("a", k=str(number)))
    store.close()
    assert len(path.read_text().splitlines()) < 110
    again = Store(path)
    assert again.version == 1000
    assert again.objects("configmaps")[0]["data"] == {"k": "999"}


def test_history_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "HISTORY", 10)
    store = Store()
    for number in range(100):
        store.put("configmaps", config_map("a", k=str(number)))
    assert [event.version for event in store.events_since("configmaps", 90)] == list(range(91, 101))
    with pytest.raises(Expired):
        store.events_since("configmaps", 89)
    # The history of another kind is another one.
    assert store.events_since("secrets", 1) == []


@contextmanager
def process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Client]]:
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.unlink(missing_ok=True)
    command = [sys.executable, "-m", "finetune_operator.local.cluster", "--no-runner", "--kubeconfig", str(kubeconfig)]
    running = subprocess.Popen([*command, "--state", str(tmp_path / "state")], stderr=subprocess.PIPE)
    try:
        eventually(kubeconfig.exists)
        yield running, Client(kubeconfig)
    finally:
        running.kill()
        running.communicate()


def test_a_killed_cluster_forgets_nothing(tmp_path: Path) -> None:
    path = "/apis/finetune.dev/v1alpha1/namespaces/default/finetunejobs"
    with process(tmp_path) as (running, client):
        created = client.create(path, manifest()).body
        changed = client.patch(f"{path}/support-bot/status", {"status": {"phase": "Running"}}).body
        os.kill(running.pid, signal.SIGKILL)
        running.wait(10)
    with process(tmp_path) as (running, client):
        assert client.get(f"{path}/support-bot").body == changed
        version = int(
            client.patch(f"{path}/support-bot", {"metadata": {"labels": {"a": "b"}}}).body["metadata"][
                "resourceVersion"
            ]
        )
        assert version > int(changed["metadata"]["resourceVersion"]) > int(created["metadata"]["resourceVersion"])
        with client.watch(path, resourceVersion=created["metadata"]["resourceVersion"]) as watched:
            assert watched.until(lambda events: len(events) == 1)[0]["object"]["code"] == 410
        running.terminate()
        assert running.wait(20) == 0


async def test_a_state_folder_is_one_cluster_s(tmp_path: Path) -> None:
    async with LocalCluster(tmp_path, runner=False):
        with pytest.raises(ClusterRunningError, match="another local cluster runs in"):
            await LocalCluster(tmp_path, runner=False).__aenter__()
    async with LocalCluster(tmp_path, runner=False):
        journal = tmp_path / "journal.jsonl"
        assert stat.S_IMODE(journal.stat().st_mode) == 0o600


def test_an_object_that_is_older_than_a_field_can_still_be_written(embedded: TestServer, namespace: str) -> None:
    """A job of an earlier version, whose spec lacks what rules compare now."""
    assert embedded.cluster
    api = embedded.cluster.api
    tunes = api.resource("finetune.dev", "v1alpha1", "finetunejobs")
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"
    assert embedded.client.create(path, manifest("old")).code == 201
    stored = api.get(tunes, namespace, "old")
    spec = {key: value for key, value in stored["spec"].items() if key not in ("podTemplate", "scheduling")}
    api.store.put(tunes.key, {**stored, "spec": spec})
    assert embedded.client.patch(f"{path}/old/status", {"status": {"phase": "Running"}}).code == 200
    answer = embedded.client.patch(f"{path}/old", {"metadata": {"labels": {"a": "b"}}})
    assert (answer.code, answer.body["metadata"]["generation"]) == (200, 1)
    assert embedded.client.patch(f"{path}/old", {"spec": {"podTemplate": {"labels": {"a": "b"}}}}).code == 422
