"""Label and field selectors of list, watch and deletecollection."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from finetune_operator.local.apiserver.errors import bad_request
from finetune_operator.local.apiserver.resources import Resource
from finetune_operator.local.apiserver.store import Object

Predicate = Callable[[Object], bool]

_KEY = r"[A-Za-z0-9]([-A-Za-z0-9_./]*[A-Za-z0-9])?"
_VALUE = r"[-A-Za-z0-9_.]*"
_EQUALITY = re.compile(rf"^\s*(?P<key>{_KEY})\s*(?P<op>==|=|!=)\s*(?P<value>{_VALUE})\s*$")
_SET = re.compile(rf"^\s*(?P<key>{_KEY})\s+(?P<op>in|notin)\s*\((?P<values>[^()]*)\)\s*$")
_EXISTS = re.compile(rf"^\s*(?P<absent>!)?\s*(?P<key>{_KEY})\s*$")
# Commas separate requirements, except inside the brackets of a set.
_COMMA = re.compile(r",(?![^(]*\))")


def label_predicate(selector: str) -> Predicate:
    """Compile `a=b,c!=d,e in (f,g),h,!i`."""
    requirements = [_requirement(term) for term in _COMMA.split(selector)] if selector.strip() else []
    return lambda obj: all(holds(obj["metadata"].get("labels") or {}) for holds in requirements)


def _requirement(term: str) -> Callable[[Mapping[str, str]], bool]:
    if match := _EQUALITY.match(term):
        key, value = match["key"], match["value"]
        if match["op"] == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    if match := _SET.match(term):
        key, values = match["key"], {value.strip() for value in match["values"].split(",")}
        if match["op"] == "in":
            return lambda labels: key in labels and labels[key] in values
        return lambda labels: labels.get(key) not in values
    if match := _EXISTS.match(term):
        key, absent = match["key"], bool(match["absent"])
        return lambda labels: (key in labels) != absent
    raise bad_request(f"unable to parse requirement: {term.strip()!r} is not KEY, !KEY, KEY=VALUE or KEY in (VALUES)")


def field_predicate(resource: Resource, selector: str) -> Predicate:
    """Compile `metadata.name=a,status.phase!=Running`."""
    requirements: list[tuple[str, bool, str]] = []
    for term in filter(None, selector.split(",")):
        match = re.fullmatch(r"([^=!]+)(==|=|!=)(.*)", term)
        if not match:
            raise bad_request(f"invalid field selector: {term!r} is not FIELD=VALUE")
        name, operator, value = match.groups()
        requirements.append((_field_path(resource, name), operator != "!=", value))
    return lambda obj: all((field_value(obj, path) == value) == equal for path, equal, value in requirements)


def _field_path(resource: Resource, name: str) -> str:
    if name == "metadata.name" or (name == "metadata.namespace" and resource.namespaced):
        return name
    if name not in resource.fields:
        raise bad_request(f"field label not supported: {name}")
    return resource.fields[name]


def field_value(obj: Object, path: str) -> str:
    """A scalar by its dotted path, as text; "" where it is absent."""
    value: Any = obj
    for step in path.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
