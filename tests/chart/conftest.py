"""The tests of the chart need the real helm: $FINETUNE_HELM, .tools/bin/helm, or helm on the path."""

from __future__ import annotations

import pytest
from helm_chart import find_helm


@pytest.fixture(scope="session", autouse=True)
def _helm() -> None:
    if find_helm() is None:
        pytest.skip("helm 4 was not found: set FINETUNE_HELM")
