"""The three kinds of patch that Kubernetes knows. All return a new object and leave the old one alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from finetune_operator.schema import StructuralSchema


class PatchError(Exception):
    """A JSON patch that does not apply."""


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386: objects are merged, null removes, everything else replaces."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def json_patch(target: Any, operations: Any) -> Any:
    """RFC 6902."""
    if not isinstance(operations, list):
        raise PatchError("a JSON patch is a list of operations")
    result = copy.deepcopy(target)
    for operation in operations:
        try:
            result = _operate(result, operation)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise PatchError(f"{operation!r} does not apply: {error}") from error
    return result


def _operate(document: Any, operation: Mapping[str, Any]) -> Any:
    path = _pointer(operation["path"])
    match operation["op"]:
        case "add":
            return _add(document, path, operation["value"])
        case "remove":
            return _remove(document, path)
        case "replace":
            _get(document, path)
            return _replace(document, path, operation["value"])
        case "move":
            source = _pointer(operation["from"])
            value = _get(document, source)
            return _add(_remove(document, source), path, value)
        case "copy":
            return _add(document, path, copy.deepcopy(_get(document, _pointer(operation["from"]))))
        case "test":
            if _get(document, path) != operation["value"]:
                raise PatchError(f"testing value {operation['path']} failed")
            return document
    raise PatchError(f"unexpected kind: {operation['op']}")


def _pointer(text: str) -> list[str]:
    if text and not text.startswith("/"):
        raise PatchError(f"{text!r} is not a JSON pointer")
    return [step.replace("~1", "/").replace("~0", "~") for step in text.split("/")[1:]]


def _index(step: str, size: int) -> int:
    index = int(step)
    if not 0 <= index < size:
        raise IndexError(step)
    return index


def _get(document: Any, path: list[str]) -> Any:
    for step in path:
        document = document[_index(step, len(document))] if isinstance(document, list) else document[step]
    return document


def _add(document: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    parent, last = _get(document, path[:-1]), path[-1]
    if isinstance(parent, list):
        parent.insert(len(parent) if last == "-" else _index(last, len(parent) + 1), value)
    else:
        parent[last] = value
    return document


def _remove(document: Any, path: list[str]) -> Any:
    parent, last = _get(document, path[:-1]), path[-1]
    del parent[_index(last, len(parent)) if isinstance(parent, list) else last]
    return document


def _replace(document: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    parent, last = _get(document, path[:-1]), path[-1]
    parent[_index(last, len(parent)) if isinstance(parent, list) else last] = value
    return document


def strategic_merge(target: Any, patch: Any, schema: StructuralSchema) -> Any:
    """A merge patch that knows from the schema which lists are merged by a key, as `kubectl apply` and `edit` send."""
    return _merge_object(target, patch, schema.at(()), schema)


def _merge_object(target: Any, patch: Any, node: Mapping[str, Any], schema: StructuralSchema) -> Any:
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    patch = dict(patch)
    match patch.pop("$patch", "merge"):
        case "replace":
            return patch
        case "delete":
            return {}
    result = dict(target) if isinstance(target, dict) else {}
    retained = patch.pop("$retainKeys", None)
    if retained is not None:
        result = {key: value for key, value in result.items() if key in retained}
    for key, value in patch.items():
        directive, _, field = key.partition("/")
        if directive == "$deleteFromPrimitiveList":
            result[field] = [item for item in result.get(field, []) if item not in value]
        elif directive == "$setElementOrder":
            child = schema.child(node, field)
            merged = _merge_list(result.get(field, []), patch.get(field) or [], child, schema)
            result[field] = _ordered(merged, value, child)
        elif value is None:
            result.pop(key, None)
        elif isinstance(value, list):
            if f"$setElementOrder/{key}" not in patch:
                result[key] = _merge_list(result.get(key), value, schema.child(node, key), schema)
        else:
            result[key] = _merge_object(result.get(key), value, schema.child(node, key), schema)
    # Objects and lists that a directive emptied are gone, as if they had not been written.
    return {key: value for key, value in result.items() if value != [] or key in patch}


def _merge_list(target: Any, patch: list[Any], node: Mapping[str, Any], schema: StructuralSchema) -> list[Any]:
    if "merge" not in node.get("x-kubernetes-patch-strategy", "").split(","):
        return copy.deepcopy(patch)
    result = list(target or [])
    merge_key = node.get("x-kubernetes-patch-merge-key")
    if merge_key is None:
        return result + [item for item in patch if item not in result]
    if any(item == {"$patch": "replace"} for item in patch):
        return [item for item in patch if item != {"$patch": "replace"}]
    items = schema.resolve(node["items"])
    for item in patch:
        position = next((i for i, old in enumerate(result) if old.get(merge_key) == item.get(merge_key)), None)
        if item.get("$patch") == "delete":
            if position is not None:
                del result[position]
        elif position is None:
            result.append(_merge_object({}, item, items, schema))
        else:
            result[position] = _merge_object(result[position], item, items, schema)
    return result


def _ordered(items: list[Any], order: list[Any], node: Mapping[str, Any]) -> list[Any]:
    """Items in the order that the client wrote; those it does not name keep their place at the end."""
    merge_key = node.get("x-kubernetes-patch-merge-key")

    def identity(item: Any) -> Any:
        return item.get(merge_key) if merge_key and isinstance(item, dict) else item

    wanted = [identity(item) for item in order]
    return sorted(items, key=lambda item: wanted.index(identity(item)) if identity(item) in wanted else len(wanted))
