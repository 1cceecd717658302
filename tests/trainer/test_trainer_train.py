"""Training moves what it should and nothing else; its numbers do not depend on how the batch is cut or shared."""

from __future__ import annotations

import copy
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trained
from datasets import Dataset
from safetensors.torch import load_file
from trainer_lab import INJECT, TestJob

from finetune_api.failures import FailureClass, JobError
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer import evaluate, layout, models
from finetune_trainer.data import prepared
from finetune_trainer.reporting import Reporter
from finetune_trainer.world import World

ADAPTERS = ["Full", "LoRA", "QLoRA"]
Train = Callable[..., Trained]
ALONE = World(0, 1, 0)


def files_of(trained: Trained, folder: str, target: Path) -> dict[str, torch.Tensor]:
    """All tensors below a folder of what training handed over."""
    trained.job.bucket.fetch_folder(f"{trained.final}/{folder}", target)
    return {name: tensor for path in sorted(target.rglob("*.safetensors")) for name, tensor in load_file(path).items()}


def base_tensors(tiny_model: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny_model / "model.safetensors")


def adapter_of(trained: Trained) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().clone()
        for name, tensor in trained.trainer.model.named_parameters()
        if tensor.requires_grad
    }


def test_gpus_that_cannot_be_used_are_no_reason_to_train_on_the_cpu() -> None:
    ALONE.require_gpus(0)
    with pytest.raises(JobError, match="gpusPerNode is 2, but 0 GPUs are usable") as caught:
        ALONE.require_gpus(2)
    assert caught.value.failure_class is FailureClass.UNKNOWN


def test_a_row_longer_than_a_batch_is_measured_in_parts(
    train: Train, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = prepared.read_rows(train().job.disk("train").data / prepared.VALIDATION_FILE)
    model = models.load_base(tiny_model, "F32", ALONE)
    whole = evaluate.measure(model, rows, ALONE)
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 7)
    assert evaluate.measure(model, rows, ALONE, 7) == whole


def test_the_float_base_is_not_loaded_when_there_is_nothing_to_measure(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes four times the memory that QLoRA is asked for."""
    monkeypatch.setattr(models, "load_base", None)
    run = train(
        method={"adapter": {"type": "QLoRA"}},
        dataset={"validation": None, "validationSplit": "0"},
        hyperparameters={"maxSteps": 1},
    )
    assert run.report.evaluation is None or run.report.evaluation.base is None


class TestWhatMoves:
    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_the_loss_falls(self, trained: Callable[[str], Trained], adapter: str) -> None:
        run = trained(adapter)
        losses = [entry["loss"] for entry in run.history]
        assert len(losses) == 12
        assert losses[-1] < losses[0] - 0.3
        evaluation = run.report.evaluation
        assert evaluation is not None
        assert evaluation.base is not None
        assert evaluation.tuned is not None
        assert float(evaluation.tuned.loss) < float(evaluation.base.loss) - 0.3
        assert evaluation.tuned.tokens == evaluation.base.tokens
        assert (evaluation.quantized_base is not None) == (adapter == "QLoRA")

    def test_full_moves_every_weight(self, trained: Callable[[str], Trained], tiny_model: Path, tmp_path: Path) -> None:
        base, weights = base_tensors(tiny_model), files_of(trained("Full"), "weights", tmp_path)
        assert weights.keys() == base.keys()
        assert all(weights[name].dtype == torch.float32 for name in weights)
        assert [name for name in base if torch.equal(base[name], weights[name])] == []

    @pytest.mark.parametrize("adapter", ["LoRA", "QLoRA"])
    def test_the_adapter_moves_in_float32(
        self, trained: Callable[[str], Trained], adapter: str, tmp_path: Path
    ) -> None:
        moved = adapter_of(trained(adapter))
        assert len(moved) == 2 * 2 * 7  # A and B of the seven linear layers of both blocks
        assert {tensor.dtype for tensor in moved.values()} == {torch.float32}
        # B begins at zero: whatever it is now was learnt.
        assert all(tensor.any() for name, tensor in moved.items() if "lora_B" in name)
        stored = files_of(trained(adapter), "adapter", tmp_path)
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
        assert sum(tensor.numel() for tensor in stored.values()) == sum(tensor.numel() for tensor in moved.values())
        state = trained(adapter).trainer.optimizer.state
        assert {value.dtype for values in state.values() for value in values.values()} == {torch.float32}

    def test_lora_leaves_the_base_as_it_was(self, trained: Callable[[str], Trained], tiny_model: Path) -> None:
        base = base_tensors(tiny_model)
        frozen = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
            for name, tensor in trained("LoRA").trainer.model.named_parameters()
            if "lora_" not in name
        }
        assert frozen.keys() == base.keys()
        assert all(torch.equal(frozen[name], base[name]) for name in base)

    def test_qlora_leaves_the_packed_base_as_it_was(self, trained: Callable[[str], Trained], tmp_path: Path) -> None:
        """What was stored before the first step is what is in memory after the last one."""
        from bitsandbytes.nn import Linear4bit

        run = trained("QLoRA")
        stored = files_of(run, "quantized", tmp_path)
        layers = {
            f"{name.removeprefix('base_model.model.').removesuffix('.base_layer')}.weight": module
            for name, module in run.trainer.model.named_modules()
            if isinstance(module, Linear4bit)
        }
        assert len(layers) == 14
        for name, module in layers.items():
            assert module.weight.dtype == torch.uint8
            assert torch.equal(stored[name], module.weight.data), name
            assert torch.equal(stored[f"{name}.absmax"], module.weight.quant_state.absmax), name
        others = {
            name: tensor
            for name, tensor in run.trainer.model.named_parameters()
            if "lora_" not in name and tensor.dtype != torch.uint8
        }
        assert not any(tensor.requires_grad for tensor in others.values())


@pytest.fixture
def specs(make_job: Callable[..., TestJob]) -> Callable[[str], FineTuneJobSpec]:
    return lambda adapter: make_job(method={"adapter": {"type": adapter}}).spec


def test_measuring_changes_neither_weights_nor_gradients(
    specs: Callable[[str], FineTuneJobSpec], trained: Callable[[str], Trained], tiny_model: Path
) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in evaluation mode, unless it is kept from it."""
    rows = prepared.read_rows(trained("QLoRA").job.disk("train").data / prepared.TRAIN_FILE)
    batch = [rows[number] for number in range(4)]
    results = []
    for measured in (False, True):
        torch.manual_seed(0)
        model = models.load_for_training(tiny_model, specs("QLoRA"), "F32", ALONE)
        # Of the adapter's two matrices one begins at zero, so that half of the gradients would be zero.
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(tensor, std=0.02)
        packed = {name: tensor.clone() for name, tensor in model.named_parameters() if tensor.dtype == torch.uint8}
        if measured:
            assert evaluate.measure(model, rows, ALONE) is not None
        model.train()
        logits, targets, _ = evaluate.supervised_logits(model, batch)
        torch.nn.functional.cross_entropy(logits, targets).backward()
        parameters = dict(model.named_parameters())
        assert all(torch.equal(parameters[name], tensor) for name, tensor in packed.items())
        results.append({name: tensor.grad for name, tensor in parameters.items() if tensor.requires_grad})
    assert len(results[0]) == 28
    for name, gradient in results[0].items():
        assert gradient is not None
        assert gradient.any(), name
        assert torch.equal(gradient, results[1][name]), name


class TestEvaluation:
    @pytest.fixture
    def rows(self, trained: Callable[[str], Trained]) -> Dataset:
        return prepared.read_rows(trained("Full").job.disk("train").data / prepared.VALIDATION_FILE)

    @pytest.fixture
    def model(self, trained: Callable[[str], Trained]) -> Any:
        return trained("Full").trainer.model

    def by_hand(self, model: Any, rows: Dataset) -> tuple[float, int]:
        total, count = 0.0, 0
        model.eval()
        with torch.no_grad():
            for row in rows:
                logits = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
                for position, label in enumerate(row["labels"]):
                    if label != -100:
                        total -= float(logits[position - 1, label])
                        count += 1
        return total / count, count

    def test_it_is_the_mean_over_tokens(self, model: Any, rows: Dataset, trained: Callable[[str], Trained]) -> None:
        loss, count = self.by_hand(model, rows)
        measured = evaluate.measure(model, rows, ALONE)
        assert measured is not None
        assert float(measured.loss) == pytest.approx(loss, abs=6e-5)
        assert float(measured.perplexity) == pytest.approx(math.exp(loss), rel=1e-3)
        assert measured.tokens == count
        evaluation = trained("Full").report.evaluation
        assert evaluation is not None
        assert evaluation.tuned == measured

    def test_it_does_not_depend_on_the_batch(self, model: Any, rows: Dataset) -> None:
        longest = max(len(row["input_ids"]) for row in rows)
        sizes = {limit: [len(b) for b in evaluate.batches(rows, range(len(rows)), limit)] for limit in (1, 8 * longest)}
        assert max(sizes[1]) == 1
        assert max(sizes[8 * longest]) >= 8
        found = {repr(evaluate.measure(model, rows, ALONE, batch_tokens=limit)) for limit in (1, 300, 8 * longest)}
        assert len(found) == 1

    def test_batches_hold_each_row_once_and_stay_small(self, rows: Dataset) -> None:
        batches = list(evaluate.batches(rows, range(len(rows)), 400))
        assert sorted(row["input_ids"] for batch in batches for row in batch) == sorted(rows["input_ids"])
        assert all(
            max(len(row["input_ids"]) for row in batch) * len(batch) <= 400 for batch in batches if len(batch) > 1
        )

    def test_processes_share_the_rows(self, model: Any, rows: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each row is measured by exactly one process; the sums are what a single one finds."""
        parts: list[tuple[float, ...]] = []
        monkeypatch.setattr(World, "sum", lambda self, *values: parts.append(values) or list(values))
        for rank in range(4):
            evaluate.measure(model, rows, World(rank, 4, rank))
        together = evaluate.measurement(sum(total for total, _ in parts), int(sum(count for _, count in parts)))
        assert together == evaluate.measure(model, rows, ALONE)

    def test_the_mode_of_the_model_is_kept(self, model: Any, rows: Dataset) -> None:
        for training in (True, False):
            model.train(training)
            evaluate.measure(model, rows, ALONE)
            assert model.training is training

    def test_nothing_to_measure(self, model: Any, rows: Dataset) -> None:
        assert evaluate.measure(model, rows.select([]), ALONE) is None

    def test_a_hopeless_model_has_a_perplexity(self) -> None:
        assert evaluate.measurement(70_000.0, 10).perplexity == "inf"

    def test_the_base_is_measured_once(self, train: Train, make_job: Callable[..., TestJob]) -> None:
        """What an earlier attempt measured is kept: by now the model may be tuned."""
        job = make_job(hyperparameters={"maxSteps": 1})
        job.run("prepare")
        stored = {"base": {"loss": "1.2345", "perplexity": "3.437", "tokens": 7}}
        job.bucket.put(f"{job.work}/{layout.BASE_EVALUATION}", json.dumps(stored))
        report = job.run("train")
        assert report.evaluation is not None
        assert report.evaluation.base is not None
        assert report.evaluation.base.loss == "1.2345"
        assert job.bucket.json(f"{job.work}/{layout.BASE_EVALUATION}") == stored

    def test_during_training(self, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
        """In a phase of its own: while it is Training the agent waits for steps, and many rows are no hang."""
        seen: list[str] = []
        said: list[int] = []
        enter, measure = Reporter.phase, evaluate.measure

        def measured(*arguments: Any, **named: Any) -> Any:
            seen.append("measures")
            return measure(*arguments, **named)

        monkeypatch.setattr(Reporter, "phase", lambda self, name: seen.append(name) or enter(self, name))
        monkeypatch.setattr(evaluate, "measure", measured)
        monkeypatch.setattr(Reporter, "measured", lambda self, rows: said.append(rows))
        run = train(hyperparameters={"maxSteps": 4}, evaluation={"everySteps": 2})
        assert run.report.evaluation is not None
        assert run.report.evaluation.tuned is not None
        begun = seen.index("Training")
        assert seen[begun : begun + 4] == ["Training", "Evaluating", "measures", "Training"]
        # The base, in the middle and the end: all tell how far they are, or they would be taken for a hang.
        assert said.count(max(said)) == seen.count("measures") >= 3


class TestBatches:
    """The trained weights do not depend on how a batch is cut into micro-batches, or shared among processes."""

    @pytest.fixture(scope="class")
    @staticmethod
    def whole(train: Train) -> Trained:
        return train(hyperparameters={"maxSteps": 4, "batchSize": 8, "microBatchSize": 8})

    def close(self, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=2e-4, msg=name)

    def test_accumulation(self, train: Train, whole: Trained) -> None:
        cut = train(hyperparameters={"maxSteps": 4, "batchSize": 8, "microBatchSize": 1})
        assert cut.report.resolved is not None
        assert cut.report.resolved.gradient_accumulation_steps == 8
        for one, eight in zip(whole.history, cut.history, strict=True):
            assert eight["loss"] == pytest.approx(one["loss"], abs=1e-4)
            assert eight["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        self.close(adapter_of(whole), adapter_of(cut))

    @pytest.fixture(scope="class")
    @staticmethod
    def pair(make_job: Callable[..., TestJob]) -> Trained:
        """The same in two processes."""
        job = make_job(hyperparameters={"maxSteps": 4, "batchSize": 8})
        job.run("prepare")
        run = job.agent("train", processes=2)
        assert run.wait() == 0, run.text()
        assert "[rank 0]" in run.text()
        return Trained(job, run.report, None)

    def test_two_processes(self, pair: Trained, whole: Trained, tmp_path: Path) -> None:
        report = pair.report
        assert report.resolved is not None
        assert report.evaluation is not None
        assert whole.report.evaluation is not None
        assert (report.resolved.world_size, report.resolved.micro_batch_size) == (2, 4)
        assert report.evaluation.base == whole.report.evaluation.base
        self.close(files_of(whole, "adapter", tmp_path / "one"), files_of(pair, "adapter", tmp_path / "two"))
        history = [json.loads(line) for line in pair.job.bucket.get(f"{pair.final}/history.jsonl").splitlines()]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert losses == pytest.approx([entry["loss"] for entry in whole.history], abs=1e-4)

    def test_two_processes_that_are_interrupted(
        self, pair: Trained, make_job: Callable[..., TestJob], tmp_path: Path
    ) -> None:
        """Both stop after the same step, and the second attempt ends in the weights of the unbroken one."""
        job = make_job(hyperparameters={"maxSteps": 4, "batchSize": 8})
        job.run("prepare")
        marker = job.root / "halted"
        patch = {
            "TEST_INJECT": f"finetune_trainer.training={INJECT / 'pause_before_step.py'}",
            "TEST_PAUSE_AT": "1",
            "TEST_MARKER": str(marker),
        }
        run = job.agent("train", processes=2, environment=patch)
        run.until(marker.exists)
        run.signal(signal.SIGTERM)
        assert run.wait() == 75, run.text()
        assert run.report.failure is not None
        assert "after step 2 of 4; a checkpoint was saved" in run.report.failure.message
        run = job.agent("train", 2, (1,), processes=2)
        assert run.wait() == 0, run.text()
        assert run.report.resumed_from_step == 2
        job.bucket.fetch_folder(f"{job.work}/train/2/final/adapter", tmp_path / "resumed")
        resumed = load_file(tmp_path / "resumed" / "adapter_model.safetensors")
        unbroken = files_of(pair, "adapter", tmp_path / "unbroken")
        assert [name for name in unbroken if not torch.equal(resumed[name], unbroken[name])] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"hyperparameters": {"optimizer": "AdamW8bit"}},
        {"hyperparameters": {"optimizer": "PagedAdamW8bit"}},
        {"hyperparameters": {"scheduler": "Linear", "warmupRatio": "0.5", "weightDecay": "0.1"}},
        {"hyperparameters": {"scheduler": "Constant", "maxGradNorm": "0.5"}},
        {"hyperparameters": {"precision": "BF16", "activationCheckpointing": "Enabled"}},
        {"method": {"adapter": {"type": "QLoRA", "quantization": {"doubleQuantization": "Disabled"}}}},
        {"method": {"adapter": {"type": "LoRA", "lora": {"rank": 4, "targetModules": ["q_proj"], "dropout": "0.1"}}}},
        {"method": {"adapter": {"type": "Full"}}, "hyperparameters": {"precision": "BF16"}},
    ],
    ids=str,
)
def test_settings_that_train(train: Train, changes: dict[str, Any]) -> None:
    changes = copy.deepcopy(changes)
    changes["hyperparameters"] = {"maxSteps": 3, **changes.get("hyperparameters", {})}
    run = train(**changes)
    assert [entry["step"] for entry in run.history] == [1, 2, 3]
    assert all(math.isfinite(entry["loss"]) for entry in run.history)
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    assert all(tensor.dtype == torch.float32 for tensor in adapter_of(run).values())


def test_a_loss_that_is_no_number_stops_the_run(make_job: Callable[..., TestJob]) -> None:
    job = make_job(
        method={"adapter": {"type": "Full"}}, hyperparameters={"learningRate": "1e30", "maxGradNorm": "1e30"}
    )
    job.run("prepare")
    with pytest.raises(JobError, match=r"^The (loss|grad_norm) became (nan|inf) at step \d+\. Lower") as caught:
        job.run("train")
    assert caught.value.failure_class is FailureClass.LOSS_DIVERGED
    assert "hyperparameters.learningRate" in caught.value.message
    assert job.bucket.keys(f"{job.work}/train/1/final") == []


def test_an_attempt_that_has_finished_does_nothing(trained: Callable[[str], Trained]) -> None:
    """Its pod was restarted between the last upload and its end."""
    job = trained("LoRA").job
    before = {key: job.bucket.get(key) for key in job.bucket.keys(f"{job.work}/train/")}
    job.run("train")
    assert {key: job.bucket.get(key) for key in job.bucket.keys(f"{job.work}/train/")} == before


def test_a_model_that_changed_is_not_trained(make_job: Callable[..., TestJob], inputs: Any, tiny_model: Path) -> None:
    inputs.put_folder("changing-model", tiny_model)
    job = make_job(model={"uri": inputs.uri("changing-model")})
    job.run("prepare")
    inputs.put("changing-model/generation_config.json", b"{}")
    with pytest.raises(JobError, match="changed while the job ran") as caught:
        job.run("train")
    assert caught.value.failure_class is FailureClass.MODEL_CHANGED
    assert "Create the job anew, and do not write to the folder meanwhile" in caught.value.message
