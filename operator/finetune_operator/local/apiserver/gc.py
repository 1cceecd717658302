"""What the server cleans up by itself: dependents whose owner is gone, and the content of deleted namespaces.

Level-based: each round looks at everything there is. Rounds start when a write could have left something to do.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from finetune_operator.local.apiserver.api import (
    FOREGROUND_FINALIZER,
    ORPHAN_FINALIZER,
    Api,
    DeleteOptions,
)
from finetune_operator.local.apiserver.errors import ApiError
from finetune_operator.local.apiserver.resources import Resource
from finetune_operator.local.apiserver.store import Event, Object

logger = logging.getLogger(__name__)


class GarbageCollector:
    """Runs as a task until it is cancelled."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._wake = asyncio.Event()
        self._wake.set()
        api.store.listen(self._notice)

    def _notice(self, kind: str, event: Event) -> None:
        metadata = event.object["metadata"]
        if event.type == "DELETED" or "deletionTimestamp" in metadata or metadata.get("ownerReferences"):
            self._wake.set()

    async def run(self) -> None:
        """Sweep whenever there may be something to do."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            for resource, obj in self._everything():
                try:
                    self._sweep(resource, obj)
                except ApiError as error:
                    # This round has removed or changed it already; that write starts the next round.
                    logger.debug("%s %s: %s", resource.key, obj["metadata"]["name"], error)
                except Exception:
                    logger.exception("%s %s", resource.key, obj["metadata"]["name"])
            await asyncio.sleep(0)

    def _everything(self) -> list[tuple[Resource, Object]]:
        stored = [resource for resource in self._api.resources() if "list" in resource.verbs]
        return [(resource, obj) for resource in stored for obj in self._api.objects(resource)]

    def _sweep(self, resource: Resource, obj: Object) -> None:
        metadata = obj["metadata"]
        if "deletionTimestamp" in metadata:
            if resource is self._api.namespaces:
                self._empty_namespace(obj)
            elif resource is self._api.pods and _never_ran(obj):
                self._api.update_status(resource, obj, {**obj["status"], "phase": "Failed"})
            elif ORPHAN_FINALIZER in metadata.get("finalizers", ()):
                self._orphan(resource, obj)
            elif FOREGROUND_FINALIZER in metadata.get("finalizers", ()):
                self._delete_dependents(resource, obj)
        elif metadata.get("ownerReferences"):
            living = [item for item in metadata["ownerReferences"] if self._exists(item, metadata)]
            if not living:
                self._delete(resource, obj)
            elif living != metadata["ownerReferences"]:
                # One owner is enough to live on; a later orphaning by it must not meet the memory of the others.
                self._own(resource, obj, living)

    def _exists(self, reference: dict[str, Any], metadata: dict[str, Any]) -> bool:
        owner = self._api.by_kind(reference["apiVersion"], reference["kind"])
        if owner is None:
            # A kind that is not served cannot be looked up; like the real collector, leave its dependents alone.
            return True
        namespace = metadata.get("namespace", "") if owner.namespaced else ""
        found = self._api.find(owner, namespace, reference["name"])
        return found is not None and found["metadata"]["uid"] == reference["uid"]

    def _dependents(self, owner: Object) -> list[tuple[Resource, Object]]:
        uid = owner["metadata"]["uid"]
        return [
            (resource, obj)
            for resource, obj in self._everything()
            if any(reference["uid"] == uid for reference in obj["metadata"].get("ownerReferences", ()))
        ]

    def _orphan(self, resource: Resource, owner: Object) -> None:
        uid = owner["metadata"]["uid"]
        for kind, obj in self._dependents(owner):
            self._own(kind, obj, [item for item in obj["metadata"]["ownerReferences"] if item["uid"] != uid])
        self._remove_finalizer(resource, owner, ORPHAN_FINALIZER)

    def _own(self, resource: Resource, obj: Object, references: list[dict[str, Any]]) -> None:
        def change(stored: Object) -> Object:
            stored["metadata"]["ownerReferences"] = references
            return stored

        self._api.update(resource, obj["metadata"].get("namespace", ""), obj["metadata"]["name"], change)

    def _delete_dependents(self, resource: Resource, owner: Object) -> None:
        uid = owner["metadata"]["uid"]
        blocking = False
        for kind, obj in self._dependents(owner):
            if "deletionTimestamp" not in obj["metadata"]:
                self._delete(kind, obj, "Foreground")
            if self._api.find(kind, obj["metadata"].get("namespace", ""), obj["metadata"]["name"]):
                blocking |= any(
                    item["uid"] == uid and item.get("blockOwnerDeletion") for item in obj["metadata"]["ownerReferences"]
                )
        if not blocking:
            self._remove_finalizer(resource, owner, FOREGROUND_FINALIZER)

    def _remove_finalizer(self, resource: Resource, obj: Object, finalizer: str) -> None:
        def without_finalizer(obj: Object) -> Object:
            metadata = obj["metadata"]
            metadata["finalizers"] = [name for name in metadata.get("finalizers", ()) if name != finalizer]
            return obj

        self._api.update(resource, obj["metadata"].get("namespace", ""), obj["metadata"]["name"], without_finalizer)

    def _empty_namespace(self, namespace: Object) -> None:
        name = namespace["metadata"]["name"]
        content = [
            (resource, obj)
            for resource in self._api.resources()
            if resource.namespaced and "list" in resource.verbs
            for obj in self._api.objects(resource, name)
        ]
        for resource, obj in content:
            if "deletionTimestamp" not in obj["metadata"]:
                self._delete(resource, obj)
        if not content:
            self._api.finalize_namespace(namespace)

    def _delete(self, resource: Resource, obj: Object, propagation: str = "Background") -> None:
        metadata = obj["metadata"]
        options = DeleteOptions(propagation=propagation, uid=metadata["uid"])
        self._api.delete(resource, metadata.get("namespace", ""), metadata["name"], options)


def _never_ran(pod: Object) -> bool:
    """A deleted pod that is on no node has nobody who would say that it ended; a finalizer still holds it."""
    return "nodeName" not in pod["spec"] and pod["status"].get("phase") not in ("Succeeded", "Failed")
