"""What becomes of rows that are there twice, and what the report says of all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trainer_lab import as_json_lines
from trainer_rendering import STOP

from finetune_api.failures import FailureClass, JobError
from finetune_api.spec import Dataset, MethodType
from finetune_trainer.data import pipeline, prepared, report
from finetune_trainer.data.pipeline import PreparedData
from finetune_trainer.data.prepared import TRAIN_FILE, VALIDATION_FILE
from finetune_trainer.data.render import Renderer, Rules
from finetune_trainer.data.report import DataReport, to_markdown

Prepare = Callable[..., tuple[PreparedData, Renderer]]


def asked(*numbers: int) -> list[dict[str, str]]:
    return [{"question": f"What is {number}?", "answer": f"It is {number}."} for number in numbers]


@pytest.fixture
def prepare(tokenizer: Any, tmp_path: Path) -> Prepare:
    """Runs rows through the pipeline; keyword arguments are fields of the dataset."""

    def run(
        *sources: list[dict[str, Any]],
        validation: list[dict[str, Any]] | None = None,
        method: MethodType = MethodType.SFT,
        rules: dict[str, Any] | None = None,
        weights: tuple[str, ...] = (),
        **dataset: Any,
    ) -> tuple[PreparedData, Renderer]:
        files = []
        for number, rows in enumerate([*sources, *([validation] if validation else [])]):
            path = tmp_path / f"{number}.jsonl"
            path.write_bytes(as_json_lines(rows))
            files.append((path.as_uri(), path))
        train, measured = files[: len(sources)], files[len(sources) :]
        spec = {"train": [{"uri": uri} for uri, _ in train], **dataset}
        for source, weight in zip(spec["train"], weights, strict=False):
            source["weight"] = weight
        if measured:
            spec["validation"] = [{"uri": uri} for uri, _ in measured]
        renderer = Renderer(tokenizer, None, Rules(**{"max_length": 256, **(rules or {})}))
        data = pipeline.prepare(Dataset.model_validate(spec), method, 1, renderer, train, measured, tmp_path)
        return data, renderer

    return run


def learnt(folder: Path, tokenizer: Any, name: str = TRAIN_FILE) -> Counter[str]:
    """The answers in a set."""
    rows = prepared.read_rows(folder / name)
    return Counter(
        tokenizer.decode([label for label in row["labels"] if label != -100]).removesuffix(STOP) for row in rows
    )


class TestDuplicates:
    def test_they_are_counted_and_kept(self, prepare: Prepare, tmp_path: Path, tokenizer: Any) -> None:
        data, _ = prepare(asked(1, 2, 1, 3, 1), validationSplit="0")
        assert (data.duplicates, data.leaked) == (2, 0)
        assert learnt(tmp_path, tokenizer) == {"It is 1.": 3, "It is 2.": 1, "It is 3.": 1}

    def test_or_removed(self, prepare: Prepare, tmp_path: Path, tokenizer: Any) -> None:
        data, _ = prepare(asked(1, 2, 1), asked(3, 1), validationSplit="0", duplicates="Remove")
        assert data.duplicates == 2
        assert data.train.rows == 3
        assert learnt(tmp_path, tokenizer) == {"It is 1.": 1, "It is 2.": 1, "It is 3.": 1}

    def test_a_weight_repeats_what_is_left(self, prepare: Prepare, tmp_path: Path, tokenizer: Any) -> None:
        prepare(asked(1, 1, 2), asked(3), validationSplit="0", duplicates="Remove", weights=("2", "1"))
        assert learnt(tmp_path, tokenizer) == {"It is 1.": 2, "It is 2.": 2, "It is 3.": 1}

    def test_what_is_measured_is_not_learnt(self, prepare: Prepare, tmp_path: Path, tokenizer: Any) -> None:
        data, _ = prepare(asked(1, 2, 3, 2), validation=asked(2, 9))
        assert (data.leaked, data.duplicates) == (2, 0), "none of those that are learnt is there twice"
        assert learnt(tmp_path, tokenizer) == {"It is 1.": 1, "It is 3.": 1}
        assert learnt(tmp_path, tokenizer, VALIDATION_FILE) == {"It is 2.": 1, "It is 9.": 1}

    def test_nothing_is_left_to_learn(self, prepare: Prepare) -> None:
        with pytest.raises(JobError, match=r"Of 2 examples to learn from none is left: 2 of"):
            prepare(asked(1, 2), validation=asked(1, 2, 3))

    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        numbers=st.lists(st.integers(1, 12), min_size=2, max_size=30).filter(lambda numbers: len(set(numbers)) > 1),
        policy=st.sampled_from(["Keep", "Remove"]),
        split=st.sampled_from(["0.1", "0.5", "0.9"]),
    )
    def test_a_split_loses_nothing_and_shares_nothing(
        self, prepare: Prepare, tmp_path: Path, tokenizer: Any, numbers: list[int], policy: str, split: str
    ) -> None:
        data, _ = prepare(asked(*numbers), validationSplit=split, duplicates=policy)
        train, measured = learnt(tmp_path, tokenizer), learnt(tmp_path, tokenizer, VALIDATION_FILE)
        assert not train.keys() & measured.keys()
        assert set(measured.values()) == {1}
        every = Counter(row["answer"] for row in asked(*numbers))
        assert train.keys() | measured.keys() == every.keys()
        assert train == {text: every[text] if policy == "Keep" else 1 for text in train}
        assert data.duplicates == sum(every[text] - 1 for text in train)
        assert data.leaked == sum(every[text] - 1 for text in measured)

    def test_the_same_text_with_another_weight_is_another_row(self, prepare: Prepare) -> None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
        other = [*turns[:3], {**turns[3], "weight": 0}]
        data, _ = prepare([{"messages": turns}, {"messages": other}], validationSplit="0")
        assert data.duplicates == 0
        # But who has measured one has seen the other.
        data, _ = prepare([{"messages": turns}], asked(1), validation=[{"messages": other}])
        assert data.leaked == 1

    @pytest.mark.parametrize("seed", range(20))
    def test_judged_answers_are_held_out_of_both_kinds(self, prepare: Prepare, tmp_path: Path, seed: int) -> None:
        rows = [{"prompt": f"ask {n}", "completion": f"{n}", "label": n % 20 == seed} for n in range(60)]
        prepare(rows, method=MethodType.KTO)
        assert sorted(prepared.read_rows(tmp_path / VALIDATION_FILE)["label"]) == [False, False, True]

    def test_a_weight_that_chooses_nothing(self, prepare: Prepare) -> None:
        with pytest.raises(JobError, match="choose none of the others"):
            prepare(asked(1, 2), validationSplit="0", weights=("0.01",))


@pytest.mark.parametrize(
    ("method", "row", "told"),
    [
        (MethodType.SFT, {"prompt": "a", "chosen": "b", "rejected": "c"}, "of format Preference, and method.type SFT"),
        (MethodType.DPO, {"question": "a", "answer": "b"}, "method.type DPO learns from Preference"),
        (MethodType.KTO, {"text": "a"}, "method.type KTO learns from UnpairedPreference"),
    ],
)
def test_rows_that_a_method_does_not_learn_from(
    prepare: Prepare, method: MethodType, row: dict[str, str], told: str
) -> None:
    with pytest.raises(JobError) as caught:
        prepare([row], method=method)
    assert caught.value.failure_class is FailureClass.DATA_ERROR
    assert told in caught.value.message


class TestReport:
    def build(
        self, data: PreparedData, renderer: Renderer, folder: Path, method: MethodType, **more: Any
    ) -> DataReport:
        return report.build(
            data,
            renderer,
            model="s3://models/base",
            method=method,
            weights=["1"] * len(data.train_sources),
            train=folder / TRAIN_FILE,
            validation=folder / VALIDATION_FILE,
            seed=1,
            **{"duplicates_removed": False, **more},
        )

    def test_numbers(self, prepare: Prepare, tmp_path: Path) -> None:
        bad = [{"question": "a"}, {"question": "a", "answer": "word " * 300}]
        data, renderer = prepare(
            [*asked(*range(20), 3), bad[0]],
            [{"text": "once " * 20}, {"text": "word " * 300}],
            validation=asked(3, 4, 30),
            invalidRows={"policy": "Skip", "limit": 5},
            rules={"overlong": "Drop"},
        )
        found = self.build(data, renderer, tmp_path, MethodType.SFT)
        rows = prepared.read_rows(tmp_path / TRAIN_FILE)
        assert found.train.rows == len(rows) == 19
        assert found.train.tokens == sum(len(row["input_ids"]) for row in rows)
        assert found.train.supervised_tokens == sum(label != -100 for row in rows for label in row["labels"][1:])
        assert found.train.lengths.longest == max(len(row["input_ids"]) for row in rows)
        assert sum(found.train.lengths.histogram.values()) == 19
        for name, count in found.train.lengths.histogram.items():
            low, high = map(int, name.split("-"))
            assert count == sum(low <= len(row["input_ids"]) <= high for row in rows)
        assert found.validation.rows == 3
        assert [(source.format, source.rows, source.examples) for source in found.train_sources] == [
            ("QuestionAnswer", 22, 21),
            ("Text", 2, 1),
        ]
        assert [(source.rows, source.examples) for source in found.validation_sources] == [(3, 3)]
        assert found.bad_rows.reasons == {"has no 'answer'": 1}
        assert found.bad_rows.examples[0].endswith("0.jsonl row 22: has no 'answer'")
        assert (found.overlong.examples, found.overlong.dropped) == (1, 1)
        assert (found.duplicates, found.leaked) == (0, 3)
        assert found.stop_tokens == [STOP]

    def test_samples_show_what_is_learnt(self, prepare: Prepare, tmp_path: Path, tokenizer: Any) -> None:
        data, renderer = prepare(asked(*range(9)), validationSplit="0")
        found = self.build(data, renderer, tmp_path, MethodType.SFT)
        rows = prepared.read_rows(tmp_path / TRAIN_FILE)
        assert len(found.samples) == 3
        for sample in found.samples:
            text = "".join(segment.text for segment in sample.segments)
            assert text == tokenizer.decode(rows[sample.row]["input_ids"])
            (answer,) = [segment.text for segment in sample.segments if segment.learnt]
            assert answer.startswith("It is ")
            assert answer.endswith(STOP)
            assert f"⟦{answer}⟧" in to_markdown(found)

    def test_of_pairs(self, prepare: Prepare, tmp_path: Path) -> None:
        rows = [{"prompt": f"ask {n}", "chosen": "yes", "rejected": "no " * (n + 1)} for n in range(4)]
        data, renderer = prepare(rows, method=MethodType.DPO, validationSplit="0")
        found = self.build(data, renderer, tmp_path, MethodType.DPO)
        assert found.train.lengths.longest == data.train.longest
        assert {sample.answer for sample in found.samples} == {"chosen", "rejected"}
        learnt = [segment.text for sample in found.samples for segment in sample.segments if segment.learnt]
        assert f"yes{STOP}" in learnt

    def test_of_judged_answers(self, prepare: Prepare, tmp_path: Path) -> None:
        rows = [{"prompt": "ask", "completion": f"answer {n}", "label": n % 2 == 0} for n in range(4)]
        data, renderer = prepare(rows, method=MethodType.KTO, validationSplit="0")
        found = self.build(data, renderer, tmp_path, MethodType.KTO)
        assert {sample.answer for sample in found.samples} == {"good", "bad"}

    def test_for_people(self, prepare: Prepare, tmp_path: Path) -> None:
        rows = [*asked(1, 1), {"question": "```\nfenced", "answer": "````"}, {"question": "a|b", "answer": ""}]
        data, renderer = prepare(rows, validationSplit="0", invalidRows={"policy": "Skip"})
        text = to_markdown(self.build(data, renderer, tmp_path, MethodType.SFT))
        assert "- 1 rows cannot be used and were left out." in text
        assert "- 1 train examples are equal to another one, and are learnt as often as they are there." in text
        assert "| 1 | 'answer' is empty |" in text
        # A row may hold a fence itself.
        assert "`````text\n" in text
        assert text.count("`````") == 2

    def test_a_stop_token_that_the_tokenizer_does_not_have(self, tokenizer: Any) -> None:
        assert [report._token(tokenizer, token) for token in (tokenizer.eos_token_id, 999_999, -1)] == [
            STOP,
            "(999999)",
            "(-1)",
        ]

    def test_nothing_to_remark(self, prepare: Prepare, tmp_path: Path) -> None:
        data, renderer = prepare(asked(1, 2), validationSplit="0")
        text = to_markdown(self.build(data, renderer, tmp_path, MethodType.SFT))
        assert "Nothing: every row is learnt or measured as it was found." in text


class TestCheck:
    """`finetune data check`, as a user types it."""

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [Path(sys.executable).parent / "finetune", "data", "check", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    @pytest.fixture
    def rows(self, tmp_path: Path) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(as_json_lines(asked(*range(50))))
        return path

    def test_the_report(self, rows: Path, tiny_model: Path, tmp_path: Path) -> None:
        manifest = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "bot"},
            "spec": {
                "model": {"uri": "s3://models/elsewhere"},
                "dataset": {"train": [{"uri": "s3://data/elsewhere.jsonl"}], "maxLength": 64, "supervised": "All"},
                "output": {"uri": "s3://models/out"},
            },
        }
        job = tmp_path / "job.yaml"
        job.write_text(yaml.safe_dump(manifest))
        done = self.run(rows, "-f", job, "--model", tiny_model, "-o", "json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["train"]["rows"], found["validation"]["rows"], found["maxLength"]) == (48, 2, 64)
        assert found["train"]["supervisedTokens"] == found["train"]["tokens"] - 48

    def test_of_a_model_configuration_and_tokenizer_are_enough(
        self, rows: Path, tiny_model: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "small"
        folder.mkdir()
        for path in tiny_model.iterdir():
            if path.suffix != ".safetensors":
                (folder / path.name).write_bytes(path.read_bytes())
        done = self.run(rows, "--model", folder)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("# Data report\n")

    def test_what_would_fail_a_job(self, rows: Path, tiny_model: Path) -> None:
        rows.write_text(rows.read_text() + '{"question": "a"}\n')
        done = self.run(rows, "--model", tiny_model)
        assert done.returncode == 1
        assert done.stderr.startswith("DataError: 1 of 51 rows cannot be used: ")
        assert "rows.jsonl row 51: has no 'answer'" in done.stderr
        assert self.run(rows, "--model", tiny_model, "--skip-invalid", "1").returncode == 0

    def test_a_manifest_that_is_half_written(self, rows: Path, tmp_path: Path) -> None:
        job = tmp_path / "job.yaml"
        job.write_text("apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: a}\nspec:\n  dataset:\n")
        done = self.run(rows, "-f", job)
        assert done.returncode == 1
        assert done.stderr.endswith("spec.dataset and spec.method are objects: write their fields\n")

    def test_wrong_use(self, rows: Path, tiny_model: Path) -> None:
        assert (self.run(rows).returncode, self.run("--model", tiny_model).returncode) == (2, 2)
        done = self.run(rows, "--model", tiny_model, "--overlong", "Shorten")
        assert done.returncode == 1
        assert 'Unsupported value: "Shorten": supported values: "Fail", "Drop", "Truncate", "Split"' in done.stderr
