"""The one node of a local cluster, and which pods fit on it.

Only extended resources such as GPUs are counted: a laptop is not to refuse a pod for the memory it asks for.
"""

from __future__ import annotations

import asyncio
import os
import platform
from dataclasses import dataclass, field

from finetune_operator.local.affinity import refusal
from finetune_operator.local.apiserver.api import Api, timestamp
from finetune_operator.local.apiserver.store import Object

NODE = "local"
GPU = "nvidia.com/gpu"
_TERMINAL = ("Succeeded", "Failed")


@dataclass(frozen=True)
class Hardware:
    """The GPUs of this machine."""

    gpus: int = 0
    gpu_labels: dict[str, str] = field(default_factory=dict)
    """What GPU feature discovery would say of them."""


async def detect() -> Hardware:
    """Ask nvidia-smi; without it there are no GPUs."""
    query = ("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
    try:
        process = await asyncio.create_subprocess_exec(
            "nvidia-smi", *query, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError:
        return Hardware()
    output, _ = await process.communicate()
    lines = output.decode().splitlines() if process.returncode == 0 else []
    if not lines:
        return Hardware()
    name, _, memory = lines[0].rpartition(",")
    labels = {
        "nvidia.com/gpu.count": str(len(lines)),
        "nvidia.com/gpu.product": name.strip().replace(" ", "-"),
        "nvidia.com/gpu.memory": memory.strip(),
    }
    return Hardware(len(lines), labels)


def node_object(api: Api, hardware: Hardware) -> Object:
    """The Node that stands for this machine."""
    now = timestamp(api.now())
    resources = {"cpu": str(os.cpu_count() or 1), "pods": "110"}
    if hardware.gpus:
        resources[GPU] = str(hardware.gpus)
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": NODE,
            "labels": {
                "kubernetes.io/hostname": NODE,
                "kubernetes.io/os": platform.system().lower(),
                "kubernetes.io/arch": platform.machine(),
                **hardware.gpu_labels,
            },
        },
        "spec": {},
        "status": {
            "capacity": resources,
            "allocatable": resources,
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}, {"type": "Hostname", "address": NODE}],
            "conditions": [
                {
                    "type": "Ready",
                    "status": "True",
                    "lastHeartbeatTime": now,
                    "lastTransitionTime": now,
                    "reason": "KubeletReady",
                    "message": "the runner of local pods is ready",
                }
            ],
        },
    }


def requested(pod: Object) -> dict[str, int]:
    """Extended resources that a pod asks for."""
    total: dict[str, int] = {}
    for container in pod["spec"]["containers"]:
        for name, amount in container["resources"].get("requests", {}).items():
            if "/" in name:
                total[name] = total.get(name, 0) + int(amount)
    return total


def lacking(pod: Object, others: list[Object], hardware: Hardware) -> list[str]:
    """Names of the resources of which not enough is free for a pod beside others."""
    free = {GPU: hardware.gpus}
    for other in others:
        for name, amount in requested(other).items():
            free[name] = free.get(name, 0) - amount
    return sorted(name for name, amount in requested(pod).items() if amount > free.get(name, 0))


def obstacles(api: Api, pod: Object, hardware: Hardware) -> list[str]:
    """Why a pod cannot run on the node now, in the scheduler's words."""
    node = api.find(api.resource("", "v1", "nodes"), "", NODE)
    if node and node.get("spec", {}).get("unschedulable"):
        return ["1 node(s) were unschedulable"]
    labels = node["metadata"].get("labels", {}) if node else {}
    here = [other for other in api.objects(api.pods) if _is_here(other)]
    if reason := refusal(pod, labels, here):
        return [reason]
    return [f"1 Insufficient {name}" for name in lacking(pod, here, hardware)]


def _is_here(pod: Object) -> bool:
    return pod["spec"].get("nodeName") == NODE and pod["status"].get("phase") not in _TERMINAL


def unschedulable_message(reasons: list[str]) -> str:
    """What the scheduler says of a pod that fits on no node."""
    return (
        f"0/1 nodes are available: {', '.join(reasons)}. no new claims to deallocate, preemption: "
        "0/1 nodes are available: 1 Preemption is not helpful for scheduling."
    )


def unschedulable_condition(api: Api, message: str) -> Object:
    """The PodScheduled condition of a pod that fits on no node."""
    return {
        "type": "PodScheduled",
        "status": "False",
        "lastProbeTime": None,
        "lastTransitionTime": timestamp(api.now()),
        "reason": "Unschedulable",
        "message": message,
    }
