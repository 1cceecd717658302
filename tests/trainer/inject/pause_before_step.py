"""Training halts before the step after $TEST_PAUSE_AT until it is told to stop, or killed; $TEST_MARKER says that it
did."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def apply(training: Any) -> None:
    original = training.LoopCallback.on_step_begin

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == int(os.environ["TEST_PAUSE_AT"]):
            Path(os.environ["TEST_MARKER"]).touch()
            while not self._stop.requested:
                time.sleep(0.01)
        original(self, args, state, control, **more)

    training.LoopCallback.on_step_begin = on_step_begin
