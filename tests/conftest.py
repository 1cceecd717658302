"""Shared by all tests: nothing reaches a model hub, and nothing here touches a cluster that was not named."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("KUBECONFIG", None)
# A tiny model gains nothing from threads, and loses much when they wait for a core.
os.environ["OMP_NUM_THREADS"] = "1"
for folder in ("unit", "controlplane", "trainer", "e2e", "simulation", "chart"):
    sys.path.append(str(Path(__file__).parent / folder))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The end-to-end tests first: they take longest, and two processes that share the files should end together."""
    items.sort(key=lambda item: "e2e" not in item.path.parts)
