"""The objects that carry an attempt: a ConfigMap with the job document, and a Job with one pod. Pure.

An existing child is never compared with what is built here: an upgraded operator does not disturb running jobs.
"""

from __future__ import annotations

import re
from typing import Any

from finetune_api import API_VERSION, KIND
from finetune_api.document import JobDocument, JobIdentity, StorageSettings
from finetune_api.names import (
    AGENT_PORT,
    AGENT_PORT_NAME,
    CONTAINER,
    DOCUMENT_FILE,
    DOCUMENT_MOUNT,
    ENV_DOCUMENT,
    ENV_NODE_NAME,
    ENV_POD_IP,
    ENV_POD_NAME,
    ENV_TERMINATION_PATH,
    ENV_WORK_DIR,
    LABEL_ATTEMPT,
    LABEL_JOB_NAME,
    LABEL_JOB_UID,
    LABEL_MANAGED_BY,
    LABEL_STAGE,
    MANAGER,
    TERMINATION_PATH,
    WORK_MOUNT,
    Stage,
    child_name,
)
from finetune_api.spec import AdapterType, AddressingStyle, FineTuneJobSpec, StageResources
from finetune_api.status import Resolved
from finetune_api.uri import join
from finetune_operator.config import Settings
from finetune_operator.resource import FineTuneJob

GIB = 1024**3
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}

PREPARE_GRACE_SECONDS = 30
"""Prepare and export have nothing to save when they are stopped; they begin again."""


def build(
    job: FineTuneJob, spec: FineTuneJobSpec, stage: Stage, attempt: int, settings: Settings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ConfigMap and the Job of an attempt, in the order in which they are created."""
    name = child_name(job.name, stage, attempt)
    document = build_document(job, spec, stage, attempt, settings)
    metadata = {
        "name": name,
        "namespace": job.namespace,
        "labels": _labels(job, stage, attempt),
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": job.name,
                "uid": job.uid,
                "controller": True,
                # The job's deletion does not wait for its children, and no right on finalizers is needed.
                "blockOwnerDeletion": False,
            }
        ],
    }
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "immutable": True,
        "data": {DOCUMENT_FILE: document.model_dump_json(by_alias=True, exclude_none=True, indent=1)},
    }
    return config_map, {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completions": 1,
            "parallelism": 1,
            "completionMode": "Indexed",
            # The operator owns retries: a new attempt is a new Job.
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            # These rules make the Job controller write the cause into the Job's condition, where it outlives the pod.
            "podFailurePolicy": {
                "rules": [
                    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [0]}},
                ]
            },
            "template": {
                "metadata": {"labels": _labels(job, stage, attempt)},
                "spec": _pod_spec(job, spec, stage, name, settings),
            },
        },
    }


def build_document(
    job: FineTuneJob, spec: FineTuneJobSpec, stage: Stage, attempt: int, settings: Settings
) -> JobDocument:
    if stage is Stage.EXPORT:
        assert job.status.trained_attempt is not None, "export starts when training has finished"
        earlier = [job.status.trained_attempt]
    elif stage is Stage.TRAIN:
        earlier = list(range(attempt - 1, 0, -1))
    else:
        earlier = []
    return JobDocument(
        stage=stage,
        attempt=attempt,
        job=JobIdentity(namespace=job.namespace, name=job.name, uid=job.uid),
        spec=spec,
        work_uri=work_uri(job.uid, spec),
        storage=storage_settings(spec, settings),
        processes=max(1, spec.resources.gpus_per_node),
        earlier_attempts=earlier,
        trainer_image=settings.trainer_image,
        stall_seconds=spec.failure_policy.no_progress_seconds or settings.stall_seconds,
        micro_batch_limit=job.status.micro_batch_limit,
    )


def work_uri(uid: str, spec: FineTuneJobSpec) -> str:
    """The job's own folder of work files."""
    return join(spec.storage.work_uri or join(spec.output.uri, ".finetune"), uid)


def storage_settings(spec: FineTuneJobSpec, settings: Settings) -> StorageSettings:
    """The job's storage settings, with the operator's where the job has none."""
    endpoint = spec.storage.endpoint or settings.s3_endpoint or None
    style = spec.storage.addressing_style
    if style is AddressingStyle.AUTO:
        style = AddressingStyle(settings.s3_addressing_style)
    path_style = {AddressingStyle.PATH: True, AddressingStyle.VIRTUAL: False}.get(style)
    if path_style is None and endpoint:
        path_style = True  # servers other than AWS rarely have a host name for each bucket
    return StorageSettings(
        endpoint=endpoint,
        region=spec.storage.region or settings.s3_region or None,
        path_style=path_style,
        allow_files=settings.allow_files,
    )


def _labels(job: FineTuneJob, stage: Stage, attempt: int) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "finetune-trainer",
        "app.kubernetes.io/component": stage,
        "app.kubernetes.io/part-of": MANAGER,
        LABEL_MANAGED_BY: MANAGER,
        LABEL_JOB_NAME: job.name,
        LABEL_JOB_UID: job.uid,
        LABEL_STAGE: stage,
        LABEL_ATTEMPT: str(attempt),
    }


def _pod_spec(
    job: FineTuneJob, spec: FineTuneJobSpec, stage: Stage, document_name: str, settings: Settings
) -> dict[str, Any]:
    """A pod that the `restricted` Pod Security profile admits."""
    resolved = job.status.resolved or Resolved()
    volumes: dict[str, dict[str, Any]] = {
        "document": {"configMap": {"name": document_name}},
        "work": {"emptyDir": {}},
        "tmp": {"emptyDir": {}},
    }
    mounts = {"document": DOCUMENT_MOUNT, "work": WORK_MOUNT, "tmp": "/tmp"}
    if stage is Stage.TRAIN:
        volumes["shm"] = {"emptyDir": {"medium": "Memory", "sizeLimit": spec.resources.shared_memory}}
        mounts["shm"] = "/dev/shm"
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": settings.trainer_image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["finetune-trainer", "agent"],
        "env": [
            {"name": ENV_DOCUMENT, "value": f"{DOCUMENT_MOUNT}/{DOCUMENT_FILE}"},
            {"name": ENV_WORK_DIR, "value": WORK_MOUNT},
            {"name": ENV_TERMINATION_PATH, "value": TERMINATION_PATH},
            {"name": "HOME", "value": "/tmp"},
            _field(ENV_POD_NAME, "metadata.name"),
            _field(ENV_POD_IP, "status.podIP"),
            _field(ENV_NODE_NAME, "spec.nodeName"),
        ],
        "ports": [{"name": AGENT_PORT_NAME, "containerPort": AGENT_PORT}],
        "resources": _resources(spec, stage, resolved),
        "terminationMessagePath": TERMINATION_PATH,
        "volumeMounts": [
            {"name": name, "mountPath": path} | ({"readOnly": True} if name == "document" else {})
            for name, path in mounts.items()
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    if spec.storage.secret_ref:
        container["envFrom"] = [{"secretRef": {"name": spec.storage.secret_ref.name}}]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [{"name": name, **source} for name, source in volumes.items()],
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "terminationGracePeriodSeconds": PREPARE_GRACE_SECONDS,
    }
    if spec.storage.service_account_name:
        pod["serviceAccountName"] = spec.storage.service_account_name
    if settings.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    if stage is Stage.TRAIN:
        pod["terminationGracePeriodSeconds"] = spec.checkpoint.grace_period_seconds
        if spec.scheduling.node_selector:
            pod["nodeSelector"] = spec.scheduling.node_selector
        if spec.scheduling.tolerations:
            pod["tolerations"] = [toleration.to_json_dict() for toleration in spec.scheduling.tolerations]
    return pod


def _field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _resources(spec: FineTuneJobSpec, stage: Stage, resolved: Resolved) -> dict[str, Any]:
    if stage is Stage.TRAIN:
        gpus = spec.resources.gpus_per_node
        memory = spec.resources.memory or train_memory(spec, resolved)
        requests = {"cpu": spec.resources.cpu or str(4 * gpus or 1), "memory": memory}
        limits = {"memory": memory}
        if gpus:
            requests[spec.resources.gpu_resource_name] = limits[spec.resources.gpu_resource_name] = str(gpus)
        return {"requests": requests, "limits": limits}
    asked: StageResources = getattr(spec.stages, stage)
    memory = asked.memory or (export_memory(resolved) if stage is Stage.EXPORT else "2Gi")
    return {"requests": {"cpu": asked.cpu, "memory": memory}, "limits": {"memory": memory}}


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


def _gibibytes(size: int) -> str:
    return f"{-(-size // GIB)}Gi"


def quantity_bytes(text: str) -> int:
    """A Kubernetes quantity of bytes."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", text)
    assert match is not None, f"{text!r} is no quantity"
    return int(float(match[1]) * _UNITS.get(match[2], 1))
