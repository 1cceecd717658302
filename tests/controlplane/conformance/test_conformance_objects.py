"""What requests on objects are answered with: status codes, reasons, messages, the shape of the bodies."""

from __future__ import annotations

from typing import Any

import pytest
from api_client import JSON_PATCH, MERGE, STRATEGIC, Client, eventually
from conftest import TestServer
from objects import manifest


@pytest.fixture
def client(server: TestServer) -> Client:
    return server.client


@pytest.fixture
def maps(namespace: str) -> str:
    return f"/api/v1/namespaces/{namespace}/configmaps"


@pytest.fixture
def tunes(namespace: str) -> str:
    return f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"


def config_map(name: str = "a", **more: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"k": "v"}, **more}


def test_create_fills_the_metadata(client: Client, maps: str, namespace: str) -> None:
    answer = client.create(maps, config_map())
    assert answer.code == 201
    metadata = answer.body["metadata"]
    assert metadata["namespace"] == namespace
    assert {"uid", "resourceVersion", "creationTimestamp"} <= metadata.keys()
    assert "generation" not in metadata
    assert client.get(f"{maps}/a").body == answer.body


def test_generate_name_appends_five_characters(client: Client, maps: str) -> None:
    name = client.create(maps, {"metadata": {"generateName": "run-"}}).body["metadata"]["name"]
    assert name.startswith("run-")
    assert len(name) == len("run-") + 5


def test_a_second_create_is_a_conflict(client: Client, maps: str) -> None:
    client.create(maps, config_map())
    answer = client.create(maps, config_map())
    assert answer.code == 409
    assert answer.body == {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": 'configmaps "a" already exists',
        "reason": "AlreadyExists",
        "details": {"name": "a", "kind": "configmaps"},
        "code": 409,
    }


def test_create_needs_the_namespace(client: Client) -> None:
    answer = client.create("/api/v1/namespaces/finetune-test-none/configmaps", config_map())
    assert answer.code == 404
    assert answer.message == 'namespaces "finetune-test-none" not found'


def test_create_refuses_another_namespace(client: Client, maps: str) -> None:
    answer = client.create(maps, config_map(metadata={"name": "a", "namespace": "other"}))
    assert answer.code == 400
    assert answer.message == "the namespace of the provided object does not match the namespace sent on the request"


def test_what_is_absent_is_404(client: Client, maps: str, tunes: str) -> None:
    for path, details in (
        (maps, {"name": "none", "kind": "configmaps"}),
        (tunes, {"name": "none", "group": "finetune.dev", "kind": "finetunejobs"}),
    ):
        for answer in (client.get(f"{path}/none"), client.delete(f"{path}/none"), client.patch(f"{path}/none", {})):
            assert (answer.code, answer.body["reason"]) == (404, "NotFound")
            assert answer.body["details"] == details


def test_wrong_types_do_not_decode(client: Client, maps: str) -> None:
    answer = client.create(maps, config_map(data={"k": 5}))
    assert (answer.code, answer.body["reason"]) == (400, "BadRequest")
    assert answer.message.startswith(
        'ConfigMap in version "v1" cannot be handled as a ConfigMap: json: cannot unmarshal number into Go struct '
        "field ConfigMap.data"
    )


@pytest.mark.parametrize("path", ["configmap", "finetunejob"])
def test_unknown_fields_are_refused_on_strict_create(client: Client, maps: str, tunes: str, path: str) -> None:
    if path == "configmap":
        answer = client.create(maps, config_map(metadata={"name": "a", "labls": 1}, extra=1), fieldValidation="Strict")
        unknown = 'unknown field "metadata.labls", unknown field "extra"'
        prefix = 'ConfigMap in version "v1" cannot be handled as a ConfigMap'
    else:
        body = manifest(dataset={"train": [{"uri": "s3://datasets/a.jsonl", "wait": 1}]}, foo=1)
        answer = client.create(tunes, body, fieldValidation="Strict")
        unknown = 'unknown field "spec.dataset.train[0].wait", unknown field "spec.foo"'
        prefix = 'FineTuneJob in version "v1alpha1" cannot be handled as a FineTuneJob'
    assert (answer.code, answer.body["reason"]) == (400, "BadRequest")
    assert answer.message == f"{prefix}: strict decoding error: {unknown}"


def test_unknown_fields_are_dropped_with_a_warning_by_default(client: Client, maps: str, tunes: str) -> None:
    answer = client.create(maps, config_map(extra=1))
    assert answer.code == 201
    assert "extra" not in answer.body
    assert answer.headers["Warning"] == '299 - "unknown field \\"extra\\""'
    answer = client.create(tunes, manifest(foo=1))
    assert answer.code == 201
    assert "foo" not in answer.body["spec"]
    assert answer.headers["Warning"] == '299 - "unknown field \\"spec.foo\\""'


def test_an_unknown_field_in_a_strict_patch_is_422(client: Client, tunes: str) -> None:
    client.create(tunes, manifest())
    answer = client.patch(f"{tunes}/support-bot", {"spec": {"foo": 1}}, fieldValidation="Strict")
    assert (answer.code, answer.body["reason"]) == (422, "Invalid")
    assert answer.message.startswith(' "" is invalid: patch: Invalid value: ')
    assert answer.message.endswith('strict decoding error: unknown field "spec.foo"')


def test_a_body_that_is_not_json(client: Client, maps: str) -> None:
    answer = client.create(maps, b'{"x"')
    assert (answer.code, answer.body["reason"]) == (400, "BadRequest")
    client.create(maps, config_map())
    answer = client.patch(f"{maps}/a", b'{"x"')
    assert (answer.code, answer.body["reason"]) == (400, "BadRequest")
    assert answer.message.startswith("error decoding patch: ")


def test_wrong_kind_and_wrong_version(client: Client, tunes: str) -> None:
    answer = client.create(tunes, {**manifest(), "kind": "Other"})
    assert answer.code == 422
    assert ("FieldValueInvalid", "kind", 'Invalid value: "Other": must be FineTuneJob') in answer.causes
    answer = client.create(tunes, {**manifest(), "apiVersion": "finetune.dev/v1"})
    assert answer.code == 400
    assert answer.message == (
        "the API version in the data (finetune.dev/v1) does not match the expected API version (finetune.dev/v1alpha1)"
    )


def test_dry_run_stores_nothing(client: Client, maps: str) -> None:
    answer = client.create(maps, config_map(), dryRun="All")
    assert answer.code == 201
    assert "uid" in answer.body["metadata"]
    assert "resourceVersion" not in answer.body["metadata"]
    assert client.get(f"{maps}/a").code == 404
    client.create(maps, config_map())
    assert client.patch(f"{maps}/a", {"data": {"k": "w"}}, dryRun="All").body["data"] == {"k": "w"}
    assert client.delete(f"{maps}/a", dryRun="All").code == 200
    assert client.get(f"{maps}/a").body["data"] == {"k": "v"}
    answer = client.create(maps, config_map("b"), dryRun="Some")
    assert answer.code == 422
    assert answer.causes == {
        ("FieldValueNotSupported", "dryRun", 'Unsupported value: ["Some"]: supported values: "All"'),
    }


def test_a_write_that_changes_nothing_is_no_write(client: Client, maps: str) -> None:
    version = client.create(maps, config_map()).body["metadata"]["resourceVersion"]
    answer = client.patch(f"{maps}/a", {"data": {"k": "v"}})
    assert answer.code == 200
    assert answer.body["metadata"]["resourceVersion"] == version


def test_merge_patch_removes_with_null(client: Client, maps: str) -> None:
    client.create(maps, config_map(data={"a": "1", "b": "2"}))
    answer = client.patch(f"{maps}/a", {"data": {"a": None, "c": "3"}})
    assert answer.body["data"] == {"b": "2", "c": "3"}


def test_json_patch(client: Client, maps: str) -> None:
    body = config_map(metadata={"name": "a", "annotations": {"example.com/b": "1"}})
    version = client.create(maps, body).body["metadata"]["resourceVersion"]
    patch = [
        {"op": "test", "path": "/metadata/resourceVersion", "value": version},
        {"op": "move", "from": "/metadata/annotations/example.com~1b", "path": "/data/c"},
        {"op": "add", "path": "/metadata/finalizers", "value": ["example.com/x"]},
        {"op": "add", "path": "/metadata/finalizers/-", "value": "example.com/y"},
    ]
    answer = client.patch(f"{maps}/a", patch, JSON_PATCH)
    assert answer.code == 200
    assert answer.body["data"] == {"k": "v", "c": "1"}
    assert answer.body["metadata"]["finalizers"] == ["example.com/x", "example.com/y"]
    client.patch(f"{maps}/a", {"metadata": {"finalizers": None}})


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "test", "path": "/metadata/resourceVersion", "value": "1"},
        {"op": "remove", "path": "/metadata/nothing"},
        {"op": "replace", "path": "/data/nothing/more", "value": "1"},
    ],
)
def test_a_json_patch_that_does_not_apply_is_422(client: Client, maps: str, operation: dict[str, Any]) -> None:
    client.create(maps, config_map())
    answer = client.patch(f"{maps}/a", [operation], JSON_PATCH)
    assert answer.code == 422
    assert answer.body["reason"] == "Invalid"
    assert answer.message == "the server rejected our request due to an error in our request"


def test_strategic_merge_knows_the_keys_of_built_in_lists(client: Client, namespace: str) -> None:
    services = f"/api/v1/namespaces/{namespace}/services"
    ports = [{"name": "a", "port": 80, "protocol": "TCP"}, {"name": "b", "port": 81, "protocol": "TCP"}]
    client.create(services, {"metadata": {"name": "s"}, "spec": {"clusterIP": "None", "ports": ports}})
    patch = {"spec": {"ports": [{"port": 81, "name": "c"}, {"port": 80, "$patch": "delete"}]}}
    answer = client.patch(f"{services}/s", patch, STRATEGIC)
    assert answer.code == 200
    assert [(port["name"], port["port"]) for port in answer.body["spec"]["ports"]] == [("c", 81)]


def test_strategic_merge_deletes_from_primitive_lists(client: Client, maps: str) -> None:
    client.create(maps, config_map(metadata={"name": "a", "finalizers": ["example.com/x", "example.com/y"]}))
    patch = {"metadata": {"$deleteFromPrimitiveList/finalizers": ["example.com/x"]}}
    answer = client.patch(f"{maps}/a", patch, STRATEGIC)
    assert answer.body["metadata"]["finalizers"] == ["example.com/y"]
    client.patch(f"{maps}/a", {"metadata": {"finalizers": None}})


def test_custom_kinds_have_no_strategic_merge(client: Client, tunes: str) -> None:
    client.create(tunes, manifest())
    for content_type in (STRATEGIC, "application/json"):
        answer = client.patch(f"{tunes}/support-bot", {"spec": {}}, content_type)
        assert (answer.code, answer.body["reason"]) == (415, "UnsupportedMediaType")
        assert answer.message.startswith(
            "the body of the request was in an unknown format - accepted media types include: "
            "application/json-patch+json, application/merge-patch+json"
        )


def test_a_stale_version_is_a_conflict(client: Client, maps: str, tunes: str) -> None:
    created = client.create(maps, config_map()).body
    client.patch(f"{maps}/a", {"data": {"k": "w"}})
    stale = client.request("PUT", f"{maps}/a", created)
    patched = client.patch(f"{maps}/a", {"metadata": {"resourceVersion": created["metadata"]["resourceVersion"]}})
    for answer in (stale, patched):
        assert (answer.code, answer.body["reason"]) == (409, "Conflict")
        assert answer.message == (
            'Operation cannot be fulfilled on configmaps "a": the object has been modified; please apply your changes '
            "to the latest version and try again"
        )
    client.create(tunes, manifest())
    answer = client.patch(f"{tunes}/support-bot", {"metadata": {"resourceVersion": "1"}})
    assert answer.body["details"] == {"name": "support-bot", "group": "finetune.dev", "kind": "finetunejobs"}


def test_put_without_a_version(client: Client, maps: str, tunes: str) -> None:
    client.create(maps, config_map())
    assert client.request("PUT", f"{maps}/a", config_map(data={"z": "1"})).body["data"] == {"z": "1"}
    client.create(tunes, manifest())
    answer = client.request("PUT", f"{tunes}/support-bot", manifest())
    assert answer.code == 422
    assert answer.causes == {
        ("FieldValueInvalid", "metadata.resourceVersion", "Invalid value: 0: must be specified for an update")
    }


def test_names_and_uids_cannot_be_changed(client: Client, maps: str) -> None:
    client.create(maps, config_map())
    answer = client.patch(f"{maps}/a", {"metadata": {"name": "b"}})
    assert answer.code == 400
    assert answer.message == "the name of the object (b) does not match the name on the URL (a)"
    answer = client.patch(f"{maps}/a", {"metadata": {"uid": "1"}})
    assert answer.code in (409, 422)
    answer = client.request("PUT", f"{maps}/a", config_map(metadata={"name": "a", "uid": "1"}))
    assert answer.code == 409
    assert "Precondition failed: UID in precondition: 1, UID in object meta: " in answer.message


def test_keys_of_config_maps(client: Client, maps: str) -> None:
    answer = client.create(maps, config_map(data={"a/b": "1"}))
    assert answer.code == 422
    ((reason, field, message),) = answer.causes
    assert (reason, field) == ("FieldValueInvalid", "data[a/b]")
    assert message.startswith('Invalid value: "a/b": a valid config key must consist of alphanumeric characters')


def test_immutable_config_maps(client: Client, maps: str) -> None:
    client.create(maps, config_map(immutable=True))
    answer = client.patch(f"{maps}/a", {"data": {"k": "w"}})
    assert answer.code == 422
    assert answer.message == 'ConfigMap "a" is invalid: data: Forbidden: field is immutable when `immutable` is set'
    assert client.patch(f"{maps}/a", {"immutable": False}).code == 422
    assert client.patch(f"{maps}/a", {"metadata": {"labels": {"a": "b"}}}).code == 200


def test_the_status_is_apart(client: Client, tunes: str) -> None:
    created = client.create(tunes, {**manifest(), "status": {"phase": "Running"}}).body
    assert "status" not in created
    assert created["metadata"]["generation"] == 1
    path = f"{tunes}/support-bot"
    assert "status" not in client.patch(path, {"status": {"phase": "Running"}}).body
    body = {"status": {"phase": "Running"}, "spec": {"suspend": True}, "metadata": {"labels": {"a": "b"}}}
    answer = client.patch(f"{path}/status", body)
    assert answer.code == 200
    assert answer.body["status"] == {"phase": "Running"}
    assert answer.body["spec"] == created["spec"]
    assert "labels" not in answer.body["metadata"]
    assert answer.body["metadata"]["generation"] == 1
    assert client.get(f"{path}/status").body == client.get(path).body


def test_generation_counts_changes_of_the_spec(client: Client, tunes: str) -> None:
    client.create(tunes, manifest())
    path = f"{tunes}/support-bot"
    assert client.patch(path, {"metadata": {"labels": {"a": "b"}}}).body["metadata"]["generation"] == 1
    assert client.patch(path, {"spec": {"failurePolicy": {"maxRestarts": 1}}}).body["metadata"]["generation"] == 2


def test_delete_answers_with_a_status(client: Client, tunes: str) -> None:
    uid = client.create(tunes, manifest()).body["metadata"]["uid"]
    answer = client.delete(f"{tunes}/support-bot")
    assert answer.code == 200
    assert answer.body == {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Success",
        "details": {"name": "support-bot", "group": "finetune.dev", "kind": "finetunejobs", "uid": uid},
    }


def test_delete_preconditions(client: Client, maps: str) -> None:
    uid = client.create(maps, config_map()).body["metadata"]["uid"]
    answer = client.delete(f"{maps}/a", {"preconditions": {"uid": "1"}})
    assert (answer.code, answer.body["reason"]) == (409, "Conflict")
    assert f"the UID in the precondition (1) does not match the UID in record ({uid})." in answer.message
    answer = client.delete(f"{maps}/a", {"preconditions": {"resourceVersion": "1"}})
    assert answer.code == 409
    assert client.delete(f"{maps}/a", {"preconditions": {"uid": uid}}).code == 200


def test_finalizers_hold_an_object(client: Client, tunes: str) -> None:
    body = manifest()
    body["metadata"]["finalizers"] = ["example.com/hold"]
    client.create(tunes, body)
    path = f"{tunes}/support-bot"
    answer = client.delete(path)
    assert answer.code == 200
    assert answer.body["kind"] == "FineTuneJob"
    metadata = answer.body["metadata"]
    assert metadata["deletionGracePeriodSeconds"] == 0
    assert metadata["generation"] == 2
    assert "deletionTimestamp" in metadata
    answer = client.patch(path, {"metadata": {"finalizers": ["example.com/hold", "example.com/more"]}})
    assert answer.code == 422
    assert answer.causes == {
        (
            "FieldValueForbidden",
            "metadata.finalizers",
            "Forbidden: no new finalizers can be added if the object is being deleted, found new finalizers "
            '[]string{"example.com/more"}',
        )
    }
    assert client.patch(path, {"metadata": {"finalizers": None}}).code == 200
    assert client.get(path).code == 404


def test_delete_collection_by_label(client: Client, maps: str) -> None:
    for name, label in (("a", "x"), ("b", "y"), ("c", "x")):
        client.create(maps, config_map(name, metadata={"name": name, "labels": {"test": label}}))
    answer = client.delete(maps, labelSelector="test=x")
    assert answer.code == 200
    assert sorted(item["metadata"]["name"] for item in answer.body["items"]) == ["a", "c"]
    left = client.get(maps, labelSelector="test").body["items"]
    assert [item["metadata"]["name"] for item in left] == ["b"]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("app=x", "ab"),
        ("app==x,tier=front", "a"),
        ("app!=x", "cd"),
        ("app in (x, y)", "abc"),
        ("app notin (x)", "cd"),
        ("tier", "ac"),
        ("!tier", "bd"),
        ("app,!tier", "b"),
    ],
)
def test_label_selectors(client: Client, maps: str, selector: str, expected: str) -> None:
    labels = {"a": {"app": "x", "tier": "front"}, "b": {"app": "x"}, "c": {"app": "y", "tier": "back"}, "d": {}}
    for name, own in labels.items():
        client.create(maps, config_map(name, metadata={"name": name, "labels": own}))
    items = client.get(maps, labelSelector=selector).body["items"]
    assert "".join(item["metadata"]["name"] for item in items if item["metadata"]["name"] in labels) == expected


def test_field_selectors(client: Client, maps: str, tunes: str) -> None:
    for name in ("a", "b"):
        client.create(maps, config_map(name))
        client.create(tunes, manifest(name))
    client.patch(f"{tunes}/b/status", {"status": {"phase": "Running"}})

    def names(path: str, selector: str) -> list[str]:
        return [item["metadata"]["name"] for item in client.get(path, fieldSelector=selector).body["items"]]

    assert names(maps, "metadata.name=b") == ["b"]
    assert names(tunes, "status.phase=Running") == ["b"]
    assert names(tunes, "status.phase!=Running,metadata.name!=c") == ["a"]
    answer = client.get(tunes, fieldSelector="status.restarts=1")
    assert (answer.code, answer.body["reason"]) == (400, "BadRequest")
    assert answer.message == "field label not supported: status.restarts"
    assert client.get(maps, labelSelector="a b").code == 400


def test_lists_come_in_pages(client: Client, maps: str) -> None:
    for name in "abcde":
        client.create(maps, config_map(name, metadata={"name": name, "labels": {"paged": "yes"}}))
    first = client.get(maps, limit=2, labelSelector="paged").body
    assert first["kind"] == "ConfigMapList"
    assert [item["metadata"]["name"] for item in first["items"]] == ["a", "b"]
    # Items of built-in kinds do not repeat what the list says.
    assert "kind" not in first["items"][0]
    names, token = [], first["metadata"]["continue"]
    while token:
        page = client.get(maps, limit=2, labelSelector="paged", **{"continue": token}).body
        assert page["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
        names += [item["metadata"]["name"] for item in page["items"]]
        token = page["metadata"].get("continue")
    assert names == ["c", "d", "e"]


def test_items_of_custom_kinds_say_what_they_are(client: Client, tunes: str) -> None:
    client.create(tunes, manifest())
    found = client.get(tunes).body
    assert found["kind"] == "FineTuneJobList"
    assert found["items"][0]["kind"] == "FineTuneJob"


def test_a_list_cannot_be_newer_than_the_server(client: Client, maps: str) -> None:
    answer = client.get(maps, resourceVersion="999999999999")
    assert (answer.code, answer.body["reason"]) == (504, "Timeout")
    assert answer.body["details"]["causes"] == [
        {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
    ]


def test_unknown_paths_are_404(client: Client) -> None:
    assert client.get("/api/v1/nonsense").code == 404
    assert client.get("/apis/nonsense.example.com/v1/things").code == 404
    assert client.get("/apis/finetune.dev/v1/finetunejobs").code == 404


def test_reviews_are_answered(client: Client) -> None:
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {"verb": "get", "resource": "pods"}},
    }
    answer = client.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
    assert answer.code == 201
    assert answer.body["status"]["allowed"] is True


def test_a_custom_kind_comes_and_goes(client: Client, namespace: str) -> None:
    group = f"{namespace}.example.com"
    definition = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"widgets.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"plural": "widgets", "kind": "Widget"},
            "versions": [
                {
                    "name": "v1",
                    "served": True,
                    "storage": True,
                    "schema": {
                        "openAPIV3Schema": {
                            "type": "object",
                            "properties": {
                                "spec": {
                                    "type": "object",
                                    "properties": {"size": {"type": "integer"}, "limit": {"type": "integer"}},
                                    "x-kubernetes-validations": [
                                        {"rule": "self.size <= self.limit", "message": "size may not exceed limit"}
                                    ],
                                }
                            },
                        }
                    },
                }
            ],
        },
    }
    crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    widgets = f"/apis/{group}/v1/namespaces/{namespace}/widgets"
    assert client.create(crds, definition).code == 201
    eventually(lambda: client.get(widgets).code == 200)
    widget = {"apiVersion": f"{group}/v1", "kind": "Widget", "metadata": {"name": "w"}, "spec": {"size": 1, "limit": 2}}
    assert eventually(lambda: client.create(widgets, widget).code in (201, 409))
    assert client.patch(f"{widgets}/w", {"spec": {"size": "big"}}, MERGE).code == 422
    answer = client.patch(f"{widgets}/w", {"spec": {"limit": None}})
    message = 'Invalid value: "object": no such key: limit evaluating rule: size may not exceed limit'
    assert answer.causes == {("FieldValueInvalid", "spec", message)}
    answer = client.patch(f"{widgets}/w", {"spec": {"size": 3}})
    assert answer.causes == {("FieldValueInvalid", "spec", "Invalid value: size may not exceed limit")}
    assert client.delete(f"{crds}/widgets.{group}").code == 200
    eventually(lambda: client.get(widgets).code == 404)
