"""Prepare: find out on a CPU all that could go wrong before a GPU is taken, and store the token rows.

In this order, because the cheap checks come first: may we write the output, is it free, does the model exist and is it
usable, do the data exist, is every row usable.
"""

from __future__ import annotations

import logging
import random
from array import array
from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path

from finetune_api.document import JobDocument
from finetune_api.failures import FailureClass, JobError
from finetune_api.names import OWNER_FILE
from finetune_api.spec import AdapterType, Artifact, DataFile, Dataset, Method, MethodType, OutputDtype
from finetune_api.status import DatasetResult
from finetune_trainer import layout
from finetune_trainer.architecture import require_adaptable
from finetune_trainer.base_model import SMALL_FILES, BaseModel
from finetune_trainer.data import prepared
from finetune_trainer.data.formats import row_format
from finetune_trainer.data.preferences import labelled_row, pair_row
from finetune_trainer.data.prepared import (
    TRAIN_FILE,
    VALIDATION_FILE,
    LabelledRow,
    PairRow,
    PreparedRow,
    RowKind,
    SetSummary,
)
from finetune_trainer.data.render import TEMPLATE_DATE, Renderer, TokenRow
from finetune_trainer.data.rows import BadRow, Problems, Row, RowError, read_rows
from finetune_trainer.layout import PodDisk
from finetune_trainer.manifest import find_published, report_published, require_free
from finetune_trainer.plan import DataPlan, PreparedSet, SourceFile, TrainingPlan, load_plan
from finetune_trainer.reporting import Reporter
from finetune_trainer.storage import open_file, open_folder
from finetune_trainer.storage.base import Folder, ObjectInfo
from finetune_trainer.storage.s3 import sha256_file

log = logging.getLogger(__name__)

PROBE = "prepare/write-probe"
OUTPUT_PROBE = ".finetune/write-probe"
DEFAULT_SPLIT = 0.05
DEFAULT_SPLIT_MAX_ROWS = 200
DEFAULT_SPLIT_MIN_ROWS = 40
"""Fewer train rows than this are not split unless the user says so: a handful of rows would measure nothing."""

ROWS: dict[MethodType, RowKind] = {
    MethodType.SFT: TokenRow,
    MethodType.DPO: PairRow,
    MethodType.KTO: LabelledRow,
}
"""What a method learns from."""
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
    train_sources = _sources(spec.dataset.train, document)
    validation_sources = _sources(spec.dataset.validation or [], document)

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


def _sources(files: list[DataFile], document: JobDocument) -> list[SourceFile]:
    sources = []
    for file in files:
        folder, key = open_file(file.uri, document.storage)
        info = folder.stat(key)
        if info is None:
            raise JobError(FailureClass.NOT_FOUND, f"The data file {file.uri} does not exist. Correct the URI.")
        if info.size == 0:
            raise JobError(FailureClass.DATA_ERROR, f"The data file {file.uri} is empty. Upload rows.")
        sources.append(SourceFile(uri=file.uri, size=info.size, version=info.version))
    return sources


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
    renderer = _renderer(disk.base, model, spec.dataset)
    full = spec.method.adapter.type is AdapterType.FULL
    artifacts = spec.output.artifacts or ([Artifact.MERGED] if full else [Artifact.MERGED, Artifact.ADAPTER])
    if not full:
        stored = {tensor.name for tensor in model.tensors}
        require_adaptable(disk.base, spec.method.adapter, stored, merge=Artifact.MERGED in artifacts)
    train_files = _download(train_sources, disk.data / "train", document)
    validation_files = _download(validation_sources, disk.data / "validation", document)

    reporter.phase("Tokenizing")
    rows = _Rows(spec.dataset, spec.method, renderer)
    kind = ROWS[spec.method.type]
    train_path, validation_path = disk.data / TRAIN_FILE, disk.data / VALIDATION_FILE
    if validation_sources:
        train = prepared.write_rows(rows.prepared(train_files), train_path, kind)
        validation = prepared.write_rows(rows.prepared(validation_files), validation_path, kind)
        rows.check()
    else:
        both = disk.data / "all.arrow"
        prepared.write_rows(rows.prepared(train_files), both, kind)
        rows.check()
        held_out = _held_out(rows.example_count, spec.dataset.validation_split, spec.hyperparameters.seed)
        learnt = _select(both, kind, rows.examples, held_out, inside=False)
        measured = _select(both, kind, rows.examples, held_out, inside=True)
        train = prepared.write_rows(learnt, train_path, kind)
        validation = prepared.write_rows(measured, validation_path, kind)
        both.unlink()
    _require_rows(train, validation, spec.dataset)
    if kind is LabelledRow:
        _require_labels(train_path, validation_path)

    reporter.phase("Uploading")
    steps_per_epoch = ceil(train.rows / spec.hyperparameters.batch_size)
    plan = TrainingPlan(
        document_digest=document.digest,
        model=model.pin,
        model_type=str(model.config.get("model_type", "")),
        parameters=model.parameters,
        weight_dtype=model.dtype,
        data=DataPlan(
            format=", ".join(sorted(rows.formats)),
            train_sources=train_sources,
            validation_sources=validation_sources,
            skipped_rows=rows.problems.count,
            split_conversations=renderer.split_conversations,
            template_date=TEMPLATE_DATE.date().isoformat(),
            train=_store(work, train, train_path),
            validation=_store(work, validation, validation_path),
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


def _download(sources: list[SourceFile], target: Path, document: JobDocument) -> list[tuple[str, Path]]:
    """Fetch data files; pairs of the name a user knows and the local path."""
    files = []
    for number, source in enumerate(sources):
        folder, key = open_file(source.uri, document.storage)
        path = target / str(number)
        folder.download(ObjectInfo(key, source.size, source.version), path)
        files.append((source.uri, path))
    return files


def _renderer(folder: Path, model: BaseModel, dataset: Dataset) -> Renderer:
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
    return Renderer(tokenizer, generation, min(dataset.max_length, context))


class _Rows:
    """Streams prepared rows out of files, counting what cannot be used."""

    def __init__(self, dataset: Dataset, method: Method, renderer: Renderer) -> None:
        self._dataset = dataset
        self._method = method
        self._renderer = renderer
        self.problems = Problems(dataset.invalid_rows.policy, dataset.invalid_rows.limit)
        self.formats: set[str] = set()
        self.seen = 0
        self.example_count = 0
        self.examples = array("L")
        """For each prepared row the number of its example: rows of one conversation stay on one side of a split."""

    def prepared(self, files: list[tuple[str, Path]]) -> Iterator[PreparedRow]:
        for name, path in files:
            understand: Callable[[Row], list[PreparedRow]] | None = None
            for row in read_rows(path, name):
                self.seen += 1
                if isinstance(row, BadRow):
                    self.problems.add(row)
                    continue
                if understand is None:
                    understand = self._understand(row)
                yield from self._rows_of(row, understand)

    def _understand(self, first: Row) -> Callable[[Row], list[PreparedRow]]:
        """How the rows of a file are made into prepared ones."""
        if self._method.type is MethodType.DPO:
            self.formats.add("Preference")
            return lambda row: [pair_row(row, self._renderer)]
        if self._method.type is MethodType.KTO:
            self.formats.add("Labelled")
            return lambda row: [labelled_row(row, self._renderer)]
        shape = row_format(self._dataset.format, self._dataset.columns, first)
        self.formats.add(str(shape.format))
        return lambda row: list(self._renderer.rows(shape.parse(row)))

    def _rows_of(self, row: Row, understand: Callable[[Row], list[PreparedRow]]) -> Iterator[PreparedRow]:
        try:
            rows = understand(row)
        except RowError as error:
            self.problems.add(BadRow(row.file, row.number, str(error)))
            return
        self.examples.extend([self.example_count] * len(rows))
        self.example_count += 1
        yield from rows

    def check(self) -> None:
        self.problems.check(self.seen)


def _held_out(examples: int, split: str | None, seed: int) -> set[int]:
    """The examples that are measured instead of learnt."""
    if split is None:
        count = min(DEFAULT_SPLIT_MAX_ROWS, round(examples * DEFAULT_SPLIT))
        count = count if examples >= DEFAULT_SPLIT_MIN_ROWS else 0
    else:
        fraction = float(split)
        count = min(examples - 1, max(1, round(examples * fraction))) if fraction and examples else 0
    return set(random.Random(seed).sample(range(examples), count))


def _select(
    path: Path, kind: RowKind, examples: array[int], held_out: set[int], *, inside: bool
) -> Iterator[PreparedRow]:
    rows = prepared.read_rows(path)
    for number, example in enumerate(examples):
        if (example in held_out) == inside:
            yield kind(**rows[number])


def _require_rows(train: SetSummary, validation: SetSummary, dataset: Dataset) -> None:
    if train.rows == 0:
        raise JobError(FailureClass.DATA_ERROR, "dataset.train has no usable row. Upload rows to learn from.")
    if dataset.validation and validation.rows == 0:
        raise JobError(
            FailureClass.DATA_ERROR, "dataset.validation has no usable row. Upload rows, or remove dataset.validation."
        )


def _require_labels(train: Path, validation: Path) -> None:
    """What is good is learnt from what is not, and measured on what is good."""
    labels = prepared.read_rows(train)["label"]
    if all(labels) or not any(labels):
        raise JobError(
            FailureClass.DATA_ERROR,
            f"The label of all train rows is {str(labels[0]).lower()}. Add rows with the other label.",
        )
    measured = prepared.read_rows(validation)["label"]
    if len(measured) and not any(measured):
        raise JobError(
            FailureClass.DATA_ERROR,
            "No validation row has the label true, so that nothing could be said of good answers. Add some, or hold "
            "out more rows.",
        )


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
