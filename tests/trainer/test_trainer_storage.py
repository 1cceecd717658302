"""S3 as it is and as it fails: two servers of different make, and a proxy that breaks connections."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import socket
import tracemalloc
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from botocore.retries.standard import ExponentialBackoff
from conftest import new_bucket
from huggingface_hub.errors import LocalEntryNotFoundError
from trainer_lab import Bucket
from trainer_servers import Fault, MotoServer, Proxy, Request, S3rver

from finetune_api.document import StorageSettings
from finetune_api.failures import FailureClass, JobError
from finetune_trainer.storage import Folder, ObjectInfo, hub, open_file, open_folder, s3
from finetune_trainer.storage.s3 import S3Folder

MIB = 1024 * 1024
PART = 5 * MIB
"""S3's smallest part, so that few bytes make many parts."""


@pytest.fixture(autouse=True)
def forget_clients() -> Iterator[None]:
    """Each test may have keys of its own; a client keeps those it began with."""
    s3._client.cache_clear()
    yield
    s3._client.cache_clear()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "MIN_PART", PART)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow each other at once."""
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0)
    monkeypatch.setattr(s3.time, "sleep", lambda _: None)


@pytest.fixture
def proxy(moto: MotoServer) -> Iterator[Proxy]:
    with Proxy(moto.endpoint) as proxy:
        yield proxy


def folder_of(bucket: Bucket, path: str = "folder", endpoint: str | None = None) -> Folder:
    return open_folder(bucket.uri(path), StorageSettings(endpoint=endpoint or bucket.endpoint, path_style=True))


def failure(call: Callable[[], object]) -> JobError:
    with pytest.raises(JobError) as caught:
        call()
    return caught.value


def random_file(path: Path, size: int) -> Path:
    path.write_bytes(os.urandom(size))
    return path


def is_part(method: str) -> Callable[[Request], bool]:
    """Matches the requests that carry a part of an object."""
    return lambda request: request.method == method and ("partNumber" in request.query or "range" in request.headers)


class TestObjects:
    def test_write_read_list_delete(self, any_bucket: Bucket) -> None:
        folder = folder_of(any_bucket)
        any_bucket.put("folder-of-another/x", b"not ours")
        folder.write("b.txt", b"hello")
        folder.write("a/ü b+c&d.txt", b"")
        found = folder.list()
        assert [(info.key, info.size) for info in found] == [("a/ü b+c&d.txt", 0), ("b.txt", 5)]
        assert folder.list("a/") == found[:1]
        assert folder.stat("b.txt") == found[1]
        assert folder.stat("nothing") is None
        assert folder.read("b.txt") == b"hello"
        assert folder.read("a/ü b+c&d.txt") == b""
        folder.delete(["b.txt", "nothing"])
        assert [info.key for info in folder.list()] == ["a/ü b+c&d.txt"]
        assert folder.uri == any_bucket.uri("folder")

    @pytest.mark.parametrize(("start", "length"), [(0, 4), (3, 4), (3, None), (0, None), (9, 1), (0, 10), (2, 0)])
    def test_ranges(self, any_bucket: Bucket, start: int, length: int | None) -> None:
        data = b"0123456789"
        any_bucket.put("folder/x", data)
        assert (
            folder_of(any_bucket).read("x", start, length) == data[start : None if length is None else start + length]
        )

    def test_more_objects_than_one_listing_holds(self, bucket: Bucket) -> None:
        client = bucket.client
        for number in range(1001):
            client.put_object(Bucket=bucket.name, Key=f"folder/{number:04d}", Body=b"")
        assert len(folder_of(bucket).list()) == 1001

    def test_a_file_is_found_in_its_folder(self, bucket: Bucket) -> None:
        bucket.put("data/rows.jsonl", b"{}")
        folder, key = open_file(bucket.uri("data/rows.jsonl"), bucket.settings)
        assert folder.stat(key) == ObjectInfo("rows.jsonl", 2, hashlib.md5(b"{}").hexdigest())

    @pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 3 * PART + 12345])
    def test_upload_and_download(self, any_bucket: Bucket, tmp_path: Path, small_parts: None, size: int) -> None:
        source = random_file(tmp_path / "source", size)
        folder = folder_of(any_bucket)
        info = folder.upload(source, "x", s3.sha256_file(source))
        assert info == folder.stat("x")
        assert info.size == size
        assert any_bucket.get("folder/x") == source.read_bytes()
        target = tmp_path / "deep" / "target"
        folder.download(info, target)
        assert target.read_bytes() == source.read_bytes()
        assert [path.name for path in target.parent.iterdir()] == ["target"]

    def test_parts_are_bounded_and_numbered(
        self, bucket: Bucket, proxy: Proxy, tmp_path: Path, small_parts: None
    ) -> None:
        source = random_file(tmp_path / "source", 3 * PART + 7)
        folder = folder_of(bucket, endpoint=proxy.endpoint)
        info = folder.upload(source, "x")
        sent = sorted(int(request.headers["content-length"]) for request in proxy.requests if is_part("PUT")(request))
        assert sent == [7, PART, PART, PART]
        proxy.requests.clear()
        folder.download(info, tmp_path / "target")
        gets = [request for request in proxy.requests if request.method == "GET"]
        ranges = sorted(tuple(map(int, get.headers["range"].removeprefix("bytes=").split("-"))) for get in gets)
        assert ranges == [(n * PART, min((n + 1) * PART, info.size) - 1) for n in range(4)]
        # Each part is of the version that was asked for.
        assert {get.headers["if-match"] for get in gets} == {f'"{info.version}"'}

    def test_an_object_of_any_size_fits_into_the_allowed_number_of_parts(self) -> None:
        for size in (1, 16 * MIB, 5 * 1024**4):
            assert -(-size // s3._part_size(size)) <= 10_000
            assert s3._part_size(size) >= 5 * MIB

    def test_memory_is_bounded(self, bucket: Bucket, tmp_path: Path, small_parts: None) -> None:
        size = 200 * MIB
        source = tmp_path / "source"
        with source.open("wb") as file:
            file.truncate(size)
        folder = folder_of(bucket)
        gc.collect()
        tracemalloc.start()
        try:
            info = folder.upload(source, "x")
            sent = tracemalloc.get_traced_memory()[1]
            tracemalloc.reset_peak()
            folder.download(info, tmp_path / "target")
            received = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert (tmp_path / "target").stat().st_size == size
        # What is under way: a part for each worker, and twice that while a part is put together from what was read.
        assert sent < (s3.WORKERS + 2) * PART
        assert received < (2 * s3.WORKERS + 2) * PART
        bucket.delete("folder/x")


class TestIntegrity:
    def test_other_bytes_than_were_stored(self, bucket: Bucket, tmp_path: Path) -> None:
        bucket.client.put_object(
            Bucket=bucket.name, Key="folder/x", Body=b"tampered", Metadata={"sha256": hashlib.sha256(b"").hexdigest()}
        )
        folder = folder_of(bucket)
        info = folder.stat("x")
        assert info
        error = failure(lambda: folder.download(info, tmp_path / "x"))
        assert error.failure_class is FailureClass.STORAGE_UNAVAILABLE
        assert "arrived with other bytes than were stored" in error.message
        assert list(tmp_path.iterdir()) == []

    def test_an_upload_that_stored_other_bytes(self, bucket: Bucket, proxy: Proxy, tmp_path: Path) -> None:
        source = random_file(tmp_path / "source", 100)

        def replace() -> None:
            bucket.put("folder/x", b"z" * 100)

        proxy.faults.append(
            Fault(
                lambda request: request.method == "PUT", first=replace, answer=(200, b""), headers={"ETag": '"other"'}
            )
        )
        error = failure(lambda: folder_of(bucket, endpoint=proxy.endpoint).upload(source, "x"))
        assert error.failure_class is FailureClass.STORAGE_UNAVAILABLE
        assert "holds other bytes than were sent" in error.message

    def test_an_etag_that_is_no_md5(self, bucket: Bucket, proxy: Proxy, tmp_path: Path) -> None:
        """As in encrypted buckets: the bytes are read back."""
        source = random_file(tmp_path / "source", 100)
        bucket.put("folder/x", source)
        proxy.faults.append(
            Fault(lambda request: request.method == "PUT", answer=(200, b""), headers={"ETag": '"no-md5"'})
        )
        assert folder_of(bucket, endpoint=proxy.endpoint).upload(source, "x").version == "no-md5"

    @pytest.mark.parametrize("size", [100, 2 * PART + 1])
    def test_an_object_that_changed_before_the_download(
        self, bucket: Bucket, tmp_path: Path, small_parts: None, size: int
    ) -> None:
        folder = folder_of(bucket)
        info = folder.upload(random_file(tmp_path / "source", size), "x")
        bucket.put("folder/x", os.urandom(size))
        error = failure(lambda: folder.download(info, tmp_path / "x"))
        assert error.failure_class is FailureClass.MODEL_CHANGED
        assert "changed while the job ran. Create the job anew" in error.message
        assert not (tmp_path / "x").exists()

    def test_an_object_that_changes_during_the_download(
        self, bucket: Bucket, proxy: Proxy, tmp_path: Path, small_parts: None
    ) -> None:
        folder = folder_of(bucket, endpoint=proxy.endpoint)
        info = folder.upload(random_file(tmp_path / "source", 3 * PART), "x")
        proxy.faults.append(Fault(is_part("GET"), times=1, first=lambda: bucket.put("folder/x", os.urandom(3 * PART))))
        error = failure(lambda: folder.download(info, tmp_path / "x"))
        assert error.failure_class is FailureClass.MODEL_CHANGED
        assert not (tmp_path / "x").exists()

    def test_an_object_that_is_gone(self, any_bucket: Bucket, tmp_path: Path) -> None:
        folder = folder_of(any_bucket)
        error = failure(lambda: folder.download(ObjectInfo("x", 1, "e"), tmp_path / "x"))
        assert error.failure_class is FailureClass.NOT_FOUND


class TestBrokenConnections:
    def test_a_cut_body_is_fetched_again(
        self, bucket: Bucket, proxy: Proxy, tmp_path: Path, small_parts: None, no_pauses: None
    ) -> None:
        source = random_file(tmp_path / "source", 2 * PART + 1)
        folder = folder_of(bucket, endpoint=proxy.endpoint)
        info = folder.upload(source, "x")
        proxy.requests.clear()
        proxy.faults.append(Fault(is_part("GET"), times=3, cut_response_after=MIB))
        folder.download(info, tmp_path / "target")
        assert (tmp_path / "target").read_bytes() == source.read_bytes()
        assert sum(request.method == "GET" for request in proxy.requests) > 3

    def test_a_cut_body_of_a_whole_object(self, bucket: Bucket, proxy: Proxy, no_pauses: None) -> None:
        bucket.put("folder/x", b"x" * MIB)
        proxy.faults.append(Fault(lambda request: request.method == "GET", times=2, cut_response_after=1000))
        assert folder_of(bucket, endpoint=proxy.endpoint).read("x") == b"x" * MIB
        assert proxy.faults[0].times == 0

    def test_a_body_that_is_always_cut(self, bucket: Bucket, proxy: Proxy, no_pauses: None) -> None:
        bucket.put("folder/x", b"x" * MIB)
        proxy.faults.append(Fault(lambda request: request.method == "GET", cut_response_after=1000))
        error = failure(lambda: folder_of(bucket, endpoint=proxy.endpoint).read("x"))
        assert error.failure_class is FailureClass.STORAGE_UNAVAILABLE
        assert f"{bucket.uri('folder/x')}: reading broke off 5 times" in error.message

    def test_a_cut_upload_is_sent_again(
        self, bucket: Bucket, proxy: Proxy, tmp_path: Path, small_parts: None, no_pauses: None
    ) -> None:
        source = random_file(tmp_path / "source", 2 * PART + 1)
        proxy.faults.append(Fault(is_part("PUT"), times=2, cut_request_after=MIB))
        folder_of(bucket, endpoint=proxy.endpoint).upload(source, "x")
        assert bucket.get("folder/x") == source.read_bytes()
        assert bucket.uploads() == []
        assert proxy.faults[0].times == 0

    def test_a_server_that_recovers(self, bucket: Bucket, proxy: Proxy, tmp_path: Path, no_pauses: None) -> None:
        proxy.faults.append(Fault(lambda _: True, times=3, answer=(503, b"")))
        folder_of(bucket, endpoint=proxy.endpoint).write("x", b"data")
        assert bucket.get("folder/x") == b"data"

    @pytest.mark.parametrize("status", [500, 503])
    def test_a_server_that_fails(self, bucket: Bucket, proxy: Proxy, no_pauses: None, status: int) -> None:
        proxy.faults.append(Fault(lambda _: True, answer=(status, b"")))
        folder = folder_of(bucket, endpoint=proxy.endpoint)
        for call in (lambda: folder.write("x", b""), lambda: folder.read("x"), folder.list, lambda: folder.stat("x")):
            error = failure(call)
            assert error.failure_class is FailureClass.STORAGE_UNAVAILABLE
            assert "the S3 server failed" in error.message
        assert len(proxy.requests) == 4 * 6

    def test_a_server_that_is_down(self, bucket: Bucket, no_pauses: None) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        error = failure(lambda: folder_of(bucket, endpoint=endpoint).list())
        assert error.failure_class is FailureClass.STORAGE_UNAVAILABLE
        assert "cannot reach the S3 server" in error.message
        assert "Check storage.endpoint and the network" in error.message

    def test_a_host_that_does_not_exist(self, bucket: Bucket, no_pauses: None) -> None:
        error = failure(lambda: folder_of(bucket, endpoint="http://s3.invalid:9000").list())
        assert error.failure_class is FailureClass.STORAGE_UNAVAILABLE

    @pytest.mark.parametrize("status", [500, 403])
    def test_a_failed_upload_leaves_no_parts_behind(
        self, bucket: Bucket, proxy: Proxy, tmp_path: Path, small_parts: None, no_pauses: None, status: int
    ) -> None:
        source = random_file(tmp_path / "source", 3 * PART)
        # The third part never arrives; the others do.
        proxy.faults.append(Fault(lambda request: "partNumber=3" in request.query, answer=(status, b"")))
        error = failure(lambda: folder_of(bucket, endpoint=proxy.endpoint).upload(source, "x"))
        expected = FailureClass.STORAGE_UNAVAILABLE if status == 500 else FailureClass.ACCESS_DENIED
        assert error.failure_class is expected
        assert any(request.method == "PUT" for request in proxy.requests)
        assert bucket.uploads() == []
        assert bucket.keys() == []

    def test_a_failed_abort_does_not_hide_the_cause(
        self, bucket: Bucket, proxy: Proxy, tmp_path: Path, small_parts: None, no_pauses: None
    ) -> None:
        proxy.faults.append(Fault(lambda request: "partNumber=2" in request.query, answer=(500, b"")))
        proxy.faults.append(Fault(lambda request: request.method == "DELETE", answer=(403, b"")))
        source = random_file(tmp_path / "source", 2 * PART)
        error = failure(lambda: folder_of(bucket, endpoint=proxy.endpoint).upload(source, "x"))
        assert error.failure_class is FailureClass.STORAGE_UNAVAILABLE


@dataclass(frozen=True)
class Guarded:
    bucket: Bucket
    reader: tuple[str, str]
    """Key id and secret of a user who may not write."""


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    """A moto server that checks keys and rights, with an administrator and a user who may only read."""
    with MotoServer() as server:
        options = {"endpoint_url": server.endpoint, "region_name": "us-east-1"}
        iam = boto3.client("iam", aws_access_key_id="x", aws_secret_access_key="y", **options)
        keys = {}
        for user, actions in {"admin": ["s3:*"], "reader": ["s3:GetObject", "s3:ListBucket"]}.items():
            iam.create_user(UserName=user)
            policy = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": %s, "Resource": "*"}]}'
            iam.put_user_policy(UserName=user, PolicyName="p", PolicyDocument=policy % str(actions).replace("'", '"'))
            key = iam.create_access_key(UserName=user)["AccessKey"]
            keys[user] = (key["AccessKeyId"], key["SecretAccessKey"])
        bucket = new_bucket(server.endpoint, *keys["admin"])
        bucket.put("folder/x", b"data")
        urllib.request.urlopen(
            urllib.request.Request(
                f"{server.endpoint}/moto-api/reset-auth", data=b"0", headers={"Content-Type": "text/plain"}
            ),
            timeout=10,
        ).close()
        yield Guarded(bucket, keys["reader"])


class TestAccess:
    def use(self, monkeypatch: pytest.MonkeyPatch, key_id: str, secret: str) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key_id)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        s3._client.cache_clear()

    def refused(self, bucket: Bucket) -> None:
        folder = folder_of(bucket)
        for call in (folder.list, lambda: folder.stat("x"), lambda: folder.read("x"), lambda: folder.write("y", b"")):
            error = failure(call)
            assert error.failure_class is FailureClass.ACCESS_DENIED
            assert "access denied" in error.message
            assert "Check the keys in storage.secretRef" in error.message
            assert "not-the-secret" not in error.message

    def test_an_unknown_key(self, any_bucket: Bucket, guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
        self.use(monkeypatch, "AKIAUNKNOWNUNKNOWN00", "not-the-secret")
        self.refused(any_bucket if any_bucket.key_id == S3rver.key_id else guarded.bucket)

    def test_a_wrong_secret(self, guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
        self.use(monkeypatch, guarded.bucket.key_id, "not-the-secret")
        self.refused(guarded.bucket)

    def test_no_right_to_write(self, guarded: Guarded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.use(monkeypatch, *guarded.reader)
        folder = folder_of(guarded.bucket)
        assert folder.read("x") == b"data"
        for call in (
            lambda: folder.write("y", b""),
            lambda: folder.upload(random_file(tmp_path / "f", 9), "y"),
        ):
            error = failure(call)
            assert error.failure_class is FailureClass.ACCESS_DENIED
            assert "s3:PutObject" in error.message

    def test_no_keys_at_all(self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        error = failure(lambda: folder_of(bucket).list())
        assert error.failure_class is FailureClass.ACCESS_DENIED
        assert "No S3 credentials" in error.message
        assert "storage.secretRef" in error.message

    def test_a_missing_bucket(self, any_bucket: Bucket, tmp_path: Path) -> None:
        folder = open_folder("s3://no-such-bucket-here/folder", any_bucket.settings)
        for call in (
            folder.list,
            lambda: folder.stat("x"),
            lambda: folder.read("x"),
            lambda: folder.write("x", b""),
            lambda: folder.upload(random_file(tmp_path / "f", 9), "x"),
        ):
            error = failure(call)
            assert error.failure_class is FailureClass.NOT_FOUND
            assert "s3://no-such-bucket-here/folder" in error.message
            assert "the bucket does not exist. Correct the URI, or create it" in error.message

    def test_a_missing_object(self, any_bucket: Bucket) -> None:
        error = failure(lambda: folder_of(any_bucket).read("x"))
        assert error.failure_class is FailureClass.NOT_FOUND
        assert error.message.startswith(f"{any_bucket.uri('folder/x')}: the object does not exist.")

    @pytest.mark.parametrize("code", ["301", "400"])
    def test_a_wrong_region_or_address(self, bucket: Bucket, proxy: Proxy, code: str, no_pauses: None) -> None:
        name = {"301": "PermanentRedirect", "400": "AuthorizationHeaderMalformed"}[code]
        body = f"<Error><Code>{name}</Code><Message>m</Message></Error>".encode()
        proxy.faults.append(Fault(lambda request: request.method == "GET", answer=(int(code), body)))
        error = failure(lambda: folder_of(bucket, endpoint=proxy.endpoint).list())
        assert error.failure_class is FailureClass.USER_ERROR
        assert "storage.region, storage.endpoint" in error.message

    @pytest.mark.parametrize("uri", ["s3://bucket", "s3://", "gs://bucket/x", "bucket/x"])
    def test_a_uri_that_is_none(self, bucket: Bucket, uri: str) -> None:
        error = failure(lambda: open_folder(uri, bucket.settings))
        assert error.failure_class is FailureClass.USER_ERROR
        assert repr(uri) in error.message

    def test_a_bucket_name_that_is_none(self, bucket: Bucket) -> None:
        error = failure(lambda: open_folder("s3://not a bucket/x", bucket.settings).list())
        assert error.failure_class is FailureClass.USER_ERROR


class TestFiles:
    """file:// folders of local mode behave as S3 does."""

    def folder(self, tmp_path: Path) -> Folder:
        return open_folder(f"file://{tmp_path}/folder", StorageSettings(allow_files=True))

    def test_are_refused_in_a_pod(self, tmp_path: Path) -> None:
        error = failure(lambda: open_folder(f"file://{tmp_path}", StorageSettings()))
        assert error.failure_class is FailureClass.USER_ERROR
        assert "upload it and use an s3:// or hf:// URI" in error.message

    def test_write_read_list_delete(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        assert folder.list() == []
        folder.write("b.txt", b"hello")
        folder.upload(random_file(tmp_path / "source", 3), "a/c.txt")
        assert [(info.key, info.size) for info in folder.list()] == [("a/c.txt", 3), ("b.txt", 5)]
        assert [info.key for info in folder.list("a/")] == ["a/c.txt"]
        assert folder.read("b.txt", 1, 2) == b"el"
        assert folder.stat("nothing") is None
        folder.delete(["b.txt", "nothing"])
        assert [info.key for info in folder.list()] == ["a/c.txt"]

    def test_download_of_another_version(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        folder.write("x", b"one")
        info = folder.stat("x")
        assert info
        folder.download(info, tmp_path / "target" / "x")
        assert (tmp_path / "target" / "x").read_bytes() == b"one"
        folder.write("x", b"two!")
        assert failure(lambda: folder.download(info, tmp_path / "y")).failure_class is FailureClass.MODEL_CHANGED
        folder.delete(["x"])
        assert failure(lambda: folder.download(info, tmp_path / "y")).failure_class is FailureClass.NOT_FOUND
        assert failure(lambda: folder.read("x")).failure_class is FailureClass.NOT_FOUND
        assert not (tmp_path / "y").exists()

    def test_a_copy_that_breaks_off_is_not_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = self.folder(tmp_path)
        folder.write("x", b"data")
        info = folder.stat("x")
        assert info

        def copy(source: Path, target: Path) -> None:
            target.write_bytes(b"da")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("finetune_trainer.storage.files.shutil.copyfile", copy)
        with pytest.raises(OSError, match="No space left"):
            folder.download(info, tmp_path / "y")
        assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("ExpiredToken", 400, FailureClass.STORAGE_UNAVAILABLE),
        ("RequestExpired", 403, FailureClass.STORAGE_UNAVAILABLE),
        ("NoSuchUpload", 404, FailureClass.STORAGE_UNAVAILABLE),
        ("NoSuchKey", 404, FailureClass.NOT_FOUND),
        ("InvalidAccessKeyId", 403, FailureClass.ACCESS_DENIED),
    ],
)
def test_what_may_pass_is_tried_again(code: str, status: int, expected: FailureClass) -> None:
    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(JobError) as caught, s3._errors("s3://bucket/key"):
        raise ClientError(answer, "PutObject")
    assert caught.value.failure_class is expected


def test_a_head_that_cannot_say_why_is_asked_again_by_a_list(bucket: Bucket) -> None:
    """The answer to HEAD has no body, so that an expired token looks like another region."""
    folder = S3Folder(bucket.name, "", bucket.settings)

    def head(**_: Any) -> Any:
        raise ClientError({"Error": {"Code": "400"}, "ResponseMetadata": {"HTTPStatusCode": 400}}, "HeadObject")

    def expired(**_: Any) -> Any:
        raise ClientError({"Error": {"Code": "ExpiredToken"}, "ResponseMetadata": {"HTTPStatusCode": 400}}, "List")

    folder._client = SimpleNamespace(head_object=head, list_objects_v2=expired)
    with pytest.raises(JobError, match="the credentials have expired") as caught:
        folder.stat("key")
    assert caught.value.failure_class is FailureClass.STORAGE_UNAVAILABLE


def test_a_hub_that_cannot_be_reached_is_not_a_missing_file() -> None:
    with pytest.raises(JobError) as caught, hub._errors("hf://org/model/config.json"):
        raise LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub")
    assert caught.value.failure_class is FailureClass.STORAGE_UNAVAILABLE


class TestProxies:
    """What the operator's settings or podTemplate.env put into the environment is what boto3 goes by."""

    def test_requests_go_through_the_proxy(self, bucket: Bucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HTTP_PROXY", proxy.endpoint)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")  # where the test itself looks
        folder = folder_of(bucket, endpoint="http://unresolvable:9000")
        folder.write("a", b"1")
        assert bucket.get("folder/a") == b"1"
        (request,) = proxy.requests
        assert request.headers["host"] == "unresolvable:9000"

    def test_except_where_they_must_not(self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        folder = folder_of(bucket)
        folder.write("a", b"1")
        assert folder.read("a") == b"1"
