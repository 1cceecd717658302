"""What `finetune gc` needs of storage: list, read small files, delete. With the user's own credentials.

The trainer has storage of its own, which this does not share: the packages know nothing of each other, and what the
trainer is careful about (parts, checksums, versions) does not arise when files are only listed and deleted.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

WORKERS = 8
BATCH = 1000


@dataclass(frozen=True)
class StoredObject:
    key: str
    size: int
    """Bytes."""
    modified: datetime


@dataclass(frozen=True)
class Upload:
    """A multipart upload that was begun and neither completed nor aborted. Its parts are stored, and paid for."""

    key: str
    id: str
    started: datetime


class StorageError(Exception):
    """What could not be done, where, and why."""


class Store(Protocol):
    def uri(self, key: str) -> str: ...

    def objects(self, folder: str) -> Iterator[StoredObject]:
        """All objects below a folder. Only a page of them is in memory."""
        ...

    def uploads(self, folder: str) -> Iterator[Upload]:
        """Unfinished uploads below a folder."""
        ...

    def read(self, key: str) -> bytes: ...

    def delete(self, keys: Iterable[str]) -> Iterator[str]:
        """Delete objects; yields a message for each that is still there."""
        ...

    def abort(self, upload: Upload) -> None: ...

    def tidy(self, folder: str) -> None:
        """Remove what an empty folder leaves behind."""
        ...


@dataclass(frozen=True)
class Access:
    """How to reach S3. What is None comes from the user's own environment and profile."""

    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None
    key_id: str | None = None
    secret: str | None = None


class S3Store:
    def __init__(self, bucket: str, access: Access) -> None:
        self._bucket = bucket
        self._access = access

    @property
    def _client(self) -> Any:
        return _client(self._access)

    def uri(self, key: str) -> str:
        return f"s3://{self._bucket}/{key}"

    def objects(self, folder: str) -> Iterator[StoredObject]:
        with _errors(self.uri(folder)):
            for page in self._pages("list_objects_v2", folder):
                for item in page.get("Contents", []):
                    yield StoredObject(item["Key"], item["Size"], item["LastModified"])

    def uploads(self, folder: str) -> Iterator[Upload]:
        with _errors(self.uri(folder)):
            try:
                for page in self._pages("list_multipart_uploads", folder):
                    for item in page.get("Uploads", []):
                        yield Upload(item["Key"], item["UploadId"], item["Initiated"])
            except _s3_errors() as error:
                # Some servers have uploads and no list of them. Then their own clean-up is all there is.
                if _status(error) != 501:
                    raise

    def _pages(self, operation: str, folder: str) -> Iterator[dict[str, Any]]:
        pages: Iterator[dict[str, Any]] = self._client.get_paginator(operation).paginate(
            Bucket=self._bucket, Prefix=f"{folder}/" if folder else ""
        )
        return pages

    def read(self, key: str) -> bytes:
        with _errors(self.uri(key)):
            data: bytes = self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
            return data

    def delete(self, keys: Iterable[str]) -> Iterator[str]:
        # One plain request for each: not every server knows how to delete many at once, or wants the same checksum.
        keys = iter(keys)
        with ThreadPoolExecutor(WORKERS) as pool:
            while batch := list(islice(keys, BATCH)):
                yield from filter(None, pool.map(self._delete, batch))

    def _delete(self, key: str) -> str | None:
        try:
            with _errors(self.uri(key)):
                self._client.delete_object(Bucket=self._bucket, Key=key)
        except StorageError as error:
            return str(error)
        return None

    def abort(self, upload: Upload) -> None:
        with _errors(self.uri(upload.key)):
            try:
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=upload.key, UploadId=upload.id)
            except _s3_errors() as error:
                # Ended by somebody else meanwhile.
                if _status(error) != 404:
                    raise

    def tidy(self, folder: str) -> None:
        pass


class FileStore:
    """Files of this machine, where jobs of `finetune local` may write. Keys are absolute paths; no link is followed."""

    def uri(self, key: str) -> str:
        return f"file://{key}"

    def objects(self, folder: str) -> Iterator[StoredObject]:
        def fail(error: OSError) -> None:
            raise error

        if not Path(folder).is_dir():
            return
        with _errors(self.uri(folder)):
            for parent, _, names in os.walk(folder, onerror=fail):
                for path in (Path(parent, name) for name in sorted(names)):
                    status = path.lstat()
                    yield StoredObject(str(path), status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    def uploads(self, folder: str) -> Iterator[Upload]:
        return iter(())

    def read(self, key: str) -> bytes:
        with _errors(self.uri(key)):
            return Path(key).read_bytes()

    def delete(self, keys: Iterable[str]) -> Iterator[str]:
        for key in keys:
            try:
                with _errors(self.uri(key)):
                    Path(key).unlink(missing_ok=True)
            except StorageError as error:
                yield str(error)

    def abort(self, upload: Upload) -> None:
        raise AssertionError("files have no uploads")

    def tidy(self, folder: str) -> None:
        for parent, _, _ in os.walk(folder, topdown=False):
            with contextlib.suppress(OSError):
                Path(parent).rmdir()


@functools.lru_cache(maxsize=8)
def _client(access: Access) -> Any:
    # Imported here: it takes longer than most commands.
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()
    style = (
        {} if access.path_style is None else {"s3": {"addressing_style": "path" if access.path_style else "virtual"}}
    )
    return session.client(
        "s3",
        endpoint_url=access.endpoint,
        region_name=access.region or session.region_name or "us-east-1",
        aws_access_key_id=access.key_id,
        aws_secret_access_key=access.secret,
        config=Config(
            retries={"mode": "standard", "total_max_attempts": 6},
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=WORKERS,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            **style,
        ),
    )


def _s3_errors() -> tuple[type[Exception], ...]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    return Boto3Error, BotoCoreError, ClientError


def _status(error: Exception) -> int:
    response = getattr(error, "response", {})
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@contextmanager
def _errors(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{error.filename or where}: {error.strerror or error}") from error
    except _s3_errors() as error:
        raise StorageError(f"{where}: {error}") from error
