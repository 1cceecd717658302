"""The interface of storage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetune_api.failures import FailureClass, JobError


class BrokenObject(JobError):
    """What is stored is not what was written. Reading it again may help, if it broke on the way."""

    def __init__(self, message: str) -> None:
        super().__init__(FailureClass.STORAGE_UNAVAILABLE, message)


@dataclass(frozen=True, order=True)
class ObjectInfo:
    key: str
    """Relative to the folder."""
    size: int
    """Bytes."""
    version: str
    """Changes when the content changes: ETag, blob hash, or modification time."""


class Folder(Protocol):
    """Objects below one URI. Keys are relative and never start with a slash."""

    @property
    def uri(self) -> str:
        """Where the folder is, without a trailing slash."""
        ...

    @property
    def revision(self) -> str | None:
        """An immutable name of the whole folder (a hub commit), or None where the store has none."""
        ...

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """All objects below `prefix`, sorted by key."""
        ...

    def stat(self, key: str) -> ObjectInfo | None:
        """One object, or None when it does not exist."""
        ...

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Content of a small object, or `length` bytes of any object from `start`.

        Raises:
            JobError: NotFound.
        """
        ...

    def download(self, info: ObjectInfo, path: Path) -> None:
        """Fetch exactly this version of an object; `path` appears only when it is complete and checked.

        Raises:
            JobError: NotFound; ModelChanged when the object is not this version any more.
        """
        ...

    def write(self, key: str, data: bytes) -> None:
        """Store a small object."""
        ...

    def upload(self, path: Path, key: str, sha256: str | None = None) -> ObjectInfo:
        """Store a file; when this returns, the store holds exactly its bytes. `sha256` is kept beside the object and
        checked by `download`."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; missing ones are fine."""
        ...
