"""Schemas of the built-in kinds, as a Kubernetes API server publishes them.

`builtin.json` holds what is reachable from the kinds in `resources`, without descriptions. With merge keys and list
types in it, one file serves strict decoding, strategic merge patches, `/openapi/v3` and `kubectl explain`. Each
property also has its number in the protobuf encoding (`x-protobuf-field`), in which kubectl writes built-in kinds.

The file is made from a real server and the `generated.proto` files of the same release:

    KUBECTL=kubectl python -m finetune_operator.local.apiserver.definitions PROTO... > builtin.json
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from finetune_operator.schema import StructuralSchema

_PREFIX = "#/components/schemas/"
_DOCUMENTS = {
    "api/v1": (
        *("Namespace", "Node", "Pod", "ConfigMap", "Secret", "Event", "Service", "ServiceAccount"),
        *("PersistentVolumeClaim", "ResourceQuota", "Eviction"),
    ),
    "apis/batch/v1": ("Job",),
    "apis/coordination.k8s.io/v1": ("Lease",),
    "apis/apiextensions.k8s.io/v1": ("CustomResourceDefinition",),
    "apis/authorization.k8s.io/v1": ("SelfSubjectAccessReview", "SelfSubjectRulesReview"),
}


@functools.cache
def load() -> dict[str, Any]:
    """All definitions by name, such as `io.k8s.api.core.v1.Pod`."""
    text = (resources.files(__package__) / "builtin.json").read_text()
    definitions: dict[str, Any] = json.loads(text)
    return definitions


@functools.cache
def schema(name: str) -> StructuralSchema:
    """The schema of one definition."""
    return StructuralSchema(load()[name], load())


def reachable(names: list[str], definitions: dict[str, Any]) -> dict[str, Any]:
    """The definitions with these names and all that they refer to."""
    found: dict[str, Any] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = definitions[name]
            waiting.extend(_references(definitions[name]))
    return dict(sorted(found.items()))


def _references(node: Any) -> list[str]:
    if isinstance(node, dict):
        here = [node["$ref"].removeprefix(_PREFIX)] if isinstance(node.get("$ref"), str) else []
        return here + [name for value in node.values() for name in _references(value)]
    if isinstance(node, list):
        return [name for value in node for name in _references(value)]
    return []


def _stripped(node: Any) -> Any:
    """Without descriptions, and without the list of kinds that a shared definition such as DeleteOptions serves."""
    if isinstance(node, dict):
        return {
            key: _stripped(value)
            for key, value in node.items()
            if not (key == "description" and isinstance(value, str)) and key != "x-kubernetes-group-version-kind"
        }
    return [_stripped(item) for item in node] if isinstance(node, list) else node


def _generate(kubectl: str, protos: list[Path]) -> str:
    result: dict[str, Any] = {}
    for document, kinds in _DOCUMENTS.items():
        answer = subprocess.run(
            [kubectl, "get", "--raw", f"/openapi/v3/{document}"], capture_output=True, check=True, text=True
        )
        published = json.loads(answer.stdout)["components"]["schemas"]
        names = [name for name in published if name.rpartition(".")[2] in kinds]
        result |= reachable(names, _stripped(published))
    for name, numbers in _field_numbers(protos).items():
        for field, number in numbers.items():
            if field in result.get(name, {}).get("properties", {}):
                result[name]["properties"][field]["x-protobuf-field"] = number
    lines = [f"{json.dumps(name)}:{json.dumps(node, separators=(',', ':'))}" for name, node in sorted(result.items())]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _field_numbers(protos: list[Path]) -> dict[str, dict[str, int]]:
    """Numbers of the fields of all messages; `k8s.io.api.core.v1` is `io.k8s.api.core.v1` in OpenAPI."""
    messages: dict[str, dict[str, int]] = {}
    for proto in protos:
        package, message = "", ""
        for line in proto.read_text().splitlines():
            if match := re.match(r"package k8s\.io\.(\S+);", line):
                package = f"io.k8s.{match[1]}"
            elif match := re.match(r"message (\w+) \{", line):
                message = f"{package}.{match[1]}".replace("-", "_")
            elif match := re.match(r"  (?:optional |repeated |map<)[^=]*?(\w+) = (\d+);", line):
                messages.setdefault(message, {})[match[1]] = int(match[2])
    # The names of Go packages may hold dashes, which protobuf writes as underscores.
    return messages | {name.replace("_", "-"): numbers for name, numbers in messages.items()}


if __name__ == "__main__":
    sys.stdout.write(_generate(os.environ.get("KUBECTL", "kubectl"), [Path(name) for name in sys.argv[1:]]))
