"""What was measured on pairs is shown where loss and perplexity are."""

from __future__ import annotations

import pytest
from builders import Story

from finetune_api.status import EvaluationResult, Measurement
from finetune_operator.cli.show import summary
from finetune_operator.metrics import Metrics
from finetune_operator.resource import FineTuneJob

PLAIN = Measurement(loss="2.5000", perplexity="12.18", tokens=10)
PAIRS = {"method_loss": "0.3000", "accuracy": "0.7500", "margin": "-0.2500"}


def job(before: Measurement, after: Measurement) -> FineTuneJob:
    body = Story().body
    body["status"] = {"evaluation": EvaluationResult(base=before, tuned=after).to_json_dict()}
    return FineTuneJob.parse(body)


@pytest.mark.parametrize("pairs", [True, False])
def test_the_summary(pairs: bool) -> None:
    tuned = PLAIN.model_copy(update=PAIRS if pairs else {})
    lines = [line.split() for line in summary(job(PLAIN, tuned)).plain.splitlines()]
    assert ["Perplexity", "base", "12.18,", "tuned", "12.18"] in lines
    assert (["Accuracy", "tuned", "0.7500"] in lines) == pairs
    assert (["Margin", "tuned", "-0.2500"] in lines) == pairs
    assert any(line[0] == "Accuracy" for line in lines if line) == pairs


def test_the_metrics() -> None:
    metrics = Metrics()
    known = job(PLAIN, PLAIN.model_copy(update=PAIRS))
    metrics.observe(known, known.status)
    series = [line for line in metrics.exposition().decode().splitlines() if line.startswith("finetune_job_eval")]
    values = {line.partition("{")[0]: line.split()[-1] for line in series if 'model="tuned"' in line}
    assert values == {
        "finetune_job_eval_loss": "2.5",
        "finetune_job_eval_accuracy": "0.75",
        "finetune_job_eval_margin": "-0.25",
    }
    assert [line for line in series if 'model="base"' in line and "_loss" not in line] == []
