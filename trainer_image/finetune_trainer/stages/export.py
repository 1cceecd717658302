"""Export: write the model as it is published, prove that it is the trained one, upload it, and publish the manifest.

Runs on a CPU. Memory holds one tensor while merging and one layer while verifying. A failed upload is tried again
without training again.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from finetune_api.document import JobDocument
from finetune_api.failures import FailureClass, JobError
from finetune_api.spec import AdapterType, Artifact, OnExisting
from finetune_api.status import ArtifactResult, EvaluationResult, Verification
from finetune_trainer import bundle, card, layout, models, probe
from finetune_trainer.base_model import CONFIG, SMALL_FILES, BaseModel, open_pinned
from finetune_trainer.bundle import Bundle
from finetune_trainer.layout import MANIFEST, PodDisk
from finetune_trainer.manifest import (
    ADAPTER_FOLDER,
    Lineage,
    Manifest,
    PublishedFile,
    find_published,
    manifest_artifact,
    read_manifest,
    report_published,
    require_no_other_model,
    spec_lineage,
)
from finetune_trainer.merge import LoraDeltas, Merge, output_spec
from finetune_trainer.models import TORCH_DTYPES
from finetune_trainer.plan import TrainingPlan, require_plan
from finetune_trainer.quantized import QuantizedWeights
from finetune_trainer.reporting import Reporter, now
from finetune_trainer.shards import write_model
from finetune_trainer.stages.train import ADAPTER, PROBE, QUANTIZED, WEIGHTS, read_result
from finetune_trainer.storage import Folder, open_folder
from finetune_trainer.storage.base import ObjectInfo
from finetune_trainer.storage.files import FileFolder
from finetune_trainer.storage.s3 import sha256_file

log = logging.getLogger(__name__)


def run(document: JobDocument, disk: PodDisk, reporter: Reporter) -> None:
    work = open_folder(document.work_uri, document.storage)
    output = open_folder(document.spec.output.uri, document.storage)
    if work.stat(layout.PUBLISHED) is not None:
        report_published(output, _require_manifest(output), reporter)
        return
    plan = require_plan(document)
    published = find_published(
        output, document.digest, plan.model, plan.data.train_sources, plan.data.validation_sources
    )
    if published is not None:
        log.info("an earlier attempt has published the model")
        report_published(output, published, reporter)
        return
    reporter.phase("Downloading")
    base = open_pinned(plan.model, document.storage)
    trained = _fetch_trained(document, work, disk.final)
    result = read_result(disk.final)
    evaluation = EvaluationResult.model_validate(result["evaluation"])
    reporter.update(evaluation=evaluation)

    shutil.rmtree(disk.output, ignore_errors=True)
    disk.output.mkdir(parents=True)
    verification = None
    if Artifact.MERGED in plan.artifacts:
        reporter.phase("Merging")
        _write_merged(document, plan, base, trained, disk)
        reporter.phase("Verifying")
        verification = _verify(disk)
        reporter.update(verification=verification)
    if Artifact.ADAPTER in plan.artifacts:
        _write_adapter(disk.final / ADAPTER, disk.output / ADAPTER_FOLDER, plan)
    (disk.output / "README.md").write_text(card.render(document, plan, evaluation, verification))

    reporter.phase("Publishing")
    lineage = _lineage(document, plan, result)
    artifacts = _publish(document, output, disk.output, lineage, evaluation, verification)
    reporter.update(artifacts=artifacts)
    reporter.phase("Done")
    log.info("published %s", output.uri)


def _require_manifest(output: Folder) -> Manifest:
    manifest = read_manifest(output)
    if manifest is None:
        raise JobError(
            FailureClass.NOT_FOUND,
            f"{output.uri}/{MANIFEST} was there when the job was prepared and is gone. Create the job anew.",
        )
    return manifest


def _fetch_trained(document: JobDocument, work: Folder, target: Path) -> Bundle:
    """Download what training handed over."""
    (attempt,) = document.earlier_attempts
    prefix = layout.final_prefix(attempt)
    trained = bundle.read(work, prefix)
    if trained is None:
        raise JobError(
            FailureClass.NOT_FOUND,
            f"{work.uri}/{prefix} is not complete: the trained model was deleted. Create the job anew.",
        )
    bundle.download(work, prefix, trained, target)
    return trained


def _write_merged(document: JobDocument, plan: TrainingPlan, base: BaseModel, trained: Bundle, disk: PodDisk) -> None:
    base.download(disk.output, SMALL_FILES)
    _write_config(disk.output, plan)
    if document.spec.method.adapter.type is AdapterType.FULL:
        _write_full(disk.final / WEIGHTS, disk.output, plan.dtype)
        return
    quantized = QuantizedWeights(disk.final / QUANTIZED) if (disk.final / QUANTIZED).is_dir() else None
    merge = Merge(base, LoraDeltas(disk.final / ADAPTER), quantized, plan.dtype, disk.base)
    write_model(merge.tensors(), merge.specs, disk.output)


def _write_full(source: Path, target: Path, dtype: str) -> None:
    """The trained weights in the published number format; the model is never loaded."""
    tensors = BaseModel(FileFolder(str(source))).tensors

    def values() -> Any:
        for tensor in tensors:
            spec = output_spec(tensor, dtype)
            with safe_open(source / tensor.file, "pt") as file:
                yield spec, file.get_tensor(tensor.name).to(TORCH_DTYPES.get(spec.dtype))

    write_model(values(), [output_spec(tensor, dtype) for tensor in tensors], target)


def _write_config(folder: Path, plan: TrainingPlan) -> None:
    """The base's configuration with the published number format and the stop tokens that were learnt."""
    config = json.loads((folder / CONFIG).read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(TORCH_DTYPES[plan.dtype]).removeprefix("torch.")
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text()) if path.is_file() else {}
    generation["eos_token_id"] = plan.stop_ids[0] if len(plan.stop_ids) == 1 else plan.stop_ids
    path.write_text(json.dumps(generation, indent=2))


def _write_adapter(source: Path, target: Path, plan: TrainingPlan) -> None:
    shutil.copytree(source, target)
    config = json.loads((target / "adapter_config.json").read_text())
    # peft noted the folder on the pod's disk; a reader wants to know the model.
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()  # peft keeps a set; equal runs shall have equal files
    config["base_model_name_or_path"] = plan.model.uri.removeprefix("hf://")
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2))


def _verify(disk: PodDisk) -> Verification:
    """Run the written files on the probe rows, one layer in memory at a time.

    Raises:
        JobError: VerificationFailed.
    """
    rows, trained = probe.load(disk.final / PROBE)
    model = models.load_streamed(disk.output, disk.root / "offload")
    mean, highest = probe.divergence(trained, probe.log_probs(model, rows))
    log.info("KL from the trained to the written model: mean %.2e, max %.2e nats", mean, highest)
    if not mean <= probe.MAX_MEAN_KL:
        raise JobError(
            FailureClass.VERIFICATION_FAILED,
            f"The merged model is not the trained one: mean KL {mean:.2e} nats on the probe rows, allowed are "
            f"{probe.MAX_MEAN_KL:.0e}. Nothing was published. This is a defect: report it with the log of this stage.",
        )
    return Verification(mean_kl=f"{max(mean, 0.0):.2e}", max_kl=f"{max(highest, 0.0):.2e}", positions=len(trained))


def _lineage(document: JobDocument, plan: TrainingPlan, result: dict[str, Any]) -> Lineage:
    adapter = document.spec.method.adapter.type
    return Lineage(
        base=plan.model,
        data=plan.data,
        spec=spec_lineage(document),
        resolved=result["resolved"],
        total_steps=result["totalSteps"],
        train_attempts=document.earlier_attempts[0],
        trained_against="the base in NF4" if adapter is AdapterType.QLORA else "the base as it is",
        versions=result["versions"],
        trainer_image=document.trainer_image,
    )


def _publish(
    document: JobDocument,
    output: Folder,
    folder: Path,
    lineage: Lineage,
    evaluation: EvaluationResult,
    verification: Verification | None,
) -> list[ArtifactResult]:
    """Upload all files, then the manifest. Prepare has seen the folder free, but that may have been days ago."""
    replaced = require_no_other_model(output, document)
    if replaced is not None:
        # From here on the folder holds no complete model until the new manifest is there.
        output.delete([MANIFEST])
    files, uploads = [], []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        file = PublishedFile(
            path=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=sha256_file(path)
        )
        uploads.append(output.upload(path, file.path, file.sha256))
        files.append(file)
    _delete_stale(document, output, replaced, {file.path for file in files})
    require_no_other_model(output, document)
    _require_complete(output, uploads)
    manifest = Manifest(
        document_digest=document.digest,
        job=document.job,
        created=now(),
        artifacts=_artifacts(output, files),
        files=files,
        evaluation=evaluation,
        verification=verification,
        lineage=lineage,
    )
    encoded = manifest.encode()
    output.write(MANIFEST, encoded)
    return [*manifest.artifacts, manifest_artifact(output, encoded)]


def _delete_stale(document: JobDocument, output: Folder, replaced: Manifest | None, kept: set[str]) -> None:
    """Remove the model that was there before: what its manifest names, and, where the user allows to overwrite, what a
    loader would take for a part of the new one (an old model.safetensors comes before the new shards)."""
    stale = {file.path for file in replaced.files} if replaced else set()
    if document.spec.output.on_existing is OnExisting.OVERWRITE:
        stale |= {info.key for info in output.list() if _is_model_file(info.key)}
    output.delete(sorted(stale - kept))


def _is_model_file(key: str) -> bool:
    return key in (*SMALL_FILES, "adapter_config.json") or (
        "/" not in key and key.endswith((".safetensors", ".bin", ".index.json"))
    )


def _require_complete(output: Folder, uploads: list[ObjectInfo]) -> None:
    """Each upload compared checksums; this makes sure that nobody removed or replaced a file meanwhile."""
    present = set(output.list())
    for info in uploads:
        if info not in present:
            raise JobError(
                FailureClass.STORAGE_UNAVAILABLE,
                f"{output.uri}/{info.key} is not there as it was uploaded. Does another job write to the folder?",
            )


def _artifacts(output: Folder, files: list[PublishedFile]) -> list[ArtifactResult]:
    adapter = [file for file in files if file.path.startswith(f"{ADAPTER_FOLDER}/")]
    merged = [file for file in files if file not in adapter]
    artifacts = []
    if any(file.path == CONFIG for file in merged):
        artifacts.append(ArtifactResult(name="Merged", uri=output.uri, size_bytes=sum(file.size for file in merged)))
    if adapter:
        artifacts.append(
            ArtifactResult(
                name="Adapter", uri=f"{output.uri}/{ADAPTER_FOLDER}", size_bytes=sum(file.size for file in adapter)
            )
        )
    return artifacts
