"""Read manifests the way kubectl does, and remember the line of every field."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from finetune_api import API_VERSION, GROUP, KIND
from finetune_operator.schema import Path


class _KubernetesLoader(yaml.SafeLoader):
    """YAML as sigs.k8s.io/yaml reads it. PyYAML takes `5e-4` for a string, kubectl for a number; and dates stay text,
    since JSON has none."""


_KubernetesLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:timestamp",)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_KubernetesLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


class ManifestError(ValueError):
    """The text is no YAML. `line` counts from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True)
class Manifest:
    """One document of a file."""

    body: Any
    lines: dict[Path, int]
    """Line, from 1, of every field and list item."""

    @property
    def is_finetune_job(self) -> bool:
        """Whether it is meant to be one; `kind` may still be misspelt."""
        if not isinstance(self.body, dict):
            return False
        kind, version = str(self.body.get("kind")), str(self.body.get("apiVersion"))
        return kind.lower() == KIND.lower() or version.startswith(f"{GROUP}/")

    @property
    def type_problem(self) -> tuple[str, str] | None:
        """The field of the two that say the type that is wrong, and what is wrong with it."""
        for field, right in (("apiVersion", API_VERSION), ("kind", KIND)):
            if self.body.get(field) != right:
                return field, f"{field} is {self.body.get(field)!r}: write {right}"
        return None

    def line_of(self, path: Path) -> int:
        """The line of a field, or of the nearest field around it when it is absent."""
        while path not in self.lines:
            path = path[:-1]
        return self.lines[path]


def read(text: str) -> list[Manifest]:
    """All documents of a file; empty ones are left out.

    Raises:
        ManifestError: it is no YAML.
    """
    try:
        loader = _KubernetesLoader(text)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ManifestError(f"the character {chr(error.character)!r} is not allowed", line) from error
    try:
        manifests = []
        while loader.check_node():
            node = loader.get_node()
            if node is None:
                continue
            lines: dict[Path, int] = {}
            _note_lines(node, (), node.start_mark.line + 1, lines)
            body = loader.construct_document(node)
            if body is not None:
                manifests.append(Manifest(body, lines))
        return manifests
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ManifestError(str(error.problem or error.context), line) from error
    except RecursionError as error:
        raise ManifestError("it holds itself, or is nested too deeply", 1) from error
    finally:
        loader.dispose()


def _note_lines(node: yaml.Node, path: Path, line: int, lines: dict[Path, int]) -> None:
    lines[path] = line
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _note_lines(value, (*path, str(key.value)), key.start_mark.line + 1, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _note_lines(value, (*path, index), value.start_mark.line + 1, lines)
