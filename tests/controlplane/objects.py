"""Manifests that tests write."""

from __future__ import annotations

import os
from typing import Any

IMAGE = os.environ.get("FINETUNE_TEST_IMAGE", "busybox:latest")
"""An image with a shell that a real server's nodes have; the embedded one ignores images."""


def manifest(name: str = "support-bot", **spec: Any) -> dict[str, Any]:
    """A small valid FineTuneJob."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": "s3://models/base"},
            "dataset": {"train": [{"uri": "s3://datasets/support.jsonl"}]},
            "output": {"uri": "s3://models/support-bot"},
            **spec,
        },
    }


def pod_spec(script: str, **more: Any) -> dict[str, Any]:
    """A pod with one container that runs a shell script."""
    container = {
        "name": "main",
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", script],
        **more.pop("container", {}),
    }
    return {"restartPolicy": "Never", "containers": [container], **more}


def job(name: str, script: str = "exit 0", **spec: Any) -> dict[str, Any]:
    """A Job with one pod that runs a shell script."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {"backoffLimit": 0, "template": {"spec": pod_spec(script)}, **spec},
    }
