"""Train: one of the training processes of the pod. What it needs is on disk (see `fetch`).

Order: measure the base, train, measure the tuned model, record the probe, hand everything over to export. A model that
did not reach its last step is never handed over.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import secrets
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, set_seed

from finetune_api.document import JobDocument
from finetune_api.failures import FailureClass, JobError
from finetune_api.report import Report
from finetune_api.spec import AdapterType, MethodType
from finetune_api.status import EvaluationResult, Resolved
from finetune_trainer import bundle, evaluate, layout, models, preference, probe, quantized, training
from finetune_trainer.bundle import BundleFile
from finetune_trainer.checkpoints import CheckpointUploader
from finetune_trainer.data import prepared
from finetune_trainer.evaluate import Evaluation, TokenEvaluation
from finetune_trainer.layout import PodDisk
from finetune_trainer.manifest import installed_versions
from finetune_trainer.plan import TrainingPlan
from finetune_trainer.reporting import Reporter
from finetune_trainer.stages import fetch
from finetune_trainer.storage import Folder, open_folder
from finetune_trainer.training import StopSignal
from finetune_trainer.world import World

log = logging.getLogger(__name__)

ADAPTER = "adapter"
WEIGHTS = "weights"
QUANTIZED = "quantized"
PROBE = "probe"
RESULT_FILE = "result.json"
HISTORY_FILE = "history.jsonl"


def run(document: JobDocument, disk: PodDisk, reporter: Reporter | None) -> training.Trainer | None:
    """Train, and return what holds the process group; None when there was nothing to do.

    `reporter` is that of the main process; the others have none.
    """
    stop = StopSignal()
    stop.install()
    world = World.from_environment()
    spec = document.spec
    plan = fetch.read_plan(disk)
    work = open_folder(document.work_uri, document.storage)
    if bundle.read(work, layout.final_prefix(document.attempt)) is not None:
        log.info("this attempt has finished before; there is nothing to do")
        return None

    world.require_gpus(spec.resources.gpus_per_node)
    compute = models.precision(spec, world)
    checkpointing = models.activation_checkpointing(spec, world)
    micro_batch = document.micro_batch_size
    if reporter and world.size > 1:
        reporter.phase("Connecting")
    config = training.arguments(
        spec,
        plan,
        world,
        output=disk.training,
        compute=compute,
        micro_batch_size=micro_batch,
        checkpointing=checkpointing,
    )
    # The configuration has set up the process group, so that processes can speak from here on.
    if not world.same(*fetch.read_resumed(disk)):
        raise JobError(
            FailureClass.COMMUNICATION,
            "The pods found different checkpoints to go on from; the next attempt looks anew.",
        )
    train_rows = prepared.read_rows(disk.data / prepared.TRAIN_FILE)
    validation_rows = prepared.read_rows(disk.data / prepared.VALIDATION_FILE)
    if reporter:
        reporter.resolved(
            micro_batch_size=micro_batch,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            world_size=world.size,
            precision=compute,
            activation_checkpointing="Enabled" if checkpointing else "Disabled",
            device=torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU",
        )
        reporter.phase("Loading")

    if spec.method.type is MethodType.KTO:
        train_rows = preference.with_others(train_rows, spec.hyperparameters.seed)
        validation_rows = preference.with_others(validation_rows, spec.hyperparameters.seed)
    compared = preference.evaluation_of(spec.method, validation_rows, world, compute)
    evaluation: Evaluation = compared or TokenEvaluation(validation_rows, world)
    base = _BaseMeasurement(work, evaluation, reporter)
    quantizes = spec.method.adapter.type is AdapterType.QLORA
    if quantizes and base.missing and len(validation_rows):
        # The float base is measured on its own, and its memory given back, before the 4-bit one is loaded. Where there
        # is no room for it, and QLoRA may be asked for just because of that, only the 4-bit one is measured.
        (too_large,) = world.any(not models.fits(plan.parameters, compute, world))
        if too_large:
            log.warning("the base in %s does not fit into the GPU; only the base in 4 bits is measured", compute)
        else:
            base.measure_float(models.load_base(disk.base, compute, world))
    stop.check()
    set_seed(spec.hyperparameters.seed)
    model = models.load_for_training(disk.base, spec, compute, world)
    stop.check()
    if compared:
        # Before a checkpoint is loaded: now the model is its own reference.
        compared.reference = _reference("validation", validation_rows, model, compared, work, reporter)
        if training.needs_reference(spec.method):
            reference = _reference("train", train_rows, model, compared, work, reporter)
            train_rows = compared.with_reference(train_rows, reference)
    if base.missing or base.quantized_missing(quantizes):
        base.measure_loaded(model, quantized=quantizes)
    stop.check()

    handover = _Handover(document, disk, work) if reporter else None
    if handover and quantizes:
        handover.send_quantized(model)
    facts = {"document": document.digest, "data": plan.data.train.sha256, "world_size": world.size}
    node, local_rank = divmod(world.rank, document.processes)
    life = int(world.of_main(secrets.randbits(32)))
    uploader = CheckpointUploader(work, document, reporter, facts, node, life) if local_rank == 0 else None
    callback = training.LoopCallback(spec, plan, world, stop, reporter, uploader, evaluation.tuned)
    tokenizer = AutoTokenizer.from_pretrained(disk.base, local_files_only=True)
    trainer = training.build_trainer(model, tokenizer, train_rows, config, [callback])
    resume = disk.checkpoint if disk.checkpoint.is_dir() else None
    # Training shuffles with its own generators; what was drawn before must not depend on what was measured before.
    set_seed(spec.hyperparameters.seed)
    with contextlib.ExitStack() as at_the_end:
        # Whatever ends the training, a checkpoint that is on its way arrives; last, since phases need room on the disk.
        if uploader:
            at_the_end.callback(uploader.close)
        if reporter:
            at_the_end.callback(reporter.phase, "Saving")
        training.train(trainer, resume, callback)
    # `train` returns normally after an early stop: only the step count tells.
    step = trainer.state.global_step
    if step < plan.total_steps:
        saved = "a checkpoint was saved" if uploader and uploader.newest == step else "it could not be saved"
        raise training.stopped(f"after step {step} of {plan.total_steps}" + (f"; {saved}" if reporter else ""))

    if reporter:
        reporter.phase("Evaluating")
    measured = reporter.measured if reporter else evaluate.unseen
    tuned = evaluation.tuned(trainer.model, measured)
    if reporter:
        reporter.evaluation(tuned=tuned)
        if tuned:
            log.info("tuned model: validation perplexity %s", tuned.perplexity)
        reporter.phase("Saving")
    if handover and reporter:
        handover.complete(plan, trainer, train_rows, validation_rows, reporter.report)
        reporter.phase("Done")
    world.barrier()
    trainer.end()
    return trainer


def _reference(
    name: str, rows: Dataset, model: Any, evaluation: preference.Evaluation, work: Folder, reporter: Reporter | None
) -> torch.Tensor:
    """What the base says of a set's answers. It is stored, so that all attempts have the same and only the first one
    computes it."""
    key = layout.reference(name, evaluation.compute)
    # Another process may be ahead, so that all do what one of them has to do.
    (missing,) = evaluation.world.any(work.stat(key) is None)
    if not missing:
        return preference.decode(work.read(key))
    if reporter:
        reporter.phase("MeasuringBase")
    found = evaluation.log_probs(model, rows, reporter.measured if reporter else evaluate.unseen)
    if reporter:
        work.write(key, preference.encode(found))
    return found


class _BaseMeasurement:
    """The base measured before the first step of the first attempt, and stored: a resumed attempt must not measure a
    tuned model as the base."""

    def __init__(self, work: Folder, evaluation: Evaluation, reporter: Reporter | None) -> None:
        self._work = work
        self._evaluation = evaluation
        self._reporter = reporter
        self._result = EvaluationResult()
        if work.stat(layout.BASE_EVALUATION) is not None:
            self._result = EvaluationResult.model_validate_json(work.read(layout.BASE_EVALUATION))
            self._report()

    @property
    def missing(self) -> bool:
        return self._result.base is None

    def quantized_missing(self, quantizes: bool) -> bool:
        return quantizes and self._result.quantized_base is None

    def measure_float(self, model: Any) -> None:
        self._measure(model, "base")
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def measure_loaded(self, model: Any, *, quantized: bool) -> None:
        """Measure the model that will be trained; its adapter, if any, still does nothing."""
        self._measure(model, "quantized_base" if quantized else "base")

    def _measure(self, model: Any, name: str) -> None:
        if self._reporter:
            self._reporter.phase("MeasuringBase")
        result = self._evaluation.base(model, self._reporter.measured if self._reporter else evaluate.unseen)
        if result is None:
            return
        self._result = self._result.model_copy(update={name: result})
        if self._reporter:
            log.info("%s: validation perplexity %s", name.replace("_", " "), result.perplexity)
            self._work.write(layout.BASE_EVALUATION, self._result.model_dump_json(by_alias=True).encode())
            self._report()

    def _report(self) -> None:
        if self._reporter:
            self._reporter.evaluation(base=self._result.base, quantized_base=self._result.quantized_base)


class _Handover:
    """Stores what export needs, as one bundle."""

    def __init__(self, document: JobDocument, disk: PodDisk, work: Folder) -> None:
        self._document = document
        self._disk = disk
        self._work = work
        self._prefix = layout.final_prefix(document.attempt)
        self._sending: Future[list[BundleFile]] | None = None

    def send_quantized(self, model: Any) -> None:
        """Store the 4-bit base in the background while training runs: it will not change any more."""
        quantized.store(model, self._disk.quantized)
        self._sending = ThreadPoolExecutor(1).submit(
            bundle.upload_files, self._disk.quantized, self._work, f"{self._prefix}/{QUANTIZED}"
        )

    def complete(
        self, plan: TrainingPlan, trainer: training.Trainer, train: Dataset, validation: Dataset, report: Report
    ) -> None:
        final = self._disk.final
        shutil.rmtree(final, ignore_errors=True)
        (final / PROBE).mkdir(parents=True)
        # Without the wrapper that computes in mixed precision.
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        rows = probe.choose(train, validation, self._document.spec.hyperparameters.seed)
        probe.store(final / PROBE, rows, probe.log_probs(model, rows))
        if self._document.spec.method.adapter.type is AdapterType.FULL:
            model.save_pretrained(final / WEIGHTS, max_shard_size="2GB")
        else:
            model.save_pretrained(final / ADAPTER)
            (final / ADAPTER / "README.md").unlink(missing_ok=True)
        history = "".join(json.dumps(entry) + "\n" for entry in trainer.state.log_history)
        (final / HISTORY_FILE).write_text(history)
        result = {
            "evaluation": (report.evaluation or EvaluationResult()).to_json_dict(),
            "resolved": (report.resolved or Resolved()).to_json_dict(),
            "totalSteps": plan.total_steps,
            "versions": installed_versions(),
        }
        (final / RESULT_FILE).write_text(json.dumps(result, indent=1))
        files = bundle.upload_files(final, self._work, self._prefix)
        for file in self._sending.result() if self._sending else []:
            files.append(file.model_copy(update={"path": f"{QUANTIZED}/{file.path}"}))
        bundle.publish(self._work, self._prefix, files, {"document": self._document.digest})


def read_result(folder: Path) -> dict[str, Any]:
    """What the train stage handed over beside the weights."""
    result: dict[str, Any] = json.loads((folder / RESULT_FILE).read_text())
    return result
