"""The chart, rendered by the real helm, without a cluster."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "finetune-operator"
RELEASE = "tuner"
NAMESPACE = "tuner-system"
POD = "tuner-5f7d9c-x2x4z"
EXAMPLES = sorted((CHART / "ci").glob("*-values.yaml"))

Values = dict[str, Any]
Object = dict[str, Any]


class HelmError(Exception):
    """What helm wrote before it gave up."""


def find_helm() -> str | None:
    named = os.environ.get("FINETUNE_HELM")
    local = ROOT / ".tools" / "bin" / "helm"
    return named or (str(local) if local.exists() else shutil.which("helm"))


def helm(*arguments: str, values: Values | None = None) -> str:
    """Run helm with values on its standard input.

    Raises:
        HelmError: helm failed.
    """
    command = [find_helm() or "helm", *arguments, "--values", "-"]
    done = subprocess.run(
        command, input=yaml.safe_dump(values or {}), capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        raise HelmError(done.stdout + done.stderr)
    return done.stdout


def render(values: Values | None = None, *options: str) -> list[Object]:
    """All objects of the release."""
    text = helm("template", RELEASE, str(CHART), "--namespace", NAMESPACE, *options, values=values)
    return [document for document in yaml.load_all(text, Loader=yaml.CSafeLoader) if document]


@cache
def _rendered_example(path: Path) -> list[Object]:
    return render(load(path))


def rendered_example(name: str) -> list[Object]:
    """The objects of one of the chart's examples of values: default, everything or namespaced."""
    return deepcopy(_rendered_example(CHART / "ci" / f"{name}-values.yaml"))


def load(path: Path) -> Any:
    return yaml.load(path.read_text(), Loader=yaml.CSafeLoader)


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [item for item in objects if item["kind"] == kind]


def the(objects: list[Object], kind: str, name: str | None = None) -> Object:
    """The one object of a kind, or of a kind and a name."""
    (found,) = [item for item in of_kind(objects, kind) if name in (None, item["metadata"]["name"])]
    return found


def pod_template(objects: list[Object]) -> Object:
    template: Object = the(objects, "Deployment")["spec"]["template"]
    return template


def operator_container(objects: list[Object]) -> Object:
    (container,) = pod_template(objects)["spec"]["containers"]
    return container


def operator_environment(objects: list[Object]) -> dict[str, str]:
    """The operator's settings as its process sees them, with what the kubelet fills in."""
    pod = {"metadata.namespace": NAMESPACE, "metadata.name": POD}
    variables = operator_container(objects)["env"]
    return {
        item["name"]: item["value"] if "value" in item else pod[item["valueFrom"]["fieldRef"]["fieldPath"]]
        for item in variables
        if item["name"].startswith("FINETUNE_")
    }


def documented_values() -> dict[str, tuple[Any, str]]:
    """Each documented value of values.yaml, by its path: its default and its description."""
    found: dict[str, tuple[Any, str]] = {}
    defaults = load(CHART / "values.yaml")
    path: list[str] = []
    comment: list[str] = []
    for line in (CHART / "values.yaml").read_text().splitlines():
        if match := re.match(r" *# (-- )?(.*)", line):
            comment = [match[2]] if match[1] else [*comment, match[2]] if comment else []
        elif match := re.match(r"( *)([A-Za-z0-9]+):", line):
            path = [*path[: len(match[1]) // 2], match[2]]
            if comment:
                found[".".join(path)] = (at(defaults, ".".join(path)), " ".join(comment))
                comment = []
    return found


def leaves(values: Values, prefix: str = "") -> Iterator[str]:
    """Paths of all values that are not maps themselves; an empty map is a value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def at(values: Values, path: str) -> Any:
    value: Any = values
    for key in path.split("."):
        value = value[key]
    return value


def changed(values: Values, path: str, value: Any) -> Values:
    """A copy with another value at a path."""
    copy = deepcopy(values)
    *parents, last = path.split(".")
    node = copy
    for key in parents:
        node = node.setdefault(key, {})
    node[last] = value
    return copy
