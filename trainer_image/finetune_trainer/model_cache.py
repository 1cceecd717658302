"""Base models kept on a volume between jobs (storage.modelCache), so that each file is downloaded once.

    objects/<key>/data, sha256      a file and its hash; the key names the source, the size and the version
    incoming/<random>/              what is being downloaded; renamed to objects/<key> when it is complete

Any number of jobs may share a volume without a lock: a rename shows an entry whole or not at all, entries never change,
and of two jobs that download the same file one keeps its copy. The cache is never in the way: where it is full,
read-only or broken, the file is downloaded as without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from finetune_api.document import canonical_json
from finetune_api.names import ENV_MODEL_CACHE
from finetune_api.uri import FileLocation, HubLocation, parse
from finetune_trainer.storage import Folder, ObjectInfo
from finetune_trainer.storage.s3 import sha256_file

log = logging.getLogger(__name__)

WORKERS = 4
ABANDONED_SECONDS = 24 * 3600
"""A download in which nothing was written for so long belongs to a pod that is gone."""


class ModelCache:
    def __init__(self, root: Path, endpoint: str | None = None) -> None:
        """`endpoint`: of S3. The same bucket and key may be something else on another server."""
        self._objects = root / "objects"
        self._incoming = root / "incoming"
        self._endpoint = endpoint

    @classmethod
    def from_environment(cls, endpoint: str | None) -> ModelCache | None:
        """The cache of this pod, if it has one."""
        root = os.environ.get(ENV_MODEL_CACHE)
        return cls(Path(root), endpoint) if root else None

    def fetch(self, folder: Folder, files: Iterable[ObjectInfo], target: Path) -> None:
        """Bring files to `target`, each as a link into the cache, or as a file where the cache cannot help. A few at a
        time, since a GPU waits while they are checked.

        Raises:
            JobError: the source cannot be read. Who may not read it does not get it from the cache either.
        """
        with ThreadPoolExecutor(WORKERS) as pool:
            futures = [pool.submit(self._fetch, folder, info, target / info.key) for info in files]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _fetch(self, folder: Folder, info: ObjectInfo, target: Path) -> None:
        if info.size == 0 or isinstance(parse(folder.uri), FileLocation):
            folder.download(info, target)
            return
        if folder.stat(info.key) != info:
            # It is gone or has changed: the download says so in its own words.
            folder.download(info, target)
            return
        folder.read(info.key, 0, 1)
        try:
            entry = self._objects / self._key(folder, info)
            if not self._is_good(entry, info):
                self._fill(entry, folder, info)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.symlink_to(entry / "data")
        except OSError as error:
            log.warning("the model cache cannot be used for %s (%s)", info.key, error)
            target.unlink(missing_ok=True)
            folder.download(info, target)

    def _key(self, folder: Folder, info: ObjectInfo) -> str:
        location = parse(folder.uri)
        if isinstance(location, HubLocation):
            # Commits share what they did not change: the version of a file is the hash of its content.
            source = str(replace(location, revision=None))
        else:
            source = f"{self._endpoint or ''} {location}"
        return hashlib.sha256(canonical_json([source, info.key, info.size, info.version])).hexdigest()

    def _is_good(self, entry: Path, info: ObjectInfo) -> bool:
        """Whether an entry is there with the bytes that were stored. Reading them also warms them up for the load."""
        if not entry.is_dir():
            return False
        try:
            is_good = sha256_file(entry / "data") == (entry / "sha256").read_text()
        except FileNotFoundError:
            is_good = False
        if is_good:
            log.info("%s is in the model cache", info.key)
            with contextlib.suppress(OSError):
                os.utime(entry)  # for whoever removes what was not used for long
            return True
        log.warning("%s is broken in the model cache; it is downloaded again", info.key)
        with self._temporary() as place:
            entry.rename(place / "broken")
        return False

    def _fill(self, entry: Path, folder: Folder, info: ObjectInfo) -> None:
        self._sweep()
        with self._temporary() as place:
            made = place / "entry"
            data = made / "data"
            folder.download(info, data)
            data.chmod(0o444)
            (made / "sha256").write_text(sha256_file(data))
            # What the hub's client leaves beside a file.
            shutil.rmtree(made / ".hub", ignore_errors=True)
            _make_shared(self._objects)
            try:
                made.rename(entry)
            except OSError:
                # Another job was faster.
                if not self._is_good(entry, info):
                    raise

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        _make_shared(self._incoming)
        place = self._incoming / secrets.token_hex(8)
        place.mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what pods that were killed have left."""
        _make_shared(self._incoming)
        for place in self._incoming.iterdir():
            with contextlib.suppress(OSError):
                newest = max(path.stat().st_mtime for path in [place, *place.rglob("*")])
                if time.time() - newest > ABANDONED_SECONDS:
                    shutil.rmtree(place, ignore_errors=True)


def _make_shared(folder: Path) -> None:
    """A folder in which all of the volume's group may write: jobs may run as different users."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            folder.chmod(0o2775)
