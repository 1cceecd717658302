"""`finetune validate`: what the API server would say about a manifest, without one.

Defaults, patterns and CEL rules come from the generated CRD file; there is no second set of rules.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from finetune_api import VERSION, crd
from finetune_operator.cli.manifests import Manifest, ManifestError, read
from finetune_operator.schema import NOT_CHECKED, ErrorType, FieldError, StructuralSchema

MORE_RULES = "more rules are checked when the other errors are mended"


@dataclass(frozen=True)
class Problem:
    line: int
    field: str
    message: str


@dataclass(frozen=True)
class Verdict:
    """What became of one file."""

    jobs: list[str]
    """Names of the FineTuneJobs that are valid."""
    skipped: list[str]
    """Kinds of documents that are something else."""
    problems: list[Problem]


@functools.cache
def schema() -> StructuralSchema:
    """The schema of a FineTuneJob, from the CRD file."""
    version = next(version for version in crd.load()["spec"]["versions"] if version["name"] == VERSION)
    return StructuralSchema(version["schema"]["openAPIV3Schema"])


def validate(text: str) -> Verdict:
    """Check all documents of a file."""
    verdict = Verdict([], [], [])
    try:
        manifests = read(text)
    except ManifestError as error:
        verdict.problems.append(Problem(error.line, "", f"not YAML: {error}"))
        return verdict
    for manifest in manifests:
        if not manifest.is_finetune_job:
            kind = manifest.body.get("kind") if isinstance(manifest.body, dict) else None
            verdict.skipped.append(str(kind or "a document without a kind"))
            continue
        problems = check(manifest)
        verdict.problems.extend(problems)
        if not problems:
            metadata = manifest.body["metadata"]
            verdict.jobs.append(str(metadata.get("name") or f"{metadata['generateName']}…"))
    if not manifests:
        verdict.problems.append(Problem(1, "", "the file is empty: write a FineTuneJob"))
    return verdict


def check(manifest: Manifest) -> list[Problem]:
    """Everything that is wrong with one FineTuneJob, in the order of its lines."""
    if manifest.type_problem is not None:
        field, message = manifest.type_problem
        return [Problem(manifest.line_of((field,)), field, message)]
    metadata = manifest.body.get("metadata")
    if not isinstance(metadata, dict) or not (metadata.get("name") or metadata.get("generateName")):
        return [Problem(manifest.line_of(("metadata",)), "metadata.name", "Required value: give the job a name")]
    # The API server makes the name before it checks it.
    named = {**manifest.body, "metadata": {**metadata, "name": metadata.get("name") or f"{metadata['generateName']}x"}}
    errors = schema().unknown_fields(named) + schema().validate(schema().defaulted(named))
    problems = {_problem(error, manifest) for error in errors}
    return sorted(problems, key=lambda problem: (problem.message == MORE_RULES, problem.line, problem.field))


def _problem(error: FieldError, manifest: Manifest) -> Problem:
    path, message = error.path, error.message.removeprefix("Invalid value: ")
    if error.type is ErrorType.UNKNOWN_FIELD:
        message = "unknown field: correct its name or its place, or remove it"
    elif error.type is ErrorType.TYPE_INVALID and "must be of type string" in message:
        message += " (write the value in quotes)"
    elif NOT_CHECKED in message:
        message = MORE_RULES
    elif not path and message.startswith("metadata.name"):
        # Rules about the name stand at the root, because the schema of a CRD does not reach into metadata.
        path = ("metadata", "name")
    return Problem(manifest.line_of(path), error.field if path == error.path else ".".join(map(str, path)), message)
