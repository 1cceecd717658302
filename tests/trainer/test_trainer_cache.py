"""The model cache: what is downloaded once, who may have it, and that it is never in the way."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_trainer_hub import Console
from trainer_hub import FakeHub, Repository
from trainer_lab import Bucket, TestJob
from trainer_servers import Fault, MotoServer, Proxy

from finetune_api.document import StorageSettings
from finetune_api.failures import FailureClass, JobError
from finetune_api.names import ENV_MODEL_CACHE
from finetune_trainer import model_cache
from finetune_trainer.model_cache import ModelCache
from finetune_trainer.storage import Folder, ObjectInfo, open_folder, s3

KEY = "model.safetensors"
CONTENT = b"weights" * 1000


@pytest.fixture
def cache(tmp_path: Path) -> ModelCache:
    return ModelCache(tmp_path / "cache", "http://s3")


@pytest.fixture
def source(bucket: Bucket) -> Folder:
    bucket.put(f"base/{KEY}", CONTENT)
    return open_folder(bucket.uri("base"), bucket.settings)


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "objects").glob("*"))


def downloads(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys that are downloaded from now on."""
    seen: list[str] = []
    real = folder.download

    def download(info: ObjectInfo, path: Path) -> None:
        seen.append(info.key)
        real(info, path)

    monkeypatch.setattr(folder, "download", download)
    return seen


def test_a_file_is_downloaded_once(
    cache: ModelCache, source: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = downloads(source, monkeypatch)
    for pod in ("first", "second"):
        cache.fetch(source, source.list(), tmp_path / pod)
        assert (tmp_path / pod / KEY).read_bytes() == CONTENT
    assert seen == [KEY]
    (entry,) = entries(tmp_path)
    assert (tmp_path / "second" / KEY).resolve() == entry / "data"
    assert list((tmp_path / "cache" / "incoming").iterdir()) == []
    # What a pod removes is its link.
    (tmp_path / "first" / KEY).unlink()
    assert (entry / "data").read_bytes() == CONTENT


def test_another_version_is_another_entry(cache: ModelCache, source: Folder, bucket: Bucket, tmp_path: Path) -> None:
    cache.fetch(source, source.list(), tmp_path / "a")
    bucket.put(f"base/{KEY}", b"new" * 1000)
    cache.fetch(source, source.list(), tmp_path / "b")
    assert (tmp_path / "a" / KEY).read_bytes() == CONTENT
    assert (tmp_path / "b" / KEY).read_bytes() == b"new" * 1000
    assert len(entries(tmp_path)) == 2


def test_the_same_name_on_another_server_is_another_entry(source: Folder, tmp_path: Path) -> None:
    for endpoint in ("http://one", "http://two", None):
        ModelCache(tmp_path / "cache", endpoint).fetch(source, source.list(), tmp_path / str(endpoint))
    assert len(entries(tmp_path)) == 3


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_who_may_not_read_the_source_gets_nothing_from_the_cache(
    method: str, cache: ModelCache, source: Folder, bucket: Bucket, moto: MotoServer, tmp_path: Path
) -> None:
    cache.fetch(source, source.list(), tmp_path / "mine")
    (info,) = source.list()
    denied = Fault(lambda request: request.method == method, answer=(403, b""))
    with Proxy(moto.endpoint, [denied]) as proxy:
        theirs = open_folder(bucket.uri("base"), StorageSettings(endpoint=proxy.endpoint, path_style=True))
        with pytest.raises(JobError) as caught:
            cache.fetch(theirs, [info], tmp_path / "theirs")
    assert caught.value.failure_class is FailureClass.ACCESS_DENIED
    assert not (tmp_path / "theirs" / KEY).exists()


def test_a_file_that_changed_since_it_was_listed_is_refused(
    cache: ModelCache, source: Folder, bucket: Bucket, tmp_path: Path
) -> None:
    listed = source.list()
    cache.fetch(source, listed, tmp_path / "a")
    bucket.put(f"base/{KEY}", b"new")
    with pytest.raises(JobError) as caught:
        cache.fetch(source, listed, tmp_path / "b")
    assert caught.value.failure_class is FailureClass.MODEL_CHANGED


def _cut(entry: Path) -> None:
    (entry / "data").chmod(0o644)
    (entry / "data").write_bytes(CONTENT[:-1] + b"x")


def _lose(entry: Path) -> None:
    (entry / "data").unlink()


def _forget(entry: Path) -> None:
    (entry / "sha256").unlink()


@pytest.mark.parametrize("damage", [_cut, _lose, _forget])
def test_a_broken_entry_is_replaced(
    damage: Callable[[Path], None],
    cache: ModelCache,
    source: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache.fetch(source, source.list(), tmp_path / "a")
    damage(entries(tmp_path)[0])
    seen = downloads(source, monkeypatch)
    for pod in ("b", "c"):
        cache.fetch(source, source.list(), tmp_path / pod)
        assert (tmp_path / pod / KEY).read_bytes() == CONTENT
    assert seen == [KEY]


def test_a_full_cache_is_not_in_the_way(
    cache: ModelCache, source: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = source.download

    def download(info: ObjectInfo, path: Path) -> None:
        if path.is_relative_to(tmp_path / "cache"):
            path.parent.mkdir(parents=True)
            path.write_bytes(CONTENT[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(info, path)

    monkeypatch.setattr(source, "download", download)
    cache.fetch(source, source.list(), tmp_path / "a")
    assert (tmp_path / "a" / KEY).read_bytes() == CONTENT
    assert not (tmp_path / "a" / KEY).is_symlink()
    assert "No space left on device" in caplog.text
    # What did not fit takes no room.
    assert list((tmp_path / "cache" / "incoming").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_not_in_the_way(source: Folder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ModelCache(tmp_path / "file").fetch(source, source.list(), tmp_path / "a")
    assert (tmp_path / "a" / KEY).read_bytes() == CONTENT


def test_jobs_that_fill_it_at_once_do_not_disturb_each_other(
    cache: ModelCache, source: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(3, timeout=60)
    real = source.download

    def download(info: ObjectInfo, path: Path) -> None:
        real(info, path)
        together.wait()  # all have their copy before the first is shown

    monkeypatch.setattr(source, "download", download)
    listed = source.list()
    failures: list[BaseException] = []

    def fetch(pod: int) -> None:
        try:
            cache.fetch(source, listed, tmp_path / f"pod{pod}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=fetch, args=(pod,)) for pod in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert failures == []
    assert all((tmp_path / f"pod{pod}" / KEY).read_bytes() == CONTENT for pod in range(3))
    assert all((tmp_path / f"pod{pod}" / KEY).is_symlink() for pod in range(3))
    assert len(entries(tmp_path)) == 1
    assert list((tmp_path / "cache" / "incoming").iterdir()) == []


def test_what_killed_pods_left_is_removed_in_time(cache: ModelCache, source: Folder, tmp_path: Path) -> None:
    incoming = tmp_path / "cache" / "incoming"
    for name, age in (("old", model_cache.ABANDONED_SECONDS + 60), ("young", 60)):
        (incoming / name).mkdir(parents=True)
        part = incoming / name / "data.part"
        part.write_bytes(b"x")
        for path in (part, incoming / name):
            os.utime(path, (time.time() - age, time.time() - age))
    cache.fetch(source, source.list(), tmp_path / "a")
    assert [place.name for place in incoming.iterdir()] == ["young"]


def test_local_files_are_not_cached(cache: ModelCache, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / KEY).write_bytes(CONTENT)
    folder = open_folder(f"file://{tmp_path}/base", StorageSettings(allow_files=True))
    cache.fetch(folder, folder.list(), tmp_path / "a")
    assert (tmp_path / "a" / KEY).read_bytes() == CONTENT
    assert not (tmp_path / "cache").exists()


def test_commits_of_a_hub_model_share_what_they_have_in_common(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    with FakeHub() as hub:
        repository = hub.repositories["models/org/name"] = Repository()
        commits = [repository.commit({KEY: CONTENT, "README.md": text}) for text in (b"1", b"2")]
        with Console(hub.endpoint, tmp_path / "home") as console:
            for sha in commits:
                console(f"hf://org/name@{sha}", "cached", KEY, str(root), str(tmp_path / sha))
                assert (tmp_path / sha / KEY).read_bytes() == CONTENT
        whole = [
            path
            for method, path, headers in hub.requests
            if method == "GET" and path.endswith(KEY) and "range" not in headers
        ]
    assert len(entries(tmp_path)) == 1
    assert not any(".hub" in str(path) for path in root.rglob("*"))
    assert [path for path in whole if commits[0] in path], "the first commit's file is downloaded"
    assert not [path for path in whole if commits[1] in path], "of the second commit's no more than a byte is read"


@pytest.fixture
def counted(moto: MotoServer) -> Iterator[Proxy]:
    s3._client.cache_clear()
    with Proxy(moto.endpoint) as proxy:
        yield proxy
    s3._client.cache_clear()


def test_whole_jobs_share_it(
    counted: Proxy, make_job: Callable[..., TestJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs with one base: train and export of the second one, and export of the first, find its weights."""
    monkeypatch.setenv(ENV_MODEL_CACHE, str(tmp_path / "cache"))

    def weights() -> int:
        """Requests for more than a header or a byte of the base's weights."""
        fetched = [
            request
            for request in counted.requests
            if request.method == "GET" and request.path.endswith(f"/model/{KEY}") and _length(request.headers) > 100_000
        ]
        return len(fetched)

    for _ in range(2):
        job = make_job()
        job.storage = StorageSettings(endpoint=counted.endpoint, path_style=True)
        job.run("prepare")
        job.run("train")
        assert job.run("export", 1, (1,)).verification is not None
        assert weights() == 1
    assert len(entries(tmp_path)) == 1


def _length(headers: dict[str, str]) -> int:
    first, _, last = headers.get("range", "bytes=0-999999999").removeprefix("bytes=").partition("-")
    return int(last or 999_999_999) - int(first)
