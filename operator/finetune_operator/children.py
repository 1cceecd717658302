"""The objects that carry an attempt: a ConfigMap with the job document, and a Job with one pod, or with one for each
node and a Service that gives them host names. Pure.

An existing child is never compared with what is built here: an upgraded operator does not disturb running jobs.
"""

from __future__ import annotations

import hashlib
from typing import Any

from finetune_api import API_VERSION, KIND
from finetune_api.document import JobDocument, JobIdentity, StorageSettings, path_style
from finetune_api.failures import STOPPED_CODES
from finetune_api.names import (
    ANNOTATION_TOPOLOGY,
    DOCUMENT_FILE,
    LABEL_ATTEMPT,
    LABEL_JOB_NAME,
    LABEL_JOB_UID,
    LABEL_MANAGED_BY,
    LABEL_QUEUE,
    LABEL_QUEUE_PRIORITY,
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
    labels = _labels(job, stage, attempt)
    metadata = _metadata(job, name, labels)
    text = document.model_dump_json(by_alias=True, exclude_none=True, indent=1)
    # With its content in the name: one that is left from a creation that did not come to an end is not taken for it.
    document_name = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata | {"name": document_name},
        "immutable": True,
        "data": {DOCUMENT_FILE: text},
    }
    nodes = spec.resources.nodes if stage is Stage.TRAIN else 1
    services = (build_service(job),) if nodes > 1 else ()
    # Kubernetes names pods of an Indexed Job after it and their index.
    first = f"{name}-0.{service_name(job.name)}" if nodes > 1 else ""
    child = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata | {"labels": labels | _queue_labels(spec, stage)},
        "spec": {
            # A queue starts it; nobody but the queue writes this field afterwards.
            "suspend": queue_of(spec, stage) is not None,
            "completions": nodes,
            "parallelism": nodes,
            "completionMode": "Indexed",
            # The operator owns retries: a new attempt is a new Job.
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            # These rules make the Job controller write the cause into the Job's condition, where it outlives the pod.
            "podFailurePolicy": {"rules": _failure_rules(spec, stage)},
            "template": {
                "metadata": _pod_metadata(spec, stage, labels),
                "spec": pods.build(spec, job.status, stage, document_name, settings, first),
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


def queue_of(spec: FineTuneJobSpec, stage: Stage) -> str | None:
    """The LocalQueue that admits the pods of a stage."""
    return spec.scheduling.queue_name if stage is Stage.TRAIN else spec.scheduling.cpu_queue_name


def _queue_labels(spec: FineTuneJobSpec, stage: Stage) -> dict[str, str]:
    queue, priority = queue_of(spec, stage), spec.scheduling.workload_priority_class_name
    if queue is None:
        return {}
    return {LABEL_QUEUE: queue} | ({LABEL_QUEUE_PRIORITY: priority} if priority else {})


def _failure_rules(spec: FineTuneJobSpec, stage: Stage) -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    ]
    if queue_of(spec, stage) is not None:
        # A queue takes a pod away by suspending its Job. The pod then ends as any pod that is told to stop, and the
        # Job must outlive that, to be admitted again.
        rules.append({"action": "Ignore", "onExitCodes": {"operator": "In", "values": [*STOPPED_CODES]}})
    return [*rules, {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [0]}}]


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
    return StorageSettings(
        endpoint=endpoint,
        region=spec.storage.region or settings.s3_region or None,
        path_style=path_style(style, endpoint),
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


def _pod_metadata(spec: FineTuneJobSpec, stage: Stage, labels: dict[str, str]) -> dict[str, Any]:
    template, topology = spec.pod_template, spec.scheduling.topology
    annotations = dict(template.annotations)
    if topology is not None and stage is Stage.TRAIN:
        annotations[ANNOTATION_TOPOLOGY.format(mode=topology.mode.lower())] = topology.level or "true"
    metadata: dict[str, Any] = {"labels": template.labels | labels}
    return metadata | ({"annotations": annotations} if annotations else {})
