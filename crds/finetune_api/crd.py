"""Generate `crds/finetunejobs.yaml` from the typed models: `python -m finetune_api.crd > crds/finetunejobs.yaml`.

pydantic writes JSON Schema with references and `anyOf` for optional fields; Kubernetes wants a structural schema:
everything inlined, one type for each node, no titles. Absent is said by leaving a field out, so that null never
appears.
"""

from __future__ import annotations

import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from finetune_api import GROUP, KIND, PLURAL, SHORT_NAME, SINGULAR, VERSION
from finetune_api.spec import NAME_RULES, FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus

FILE_NAME = "finetunejobs.yaml"

PRINTER_COLUMNS = [
    ("Phase", "string", ".status.phase", "Derived from the conditions, for people", 0),
    ("Reason", "string", ".status.reason", "Why it is in this phase, in one word", 0),
    ("Method", "string", ".spec.method.adapter.type", "What is trained", 0),
    ("Progress", "string", ".status.progress.percent", "Share of the steps that are done", 0),
    ("ETA", "string", ".status.progress.eta", "Time to the last step", 0),
    ("Loss", "string", ".status.progress.loss", "Training loss of the last logged step", 0),
    ("Restarts", "integer", ".status.restarts.charged", "Restarts after failures; preemptions are not counted", 0),
    ("Age", "date", ".metadata.creationTimestamp", "Time since the job was created", 0),
    ("Preemptions", "integer", ".status.restarts.preemptions", "Restarts that were the cluster's doing", 1),
    ("Queued", "integer", ".status.queue.position", "Place in its queue; 1 is next", 1),
    ("Step", "integer", ".status.progress.currentStep", "Optimiser steps done", 1),
    ("Perplexity", "string", ".status.evaluation.tuned.perplexity", "Of the tuned model on the validation rows", 1),
    ("Output", "string", ".spec.output.uri", "Where the tuned model goes", 1),
]

_KEPT = {
    "type",
    "format",
    "description",
    "enum",
    "pattern",
    "default",
    "required",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
}


def build() -> dict[str, Any]:
    """The CustomResourceDefinition as a plain dictionary."""
    schema = {
        "type": "object",
        "description": "A fine-tuning job: one manifest in, a tuned, merged, verified model in storage out.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": "Version of the API, finetune.dev/v1alpha1."},
            "kind": {"type": "string", "description": "FineTuneJob."},
            "metadata": {"type": "object"},
            "spec": structural_schema(FineTuneJobSpec.model_json_schema(by_alias=True)),
            "status": structural_schema(FineTuneJobStatus.model_json_schema(by_alias=True), defaults=False),
        },
        "x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in NAME_RULES],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": SINGULAR,
                "shortNames": [SHORT_NAME],
                "categories": ["ai"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "selectableFields": [{"jsonPath": ".status.phase"}],
                    "additionalPrinterColumns": [
                        {"name": name, "type": kind, "jsonPath": path, "description": description}
                        | ({"priority": priority} if priority else {})
                        for name, kind, path, description, priority in PRINTER_COLUMNS
                    ],
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }


def structural_schema(schema: dict[str, Any], *, defaults: bool = True) -> dict[str, Any]:
    """Turn the JSON Schema of a model into a Kubernetes structural schema."""
    definitions = schema.get("$defs", {})

    def convert(node: dict[str, Any]) -> dict[str, Any]:
        node = _merged(node, definitions)
        result = {key: value for key, value in node.items() if key in _KEPT or key.startswith("x-kubernetes-")}
        if "const" in node:
            result["enum"] = [node["const"]]
        if not defaults:
            result.pop("default", None)
        if "description" in result:
            result["description"] = " ".join(result["description"].split())
        if "properties" in node:
            result["properties"] = {name: convert(child) for name, child in node["properties"].items()}
        if "items" in node:
            result["items"] = convert(node["items"])
        if isinstance(node.get("additionalProperties"), dict):
            result["additionalProperties"] = convert(node["additionalProperties"])
        if result.get("default") is not None and result["type"] == "object":
            # Kubernetes fills the defaults of the fields of a defaulted object, so that {} says it all; but it asks the
            # rules of an object about its default before that.
            rules = "x-kubernetes-validations" in result
            result["default"] = _given(result["default"]) if rules else {}
        return result

    return convert(schema)


def _given(value: Any) -> Any:
    """A default without what is absent in it."""
    if isinstance(value, dict):
        return {key: _given(inner) for key, inner in value.items() if inner is not None}
    return value


def _merged(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference, and unwrap `anyOf: [X, null]`; what is said beside it wins (the field's own description)."""
    node = dict(node)
    if "anyOf" in node:
        (inner,) = [option for option in node.pop("anyOf") if option.get("type") != "null"]
        node = {**_merged(inner, definitions), **node}
        if node.get("default", ...) is None:
            node.pop("default")
    if "$ref" in node:
        target = definitions[node.pop("$ref").removeprefix("#/$defs/")]
        node = {**_merged(target, definitions), **node}
    return node


def load() -> dict[str, Any]:
    """The generated CRD file: from the installed package, or from the source tree beside it."""
    import yaml

    packaged = resources.files("finetune_api") / FILE_NAME
    source = Path(__file__).parent.parent / FILE_NAME
    text = packaged.read_text() if packaged.is_file() else source.read_text()
    crd: dict[str, Any] = yaml.safe_load(text)
    return crd


def render() -> str:
    """The text of the generated file."""
    import yaml

    header = "# Generated from crds/finetune_api by `make crds`. Do not edit.\n"
    # Through JSON: enums and shared sub-objects become plain values, so that YAML has no tags or anchors.
    plain = json.loads(json.dumps(build()))
    return header + yaml.safe_dump(plain, sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    sys.stdout.write(render())
