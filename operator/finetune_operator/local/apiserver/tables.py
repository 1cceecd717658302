"""The tables that `kubectl get` prints: the server makes them, so that a client need not know the kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, Literal

from finetune_operator.local.apiserver.resources import Resource
from finetune_operator.local.apiserver.store import Object

IncludeObject = Literal["None", "Metadata", "Object"]
_Cell = Callable[[Object, datetime], Any]


def table(
    resource: Resource,
    objects: list[Object],
    metadata: Mapping[str, Any],
    now: datetime,
    include: IncludeObject = "Metadata",
    *,
    with_columns: bool = True,
) -> dict[str, Any]:
    """A `meta.k8s.io/v1` Table. In a watch only the first event needs the columns."""
    columns = _columns(resource)
    definitions = [definition for definition, _ in columns] if with_columns else None
    rows = [{"cells": [cell(obj, now) for _, cell in columns], "object": _included(obj, include)} for obj in objects]
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": dict(metadata),
        "columnDefinitions": definitions,
        "rows": rows,
    }


def _included(obj: Object, include: IncludeObject) -> Object | None:
    match include:
        case "None":
            return None
        case "Object":
            return obj
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]}


def _columns(resource: Resource) -> list[tuple[dict[str, Any], _Cell]]:
    if resource.key == "events":
        return _BUILTIN["events"]
    columns = [_column("Name", _name, format="name")]
    if resource.columns is not None:
        for column in resource.columns:
            definition = _definition(
                column["name"],
                column["type"],
                column.get("format", ""),
                column.get("description", ""),
                column.get("priority", 0),
            )
            columns.append((definition, _custom_cell(column["type"], column["jsonPath"])))
        return columns
    return columns + _BUILTIN.get(resource.key, [_AGE])


def _definition(name: str, kind: str, format: str = "", description: str = "", priority: int = 0) -> dict[str, Any]:
    return {"name": name, "type": kind, "format": format, "description": description, "priority": priority}


def _column(
    name: str, cell: _Cell, kind: str = "string", *, format: str = "", priority: int = 0
) -> tuple[dict[str, Any], _Cell]:
    return _definition(name, kind, format, "", priority), cell


def _path(path: str, default: Any = "<none>") -> _Cell:
    def cell(obj: Object, now: datetime) -> Any:
        value = _value(obj, path)
        return default if value is None else value

    return cell


def _value(obj: Object, path: str) -> Any:
    value: Any = obj
    for step in path.strip(".").split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _custom_cell(kind: str, json_path: str) -> _Cell:
    def cell(obj: Object, now: datetime) -> Any:
        value = _value(obj, json_path)
        return _since(value, now) if kind == "date" and value is not None else value

    return cell


def _name(obj: Object, now: datetime) -> str:
    name: str = obj["metadata"]["name"]
    return name


def _age(obj: Object, now: datetime) -> str:
    return _since(obj["metadata"]["creationTimestamp"], now)


def _since(timestamp: str, now: datetime) -> str:
    try:
        return human_duration(now - datetime.fromisoformat(timestamp))
    except ValueError:
        return "<unknown>"


def human_duration(span: timedelta) -> str:
    """A span as kubectl prints it: precise while it is short, coarse when it is long."""
    seconds = int(span.total_seconds())
    if seconds < -1:
        return "<invalid>"
    if seconds <= 0:
        return "0s"
    if seconds < 120:
        return f"{seconds}s"
    minutes = seconds // 60
    if minutes < 10:
        return f"{minutes}m{seconds % 60}s" if seconds % 60 else f"{minutes}m"
    if minutes < 180:
        return f"{minutes}m"
    hours = minutes // 60
    if hours < 8:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    if hours < 48:
        return f"{hours}h"
    days = hours // 24
    if days < 8:
        return f"{days}d{hours % 24}h" if hours % 24 else f"{days}d"
    if days < 730:
        return f"{days}d"
    years = days // 365
    return f"{years}y{days % 365}d" if years < 8 and days % 365 else f"{years}y"


def _length(field: str) -> _Cell:
    return lambda obj, now: len(obj.get(field) or {})


def _containers(obj: Object) -> list[Object]:
    statuses: list[Object] = obj["status"].get("containerStatuses", [])
    return statuses


def _pod_ready(obj: Object, now: datetime) -> str:
    return f"{sum(status['ready'] for status in _containers(obj))}/{len(obj['spec']['containers'])}"


def _pod_restarts(obj: Object, now: datetime) -> int:
    return sum(status["restartCount"] for status in _containers(obj))


def _pod_status(obj: Object, now: datetime) -> str:
    """The most telling word of phase, reason and container states."""
    status = obj["status"]
    word = status.get("reason") or status.get("phase", "Unknown")
    for item in status.get("initContainerStatuses", ()):
        state = item["state"]
        if "waiting" in state and state["waiting"].get("reason") not in (None, "PodInitializing"):
            word = f"Init:{state['waiting']['reason']}"
        elif state.get("terminated", {}).get("exitCode"):
            word = f"Init:{state['terminated'].get('reason', 'Error')}"
    for item in reversed(_containers(obj)):
        for state in ("waiting", "terminated"):
            reason = item["state"].get(state, {}).get("reason")
            if reason:
                word = reason
    if "deletionTimestamp" in obj["metadata"] and status.get("phase") not in ("Succeeded", "Failed"):
        return "Terminating"
    return str(word)


def _job_status(obj: Object, now: datetime) -> str:
    true = {item["type"] for item in obj["status"].get("conditions", ()) if item["status"] == "True"}
    for kind in ("Complete", "Failed"):
        if kind in true:
            return kind
    if "deletionTimestamp" in obj["metadata"]:
        return "Terminating"
    for kind in ("Suspended", "FailureTarget", "SuccessCriteriaMet"):
        if kind in true:
            return kind
    return "Running"


def _job_completions(obj: Object, now: datetime) -> str:
    spec, succeeded = obj["spec"], obj["status"].get("succeeded", 0)
    if "completions" in spec:
        return f"{succeeded}/{spec['completions']}"
    return f"{succeeded}/1 of {spec['parallelism']}" if spec["parallelism"] > 1 else f"{succeeded}/1"


def _job_duration(obj: Object, now: datetime) -> str:
    status = obj["status"]
    if "startTime" not in status:
        return ""
    end = datetime.fromisoformat(status["completionTime"]) if "completionTime" in status else now
    return human_duration(end - datetime.fromisoformat(status["startTime"]))


def _template(field: str) -> _Cell:
    return lambda obj, now: ",".join(item[field] for item in obj["spec"]["template"]["spec"]["containers"])


def _selector(obj: Object, now: datetime) -> str:
    labels = obj["spec"].get("selector", {}).get("matchLabels", {})
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def _event_age(obj: Object, now: datetime) -> str:
    return _since(obj.get("lastTimestamp") or obj["metadata"]["creationTimestamp"], now)


def _event_object(obj: Object, now: datetime) -> str:
    return f"{obj['involvedObject'].get('kind', '').lower()}/{obj['involvedObject'].get('name', '')}"


def _node_status(obj: Object, now: datetime) -> str:
    ready = [item["status"] for item in obj["status"].get("conditions", ()) if item["type"] == "Ready"]
    return "Ready" if ready == ["True"] else "NotReady"


_AGE = _column("Age", _age)
_BUILTIN: dict[str, list[tuple[dict[str, Any], _Cell]]] = {
    "namespaces": [_column("Status", _path("status.phase")), _AGE],
    "nodes": [
        _column("Status", _node_status),
        _AGE,
        _column("Version", _path("status.nodeInfo.kubeletVersion")),
    ],
    "pods": [
        _column("Ready", _pod_ready),
        _column("Status", _pod_status),
        _column("Restarts", _pod_restarts),
        _AGE,
        _column("IP", _path("status.podIP"), priority=1),
        _column("Node", _path("spec.nodeName"), priority=1),
        _column("Nominated Node", _path("status.nominatedNodeName"), priority=1),
        _column("Readiness Gates", _path("spec.readinessGates"), priority=1),
    ],
    "configmaps": [_column("Data", _length("data")), _AGE],
    "secrets": [_column("Type", _path("type")), _column("Data", _length("data")), _AGE],
    "events": [
        _column("Last Seen", _event_age),
        _column("Type", _path("type", "")),
        _column("Reason", _path("reason", "")),
        _column("Object", _event_object),
        _column("Message", _path("message", "")),
    ],
    "services": [
        _column("Type", _path("spec.type", "ClusterIP")),
        _column("Cluster-IP", _path("spec.clusterIP")),
        _AGE,
    ],
    "persistentvolumeclaims": [
        _column("Status", _path("status.phase")),
        _column("Volume", _path("spec.volumeName", "")),
        _column("Capacity", _path("status.capacity.storage", "")),
        _AGE,
    ],
    "jobs.batch": [
        _column("Status", _job_status),
        _column("Completions", _job_completions),
        _column("Duration", _job_duration),
        _AGE,
        _column("Containers", _template("name"), priority=1),
        _column("Images", _template("image"), priority=1),
        _column("Selector", _selector, priority=1),
    ],
    "leases.coordination.k8s.io": [_column("Holder", _path("spec.holderIdentity")), _AGE],
    "customresourcedefinitions.apiextensions.k8s.io": [
        _column("Created At", _path("metadata.creationTimestamp"), "date"),
    ],
}
