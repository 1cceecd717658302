"""What clients ask first: which groups, versions and kinds there are, and what can be done with them."""

from __future__ import annotations

from typing import Any

from finetune_operator.local.apiserver.errors import path_not_found
from finetune_operator.local.apiserver.resources import Resource

VERSION = {
    "major": "1",
    "minor": "36",
    "gitVersion": "v1.36.0+finetune.local",
    "gitCommit": "",
    "gitTreeState": "clean",
    "buildDate": "1970-01-01T00:00:00Z",
    "goVersion": "none",
    "compiler": "none",
    "platform": "local",
}
"""The version of Kubernetes whose behaviour is copied; its build metadata says that it is not Kubernetes."""

# Kinds of the subresources that are an object of another kind, or that another method than get and patch serves.
_SUBRESOURCES: dict[str, dict[str, Any]] = {
    "status": {"verbs": ["get", "patch", "update"]},
    "log": {"verbs": ["get"]},
    "eviction": {"kind": "Eviction", "group": "policy", "version": "v1", "verbs": ["create"]},
    "binding": {"kind": "Binding", "verbs": ["create"]},
}


def api_versions() -> dict[str, Any]:
    """`/api`."""
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}


def groups(resources: list[Resource]) -> dict[str, Any]:
    """`/apis`."""
    found = {(resource.group, resource.version) for resource in resources if resource.group}
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(*item) for item in sorted(found)]}


def group(resources: list[Resource], name: str) -> dict[str, Any]:
    """`/apis/<group>`."""
    for resource in resources:
        if resource.group == name:
            return {"kind": "APIGroup", "apiVersion": "v1", **_group(name, resource.version)}
    raise path_not_found()


def _group(name: str, version: str) -> dict[str, Any]:
    entry = {"groupVersion": f"{name}/{version}", "version": version}
    return {"name": name, "versions": [entry], "preferredVersion": entry}


def kinds(resources: list[Resource], group: str, version: str) -> dict[str, Any]:
    """`/api/v1` and `/apis/<group>/<version>`."""
    entries = [
        entry
        for resource in resources
        if (resource.group, resource.version) == (group, version)
        for entry in (_kind(resource), *(_subresource(resource, name) for name in resource.subresources))
    ]
    if not entries:
        raise path_not_found()
    group_version = f"{group}/{version}" if group else version
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": entries}


def _kind(resource: Resource) -> dict[str, Any]:
    optional = {"shortNames": list(resource.short_names), "categories": list(resource.categories)}
    return {
        "name": resource.plural,
        "singularName": resource.singular,
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": list(resource.verbs),
        **{key: value for key, value in optional.items() if value},
    }


def _subresource(resource: Resource, name: str) -> dict[str, Any]:
    return {
        "name": f"{resource.plural}/{name}",
        "singularName": "",
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        **_SUBRESOURCES[name],
    }
