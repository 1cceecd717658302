"""`/openapi/v3`: one document for each group and version, from which kubectl validates, merges and explains."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from finetune_operator.local.apiserver import definitions
from finetune_operator.local.apiserver.errors import path_not_found
from finetune_operator.local.apiserver.resources import Resource

_PREFIX = "#/components/schemas/"
_ANY = {"application/json": {"schema": {"type": "object"}}}
# kubectl looks for this parameter to know that the server validates; without it kubectl would have to.
_WRITE_PARAMETERS = [
    {"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": True}}
    for name in ("dryRun", "fieldManager", "fieldValidation")
]


def index(resources: list[Resource]) -> dict[str, Any]:
    """`/openapi/v3`: the documents, each with a hash that changes when it does."""
    paths = sorted({_path(resource) for resource in resources})
    return {"paths": {path: {"serverRelativeURL": _url(path, resources)} for path in paths}}


def _url(path: str, resources: list[Resource]) -> str:
    text = json.dumps(document(resources, path), sort_keys=True)
    return f"/openapi/v3/{path}?hash={hashlib.sha256(text.encode()).hexdigest()}"


def document(resources: list[Resource], path: str) -> dict[str, Any]:
    """`/openapi/v3/apis/<group>/<version>`."""
    served = [resource for resource in resources if _path(resource) == path]
    if not served:
        raise path_not_found()
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    for resource in served:
        name, needed = _schemas(resource)
        schemas |= needed
        schemas[name] = {**schemas[name], "x-kubernetes-group-version-kind": [_gvk(resource)]}
        paths |= _operations(resource, name)
    return {
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "local"},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _path(resource: Resource) -> str:
    return f"apis/{resource.api_version}" if resource.group else f"api/{resource.version}"


def _gvk(resource: Resource) -> dict[str, str]:
    return {"group": resource.group, "version": resource.version, "kind": resource.kind}


def _schemas(resource: Resource) -> tuple[str, dict[str, Any]]:
    """The name of the kind's own schema, and all that it needs."""
    if not resource.is_custom:
        suffix = f".{resource.version}.{resource.kind}"
        (name,) = [name for name in definitions.load() if name.endswith(suffix) and _is_of(name, resource)]
        return name, definitions.reachable([name], definitions.load())
    name = ".".join([*reversed(resource.group.split(".")), resource.version, resource.kind])
    metadata = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
    schema = dict(resource.schema.at(()))
    schema["properties"] = {**schema.get("properties", {}), "metadata": {"allOf": [{"$ref": _PREFIX + metadata}]}}
    return name, {name: schema, **definitions.reachable([metadata], definitions.load())}


def _is_of(name: str, resource: Resource) -> bool:
    package = name.split(".")[-3]
    return package == (resource.group.split(".")[0] or "core")


def _operations(resource: Resource, schema: str) -> dict[str, Any]:
    scope = "namespaces/{namespace}/" if resource.namespaced else ""
    collection = f"/{_path(resource)}/{scope}{resource.plural}"
    content = {"application/json": {"schema": {"$ref": _PREFIX + schema}}}

    def operation(action: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        about: dict[str, Any] = {
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": _gvk(resource),
            "responses": {"200": {"description": "OK", "content": content}},
        }
        if body is not None:
            about |= {"parameters": _WRITE_PARAMETERS, "requestBody": {"content": body, "required": True}}
        return about

    paths = {collection: {"post": operation("post", content)}}
    if "get" in resource.verbs:
        paths[collection]["get"] = operation("list")
        paths[collection + "/{name}"] = {
            "get": operation("get"),
            "put": operation("put", content),
            "patch": operation("patch", {kind: {"schema": {"type": "object"}} for kind in resource.patch_types}),
            "delete": operation("delete", _ANY),
        }
    return paths
