"""Read-only folders of the Hugging Face hub, pinned to the commit that was found first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from finetune_api.failures import FailureClass, JobError
from finetune_api.uri import HubLocation
from finetune_trainer.storage.base import ObjectInfo
from finetune_trainer.trust import distrust


class HubFolder:
    def __init__(self, kind: str, repo: str, revision: str | None, path: str) -> None:
        self._kind = kind
        self._repo = repo
        self._revision = revision
        self._path = path

    @property
    def uri(self) -> str:
        return str(HubLocation(self._kind, self._repo, self._revision, self._path))

    @property
    def revision(self) -> str:
        """The commit hash."""
        return str(self._info.sha)

    @cached_property
    def _info(self) -> Any:
        with _errors(self.uri):
            return HfApi().repo_info(
                self._repo, repo_type=self._kind, revision=self._revision, files_metadata=True, timeout=30
            )

    def _key(self, key: str) -> str:
        return f"{self._path}/{key}" if self._path else key

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        base = f"{self._path}/" if self._path else ""
        return sorted(
            ObjectInfo(file.rfilename.removeprefix(base), file.size or 0, file.blob_id or self.revision)
            for file in self._info.siblings or []
            if file.rfilename.startswith(base + prefix)
        )

    def stat(self, key: str) -> ObjectInfo | None:
        return self._objects.get(key)

    @cached_property
    def _objects(self) -> dict[str, ObjectInfo]:
        return {info.key: info for info in self.list()}

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        prefix = "datasets/" if self._kind == "dataset" else ""
        end = None if length is None else start + length
        with _errors(f"{self.uri}/{key}"):
            # Without the cache exactly these bytes are fetched, and not five megabytes for a header of a few.
            data: bytes = HfFileSystem().cat_file(
                f"{prefix}{self._repo}@{self.revision}/{self._key(key)}", start=start, end=end, cache_type="none"
            )
        return data

    def download(self, info: ObjectInfo, path: Path) -> None:
        current = self.stat(info.key)
        if current is not None and current != info:
            raise JobError(
                FailureClass.MODEL_CHANGED,
                f"{self.uri}/{info.key} changed on the hub while the job ran. Create the job anew, or name a revision.",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with _errors(f"{self.uri}/{info.key}"):
            cached = hf_hub_download(
                self._repo,
                self._key(info.key),
                repo_type=self._kind,
                revision=self.revision,
                local_dir=path.parent / ".hub",
            )
        Path(cached).replace(path)

    def write(self, key: str, data: bytes) -> None:
        raise self._read_only()

    def upload(self, path: Path, key: str, sha256: str | None = None) -> ObjectInfo:
        raise self._read_only()

    def delete(self, keys: Iterable[str]) -> None:
        raise self._read_only()

    def _read_only(self) -> JobError:
        return JobError(FailureClass.USER_ERROR, f"{self.uri} is read-only: publish to an s3:// URI.")


@contextmanager
def _errors(name: str) -> Iterator[None]:
    try:
        yield
    except LocalEntryNotFoundError as error:
        # A FileNotFoundError too, but it says that there was no connection.
        raise _unreachable(name, error) from error
    except GatedRepoError as error:
        raise JobError(
            FailureClass.ACCESS_DENIED,
            f"{name} is gated: accept its licence on the hub, and put a token with access as HF_TOKEN into the Secret "
            "that storage.secretRef names.",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError, FileNotFoundError) as error:
        raise JobError(
            FailureClass.NOT_FOUND,
            f"{name} does not exist on the hub, or is private. Correct the URI, or give HF_TOKEN in storage.secretRef.",
        ) from error
    except HFValidationError as error:
        raise JobError(FailureClass.USER_ERROR, f"{name} is not a valid hub location: {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise JobError(
                FailureClass.ACCESS_DENIED, f"{name}: the hub refused access. Check HF_TOKEN in storage.secretRef."
            ) from error
        raise JobError(FailureClass.STORAGE_UNAVAILABLE, f"{name}: the hub answered {status}.") from error
    except (httpx2.HTTPError, ConnectionError, TimeoutError) as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> JobError:
    return distrust(name, error) or JobError(
        FailureClass.STORAGE_UNAVAILABLE,
        f"{name}: the hub cannot be reached ({type(error).__name__}). Copy the files to S3, or check the network.",
    )
