"""The rules of the FineTuneJob CRD, as a server applies them: defaults, schema and CEL."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from api_client import Client
from conftest import TestServer
from objects import manifest

from finetune_api import crd
from finetune_api.spec import FORMAT_COLUMNS, Columns
from finetune_operator.schema import StructuralSchema

NOT_CHECKED = (
    "FieldValueInvalid",
    "<nil>",
    "Invalid value: null: some validation rules were not checked because the object was invalid; correct the existing "
    "errors to complete validation",
)
WHILE = "can be changed only while the job is suspended: set suspend to true first"
IMMUTABLE = "cannot be changed after the job was created: delete the job and create it anew"


@pytest.fixture
def client(server: TestServer) -> Client:
    return server.client


@pytest.fixture
def tunes(namespace: str) -> str:
    return f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"


def test_defaults_are_stored(client: Client, tunes: str) -> None:
    body = manifest(hyperparameters={}, method={"adapter": {"lora": {}}})
    spec = client.create(tunes, body).body["spec"]
    assert spec["hyperparameters"]["batchSize"] == 16
    assert spec["method"] == {
        "type": "SFT",
        "adapter": {"type": "QLoRA", "lora": {"rank": 16, "alpha": 32, "dropout": "0"}},
    }
    assert spec["failurePolicy"] == {"maxRestarts": 3, "backoffSeconds": 30, "rules": []}
    # A default is filled in only where its parent is there.
    assert "quantization" not in spec["method"]["adapter"]
    assert "columns" not in spec["dataset"]


def test_null_is_absent(client: Client, tunes: str) -> None:
    answer = client.create(tunes, manifest(hyperparameters=None))
    assert answer.body["spec"]["hyperparameters"]["batchSize"] == 16
    answer = client.create(tunes, manifest("other", model=None))
    assert answer.causes == {("FieldValueRequired", "spec.model", "Required value"), NOT_CHECKED}


STRUCTURE: list[tuple[str, dict[str, Any], set[tuple[str, str, str]]]] = [
    (
        "enum",
        {"method": {"type": "PPO"}},
        {
            (
                "FieldValueNotSupported",
                "spec.method.type",
                'Unsupported value: "PPO": supported values: "SFT", "DPO", "KTO"',
            ),
            NOT_CHECKED,
        },
    ),
    (
        "type",
        {"hyperparameters": {"batchSize": "abc"}},
        {
            (
                "FieldValueTypeInvalid",
                "spec.hyperparameters.batchSize",
                'Invalid value: "string": spec.hyperparameters.batchSize in body must be of type integer: "string"',
            ),
            NOT_CHECKED,
        },
    ),
    (
        "type of a list item",
        {"dataset": {"train": [{"uri": "s3://datasets/a.jsonl"}, {"uri": 5}]}},
        {
            (
                "FieldValueTypeInvalid",
                "spec.dataset.train[1].uri",
                'Invalid value: "integer": spec.dataset.train[1].uri in body must be of type string: "integer"',
            ),
            NOT_CHECKED,
        },
    ),
    (
        "type of a map value",
        {"scheduling": {"nodeSelector": {"a": 5}}},
        {
            (
                "FieldValueTypeInvalid",
                "spec.scheduling.nodeSelector.a",
                'Invalid value: "integer": spec.scheduling.nodeSelector.a in body must be of type string: "integer"',
            ),
            NOT_CHECKED,
        },
    ),
    (
        "required",
        {"dataset": {"train": [{}]}},
        {("FieldValueRequired", "spec.dataset.train[0].uri", "Required value"), NOT_CHECKED},
    ),
    (
        "minimum and pattern, which do not keep CEL from being evaluated",
        {
            "hyperparameters": {"batchSize": 0},
            "method": {"adapter": {"lora": {"targetModules": ["a b"]}}},
            "output": {"uri": "ftp://x"},
        },
        {
            (
                "FieldValueInvalid",
                "spec.hyperparameters.batchSize",
                "Invalid value: 0: spec.hyperparameters.batchSize in body should be greater than or equal to 1",
            ),
            (
                "FieldValueInvalid",
                "spec.method.adapter.lora.targetModules[0]",
                'Invalid value: "a b": spec.method.adapter.lora.targetModules[0] in body should match '
                "'^[A-Za-z0-9_.]+$'",
            ),
            (
                "FieldValueInvalid",
                "spec.output.uri",
                'Invalid value: "ftp://x": the URI must start with s3:// or file://, for example s3://models/support-bot',
            ),
        },
    ),
    (
        "maximum",
        {"method": {"adapter": {"lora": {"rank": 5000}}}},
        {
            (
                "FieldValueInvalid",
                "spec.method.adapter.lora.rank",
                "Invalid value: 5000: spec.method.adapter.lora.rank in body should be less than or equal to 1024",
            )
        },
    ),
    (
        "minItems",
        {"dataset": {"train": []}},
        {
            (
                "FieldValueInvalid",
                "spec.dataset.train",
                "Invalid value: 0: spec.dataset.train in body should have at least 1 items",
            )
        },
    ),
    (
        "maxItems",
        {"dataset": {"train": [{"uri": "s3://datasets/a.jsonl"}] * 65}},
        {("FieldValueTooMany", "spec.dataset.train", "Too many: 65: must have at most 64 items"), NOT_CHECKED},
    ),
    (
        "maxLength",
        {"output": {"uri": f"s3://models/{'a' * 1024}"}},
        {("FieldValueTooLong", "spec.output.uri", "Too long: may not be more than 1024 bytes"), NOT_CHECKED},
    ),
    (
        "set",
        {"output": {"uri": "s3://models/out", "artifacts": ["Merged", "Merged"]}},
        {("FieldValueDuplicate", "spec.output.artifacts[1]", 'Duplicate value: "Merged"')},
    ),
]


@pytest.mark.parametrize(("spec", "causes"), [case[1:] for case in STRUCTURE], ids=[case[0] for case in STRUCTURE])
def test_structure(client: Client, tunes: str, spec: dict[str, Any], causes: set[tuple[str, str, str]]) -> None:
    answer = client.create(tunes, manifest(**spec))
    assert (answer.code, answer.body["reason"]) == (422, "Invalid")
    assert answer.causes == causes
    assert answer.message.startswith('FineTuneJob.finetune.dev "support-bot" is invalid: ')
    assert answer.body["details"]["kind"] == "FineTuneJob"


TRAIN = {"train": [{"uri": "s3://datasets/a.jsonl"}]}
LORA = {"type": "LoRA"}


def at(field: str, value: Any) -> dict[str, Any]:
    """The spec that has a value at a field: `at("spec.a.b[0]", 1)` is {"a": {"b": [1]}}."""
    for step in reversed(steps(field)):
        if step.startswith("preferred"):
            value = [{"weight": 1, **item} for item in value]
        value = [value] if step.isdigit() else {step: value}
    result: dict[str, Any] = value
    return result


def steps(field: str) -> list[str]:
    return re.findall(r"[A-Za-z]+|\d+", field.removeprefix("spec").removeprefix("."))


def near(labels: dict[str, str] | None = None, key: str = "kubernetes.io/hostname") -> dict[str, Any]:
    """A term of a pod affinity."""
    return {"labelSelector": {"matchLabels": labels or {"app": "x"}}, "topologyKey": key}


def volume(**source: Any) -> dict[str, Any]:
    return {"podTemplate": {"volumes": [{"name": "a", **source}]}}


def mount(**fields: Any) -> dict[str, Any]:
    volumes = [{"name": "a", "emptyDir": {}}]
    return {"podTemplate": {"volumes": volumes, "volumeMounts": [{"name": "a", **fields}]}}


# Fields that are described once and are in several places.
PLACES = ("spec.scheduling", "spec.stages.prepare", "spec.stages.export")
TOLERATIONS = (
    {"key": "gpu", "operator": "Exists", "value": "yes"},
    {"value": "yes"},
    {"key": "gpu", "operator": "Exists", "tolerationSeconds": 5},
)
_REQUIRED, _PREFERRED = (f"{word}DuringSchedulingIgnoredDuringExecution" for word in ("required", "preferred"))
_AFFINITY = "spec.scheduling.affinity"
NODES = (
    f"{_AFFINITY}.nodeAffinity.{_REQUIRED}.nodeSelectorTerms[0]",
    f"{_AFFINITY}.nodeAffinity.{_PREFERRED}[0].preference",
)
NODE_LABELS = (
    {"key": "zone", "operator": "In"},
    {"key": "memory", "operator": "Gt", "values": ["much"]},
)
NEIGHBOURS = tuple(
    f"{_AFFINITY}.{kind}.{place}"
    for kind in ("podAffinity", "podAntiAffinity")
    for place in (f"{_REQUIRED}[0]", f"{_PREFERRED}[0].podAffinityTerm")
)

WRONG_COLUMNS = [
    {"format": str(name), "columns": {next(column for column in Columns.model_fields if column not in columns): "c"}}
    for name, columns in FORMAT_COLUMNS.items()
]
BAD_SOURCES: list[tuple[str, dict[str, Any]]] = [
    *((".uri", {"uri": uri}) for uri in ("s3://aaa/b", "s3://aaa/b.txt", "s3://aaa/b.parquet.gz", "s3://aaa*/b.jsonl")),
    ("", {"columns": {"text": "t"}}),
    ("", {"format": "Auto", "columns": {"text": "t"}}),
    *(("", wrong) for wrong in WRONG_COLUMNS),
    (".columns", {"format": "Preference", "columns": {"messages": "m", "prompt": "p"}}),
]

# For each rule of the CRD at least one spec that breaks it, and where the server says so.
BROKEN: list[tuple[str, dict[str, Any]]] = [
    ("spec.model.uri", {"model": {"uri": "ftp://x"}}),
    ("spec.model.uri", {"model": {"uri": "s3://models"}}),
    ("spec.model.uri", {"model": {"uri": "hf://just-a-name"}}),
    ("spec.dataset.train[1].uri", {"dataset": {"train": [*TRAIN["train"], {"uri": "ftp://x"}]}}),
    ("spec.dataset.train[0].uri", {"dataset": {"train": [{"uri": "s3://datasets"}]}}),
    ("spec.dataset.train[0].uri", {"dataset": {"train": [{"uri": "hf://datasets/x"}]}}),
    ("spec.dataset.validation[0].uri", {"dataset": {**TRAIN, "validation": [{"uri": "ftp://x"}]}}),
    ("spec.dataset.validation[0].uri", {"dataset": {**TRAIN, "validation": [{"uri": "s3://datasets"}]}}),
    ("spec.dataset.validation[0].uri", {"dataset": {**TRAIN, "validation": [{"uri": "hf://x/y"}]}}),
    *(
        (f"spec.dataset.{kind}[0]{field}", {"dataset": {**TRAIN, kind: [{**TRAIN["train"][0], **bad}]}})
        for kind in ("train", "validation")
        for field, bad in BAD_SOURCES
    ),
    *(
        ("spec.dataset.train[0].weight", {"dataset": {"train": [{**TRAIN["train"][0], "weight": bad}]}})
        for bad in ("0", "0.00", "-1", "100.5", "101", "1e1", "half", "01")
    ),
    ("spec.dataset", {"dataset": {**TRAIN, "validation": TRAIN["train"], "validationSplit": "0.1"}}),
    ("spec.dataset", {"dataset": {**TRAIN, "columns": {"text": "t"}}}),
    ("spec.dataset.validationSplit", {"dataset": {**TRAIN, "validationSplit": "1.5"}}),
    *(("spec.dataset", {"dataset": {**TRAIN, **wrong}}) for wrong in WRONG_COLUMNS),
    ("spec", {"dataset": {**TRAIN, "format": "Preference"}}),
    ("spec", {"dataset": {**TRAIN, "format": "Chat"}, "method": {"type": "DPO"}}),
    ("spec", {"dataset": {**TRAIN, "format": "Chat"}, "method": {"type": "KTO"}}),
    ("spec.dataset", {"dataset": {**TRAIN, "supervised": "All", "supervisedReasoning": "Disabled"}}),
    ("spec", {"dataset": {"train": [{**TRAIN["train"][0], "format": "Text"}]}, "method": {"type": "DPO"}}),
    (
        "spec",
        {"dataset": {**TRAIN, "validation": [{"uri": "s3://d/v.json", "format": "Text"}]}, "method": {"type": "DPO"}},
    ),
    *(
        ("spec", {"dataset": {**TRAIN, **setting}, "method": {"type": "DPO"}})
        for setting in ({"supervised": "All"}, {"supervisedReasoning": "Disabled"}, {"overlong": "Split"})
    ),
    (
        "spec.dataset.columns",
        {"dataset": {**TRAIN, "format": "Preference", "columns": {"messages": "m", "prompt": "p"}}},
    ),
    ("spec.method.adapter", {"method": {"adapter": {**LORA, "quantization": {}}}}),
    ("spec.method.adapter", {"method": {"adapter": {"type": "Full", "lora": {}}}}),
    ("spec.method.adapter.lora.dropout", {"method": {"adapter": {"lora": {"dropout": "2"}}}}),
    ("spec.method", {"method": {"dpo": {}}}),
    ("spec.method", {"method": {"type": "DPO", "adapter": {**LORA, "lora": {"dropout": "0.1"}}}}),
    ("spec.method", {"method": {"type": "KTO", "dpo": {}}}),
    ("spec.method", {"method": {"type": "DPO", "kto": {}}}),
    *(
        (f"spec.method.kto.{name}", {"method": {"type": "KTO", "kto": {name: bad}}})
        for name in ("beta", "desirableWeight", "undesirableWeight")
        for bad in ("0", "-1")
    ),
    ("spec.method.dpo", {"method": {"type": "DPO", "dpo": {"loss": "Robust"}}}),
    ("spec.method.dpo", {"method": {"type": "DPO", "dpo": {"labelSmoothing": "0.1"}}}),
    ("spec.method.dpo.beta", {"method": {"type": "DPO", "dpo": {"beta": "much"}}}),
    ("spec.method.dpo.beta", {"method": {"type": "DPO", "dpo": {"beta": "0.0"}}}),
    ("spec.method.dpo.labelSmoothing", {"method": {"type": "DPO", "dpo": {"loss": "Robust", "labelSmoothing": "0"}}}),
    ("spec.method.dpo.labelSmoothing", {"method": {"type": "DPO", "dpo": {"loss": "Robust", "labelSmoothing": "0.5"}}}),
    ("spec", {"method": {"type": "DPO"}, "dataset": {**TRAIN, "format": "Chat"}}),
    (
        "spec",
        {"method": {"adapter": {"type": "Full"}}, "output": {"uri": "s3://models/out", "artifacts": ["Adapter"]}},
    ),
    ("spec", {"model": {"uri": "s3://models/same"}, "output": {"uri": "s3://models/same"}}),
    ("spec", {"resources": {"gpusPerNode": 3}}),
    ("spec", {"resources": {"nodes": 3}}),
    ("spec", {"resources": {"gpusPerNode": 0, "nodes": 3}}),
    # Each of both divides 16.
    ("spec", {"resources": {"gpusPerNode": 8, "nodes": 4}}),
    ("spec", {"hyperparameters": {"batchSize": 4, "microBatchSize": 3}}),
    ("spec", {"hyperparameters": {"batchSize": 16, "microBatchSize": 4}, "resources": {"nodes": 8}}),
    ("spec.hyperparameters", {"hyperparameters": {"epochs": 1, "maxSteps": 2}}),
    ("spec.hyperparameters.learningRate", {"hyperparameters": {"learningRate": "fast"}}),
    ("spec.hyperparameters.warmupRatio", {"hyperparameters": {"warmupRatio": "1"}}),
    ("spec.hyperparameters.weightDecay", {"hyperparameters": {"weightDecay": "-1"}}),
    ("spec.hyperparameters.maxGradNorm", {"hyperparameters": {"maxGradNorm": "none"}}),
    ("spec.output.uri", {"output": {"uri": "hf://models/out"}}),
    ("spec.output.uri", {"output": {"uri": "s3://models"}}),
    ("spec.storage.endpoint", {"storage": {"endpoint": "minio:9000"}}),
    ("spec.storage.endpoint", {"storage": {"endpoint": "https://key:secret@minio:9000"}}),
    *((f"{where}.tolerations[0]", at(where, {"tolerations": [bad]})) for where in PLACES for bad in TOLERATIONS),
    *((f"{where}.nodeSelector", at(where, {"nodeSelector": {"a b": "c"}})) for where in PLACES),
    *(
        (f"{where}.matchExpressions[0]", at(where, {"matchExpressions": [bad]}))
        for where in NODES
        for bad in NODE_LABELS
    ),
    *(
        (f"{where}.matchExpressions[0].key", at(where, {"matchExpressions": [{"key": "a b", "operator": "Exists"}]}))
        for where in NODES
    ),
    *((f"{where}.labelSelector.matchLabels", at(where, near(labels={"a b": "c"}))) for where in NEIGHBOURS),
    *((f"{where}.topologyKey", at(where, near(key="host name"))) for where in NEIGHBOURS),
    ("spec.resources", {"resources": {"gpusPerNode": 2, "gpuResourceName": "nvidia.com/mig-3g.40gb"}}),
    ("spec.resources", {"resources": {"gpuAllocation": "ResourceClaims"}}),
    *(
        (where, at(where, {"storageClassName": "fast", "ephemeralStorage": "0"}))
        for where in ("spec.resources", "spec.stages.prepare", "spec.stages.export")
    ),
    ("spec.resources.resourceClaims[0]", {"resources": {"resourceClaims": [{"name": "gpus"}]}}),
    ("spec", {"resources": {"gpusPerNode": 0}, "scheduling": {"gpuTypes": ["NVIDIA-H200"]}}),
    ("spec.scheduling", {"scheduling": {"topology": {"mode": "Unconstrained"}}}),
    ("spec.scheduling", {"scheduling": {"workloadPriorityClassName": "urgent"}}),
    ("spec.scheduling.topology", {"scheduling": {"queueName": "q", "topology": {"mode": "Required"}}}),
    (
        "spec.scheduling.topology",
        {"scheduling": {"queueName": "q", "topology": {"mode": "Unconstrained", "level": "x"}}},
    ),
    *((f"spec.podTemplate.{kind}", {"podTemplate": {kind: {"a b": "c"}}}) for kind in ("labels", "annotations")),
    ("spec.podTemplate.labels", {"podTemplate": {"labels": {"finetune.dev/stage": "x"}}}),
    ("spec.podTemplate.labels", {"podTemplate": {"labels": {"job-name": "x"}}}),
    ("spec.podTemplate.annotations", {"podTemplate": {"annotations": {"kubernetes.io/x": "y"}}}),
    ("spec.podTemplate.image", {"podTemplate": {"image": "not an image"}}),
    ("spec.podTemplate.env[0]", {"podTemplate": {"env": [{"name": "A"}]}}),
    ("spec.podTemplate.env[0].name", {"podTemplate": {"env": [{"name": "WORLD_SIZE", "value": "1"}]}}),
    ("spec.podTemplate.env[0].valueFrom", {"podTemplate": {"env": [{"name": "A", "valueFrom": {}}]}}),
    (
        "spec.podTemplate.env[0].valueFrom.fieldRef.fieldPath",
        {"podTemplate": {"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.containers"}}}]}},
    ),
    ("spec.podTemplate.volumes[0]", {"podTemplate": {"volumes": [{"name": "a"}]}}),
    ("spec.podTemplate.volumes[0].name", {"podTemplate": {"volumes": [{"name": "work", "emptyDir": {}}]}}),
    (
        "spec.podTemplate.volumes[0].configMap.items[0].path",
        volume(configMap={"name": "a", "items": [{"key": "b", "path": "/c"}]}),
    ),
    (
        "spec.podTemplate.volumes[0].secret.items[0].path",
        volume(secret={"secretName": "a", "items": [{"key": "b", "path": "../c"}]}),
    ),
    ("spec.podTemplate.volumes[0].projected.sources[0]", volume(projected={"sources": [{}]})),
    *(
        (
            f"spec.podTemplate.volumes[0].projected.sources[0].{kind}.items[0].path",
            volume(projected={"sources": [{kind: {"name": "a", "items": [{"key": "b", "path": "c/../.."}]}}]}),
        )
        for kind in ("configMap", "secret")
    ),
    (
        "spec.podTemplate.volumes[0].projected.sources[0].serviceAccountToken.path",
        volume(projected={"sources": [{"serviceAccountToken": {"audience": "sts.example.com", "path": "/token"}}]}),
    ),
    ("spec.podTemplate", {"podTemplate": {"volumeMounts": [{"name": "a", "mountPath": "/mnt/a"}]}}),
    ("spec.podTemplate.volumeMounts[0].mountPath", mount(mountPath="mnt/a")),
    ("spec.podTemplate.volumeMounts[0].mountPath", mount(mountPath="/work/cache")),
    ("spec.podTemplate.volumeMounts[0].subPath", mount(mountPath="/mnt/a", subPath="../b")),
    ("spec.podTemplate.securityContext.runAsUser", {"podTemplate": {"securityContext": {"runAsUser": 0}}}),
    ("spec.storage.caBundle", {"storage": {"caBundle": {}}}),
    ("spec.storage.workURI", {"storage": {"workURI": "ftp://x"}}),
    ("spec.storage.workURI", {"storage": {"workURI": "s3://work"}}),
]
CRD = crd.load()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def rules_of(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, str, str]]:
    """Path, rule and message of every rule; a list item's path has [] in it."""
    for rule in node.get("x-kubernetes-validations", ()):
        yield path, rule["rule"], rule["message"]
    for name, child in node.get("properties", {}).items():
        yield from rules_of(child, f"{path}.{name}".removeprefix("."))
    if "items" in node:
        yield from rules_of(node["items"], f"{path}[]")


def causes_of_rules(causes: set[tuple[str, str, str]]) -> set[tuple[str, str]]:
    """Those causes that are rules of the CRD: path without indexes, and message."""
    known = {(path or "<nil>", message) for path, _, message in rules_of(CRD)}
    found = {(re.sub(r"\[\d+\]", "[]", field), message) for _, field, message in causes}
    return {
        (path, text) for path, text in known for field, message in found if field == path and message.endswith(text)
    }


@pytest.mark.parametrize(("field", "spec"), BROKEN, ids=[f"{field} {spec}"[:60] for field, spec in BROKEN])
def test_cel(client: Client, tunes: str, field: str, spec: dict[str, Any]) -> None:
    answer = client.create(tunes, manifest(**spec))
    assert (answer.code, answer.body["reason"]) == (422, "Invalid")
    path = re.sub(r"\[\d+\]", "[]", field)
    assert path in {found for found, _ in causes_of_rules(answer.causes)}
    messages = [message for _, where, message in answer.causes if where == field]
    # A scalar is shown with the message, an object or a list is not.
    value = functools.reduce(lambda node, step: node[int(step) if step.isdigit() else step], steps(field), spec)
    shown = "" if isinstance(value, dict) else f"{json.dumps(value)}: "
    assert all(message.startswith(f"Invalid value: {shown}") for message in messages)


def test_every_rule_has_a_case() -> None:
    """A rule that no case breaks would be untested on both servers."""
    engine = StructuralSchema(CRD)
    broken = set()
    for _, spec in BROKEN:
        errors = engine.validate(engine.defaulted(manifest(**spec)))
        broken |= causes_of_rules({(error.type.value, error.field, error.message) for error in errors})
    under_spec = {
        (path, message) for path, rule, message in rules_of(CRD) if path.startswith("spec") and "oldSelf" not in rule
    }
    assert under_spec - broken == set()


@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("1st-job", "metadata.name must start with a letter and hold only a-z, 0-9 and '-'"),
        ("support.bot", "metadata.name must start with a letter and hold only a-z, 0-9 and '-'"),
        ("a" * 41, "metadata.name may have at most 40 characters"),
    ],
)
def test_names(client: Client, tunes: str, name: str, beginning: str) -> None:
    (message,) = [message for path, _, message in rules_of(CRD) if not path and message.startswith(beginning)]
    answer = client.create(tunes, manifest(name))
    assert answer.code == 422
    assert answer.causes == {("FieldValueInvalid", "<nil>", f"Invalid value: {message}")}
    assert answer.message == f'FineTuneJob.finetune.dev "{name}" is invalid: <nil>: Invalid value: {message}'


def test_names_that_no_object_may_have(client: Client, tunes: str) -> None:
    answer = client.create(tunes, manifest("A_b"))
    assert answer.code == 422
    assert any(
        field == "metadata.name" and "a lowercase RFC 1123 subdomain must consist of" in message
        for _, field, message in answer.causes
    )
    body = manifest()
    del body["metadata"]["name"]
    answer = client.create(tunes, body)
    required = ("FieldValueRequired", "metadata.name", "Required value: name or generateName is required")
    assert required in answer.causes


NEVER: list[dict[str, Any]] = [
    {"model": {"uri": "s3://models/other"}},
    {"dataset": {"train": [{"uri": "s3://datasets/other.jsonl"}]}},
    {"method": {"adapter": {"type": "LoRA"}}},
    {"hyperparameters": {"seed": 1}},
    {"evaluation": {"everySteps": 5}},
    {"output": {"uri": "s3://models/other"}},
]
WHILE_SUSPENDED: list[dict[str, Any]] = [
    {"checkpoint": {"keepLast": 5}},
    {"resources": {"gpusPerNode": 2}},
    {"resources": {"nodes": 2}},
    {"stages": {"export": {"cpu": "2"}}},
    {"scheduling": {"nodeSelector": {"a": "b"}}},
    {"podTemplate": {"labels": {"team": "blue"}}},
    {"storage": {"region": "eu-west-1"}},
]


def name_of(change: dict[str, Any]) -> str:
    return next(iter(change))


@pytest.mark.parametrize("suspended", [False, True])
@pytest.mark.parametrize("change", NEVER, ids=name_of)
def test_what_can_never_be_changed(client: Client, tunes: str, change: dict[str, Any], suspended: bool) -> None:
    client.create(tunes, manifest(suspend=suspended))
    answer = client.patch(f"{tunes}/support-bot", {"spec": change})
    assert answer.code == 422
    assert answer.causes == {("FieldValueInvalid", "spec", f"Invalid value: {name_of(change)} {IMMUTABLE}")}


@pytest.mark.parametrize("change", WHILE_SUSPENDED, ids=name_of)
def test_what_can_be_changed_only_while_the_job_is_suspended(
    client: Client, tunes: str, change: dict[str, Any]
) -> None:
    client.create(tunes, manifest())
    answer = client.patch(f"{tunes}/support-bot", {"spec": change})
    assert answer.code == 422
    assert answer.causes == {("FieldValueInvalid", "spec", f"Invalid value: {name_of(change)} {WHILE}")}
    # Suspending it and changing it are two steps: its pods read what they were started with.
    assert client.patch(f"{tunes}/support-bot", {"spec": {**change, "suspend": True}}).code == 422
    assert client.patch(f"{tunes}/support-bot", {"spec": {"suspend": True}}).code == 200
    assert client.patch(f"{tunes}/support-bot", {"spec": {**change, "suspend": False}}).code == 200


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"workURI": "s3://models/work"}),
        ({"workURI": "s3://models/work"}, {"workURI": "s3://models/other"}),
        ({"workURI": "s3://models/work"}, {"workURI": None}),
    ],
)
def test_the_folder_of_work_files_never_moves(
    client: Client, tunes: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    client.create(tunes, manifest(storage=before, suspend=True))
    answer = client.patch(f"{tunes}/support-bot", {"spec": {"storage": after}})
    assert answer.code == 422
    assert all("storage.workURI cannot be changed" in message for _, _, message in answer.causes)


def test_every_transition_rule_has_a_case() -> None:
    rules = [rule for _, rule, _ in rules_of(CRD) if "oldSelf" in rule and "workURI" not in rule]
    fields = {rule.removeprefix("self.").split(" ")[0] for rule in rules}
    assert fields == {name_of(change) for change in [*NEVER, *WHILE_SUSPENDED]}


@pytest.mark.parametrize(
    "change",
    [
        {"failurePolicy": {"maxRestarts": 0}},
        {"activeDeadlineSeconds": 60},
        {"preRunningDeadlineSeconds": 60},
        {"ttlSecondsAfterFinished": 60},
        {"ttlSecondsAfterFailed": 60},
        {"suspend": True},
    ],
    ids=name_of,
)
def test_what_can_always_be_changed(client: Client, tunes: str, change: dict[str, Any]) -> None:
    client.create(tunes, manifest())
    answer = client.patch(f"{tunes}/support-bot", {"spec": change})
    assert answer.code == 200
    name = name_of(change)
    if isinstance(change[name], dict):
        assert answer.body["spec"][name].items() >= change[name].items()
    else:
        assert answer.body["spec"][name] == change[name]


def test_sets_are_compared_without_order(client: Client, tunes: str) -> None:
    client.create(tunes, manifest(output={"uri": "s3://models/out", "artifacts": ["Merged", "Adapter"]}))
    answer = client.patch(f"{tunes}/support-bot", {"spec": {"output": {"artifacts": ["Adapter", "Merged"]}}})
    assert answer.code == 200
    assert answer.body["spec"]["output"]["artifacts"] == ["Adapter", "Merged"]


def test_the_status_is_validated(client: Client, tunes: str) -> None:
    client.create(tunes, manifest())
    path = f"{tunes}/support-bot/status"
    answer = client.patch(path, {"status": {"phase": "Nope"}})
    assert answer.code == 422
    (reason, message) = next((r, m) for r, field, m in answer.causes if field == "status.phase")
    assert reason == "FieldValueNotSupported"
    assert message.startswith('Unsupported value: "Nope": supported values: "Pending", ')
    condition = {
        "type": "Complete",
        "status": "True",
        "reason": "Done",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    answer = client.patch(path, {"status": {"conditions": [{**condition, "lastTransitionTime": "yesterday"}]}})
    assert answer.code == 422
    assert {(reason, field) for reason, field, _ in answer.causes} == {
        ("FieldValueTypeInvalid", "status.conditions[0].lastTransitionTime"),
        NOT_CHECKED[:2],
    }
    answer = client.patch(path, {"status": {"conditions": [condition, condition]}})
    assert answer.causes == {
        ("FieldValueDuplicate", "status.conditions[1]", 'Duplicate value: {"type":"Complete"}'),
    }
    assert client.patch(path, {"status": {"conditions": [condition]}}).code == 200
