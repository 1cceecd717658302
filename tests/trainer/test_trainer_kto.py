"""KTO: good answers become likelier and bad ones less so, however the batch is cut."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trained
from datasets import Dataset
from preferences import labelled_rows, require_same, sequence_log_prob, stored
from safetensors.torch import load_file
from trainer_lab import REPOSITORY, Bucket, TestJob, as_json_lines, merged

from finetune_api.failures import FailureClass, JobError
from finetune_trainer import models, preference
from finetune_trainer.data import prepared
from finetune_trainer.preference import OTHER
from finetune_trainer.world import World

ADAPTERS = ["Full", "LoRA", "QLoRA"]
ALONE = World(0, 1, 0)
RATES = {"Full": "2e-3", "LoRA": "1e-2", "QLoRA": "1e-2"}
SETTINGS = {"beta": "0.2", "desirableWeight": "1.5", "undesirableWeight": "0.5"}


@pytest.fixture(scope="session")
def changes(inputs: Bucket) -> Callable[..., dict[str, Any]]:
    """What makes a job of SFT one of KTO."""
    inputs.put("data/labelled.jsonl", as_json_lines(labelled_rows(12)))
    inputs.put("data/validation-labelled.jsonl", as_json_lines(labelled_rows(4, start=100)))

    def make(adapter: str, **changes: Any) -> dict[str, Any]:
        own = {
            "method": {"type": "KTO", "adapter": {"type": adapter}, "kto": SETTINGS},
            "dataset": {
                "train": [{"uri": inputs.uri("data/labelled.jsonl")}],
                "validation": [{"uri": inputs.uri("data/validation-labelled.jsonl")}],
            },
            "hyperparameters": {"maxSteps": 6, "learningRate": RATES[adapter]},
        }
        return merged(own, changes)

    return make


@pytest.fixture(scope="session")
def kto(train: Callable[..., Trained], changes: Callable[..., dict[str, Any]]) -> Callable[[str], Trained]:
    """One trained job for each adapter type, shared by all tests that only look."""
    return functools.cache(lambda adapter: train(**changes(adapter)))


def validation_rows(run: Trained) -> Any:
    return prepared.read_rows(run.job.disk("train").data / prepared.VALIDATION_FILE)


def by_hand(model: Any, rows: Any, column: str) -> list[float]:
    return [sequence_log_prob(model, row["prompt_ids"], row[column]) for row in rows]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("adapter", ADAPTERS)
class TestTraining:
    def test_it_begins_at_the_base_and_tells_answers_apart(self, kto: Callable[[str], Trained], adapter: str) -> None:
        run = kto(adapter)
        first, last = run.history[0], run.history[-1]
        # The mean weight, times one half: no answer is rewarded yet.
        good = int(next(iter(run.trainer.get_train_dataloader()))["label"].sum())
        assert first["loss"] == pytest.approx((1.5 * good + 0.5 * (8 - good)) / 8 / 2, abs=1e-4)
        assert first["kl"] == pytest.approx(0, abs=1e-4)
        assert last["rewards/margins"] > 1
        evaluation = run.report.evaluation
        assert evaluation is not None
        for before in filter(None, (evaluation.base, evaluation.quantized_base)):
            assert (before.method_loss, before.accuracy, before.margin) == ("0.5000", "0.5000", "0.0000")
        assert (evaluation.quantized_base is not None) == (adapter == "QLoRA")
        assert evaluation.tuned is not None
        assert float(evaluation.tuned.method_loss or "") < 0.4
        assert float(evaluation.tuned.accuracy or "") > 0.7
        assert float(evaluation.tuned.margin or "") > 1

    def test_what_is_measured(self, kto: Callable[[str], Trained], adapter: str, tiny_model: Path) -> None:
        run = kto(adapter)
        model = run.trainer.model
        rows = preference.with_others(validation_rows(run), 42)
        tuned, moved = by_hand(model, rows, "completion_ids"), by_hand(model, rows, OTHER)
        if adapter == "Full":
            base = models.load_base(tiny_model, "F32", ALONE)
            before, before_moved = by_hand(base, rows, "completion_ids"), by_hand(base, rows, OTHER)
        else:
            with model.disable_adapter():
                before, before_moved = by_hand(model, rows, "completion_ids"), by_hand(model, rows, OTHER)
        average = max(0.0, sum(m - b for m, b in zip(moved, before_moved, strict=True)) / len(rows))
        ratios = [t - b for t, b in zip(tuned, before, strict=True)]
        losses = [
            1.5 * (1 - sigmoid(0.2 * (ratio - average))) if good else 0.5 * (1 - sigmoid(0.2 * (average - ratio)))
            for ratio, good in zip(ratios, rows["label"], strict=True)
        ]
        right = [(ratio > average) == good for ratio, good in zip(ratios, rows["label"], strict=True)]
        rewards = {
            label: [0.2 * ratio for ratio, good in zip(ratios, rows["label"], strict=True) if good == label]
            for label in (True, False)
        }
        spoken = [value for value, good in zip(tuned, rows["label"], strict=True) if good]
        tokens = sum(len(row["completion_ids"]) for row in rows if row["label"])
        assert run.report.evaluation is not None
        measured = run.report.evaluation.tuned
        assert measured is not None
        assert measured.tokens == tokens
        assert float(measured.loss) == pytest.approx(-sum(spoken) / tokens, abs=1e-4)
        assert float(measured.method_loss or "") == pytest.approx(sum(losses) / len(rows), abs=2e-4)
        assert float(measured.accuracy or "") == pytest.approx(sum(right) / len(rows))
        expected = sum(rewards[True]) / len(rewards[True]) - sum(rewards[False]) / len(rewards[False])
        assert float(measured.margin or "") == pytest.approx(expected, abs=1e-3)

    def test_what_moves(self, kto: Callable[[str], Trained], adapter: str, tiny_model: Path, tmp_path: Path) -> None:
        run = kto(adapter)
        base = load_file(tiny_model / "model.safetensors")
        if adapter == "Full":
            weights = stored(run, "weights", tmp_path)
            assert [name for name in base if torch.equal(base[name], weights[name])] == []
            return
        parameters = dict(run.trainer.model.named_parameters())
        learnt = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
        assert {tensor.dtype for tensor in learnt.values()} == {torch.float32}
        assert all(tensor.any() for name, tensor in learnt.items() if "lora_B" in name)
        assert {name for name in parameters if "lora_" in name} == set(learnt)
        frozen = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.data
            for name, tensor in parameters.items()
            if name not in learnt
        }
        expected = base | (stored(run, "quantized", tmp_path) if adapter == "QLoRA" else {})
        assert frozen.keys() == base.keys()
        assert [name for name, tensor in frozen.items() if not torch.equal(tensor, expected[name])] == []

    def test_the_published_model_is_the_trained_one(
        self, kto: Callable[[str], Trained], adapter: str, tmp_path: Path
    ) -> None:
        from transformers import AutoModelForCausalLM

        run = kto(adapter)
        run.job.run("export", 1, (1,))
        folder = run.job.bucket.fetch_folder(run.job.output, tmp_path)
        rows = validation_rows(run)
        found = by_hand(AutoModelForCausalLM.from_pretrained(folder), rows, "completion_ids")
        assert found == pytest.approx(by_hand(run.trainer.model, rows, "completion_ids"), abs=2e-3)
        manifest = run.job.bucket.json(f"{run.job.output}/manifest.json")
        assert float(manifest["verification"]["meanKL"]) < 1e-6
        assert manifest["lineage"]["spec"]["method"]["type"] == "KTO"
        assert f"with KTO and {adapter}" in (folder / "README.md").read_text()


class TestBatches:
    """The estimate of how far the model has moved is that of the whole step."""

    @pytest.fixture(scope="class")
    @staticmethod
    def whole(train: Callable[..., Trained], changes: Callable[..., dict[str, Any]]) -> Trained:
        return train(**changes("LoRA", hyperparameters={"maxSteps": 4, "microBatchSize": 8}))

    def test_accumulation(
        self, train: Callable[..., Trained], changes: Callable[..., dict[str, Any]], whole: Trained
    ) -> None:
        cut = train(**changes("LoRA", hyperparameters={"maxSteps": 4, "microBatchSize": 1}))
        for one, eight in zip(cut.history, whole.history, strict=True):
            assert one["loss"] == pytest.approx(eight["loss"], abs=1e-4)
            assert one["kl"] == pytest.approx(eight["kl"], abs=1e-3)
        assert max(entry["kl"] for entry in whole.history) > 0.01
        require_same(dict(cut.trainer.model.named_parameters()), dict(whole.trainer.model.named_parameters()))

    def test_two_processes(
        self,
        changes: Callable[..., dict[str, Any]],
        make_job: Callable[..., TestJob],
        whole: Trained,
        tmp_path: Path,
    ) -> None:
        job = make_job(**changes("LoRA", hyperparameters={"maxSteps": 4}))
        job.run("prepare")
        run = job.agent("train", processes=2)
        assert run.wait() == 0, run.text()
        assert run.report.evaluation is not None
        assert whole.report.evaluation is not None
        assert run.report.evaluation.base == whole.report.evaluation.base
        together = stored(Trained(job, run.report, None), "adapter", tmp_path / "two")
        require_same(together, stored(whole, "adapter", tmp_path / "one"))

    def test_what_is_measured_is_what_is_minimised(self, whole: Trained) -> None:
        """TRL's loss of the validation rows, taken for the rows of one step that is cut in two."""
        trainer = whole.trainer
        rows = preference.with_others(validation_rows(whole), 42)
        with trainer.model.disable_adapter():
            reference = preference.log_probs(trainer.model, rows, ("completion_ids", OTHER), ALONE)
        for number, name in enumerate(preference.LabelledEvaluation.reference_columns):
            rows = rows.add_column(name, reference[:, number].tolist())
        halves = [trainer.data_collator([rows[i] for i in part]) for part in (range(4), range(4, 8))]
        batches, _ = trainer.get_batch_samples(iter(halves), 2, ALONE.device)
        with torch.no_grad():
            found = sum(float(trainer.compute_loss(trainer.model, batch)) for batch in batches) / 2
        assert whole.report.evaluation is not None
        assert whole.report.evaluation.tuned is not None
        assert float(whole.report.evaluation.tuned.method_loss or "") == pytest.approx(found, abs=2e-4)
        assert abs(found - 0.5) > 0.01

    def test_the_order_of_rows_is_drawn(self, whole: Trained) -> None:
        """TRL asks for a fixed one, because it takes the neighbour's answer."""
        drawn = list(whole.trainer._get_train_sampler())
        assert sorted(drawn) == list(range(24)) != drawn


@pytest.mark.parametrize("adapter", ["Full", "QLoRA"])
def test_an_interrupted_run_ends_in_the_same_weights(
    kto: Callable[[str], Trained],
    changes: Callable[..., dict[str, Any]],
    make_job: Callable[..., TestJob],
    interrupt: Callable[[TestJob, int], None],
    adapter: str,
    tmp_path: Path,
) -> None:
    unbroken = kto(adapter)
    job = make_job(**changes(adapter))
    job.run("prepare")
    interrupt(job, 4)  # in the second pass over the rows
    report = job.run("train", 2, (1,))
    assert report.resumed_from_step == 4
    assert report.evaluation == unbroken.report.evaluation
    folder = "weights" if adapter == "Full" else "adapter"
    job.bucket.fetch_folder(f"{job.work}/train/2/final/{folder}", tmp_path / "resumed")
    resumed = {
        name: tensor
        for path in (tmp_path / "resumed").glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    expected = stored(unbroken, folder, tmp_path / "unbroken")
    assert resumed.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(resumed[name], expected[name])] == []


class TestOtherAnswers:
    def rows(self, sizes: list[tuple[int, int]]) -> Dataset:
        return Dataset.from_list(
            [
                {"prompt_ids": [number] * prompt, "completion_ids": [number] * answer, "label": bool(number % 2)}
                for number, (prompt, answer) in enumerate(sizes)
            ]
        )

    def test_each_row_has_that_of_another_one(self) -> None:
        rows = preference.with_others(self.rows([(3, 4)] * 20), 7)
        others = [row[OTHER][0] for row in rows]
        assert sorted(others) == list(range(20))
        assert all(other != number for number, other in enumerate(others))
        assert others == [row[OTHER][0] for row in preference.with_others(self.rows([(3, 4)] * 20), 7)]
        assert others != [row[OTHER][0] for row in preference.with_others(self.rows([(3, 4)] * 20), 8)]

    def test_none_makes_a_sequence_longer_than_the_longest(self) -> None:
        rows = preference.with_others(self.rows([(10, 1), (1, 10), (9, 2), (2, 9), (5, 5), (1, 1)]), 7)
        assert max(len(row["prompt_ids"]) + len(row[OTHER]) for row in rows) <= 11

    def test_none_is_of_the_same_prompt(self) -> None:
        rows = [{"prompt_ids": [n // 4], "completion_ids": [n], "label": True} for n in range(40)]
        found = preference.with_others(Dataset.from_list(rows), 7)
        assert all(row[OTHER][0] // 4 != row["prompt_ids"][0] for row in found)

    @pytest.mark.parametrize("count", [0, 1])
    def test_where_there_is_no_other(self, count: int) -> None:
        rows = preference.with_others(self.rows([(2, 3)] * 2).select(range(count)), 7)
        assert rows[OTHER] == [[0, 0, 0]] * count


class TestPrepare:
    def test_the_rows_of_the_example(
        self, changes: Callable[..., dict[str, Any]], make_job: Callable[..., TestJob], inputs: Bucket
    ) -> None:
        inputs.put("data/example-kto.jsonl", REPOSITORY / "examples" / "kto" / "train.jsonl")
        own = changes("LoRA")
        own["dataset"] |= {"train": [{"uri": inputs.uri("data/example-kto.jsonl")}], "validation": None}
        own["dataset"]["validationSplit"] = "0.2"
        own["hyperparameters"]["learningRate"] = None
        job = make_job(**own)
        report = job.run("prepare")
        assert report.dataset is not None
        assert (report.dataset.format, report.dataset.train_rows, report.dataset.validation_rows) == (
            "UnpairedPreference",
            48,
            12,
        )
        assert report.resolved is not None
        assert report.resolved.learning_rate == "1e-5"
        rows = prepared.read_rows(job.disk("prepare").data / prepared.TRAIN_FILE)
        assert rows.column_names == ["prompt_ids", "completion_ids", "label"]
        answers = sum(len(row["completion_ids"]) for row in rows)
        assert report.dataset.supervised_tokens == answers
        assert report.dataset.train_tokens == answers + sum(len(row["prompt_ids"]) for row in rows)

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"prompt": "a", "completion": "b"}, "has no 'label'"),
            ({"prompt": "a", "completion": "b", "label": "maybe"}, "'label' is neither true nor false"),
            ({"prompt": "a", "label": True}, "has no 'completion'"),
            ({"prompt": "a", "completion": "word " * 600, "label": True}, "is longer than 512 tokens"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_rows_that_cannot_be_used(
        self,
        changes: Callable[..., dict[str, Any]],
        make_job: Callable[..., TestJob],
        inputs: Bucket,
        row: dict[str, Any],
        reason: str,
    ) -> None:
        good = [{"prompt": "a", "completion": "b", "label": label} for label in (True, "False")]
        inputs.put("data/bad-labelled.jsonl", as_json_lines([*good, row]))
        own = changes("LoRA")
        own["dataset"] |= {"train": [{"uri": inputs.uri("data/bad-labelled.jsonl")}], "validation": None}
        with pytest.raises(JobError, match="1 of 3 rows cannot be used") as caught:
            make_job(**own).run("prepare")
        assert f"row 3: {reason}" in caught.value.message

    @pytest.mark.parametrize(
        ("train", "validation", "message"),
        [
            ([True, True], [True], "The label of all train rows is true"),
            ([False, False], [True], "The label of all train rows is false"),
            ([True, False], [False], "No validation row has the label true"),
        ],
    )
    def test_labels_that_teach_nothing(
        self,
        changes: Callable[..., dict[str, Any]],
        make_job: Callable[..., TestJob],
        inputs: Bucket,
        train: list[bool],
        validation: list[bool],
        message: str,
    ) -> None:
        own = changes("LoRA")
        for name, labels in (("train", train), ("validation", validation)):
            rows = [{"prompt": f"{name} {i}", "completion": "a", "label": label} for i, label in enumerate(labels)]
            inputs.put(f"data/one-sided-{name}.jsonl", as_json_lines(rows))
            own["dataset"][name] = [{"uri": inputs.uri(f"data/one-sided-{name}.jsonl")}]
        with pytest.raises(JobError, match=message) as caught:
            make_job(**own).run("prepare")
        assert caught.value.failure_class is FailureClass.DATA_ERROR
