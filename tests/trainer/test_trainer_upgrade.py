"""What trainers of earlier releases have stored is read by this one: a job may be in the middle when they change.

The texts below are those of release 0.1.0. They are never brought up to date.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.document import JobDocument
from finetune_trainer import bundle, layout
from finetune_trainer.base_model import BaseModel
from finetune_trainer.manifest import find_published
from finetune_trainer.plan import require_plan
from finetune_trainer.storage.base import ObjectInfo
from finetune_trainer.storage.files import FileFolder

SHA256 = "e43a4ab3e6663bea3956d54c556486cbada0537d73809b5f2129ad504b81265e"
PREPARED = {"rows": 60, "tokens": 5070, "supervisedTokens": 1844, "longest": 124, "sha256": SHA256}
PIN = {
    "uri": "s3://models/base",
    "revision": "20552dc1b9e1e44cd2129594e8f15e826a7ae412dbb302e627e208713113c9e1",
    "files": [{"key": "model.safetensors", "size": 554264, "version": "1"}],
}
DATA = {
    "format": "Chat",
    "trainSources": [{"uri": "s3://data/train.jsonl", "size": 18152, "version": "2"}],
    "validationSources": [],
    "skippedRows": 0,
    "splitConversations": 0,
    "templateDate": "2025-01-01",
    "train": {**PREPARED, "fileSha256": SHA256},
    "validation": {**PREPARED, "fileSha256": SHA256},
}
PLAN = {
    "schemaVersion": 1,
    "documentDigest": "1668aefaa00941c998431cbf1bc26b936ae03c9838247b36edea669764e8b9a4",
    "model": PIN,
    "modelType": "llama",
    "parameters": 138048,
    "weightDtype": "F32",
    "data": DATA,
    "stopIds": [2],
    "totalSteps": 40,
    "learningRate": "2e-4",
    "artifacts": ["Merged", "Adapter"],
    "dtype": "F32",
}
BUNDLE = {"files": [{"path": "optimizer.pt", "size": 285723, "sha256": SHA256}], "facts": {"data": SHA256, "step": 4}}
MANIFEST = {
    "schemaVersion": 1,
    "documentDigest": PLAN["documentDigest"],
    "job": {"namespace": "team-a", "name": "bot", "uid": "uid-1"},
    "created": "2026-11-21T20:02:22Z",
    "artifacts": [{"name": "Adapter", "uri": "s3://models/bot/adapter", "sizeBytes": 2}],
    "files": [{"path": "adapter/adapter_model.safetensors", "size": 2, "sha256": SHA256}],
    "evaluation": {"base": {"loss": "6.9004", "perplexity": "992.7", "tokens": 185}},
    "lineage": {
        "base": PIN,
        "data": DATA,
        "spec": {},
        "resolved": {},
        "totalSteps": 40,
        "trainAttempts": 1,
        "trainedAgainst": "the base as it is",
        "versions": {},
        "trainerImage": "trainer:0.1.0",
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> FileFolder:
    return FileFolder(str(tmp_path))


@pytest.fixture
def document(folder: FileFolder) -> JobDocument:
    """As an operator of that release wrote it, with no more than had to be there."""
    spec = {
        "model": {"uri": "s3://models/base"},
        "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
        "output": {"uri": "s3://models/bot"},
    }
    return JobDocument.model_validate(
        {
            "schemaVersion": 1,
            "stage": "train",
            "attempt": 1,
            "job": {"namespace": "team-a", "name": "bot", "uid": "uid-1"},
            "spec": spec,
            "workURI": folder.uri,
            "storage": {"allowFiles": True},
        }
    )


def store(folder: FileFolder, key: str, value: dict[str, Any]) -> None:
    folder.write(key, json.dumps(value).encode())


def test_what_was_prepared_is_trained(folder: FileFolder, document: JobDocument) -> None:
    store(folder, layout.PLAN, PLAN)
    plan = require_plan(document)
    assert (plan.total_steps, plan.data.train.rows, plan.stop_ids) == (40, 60, [2])


def test_what_a_checkpoint_holds_is_known(folder: FileFolder) -> None:
    store(folder, "train/1/checkpoints/4/manifest.json", BUNDLE)
    stored = bundle.read(folder, "train/1/checkpoints/4")
    assert stored is not None
    assert (stored.files[0].path, stored.facts["data"]) == ("optimizer.pt", SHA256)


def test_what_was_published_is_found(folder: FileFolder, document: JobDocument) -> None:
    store(folder, layout.PLAN, PLAN)
    store(folder, layout.MANIFEST, MANIFEST)
    folder.write("adapter/adapter_model.safetensors", b"{}")
    plan = require_plan(document)
    published = find_published(folder, plan.document_digest, plan.model, plan.data.train_sources, [])
    assert published is not None
    assert published.job.uid == "uid-1"


class Listed(FileFolder):
    """A folder with a file of each kind that a model may have."""

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        return [ObjectInfo(key, 1, "v") for key in sorted(KEYS)]


KEYS = (
    *("README.md", "config.json", "generation_config.json", "model.safetensors", "pytorch_model.bin"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt", "special_tokens_map.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json", "vocab.json", "vocab.txt"),
    *("preprocessor_config.json", "processor_config.json", "quantization_config.json", "training_args.bin"),
    *("additional_chat_templates/tool_use.jinja", "configuration_llama.py", "tekken.json", "spiece.model"),
)


def test_a_base_model_has_the_revision_that_it_had() -> None:
    """Else every job that is between two stages fails with ModelChanged, and what is published is not found again. One
    more kind of file that counts is enough for that: a pin would first have to say which kinds counted for it."""
    assert (
        BaseModel(Listed("/models/base")).pin.revision
        == "b3e3743822704aa55ef16f05238b50e90afac6717962aa77d6d35fae62ecf297"
    )
