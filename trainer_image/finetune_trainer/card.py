"""The model card: README.md of a published model. The same job always writes the same card."""

from __future__ import annotations

import json

from finetune_api.document import JobDocument
from finetune_api.status import EvaluationResult, Verification
from finetune_trainer.plan import SourceFile, TrainingPlan

MAX_SOURCES = 20
"""Data files that the card names; the manifest has all of them."""


def _source_lines(sources: list[SourceFile]) -> list[str]:
    lines = [f"- `{source.uri}` ({source.size:,} bytes)" for source in sources[:MAX_SOURCES]]
    if rest := sources[MAX_SOURCES:]:
        size = sum(source.size for source in rest)
        lines.append(f"- {len(rest):,} more files ({size:,} bytes), which `manifest.json` names")
    return lines


COLUMNS = {
    "loss": "loss",
    "perplexity": "perplexity",
    "tokens": "tokens",
    "accuracy": "accuracy",
    "margin": "margin",
    "loss of the method": "method_loss",
}
"""Of the table of measurements: title and field."""


def render(
    document: JobDocument, plan: TrainingPlan, evaluation: EvaluationResult, verification: Verification | None
) -> str:
    adapter = document.spec.method.adapter
    front_matter = [
        "---",
        f"base_model: {json.dumps(plan.model.uri.removeprefix('hf://'))}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- finetune-operator",
        f"- {document.spec.method.type.lower()}",
        f"- {adapter.type.lower()}",
        "---",
    ]
    measured = [
        (name, value)
        for name, value in (
            ("base", evaluation.base),
            ("base in 4 bits", evaluation.quantized_base),
            ("tuned", evaluation.tuned),
        )
        if value is not None
    ]
    lines = [
        *front_matter,
        "",
        f"# {document.job.name}",
        "",
        f"Tuned from `{plan.model.uri}` (revision `{plan.model.revision[:12]}`, {plan.parameters:,} parameters) with "
        f"{document.spec.method.type} and {adapter.type} by finetune-operator.",
        "",
        "## Data",
        "",
        *_source_lines(plan.data.train_sources),
        "",
        f"{plan.data.train.rows:,} rows were learnt, {plan.data.train.supervised_tokens:,} of "
        f"{plan.data.train.tokens:,} tokens supervised; {plan.data.validation.rows:,} rows were held out; "
        f"{plan.data.skipped_rows:,} rows could not be used.",
    ]
    if measured:
        lines += ["", "## Evaluation", "", "On the held-out rows, weighted by token:", ""]
        columns = [
            (title, field)
            for title, field in COLUMNS.items()
            if any(getattr(value, field) is not None for _, value in measured)
        ]
        lines += ["| " + " | ".join(["model", *(title for title, _ in columns)]) + " |"]
        lines += ["|" + "---|" * (len(columns) + 1)]
        lines += [
            "| " + " | ".join([name, *(str(getattr(value, field)) for _, field in columns)]) + " |"
            for name, value in measured
        ]
    if verification:
        lines += [
            "",
            "## Verification",
            "",
            f"The published weights were compared with the trained model at {verification.positions} positions: mean "
            f"KL divergence {verification.mean_kl} nats, at most {verification.max_kl}. `manifest.json` holds the "
            "sha256 of every file and the full lineage.",
        ]
    settings = document.spec.to_json_dict()
    shown = {key: settings[key] for key in ("method", "hyperparameters") if key in settings}
    lines += ["", "## Settings", "", "```json", json.dumps(shown, indent=2), "```", ""]
    return "\n".join(lines)
