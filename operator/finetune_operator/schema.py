"""Structural schemas of Kubernetes: defaults, unknown fields, validation and CEL rules, as the API server applies them.

One engine for two users: the embedded API server, and `finetune validate`, which checks a manifest without a cluster.
Messages read like the real server's, word for word where a person sees them, and every error carries its path, so that
a command line tool can point at the line. Pure: no input or output, nothing is changed in place.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import celpy
import re2  # type: ignore[import-untyped]  # RE2 as in Go, of CRD patterns and of CEL; Python's own differs
from celpy.adapter import json_to_cel
from celpy.evaluation import CELEvalError

# celpy describes every step of every evaluation, objects included, at level DEBUG.
logging.getLogger("celpy").setLevel(logging.WARNING)

Path = tuple[str | int, ...]
"""Where something is: field names and list indexes, from the root. The root is ()."""

NOT_CHECKED = (
    "some validation rules were not checked because the object was invalid; correct the existing errors to complete "
    "validation"
)


class ErrorType(StrEnum):
    """What is wrong, as in `details.causes[].reason` of a Status."""

    REQUIRED = "FieldValueRequired"
    INVALID = "FieldValueInvalid"
    TYPE_INVALID = "FieldValueTypeInvalid"
    NOT_SUPPORTED = "FieldValueNotSupported"
    DUPLICATE = "FieldValueDuplicate"
    FORBIDDEN = "FieldValueForbidden"
    TOO_LONG = "FieldValueTooLong"
    TOO_MANY = "FieldValueTooMany"
    UNKNOWN_FIELD = "UnknownField"
    """Found by strict decoding, before validation."""


_BLOCKING = {
    ErrorType.NOT_SUPPORTED,
    ErrorType.REQUIRED,
    ErrorType.TOO_LONG,
    ErrorType.TOO_MANY,
    ErrorType.TYPE_INVALID,
}
"""After one of these CEL is not evaluated: a rule may assume that types and required fields are right."""


@dataclass(frozen=True)
class FieldError:
    """One thing that is wrong. `str()` is what the API server prints."""

    path: Path
    type: ErrorType
    message: str

    @property
    def field(self) -> str:
        """The path as the API server writes it: `spec.dataset.train[0].uri`; the object itself is `<nil>`."""
        return format_path(self.path)

    def __str__(self) -> str:
        if self.type is ErrorType.UNKNOWN_FIELD:
            return self.message
        return f"{self.field}: {self.message}"


def format_path(path: Path) -> str:
    """`("spec", "train", 0, "uri")` becomes `spec.train[0].uri`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".") or "<nil>"


def strict_decoding_error(errors: Sequence[FieldError]) -> str:
    """The sentence that the API server has for unknown fields."""
    return "strict decoding error: " + ", ".join(error.message for error in errors)


def invalid(path: Path, value: Any, message: str) -> FieldError:
    """`Invalid value`, with the value shown unless it is an object or a list."""
    shown = "" if isinstance(value, dict | list) else f"{_json(value)}: "
    return FieldError(path, ErrorType.INVALID, f"Invalid value: {shown}{message}")


def required(path: Path, message: str = "") -> FieldError:
    return FieldError(path, ErrorType.REQUIRED, f"Required value: {message}" if message else "Required value")


def forbidden(path: Path, message: str) -> FieldError:
    return FieldError(path, ErrorType.FORBIDDEN, f"Forbidden: {message}")


def not_supported(path: Path, value: Any, supported: Sequence[Any]) -> FieldError:
    shown = ", ".join(_json(option) for option in supported)
    message = f"Unsupported value: {_json(value)}: supported values: {shown}"
    return FieldError(path, ErrorType.NOT_SUPPORTED, message)


def without_nulls(value: Any) -> Any:
    """A copy without nulls, which built-in kinds and all metadata take for absent fields."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


class StructuralSchema:
    """The schema of one kind.

    `definitions` resolves `$ref`s, which the schemas of the built-in kinds have and those of CRDs have not.
    """

    def __init__(self, schema: Mapping[str, Any], definitions: Mapping[str, Any] | None = None) -> None:
        self._root = schema
        self._definitions = definitions or {}
        self._has_rules = '"x-kubernetes-validations"' in json.dumps(schema)

    def defaulted(self, value: Any) -> Any:
        """A copy with defaults filled in wherever their parent exists, and without nulls that no field allows."""
        return self._defaulted(value, self._root)

    def pruned(self, value: Any) -> Any:
        """A copy without the fields that the schema does not know."""
        return self._pruned(value, self._root, is_root=True)

    def unknown_fields(self, value: Any) -> list[FieldError]:
        """Fields that the schema does not know."""
        return [
            FieldError(path, ErrorType.UNKNOWN_FIELD, f'unknown field "{format_path(path)}"')
            for path in self._unknown(value, self._root, ())
        ]

    def validate(self, value: Any, old: Any = None) -> list[FieldError]:
        """Everything that is wrong. `old` is the stored object of an update; without it rules on oldSelf are skipped.

        As on the server, an error that the stored object has too, at the same place and with the same value, does not
        stand in the way of an update.
        """
        errors = [*self._check(value, self._root, ()), *self._list_types(value, self._root, ())]
        if old is not None:
            errors = [error for error in errors if not _unchanged(error, value, old)]
        if self._has_rules and any(error.type in _BLOCKING for error in errors):
            return [*errors, FieldError((), ErrorType.INVALID, f"Invalid value: null: {NOT_CHECKED}")]
        return [*errors, *self._rules(value, old, self._root, ())]

    def structure_errors(self, value: Any) -> list[FieldError]:
        """Wrong types, enums, bounds and missing fields, without list types and CEL: the share of built-in kinds."""
        return list(self._check(value, self._root, ()))

    def at(self, path: Sequence[str]) -> Mapping[str, Any]:
        """The schema node of a field, {} where it is not described. List steps are not named: items are entered."""
        node = self.resolve(self._root)
        for step in path:
            while "items" in node:
                node = self.resolve(node["items"])
            node = self.child(node, step)
        return node

    def child(self, node: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """The schema of one field of an object."""
        properties = node.get("properties", {})
        if key in properties:
            return self.resolve(properties[key])
        additional = node.get("additionalProperties")
        return self.resolve(additional) if isinstance(additional, Mapping) else {}

    def resolve(self, node: Mapping[str, Any]) -> Mapping[str, Any]:
        """Follow `$ref`, also inside a single `allOf`, which is how OpenAPI 3 puts a default beside a reference."""
        while True:
            (inner,) = node["allOf"] if len(node.get("allOf", ())) == 1 else (None,)
            if inner is not None:
                node = {**self.resolve(inner), **{key: value for key, value in node.items() if key != "allOf"}}
            elif "$ref" in node:
                node = self._definitions[node["$ref"].rpartition("/")[2]]
            else:
                return node

    # -- defaults and unknown fields

    def _defaulted(self, value: Any, node: Mapping[str, Any]) -> Any:
        node = self.resolve(node)
        if isinstance(value, dict):
            result = {}
            for key, item in value.items():
                child = self.child(node, key)
                if item is None and child and not child.get("nullable"):
                    continue
                result[key] = self._defaulted(item, child)
            for key, child in node.get("properties", {}).items():
                child = self.resolve(child)
                if key not in result and child.get("default") is not None:
                    result[key] = self._defaulted(child["default"], child)
            return result
        if isinstance(value, list):
            items = node.get("items", {})
            return [self._defaulted(item, items) for item in value]
        return value

    def _unknown(self, value: Any, node: Mapping[str, Any], path: Path) -> Iterator[Path]:
        node = self.resolve(node)
        if isinstance(value, dict) and _closed(node, path):
            for key, item in value.items():
                if _known(node, key, path):
                    yield from self._unknown(item, self.child(node, key), (*path, key))
                else:
                    yield (*path, key)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from self._unknown(item, node.get("items", {}), (*path, index))

    def _pruned(self, value: Any, node: Mapping[str, Any], *, is_root: bool = False) -> Any:
        node = self.resolve(node)
        path: Path = () if is_root else ("",)
        if isinstance(value, dict) and _closed(node, path):
            return {
                key: self._pruned(item, self.child(node, key)) for key, item in value.items() if _known(node, key, path)
            }
        if isinstance(value, list):
            return [self._pruned(item, node.get("items", {})) for item in value]
        return value

    # -- validation

    def _check(self, value: Any, node: Mapping[str, Any], path: Path) -> Iterator[FieldError]:
        node = self.resolve(node)
        if value is None and node.get("nullable"):
            return
        if not _has_type(value, node):
            expected = "integer,string" if node.get("x-kubernetes-int-or-string") else node["type"]
            yield _type_error(path, _type_name(value), expected)
            return
        if "enum" in node and value not in node["enum"]:
            yield not_supported(path, value, node["enum"])
        match value:
            case dict():
                yield from self._check_object(value, node, path)
            case list():
                yield from _check_size(value, node, path)
                items = node.get("items", {})
                for index, item in enumerate(value):
                    yield from self._check(item, items, (*path, index))
            case str():
                yield from _check_string(value, node, path)
            case int() | float() if not isinstance(value, bool):
                yield from _check_number(value, node, path)

    def _check_object(self, value: dict[str, Any], node: Mapping[str, Any], path: Path) -> Iterator[FieldError]:
        for key in node.get("required", ()):
            if key not in value:
                yield required((*path, key))
        maximum, minimum = node.get("maxProperties"), node.get("minProperties")
        if maximum is not None and len(value) > maximum:
            yield _too_many(path, len(value), maximum)
        if minimum is not None and len(value) < minimum:
            yield _out_of_bounds(path, len(value), f"should have at least {minimum} properties")
        for key, item in value.items():
            yield from self._check(item, self.child(node, key), (*path, key))

    def _list_types(self, value: Any, node: Mapping[str, Any], path: Path) -> Iterator[FieldError]:
        """No two equal items in a list of type set, no two with equal keys in one of type map."""
        node = self.resolve(node)
        if isinstance(value, dict):
            for key, item in value.items():
                yield from self._list_types(item, self.child(node, key), (*path, key))
        elif isinstance(value, list):
            seen = set()
            for index, item in enumerate(value):
                yield from self._list_types(item, node.get("items", {}), (*path, index))
                key = self._item_key(item, node)
                if key in seen:
                    shown = _item_keys(item, node) if node["x-kubernetes-list-type"] == "map" else item
                    yield FieldError((*path, index), ErrorType.DUPLICATE, f"Duplicate value: {_json(shown)}")
                elif key is not None:
                    seen.add(key)

    def _item_key(self, item: Any, node: Mapping[str, Any]) -> str | None:
        """What tells the items of a set or map list apart; None for items of other lists."""
        match node.get("x-kubernetes-list-type"):
            case "set":
                return _json(item)
            case "map" if isinstance(item, dict):
                return _json(_item_keys(item, node))
        return None

    # -- CEL

    def _rules(self, value: Any, old: Any, node: Mapping[str, Any], path: Path) -> Iterator[FieldError]:
        node = self.resolve(node)
        rules = node.get("x-kubernetes-validations", ())
        # What has not changed was judged when it was written; only a rule that compares may still object.
        plain = [rule for rule in rules if "oldSelf" not in rule["rule"]] if old is None or value != old else []
        if plain:
            variables = {"self": json_to_cel(value)}
            yield from (error for rule in plain if (error := _broken(rule, value, variables, path)))
        transitions = [rule for rule in rules if "oldSelf" in rule["rule"]] if old is not None else []
        if transitions:
            # Kubernetes compares sets and map lists without regard to order; sorted copies give CEL the same view.
            variables = {
                "self": json_to_cel(self._sorted_lists(value, node)),
                "oldSelf": json_to_cel(self._sorted_lists(old, node)),
            }
            yield from (error for rule in transitions if (error := _broken(rule, value, variables, path)))
        if isinstance(value, dict):
            old = old if isinstance(old, dict) else {}
            for key, item in value.items():
                yield from self._rules(item, old.get(key), self.child(node, key), (*path, key))
        elif isinstance(value, list):
            items = node.get("items", {})
            # Items of a set or an atomic list have no identity over time, so transition rules do not reach into them.
            by_key = (
                {self._item_key(item, node): item for item in old}
                if isinstance(old, list) and node.get("x-kubernetes-list-type") == "map"
                else {}
            )
            for index, item in enumerate(value):
                yield from self._rules(item, by_key.get(self._item_key(item, node)), items, (*path, index))

    def _sorted_lists(self, value: Any, node: Mapping[str, Any]) -> Any:
        node = self.resolve(node)
        if isinstance(value, dict):
            return {key: self._sorted_lists(item, self.child(node, key)) for key, item in value.items()}
        if isinstance(value, list):
            items = [self._sorted_lists(item, node.get("items", {})) for item in value]
            if node.get("x-kubernetes-list-type") in ("set", "map"):
                items.sort(key=lambda item: self._item_key(item, node) or "")
            return items
        return value


_NO_KEY = "no such member in mapping: "
"""What celpy says where cel-go says `no such key: `."""


@functools.cache
def _program(expression: str) -> celpy.Runner:
    """Compile once: parsing takes milliseconds, and the rules of a CRD are few."""
    environment = celpy.Environment()
    return environment.program(environment.compile(expression))


def _broken(rule: Mapping[str, Any], value: Any, variables: dict[str, Any], path: Path) -> FieldError | None:
    """What is wrong according to one rule."""
    expression = rule["rule"]
    try:
        if _program(expression).evaluate(variables):
            return None
        message = rule.get("message", "").strip() or f"failed rule: {expression}"
        if "messageExpression" in rule:
            message = str(_program(rule["messageExpression"]).evaluate(variables))
    except CELEvalError as error:
        what = str(error.args[0])
        if what.startswith(_NO_KEY):
            what = f"no such key: {what.removeprefix(_NO_KEY).strip(chr(39))}"
        # The server shows the type here, and the message in place of the rule.
        return invalid(path, _type_name(value), f"{what} evaluating rule: {rule.get('message', expression)}")
    where = (*path, *rule["fieldPath"].removeprefix(".").split(".")) if "fieldPath" in rule else path
    match rule.get("reason", ErrorType.INVALID):
        case ErrorType.FORBIDDEN:
            return forbidden(where, message)
        case ErrorType.REQUIRED:
            return required(where, message)
    return invalid(where, value, message)


def _closed(node: Mapping[str, Any], path: Path) -> bool:
    """Whether unknown fields are found in an object. An object that is not described at all holds anything."""
    if node.get("x-kubernetes-preserve-unknown-fields") or not (path or node.get("properties")):
        return False
    return "properties" in node or isinstance(node.get("additionalProperties"), Mapping)


def _known(node: Mapping[str, Any], key: str, path: Path) -> bool:
    if not path and key in ("apiVersion", "kind", "metadata"):
        return True
    return key in node.get("properties", {}) or bool(node.get("additionalProperties"))


def _has_type(value: Any, node: Mapping[str, Any]) -> bool:
    if node.get("x-kubernetes-int-or-string"):
        return isinstance(value, int | str) and not isinstance(value, bool)
    match node.get("type"):
        case "object":
            return isinstance(value, dict)
        case "array":
            return isinstance(value, list)
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return not isinstance(value, bool) and (isinstance(value, int) or _is_whole(value))
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
    return True


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _type_name(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def _type_error(path: Path, found: Any, expected: str) -> FieldError:
    shown = _json(found)
    message = f"Invalid value: {shown}: {format_path(path)} in body must be of type {expected}: {shown}"
    return FieldError(path, ErrorType.TYPE_INVALID, message)


def _out_of_bounds(path: Path, value: Any, what: str) -> FieldError:
    return FieldError(path, ErrorType.INVALID, f"Invalid value: {_json(value)}: {format_path(path)} in body {what}")


def _too_many(path: Path, size: int, maximum: int) -> FieldError:
    return FieldError(path, ErrorType.TOO_MANY, f"Too many: {size}: must have at most {maximum} items")


def _check_size(value: list[Any], node: Mapping[str, Any], path: Path) -> Iterator[FieldError]:
    maximum, minimum = node.get("maxItems"), node.get("minItems")
    if maximum is not None and len(value) > maximum:
        yield _too_many(path, len(value), maximum)
    if minimum is not None and len(value) < minimum:
        yield _out_of_bounds(path, len(value), f"should have at least {minimum} items")
    if node.get("uniqueItems") and len({_json(item) for item in value}) < len(value):
        yield _out_of_bounds(path, value, "shouldn't contain duplicates")


def _check_string(value: str, node: Mapping[str, Any], path: Path) -> Iterator[FieldError]:
    maximum, minimum, pattern = node.get("maxLength"), node.get("minLength"), node.get("pattern")
    if maximum is not None and len(value) > maximum:
        yield FieldError(path, ErrorType.TOO_LONG, f"Too long: may not be more than {maximum} bytes")
    if minimum is not None and len(value) < minimum:
        yield _out_of_bounds(path, value, f"should be at least {minimum} chars long")
    if pattern is not None and not re2.search(pattern, value):
        yield _out_of_bounds(path, value, f"should match '{pattern}'")
    if node.get("format") == "date-time" and not _is_time(value):
        yield _type_error(path, value, "date-time")


def _check_number(value: float, node: Mapping[str, Any], path: Path) -> Iterator[FieldError]:
    maximum, minimum, step = node.get("maximum"), node.get("minimum"), node.get("multipleOf")
    if maximum is not None and (value > maximum or (node.get("exclusiveMaximum") and value == maximum)):
        yield _out_of_bounds(path, value, f"should be less than {_or_equal(node, 'Maximum')}{maximum}")
    if minimum is not None and (value < minimum or (node.get("exclusiveMinimum") and value == minimum)):
        yield _out_of_bounds(path, value, f"should be greater than {_or_equal(node, 'Minimum')}{minimum}")
    if step is not None and value % step:
        yield _out_of_bounds(path, value, f"should be a multiple of {step}")


def _or_equal(node: Mapping[str, Any], bound: str) -> str:
    return "" if node.get(f"exclusive{bound}") else "or equal to "


def _is_time(value: str) -> bool:
    try:
        return "T" in value and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _item_keys(item: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item.get(key) for key in node["x-kubernetes-list-map-keys"] if key in item}


def _unchanged(error: FieldError, value: Any, old: Any) -> bool:
    """Whether the stored object already had this value here."""
    for step in error.path:
        try:
            value, old = value[step], old[step]
        except (KeyError, IndexError, TypeError):
            return False
    return bool(error.path) and value == old


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
