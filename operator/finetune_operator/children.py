"""The objects that carry an attempt: a ConfigMap with the job document, and a Job with one pod, or with one for each
node and a Service that gives them host names. Pure.

An existing child is never compared with what is built here: an upgraded operator does not disturb running jobs.
"""

from __future__ import annotations

from typing import Any

from finetune_api import API_VERSION, KIND
from finetune_api.document import JobDocument, JobIdentity, StorageSettings
from finetune_api.names import (
    DOCUMENT_FILE,
    LABEL_ATTEMPT,
    LABEL_JOB_NAME,
    LABEL_JOB_UID,
    LABEL_MANAGED_BY,
    LABEL_STAGE,
    MANAGER,
    Stage,
    child_name,
    service_name,
)
from finetune_api.spec import AddressingStyle, FineTuneJobSpec
from finetune_api.uri import join
from finetune_operator import pods
from finetune_operator.config import Settings
from finetune_operator.resource import FineTuneJob


def build(
    job: FineTuneJob, spec: FineTuneJobSpec, stage: Stage, attempt: int, settings: Settings
) -> tuple[dict[str, Any], ...]:
    """What carries an attempt, in the order in which it is created."""
    name = child_name(job.name, stage, attempt)
    document = build_document(job, spec, stage, attempt, settings)
    metadata = _metadata(job, name, _labels(job, stage, attempt))
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "immutable": True,
        "data": {DOCUMENT_FILE: document.model_dump_json(by_alias=True, exclude_none=True, indent=1)},
    }
    nodes = spec.resources.nodes if stage is Stage.TRAIN else 1
    services = (build_service(job),) if nodes > 1 else ()
    child = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completions": nodes,
            "parallelism": nodes,
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
                "metadata": _pod_metadata(spec, _labels(job, stage, attempt)),
                "spec": pods.build(
                    spec, job.status, stage, name, settings, service=service_name(job.name) if services else ""
                ),
            },
        },
    }
    return config_map, *services, child


def build_service(job: FineTuneJob) -> dict[str, Any]:
    """What gives the train pods host names. One for all attempts: the names of their pods differ."""
    labels = {name: value for name, value in _labels(job, Stage.TRAIN, 1).items() if name != LABEL_ATTEMPT}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job, service_name(job.name), labels),
        "spec": {
            "clusterIP": "None",
            # They look for each other before they are ready.
            "publishNotReadyAddresses": True,
            "selector": {LABEL_JOB_UID: job.uid, LABEL_STAGE: Stage.TRAIN},
        },
    }


def _metadata(job: FineTuneJob, name: str, labels: dict[str, str]) -> dict[str, Any]:
    return {
        "name": name,
        "namespace": job.namespace,
        "labels": labels,
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
        nodes=spec.resources.nodes,
        earlier_attempts=earlier,
        trainer_image=pods.image(spec, settings),
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


def _pod_metadata(spec: FineTuneJobSpec, labels: dict[str, str]) -> dict[str, Any]:
    template = spec.pod_template
    metadata: dict[str, Any] = {"labels": template.labels | labels}
    if template.annotations:
        metadata["annotations"] = template.annotations
    return metadata
