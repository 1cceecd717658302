"""One stack for all end-to-end tests: started as a user starts it, with a tiny model in its bucket."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_up import LocalUp

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from trainer_lab import as_json_lines, save_tiny_model, short_rows

TOOLS = Path(__file__).parents[2] / ".tools" / "bin"


def program(name: str) -> str:
    """A program from FINETUNE_<NAME>, .tools/bin or PATH."""
    tool = TOOLS / name
    found = os.environ.get(f"FINETUNE_{name.upper()}") or (str(tool) if tool.exists() else shutil.which(name))
    if not found:
        pytest.skip(f"no {name} here: make .tools/.done fetches it where that is possible")
    return found


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[LocalUp]:
    stack = LocalUp(tmp_path_factory.mktemp("up") / "state", program("kubectl"))
    stack.s3.create_bucket(Bucket="models")
    stack.s3.create_bucket(Bucket="datasets")
    stack.put_folder("models", "tiny", tiny_model)
    stack.put("datasets", "train.jsonl", as_json_lines(short_rows(48)))
    stack.put("datasets", "validation.jsonl", as_json_lines(short_rows(9, start=100)))
    yield stack
    stack.close()


def manifest(name: str, **spec: Any) -> dict[str, Any]:
    """A job that takes seconds: a tiny model on CPU."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": "s3://models/tiny"},
            "dataset": {
                "train": [{"uri": "s3://datasets/train.jsonl"}],
                "validation": [{"uri": "s3://datasets/validation.jsonl"}],
            },
            "hyperparameters": {"maxSteps": 12, "batchSize": 4, "learningRate": "0.005"},
            "output": {"uri": f"s3://models/out/{name}"},
            "resources": {"gpusPerNode": 0},
            "failurePolicy": {"backoffSeconds": 0},
            **spec,
        },
    }
