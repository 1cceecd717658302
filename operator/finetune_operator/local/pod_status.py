"""The status of a pod, derived from the states of its containers, as a kubelet writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune_operator.local.apiserver.api import timestamp
from finetune_operator.local.apiserver.store import Object

MAX_MESSAGE = 4096
"""Bytes of the termination message that are kept: the last ones."""
MAX_LOG_MESSAGE = 2048


@dataclass
class ContainerState:
    """What a container is doing."""

    state: Object
    """One of waiting, running and terminated."""
    restarts: int = 0
    last: Object = field(default_factory=dict)
    """The state before the restart."""

    @property
    def exit_code(self) -> int | None:
        code: int | None = self.state.get("terminated", {}).get("exitCode")
        return code


def waiting(reason: str, message: str = "") -> Object:
    return {"waiting": {"reason": reason, **({"message": message} if message else {})}}


def running(now: datetime) -> Object:
    return {"running": {"startedAt": timestamp(now)}}


def terminated(exit_code: int, reason: str, started: str, now: datetime, message: str = "") -> Object:
    shown = {"message": message} if message else {}
    return {
        "terminated": {
            "exitCode": exit_code,
            "reason": reason,
            "startedAt": started,
            "finishedAt": timestamp(now),
            **shown,
        }
    }


def termination_message(container: Object, file: Path, log: Path, exit_code: int) -> str:
    """The end of what the container wrote for its owner; a longer text loses its head."""
    message = _tail(file, MAX_MESSAGE)
    if not message and exit_code and container["terminationMessagePolicy"] == "FallbackToLogsOnError":
        return _tail(log, MAX_LOG_MESSAGE)
    return message


def _tail(path: Path, size: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - size, 0))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def pod_status(
    pod: Object, states: Mapping[str, ContainerState], ip: str, now: datetime, *, over: bool = False
) -> Object:
    """The whole status. Conditions of others, such as DisruptionTarget, stay. The phase becomes a terminal one only
    when the pod is over: as with a kubelet, its last container may be seen terminated a moment before."""
    spec, old = pod["spec"], pod["status"]
    names = [container["name"] for container in spec["containers"]]
    phase = _phase(spec, states, over=over)
    status: Object = {
        **old,
        "phase": phase,
        "startTime": old.get("startTime", timestamp(now)),
        "hostIP": "127.0.0.1",
        "hostIPs": [{"ip": "127.0.0.1"}],
        "podIP": ip,
        "podIPs": [{"ip": ip}],
        "containerStatuses": [_container_status(pod, container, states) for container in spec["containers"]],
    }
    if spec.get("initContainers"):
        status["initContainerStatuses"] = [
            _container_status(pod, container, states, is_init=True) for container in spec["initContainers"]
        ]
    status["conditions"] = _conditions(pod, phase, names, states, now)
    return status


def _phase(spec: Object, states: Mapping[str, ContainerState], *, over: bool) -> str:
    everything = [*spec.get("initContainers", ()), *spec["containers"]]
    if over:
        return "Failed" if any(states[container["name"]].exit_code for container in everything) else "Succeeded"
    containers = [states[container["name"]] for container in spec["containers"]]
    started = any("waiting" not in item.state or item.restarts for item in containers)
    return "Running" if started else "Pending"


def _container_status(
    pod: Object, container: Object, states: Mapping[str, ContainerState], *, is_init: bool = False
) -> Object:
    item = states[container["name"]]
    identity = f"local://{pod['metadata']['uid']}/{container['name']}"
    is_running = "running" in item.state
    status: Object = {
        "name": container["name"],
        "image": container["image"],
        "imageID": "",
        "state": item.state,
        "lastState": item.last,
        "ready": item.exit_code == 0 if is_init else is_running,
        "started": is_running,
        "restartCount": item.restarts,
    }
    return status if "waiting" in item.state else {**status, "containerID": identity}


def _conditions(
    pod: Object, phase: str, names: list[str], states: Mapping[str, ContainerState], now: datetime
) -> list[Object]:
    unready = [name for name in names if "running" not in states[name].state]
    ready: dict[str, Any] = {"status": "False" if unready else "True"}
    initialised: dict[str, Any] = {"status": "True"}
    if phase == "Succeeded":
        ready["reason"] = initialised["reason"] = "PodCompleted"
    elif phase == "Failed":
        ready["reason"] = "PodFailed"
    elif unready:
        ready |= {
            "reason": "ContainersNotReady",
            "message": f"containers with unready status: [{' '.join(unready)}]",
        }
    pending = [item["name"] for item in pod["spec"].get("initContainers", ()) if states[item["name"]].exit_code != 0]
    if pending and phase == "Pending":
        shown = f"containers with incomplete status: [{' '.join(pending)}]"
        initialised = {"status": "False", "reason": "ContainersNotInitialized", "message": shown}
    wanted = {
        "PodReadyToStartContainers": {"status": "False" if phase in ("Succeeded", "Failed") else "True"},
        "Initialized": initialised,
        "Ready": ready,
        "ContainersReady": ready,
    }
    old = {condition["type"]: condition for condition in pod["status"].get("conditions", ())}
    result = [_condition(kind, what, old.get(kind), now) for kind, what in wanted.items()]
    return [*result, *(condition for kind, condition in old.items() if kind not in wanted)]


def _condition(kind: str, what: Mapping[str, Any], old: Object | None, now: datetime) -> Object:
    changed = old is None or old["status"] != what["status"]
    since = timestamp(now) if changed or old is None else old["lastTransitionTime"]
    return {"type": kind, "lastProbeTime": None, "lastTransitionTime": since, **what}
