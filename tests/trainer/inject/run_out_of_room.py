"""Training runs out of something in the middle, in each attempt of what $TEST_FAULTS names for it, joined by commas.

disk: the pod's disk is filled to the last byte. gpu: no more than two rows fit into the memory of a GPU. memory: the
process takes more and more of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path
from typing import Any

STEPS = {"disk": 45, "gpu": 55, "memory": 65}
"""The step before which it happens: a checkpoint was saved before it, and more are due."""


def fill_the_disk() -> None:
    with (Path(os.environ["FINETUNE_WORK_DIR"]) / "ballast").open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)


def fill_the_memory() -> None:
    taken = [b"x" * (1 << 20) for _ in range(1500)]
    threading.Event().wait()
    del taken


def apply(training: Any) -> None:
    original = training.LoopCallback.on_step_begin
    attempt = json.loads(Path(os.environ["FINETUNE_DOCUMENT"]).read_text())["attempt"]
    fault = dict(enumerate(os.environ["TEST_FAULTS"].split(","), 1)).get(attempt, "")

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == STEPS.get(fault):
            if fault == "disk":
                fill_the_disk()
            elif fault == "memory":
                fill_the_memory()
            elif args.per_device_train_batch_size > 2:
                raise training.torch.OutOfMemoryError("CUDA out of memory.")
        original(self, args, state, control, **more)

    training.LoopCallback.on_step_begin = on_step_begin
