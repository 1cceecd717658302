"""What the documentation says is what the code does."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from finetune_api import crd
from finetune_api.failures import RULES, Disposition, FailureClass, class_of_exit_code
from finetune_api.names import Stage
from finetune_api.report import Outcome, Report, StepProgress
from finetune_api.spec import AdapterType, MethodType
from finetune_api.status import CheckpointResult, ConditionType, EvaluationResult, Measurement
from finetune_operator.cli.validation import validate
from finetune_operator.config import Settings, variable
from finetune_operator.metrics import Metrics
from finetune_trainer.metrics import exposition

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target


def table(page: str) -> list[list[str]]:
    """Cells of all table rows whose first cell is code."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return [row for row in rows if re.fullmatch(r"`\w+`", row[0])]


def test_tests_that_pages_name_are_there() -> None:
    """A test is named by its file and its name, without classes and parameters."""
    named = {match for page in PAGES for match in re.findall(r"`(tests/\S+\.py)::(\w+)`", page.read_text())}
    assert len(named) > 10
    for path, name in sorted(named):
        assert re.search(rf"def {name}\(", (ROOT / path).read_text()), f"{path}::{name}"


WORDS = {Disposition.FAIL: "Fail", Disposition.RESTART: "Restart", Disposition.RESTART_FREE: "Restart, free"}


def test_every_failure_class_is_explained_as_it_is() -> None:
    rows = {row[0].strip("`"): row for row in table("failures.md")}
    assert set(rows) == {str(name) for name in RULES}
    for name, rule in RULES.items():
        _, codes, disposition, _ = rows[name]
        assert disposition == WORDS[rule.disposition], name
        for code in re.findall(r"\d+", codes):
            assert class_of_exit_code(int(code)) is name


def test_what_was_tried_on_real_pods_follows_the_rules() -> None:
    lines = (ROOT / "docs" / "failures.md").read_text().splitlines()
    rows = [re.split(r" ?\| ?", line.strip("| ")) for line in lines if "`tests/" in line]
    assert len(rows) > 15
    for what, name, follows, seen, _ in rows:
        assert what
        assert seen
        disposition = RULES[FailureClass(name.strip("`"))].disposition if name else None
        assert follows == (WORDS[disposition] if disposition else ""), what


def test_every_condition_is_explained() -> None:
    assert {row[0].strip("`") for row in table("jobs.md")} >= {str(condition) for condition in ConditionType}


def families(text: bytes) -> set[tuple[str, str]]:
    """(name, type) as in the exposition; a family without a series counts too."""
    return set(re.findall(r"^# TYPE (\S+) (\S+)$", text.decode(), re.MULTILINE))


def full_report() -> Report:
    """Every number that makes a metric."""
    measured = Measurement(loss="1", perplexity="2", tokens=3, accuracy="0.5", margin="0.1")
    moment = "2026-01-01T00:00:00Z"
    return Report(
        job_uid="u",
        stage=Stage.TRAIN,
        attempt=1,
        outcome=Outcome.RUNNING,
        phase_seconds={"Downloading": 1.0},
        progress=StepProgress(
            step=1,
            total_steps=2,
            epoch=0.5,
            loss=1.0,
            learning_rate=0.1,
            grad_norm=1.0,
            trained_tokens=5,
            step_seconds=0.5,
            last_step_time=moment,
            gpu_memory_peak_bytes=7,
        ),
        evaluation=EvaluationResult(base=measured),
        checkpoint=CheckpointResult(step=1, uri="s3://b/k", time=moment, save_seconds="1"),
    )


def test_every_metric_is_listed_and_no_other() -> None:
    listed = {(row[0].strip("`"), row[1]) for row in table("metrics.md")}
    served = families(Metrics().exposition()) | families(exposition(full_report)())
    assert {(name, kind) for name, kind in served if not name.endswith("_created")} == listed


def test_every_setting_is_listed_with_its_default_and_no_other() -> None:
    listed = {row[0].strip("`"): row[1].strip("`") for row in table("operator.md")}

    def text(default: object) -> str:
        if isinstance(default, tuple):
            return ",".join(default)
        return str(default).lower() if isinstance(default, bool) else str(default or "")

    assert listed == {variable(field.name): text(field.default) for field in fields(Settings)}


def test_every_setting_names_its_variable_where_it_is_defined() -> None:
    code = inspect.getsource(Settings)
    for field in fields(Settings):
        # The default may be a tuple of strings over several lines.
        default = r'[^"]*(?:"[^"\n]*"[^"]*)*?'
        named = rf'^    {field.name}:{default}\n    """[^"]*\b{variable(field.name)}\b'
        assert re.search(named, code, re.MULTILINE), field.name


def test_the_readmes_manifest_is_valid() -> None:
    (manifest, *_) = re.findall(r"```yaml\n(apiVersion.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    verdict = validate(manifest)
    assert not verdict.problems
    assert list(verdict.jobs) == ["support-bot"]


def test_every_method_is_tested_with_every_adapter_or_refused() -> None:
    """What the table says is tested has a test with that adapter among its parameters."""
    rows = [row for row in table("methods.md") if row[0].strip("`") in set(MethodType)]
    assert [row[0].strip("`") for row in rows] == list(MethodType)
    for method, _, *cells, named in rows:
        path, _, name = named.strip("`").partition("::")
        module = (ROOT / path).read_text()
        (adapters,) = re.findall(r"^ADAPTERS = (\[.*\])$", module, re.MULTILINE)
        assert re.search(rf'parametrize\("adapter", ADAPTERS\)\n(class .*\n([ ]{{4}}.*\n|\n)*?)? *def {name}\(', module)
        for adapter, cell in zip(AdapterType, cells, strict=True):
            refused = {"type": str(method).strip("`"), "adapter": {"type": str(adapter)}}
            if cell == "tested":
                assert str(adapter) in yaml.safe_load(adapters)
                assert problems_of({"method": refused}) == []
            else:
                assert cell.removeprefix("refused: ") in problems_of({"method": refused})


def problems_of(fragment: dict[str, object]) -> list[str]:
    """What `finetune validate` says of a job with these fields."""
    spec = {
        "model": {"uri": "s3://models/base"},
        "dataset": {"train": [{"uri": "s3://datasets/a.jsonl"}]},
        "output": {"uri": "s3://models/out"},
        **fragment,
    }
    manifest = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bot"}, "spec": spec}
    return [str(problem) for problem in validate(yaml.safe_dump(manifest)).problems]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("job.yaml")), ids=lambda path: path.parent.name)
def test_examples_are_valid(path: Path) -> None:
    assert validate(path.read_text()).problems == []


FRAGMENTS = [
    (page.name, fragment)
    for page in (ROOT / "docs" / name for name in ("jobs.md", "data.md", "storage.md", "methods.md"))
    for fragment in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
]


@pytest.mark.parametrize(
    ("page", "fragment"), FRAGMENTS, ids=[f"{page} {text.split(':')[0]}" for page, text in FRAGMENTS]
)
def test_fragments_of_a_spec_are_valid(page: str, fragment: str) -> None:
    assert problems_of(yaml.safe_load(fragment)) == []


def test_every_field_about_pods_is_explained() -> None:
    text = "".join((ROOT / "docs" / page).read_text() for page in ("jobs.md", "storage.md"))
    fields = crd.load()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    names = {
        name for part in ("resources", "scheduling", "podTemplate", "storage") for name in fields[part]["properties"]
    }
    names |= set(fields["podTemplate"]["properties"]["volumes"]["items"]["properties"]) - {"name"}
    names |= set(fields["podTemplate"]["properties"]["securityContext"]["properties"])
    assert {name for name in names if not re.search(rf"\b{name}\b", text)} == set()


def test_nothing_shadows_the_standard_library() -> None:
    """operator/ on sys.path is fine; as a package it would hide the standard library's operator."""
    assert not (ROOT / "operator" / "__init__.py").exists()
