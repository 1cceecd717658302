"""hf:// folders against a small hub: pinned to a commit, read in ranges, refused in clear words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trainer_hub import TOKEN, FakeHub, Repository, blob_id

from finetune_api.failures import FailureClass

CONSOLE = Path(__file__).parent / "hub_console.py"


class Console:
    """Hub folders in a process that is not offline."""

    def __init__(self, endpoint: str, home: Path, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(CONSOLE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment},
        )

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)

    def _ask(self, *call: object) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def __call__(self, uri: str, name: str, *arguments: object) -> Any:
        answer = self._ask(uri, name, *arguments)
        assert "value" in answer, answer
        return answer["value"]

    def fails(self, uri: str, name: str, *arguments: object) -> tuple[FailureClass, str]:
        answer = self._ask(uri, name, *arguments)
        assert "class" in answer, answer
        return FailureClass(answer["class"]), answer["message"]


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def console(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    with Console(hub.endpoint, tmp_path_factory.mktemp("hub")) as console:
        yield console


@pytest.fixture
def repository(hub: FakeHub) -> Repository:
    hub.repositories = {"models/org/model": Repository()}
    return hub.repositories["models/org/model"]


FILES = {"config.json": b'{"model_type": "llama"}', "a/weights.bin": bytes(range(65, 91)) * 10}


def test_list_stat_read(console: Console, repository: Repository) -> None:
    sha = repository.commit(FILES)
    uri = "hf://org/model#list"
    assert console(uri, "revision") == sha
    assert console(uri, "uri") == "hf://org/model"
    expected = [[key, len(data), blob_id(data)] for key, data in sorted(FILES.items())]
    assert console(uri, "list") == expected
    assert console(uri, "list", "a/") == expected[:1]
    assert console(uri, "stat", "config.json") == expected[1]
    assert console(uri, "stat", "config") is None
    assert console(uri, "read", "config.json") == FILES["config.json"].decode()


@pytest.mark.parametrize(("start", "length"), [(0, 5), (3, 10), (250, None), (0, 260)])
def test_ranges(console: Console, repository: Repository, hub: FakeHub, start: int, length: int | None) -> None:
    repository.commit(FILES)
    expected = FILES["a/weights.bin"][start : None if length is None else start + length]
    hub.requests.clear()
    assert console(f"hf://org/model#{start}-{length}", "read", "a/weights.bin", start, length) == expected.decode()
    if length is not None:
        assert f"bytes={start}-{start + length - 1}" in [headers.get("range") for _, _, headers in hub.requests]


def test_a_folder_stays_at_the_commit_that_was_found_first(
    console: Console, repository: Repository, tmp_path: Path
) -> None:
    first = repository.commit(FILES)
    uri = "hf://org/model#pinned"
    assert console(uri, "revision") == first
    second = repository.commit({"config.json": b"{}", "new.txt": b"new"})
    assert console(uri, "revision") == first
    assert [key for key, *_ in console(uri, "list")] == sorted(FILES)
    assert console(uri, "read", "config.json") == FILES["config.json"].decode()
    console(uri, "download", "a/weights.bin", str(tmp_path / "a" / "weights.bin"))
    assert (tmp_path / "a" / "weights.bin").read_bytes() == FILES["a/weights.bin"]
    assert console("hf://org/model#later", "revision") == second


@pytest.mark.parametrize("revision", ["v1", "feature/x"])
def test_a_named_revision(console: Console, repository: Repository, revision: str) -> None:
    old = repository.commit(FILES, branch=revision)
    repository.commit({"config.json": b"{}"})
    uri = f"hf://org/model@{revision}"
    assert console(uri, "revision") == old
    assert console(uri, "read", "config.json") == FILES["config.json"].decode()


def test_files_of_a_data_set(console: Console, hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories = {"datasets/org/rows": Repository()}
    hub.repositories["datasets/org/rows"].commit({"data/train.jsonl": b"{}\n", "data/other.jsonl": b""})
    uri = "hf://datasets/org/rows/data"
    assert [key for key, *_ in console(uri, "list")] == ["other.jsonl", "train.jsonl"]
    assert console(uri, "read", "train.jsonl") == "{}\n"
    console(uri, "download", "train.jsonl", str(tmp_path / "x.jsonl"))
    assert (tmp_path / "x.jsonl").read_bytes() == b"{}\n"


def test_a_gated_model(console: Console, repository: Repository) -> None:
    repository.commit(FILES)
    repository.gated = True
    failure_class, message = console.fails("hf://org/model#gated", "list")
    assert failure_class is FailureClass.ACCESS_DENIED
    assert "is gated: accept its licence" in message
    assert "HF_TOKEN" in message
    assert "storage.secretRef" in message


def test_a_gated_model_and_a_token_without_access(hub: FakeHub, repository: Repository, tmp_path: Path) -> None:
    repository.commit(FILES)
    repository.gated = True
    hub.requests.clear()
    with Console(hub.endpoint, tmp_path, HF_TOKEN=TOKEN) as console:
        failure_class, message = console.fails("hf://org/model", "list")
    assert failure_class is FailureClass.ACCESS_DENIED
    assert hub.requests[0][2]["authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in message


@pytest.mark.parametrize("uri", ["hf://org/nothing", "hf://org/model@no-such-revision", "hf://datasets/org/model/x"])
def test_what_does_not_exist(console: Console, repository: Repository, uri: str) -> None:
    repository.commit(FILES)
    failure_class, message = console.fails(uri, "list")
    assert failure_class is FailureClass.NOT_FOUND
    assert message.startswith(f"{uri} does not exist on the hub, or is private.")
    assert "HF_TOKEN" in message


def test_a_missing_file(console: Console, repository: Repository, tmp_path: Path) -> None:
    repository.commit(FILES)
    for name, arguments in (("read", ["nothing"]), ("download", ["nothing", str(tmp_path / "x")])):
        failure_class, message = console.fails("hf://org/model#missing", name, *arguments)
        assert failure_class is FailureClass.NOT_FOUND
        assert message.startswith("hf://org/model/nothing does not exist on the hub")


def test_a_hub_that_is_down(tmp_path: Path, hub: FakeHub) -> None:
    with FakeHub() as gone:
        endpoint = gone.endpoint
    with Console(endpoint, tmp_path) as console:
        failure_class, message = console.fails("hf://org/model", "list")
    assert failure_class is FailureClass.STORAGE_UNAVAILABLE
    assert "the hub cannot be reached" in message
    assert "Copy the files to S3" in message


def test_a_hub_that_fails(console: Console, repository: Repository, hub: FakeHub) -> None:
    repository.commit(FILES)
    hub.broken = 100
    try:
        failure_class, message = console.fails("hf://org/model#fails", "list")
    finally:
        hub.broken = 0
    assert failure_class is FailureClass.STORAGE_UNAVAILABLE
    assert "the hub answered 500" in message


def test_an_offline_process_says_so(hub: FakeHub, tmp_path: Path) -> None:
    with Console(hub.endpoint, tmp_path, HF_HUB_OFFLINE="1") as console:
        failure_class, message = console.fails("hf://org/model", "list")
    assert failure_class is FailureClass.STORAGE_UNAVAILABLE
    assert "cannot be reached" in message


def test_the_hub_is_read_only(console: Console, tmp_path: Path) -> None:
    for name, arguments in (("write", ["x", ""]), ("upload", [str(tmp_path), "x"]), ("delete", [["x"]])):
        failure_class, message = console.fails("hf://org/model", name, *arguments)
        assert failure_class is FailureClass.USER_ERROR
        assert "is read-only: publish to an s3:// URI" in message
