"""The pod of an attempt, which the `restricted` Pod Security profile admits whatever a job says. Pure.

What a job's podTemplate adds comes last and replaces nothing of the operator's own: the API's rules refuse its names.
"""

from __future__ import annotations

import zlib
from typing import Any

from finetune_api.names import (
    AGENT_PORT,
    AGENT_PORT_NAME,
    CA_FILE,
    CA_MOUNT,
    CACHE_MOUNT,
    CONTAINER,
    DOCUMENT_FILE,
    DOCUMENT_MOUNT,
    ENV_CA_BUNDLE,
    ENV_DOCUMENT,
    ENV_MAIN_ADDRESS,
    ENV_MAIN_PORT,
    ENV_MODEL_CACHE,
    ENV_NODE_NAME,
    ENV_POD_IP,
    ENV_POD_NAME,
    ENV_TERMINATION_PATH,
    ENV_WORK_DIR,
    TERMINATION_PATH,
    WORK_MOUNT,
    Stage,
)
from finetune_api.pod import CABundle, Capacity, ModelCache, Placement, Scheduling
from finetune_api.spec import FineTuneJobSpec, GPUAllocation, Resources
from finetune_api.status import FineTuneJobStatus, Resolved
from finetune_operator import sizes
from finetune_operator.config import Settings

PREPARE_GRACE_SECONDS = 30
"""Prepare and export have nothing to save when they are stopped; they begin again."""
IMAGE_USER = 65532
"""User and group of the trainer's image."""


def build(
    spec: FineTuneJobSpec, status: FineTuneJobStatus, stage: Stage, document: str, settings: Settings, first: str = ""
) -> dict[str, Any]:
    """The spec of the pods that run one attempt of a stage.

    Args:
        document: name of the attempt's ConfigMap.
        first: host name of the first of several pods, below the Service that gives it to them; empty for one pod.
    """
    template = spec.pod_template
    is_train = stage is Stage.TRAIN
    asked = sizes.asked(spec, stage)
    volumes: dict[str, dict[str, Any]] = {
        "document": {"configMap": {"name": document}},
        "work": _work_volume(spec, status, stage),
        "tmp": {"emptyDir": {}},
    }
    mounts = {"document": DOCUMENT_MOUNT, "work": WORK_MOUNT, "tmp": "/tmp"}
    if is_train:
        volumes["shm"] = {"emptyDir": {"medium": "Memory", "sizeLimit": spec.resources.shared_memory}}
        mounts["shm"] = "/dev/shm"
    if spec.storage.ca_bundle:
        volumes["ca-bundle"] = _ca_volume(spec.storage.ca_bundle)
        mounts["ca-bundle"] = CA_MOUNT
    if cache := _model_cache(spec, stage):
        volumes["model-cache"] = {"persistentVolumeClaim": {"claimName": cache.claim_name}}
        mounts["model-cache"] = CACHE_MOUNT
    volume_mounts: list[dict[str, Any]] = [
        {"name": name, "mountPath": path} | ({"readOnly": True} if path.startswith("/etc/") else {})
        for name, path in mounts.items()
    ]
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": image(spec, settings),
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["finetune-trainer", "agent"],
        "env": _environment(spec, stage, settings, _meeting_place(first) if first else {}),
        "ports": [{"name": AGENT_PORT_NAME, "containerPort": AGENT_PORT}],
        "resources": _resources(spec, status, stage),
        "terminationMessagePath": TERMINATION_PATH,
        "volumeMounts": volume_mounts + [mount.to_json_dict() for mount in template.volume_mounts or []],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    if spec.storage.secret_ref:
        container["envFrom"] = [{"secretRef": {"name": spec.storage.secret_ref.name}}]
    own = [{"name": name, **source} for name, source in volumes.items()]
    grace = spec.checkpoint.grace_period_seconds if is_train else PREPARE_GRACE_SECONDS
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": own + [volume.to_json_dict() for volume in template.volumes or []],
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": _security_context(spec, stage),
        "terminationGracePeriodSeconds": grace,
    }
    if first:
        pod["subdomain"] = first.partition(".")[2]
    if spec.storage.service_account_name:
        pod["serviceAccountName"] = spec.storage.service_account_name
    pull_secrets = [*settings.image_pull_secrets, *(secret.name for secret in template.image_pull_secrets or [])]
    if pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in dict.fromkeys(pull_secrets)]
    if is_train and spec.resources.resource_claims:
        pod["resourceClaims"] = [claim.to_json_dict() for claim in spec.resources.resource_claims]
    return pod | _placement(spec.scheduling if isinstance(asked, Resources) else asked, spec, settings)


def image(spec: FineTuneJobSpec, settings: Settings) -> str:
    """The image of the job's pods."""
    return spec.pod_template.image or settings.trainer_image


# What is in the pod


def _meeting_place(host: str) -> dict[str, str]:
    """Where the training processes of several pods meet: at the first pod."""
    # In a cluster every pod has all ports to itself. Where all pods share a machine, no two attempts may meet at one.
    port = 20_000 + zlib.crc32(host.encode()) % 10_000
    return {ENV_MAIN_ADDRESS: host, ENV_MAIN_PORT: str(port)}


def _environment(
    spec: FineTuneJobSpec, stage: Stage, settings: Settings, meeting_place: dict[str, str]
) -> list[dict[str, Any]]:
    own = [
        {"name": ENV_DOCUMENT, "value": f"{DOCUMENT_MOUNT}/{DOCUMENT_FILE}"},
        {"name": ENV_WORK_DIR, "value": WORK_MOUNT},
        {"name": ENV_TERMINATION_PATH, "value": TERMINATION_PATH},
        {"name": "HOME", "value": "/tmp"},
        _field(ENV_POD_NAME, "metadata.name"),
        _field(ENV_POD_IP, "status.podIP"),
        _field(ENV_NODE_NAME, "spec.nodeName"),
        *({"name": name, "value": value} for name, value in meeting_place.items()),
    ]
    if spec.storage.ca_bundle:
        own.append({"name": ENV_CA_BUNDLE, "value": f"{CA_MOUNT}/{CA_FILE}"})
    if _model_cache(spec, stage):
        own.append({"name": ENV_MODEL_CACHE, "value": CACHE_MOUNT})
    asked = [variable.to_json_dict() for variable in spec.pod_template.env or []]
    named = {variable["name"] for variable in asked}
    proxies = {
        "HTTP_PROXY": settings.http_proxy,
        "HTTPS_PROXY": settings.https_proxy,
        "NO_PROXY": settings.no_proxy,
    }
    # Two variables of one name would be refused, or the last one taken: it depends on who looks.
    own += [{"name": name, "value": value} for name, value in proxies.items() if value and name not in named]
    return own + asked


def _field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _ca_volume(bundle: CABundle) -> dict[str, Any]:
    if bundle.config_map_key_ref:
        reference, kind, name = bundle.config_map_key_ref, "configMap", "name"
    else:
        assert bundle.secret_key_ref is not None, "the API takes one of the two"
        reference, kind, name = bundle.secret_key_ref, "secret", "secretName"
    return {kind: {name: reference.name, "items": [{"key": reference.key, "path": CA_FILE}]}}


def _model_cache(spec: FineTuneJobSpec, stage: Stage) -> ModelCache | None:
    """The cache, where weights are read: prepare reads no more than their headers."""
    return None if stage is Stage.PREPARE else spec.storage.model_cache


def _work_volume(spec: FineTuneJobSpec, status: FineTuneJobStatus, stage: Stage) -> dict[str, Any]:
    """The disk of the pod: the node's, or a volume that Kubernetes makes and removes with the pod."""
    asked = sizes.asked(spec, stage)
    if not asked.storage_class_name:
        return {"emptyDir": {}}
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": asked.storage_class_name,
        "resources": {"requests": {"storage": sizes.disk(spec, status, stage)}},
    }
    return {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}


def _security_context(spec: FineTuneJobSpec, stage: Stage) -> dict[str, Any]:
    context = spec.pod_template.security_context
    chosen: dict[str, Any] = context.to_json_dict() if context else {}
    if sizes.asked(spec, stage).storage_class_name or _model_cache(spec, stage):
        # A new volume belongs to root; the node's own disk is open to all processes of the pod. To change the owner of
        # all files of a large cache again and again would take minutes.
        chosen = {"fsGroup": IMAGE_USER, "fsGroupChangePolicy": "OnRootMismatch"} | chosen
    return {**chosen, "runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


# Where it runs


def _placement(placement: Placement, spec: FineTuneJobSpec, settings: Settings) -> dict[str, Any]:
    tolerations = [toleration.to_json_dict() for toleration in placement.tolerations]
    affinity: dict[str, Any] = {}
    if isinstance(placement, Scheduling):
        affinity = _affinity(placement, spec.resources, settings)
        if placement.capacity is Capacity.SPOT:
            tolerations += [
                {"key": label, "operator": "Equal", "value": value} for label, value in pairs(settings.spot_labels)
            ]
    fields = {
        "nodeSelector": placement.node_selector,
        "tolerations": tolerations,
        "affinity": affinity,
        "priorityClassName": placement.priority_class_name,
        "runtimeClassName": placement.runtime_class_name,
        "schedulerName": placement.scheduler_name,
    }
    return {name: value for name, value in fields.items() if value}


def _affinity(scheduling: Scheduling, resources: Resources, settings: Settings) -> dict[str, Any]:
    """The job's own affinity, and what gpuTypes and capacity ask for, which must hold in each of its alternatives."""
    affinity: dict[str, Any] = scheduling.affinity.to_json_dict() if scheduling.affinity else {}
    node = affinity.get("nodeAffinity", {})
    required = node.get("requiredDuringSchedulingIgnoredDuringExecution", {"nodeSelectorTerms": []})
    own = [term["matchExpressions"] for term in required["nodeSelectorTerms"]] or [[]]
    always = []
    if scheduling.gpu_types:
        label = gpu_type_label(resources.gpu_resource_name, settings)
        always.append({"key": label, "operator": "In", "values": scheduling.gpu_types})
    alternatives = _capacity(scheduling.capacity, settings)
    terms = [[*expressions, *always, *capacity] for expressions in own for capacity in alternatives]
    if terms != [[]]:
        node["requiredDuringSchedulingIgnoredDuringExecution"] = {
            "nodeSelectorTerms": [{"matchExpressions": expressions} for expressions in terms]
        }
    return affinity | ({"nodeAffinity": node} if node else {})


def _capacity(capacity: Capacity, settings: Settings) -> list[list[dict[str, Any]]]:
    """Alternatives of requirements on a node. Each cloud marks its spot nodes with a label of its own, so that a spot
    node has one of them, and any other node, which may have a label that says so or none at all, has no one."""
    labels = pairs(settings.spot_labels)
    if capacity is Capacity.SPOT:
        return [[{"key": label, "operator": "In", "values": [value]}] for label, value in labels]
    if capacity is Capacity.ON_DEMAND:
        return [[{"key": label, "operator": "NotIn", "values": [value]} for label, value in labels]]
    return [[]]


def gpu_type_label(resource_name: str, settings: Settings) -> str:
    """The label in which nodes say the product name of their GPUs."""
    vendor = resource_name.partition("/")[0]
    return dict(pairs(settings.gpu_type_labels)).get(vendor, f"{vendor}/gpu.product")


def pairs(settings: tuple[str, ...]) -> list[tuple[str, str]]:
    """("a=b",) becomes [("a", "b")]."""
    return [(left, right) for left, _, right in (item.partition("=") for item in settings)]


# What it asks for


def _resources(spec: FineTuneJobSpec, status: FineTuneJobStatus, stage: Stage) -> dict[str, Any]:
    asked = sizes.asked(spec, stage)
    requests = {"memory": sizes.memory(spec, status, stage)}
    limits = dict(requests)
    resources: dict[str, Any] = {"requests": requests, "limits": limits}
    if isinstance(asked, Resources):
        gpus = asked.gpus_per_node
        requests["cpu"] = asked.cpu or str(4 * gpus or 1)
        if gpus and asked.gpu_allocation is GPUAllocation.DEVICE_PLUGIN:
            requests[asked.gpu_resource_name] = limits[asked.gpu_resource_name] = str(gpus)
        if asked.resource_claims:
            resources["claims"] = [{"name": claim.name} for claim in asked.resource_claims]
    else:
        requests["cpu"] = asked.cpu
    size = sizes.disk(spec, status, stage)
    if not asked.storage_class_name and sizes.quantity_bytes(size):
        requests["ephemeral-storage"] = size
        if asked.ephemeral_storage:
            # Only a size that somebody chose is a limit: a pod that exceeds it is killed, and an estimate may be wrong.
            limits["ephemeral-storage"] = size
    return resources


def resolved(spec: FineTuneJobSpec, status: FineTuneJobStatus, stage: Stage) -> Resolved | None:
    """What is known of the job, and what the pod of a stage asks for."""
    if stage is Stage.PREPARE:
        return status.resolved
    asked = {
        f"{stage}_memory": sizes.memory(spec, status, stage),
        f"{stage}_ephemeral_storage": sizes.disk(spec, status, stage),
    }
    return (status.resolved or Resolved()).model_copy(update=asked)
