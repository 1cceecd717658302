"""Objects and their history.

Every write has a number, the resourceVersion, that only grows. Stored objects are never changed in place: a write puts
a new dictionary, so that readers, watchers and the history can share them. The history of each kind is bounded; who
asks for more than it holds is told to list again (410), as etcd does after a compaction.

With a journal each write is one line appended to a file and handed to the kernel before the caller goes on, so that
a killed process loses nothing. A line cut off by a kill is dropped at the next start.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Object = dict[str, Any]
Key = tuple[str, str]
"""Namespace ("" for cluster-scoped objects) and name."""

HISTORY = 1024
"""Events kept of each kind."""
COMPACT_AFTER = 50_000
"""Lines after which the journal is rewritten as a snapshot: about a day of lease renewals."""


@dataclass(frozen=True)
class Event:
    """One write. `old` is the object before it, None for ADDED; a DELETED event carries the last state."""

    version: int
    type: Literal["ADDED", "MODIFIED", "DELETED"]
    object: Object
    old: Object | None


Listener = Callable[[str, Event], None]


class Expired(Exception):
    """The history does not reach back that far."""

    def __init__(self, oldest: int) -> None:
        super().__init__(oldest)
        self.oldest = oldest


class Store:
    """All objects of one cluster. To be used from one event loop; no method but `changed` awaits."""

    def __init__(self, journal: Path | None = None) -> None:
        self.version = 0
        self._objects: dict[str, dict[Key, Object]] = {}
        self._history: dict[str, deque[Event]] = {}
        self._forgotten: dict[str, int] = {}
        self._changed: dict[str, asyncio.Event] = {}
        self._listeners: list[Listener] = []
        self._journal = _Journal(journal) if journal else None
        if self._journal:
            self.version, self._objects = self._journal.load()
        self._first_version = self.version

    def close(self) -> None:
        """Close the journal."""
        if self._journal:
            self._journal.close()

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """One object, not to be changed."""
        return self._objects.get(kind, {}).get((namespace, name))

    def objects(self, kind: str, namespace: str | None = None) -> list[Object]:
        """Objects in order of namespace and name; None is all namespaces."""
        objects = self._objects.get(kind, {})
        return [objects[key] for key in sorted(objects) if namespace is None or key[0] == namespace]

    def kinds(self) -> list[str]:
        """Kinds that ever had an object here."""
        return list(self._objects)

    def put(self, kind: str, obj: Object) -> Object:
        """Create or replace; returns the object with its new resourceVersion."""
        self.version += 1
        obj = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self.version)}}
        key = _key(obj)
        old = self._objects.get(kind, {}).get(key)
        self._objects.setdefault(kind, {})[key] = obj
        self._record({"kind": kind, "object": obj})
        self._publish(kind, Event(self.version, "MODIFIED" if old else "ADDED", obj, old))
        return obj

    def remove(self, kind: str, obj: Object) -> Object:
        """Delete; `obj` is the last state, which watchers get with the version of the deletion."""
        self.version += 1
        obj = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self.version)}}
        key = _key(obj)
        old = self._objects[kind].pop(key)
        self._record({"kind": kind, "deleted": key, "version": self.version})
        self._publish(kind, Event(self.version, "DELETED", obj, old))
        return obj

    def events_since(self, kind: str, version: int) -> list[Event]:
        """What happened to a kind after a version."""
        oldest = self._forgotten.get(kind, self._first_version)
        if version < oldest:
            raise Expired(oldest)
        events: list[Event] = []
        for event in reversed(self._history.get(kind, ())):
            if event.version <= version:
                break
            events.append(event)
        return events[::-1]

    async def changed(self, kind: str) -> None:
        """Wait for the next write to a kind."""
        await self._changed.setdefault(kind, asyncio.Event()).wait()

    def listen(self, listener: Listener) -> None:
        """Call back on every write, at once; a listener only takes notes, it does not write."""
        self._listeners.append(listener)

    def _record(self, line: Object) -> None:
        if self._journal:
            self._journal.append(line)
            if self._journal.lines > COMPACT_AFTER:
                self._journal.rewrite(self.version, self._objects)

    def _publish(self, kind: str, event: Event) -> None:
        history = self._history.setdefault(kind, deque())
        history.append(event)
        while len(history) > HISTORY:
            self._forgotten[kind] = history.popleft().version
        waiting = self._changed.pop(kind, None)
        if waiting:
            waiting.set()
        for listener in self._listeners:
            listener(kind, event)


def _key(obj: Object) -> Key:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


class _Journal:
    """One line for each write; rewritten as a snapshot at each start and when it has grown long."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self.lines = 0

    def load(self) -> tuple[int, dict[str, dict[Key, Object]]]:
        """Everything that was written; then the journal is open for more."""
        version, objects = self._replay() if self._path.exists() else (0, {})
        self.rewrite(version, objects)
        return version, objects

    def append(self, line: Object) -> None:
        """Hand one line to the kernel."""
        os.write(self._fd, json.dumps(line).encode() + b"\n")
        self.lines += 1

    def rewrite(self, version: int, objects: dict[str, dict[Key, Object]]) -> None:
        """Replace the journal by a snapshot; a kill leaves either the old or the new one."""
        snapshot = self._path.with_suffix(".new")
        # Secrets are in it.
        with os.fdopen(os.open(snapshot, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(json.dumps({"version": version}) + "\n")
            for kind, by_key in objects.items():
                file.writelines(json.dumps({"kind": kind, "object": obj}) + "\n" for obj in by_key.values())
            file.flush()
            os.fsync(file.fileno())
        snapshot.replace(self._path)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self.lines = 0

    def close(self) -> None:
        os.close(self._fd)

    def _replay(self) -> tuple[int, dict[str, dict[Key, Object]]]:
        version = 0
        objects: dict[str, dict[Key, Object]] = {}
        with self._path.open() as file:
            for line in file:
                if not line.endswith("\n"):
                    break
                record = json.loads(line)
                if "object" in record:
                    obj = record["object"]
                    objects.setdefault(record["kind"], {})[_key(obj)] = obj
                    version = max(version, int(obj["metadata"]["resourceVersion"]))
                    continue
                version = max(version, record["version"])
                if "deleted" in record:
                    namespace, name = record["deleted"]
                    objects[record["kind"]].pop((namespace, name), None)
        return version, objects
