"""Kubernetes Events: what `kubectl describe` shows of an object's life."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import OrderedDict
from typing import Any, Literal

from finetune_operator.local.apiserver.api import Api, timestamp
from finetune_operator.local.apiserver.errors import ApiError
from finetune_operator.local.apiserver.store import Object

_REMEMBERED = 512
"""Different events of which a repetition is counted instead of stored anew."""


class EventRecorder:
    """Records events of one component."""

    def __init__(self, api: Api, component: str) -> None:
        self._api = api
        self._component = component
        self._names: OrderedDict[tuple[str, ...], str] = OrderedDict()
        # Like the real recorder's nanoseconds; counting on keeps names unique where the clock stands still.
        self._serial = itertools.count(time.time_ns())

    def record(self, about: Object, type: Literal["Normal", "Warning"], reason: str, message: str) -> None:
        """Say that something happened to an object. Never raises: a namespace may be on its way out."""
        now = timestamp(self._api.now())
        metadata = about["metadata"]
        namespace = metadata.get("namespace", "default")
        identity = (namespace, metadata["uid"], type, reason, message)
        name = self._names.get(identity)
        with contextlib.suppress(ApiError):
            if name and self._api.find(self._api.events, namespace, name):
                self._api.update(self._api.events, namespace, name, lambda event: _again(event, now))
                return
            event = self._api.create(self._api.events, namespace, self._event(about, type, reason, message, now))
            self._names[identity] = event["metadata"]["name"]
            if len(self._names) > _REMEMBERED:
                self._names.popitem(last=False)

    def _event(self, about: Object, type: str, reason: str, message: str, now: str) -> Object:
        metadata = about["metadata"]
        involved: dict[str, Any] = {"kind": about["kind"], "apiVersion": about["apiVersion"]}
        involved |= {key: metadata[key] for key in ("namespace", "name", "uid", "resourceVersion") if key in metadata}
        return {
            "metadata": {"name": f"{metadata['name']}.{next(self._serial):x}"},
            "involvedObject": involved,
            "reason": reason,
            "message": message,
            "source": {"component": self._component},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "type": type,
            "reportingComponent": self._component,
            "reportingInstance": "",
        }


def _again(event: Object, now: str) -> Object:
    return {**event, "count": event["count"] + 1, "lastTimestamp": now}
