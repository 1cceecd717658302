"""`FineTuneJob.spec`: what a person asks for.

Only fields that work are here. Defaults are in the schema, so that `kubectl get -o yaml` shows them; what depends on
the model or the machine is "Auto" or absent, and its resolved value is echoed in `status.resolved`.

Rules that a user can break carry a CEL message instead of a schema pattern: a pattern can only say that it did not
match, a message can say what to write.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from finetune_api.base import (
    ApiModel,
    Decimal,
    Fraction,
    ObjectName,
    PositiveDecimal,
    Quantity,
    cel,
    validations,
)
from finetune_api.failures import RULED_CLASSES, FailureClass
from finetune_api.pod import CABundle, ModelCache, Placement, PodTemplate, ResourceClaim, Scheduling

MAX_NAME_LENGTH = 40
"""Child and host names are made from the job's name: `<name>-prepare-<n>` must fit 63 characters with a pod suffix."""

NAME_RULES = [
    (
        f"size(self.metadata.name) <= {MAX_NAME_LENGTH}",
        f"metadata.name may have at most {MAX_NAME_LENGTH} characters, because pod and host names are made from it: "
        "choose a shorter name",
    ),
    (
        "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        "metadata.name must start with a letter and hold only a-z, 0-9 and '-', because pod and host names are made "
        "from it: rename the job, for example support-bot",
    ),
]


class MethodType(StrEnum):
    SFT = "SFT"
    DPO = "DPO"
    KTO = "KTO"


class DPOLoss(StrEnum):
    SIGMOID = "Sigmoid"
    IPO = "IPO"
    HINGE = "Hinge"
    ROBUST = "Robust"


class AdapterType(StrEnum):
    FULL = "Full"
    LORA = "LoRA"
    QLORA = "QLoRA"


class DataFormat(StrEnum):
    AUTO = "Auto"
    CHAT = "Chat"
    SHAREGPT = "ShareGPT"
    ALPACA = "Alpaca"
    QUESTION_ANSWER = "QuestionAnswer"
    PROMPT_COMPLETION = "PromptCompletion"
    TEXT = "Text"
    PREFERENCE = "Preference"
    UNPAIRED_PREFERENCE = "UnpairedPreference"


FORMAT_COLUMNS = {
    DataFormat.CHAT: ("messages", "system", "tools"),
    DataFormat.SHAREGPT: ("messages", "system", "tools"),
    DataFormat.ALPACA: ("prompt", "completion", "input", "system"),
    DataFormat.QUESTION_ANSWER: ("prompt", "completion", "input", "system"),
    DataFormat.PROMPT_COMPLETION: ("prompt", "completion", "input", "system", "tools"),
    DataFormat.TEXT: ("text",),
    DataFormat.PREFERENCE: ("messages", "prompt", "input", "system", "tools", "chosen", "rejected"),
    DataFormat.UNPAIRED_PREFERENCE: ("messages", "prompt", "completion", "input", "system", "tools", "label"),
}
"""The columns that a format has."""


class Supervised(StrEnum):
    ASSISTANT_TURNS = "AssistantTurns"
    LAST_TURN = "LastTurn"
    ALL = "All"


METHOD_FORMATS = {
    MethodType.SFT: tuple(name for name in FORMAT_COLUMNS if not name.endswith("Preference")),
    MethodType.DPO: (DataFormat.PREFERENCE,),
    MethodType.KTO: (DataFormat.UNPAIRED_PREFERENCE,),
}
"""The formats that a method learns from."""


class DuplicatePolicy(StrEnum):
    KEEP = "Keep"
    REMOVE = "Remove"


class OverlongPolicy(StrEnum):
    FAIL = "Fail"
    DROP = "Drop"
    TRUNCATE = "Truncate"
    SPLIT = "Split"


class RowPolicy(StrEnum):
    FAIL = "Fail"
    SKIP = "Skip"


class FailureAction(StrEnum):
    FAIL = "Fail"
    RESTART = "Restart"


class Switch(StrEnum):
    AUTO = "Auto"
    ENABLED = "Enabled"
    DISABLED = "Disabled"


class Precision(StrEnum):
    AUTO = "Auto"
    BF16 = "BF16"
    F32 = "F32"


class Optimizer(StrEnum):
    ADAMW = "AdamW"
    ADAMW_8BIT = "AdamW8bit"
    PAGED_ADAMW_8BIT = "PagedAdamW8bit"


class Scheduler(StrEnum):
    COSINE = "Cosine"
    LINEAR = "Linear"
    CONSTANT = "Constant"


class OutputDtype(StrEnum):
    AUTO = "Auto"
    BF16 = "BF16"
    F16 = "F16"
    F32 = "F32"


class Artifact(StrEnum):
    MERGED = "Merged"
    ADAPTER = "Adapter"


class OnExisting(StrEnum):
    FAIL = "Fail"
    OVERWRITE = "Overwrite"


class GPUAllocation(StrEnum):
    DEVICE_PLUGIN = "DevicePlugin"
    RESOURCE_CLAIMS = "ResourceClaims"


class AddressingStyle(StrEnum):
    AUTO = "Auto"
    PATH = "Path"
    VIRTUAL = "Virtual"


_S3 = "^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^/].*$"


def _uri_rules(schemes: str, example: str) -> list[dict[str, str]]:
    """CEL rules of a URI field. `schemes` is a regular expression alternation such as "s3|hf"."""
    shown = " or ".join(f"{scheme}://" for scheme in schemes.split("|"))
    rules = [
        (f"self.matches('^({schemes})://')", f"the URI must start with {shown}, for example {example}"),
        (
            f"!self.matches('^s3://') || self.matches('{_S3}')",
            "an s3 URI needs a bucket (3 to 63 of a-z, 0-9, '-' and '.') and a path: write s3://BUCKET/PATH",
        ),
    ]
    return [{"rule": rule, "message": message} for rule, message in rules]


_Uri = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
_DATA_ENDING = "[.](jsonl|ndjson|json|csv|tsv)([.](gz|bz2|xz|zst))?$|[.]parquet$|[*]$"
"""Of a file, or of a pattern."""

ModelURI = Annotated[
    _Uri,
    Field(
        json_schema_extra={
            "x-kubernetes-validations": [
                *_uri_rules("s3|hf|file", "s3://models/llama-3.1-8b-instruct"),
                {
                    "rule": "!self.matches('^hf://') || "
                    "self.matches('^hf://[A-Za-z0-9][-A-Za-z0-9._]*/[-A-Za-z0-9._]+(@[-A-Za-z0-9._/]+)?$')",
                    "message": "a hub model is written hf://ORG/NAME or hf://ORG/NAME@REVISION",
                },
            ]
        }
    ),
]
DataURI = Annotated[
    _Uri,
    Field(
        json_schema_extra={
            "x-kubernetes-validations": [
                *_uri_rules("s3|hf|file", "s3://datasets/support.jsonl"),
                {
                    "rule": "!self.matches('^hf://') || "
                    "self.matches('^hf://datasets/[A-Za-z0-9][-A-Za-z0-9._]*/[-A-Za-z0-9._]+(@[-A-Za-z0-9._]+)?(/.*)?$')",
                    "message": "a hub data set is written hf://datasets/ORG/NAME or hf://datasets/ORG/NAME@REVISION, "
                    "with /FILE or /FOLDER/ behind it where not all of its files are meant",
                },
                {
                    "rule": f"self.matches('(?i)^hf://datasets/[^/]+/[^/]+$|/$|{_DATA_ENDING}')",
                    "message": "the files of a dataset end in .jsonl, .ndjson, .json, .csv, .tsv or .parquet, all but "
                    ".parquet also with .gz, .bz2, .xz or .zst behind it; a folder ends in /",
                },
            ]
        }
    ),
]
OutputURI = Annotated[
    _Uri, Field(json_schema_extra={"x-kubernetes-validations": _uri_rules("s3|file", "s3://models/support-bot")})
]
ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class ModelSource(ApiModel):
    """The base model: a folder as `save_pretrained` writes it."""

    uri: ModelURI
    """Where the base model is: s3://BUCKET/PREFIX, hf://ORG/NAME[@REVISION], or file:///FOLDER in local mode. The
    revision that was found first is pinned: a model that changes under a running job fails the job."""


class Columns(ApiModel):
    """Names of the columns, where they are not the usual ones of the format."""

    model_config = validations(
        (
            "!(has(self.messages) && has(self.prompt))",
            "messages and prompt are two ways to give the prompt: name one of them",
        ),
    )

    messages: ColumnName | None = None
    """Column with the list of messages: {"role", "content"} objects, or {"from", "value"}."""
    text: ColumnName | None = None
    """Column with plain text."""
    prompt: ColumnName | None = None
    """Column with what the user says (Alpaca: instruction; QuestionAnswer: question)."""
    completion: ColumnName | None = None
    """Column with the answer (Alpaca: output; QuestionAnswer: answer)."""
    input: ColumnName | None = None
    """Column with context that is appended to the prompt after a blank line (Alpaca: input)."""
    system: ColumnName | None = None
    """Column with the system message of the row."""
    tools: ColumnName | None = None
    """Column with the tools that the assistant may call: a list, or JSON text of it."""
    chosen: ColumnName | None = None
    """Column with the better answer."""
    rejected: ColumnName | None = None
    """Column with the worse answer."""
    label: ColumnName | None = None
    """Column that says whether the answer is wanted: true or false."""


def _column_rules(field: str) -> list[tuple[str, str]]:
    """CEL rules of an object with format and columns."""
    rules = [
        (
            "!has(self.columns) || (has(self.format) && self.format != 'Auto')",
            f"columns needs a named format: set {field}",
        )
    ]
    for name, columns in FORMAT_COLUMNS.items():
        others = [column for column in Columns.model_fields if column not in columns]
        named = " || ".join(f"has(self.columns.{column})" for column in others)
        rules.append(
            (
                f"!has(self.columns) || !has(self.format) || self.format != '{name}' || !({named})",
                f"a row of format {name} has the columns {', '.join(columns)}: remove the others from columns",
            )
        )
    return rules


class DataFile(ApiModel):
    """A source of rows: a file, a folder, or all files that match a pattern."""

    model_config = validations(*_column_rules("the format of this source"))

    uri: DataURI
    """Where the rows are: s3://BUCKET/KEY, hf://datasets/ORG/NAME[@REVISION][/FILE], or file:///FILE in local mode. A
    folder ends in /, and * and ** in a name match many files. The ending tells the container: .jsonl, .ndjson, .json,
    .csv, .tsv or .parquet, and all but .parquet may be compressed: .gz, .bz2, .xz, .zst."""
    format: DataFormat | None = None
    """Shape of a row in this source. Absent: dataset.format and dataset.columns."""
    columns: Columns | None = None
    """Names of the columns in this source, together with its format."""


Weight = Annotated[
    str,
    StringConstraints(min_length=1, max_length=12),
    Field(
        json_schema_extra=cel(
            "self.matches('^[1-9]?[0-9]([.][0-9]+)?$|^100([.]0+)?$') && !self.matches('^0([.]0+)?$')",
            'write a decimal number above 0 and up to 100 in quotes, such as "2" or "0.5"',
        )
    ),
]


class TrainFile(DataFile):
    """A source of rows to learn from."""

    weight: Weight | None = None
    """How often each row of this source is learnt in an epoch, as a decimal string; absent, once. "0.5" learns a random
    half of them, "2.5" all of them twice and a random half once more; hyperparameters.seed chooses."""


class InvalidRows(ApiModel):
    """What happens to a row that cannot be used: not JSON, wrong shape, no last assistant turn, empty, too long."""

    policy: RowPolicy = RowPolicy.FAIL
    """Fail stops the job before any GPU is taken and lists the first bad rows. Skip leaves them out and counts them."""
    limit: Annotated[int, Field(ge=0, le=1_000_000_000)] = 100
    """With Skip: the highest number of bad rows that is still acceptable. One more fails the job."""


class Dataset(ApiModel):
    """Rows to learn from, and rows to measure with."""

    model_config = validations(
        (
            "!(has(self.validation) && has(self.validationSplit))",
            "set validation (files) or validationSplit (a fraction of train), not both",
        ),
        *_column_rules("dataset.format"),
        (
            "self.supervised != 'All' || self.supervisedReasoning == 'Enabled'",
            "supervised All learns every token, reasoning included: choose AssistantTurns or LastTurn, or enable "
            "supervisedReasoning",
        ),
    )

    train: Annotated[list[TrainFile], Field(min_length=1, max_length=64)]
    """Sources to learn from: at most 10,000 files in all. Their rows are taken together and shuffled with
    hyperparameters.seed."""
    validation: Annotated[list[DataFile], Field(min_length=1, max_length=64)] | None = None
    """Sources to measure with, before and after training; never learnt from."""
    validation_split: Fraction | None = None
    """Fraction of the train rows that is held out instead of validation files, as a decimal string. When neither is
    set, 5% (at most 200 rows) are held out of 40 or more train rows; "0" holds out nothing."""
    format: DataFormat = DataFormat.AUTO
    """Shape of a row. Auto looks at the first row of each file: Chat has messages, ShareGPT has conversations, Alpaca
    has instruction and output, QuestionAnswer has question and answer, PromptCompletion has prompt and completion, Text
    has text, Preference has chosen and rejected, UnpairedPreference has completion and label."""
    columns: Columns | None = None
    """Names of the columns, where they are not the usual ones of the format."""
    supervised: Supervised = Supervised.ASSISTANT_TURNS
    """What is learnt of a conversation: the text of all assistant turns, of the last one only, or every token. Of Text
    every token is learnt."""
    supervised_reasoning: Literal["Enabled", "Disabled"] = "Enabled"
    """Whether the reasoning of assistant turns is learnt. Disabled: the model sees it and learns the answer alone."""
    max_length: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Longest row in tokens."""
    overlong: OverlongPolicy = OverlongPolicy.FAIL
    """What happens to a longer row. Fail: it is an invalid row. Drop leaves it out. Truncate cuts off its end. Split
    makes several rows of it: of plain text pieces of maxLength tokens, of a conversation rows of whole turns, each with
    the system message. All of it is counted in the report."""
    duplicates: DuplicatePolicy = DuplicatePolicy.KEEP
    """What happens to train rows that are equal to another one: Keep learns them as often as they are there, Remove
    learns them once. Either way they are counted, and train rows that are in the validation set, too, are left out."""
    invalid_rows: InvalidRows = InvalidRows()
    """What happens to a row that cannot be used."""


class LoRA(ApiModel):
    """Low-rank adapter."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the update of each adapted matrix."""
    alpha: Annotated[int, Field(ge=1, le=4096)] = 32
    """The update is scaled by alpha/rank."""
    dropout: Fraction = "0"
    """Dropout on the adapter's input, as a decimal string from "0" to below "1"."""
    target_modules: (
        Annotated[
            list[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]+$", min_length=1, max_length=128)]],
            Field(min_length=1, max_length=32),
        ]
        | None
    ) = None
    """Names of the linear layers to adapt, such as q_proj. Absent: all linear layers except the output head."""


class Quantization(ApiModel):
    """How QLoRA stores the frozen base."""

    type: Literal["NF4"] = "NF4"
    """4-bit NormalFloat."""
    double_quantization: Literal["Enabled", "Disabled"] = "Enabled"
    """Also quantise the quantisation constants, which saves about 0.4 bit per weight."""


class Adapter(ApiModel):
    """What is trained: all weights, or an adapter."""

    model_config = validations(
        (
            "self.type == 'QLoRA' || !has(self.quantization)",
            "quantization belongs to QLoRA: set adapter.type to QLoRA, or remove quantization",
        ),
        (
            "self.type != 'Full' || !has(self.lora)",
            "Full trains all weights and has no adapter: remove lora, or set adapter.type to LoRA or QLoRA",
        ),
    )

    type: AdapterType = AdapterType.QLORA
    """Full trains all weights. LoRA trains an adapter on the base as it is. QLoRA trains an adapter on a base that is
    kept in 4 bits."""
    lora: LoRA | None = None
    """The adapter of LoRA and QLoRA; absent means its defaults."""
    quantization: Quantization | None = None
    """The 4-bit base of QLoRA; absent means its defaults."""


class DPO(ApiModel):
    """Direct preference optimisation."""

    model_config = validations(
        (
            "has(self.labelSmoothing) == (self.loss == 'Robust')",
            "loss Robust and labelSmoothing belong together: set both, or neither",
        ),
    )

    beta: PositiveDecimal = "0.1"
    """How strongly the model is held to the base, as a decimal string: the larger, the closer it stays."""
    loss: DPOLoss = DPOLoss.SIGMOID
    """Sigmoid is DPO itself. IPO is for few or clear-cut pairs, which Sigmoid learns by heart. Hinge stops where a pair
    is told apart by enough. Robust expects pairs that are the wrong way round."""
    label_smoothing: (
        Annotated[
            str,
            StringConstraints(min_length=1, max_length=12),
            Field(
                json_schema_extra=cel(
                    "self.matches('^0[.][0-4][0-9]*$') && !self.matches('^0[.]0*$')",
                    'write a fraction above 0 and below 0.5 in quotes, such as "0.1"',
                )
            ),
        ]
        | None
    ) = None
    """With Robust: the share of the pairs that is expected to be the wrong way round, as a decimal string."""


class KTO(ApiModel):
    """Kahneman-Tversky optimisation."""

    beta: PositiveDecimal = "0.1"
    """How strongly the model is held to the base, as a decimal string: the larger, the closer it stays."""
    desirable_weight: PositiveDecimal = "1"
    """Weight of good answers, as a decimal string. Where one kind is rare, weigh it so that both count alike."""
    undesirable_weight: PositiveDecimal = "1"
    """Weight of bad answers, as a decimal string."""


class Method(ApiModel):
    """How the model learns."""

    model_config = validations(
        (
            "self.type == 'DPO' || !has(self.dpo)",
            "dpo holds settings of DPO: set method.type to DPO, or remove dpo",
        ),
        (
            "self.type == 'KTO' || !has(self.kto)",
            "kto holds settings of KTO: set method.type to KTO, or remove kto",
        ),
        (
            "self.type == 'SFT' || !has(self.adapter.lora) || self.adapter.lora.dropout.matches('^0([.]0*)?$')",
            "DPO and KTO compare the model with the base, and dropout would be taken for a difference: remove "
            "adapter.lora.dropout",
        ),
    )

    type: MethodType = MethodType.SFT
    """SFT: supervised fine-tuning, learning to give the assistant's answers. DPO: direct preference optimisation,
    learning from pairs of answers which one is better. KTO: Kahneman-Tversky optimisation, learning from answers that
    are marked as good or bad."""
    adapter: Adapter = Adapter()
    """What is trained."""
    dpo: DPO | None = None
    """Settings of DPO; absent means its defaults."""
    kto: KTO | None = None
    """Settings of KTO; absent means its defaults."""


class Hyperparameters(ApiModel):
    """Settings of the optimisation."""

    model_config = validations(
        (
            "!(has(self.epochs) && has(self.maxSteps))",
            "set epochs or maxSteps, not both: they are two ways to say how long to train",
        ),
    )

    epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Passes over the train rows. Absent together with maxSteps: 3."""
    max_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Optimiser steps, instead of epochs."""
    learning_rate: Decimal | None = None
    """Peak learning rate, as a decimal string. Absent: for SFT "2e-4" with an adapter and "2e-5" for Full, for DPO
    and KTO "1e-5" and "1e-6"."""
    scheduler: Scheduler = Scheduler.COSINE
    """How the learning rate falls after the warm-up."""
    warmup_ratio: Fraction = "0.03"
    """Share of the steps in which the learning rate rises from zero, as a decimal string below "1"."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 16
    """Rows in one optimiser step over all GPUs. It stays the same whatever fits into memory at once."""
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Rows that one GPU computes at once. Absent: the largest number up to 8 that divides its share of batchSize."""
    weight_decay: Decimal = "0"
    """AdamW weight decay, as a decimal string."""
    max_grad_norm: Decimal = "1"
    """Gradients are scaled down to this norm, as a decimal string."""
    seed: Annotated[int, Field(ge=0, le=4_294_967_295)] = 42
    """Seed of shuffling, initialisation and dropout."""
    optimizer: Optimizer = Optimizer.ADAMW
    """AdamW keeps its state in 32 bits, AdamW8bit in 8 bits, PagedAdamW8bit may also move it to host memory."""
    precision: Precision = Precision.AUTO
    """Number format of the computation. Auto: BF16 where the hardware has it, else F32."""
    activation_checkpointing: Switch = Switch.AUTO
    """Recompute activations in the backward pass to save memory. Auto: on for GPUs, off on CPU."""


class Evaluation(ApiModel):
    """Measurements on the validation rows. The base model is always measured before training and the tuned one
    after it."""

    every_steps: Annotated[int, Field(ge=0, le=100_000_000)] = 0
    """Also measure after every so many steps; 0 does not."""


class Checkpoint(ApiModel):
    """Saving the state of training to S3, so that nothing but the last minutes can be lost."""

    every_steps: Annotated[int, Field(ge=0, le=100_000_000)] = 0
    """Save after every so many steps; 0 leaves it to everySeconds."""
    every_seconds: Annotated[int, Field(ge=0, le=86_400)] = 600
    """Save when so many seconds have passed since the last checkpoint; 0 leaves it to everySteps. With both at 0, only
    a pod that is told to stop saves."""
    keep_last: Annotated[int, Field(ge=1, le=100)] = 2
    """How many checkpoints of an attempt are kept."""
    grace_period_seconds: Annotated[int, Field(ge=10, le=86_400)] = 120
    """Time to save and upload after a pod was told to stop. It becomes the pod's terminationGracePeriodSeconds."""


class Output(ApiModel):
    """Where the tuned model goes."""

    uri: OutputURI
    """Folder of the tuned model: s3://BUCKET/PREFIX, or file:///FOLDER in local mode. manifest.json is written last:
    who sees it sees a complete, verified model."""
    artifacts: (
        Annotated[
            list[Artifact], Field(min_length=1, max_length=2, json_schema_extra={"x-kubernetes-list-type": "set"})
        ]
        | None
    ) = None
    """What is published: Merged is a complete model that loads without peft; Adapter is the adapter alone, in the
    folder adapter/. Absent: both, or Merged for Full."""
    dtype: OutputDtype = OutputDtype.AUTO
    """Number format of the merged weights. Auto: that of the base model."""
    on_existing: OnExisting = OnExisting.FAIL
    """What to do when the folder already holds another job's model: Fail before any GPU is taken, or Overwrite."""


_A_SIZE_FOR_THE_CLASS = (
    "!has(self.storageClassName) || !has(self.ephemeralStorage) || self.ephemeralStorage != '0'",
    "a volume of storageClassName has a size: name it in ephemeralStorage, or leave ephemeralStorage out",
)


class Resources(ApiModel):
    """What a train pod asks for, and how many of them there are."""

    model_config = validations(
        _A_SIZE_FOR_THE_CLASS,
        (
            "self.gpusPerNode <= 1 || !self.gpuResourceName.contains('/mig-')",
            "a process sees one MIG partition only: set gpusPerNode to 1, or choose a larger partition",
        ),
        (
            "self.gpuAllocation != 'ResourceClaims' || (has(self.resourceClaims) && self.gpusPerNode > 0)",
            "gpuAllocation ResourceClaims needs resourceClaims that hold the GPUs, and gpusPerNode that counts them",
        ),
    )

    nodes: Annotated[int, Field(ge=1, le=64)] = 1
    """Train pods that work together, on as many nodes as the scheduler finds for them. All other resources are those of
    each."""
    gpus_per_node: Annotated[int, Field(ge=0, le=16)] = 1
    """GPUs of each train pod, one process each; 0 trains on CPU."""
    gpu_resource_name: Annotated[
        str,
        StringConstraints(
            pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$",
            min_length=3,
            max_length=128,
        ),
    ] = "nvidia.com/gpu"
    """Extended resource that stands for a GPU, such as nvidia.com/gpu, amd.com/gpu or nvidia.com/mig-3g.40gb."""
    gpu_allocation: GPUAllocation = GPUAllocation.DEVICE_PLUGIN
    """DevicePlugin asks for gpusPerNode of gpuResourceName. ResourceClaims leaves the GPUs to resourceClaims, which
    must hold as many as gpusPerNode says."""
    resource_claims: (
        Annotated[
            list[ResourceClaim],
            Field(
                min_length=1,
                max_length=8,
                json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
            ),
        ]
        | None
    ) = None
    """Devices by dynamic resource allocation (Kubernetes 1.34 or newer): GPUs, or network cards beside them."""
    cpu: Quantity | None = None
    """CPU request. Absent: 4 for each GPU, 1 without."""
    memory: Quantity | None = None
    """Memory request and limit. Absent: derived from the size of the model."""
    shared_memory: Quantity = "2Gi"
    """Size limit of /dev/shm, which counts towards memory."""
    ephemeral_storage: Quantity | None = None
    """Disk for base model and checkpoints: request and limit. Absent: a request that is derived from the size of the
    model, without a limit. "0" asks for nothing."""
    storage_class_name: ObjectName | None = None
    """StorageClass of a volume that is made for each pod, as large as ephemeralStorage, and removed with it. Absent:
    the node's own disk."""


class StageResources(Placement):
    """What the pod of a CPU stage asks for, and where it may run."""

    model_config = validations(_A_SIZE_FOR_THE_CLASS)

    cpu: Quantity = "1"
    """CPU request."""
    memory: Quantity | None = None
    """Memory request and limit. Absent: 2Gi for prepare; for export derived from the model's largest tensor."""
    ephemeral_storage: Quantity | None = None
    """Disk for data or models: request and limit. Absent: a request of 2Gi for prepare, and for export one that is
    derived from the size of the model, without a limit. "0" asks for nothing."""
    storage_class_name: ObjectName | None = None
    """StorageClass of a volume that is made for the pod, as large as ephemeralStorage, and removed with it. Absent: the
    node's own disk."""


class Stages(ApiModel):
    """The stages that run without a GPU: resources and placement of their pods."""

    prepare: StageResources = StageResources()
    """Checks access and data, tokenises, and stores the prepared rows."""
    export: StageResources = StageResources()
    """Merges, verifies and publishes the model."""


class FailureRule(ApiModel):
    """What follows from one class of failure, instead of what is usual."""

    failure_class: Annotated[FailureClass, Field(alias="class", json_schema_extra={"enum": RULED_CLASSES})]
    """Class of failure, as status.failure names it."""
    action: FailureAction
    """Fail ends the job at once. Restart tries again and counts towards maxRestarts."""


class FailurePolicy(ApiModel):
    """What happens after a failure. What another try may mend is tried again; errors in the spec, the data, the model
    or the access rights fail at once; preemptions restart for free."""

    max_restarts: Annotated[int, Field(ge=0, le=100)] = 3
    """How many failed attempts are tried again, over all stages."""
    backoff_seconds: Annotated[int, Field(ge=0, le=3600)] = 30
    """Pause before the first restart, give or take a fifth. It doubles with each further one, up to ten minutes. After
    a preemption there is a pause only when the attempt had not saved a checkpoint of its own."""
    no_progress_seconds: Annotated[int, Field(ge=30, le=604_800)] | None = None
    """Training that makes no step for so long is ended and started again from its checkpoint. Absent: the operator's
    setting, half an hour unless it was changed."""
    rules: Annotated[
        list[FailureRule],
        Field(
            max_length=len(RULED_CLASSES),
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["class"]},
        ),
    ] = []
    """What follows from single classes of failure, instead of what is usual."""


class SecretReference(ApiModel):
    """A Secret in the job's own namespace."""

    name: ObjectName
    """Name of the Secret."""


class Storage(ApiModel):
    """How the job's pods reach S3 and the model hub. Absent values come from the operator's settings."""

    endpoint: (
        Annotated[
            str,
            StringConstraints(max_length=512),
            Field(
                json_schema_extra=cel(
                    "self.matches('^https?://[^/@]+(/[^@]*)?$')",
                    "write a URL such as https://minio.storage.svc:9000, with credentials in storage.secretRef only",
                )
            ),
        ]
        | None
    ) = None
    """S3 endpoint, for servers other than AWS."""
    region: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]+$", min_length=1, max_length=64)] | None = None
    """S3 region."""
    addressing_style: AddressingStyle = AddressingStyle.AUTO
    """Path puts the bucket into the path, Virtual into the host name. Auto: Path when an endpoint is set."""
    secret_ref: SecretReference | None = None
    """Secret whose keys become environment variables of the pods: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    optionally AWS_SESSION_TOKEN, and HF_TOKEN for gated models. Without it the pods use their own identity."""
    service_account_name: ObjectName | None = None
    """Service account of the pods, for cloud identities bound to it. No API token is mounted."""
    ca_bundle: CABundle | None = None
    """Certificates that are trusted besides the well-known ones when S3 and the model hub are reached."""
    model_cache: ModelCache | None = None
    """Volume on which base models are kept between jobs, so that they are downloaded once. A job gets from it only what
    it could have read from the source itself."""
    work_uri: OutputURI | None = None
    """Folder of the work files (prepared rows, checkpoints, logs). Absent: .finetune/ below output.uri."""


_NEVER = ("model", "dataset", "method", "hyperparameters", "evaluation", "output")
"""What decides the result, and where it is."""
_WHILE_SUSPENDED = ("checkpoint", "resources", "stages", "scheduling", "podTemplate", "storage")
"""What an attempt is started with. All other fields may change at any time."""

_PROCESSES = "(self.resources.gpusPerNode > 1 ? self.resources.gpusPerNode : 1) * self.resources.nodes"
"""CEL: training processes of all nodes."""


def _format_rules() -> list[tuple[str, str]]:
    rules = []
    for method, formats in METHOD_FORMATS.items():
        named = [DataFormat.AUTO.value, *(name.value for name in formats)]
        rules.append(
            (
                f"self.method.type != '{method}' || (self.dataset.format in {named} && "
                f"self.dataset.train.all(source, !has(source.format) || source.format in {named}) && "
                "(!has(self.dataset.validation) || "
                f"self.dataset.validation.all(source, !has(source.format) || source.format in {named})))",
                f"method.type {method} learns from rows of format {', '.join(formats)}: change format or method",
            )
        )
    return rules


class FineTuneJobSpec(ApiModel):
    """What to train, on what, and where the result goes."""

    model_config = validations(
        (
            "self.method.adapter.type != 'Full' || "
            "!has(self.output.artifacts) || !('Adapter' in self.output.artifacts)",
            "Full trains no adapter: remove Adapter from output.artifacts, or set method.adapter.type to LoRA or QLoRA",
        ),
        *_format_rules(),
        (
            "self.method.type == 'SFT' || "
            "(self.dataset.supervised == 'AssistantTurns' && self.dataset.supervisedReasoning == 'Enabled')",
            "dataset.supervised and dataset.supervisedReasoning belong to SFT: preferences are about whole answers",
        ),
        (
            "self.method.type == 'SFT' || self.dataset.overlong != 'Split'",
            "an answer that is judged cannot be split: set dataset.overlong to Fail, Drop or Truncate",
        ),
        (
            "self.model.uri != self.output.uri",
            "output.uri is the base model's own folder: choose another folder for the tuned model",
        ),
        (
            f"self.hyperparameters.batchSize % ({_PROCESSES}) == 0",
            "hyperparameters.batchSize must be a multiple of resources.gpusPerNode times resources.nodes, so that "
            "every GPU has the same share: change one of them",
        ),
        (
            "!has(self.hyperparameters.microBatchSize) || "
            f"self.hyperparameters.batchSize % (self.hyperparameters.microBatchSize * ({_PROCESSES})) == 0",
            "hyperparameters.batchSize must be a multiple of microBatchSize times the number of GPUs of all nodes: "
            "change one of them, or leave microBatchSize out",
        ),
        (
            "!has(self.scheduling.gpuTypes) || self.resources.gpusPerNode > 0",
            "scheduling.gpuTypes names GPUs, and resources.gpusPerNode asks for none: change one of them",
        ),
        *(
            (
                f"self.{field} == oldSelf.{field}",
                f"{field} cannot be changed after the job was created: delete the job and create it anew",
            )
            for field in _NEVER
        ),
        *(
            (
                f"self.{field} == oldSelf.{field} || oldSelf.suspend",
                f"{field} can be changed only while the job is suspended: set suspend to true first",
            )
            for field in _WHILE_SUSPENDED
        ),
        (
            "has(self.storage.workURI) == has(oldSelf.storage.workURI) && "
            "(!has(self.storage.workURI) || self.storage.workURI == oldSelf.storage.workURI)",
            "storage.workURI cannot be changed after the job was created, because its checkpoints are there: delete "
            "the job and create it anew",
        ),
    )

    model: ModelSource
    """The base model."""
    dataset: Dataset
    """Rows to learn from, and rows to measure with."""
    method: Method = Method()
    """How the model learns."""
    hyperparameters: Hyperparameters = Hyperparameters()
    """Settings of the optimisation."""
    evaluation: Evaluation = Evaluation()
    """Measurements on the validation rows."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving the state of training."""
    output: Output
    """Where the tuned model goes."""
    resources: Resources = Resources()
    """What a train pod asks for, and how many of them there are."""
    stages: Stages = Stages()
    """The stages that run without a GPU."""
    scheduling: Scheduling = Scheduling()
    """Where train pods may run."""
    pod_template: PodTemplate = PodTemplate()
    """What is added to all pods of the job."""
    failure_policy: FailurePolicy = FailurePolicy()
    """What happens after a failure."""
    suspend: bool = False
    """Stop the job and keep its state: a running pod is told to stop, and has checkpoint.gracePeriodSeconds to save.
    Set back to false, the job goes on from its newest checkpoint. Suspended time counts towards no limit."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    """Longest time that pods of this job may run, over all stages and attempts. Waiting, pauses and suspended time do
    not count. A job that reaches it fails, and its running pod has time to save."""
    pre_running_deadline_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    """Longest time that an attempt may wait for its pod to run: for quota, for a node, for its image. A job that
    reaches it fails. Suspended time does not count."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=315_360_000)] | None = None
    """The job is deleted so long after it ended; what it published stays. Absent: it is kept. Do not set it where
    manifests are applied again by themselves: the job would be created and checked anew."""
    ttl_seconds_after_failed: Annotated[int, Field(ge=0, le=315_360_000)] | None = None
    """The same for a job that failed, instead of ttlSecondsAfterFinished."""
    storage: Storage = Storage()
    """How the job's pods reach S3 and the model hub."""
