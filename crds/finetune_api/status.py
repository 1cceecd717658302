"""`FineTuneJob.status`: what the operator has seen.

Conditions are the truth; `phase` and the formatted strings exist for printing only. Every list and string is bounded,
so that the object stays small (a test holds the maximum under 40 KiB).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from finetune_api.base import ApiModel
from finetune_api.names import Stage

MAX_MESSAGE = 1024
"""Characters of a condition's message; `failure.message` may be longer, and the log has it all. Such a bound never
shrinks: a stored status that breaks it could not be read any more."""

MAX_NODES = 16
"""Nodes that status.attempt names; larger jobs are rare, and a status is written often."""
MAX_HISTORY = 10
"""Attempts that status.history keeps."""
MAX_PAST_MESSAGE = 100
"""Characters of a failure's message there."""

_Short = Annotated[str, StringConstraints(max_length=256)]
_Name = Annotated[str, StringConstraints(max_length=63)]
_Sentence = Annotated[str, StringConstraints(max_length=2048)]
_Uri = Annotated[str, StringConstraints(max_length=1024)]
_Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
_Decimal = Annotated[str, StringConstraints(max_length=32)]
_ShortDecimal = Annotated[str, StringConstraints(max_length=12)]


class Phase(StrEnum):
    """One word for people. Programs read the conditions."""

    PENDING = "Pending"
    PREPARING = "Preparing"
    STARTING = "Starting"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    EXPORTING = "Exporting"
    QUEUED = "Queued"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class ConditionType(StrEnum):
    VALIDATED = "Validated"
    """Access, data, model and output were checked by the prepare stage."""
    RUNNING = "Running"
    """The train pod runs."""
    CHECKPOINTED = "Checkpointed"
    """At least one complete checkpoint is in storage."""
    PROGRESS_AVAILABLE = "ProgressAvailable"
    """The operator can read the progress from the train pod."""
    EXPORTED = "Exported"
    """The model is merged, verified and published."""
    SUSPENDED = "Suspended"
    """spec.suspend is true and no pod of the job is left."""
    COMPLETE = "Complete"
    """Terminal: the tuned model is published."""
    FAILED = "Failed"
    """Terminal: there will be no further attempt."""


class Reason(StrEnum):
    """Reasons of conditions and events. They are API: never renamed.

    A failure's reason is the name of its class, see `finetune_api.failures.FailureClass`.
    """

    # Validated
    PREPARING = "Preparing"
    VALIDATED = "Validated"
    # Running
    TRAINING = "Training"
    WAITING_FOR_POD = "WaitingForPod"
    FINISHED = "Finished"
    RESTARTING = "Restarting"
    # waiting, on the condition of the stage that waits
    WAITING_FOR_CLEANUP = "WaitingForCleanup"
    NAME_CONFLICT = "NameConflict"
    PODS_REFUSED = "PodsRefused"
    UNSCHEDULABLE = "Unschedulable"
    QUEUED = "Queued"
    QUEUE_MISSING = "QueueMissing"
    VOLUME_NOT_READY = "VolumeNotReady"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CONTAINER_CONFIG_ERROR = "ContainerConfigError"
    # Checkpointed
    CHECKPOINT_SAVED = "CheckpointSaved"
    CHECKPOINT_SLOW = "CheckpointSlow"
    # ProgressAvailable
    PROGRESS_RECEIVED = "ProgressReceived"
    UNREACHABLE = "Unreachable"
    # Exported
    EXPORTING = "Exporting"
    PUBLISHED = "Published"
    ALREADY_PUBLISHED = "AlreadyPublished"
    # Suspended; a stage that was stopped says Suspended too
    SUSPENDING = "Suspending"
    SUSPENDED = "Suspended"
    SUSPENDED_BY_USER = "SuspendedByUser"
    RESUMED = "Resumed"
    # Complete
    TRAINING_COMPLETE = "TrainingComplete"
    # events only
    STAGE_STARTED = "StageStarted"
    CHECKPOINT_FAILED = "CheckpointFailed"
    FIRST_STEP = "FirstStep"


class Condition(ApiModel):
    """A `metav1.Condition`."""

    type: Annotated[str, StringConstraints(max_length=32)]
    """Name of the condition."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    observed_generation: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})] | None = None
    """Generation of the spec that was looked at."""
    last_transition_time: _Time
    """When status changed last."""
    reason: Annotated[
        str, StringConstraints(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", min_length=1, max_length=64)
    ]
    """One word, stable, for programs."""
    message: Annotated[str, StringConstraints(max_length=MAX_MESSAGE)]
    """One sentence for people; it names a remedy where there is one."""


class AttemptOutcome(StrEnum):
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    PREEMPTED = "Preempted"
    """The cluster took its pod away."""
    SUSPENDED = "Suspended"
    """It was told to stop by spec.suspend."""


class Attempt(ApiModel):
    """The attempt that runs, or ran last."""

    stage: Stage
    """Stage it belongs to."""
    number: Annotated[int, Field(ge=1)]
    """Counts from 1 in each stage."""
    job_name: _Short
    """The Kubernetes Job that carries it."""
    start_time: _Time | None = None
    """When its pod started to run."""
    end_time: _Time | None = None
    """When it ended."""
    outcome: AttemptOutcome | None = None
    """How it ended; absent while it goes on."""
    seen_time: _Time | None = None
    """When its pod was last seen to run, kept to the minute."""
    nodes: Annotated[list[_Name], Field(max_length=MAX_NODES)] | None = None
    """Nodes that its first pods run on, by the index of the pod."""
    overdue_time: _Time | None = None
    """Since when its pod has not ended though it should have."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs that it holds while it runs."""
    resumed_from_step: Annotated[int, Field(ge=0)] | None = None
    """Step of the checkpoint it started from; 0 is a start from the base model."""
    checkpoint_failures: Annotated[int, Field(ge=0)] | None = None
    """Checkpoints that could not be stored."""


class PastAttempt(ApiModel):
    """An attempt that has ended."""

    stage: Stage
    """Stage it belonged to."""
    number: Annotated[int, Field(ge=1)]
    """Counts from 1 in each stage."""
    outcome: AttemptOutcome
    """How it ended."""
    failure_class: str | None = Field(None, alias="class", max_length=32)
    """Kind of failure."""
    message: Annotated[str, StringConstraints(max_length=MAX_PAST_MESSAGE)] | None = None
    """The beginning of the failure's message."""
    start_time: _Time | None = None
    """When its pod started to run; absent when none did."""
    end_time: _Time
    """When it ended."""
    from_step: Annotated[int, Field(ge=0)] | None = None
    """Step of the checkpoint it started from."""
    to_step: Annotated[int, Field(ge=0)] | None = None
    """Last step that it is known to have made."""
    exit_code: int | None = None
    """Exit code of the container."""
    rank: Annotated[int, Field(ge=0)] | None = None
    """Process that failed first."""
    pod: _Name | None = None
    """Pod that failed."""
    node: _Name | None = None
    """Node it ran on."""


class Usage(ApiModel):
    """What the attempts that have ended took."""

    active_seconds: Annotated[int, Field(ge=0)] = 0
    """Time in which pods of the job ran; activeDeadlineSeconds bounds it."""
    gpu_seconds: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})] = 0
    """GPUs times the seconds they were held."""
    wasted_gpu_seconds: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})] = 0
    """Those of them in which no step was made that the result has: loading, measuring and saving, and steps that were
    lost with their pod."""


class Restarts(ApiModel):
    """How often the work had to be started again."""

    charged: Annotated[int, Field(ge=0)] = 0
    """Restarts after a failure; bounded by failurePolicy.maxRestarts."""
    preemptions: Annotated[int, Field(ge=0)] = 0
    """Restarts after a preemption, drain, eviction or node loss; free."""
    out_of_memory: Annotated[int, Field(ge=0)] = 0
    """Charged restarts after the GPU ran out of memory, each with half the micro-batch."""


class QueueStatus(ApiModel):
    """What Kueue says of the Job of the present attempt."""

    name: _Short
    """LocalQueue that it is in."""
    workload: _Short | None = None
    """Workload that stands for it."""
    cluster_queue: _Short | None = None
    """ClusterQueue that admitted it."""
    position: Annotated[int, Field(ge=1)] | None = None
    """Place in the LocalQueue while it waits; 1 is next."""


class Progress(ApiModel):
    """How far training is. Written at most every ten seconds, and never going back within an attempt that runs on."""

    attempt: Annotated[int, Field(ge=1)] | None = None
    """Attempt that made the last steps; absent while it has to begin again, because its queue took its pod away."""
    percent: Annotated[str, StringConstraints(max_length=8)]
    """Share of the steps that are done, such as "42%"."""
    current_step: Annotated[int, Field(ge=0)]
    """Optimiser steps done."""
    total_steps: Annotated[int, Field(ge=0)]
    """Optimiser steps to do."""
    epoch: _Decimal | None = None
    """Passes over the data."""
    loss: _Decimal | None = None
    """Training loss of the last logged step."""
    learning_rate: _Decimal | None = None
    """Learning rate of the last logged step."""
    tokens_per_second: _Decimal | None = None
    """Input tokens per second, of this attempt."""
    trained_tokens: Annotated[int, Field(ge=0)] | None = None
    """Input tokens learnt from, over all attempts."""
    step_seconds: _Decimal | None = None
    """Median duration of this attempt's steps."""
    estimated_remaining_seconds: Annotated[int, Field(ge=0)] | None = None
    """Time to the last step, from this attempt's own speed."""
    eta: Annotated[str, StringConstraints(max_length=16)] | None = None
    """The same for people, such as "1h12m"."""
    last_updated_time: _Time
    """When the numbers were read."""


class Measurement(ApiModel):
    """Token-weighted loss on the validation rows, and what the method itself counts."""

    loss: _Decimal
    """Mean negative log-likelihood of the supervised tokens, in nats; where answers are judged, those of the chosen or
    good ones."""
    perplexity: _Decimal
    """exp(loss)."""
    tokens: Annotated[int, Field(ge=0)]
    """Supervised tokens measured."""
    method_loss: _ShortDecimal | None = None
    """Mean over the rows of the loss that the method minimises, where that is another one."""
    accuracy: _ShortDecimal | None = None
    """Share of the pairs in which the chosen answer has the higher reward, or of the answers whose reward is on the
    right side of the average; a tie counts half."""
    margin: _ShortDecimal | None = None
    """Mean reward of the chosen or good answers less that of the others."""


class EvaluationResult(ApiModel):
    """The same rows measured before and after."""

    base: Measurement | None = None
    """The base model in its original precision."""
    quantized_base: Measurement | None = None
    """The base model as QLoRA keeps it."""
    tuned: Measurement | None = None
    """The trained model."""


class DatasetResult(ApiModel):
    """What the prepare stage found in the data."""

    format: Annotated[str, StringConstraints(max_length=128)]
    """The formats of the rows."""
    train_rows: Annotated[int, Field(ge=0)]
    """Rows to learn from."""
    validation_rows: Annotated[int, Field(ge=0)]
    """Rows to measure with."""
    skipped_rows: Annotated[int, Field(ge=0)] = 0
    """Invalid rows that were left out."""
    overlong_rows: Annotated[int, Field(ge=0)] = 0
    """Rows that were longer than dataset.maxLength, and were dropped, truncated or split."""
    duplicate_rows: Annotated[int, Field(ge=0)] = 0
    """Train rows that are equal to another one."""
    leaked_rows: Annotated[int, Field(ge=0)] = 0
    """Train rows that are in the validation set, too, and are not learnt for that."""
    report_uri: _Uri | None = None
    """The data report: counts, lengths, and samples in which what is learnt is marked."""
    train_tokens: Annotated[int, Field(ge=0)]
    """Input tokens in one pass."""
    supervised_tokens: Annotated[int, Field(ge=0)]
    """Tokens of them that are learnt."""
    sha256: Annotated[str, StringConstraints(max_length=64)]
    """Hash of the prepared rows."""


class Resolved(ApiModel):
    """What Auto and absent values became."""

    model_type: _Short | None = None
    """Architecture of the base model, from its config."""
    model_revision: _Short | None = None
    """Hub commit, or a hash over keys, sizes and versions of the files."""
    parameters: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})] | None = None
    """Parameters of the base model."""
    weight_bytes: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})] | None = None
    """Size of the base model's weights; memory and disk of the train pod are derived from it."""
    largest_tensor_bytes: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})] | None = None
    """Size of the base model's largest tensor; the memory of the export pod is derived from it."""
    learning_rate: _Decimal | None = None
    """Peak learning rate."""
    total_steps: Annotated[int, Field(ge=0)] | None = None
    """Optimiser steps."""
    batch_size: Annotated[int, Field(ge=0)] | None = None
    """Rows per optimiser step over all GPUs."""
    micro_batch_size: Annotated[int, Field(ge=0)] | None = None
    """Rows that one GPU computes at once."""
    gradient_accumulation_steps: Annotated[int, Field(ge=0)] | None = None
    """Micro-batches per optimiser step."""
    world_size: Annotated[int, Field(ge=0)] | None = None
    """Training processes."""
    precision: _Short | None = None
    """Number format of the computation."""
    activation_checkpointing: _Short | None = None
    """Enabled or Disabled."""
    device: _Short | None = None
    """What the training ran on."""
    train_memory: _Decimal | None = None
    """Memory of the newest train pod."""
    train_ephemeral_storage: _Decimal | None = None
    """Disk that the newest train pod asks for."""
    export_memory: _Decimal | None = None
    """Memory of the newest export pod."""
    export_ephemeral_storage: _Decimal | None = None
    """Disk that the newest export pod asks for."""
    artifacts: Annotated[list[_Name], Field(max_length=2)] | None = None
    """What is published."""
    dtype: _Short | None = None
    """Number format of the published weights."""
    work_uri: _Uri | None = None
    """Folder of the work files."""


class CheckpointResult(ApiModel):
    """The newest complete checkpoint."""

    step: Annotated[int, Field(ge=0)]
    """Optimiser step it was saved after."""
    uri: _Uri
    """Where it is."""
    time: _Time | None = None
    """When it was complete."""
    save_seconds: _Decimal | None = None
    """Time that saving and uploading took; it must fit into checkpoint.gracePeriodSeconds."""


class ArtifactResult(ApiModel):
    """Something that was published."""

    name: Literal["Merged", "Adapter", "Manifest"]
    """What it is."""
    uri: _Uri
    """Where it is."""
    size_bytes: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})] | None = None
    """Size of its files together."""
    sha256: Annotated[str, StringConstraints(max_length=64)] | None = None
    """Hash, of the manifest only: it holds the hashes of all other files."""


class Verification(ApiModel):
    """Proof that the published model is the trained one."""

    mean_kl: _Decimal
    """Mean Kullback-Leibler divergence from the trained to the published model on the probe rows, in nats."""
    max_kl: _Decimal
    """The largest divergence at one position."""
    positions: Annotated[int, Field(ge=0)]
    """Positions compared."""


class Failure(ApiModel):
    """The last failure."""

    failure_class: Annotated[str, Field(alias="class", max_length=32)]
    """Kind of failure; decides whether there is another attempt."""
    message: _Sentence
    """One sentence that says what happened, and a remedy."""
    disposition: Literal["Terminal", "WillRestart"]
    """Whether there is another attempt."""
    stage: Stage
    """Stage that failed."""
    attempt: Annotated[int, Field(ge=0)]
    """Attempt of the stage that failed; 0 when no pod was started."""
    time: _Time
    """When the failure was seen."""
    exit_code: int | None = None
    """Exit code of the container."""
    rank: Annotated[int, Field(ge=0)] | None = None
    """Process that failed first."""
    pod: _Short | None = None
    """Pod that failed."""
    node: _Short | None = None
    """Node it ran on."""
    log_tail: Annotated[str, StringConstraints(max_length=2048)] | None = None
    """Last lines of the log, redacted, without data rows."""
    log_uri: _Uri | None = None
    """The whole redacted log."""


class FineTuneJobStatus(ApiModel):
    """What the operator has seen of the job."""

    observed_generation: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})] | None = None
    """Generation of the spec that this status speaks of."""
    phase: Phase | None = None
    """One word for people, derived from the conditions; programs read the conditions."""
    reason: Annotated[str, StringConstraints(max_length=64)] | None = None
    """Why the job is in this phase: the reason of the condition behind it, or the class of its failure."""
    conditions: Annotated[
        list[Condition],
        Field(
            max_length=11,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        ),
    ] = []
    """Validated, Running, Checkpointed, ProgressAvailable, Exported, Suspended, and the terminal pair Complete and
    Failed."""
    start_time: _Time | None = None
    """When the first pod ran."""
    completion_time: _Time | None = None
    """When the job became Complete or Failed."""
    attempt: Attempt | None = None
    """The attempt that runs, or ran last."""
    trained_attempt: Annotated[int, Field(ge=1)] | None = None
    """The train attempt that reached the last step; its model is exported."""
    restarts: Restarts | None = None
    """How often the work had to be started again."""
    restart_time: _Time | None = None
    """Not before this time the next attempt starts."""
    queue: QueueStatus | None = None
    """What Kueue says of the Job of the present attempt."""
    micro_batch_limit: Annotated[int, Field(ge=1)] | None = None
    """Rows that one GPU may compute at once, after it ran out of memory with more."""
    usage: Usage | None = None
    """What the attempts that have ended took."""
    history: Annotated[list[PastAttempt], Field(max_length=MAX_HISTORY)] = []
    """The last attempts that have ended, oldest first."""
    progress: Progress | None = None
    """How far training is."""
    dataset: DatasetResult | None = None
    """What the prepare stage found in the data."""
    resolved: Resolved | None = None
    """What Auto and absent values became."""
    evaluation: EvaluationResult | None = None
    """The validation rows measured before and after."""
    checkpoint: CheckpointResult | None = None
    """The newest complete checkpoint."""
    artifacts: Annotated[
        list[ArtifactResult],
        Field(
            max_length=4,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ] = []
    """What was published."""
    verification: Verification | None = None
    """Proof that the published model is the trained one."""
    failure: Failure | None = None
    """The last failure; gone when the job is Complete."""
