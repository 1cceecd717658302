"""S3 with plain calls, so that AWS, MinIO, Ceph and small servers behave alike.

Memory is bounded: transfers move parts of `_part_size` bytes on a few threads, straight between file and socket.
Integrity: every part is sent with its MD5, the resulting ETag is compared with the one computed here, and our own files
carry their sha256, which a download checks. Trailing checksums are left off (`when_required`): several servers do not
know them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)
from urllib3.exceptions import HTTPError

from finetune_api.document import StorageSettings
from finetune_api.failures import FailureClass, JobError
from finetune_trainer.storage.base import BrokenObject, ObjectInfo
from finetune_trainer.trust import distrust

T = TypeVar("T")
log = logging.getLogger(__name__)

MIN_PART = 16 * 1024 * 1024
"""Bytes of a part. S3 wants at least 5 MiB and at most 10,000 parts."""
MAX_PARTS = 9_000
WORKERS = 8
READ_TRIES = 5
_META_SHA256 = "sha256"


def _part_size(size: int) -> int:
    return max(MIN_PART, -(-size // MAX_PARTS))


class S3Folder:
    def __init__(self, bucket: str, prefix: str, settings: StorageSettings) -> None:
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        """Empty for the whole bucket, which holds files but is no folder a job may write to."""
        self._root = f"{self.prefix}/" if self.prefix else ""
        self._client = _client(settings)

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def revision(self) -> None:
        return None

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}".strip("/")

    def _name(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._key(key)}"

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        with _errors(f"{self.uri}/{prefix}"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=f"{self._root}{prefix}"
            )
            found = [
                ObjectInfo(item["Key"].removeprefix(self._root), item["Size"], _etag(item))
                for page in pages
                for item in page.get("Contents", [])
                if not item["Key"].endswith("/")
            ]
        return sorted(found)

    def stat(self, key: str) -> ObjectInfo | None:
        try:
            head = self._head(key)
        except JobError as error:
            # HEAD has no body, so that a missing bucket looks like a missing key; only listing can tell them apart.
            if error.failure_class is FailureClass.NOT_FOUND:
                self._require_bucket()
                return None
            raise
        return ObjectInfo(key, head["ContentLength"], _etag(head))

    def _head(self, key: str) -> dict[str, Any]:
        with _errors(self._name(key)):
            try:
                head: dict[str, Any] = self._client.head_object(Bucket=self.bucket, Key=self._key(key))
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in ("400", "403"):
                    # An answer to HEAD has no body that says why: an expired token, another region, no right.
                    self._client.list_objects_v2(Bucket=self.bucket, Prefix=self._key(key), MaxKeys=1)
                raise
            return head

    def _require_bucket(self) -> None:
        with _errors(self.uri):
            self._client.list_objects_v2(Bucket=self.bucket, Prefix=self._root, MaxKeys=1)

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        return self._get(key, start, length)

    def _get(self, key: str, start: int, length: int | None, etag: str | None = None) -> bytes:
        """One ranged GET. botocore retries until the headers are in; a body that breaks off is ours to retry."""
        options: dict[str, Any] = {}
        if start or length is not None:
            end = "" if length is None else start + length - 1
            options["Range"] = f"bytes={start}-{end}"
        if etag is not None:
            options["IfMatch"] = f'"{etag}"'
        for attempt in range(READ_TRIES):
            with _errors(self._name(key)):
                body = self._client.get_object(Bucket=self.bucket, Key=self._key(key), **options)["Body"]
            try:
                data: bytes = body.read()
                if length is None or len(data) == length:
                    return data
                problem = f"{len(data)} bytes came instead of {length}"
            except (BotoCoreError, HTTPError, OSError) as error:
                problem = type(error).__name__
            log.warning("reading %s broke off (%s); trying again", self._name(key), problem)
            time.sleep(0.2 * 2**attempt)
        raise JobError(
            FailureClass.STORAGE_UNAVAILABLE, f"{self._name(key)}: reading broke off {READ_TRIES} times ({problem})."
        )

    def download(self, info: ObjectInfo, path: Path) -> None:
        head = self._head(info.key)
        if _etag(head) != info.version or head["ContentLength"] != info.size:
            raise _changed(self._name(info.key))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        part = _part_size(info.size)
        with partial.open("wb") as file:
            file.truncate(info.size)

            def fetch(start: int) -> None:
                data = self._get(info.key, start, min(part, info.size - start), info.version)
                os.pwrite(file.fileno(), data, start)

            _in_parallel(fetch, range(0, info.size, part))
        expected = head.get("Metadata", {}).get(_META_SHA256)
        if expected and sha256_file(partial) != expected:
            partial.unlink()
            raise BrokenObject(f"{self._name(info.key)} arrived with other bytes than were stored.")
        partial.replace(path)

    def write(self, key: str, data: bytes) -> None:
        with _errors(self._name(key), writing=True):
            self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, ContentMD5=_md5(data))

    def upload(self, path: Path, key: str, sha256: str | None = None) -> ObjectInfo:
        size = path.stat().st_size
        metadata = {_META_SHA256: sha256} if sha256 else {}
        part = _part_size(size)
        with path.open("rb") as file, _errors(self._name(key), writing=True):
            if size <= part:
                data = file.read()
                response = self._client.put_object(
                    Bucket=self.bucket, Key=self._key(key), Body=data, ContentMD5=_md5(data), Metadata=metadata
                )
                expected = hashlib.md5(data).hexdigest()
            else:
                response, expected = self._upload_parts(file.fileno(), size, part, key, metadata)
        etag = _etag(response)
        if etag != expected and sha256_object(self, key, size) != (sha256 or sha256_file(path)):
            # Encrypted buckets have ETags that are no MD5: there the bytes were read back, and they differ.
            raise JobError(FailureClass.STORAGE_UNAVAILABLE, f"{self._name(key)} holds other bytes than were sent.")
        return ObjectInfo(key, size, etag)

    def _upload_parts(
        self, descriptor: int, size: int, part: int, key: str, metadata: dict[str, str]
    ) -> tuple[dict[str, Any], str]:
        """A multipart upload; returns the server's answer and the ETag it should have."""
        target = {"Bucket": self.bucket, "Key": self._key(key)}
        upload_id = self._client.create_multipart_upload(**target, Metadata=metadata)["UploadId"]

        def send(start: int) -> tuple[int, str, bytes]:
            data = os.pread(descriptor, min(part, size - start), start)
            number = start // part + 1
            answer = self._client.upload_part(
                **target, UploadId=upload_id, PartNumber=number, Body=data, ContentMD5=_md5(data)
            )
            return number, answer["ETag"], hashlib.md5(data).digest()

        try:
            parts = _in_parallel(send, range(0, size, part))
            answer: dict[str, Any] = self._client.complete_multipart_upload(
                **target,
                UploadId=upload_id,
                MultipartUpload={"Parts": [{"PartNumber": number, "ETag": etag} for number, etag, _ in parts]},
            )
        except BaseException:
            # Parts of an unfinished upload are stored, and paid for, until somebody aborts it. What broke the upload
            # is what matters, also when the abort breaks, too.
            with contextlib.suppress(ClientError, BotoCoreError, HTTPError, OSError):
                self._client.abort_multipart_upload(**target, UploadId=upload_id)
            raise
        digest = hashlib.md5(b"".join(md5 for _, _, md5 in parts)).hexdigest()
        return answer, f"{digest}-{len(parts)}"

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with _errors(self._name(key), writing=True):
                self._client.delete_object(Bucket=self.bucket, Key=self._key(key))


@functools.lru_cache(maxsize=8)
def _client(settings: StorageSettings) -> Any:
    """One client for each way to reach a server: making one reads megabytes of service descriptions, and a job opens a
    folder for each of its files. Clients may be shared among threads."""
    style = {None: "auto", True: "path", False: "virtual"}[settings.path_style]
    return boto3.session.Session().client(
        "s3",
        endpoint_url=settings.endpoint,
        region_name=settings.region or os.environ.get("AWS_REGION") or "us-east-1",
        config=Config(
            retries={"mode": "standard", "total_max_attempts": 6},
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=WORKERS + 2,
            s3={"addressing_style": style},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def _in_parallel(work: Callable[[int], T], starts: Iterable[int]) -> list[T]:
    """Run `work` on a few threads; the first error stops what has not begun."""
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(work, start) for start in starts]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _md5(data: bytes) -> str:
    return b64encode(hashlib.md5(data).digest()).decode()


def _etag(answer: dict[str, Any]) -> str:
    return str(answer["ETag"]).strip('"')


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_object(folder: S3Folder, key: str, size: int) -> str:
    """Hash of a stored object, read in bounded pieces."""
    digest = hashlib.sha256()
    for start in range(0, size, MIN_PART):
        digest.update(folder.read(key, start, min(MIN_PART, size - start)))
    return digest.hexdigest()


def _changed(name: str) -> JobError:
    return JobError(
        FailureClass.MODEL_CHANGED,
        f"{name} changed while the job ran. Create the job anew, and do not write to its sources meanwhile.",
    )


_DENIED = {
    "403",
    "AccessDenied",
    "AllAccessDisabled",
    "Forbidden",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_MISSING = {"404", "NoSuchBucket", "NoSuchKey", "NotFound"}
_WRONG_PLACE = {
    "301",
    "400",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "PermanentRedirect",
}


@contextmanager
def _errors(name: str, *, writing: bool = False) -> Iterator[None]:
    """Translate what boto3 raises into the failure class that decides what follows."""
    try:
        yield
    except ClientError as error:
        raise _client_error(error, name, writing) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise JobError(
            FailureClass.ACCESS_DENIED,
            f"No S3 credentials for {name}: set storage.secretRef to a Secret with AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or storage.serviceAccountName to an account with a cloud identity.",
        ) from error
    except ParamValidationError as error:
        raise JobError(FailureClass.USER_ERROR, f"{name} is not a valid S3 location: {error}") from error
    except (BotoCoreError, HTTPError, OSError) as error:
        if distrusted := distrust(name, error):
            raise distrusted from error
        if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
            raise
        raise JobError(
            FailureClass.STORAGE_UNAVAILABLE,
            f"{name}: cannot reach the S3 server ({type(error).__name__}). Check storage.endpoint and the network.",
        ) from error


def _client_error(error: ClientError, name: str, writing: bool) -> JobError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "PreconditionFailed" or status == 412:
        return _changed(name)
    if code == "NoSuchUpload":
        # The answer to an upload's completion was lost, and its repetition finds it complete; or somebody aborted it.
        return JobError(FailureClass.STORAGE_UNAVAILABLE, f"{name}: the upload was ended by somebody else.")
    if code in _MISSING or status == 404:
        what = "bucket" if code == "NoSuchBucket" else "object"
        return JobError(FailureClass.NOT_FOUND, f"{name}: the {what} does not exist. Correct the URI, or create it.")
    if code in _EXPIRED:
        return JobError(
            FailureClass.STORAGE_UNAVAILABLE,
            f"{name}: the credentials have expired ({code}). Renew them in storage.secretRef; the next attempt reads "
            "them anew.",
        )
    if code in _DENIED or status in (401, 403):
        right = "s3:PutObject" if writing else "s3:GetObject and s3:ListBucket"
        return JobError(
            FailureClass.ACCESS_DENIED,
            f"{name}: access denied ({code}). Check the keys in storage.secretRef or the service account, and that "
            f"they have {right} here.",
        )
    if code in _WRONG_PLACE or status == 301:
        return JobError(
            FailureClass.USER_ERROR,
            f"{name}: the S3 server refuses the request ({code}). Check storage.region, storage.endpoint and "
            "storage.addressingStyle.",
        )
    if status >= 500 or code in {"SlowDown", "RequestTimeout", "Throttling", "BadDigest"} or status == 429:
        return JobError(
            FailureClass.STORAGE_UNAVAILABLE, f"{name}: the S3 server failed ({code or status}). It is tried again."
        )
    return JobError(FailureClass.UNKNOWN, f"{name}: the S3 server answered {code or status}: {error}")
