"""Runs calls on hub folders that come as JSON lines, and answers each with its result or its failure.

A process of its own: huggingface_hub reads its endpoint and its offline switch when it is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from finetune_api.document import StorageSettings
from finetune_api.failures import JobError
from finetune_api.spec import Dataset, TrainFile
from finetune_trainer.layout import PodDisk
from finetune_trainer.main import _quiet_libraries
from finetune_trainer.model_cache import ModelCache
from finetune_trainer.storage import Folder, ObjectInfo, open_folder
from finetune_trainer.trust import trust_bundle

_quiet_libraries()
trust_bundle(PodDisk.from_environment().run)
folders: dict[str, Folder] = {}


def fetch(uris: list[str], target: Path) -> object:
    """The data files that sources name, with their content."""
    # Other tests start this process often, and this import is slow.
    from finetune_trainer.data import sources

    files, _ = sources.find(Dataset(train=[TrainFile(uri=uri) for uri in uris]), StorageSettings())
    fetched = sources.download(files, target, StorageSettings())
    return [
        [file.uri, file.size, file.version, path.read_text()] for file, (_, path) in zip(files, fetched, strict=True)
    ]


def call(uri: str, name: str, *arguments: object) -> object:
    if name == "fetch":
        return fetch(uri.split(), Path(str(arguments[0])))
    folder = folders.setdefault(uri, open_folder(uri.partition("#")[0], StorageSettings()))
    if name in ("revision", "uri"):
        return getattr(folder, name)
    if name == "download":
        key, target = arguments
        info = folder.stat(str(key)) or ObjectInfo(str(key), 0, "")
        folder.download(info, Path(str(target)))
        return None
    if name == "download_as":
        key, target, size, version = arguments
        folder.download(ObjectInfo(str(key), int(str(size)), str(version)), Path(str(target)))
        return None
    if name == "cached":
        key, root, target = (str(argument) for argument in arguments)
        ModelCache(Path(root)).fetch(folder, [info for info in folder.list() if info.key == key], Path(target))
        return None
    value = getattr(folder, name)(*arguments)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, ObjectInfo):
        return [value.key, value.size, value.version]
    return [[info.key, info.size, info.version] for info in value] if name == "list" else value


for line in sys.stdin:
    try:
        answer = {"value": call(*json.loads(line))}
    except JobError as error:
        answer = {"class": str(error.failure_class), "message": error.message}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
