"""What may import what: a pod starts in a fraction of a second, and the trainer works without Kubernetes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import finetune_trainer

PACKAGE = Path(finetune_trainer.__file__).parent


def loaded_by(statement: str) -> set[str]:
    """Top-level names of all modules that a fresh interpreter holds after a statement."""
    code = f"{statement}; import sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "pyarrow", "numpy"}


def test_the_agent_imports_no_torch() -> None:
    loaded = loaded_by("import finetune_trainer.agent, finetune_trainer.main")
    assert loaded & HEAVY == set()
    assert "finetune_trainer" in loaded


def test_the_agents_storage_imports_no_torch() -> None:
    """It stores log and report."""
    statement = (
        "from finetune_trainer.storage import open_folder; from finetune_api.document import StorageSettings;"
        "open_folder('s3://bucket/x', StorageSettings())"
    )
    loaded = loaded_by(statement)
    assert loaded & HEAVY == set()
    assert "boto3" in loaded


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_the_trainer_knows_nothing_of_kubernetes(path: Path) -> None:
    names = {name.partition(".")[0] for name in imports(path)}
    assert names & {"kopf", "kubernetes", "aiohttp", "finetune_operator"} == set()


def test_nothing_loads_kubernetes_behind_our_back() -> None:
    statement = "import finetune_trainer.stages.train, finetune_trainer.stages.export, finetune_trainer.stages.prepare"
    loaded = loaded_by(statement)
    assert loaded & {"kopf", "kubernetes", "finetune_operator"} == set()
    assert {"torch", "trl"} <= loaded
