"""The pod of an attempt, which the `restricted` Pod Security profile admits whatever a job says. Pure.

What a job's podTemplate adds comes last and replaces nothing of the operator's own: the API's rules refuse its names.
"""

from __future__ import annotations

import re
from typing import Any

from finetune_api.names import (
    AGENT_PORT,
    AGENT_PORT_NAME,
    CA_FILE,
    CA_MOUNT,
    CONTAINER,
    DOCUMENT_FILE,
    DOCUMENT_MOUNT,
    ENV_CA_BUNDLE,
    ENV_DOCUMENT,
    ENV_NODE_NAME,
    ENV_POD_IP,
    ENV_POD_NAME,
    ENV_TERMINATION_PATH,
    ENV_WORK_DIR,
    TERMINATION_PATH,
    WORK_MOUNT,
    Stage,
)
from finetune_api.pod import CABundle, Capacity, Placement, Scheduling
from finetune_api.spec import AdapterType, FineTuneJobSpec, GPUAllocation, OutputDtype, Resources, StageResources
from finetune_api.status import FineTuneJobStatus, Resolved
from finetune_operator.config import Settings

GIB = 1024**3
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}

PREPARE_GRACE_SECONDS = 30
"""Prepare and export have nothing to save when they are stopped; they begin again."""
IMAGE_USER = 65532
"""User and group of the trainer's image."""


def build(
    spec: FineTuneJobSpec, status: FineTuneJobStatus, stage: Stage, document_name: str, settings: Settings
) -> dict[str, Any]:
    """The spec of the pod that runs one attempt of a stage."""
    template = spec.pod_template
    is_train = stage is Stage.TRAIN
    asked = _asked(spec, stage)
    volumes: dict[str, dict[str, Any]] = {
        "document": {"configMap": {"name": document_name}},
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
    volume_mounts: list[dict[str, Any]] = [
        {"name": name, "mountPath": path} | ({"readOnly": True} if path.startswith("/etc/") else {})
        for name, path in mounts.items()
    ]
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": image(spec, settings),
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["finetune-trainer", "agent"],
        "env": _environment(spec, settings),
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
        "securityContext": _security_context(spec, asked),
        "terminationGracePeriodSeconds": grace,
    }
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


def _environment(spec: FineTuneJobSpec, settings: Settings) -> list[dict[str, Any]]:
    own = [
        {"name": ENV_DOCUMENT, "value": f"{DOCUMENT_MOUNT}/{DOCUMENT_FILE}"},
        {"name": ENV_WORK_DIR, "value": WORK_MOUNT},
        {"name": ENV_TERMINATION_PATH, "value": TERMINATION_PATH},
        {"name": "HOME", "value": "/tmp"},
        _field(ENV_POD_NAME, "metadata.name"),
        _field(ENV_POD_IP, "status.podIP"),
        _field(ENV_NODE_NAME, "spec.nodeName"),
    ]
    if spec.storage.ca_bundle:
        own.append({"name": ENV_CA_BUNDLE, "value": f"{CA_MOUNT}/{CA_FILE}"})
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


def _work_volume(spec: FineTuneJobSpec, status: FineTuneJobStatus, stage: Stage) -> dict[str, Any]:
    """The disk of the pod: the node's, or a volume that Kubernetes makes and removes with the pod."""
    asked = _asked(spec, stage)
    if not asked.storage_class_name:
        return {"emptyDir": {}}
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": asked.storage_class_name,
        "resources": {"requests": {"storage": disk(spec, status, stage)}},
    }
    return {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}


def _security_context(spec: FineTuneJobSpec, asked: Resources | StageResources) -> dict[str, Any]:
    context = spec.pod_template.security_context
    chosen: dict[str, Any] = context.to_json_dict() if context else {}
    if asked.storage_class_name:
        # A new volume belongs to root; the node's own disk is open to all processes of the pod.
        chosen = {"fsGroup": IMAGE_USER} | chosen
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


def _asked(spec: FineTuneJobSpec, stage: Stage) -> Resources | StageResources:
    if stage is Stage.TRAIN:
        return spec.resources
    return spec.stages.prepare if stage is Stage.PREPARE else spec.stages.export


def _resources(spec: FineTuneJobSpec, status: FineTuneJobStatus, stage: Stage) -> dict[str, Any]:
    asked = _asked(spec, stage)
    requests = {"memory": memory(spec, status, stage)}
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
    size = disk(spec, status, stage)
    if not asked.storage_class_name and quantity_bytes(size):
        requests["ephemeral-storage"] = size
        if asked.ephemeral_storage:
            # Only a size that somebody chose is a limit: a pod that exceeds it is killed, and an estimate may be wrong.
            limits["ephemeral-storage"] = size
    return resources


def resolved(spec: FineTuneJobSpec, status: FineTuneJobStatus, stage: Stage) -> Resolved | None:
    """What is known of the job, and what the pod of a stage asks for."""
    if stage is Stage.PREPARE:
        return status.resolved
    sizes = {f"{stage}_memory": memory(spec, status, stage), f"{stage}_ephemeral_storage": disk(spec, status, stage)}
    return (status.resolved or Resolved()).model_copy(update=sizes)


def memory(spec: FineTuneJobSpec, status: FineTuneJobStatus, stage: Stage) -> str:
    """Memory of a pod: what the job names, or what follows from the model."""
    if chosen := _asked(spec, stage).memory:
        return chosen
    known = status.resolved or Resolved()
    if stage is Stage.TRAIN:
        return train_memory(spec, known)
    return export_memory(known) if stage is Stage.EXPORT else "2Gi"


def train_memory(spec: FineTuneJobSpec, resolved: Resolved) -> str:
    """Host memory of a train pod: /dev/shm, the libraries in each process, and the model once on its way to the GPUs;
    on CPU the model, its gradients and optimiser state live there too."""
    processes = max(1, spec.resources.gpus_per_node)
    if resolved.weight_bytes is None:
        return _gibibytes((13 + 3 * processes) * GIB)
    times = 1.5 if spec.resources.gpus_per_node else 5
    size = (1 + 3 * processes) * GIB + quantity_bytes(spec.resources.shared_memory) + int(times * resolved.weight_bytes)
    if spec.method.adapter.type is AdapterType.FULL:
        # A resumed attempt reads the optimiser's state, two floats for each weight, through host memory. On CPU the
        # weights, the gradients and that state stay there, in float32.
        size += (8 if spec.resources.gpus_per_node else 16) * (resolved.parameters or 0)
    return _gibibytes(size)


def export_memory(resolved: Resolved) -> str:
    """Host memory of an export pod: libraries, and a few copies of the largest tensor in 32 bits."""
    if resolved.largest_tensor_bytes is None:
        return "8Gi"
    return _gibibytes(3 * GIB + 8 * resolved.largest_tensor_bytes)


def disk(spec: FineTuneJobSpec, status: FineTuneJobStatus, stage: Stage) -> str:
    """Disk of a pod: what the job names, or what follows from the model for /work, /tmp and the log."""
    if chosen := _asked(spec, stage).ephemeral_storage:
        return chosen
    resolved = status.resolved or Resolved()
    if stage is Stage.PREPARE:
        return "2Gi"
    if resolved.weight_bytes is None or resolved.parameters is None:
        return "20Gi"
    parameters, adapter = resolved.parameters, spec.method.adapter
    # A 4-bit base with its constants, on its way to storage, or from there.
    quantized = 0.6 * parameters if adapter.type is AdapterType.QLORA else 0
    if adapter.type is AdapterType.FULL:
        trained = 4.0 * parameters
    else:
        # All linear layers with rank 16 have less than a hundredth of the parameters of the base.
        trained = 4.0 * parameters * 0.01 * (adapter.lora.rank if adapter.lora else 16) / 16
    if stage is Stage.TRAIN:
        # The base and the rows, one checkpoint that is resumed from and two that are on their way to storage, each
        # with two floats of the optimiser for each trained weight, and what is handed over at the end.
        tokens = status.dataset.train_tokens if status.dataset else 0
        return _gibibytes(int(2 * GIB + resolved.weight_bytes + quantized + 16 * tokens + (3 * 3 + 1) * trained))
    # What was trained, the model that is published, and one file of the base at a time.
    published = 4 * parameters if spec.output.dtype is OutputDtype.F32 else resolved.weight_bytes
    return _gibibytes(int(2 * GIB + quantized + trained + published + min(resolved.weight_bytes, 10 * GIB)))


def _gibibytes(size: int) -> str:
    return f"{-(-size // GIB)}Gi"


def quantity_bytes(text: str) -> int:
    """A Kubernetes quantity of bytes."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", text)
    assert match is not None, f"{text!r} is no quantity"
    return int(float(match[1]) * _UNITS.get(match[2], 1))
