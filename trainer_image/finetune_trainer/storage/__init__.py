"""Storage behind one small interface: a `Folder` of objects with relative keys.

`open_folder("s3://bucket/prefix", settings)` gives a folder; `open_file` splits a file's URI into its folder and key.
Errors leave as `JobError` with the class that decides what follows (wrong key, missing object, server down).
"""

from __future__ import annotations

from dataclasses import replace

from finetune_api.document import StorageSettings
from finetune_api.failures import FailureClass, JobError
from finetune_api.uri import FileLocation, HubLocation, Location, S3Location, parse
from finetune_trainer.storage.base import Folder, ObjectInfo

__all__ = ["Folder", "ObjectInfo", "open_file", "open_folder", "open_location"]


def open_folder(uri: str, settings: StorageSettings) -> Folder:
    """The folder at a URI. Nothing is read yet.

    Raises:
        JobError: UserError, when the URI cannot be used here.
    """
    return open_location(_parse(uri), settings)


def open_file(uri: str, settings: StorageSettings) -> tuple[Folder, str]:
    """The folder that holds a file, and the file's key in it. The folder may be a whole bucket."""
    location = _parse(uri)
    path = location.key if isinstance(location, S3Location) else location.path
    parent, _, name = path.rpartition("/")
    match location:
        case S3Location():
            return open_location(replace(location, key=parent), settings), name
        case HubLocation():
            return open_location(replace(location, path=parent), settings), name
        case FileLocation():
            return open_location(FileLocation(parent or "/"), settings), name


def _parse(uri: str) -> Location:
    try:
        return parse(uri)
    except ValueError as error:
        raise JobError(FailureClass.USER_ERROR, str(error)) from error


def open_location(location: Location, settings: StorageSettings) -> Folder:
    """The folder at a location, which may be a whole bucket."""
    match location:
        case S3Location(bucket, key):
            from finetune_trainer.storage.s3 import S3Folder

            return S3Folder(bucket, key, settings)
        case HubLocation(kind, repo, revision, path):
            from finetune_trainer.storage.hub import HubFolder

            return HubFolder(kind, repo, revision, path)
        case FileLocation(path):
            if not settings.allow_files:
                raise JobError(
                    FailureClass.USER_ERROR,
                    f"{location} names a local file, which a pod cannot see: upload it and use an s3:// or hf:// URI.",
                )
            from finetune_trainer.storage.files import FileFolder

            return FileFolder(path)
