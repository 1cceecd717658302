"""The upload of the checkpoint of step $TEST_PAUSE_AT halts before its manifest is written."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any


def apply(bundle: Any) -> None:
    original = bundle.publish

    def publish(folder: Any, prefix: str, files: Any, facts: dict[str, Any]) -> None:
        if facts.get("step") == int(os.environ["TEST_PAUSE_AT"]):
            Path(os.environ["TEST_MARKER"]).touch()
            threading.Event().wait()
        original(folder, prefix, files, facts)

    bundle.publish = publish
