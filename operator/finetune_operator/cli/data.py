"""`finetune data`: look at data before a job is submitted."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

import click
import yaml

from finetune_api import API_VERSION, KIND
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.cli import manifests, validation

TRAINER = "finetune_trainer"


@click.group("data")
def data_group() -> None:
    """Look at data before a job is submitted."""


@data_group.command("check")
@click.argument("files", nargs=-1)
@click.option("-f", "manifest", type=click.File("r"), help="FineTuneJob whose model, data and method are meant.")
@click.option("--model", help="Folder or URI of the base model; configuration and tokenizer are enough.")
@click.option("--validation", multiple=True, help="File or URI of validation rows.")
@click.option("--method", help="Method that learns from the rows: SFT, DPO or KTO.")
@click.option("--format", "row_format", help="Format of the rows; found out from the first one by default.")
@click.option("--max-length", type=int, help="Longest row in tokens.")
@click.option("--overlong", help="What happens to a longer row: Fail, Drop, Truncate or Split.")
@click.option("--skip-invalid", type=int, help="Leave out up to so many rows that cannot be used.")
@click.option("-o", "--output", type=click.Choice(["markdown", "json"]), default="markdown", show_default=True)
def check_command(files: tuple[str, ...], manifest: TextIO | None, output: str, **settings: Any) -> None:
    """Read data files as a job would, and say what it would learn from them.

    FILES are paths or URIs. Nothing leaves this machine, and no cluster is needed.
    """
    spec = _spec_of(manifest) if manifest else {}
    _override(spec, files, **settings)
    if not spec["dataset"].get("train") or not spec.get("model"):
        raise click.UsageError("name FILES and --model, or a manifest with -f")
    # The report does not depend on it, and a job needs one.
    spec.setdefault("output", {"uri": "s3://nowhere/at-all"})
    body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "check"}, "spec": spec}
    problems = validation.validate(yaml.safe_dump(body)).problems
    if problems:
        raise click.ClickException("; ".join(f"{problem.field}: {problem.message}" for problem in problems))
    if importlib.util.find_spec(TRAINER) is None:
        raise click.ClickException("the trainer is not installed: pip install 'finetune-operator[local]'")
    checked = FineTuneJobSpec.model_validate(validation.schema().defaulted(body)["spec"])
    command = [sys.executable, "-m", f"{TRAINER}.check", "--format", output]
    text = checked.model_dump_json(by_alias=True, exclude_none=True)
    done = subprocess.run(command, input=text, text=True, check=False)
    sys.exit(1 if done.returncode else 0)


def _spec_of(file: TextIO) -> dict[str, Any]:
    jobs = [manifest.body for manifest in manifests.read(file.read()) if manifest.is_finetune_job]
    if len(jobs) != 1:
        raise click.ClickException(f"{file.name} holds {len(jobs)} FineTuneJobs, not one")
    spec = jobs[0].get("spec")
    parts = [spec, *((spec.get(name, {}) for name in ("dataset", "method")) if isinstance(spec, dict) else ())]
    if not all(isinstance(part, dict) for part in parts):
        raise click.ClickException(f"{file.name}: spec, spec.dataset and spec.method are objects: write their fields")
    return dict(spec)


def _override(
    spec: dict[str, Any],
    files: tuple[str, ...],
    *,
    model: str | None,
    validation: tuple[str, ...],
    method: str | None,
    row_format: str | None,
    max_length: int | None,
    overlong: str | None,
    skip_invalid: int | None,
) -> None:
    """What was named takes the place of what the manifest says."""
    dataset = spec.setdefault("dataset", {})
    if files:
        dataset["train"] = [{"uri": _uri(name)} for name in files]
    if validation:
        dataset["validation"] = [{"uri": _uri(name)} for name in validation]
        dataset.pop("validationSplit", None)
    if model:
        spec["model"] = {"uri": _uri(model)}
    if method:
        spec.setdefault("method", {})["type"] = method
    for name, value in (("format", row_format), ("maxLength", max_length), ("overlong", overlong)):
        if value is not None:
            dataset[name] = value
    if skip_invalid is not None:
        dataset["invalidRows"] = {"policy": "Skip", "limit": skip_invalid}


def _uri(name: str) -> str:
    if "://" in name:
        return name
    path = Path(name).resolve()
    return f"{path.as_uri()}/" if path.is_dir() else path.as_uri()
