"""A bundle: files below one prefix that count only when their manifest is there, and the manifest is written last.

Checkpoints and the result of training are bundles. Whoever finds the manifest finds every file it names, with the size
and hash it names; a half-written or half-deleted bundle does not exist.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api.base import ApiModel
from finetune_api.failures import FailureClass, JobError
from finetune_trainer.layout import MANIFEST
from finetune_trainer.storage import Folder
from finetune_trainer.storage.base import BrokenObject
from finetune_trainer.storage.s3 import sha256_file


class BundleFile(ApiModel):
    path: str
    size: int
    sha256: str


class Bundle(ApiModel):
    files: list[BundleFile]
    facts: dict[str, Any] = {}
    """What the writer wants the reader to know."""


def upload_files(source: Path, folder: Folder, prefix: str) -> list[BundleFile]:
    """Store all files below `source`; they become a bundle when `publish` names them."""
    files = []
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        file = BundleFile(path=path.relative_to(source).as_posix(), size=path.stat().st_size, sha256=sha256_file(path))
        folder.upload(path, f"{prefix}/{file.path}", file.sha256)
        files.append(file)
    return files


def publish(folder: Folder, prefix: str, files: list[BundleFile], facts: dict[str, Any]) -> None:
    """Write the manifest: from now on the bundle exists."""
    folder.write(f"{prefix}/{MANIFEST}", Bundle(files=files, facts=facts).model_dump_json().encode())


def publish_part(folder: Folder, prefix: str, part: str, files: list[BundleFile]) -> None:
    """Say which files another pod has added, for the one that writes the manifest."""
    folder.write(f"{prefix}/part-{part}.json", Bundle(files=files).model_dump_json().encode())


def read_part(folder: Folder, prefix: str, part: str) -> list[BundleFile] | None:
    """The files that another pod has added, or None when it has not said so yet."""
    key = f"{prefix}/part-{part}.json"
    if folder.stat(key) is None:
        return None
    return Bundle.model_validate_json(folder.read(key)).files


def read(folder: Folder, prefix: str) -> Bundle | None:
    """The bundle's manifest, or None when the bundle is not complete."""
    if folder.stat(f"{prefix}/{MANIFEST}") is None:
        return None
    try:
        return Bundle.model_validate(json.loads(folder.read(f"{prefix}/{MANIFEST}")))
    except (ValueError, ValidationError):
        return None


def download(folder: Folder, prefix: str, bundle: Bundle, target: Path) -> None:
    """Fetch all files of a bundle, each checked against the manifest.

    Raises:
        JobError: NotFound or StorageUnavailable, when the bundle is not what its manifest says.
    """
    for file in bundle.files:
        key = f"{prefix}/{file.path}"
        info = folder.stat(key)
        if info is None:
            raise JobError(FailureClass.NOT_FOUND, f"{folder.uri}/{key} was deleted while it was needed.")
        folder.download(info, target / file.path)
        if sha256_file(target / file.path) != file.sha256:
            raise BrokenObject(f"{folder.uri}/{key} is not what its manifest says.")


def delete(folder: Folder, prefix: str) -> None:
    """Remove a bundle; the manifest first, so that nobody sees a part of it as a whole."""
    keys = [info.key for info in folder.list(f"{prefix}/")]
    manifest = f"{prefix}/{MANIFEST}"
    folder.delete(sorted(keys, key=lambda key: key != manifest))
