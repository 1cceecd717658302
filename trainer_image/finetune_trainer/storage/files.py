"""Folders of the local file system, for local mode."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from finetune_api.failures import FailureClass, JobError
from finetune_trainer.storage.base import ObjectInfo


class FileFolder:
    def __init__(self, path: str) -> None:
        self._root = Path(path)

    @property
    def uri(self) -> str:
        return f"file://{self._root}"

    @property
    def revision(self) -> None:
        return None

    def _info(self, path: Path) -> ObjectInfo:
        status = path.stat()
        return ObjectInfo(path.relative_to(self._root).as_posix(), status.st_size, str(status.st_mtime_ns))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        files = (path for path in self._root.rglob("*") if path.is_file())
        return sorted(info for info in map(self._info, files) if info.key.startswith(prefix))

    def stat(self, key: str) -> ObjectInfo | None:
        path = self._root / key
        return self._info(path) if path.is_file() else None

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        try:
            with (self._root / key).open("rb") as file:
                file.seek(start)
                return file.read(-1 if length is None else length)
        except FileNotFoundError as error:
            raise JobError(FailureClass.NOT_FOUND, f"{self.uri}/{key} does not exist. Correct the URI.") from error

    def download(self, info: ObjectInfo, path: Path) -> None:
        current = self.stat(info.key)
        if current is None:
            raise JobError(FailureClass.NOT_FOUND, f"{self.uri}/{info.key} does not exist. Correct the URI.")
        if current != info:
            raise JobError(
                FailureClass.MODEL_CHANGED, f"{self.uri}/{info.key} changed while the job ran. Create the job anew."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        shutil.copyfile(self._root / info.key, partial)
        partial.replace(path)

    def write(self, key: str, data: bytes) -> None:
        path = self._root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.part")
        partial.write_bytes(data)
        partial.replace(path)

    def upload(self, path: Path, key: str, sha256: str | None = None) -> ObjectInfo:
        target = self._root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.part")
        shutil.copyfile(path, partial)
        partial.replace(target)
        return self._info(target)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            (self._root / key).unlink(missing_ok=True)
