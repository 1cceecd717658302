"""The operator of a later release, run as a script: it says another version, and builds other children."""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

from finetune_operator import children, main, metrics

VERSION = "99.0.0"
LABEL = "later-release"

_build = children.build


def build(*arguments: Any) -> tuple[dict[str, Any], ...]:
    """As this release builds them, and with what a release may change: labels, resources, variables, seconds."""
    objects = _build(*arguments)
    for item in objects:
        item["metadata"]["labels"] = {**item["metadata"]["labels"], LABEL: "yes"}
    template = objects[-1]["spec"]["template"]
    template["metadata"]["labels"] = {**template["metadata"]["labels"], LABEL: "yes"}
    template["spec"]["terminationGracePeriodSeconds"] += 1
    (container,) = template["spec"]["containers"]
    container["resources"]["requests"]["cpu"] = "3"
    container["env"].append({"name": "LATER_RELEASE", "value": "yes"})
    return objects


if __name__ == "__main__":
    with patch.object(children, "build", build), patch.object(metrics, "version", lambda name: VERSION):
        sys.exit(main.main())
