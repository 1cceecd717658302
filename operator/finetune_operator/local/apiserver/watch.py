"""Watches: a cursor over the history of a kind, filtered as the client asked.

A watcher owns no queue. It reads the shared, bounded history from its own position, so that a client that does not read
costs nothing but its connection; one that falls behind the history is told to list again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from finetune_operator.local.apiserver.errors import expired
from finetune_operator.local.apiserver.resources import Resource
from finetune_operator.local.apiserver.selection import Predicate
from finetune_operator.local.apiserver.store import Event, Expired, Object, Store

BOOKMARK_SECONDS = 30.0
"""How often a quiet watch is told how far the history is, so that it can resume without listing."""


@dataclass(frozen=True)
class WatchOptions:
    """What a client asked for."""

    matches: Predicate
    """Selectors and namespace together."""
    version: int | None
    """Where to start; None is the present state, replayed as ADDED."""
    initial_events: bool
    """Whether the present state comes first and ends with a marked bookmark (`sendInitialEvents`)."""
    bookmarks: bool
    timeout_seconds: float


async def watch(store: Store, resource: Resource, options: WatchOptions) -> AsyncGenerator[dict[str, Any], None]:
    """Watch events as they go over the wire, until the timeout or the history runs out."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + options.timeout_seconds
    version = options.version
    if options.initial_events or version is None:
        version = store.version
        for obj in store.objects(resource.key):
            if options.matches(obj):
                yield {"type": "ADDED", "object": obj}
        if options.initial_events and options.bookmarks:
            yield _bookmark(resource, version, initial=True)
    while True:
        try:
            events = store.events_since(resource.key, version)
        except Expired as error:
            yield {"type": "ERROR", "object": expired(version, error.oldest).status()}
            return
        # Everything up to here has been looked at, also what happened to other kinds.
        version = max(version, store.version)
        for event in events:
            seen = _seen(event, options.matches)
            if seen:
                yield seen
        if store.version > version:
            continue
        wait = min(BOOKMARK_SECONDS, deadline - loop.time())
        try:
            async with asyncio.timeout(max(wait, 0)):
                await store.changed(resource.key)
        except TimeoutError:
            if options.bookmarks:
                yield _bookmark(resource, version)
            if loop.time() >= deadline:
                return


def _seen(event: Event, matches: Predicate) -> dict[str, Any] | None:
    """The event as a client with this selection sees it: leaving the selection is a deletion, entering an addition."""
    before = event.old is not None and matches(event.old)
    after = event.type != "DELETED" and matches(event.object)
    if before and after:
        return {"type": "MODIFIED", "object": event.object}
    if after:
        return {"type": "ADDED", "object": event.object}
    if before and event.type == "DELETED":
        return {"type": "DELETED", "object": event.object}
    if before and event.old is not None:
        return {"type": "DELETED", "object": _at_version(event.old, event.version)}
    return None


def _at_version(obj: Object, version: int) -> Object:
    return {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(version)}}


def _bookmark(resource: Resource, version: int, *, initial: bool = False) -> dict[str, Any]:
    metadata: dict[str, Any] = {"resourceVersion": str(version), "creationTimestamp": None}
    if initial:
        metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
    return {
        "type": "BOOKMARK",
        "object": {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata},
    }
