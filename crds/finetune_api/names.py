"""Names, labels and annotations of the objects that belong to a job. All deterministic: a retry finds its own work."""

from __future__ import annotations

from enum import StrEnum

from finetune_api import GROUP


class Stage(StrEnum):
    PREPARE = "prepare"
    TRAIN = "train"
    EXPORT = "export"


LABEL_JOB_NAME = f"{GROUP}/job-name"
LABEL_JOB_UID = f"{GROUP}/job-uid"
"""Selects the children of one FineTuneJob; its presence selects all children of the operator."""
LABEL_STAGE = f"{GROUP}/stage"
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGER = "finetune-operator"

LABEL_QUEUE = "kueue.x-k8s.io/queue-name"
LABEL_QUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"
LABEL_QUEUED_JOB_UID = "kueue.x-k8s.io/job-uid"
"""On a Workload: the Job that it stands for."""
ANNOTATION_TOPOLOGY = "kueue.x-k8s.io/podset-{mode}-topology"

CONTAINER = "main"
AGENT_PORT = 9464
"""Port of the agent in each pod: /metrics, /progress, /healthz."""
AGENT_PORT_NAME = "metrics"

DOCUMENT_MOUNT = "/etc/finetune"
DOCUMENT_FILE = "job.json"
WORK_MOUNT = "/work"
CA_MOUNT = "/etc/finetune-ca"
CA_FILE = "ca.crt"
CACHE_MOUNT = "/cache"
TERMINATION_PATH = "/dev/termination-log"

ENV_DOCUMENT = "FINETUNE_DOCUMENT"
ENV_WORK_DIR = "FINETUNE_WORK_DIR"
ENV_TERMINATION_PATH = "FINETUNE_TERMINATION_PATH"
ENV_POD_NAME = "POD_NAME"
ENV_POD_IP = "POD_IP"
ENV_NODE_NAME = "NODE_NAME"
ENV_CA_BUNDLE = "FINETUNE_CA_BUNDLE"
ENV_MODEL_CACHE = "FINETUNE_MODEL_CACHE"
OWNER_FILE = "prepare/job.json"
"""Names the job that a folder of work files belongs to, as a `JobIdentity`: first there, and the last to go."""

COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
"""Annotation in which Kubernetes says which of the pods of a Job this one is."""
ENV_COMPLETION_INDEX = "JOB_COMPLETION_INDEX"
"""Variable in which it says it to the pod."""
ENV_MAIN_ADDRESS = "MASTER_ADDR"
"""Where the processes of several pods meet: the host name of the first pod. torch reads it, too."""
ENV_MAIN_PORT = "MASTER_PORT"


def child_name(job_name: str, stage: Stage, attempt: int) -> str:
    """Name of the Job and of the ConfigMap of one attempt."""
    return f"{job_name}-{stage}-{attempt}"


def service_name(job_name: str) -> str:
    """Name of the Service through which the train pods of all attempts of a job have host names."""
    return f"{job_name}-{Stage.TRAIN}"
