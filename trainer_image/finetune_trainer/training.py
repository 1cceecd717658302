"""The training loop: TRL's trainers, with callbacks that report, checkpoint, stop on SIGTERM and watch the loss."""

from __future__ import annotations

import logging
import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from finetune_api.failures import FailureClass, JobError
from finetune_api.report import StepProgress
from finetune_api.spec import DPO, KTO, AdapterType, DPOLoss, FineTuneJobSpec, Method, MethodType, Optimizer
from finetune_api.status import Measurement
from finetune_trainer import evaluate
from finetune_trainer.checkpoints import CheckpointUploader
from finetune_trainer.plan import TrainingPlan
from finetune_trainer.reporting import Reporter, now
from finetune_trainer.world import World

log = logging.getLogger(__name__)

MAX_LOG_ENTRIES = 1000
"""Losses that are logged over a whole run; each costs a synchronisation with the GPU."""

_OPTIMIZERS = {
    Optimizer.ADAMW: "adamw_torch",
    Optimizer.ADAMW_8BIT: "adamw_8bit",
    Optimizer.PAGED_ADAMW_8BIT: "paged_adamw_8bit",
}
_DPO_LOSSES = {DPOLoss.SIGMOID: "sigmoid", DPOLoss.IPO: "ipo", DPOLoss.HINGE: "hinge", DPOLoss.ROBUST: "robust"}

Measure = Callable[[Any, Callable[[int], None]], Measurement | None]
"""Measures a model on the validation rows, and tells how many are done."""


class StopSignal:
    """SIGTERM sets a flag; training saves a checkpoint at the end of the step and stops."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def check(self) -> None:
        """Give up at a point where there is nothing to save.

        Raises:
            JobError: Terminated.
        """
        if self.requested:
            raise stopped("before a step was made")


def stopped(when: str) -> JobError:
    return JobError(FailureClass.TERMINATED, f"The pod was stopped from outside {when}.")


class _Prepared:
    """A trainer of rows that are prepared, without what TRL would write for a hub repository."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        return


class SFT(_Prepared, SFTTrainer):
    pass


class _Compared(_Prepared):
    """A trainer that compares the model with a reference."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if "ref" in getattr(self.model, "peft_config", {}):
            # A copy of the adapter as it is now. It says what the model without adapter says, and would be saved and
            # published with it.
            self.model.delete_adapter("ref")
        self._row_weight = 1.0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._row_weight = len(batches) / max(1, sum(len(batch["input_ids"]) for batch in batches))
        return batches, items

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The last micro-batch of a pass over the rows may be smaller, and the mean of means would weigh its rows more
        than others."""
        return super().compute_loss(model, inputs, *args, **kwargs) * (self._row_weight * len(inputs["input_ids"]))

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """The rows have them already: computed once for all attempts, and without a copy of the base on the disk."""
        return dataset


class Pairs(_Compared, DPOTrainer):
    pass


class Labelled(_Compared, KTOTrainer):
    """KTO compares each reward with how far the model has moved on average, estimated from answers to other prompts.

    TRL estimates it from the micro-batch and pairs prompts and answers within it; here it is estimated from all rows of
    the optimiser step, so that cutting the batch otherwise, or sharing it among more processes, changes nothing.
    """

    def __init__(self, **options: Any) -> None:
        config = options["args"]
        size = config.per_device_train_batch_size
        # What TRL asks for so that its own estimate works: two rows, in an order that never changes.
        config.per_device_train_batch_size = max(2, size)
        config.train_sampling_strategy = "sequential"
        super().__init__(**options)
        config.per_device_train_batch_size = self._train_batch_size = size
        config.train_sampling_strategy = "random"
        self.precompute_ref_logps = True
        self._moved = torch.zeros(())

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        total = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            found = super()._compute_kl_logps(self.model, self._prepare_inputs(batch))
            total += torch.tensor([float((found.cpu() - batch["ref_KL_logps"].cpu()).double().sum()), len(found)])
            # What TRL takes away from what it takes for the model's own log-probabilities.
            batch["ref_KL_logps"] = torch.zeros_like(batch["ref_KL_logps"])
        moved, rows = self.accelerator.reduce(total.to(self.accelerator.device), "sum").tolist()
        self._moved = torch.tensor(moved / max(rows, 1), device=self.accelerator.device)
        return batches, items

    def _compute_kl_logps(self, model: Any, batch: Any) -> torch.Tensor:
        return self._moved.expand(len(batch["label"]))


Trainer = SFT | Pairs | Labelled
_TRAINERS: dict[type[TrainingArguments], type[Trainer]] = {SFTConfig: SFT, DPOConfig: Pairs, KTOConfig: Labelled}


def needs_reference(method: Method) -> bool:
    """Whether what the reference says of the train rows is computed before the first step.

    Where all weights are trained, a copy of the base would take a quarter more memory, and a pass over each row in each
    epoch. With an adapter the reference of DPO is the model without it; KTO would have to run it on two sequences for
    each one that is learnt.
    """
    return method.type is MethodType.KTO or (method.type is MethodType.DPO and method.adapter.type is AdapterType.FULL)


def arguments(
    spec: FineTuneJobSpec,
    plan: TrainingPlan,
    world: World,
    *,
    output: Path,
    compute: str,
    micro_batch_size: int,
    checkpointing: bool,
) -> TrainingArguments:
    parameters = spec.hyperparameters
    on_cpu = world.device.type == "cpu"
    common: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": plan.total_steps,
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": parameters.batch_size // (micro_batch_size * world.size),
        "learning_rate": float(plan.learning_rate),
        "lr_scheduler_type": parameters.scheduler.lower(),
        "warmup_steps": round(float(parameters.warmup_ratio) * plan.total_steps),
        "weight_decay": float(parameters.weight_decay),
        "max_grad_norm": float(parameters.max_grad_norm),
        "optim": _OPTIMIZERS[parameters.optimizer],
        "seed": parameters.seed,
        "data_seed": parameters.seed,
        "bf16": compute == "BF16",
        "use_cpu": on_cpu,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "logging_steps": max(1, plan.total_steps // MAX_LOG_ENTRIES),
        "logging_nan_inf_filter": False,  # a loss that is no number must be seen
        "save_strategy": "no",  # the callback decides
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "include_num_input_tokens_seen": "non_padding",
        "max_length": None,  # rows are prepared as long as they may be; nothing is cut here
        "dataloader_pin_memory": not on_cpu,
        "ddp_find_unused_parameters": False,
        # While one process saves, the others wait in a collective. Hangs are the agent's to find.
        "ddp_timeout": 24 * 3600,
    }
    match spec.method.type:
        case MethodType.SFT:
            return SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True}, packing=False)
        case MethodType.DPO:
            settings = spec.method.dpo or DPO()
            return DPOConfig(
                **common,
                beta=float(settings.beta),
                loss_type=[_DPO_LOSSES[settings.loss]],
                label_smoothing=float(settings.label_smoothing or 0),
                precompute_ref_log_probs=needs_reference(spec.method),
            )
        case MethodType.KTO:
            weights = spec.method.kto or KTO()
            return KTOConfig(
                **common,
                beta=float(weights.beta),
                desirable_weight=float(weights.desirable_weight),
                undesirable_weight=float(weights.undesirable_weight),
                # With an adapter no copy of the base is loaded either way, and TRL need not hash the model.
                precompute_ref_log_probs=spec.method.adapter.type is AdapterType.FULL,
            )


def build_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    config: TrainingArguments,
    callbacks: list[TrainerCallback],
) -> Trainer:
    # TRL turns the adapters of a quantised model to bfloat16 in its constructor; see `models` for why they stay
    # float32.
    trained = {name: tensor.data for name, tensor in model.named_parameters() if tensor.requires_grad}
    trainer = _TRAINERS[type(config)](
        model=model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks
    )
    trainer.remove_callback(PrinterCallback)
    for name, tensor in trainer.model.named_parameters():
        if name in trained:
            tensor.data = trained[name]
    return trainer


class LoopCallback(TrainerCallback):
    """Decides at the end of each step, in all processes alike, whether to save, to stop and to measure."""

    def __init__(
        self,
        spec: FineTuneJobSpec,
        plan: TrainingPlan,
        world: World,
        stop: StopSignal,
        reporter: Reporter | None,
        uploader: CheckpointUploader | None,
        measure: Measure,
    ) -> None:
        self._spec = spec
        self._plan = plan
        self._world = world
        self._stop = stop
        self._reporter = reporter
        self._uploader = uploader
        self._evaluate = measure
        self._last_save = time.monotonic()
        self._save_started = 0.0
        self._step_started = 0.0
        self._recent_steps: deque[float] = deque(maxlen=50)
        self._first: tuple[float, int] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._last_save = time.monotonic()
        if self._reporter:
            self._reporter.phase("Training")
            self._report(state, {})

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._step_started = time.monotonic()
        if self._first is None:
            self._first = (self._step_started, state.num_input_tokens_seen)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._recent_steps.append(time.monotonic() - self._step_started)
        every = self._spec.checkpoint
        due = every.every_seconds > 0 and time.monotonic() - self._last_save >= every.every_seconds
        # Clocks and signals differ between processes; one that saves alone would wait for the others for ever.
        stop, due = self._world.any(self._stop.requested, due)
        due = due or (every.every_steps > 0 and state.global_step % every.every_steps == 0)
        if stop or due or state.global_step >= state.max_steps:
            control.should_save = True
            self._save_started = time.monotonic()
        if stop:
            control.should_training_stop = True
        wanted = self._spec.evaluation.every_steps
        if wanted and state.global_step % wanted == 0 and not stop and state.global_step < state.max_steps:
            self._measure(kwargs["model"], state)
        if self._reporter:
            self._report(state, {})

    def _measure(self, model: Any, state: TrainerState) -> None:
        if self._reporter:
            self._reporter.phase("Evaluating")
        measured = self._reporter.measured if self._reporter else evaluate.unseen
        result = self._evaluate(model, measured)
        if result and self._reporter:
            log.info("step %d: validation loss %s, perplexity %s", state.global_step, result.loss, result.perplexity)
            self._reporter.evaluation(tuned=result)
        if self._reporter:
            self._reporter.phase("Training")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._world.barrier()  # every process has written its part
        self._last_save = time.monotonic()
        if self._reporter:
            # A slow upload of the one before is no hang.
            self._reporter.phase("Saving")
        if self._uploader:
            assert args.output_dir is not None
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self._uploader.submit(folder, state.global_step, time.monotonic() - self._save_started)
        # After the last step, or when it was told to stop, it goes on saving; the other pods may be gone by then.
        if self._reporter and not control.should_training_stop:
            self._reporter.phase("Training")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        for name in ("loss", "grad_norm"):
            value = logs.get(name)
            if value is not None and not math.isfinite(value):
                raise JobError(
                    FailureClass.LOSS_DIVERGED,
                    f"The {name} became {value} at step {state.global_step}. Lower hyperparameters.learningRate, or "
                    "look for broken rows.",
                )
        if "loss" in logs and self._reporter:
            log.info(
                "step %d/%d loss %.4f learning rate %.2e",
                state.global_step,
                state.max_steps,
                logs["loss"],
                logs.get("learning_rate", 0.0),
            )
            self._report(state, logs)

    def resumed_at_the_end(self, state: TrainerState) -> None:
        """There was no step left to make."""
        if self._reporter:
            self._report(state, next((entry for entry in reversed(state.log_history) if "loss" in entry), {}))

    def _report(self, state: TrainerState, logs: dict[str, Any]) -> None:
        assert self._reporter is not None
        before = self._reporter.report.progress
        speed = None
        if self._first is not None and (elapsed := time.monotonic() - self._first[0]) > 0:
            speed = (state.num_input_tokens_seen - self._first[1]) / elapsed

        def latest(name: str, field: str) -> float | None:
            value = logs.get(name, getattr(before, field) if before else None)
            return None if value is None else float(value)

        self._reporter.update(
            progress=StepProgress(
                step=state.global_step,
                total_steps=state.max_steps,
                epoch=round(state.epoch or 0.0, 4),
                loss=latest("loss", "loss"),
                learning_rate=latest("learning_rate", "learning_rate"),
                grad_norm=latest("grad_norm", "grad_norm"),
                tokens_per_second=round(speed, 1) if speed else None,
                trained_tokens=int(state.num_input_tokens_seen),
                step_seconds=round(statistics.median(self._recent_steps), 3) if self._recent_steps else None,
                last_step_time=now() if self._recent_steps else None,
                gpu_memory_peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            )
        )


def train(trainer: Trainer, checkpoint: Path | None, callback: LoopCallback) -> None:
    """Run the loop from the beginning or from a checkpoint, to the last step or until it is stopped."""
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step >= trainer.args.max_steps:
            # The attempt before this one died after its last step. The loop would make one more before it looks.
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state
            callback.resumed_at_the_end(state)
            return
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
