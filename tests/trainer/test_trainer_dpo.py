"""DPO: the chosen answers become likelier than the rejected ones, measured against the base and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trained
from preferences import TRAIN_ROWS, VALIDATION_ROWS, pair_rows, require_same, sequence_log_prob, softplus, stored
from safetensors.torch import load_file
from trainer_lab import REPOSITORY, Bucket, TestJob, as_json_lines, merged

from finetune_api.failures import FailureClass, JobError
from finetune_api.spec import DPO
from finetune_trainer import evaluate, models, preference
from finetune_trainer.data import prepared
from finetune_trainer.preference import PairEvaluation
from finetune_trainer.world import World

ADAPTERS = ["Full", "LoRA", "QLoRA"]
ALONE = World(0, 1, 0)
RATES = {"Full": "2e-3", "LoRA": "1e-2", "QLoRA": "1e-2"}


@pytest.fixture(scope="session")
def changes(inputs: Bucket) -> Callable[..., dict[str, Any]]:
    """What makes a job of SFT one of DPO."""
    inputs.put("data/pairs.jsonl", as_json_lines(pair_rows(TRAIN_ROWS)))
    inputs.put("data/validation-pairs.jsonl", as_json_lines(pair_rows(VALIDATION_ROWS, start=100)))

    def make(adapter: str, **changes: Any) -> dict[str, Any]:
        own = {
            "method": {"type": "DPO", "adapter": {"type": adapter}},
            "dataset": {
                "train": [{"uri": inputs.uri("data/pairs.jsonl")}],
                "validation": [{"uri": inputs.uri("data/validation-pairs.jsonl")}],
            },
            "hyperparameters": {"maxSteps": 6, "learningRate": RATES[adapter]},
        }
        return merged(own, changes)

    return make


@pytest.fixture(scope="session")
def dpo(train: Callable[..., Trained], changes: Callable[..., dict[str, Any]]) -> Callable[[str], Trained]:
    """One trained job for each adapter type, shared by all tests that only look."""
    return functools.cache(lambda adapter: train(**changes(adapter)))


def rows_of(run: Trained, name: str) -> Any:
    return prepared.read_rows(run.job.disk("train").data / name)


@pytest.fixture(scope="session")
def published(dpo: Callable[[str], Trained], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The exported job of an adapter type: a copy of what is at output.uri."""

    @functools.cache
    def get(adapter: str) -> Path:
        job = dpo(adapter).job
        job.run("export", 1, (1,))
        return job.bucket.fetch_folder(job.output, tmp_path_factory.mktemp("published"))

    return get


def validation_rows(run: Trained) -> Any:
    return prepared.read_rows(run.job.disk("train").data / prepared.VALIDATION_FILE)


def by_hand(model: Any, rows: Any) -> list[tuple[float, float]]:
    return [
        (
            sequence_log_prob(model, row["prompt_ids"], row["chosen_ids"]),
            sequence_log_prob(model, row["prompt_ids"], row["rejected_ids"]),
        )
        for row in rows
    ]


@pytest.mark.parametrize("adapter", ADAPTERS)
class TestTraining:
    def test_it_begins_at_the_base_and_tells_pairs_apart(self, dpo: Callable[[str], Trained], adapter: str) -> None:
        run = dpo(adapter)
        first, last = run.history[0], run.history[-1]
        assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
        assert last["loss"] < 0.2
        assert last["rewards/accuracies"] == 1
        assert last["rewards/margins"] > 1

    def test_what_is_measured(self, dpo: Callable[[str], Trained], adapter: str, tiny_model: Path) -> None:
        """Rewards from the log-probabilities of the trained model, with its adapter and without."""
        run = dpo(adapter)
        rows, model = validation_rows(run), run.trainer.model
        tuned = by_hand(model, rows)
        if adapter == "Full":
            base = by_hand(models.load_base(tiny_model, "F32", ALONE), rows)
        else:
            with model.disable_adapter():
                base = by_hand(model, rows)
        margins = [0.1 * ((t[0] - b[0]) - (t[1] - b[1])) for t, b in zip(tuned, base, strict=True)]
        tokens = sum(len(row["chosen_ids"]) for row in rows)
        evaluation = run.report.evaluation
        assert evaluation is not None
        measured = evaluation.tuned
        assert measured is not None
        assert measured.accuracy is not None
        assert measured.margin is not None
        assert measured.method_loss is not None
        assert measured.tokens == tokens
        assert float(measured.loss) == pytest.approx(-sum(t[0] for t in tuned) / tokens, abs=1e-4)
        assert float(measured.margin) == pytest.approx(sum(margins) / len(rows), abs=2e-4)
        assert float(measured.method_loss) == pytest.approx(
            sum(softplus(-margin) for margin in margins) / len(rows), abs=2e-4
        )
        assert float(measured.accuracy) == sum(margin > 0 for margin in margins) / len(rows) == 1
        for before in filter(None, (evaluation.base, evaluation.quantized_base)):
            assert (before.method_loss, before.accuracy, before.margin) == ("0.6931", "0.5000", "0.0000")
            assert before.tokens == tokens
        assert (evaluation.quantized_base is not None) == (adapter == "QLoRA")

    def test_what_moves(self, dpo: Callable[[str], Trained], adapter: str, tiny_model: Path, tmp_path: Path) -> None:
        run = dpo(adapter)
        base = load_file(tiny_model / "model.safetensors")
        if adapter == "Full":
            weights = stored(run, "weights", tmp_path)
            assert weights.keys() == base.keys()
            assert [name for name in base if torch.equal(base[name], weights[name])] == []
            return
        parameters = dict(run.trainer.model.named_parameters())
        learnt = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
        assert len(learnt) == 2 * 2 * 7
        assert {tensor.dtype for tensor in learnt.values()} == {torch.float32}
        assert all(tensor.any() for name, tensor in learnt.items() if "lora_B" in name)
        # TRL's copy of the adapter, which it would save and publish with it, is gone.
        assert {name for name in parameters if "lora_" in name} == set(learnt)
        frozen = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.data
            for name, tensor in parameters.items()
            if name not in learnt
        }
        # In 4 bits the layers are what was stored before the first step.
        expected = base | (stored(run, "quantized", tmp_path) if adapter == "QLoRA" else {})
        assert frozen.keys() == base.keys()
        assert [name for name, tensor in frozen.items() if not torch.equal(tensor, expected[name])] == []

    def test_the_published_model_is_the_trained_one(
        self, dpo: Callable[[str], Trained], published: Callable[[str], Path], adapter: str
    ) -> None:
        from transformers import AutoModelForCausalLM

        run, folder = dpo(adapter), published(adapter)
        rows = validation_rows(run)
        found = by_hand(AutoModelForCausalLM.from_pretrained(folder), rows)
        for one, other in zip(found, by_hand(run.trainer.model, rows), strict=True):
            assert one == pytest.approx(other, abs=2e-3)
        manifest = run.job.bucket.json(f"{run.job.output}/manifest.json")
        assert float(manifest["verification"]["meanKL"]) < 1e-6
        assert manifest["lineage"]["spec"]["method"]["type"] == "DPO"
        assert manifest["evaluation"]["tuned"]["accuracy"] == "1.0000"
        card = (folder / "README.md").read_text()
        assert f"with DPO and {adapter}" in card
        assert "- dpo\n" in card
        tuned = manifest["evaluation"]["tuned"]
        assert f"| tuned | {tuned['loss']} | {tuned['perplexity']} | {tuned['tokens']} | 1.0000 |" in card
        adapters = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("adapter_model.safetensors"))
        own = [path for path in adapters if not path.startswith(".finetune")]
        assert own == ([] if adapter == "Full" else ["adapter/adapter_model.safetensors"])


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "first"),
        [
            ({"loss": "IPO", "beta": "0.5"}, 1.0),
            ({"loss": "Hinge", "beta": "0.2"}, 1.0),
            ({"loss": "Robust", "labelSmoothing": "0.2"}, 0.6931),
        ],
        ids=lambda value: value["loss"] if isinstance(value, dict) else "",
    )
    def test_losses(
        self,
        train: Callable[..., Trained],
        changes: Callable[..., dict[str, Any]],
        settings: dict[str, str],
        first: float,
    ) -> None:
        """What is measured is what TRL computes of the same pairs."""
        run = train(**changes("LoRA", method={"dpo": settings}, hyperparameters={"maxSteps": 3}))
        assert run.history[0]["loss"] == pytest.approx(first, abs=1e-4)
        assert run.history[-1]["loss"] < first - 0.01
        trainer, rows = run.trainer, validation_rows(run)
        trainer.model.eval()
        (batch,), _ = trainer.get_batch_samples(iter([trainer.data_collator(list(rows))]), 1, ALONE.device)
        with torch.no_grad():
            expected = float(trainer.compute_loss(trainer.model, batch))
        assert run.report.evaluation is not None
        assert run.report.evaluation.tuned is not None
        assert run.report.evaluation.tuned.method_loss is not None
        assert float(run.report.evaluation.tuned.method_loss) == pytest.approx(expected, abs=1e-4)
        assert abs(expected - first) > 0.01

    def test_beta(self) -> None:
        ratios, lengths = torch.tensor([[1.0, -1.0]]), torch.tensor([[4.0, 8.0]])
        for beta in (0.1, 0.7):
            found = preference.dpo_losses(ratios, lengths, DPO(beta=str(beta)))
            assert float(found) == pytest.approx(softplus(-2 * beta))

    def test_learning_rates(self, changes: Callable[..., dict[str, Any]], make_job: Callable[..., TestJob]) -> None:
        rates = {}
        for adapter in ADAPTERS:
            own = changes(adapter)
            own["hyperparameters"]["learningRate"] = None
            report = make_job(**own).run("prepare")
            assert report.resolved is not None
            rates[adapter] = report.resolved.learning_rate
        assert rates == {"Full": "1e-6", "LoRA": "1e-5", "QLoRA": "1e-5"}

    def test_measuring_in_between(
        self, train: Callable[..., Trained], changes: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []
        measure = PairEvaluation.tuned
        monkeypatch.setattr(PairEvaluation, "tuned", lambda *arguments: seen.append(measure(*arguments)) or seen[-1])
        run = train(**changes("LoRA", hyperparameters={"maxSteps": 4}, evaluation={"everySteps": 2}))
        assert [float(found.margin) > 0 for found in seen if found and found.margin] == [True, True]
        assert run.report.evaluation is not None
        assert run.report.evaluation.tuned == seen[-1] != seen[0]


class TestMeasuring:
    @pytest.mark.parametrize(
        ("value", "text"), [(0.25, "0.2500"), (-9999.5, "-9999.5000"), (-1.2345678e150, "-1.235e+150")]
    )
    def test_numbers_are_short(self, value: float, text: str) -> None:
        assert evaluate.format_number(value) == text
        assert len(text) <= 12

    @pytest.fixture
    def run(self, dpo: Callable[[str], Trained]) -> Trained:
        return dpo("LoRA")

    def test_it_does_not_depend_on_the_batch(self, run: Trained) -> None:
        rows = validation_rows(run)
        whole = preference.log_probs(run.trainer.model, rows, PairEvaluation.answers, ALONE)
        for tokens in (1, 300):
            found = preference.log_probs(run.trainer.model, rows, PairEvaluation.answers, ALONE, tokens)
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-4)

    def test_processes_share_the_answers(self, run: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = validation_rows(run)
        whole = preference.log_probs(run.trainer.model, rows, PairEvaluation.answers, ALONE)
        parts: list[list[float]] = []
        monkeypatch.setattr(World, "sum", lambda self, *values: parts.append(list(values)) or list(values))
        for rank in range(3):
            preference.log_probs(run.trainer.model, rows, PairEvaluation.answers, World(rank, 3, rank))
        assert all(sum(part[answer] != 0 for part in parts) == 1 for answer in range(2 * len(rows)))
        together = torch.tensor([sum(values) for values in zip(*parts, strict=True)], dtype=torch.float64)
        torch.testing.assert_close(together.reshape(-1, 2), whole, rtol=0, atol=1e-4)

    def test_without_rows(self, run: Trained) -> None:
        rows = validation_rows(run).select([])
        evaluation = PairEvaluation(rows, ALONE, "F32", DPO())
        assert evaluation.base(run.trainer.model, lambda done: None) is None


class TestBatches:
    def test_accumulation(self, train: Callable[..., Trained], changes: Callable[..., dict[str, Any]]) -> None:
        """The second step has ten rows, which seven at once make seven and three."""
        own = {"maxSteps": 3, "batchSize": 14}
        runs = [train(**changes("LoRA", hyperparameters={**own, "microBatchSize": size})) for size in (1, 7, 14)]
        *cut, whole = ([entry["loss"] for entry in run.history] for run in runs)
        assert len(set(whole)) == 3
        *parts, expected = (dict(run.trainer.model.named_parameters()) for run in runs)
        for losses, part in zip(cut, parts, strict=True):
            assert losses == pytest.approx(whole, abs=1e-4)
            require_same(part, expected)

    def test_two_processes(
        self,
        train: Callable[..., Trained],
        changes: Callable[..., dict[str, Any]],
        make_job: Callable[..., TestJob],
        tmp_path: Path,
    ) -> None:
        few = {"hyperparameters": {"maxSteps": 3}}
        alone = train(**changes("Full", **few))
        job = make_job(**changes("Full", **few))
        job.run("prepare")
        run = job.agent("train", processes=2)
        assert run.wait() == 0, run.text()
        assert run.report.resolved is not None
        assert run.report.resolved.world_size == 2
        assert run.report.evaluation is not None
        assert alone.report.evaluation is not None
        assert run.report.evaluation.base == alone.report.evaluation.base
        together = stored(Trained(job, run.report, None), "weights", tmp_path / "two")
        require_same(together, stored(alone, "weights", tmp_path / "one"))


class TestResume:
    @pytest.mark.parametrize(("adapter", "forgotten"), [("QLoRA", False), ("Full", False), ("Full", True)])
    def test_the_reference_stays_the_base(
        self,
        dpo: Callable[[str], Trained],
        changes: Callable[..., dict[str, Any]],
        make_job: Callable[..., TestJob],
        interrupt: Callable[[TestJob, int], None],
        adapter: str,
        forgotten: bool,
        tmp_path: Path,
    ) -> None:
        """An interrupted run ends in the weights of the unbroken one, also where what the reference said is lost and
        computed again while there is a tuned model already."""
        unbroken = dpo(adapter)
        job = make_job(**changes(adapter))
        job.run("prepare")
        interrupt(job, 3)
        if forgotten:
            kept = job.bucket.keys(f"{job.work}/evaluation/reference-")
            assert len(kept) == 2
            job.bucket.delete(*kept)
        report = job.run("train", 2, (1,))
        assert report.resumed_from_step == 3
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

    def test_a_checkpoint_holds_one_adapter(
        self, train: Callable[..., Trained], changes: Callable[..., dict[str, Any]]
    ) -> None:
        run = train(**changes("LoRA", hyperparameters={"maxSteps": 1}))
        keys = run.job.bucket.keys(f"{run.job.work}/train/1/checkpoints/1/")
        assert [key.rpartition("/1/")[2] for key in keys if "adapter_model" in key] == ["adapter_model.safetensors"]

    def test_only_full_asks_for_what_the_reference_says_of_the_train_rows(self, dpo: Callable[[str], Trained]) -> None:
        """A second base is never loaded."""
        for adapter in ADAPTERS:
            run = dpo(adapter)
            assert run.trainer.ref_model is None
            keys = run.job.bucket.keys(f"{run.job.work}/evaluation/reference-train")
            assert len(keys) == (adapter == "Full")
            assert (
                set(PairEvaluation.reference_columns) <= set(run.trainer.train_dataset.column_names)
                or adapter != "Full"
            )


def failure(job: TestJob) -> JobError:
    with pytest.raises(JobError) as caught:
        job.run("prepare")
    return caught.value


class TestPrepare:
    def test_pairs_are_rendered_as_at_inference(self, dpo: Callable[[str], Trained], tokenizer: Any) -> None:
        run = dpo("LoRA")
        rows = validation_rows(run)
        assert rows.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]
        for row, source in zip(rows, pair_rows(VALIDATION_ROWS, start=100), strict=True):
            texts = {name: value if isinstance(value, str) else value[0]["content"] for name, value in source.items()}
            prompt = f"<|im_start|>user\n{texts['prompt']}<|im_end|>\n<|im_start|>assistant\n"
            assert tokenizer.decode(row["prompt_ids"]) == prompt
            assert tokenizer.decode(row["chosen_ids"]) == f"{texts['chosen']}<|im_end|>"
            assert tokenizer.decode(row["rejected_ids"]) == f"{texts['rejected']}<|im_end|>"
        data = run.report.dataset or run.job.run("prepare").dataset
        assert data is not None
        assert data.format == "Preference"
        train = prepared.read_rows(run.job.disk("train").data / prepared.TRAIN_FILE)
        answers = [len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in train]
        assert data.train_rows == len(train) == TRAIN_ROWS
        assert data.supervised_tokens == sum(answers)
        assert data.train_tokens == sum(answers) + 2 * sum(len(row["prompt_ids"]) for row in train)
        assert run.report.progress is not None
        assert run.report.progress.trained_tokens == 2 * data.train_tokens  # six steps of 8 are two passes over 24

    def test_earlier_turns_are_the_prompt(
        self, changes: Callable[..., dict[str, Any]], make_job: Callable[..., TestJob], inputs: Bucket, tokenizer: Any
    ) -> None:
        said = [("system", "Be brief."), ("user", "One?"), ("assistant", "Yes."), ("user", "Two?")]
        row = {
            "prompt": [{"role": role, "content": content} for role, content in said],
            "chosen": "No.",
            "rejected": [{"role": "assistant", "content": "Maybe."}],
        }
        inputs.put("data/turns.jsonl", as_json_lines([row]))
        own = changes("LoRA", dataset={"train": [{"uri": inputs.uri("data/turns.jsonl")}], "validation": None})
        own["dataset"]["validation"] = None
        job = make_job(**own)
        job.run("prepare")
        (found,) = prepared.read_rows(job.disk("prepare").data / prepared.TRAIN_FILE)
        turns = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in said)
        assert tokenizer.decode(found["prompt_ids"]) == f"{turns}<|im_start|>assistant\n"
        assert tokenizer.decode(found["chosen_ids"]) == "No.<|im_end|>"

    def test_some_pairs_are_held_out(
        self, changes: Callable[..., dict[str, Any]], make_job: Callable[..., TestJob]
    ) -> None:
        own = changes("LoRA")
        own["dataset"] |= {"validation": None, "validationSplit": "0.25"}
        job = make_job(**own)
        report = job.run("prepare")
        assert report.dataset is not None
        assert (report.dataset.train_rows, report.dataset.validation_rows) == (18, 6)
        parts = [prepared.read_rows(job.disk("prepare").data / name) for name in ("train.arrow", "validation.arrow")]
        assert len({str(row) for part in parts for row in part}) == TRAIN_ROWS

    def test_the_rows_of_the_example(
        self, changes: Callable[..., dict[str, Any]], make_job: Callable[..., TestJob], inputs: Bucket
    ) -> None:
        inputs.put("data/example.jsonl", REPOSITORY / "examples" / "dpo" / "train.jsonl")
        own = changes("LoRA")
        own["dataset"] |= {"train": [{"uri": inputs.uri("data/example.jsonl")}], "validation": None}
        own["dataset"]["validationSplit"] = "0.2"
        report = make_job(**own).run("prepare")
        assert report.dataset is not None
        assert (report.dataset.train_rows, report.dataset.validation_rows) == (48, 12)

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"prompt": "a", "chosen": "b"}, "has no 'rejected'"),
            ({"chosen": "b", "rejected": "c"}, "has no 'prompt'"),
            ({"prompt": "a", "chosen": "b", "rejected": "b"}, "has the same answer as chosen and as rejected"),
            ({"prompt": "a", "chosen": " ", "rejected": "b"}, "'chosen' is empty"),
            ({"prompt": 1, "chosen": "a", "rejected": "b"}, "'prompt' is not a string"),
            (
                {"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}] * 2, "rejected": "c"},
                "has an answer of several messages",
            ),
            (
                {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
                | {"chosen": "b", "rejected": "c"},
                "has a prompt that ends with an assistant turn",
            ),
            ({"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}, "end with an assistant"),
            ({"prompt": "word " * 600, "chosen": "b", "rejected": "c"}, "is longer than 512 tokens"),
            ({"prompt": "a", "chosen": "b", "rejected": "word " * 600}, "is longer than 512 tokens"),
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
        good = {"prompt": "a", "chosen": "b", "rejected": "c"}
        inputs.put("data/bad-pairs.jsonl", as_json_lines([good, row]))
        own = changes("LoRA")
        own["dataset"] |= {"train": [{"uri": inputs.uri("data/bad-pairs.jsonl")}], "validation": None}
        error = failure(make_job(**own))
        assert error.failure_class is FailureClass.DATA_ERROR
        assert "1 of 2 rows cannot be used" in error.message
        assert "row 2: " in error.message
        assert reason in error.message
