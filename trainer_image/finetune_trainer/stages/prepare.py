"""Prepare: find out on a CPU all that could go wrong before a GPU is taken, and store the token rows.

In this order, because the cheap checks come first: may we write the output, is it free, does the model exist and is it
usable, do the data exist, is every row usable.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import ceil
from pathlib import Path

from finetune_api.document import JobDocument, StorageSettings
from finetune_api.failures import FailureClass, JobError
from finetune_api.names import OWNER_FILE
from finetune_api.spec import AdapterType, Artifact, Dataset, DuplicatePolicy, FineTuneJobSpec, MethodType, OutputDtype
from finetune_api.status import DatasetResult
from finetune_trainer import layout
from finetune_trainer.architecture import require_adaptable
from finetune_trainer.base_model import SMALL_FILES, BaseModel
from finetune_trainer.data import pipeline, report, sources
from finetune_trainer.data.pipeline import PreparedData
from finetune_trainer.data.prepared import TRAIN_FILE, VALIDATION_FILE, SetSummary
from finetune_trainer.data.render import TEMPLATE_DATE, Renderer, Rules
from finetune_trainer.data.report import DataReport
from finetune_trainer.layout import PodDisk
from finetune_trainer.manifest import find_published, report_published, require_free
from finetune_trainer.plan import DataPlan, PreparedSet, SourceFile, TrainingPlan, load_plan
from finetune_trainer.reporting import Reporter
from finetune_trainer.storage import open_folder
from finetune_trainer.storage.base import Folder
from finetune_trainer.storage.s3 import sha256_file

log = logging.getLogger(__name__)

MAX_URI = 1024
"""What the status has room for."""

PROBE = "prepare/write-probe"
OUTPUT_PROBE = ".finetune/write-probe"
LEARNING_RATES = {
    MethodType.SFT: ("2e-5", "2e-4"),
    MethodType.DPO: ("1e-6", "1e-5"),
    MethodType.KTO: ("1e-6", "1e-5"),
}
"""Where none is given: for all weights, and for an adapter, which is small and begins at zero."""


def run(document: JobDocument, disk: PodDisk, reporter: Reporter) -> None:
    spec = document.spec
    reporter.phase("CheckingAccess")
    work = open_folder(document.work_uri, document.storage)
    output = open_folder(spec.output.uri, document.storage)
    _probe_writing(work, PROBE)
    # Whoever cleans up later can tell whose files these are, also when the job is gone.
    work.write(OWNER_FILE, document.job.model_dump_json(by_alias=True).encode())
    if document.spec.storage.work_uri is not None:
        # Else the work files are below the output.
        _probe_writing(output, OUTPUT_PROBE)
    model = BaseModel(open_folder(spec.model.uri, document.storage))
    if model.folder.uri == output.uri:
        raise JobError(
            FailureClass.USER_ERROR, f"output.uri is the base model's own folder, {output.uri}. Choose another folder."
        )
    model.require_trainable()
    train_sources, validation_sources = sources.find(spec.dataset, document.storage)

    published = find_published(output, document.digest, model.pin, train_sources, validation_sources)
    if published is not None:
        log.info("%s already holds the verified result of this specification", output.uri)
        # For a later stage, should this report be lost with its pod.
        work.write(layout.PUBLISHED, b"{}")
        reporter.update(already_published=True)
        report_published(output, published, reporter)
        return
    require_free(output, document)

    plan = load_plan(document)
    if plan is None or not _still_true(plan, document, model, train_sources, validation_sources):
        plan = _prepare(document, disk, reporter, model, work, train_sources, validation_sources)
    _report(plan, document, model, reporter)
    reporter.phase("Done")


def _probe_writing(folder: Folder, key: str) -> None:
    """Learn now, not after hours of training, whether the job may write."""
    folder.write(key, b"")
    folder.delete([key])


def _still_true(
    plan: TrainingPlan,
    document: JobDocument,
    model: BaseModel,
    train_sources: list[SourceFile],
    validation_sources: list[SourceFile],
) -> bool:
    """Whether an earlier attempt of this stage prepared just this."""
    return (
        plan.document_digest == document.digest
        and plan.model.revision == model.pin.revision
        and plan.data.train_sources == train_sources
        and plan.data.validation_sources == validation_sources
    )


def _prepare(
    document: JobDocument,
    disk: PodDisk,
    reporter: Reporter,
    model: BaseModel,
    work: Folder,
    train_sources: list[SourceFile],
    validation_sources: list[SourceFile],
) -> TrainingPlan:
    spec = document.spec
    reporter.phase("Downloading")
    model.download(disk.base, SMALL_FILES)
    renderer = load_renderer(disk.base, model, spec.dataset)
    full = spec.method.adapter.type is AdapterType.FULL
    artifacts = spec.output.artifacts or ([Artifact.MERGED] if full else [Artifact.MERGED, Artifact.ADAPTER])
    if not full:
        stored = {tensor.name for tensor in model.tensors}
        require_adaptable(disk.base, spec.method.adapter, stored, merge=Artifact.MERGED in artifacts)
    data, described = read_data(
        spec,
        document.storage,
        model.folder.uri,
        renderer,
        train_sources,
        validation_sources,
        disk.data,
        fetched=lambda: reporter.phase("Tokenizing"),
    )

    reporter.phase("Uploading")
    work.write(layout.DATA_REPORT_JSON, described.encode())
    work.write(layout.DATA_REPORT, report.to_markdown(described).encode())
    steps_per_epoch = ceil(data.train.rows / spec.hyperparameters.batch_size)
    plan = TrainingPlan(
        document_digest=document.digest,
        model=model.pin,
        model_type=str(model.config.get("model_type", "")),
        parameters=model.parameters,
        weight_dtype=model.dtype,
        data=DataPlan(
            format=", ".join(data.formats),
            train_sources=train_sources,
            validation_sources=validation_sources,
            skipped_rows=data.problems.count,
            overlong_rows=renderer.counts.overlong,
            duplicate_rows=data.duplicates,
            leaked_rows=data.leaked,
            split_conversations=renderer.counts.split_conversations,
            template_date=TEMPLATE_DATE.date().isoformat(),
            train=_store(work, data.train, disk.data / TRAIN_FILE),
            validation=_store(work, data.validation, disk.data / VALIDATION_FILE),
        ),
        stop_ids=renderer.stop_ids,
        total_steps=spec.hyperparameters.max_steps or steps_per_epoch * (spec.hyperparameters.epochs or 3),
        learning_rate=spec.hyperparameters.learning_rate or LEARNING_RATES[spec.method.type][0 if full else 1],
        artifacts=[str(item) for item in artifacts],
        dtype=model.dtype if spec.output.dtype is OutputDtype.AUTO else str(spec.output.dtype),
    )
    # The plan is written last: who finds it finds all that it names.
    work.write(layout.PLAN, plan.model_dump_json(by_alias=True, indent=1).encode())
    return plan


def read_data(
    spec: FineTuneJobSpec,
    storage: StorageSettings,
    model: str,
    renderer: Renderer,
    train_sources: list[SourceFile],
    validation_sources: list[SourceFile],
    target: Path,
    fetched: Callable[[], None] = lambda: None,
) -> tuple[PreparedData, DataReport]:
    """Fetch the data into `target`, and write the prepared sets there. `model` is its name in the report, and `fetched`
    is called when the data are here.

    Raises:
        JobError: the data cannot be used.
    """
    train_files = sources.download(train_sources, target / "train", storage)
    validation_files = sources.download(validation_sources, target / "validation", storage)
    fetched()
    data = pipeline.prepare(
        spec.dataset, spec.method.type, spec.hyperparameters.seed, renderer, train_files, validation_files, target
    )
    described = report.build(
        data,
        renderer,
        model=model,
        method=spec.method.type,
        weights=[source.weight or "1" for source in spec.dataset.train],
        duplicates_removed=spec.dataset.duplicates is DuplicatePolicy.REMOVE,
        train=target / TRAIN_FILE,
        validation=target / VALIDATION_FILE,
        seed=spec.hyperparameters.seed,
    )
    return data, described


def load_renderer(folder: Path, model: BaseModel, dataset: Dataset) -> Renderer:
    """With the tokenizer and template in a folder.

    Raises:
        JobError: ModelError, when they cannot be used.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = model.config.get("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise JobError(
            FailureClass.MODEL_ERROR,
            f"The model type {model_type!r} in config.json is no causal language model that transformers knows. Use a "
            "text generation model.",
        )
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise JobError(
            FailureClass.MODEL_ERROR, f"The model's config or tokenizer cannot be loaded: {error}. Upload them again."
        ) from error
    has_generation = (folder / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(folder) if has_generation else None
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or dataset.max_length
    rules = Rules(
        min(dataset.max_length, context),
        dataset.overlong,
        dataset.supervised,
        reasoning=dataset.supervised_reasoning == "Enabled",
    )
    return Renderer(tokenizer, generation, rules)


def _store(work: Folder, summary: SetSummary, path: Path) -> PreparedSet:
    file_sha256 = sha256_file(path)
    work.upload(path, f"{layout.PREPARE}/{path.name}", file_sha256)
    return PreparedSet(
        rows=summary.rows,
        tokens=summary.tokens,
        supervised_tokens=summary.supervised_tokens,
        longest=summary.longest,
        sha256=summary.sha256,
        file_sha256=file_sha256,
    )


def _report(plan: TrainingPlan, document: JobDocument, model: BaseModel, reporter: Reporter) -> None:
    data = plan.data
    reporter.update(
        dataset=DatasetResult(
            format=data.format,
            train_rows=data.train.rows,
            validation_rows=data.validation.rows,
            skipped_rows=data.skipped_rows,
            overlong_rows=data.overlong_rows,
            duplicate_rows=data.duplicate_rows,
            leaked_rows=data.leaked_rows,
            report_uri=uri if len(uri := f"{document.work_uri}/{layout.DATA_REPORT}") <= MAX_URI else None,
            train_tokens=data.train.tokens,
            supervised_tokens=data.train.supervised_tokens,
            sha256=data.train.sha256,
        ),
    )
    reporter.resolved(
        weight_bytes=sum(tensor.size for tensor in model.tensors),
        largest_tensor_bytes=max(tensor.size for tensor in model.tensors),
        model_type=plan.model_type,
        model_revision=plan.model.revision,
        parameters=plan.parameters,
        learning_rate=plan.learning_rate,
        total_steps=plan.total_steps,
        batch_size=document.spec.hyperparameters.batch_size,
        world_size=document.world_size,
        artifacts=plan.artifacts,
        dtype=plan.dtype,
        work_uri=document.work_uri,
    )
    log.info(
        "prepared %d train rows (%d tokens, %d learnt) and %d validation rows; %d rows skipped",
        data.train.rows,
        data.train.tokens,
        data.train.supervised_tokens,
        data.validation.rows,
        data.skipped_rows,
    )
