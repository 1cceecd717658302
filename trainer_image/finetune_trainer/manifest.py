"""manifest.json: what was published, with the hash of every file and the full lineage. It is written last."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

from pydantic import ConfigDict, ValidationError

from finetune_api import SCHEMA_VERSION
from finetune_api.base import ApiModel
from finetune_api.document import JobDocument, JobIdentity, canonical_json
from finetune_api.failures import FailureClass, JobError
from finetune_api.spec import OnExisting
from finetune_api.status import ArtifactResult, EvaluationResult, Verification
from finetune_trainer.base_model import ModelPin
from finetune_trainer.layout import MANIFEST
from finetune_trainer.plan import DataPlan, SourceFile
from finetune_trainer.reporting import Reporter
from finetune_trainer.storage import Folder

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors")
ADAPTER_FOLDER = "adapter"


class PublishedFile(ApiModel):
    path: str
    """Relative to the manifest."""
    size: int
    sha256: str


class Lineage(ApiModel):
    """Where the model comes from; enough to train it again."""

    base: ModelPin
    data: DataPlan
    spec: dict[str, Any]
    """The fields of the job's spec."""
    resolved: dict[str, Any]
    """What Auto and absent values became."""
    total_steps: int
    train_attempts: int
    """Attempts that it took; the later ones resumed from a checkpoint."""
    trained_against: str
    """What the adapter was trained on: the base as it is, or its NF4 form."""
    versions: dict[str, str]
    trainer_image: str


class Manifest(ApiModel):
    """Unknown fields are ignored: manifests live for years."""

    model_config = ConfigDict(extra="ignore")

    schema_version: int = SCHEMA_VERSION
    document_digest: str
    """Hash of the fields of the spec that decide the result."""
    job: JobIdentity
    created: str
    artifacts: list[ArtifactResult]
    files: list[PublishedFile]
    evaluation: EvaluationResult
    verification: Verification | None = None
    """Absent when only the adapter is published."""
    lineage: Lineage

    def encode(self) -> bytes:
        return json.dumps(self.to_json_dict(), indent=1, ensure_ascii=False).encode()


def installed_versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def read_manifest(output: Folder) -> Manifest | None:
    """The manifest in a folder, or None when there is none that can be read."""
    if output.stat(MANIFEST) is None:
        return None
    try:
        return Manifest.model_validate(json.loads(output.read(MANIFEST)))
    except (ValueError, ValidationError):
        return None


def manifest_artifact(output: Folder, encoded: bytes) -> ArtifactResult:
    return ArtifactResult(
        name="Manifest",
        uri=f"{output.uri}/{MANIFEST}",
        size_bytes=len(encoded),
        sha256=hashlib.sha256(encoded).hexdigest(),
    )


def find_published(
    output: Folder,
    digest: str,
    model: ModelPin,
    train_sources: list[SourceFile],
    validation_sources: list[SourceFile],
) -> Manifest | None:
    """The manifest of a verified result of just this specification, model and data, when it is published already.

    All files must still be there with their sizes; a manifest whose files were touched is no result.
    """
    manifest = read_manifest(output)
    if manifest is None or manifest.document_digest != digest:
        return None
    lineage = manifest.lineage
    if lineage.base.revision != model.revision:
        return None
    if (lineage.data.train_sources, lineage.data.validation_sources) != (train_sources, validation_sources):
        return None
    present = {info.key: info.size for info in output.list()}
    if any(present.get(file.path) != file.size for file in manifest.files):
        return None
    return manifest


def report_published(output: Folder, manifest: Manifest, reporter: Reporter) -> None:
    """Report what was published before as this attempt's result."""
    reporter.update(
        artifacts=[*manifest.artifacts, manifest_artifact(output, output.read(MANIFEST))],
        evaluation=manifest.evaluation,
        verification=manifest.verification,
    )
    reporter.phase("Done")


def require_no_other_model(output: Folder, document: JobDocument) -> Manifest | None:
    """The manifest in the folder, when it is this job's own or may be replaced. Files without a manifest do not count:
    they may be our own, of an upload that broke off.

    Raises:
        JobError: OutputExists, when another job's model is published there and the job does not say Overwrite.
    """
    manifest = read_manifest(output)
    if manifest is not None and manifest.job.uid != document.job.uid:
        _refuse(
            output, document, f"the model of job {manifest.job.namespace}/{manifest.job.name} of {manifest.created}"
        )
    return manifest


def require_free(output: Folder, document: JobDocument) -> None:
    """Before anything of ours is there.

    Raises:
        JobError: OutputExists, when the folder holds another model and the job does not say Overwrite.
    """
    if require_no_other_model(output, document) is not None:
        return
    if output.stat("config.json") or output.stat(f"{ADAPTER_FOLDER}/adapter_config.json") or output.stat(MANIFEST):
        _refuse(output, document, "a model without a manifest")


def _refuse(output: Folder, document: JobDocument, found: str) -> None:
    if document.spec.output.on_existing is OnExisting.OVERWRITE:
        return
    raise JobError(
        FailureClass.OUTPUT_EXISTS,
        f"{output.uri} already holds {found}. Choose another output.uri, or set output.onExisting to Overwrite.",
    )


def spec_lineage(document: JobDocument) -> dict[str, Any]:
    """The spec as it is kept in the manifest. It names secrets but never holds one."""
    spec: dict[str, Any] = json.loads(canonical_json(document.spec.to_json_dict()))
    return spec
