"""What an API server estimates a CEL rule to cost, before it takes a CRD: the formula of Kubernetes, at its upper end.

Each step costs 1. A string costs a tenth of its longest length (in bytes, four for each character) wherever it is
walked through; a regular expression multiplies that by a quarter of its own length; a loop multiplies its body by the
longest length of the list or map. What is not known here is an error, so that no rule passes unseen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import celpy
from lark import Token, Tree

PER_RULE = 10_000_000
"""Times the number of places in one object where the rule applies."""
PER_CRD = 100_000_000
_LOOP = 3
"""What a loop does in each round beside its body."""
_LONG_TIME = 35
"""Characters of a date-time."""

Schema = Mapping[str, Any]
Scope = Mapping[str, "Value"]


@dataclass(frozen=True)
class Value:
    cost: float
    size: float = 1
    """The most elements or bytes."""
    schema: Schema | None = None


def estimate(rule: str, schema: Schema) -> float:
    """The highest cost of a rule of one node of a schema."""
    own = Value(1, _size(schema), schema)
    return _cost(celpy.Environment().compile(rule), {"self": own, "oldSelf": own}).cost


def _size(schema: Schema) -> float:
    if "enum" in schema:
        return max(len(str(value)) for value in schema["enum"])
    match schema["type"]:
        case "string" if schema.get("format") == "date-time":
            return _LONG_TIME
        case "string":
            return 4 * int(schema["maxLength"])
        case "array":
            return int(schema["maxItems"])
        case "object" if "additionalProperties" in schema:
            return int(schema["maxProperties"])
        case "object":
            return 0
    return 1


def _cost(tree: Any, scope: Scope) -> Value:
    children = [child for child in tree.children if not isinstance(child, Token)]
    match tree.data:
        case "ident":
            return scope[str(tree.children[0])]
        case "literal":
            token = tree.children[0]
            return Value(0, len(token) - 2 if "STRING" in token.type else 1)
        case "list_lit":
            items = [_cost(item, scope) for item in children[0].children]
            return Value(10 + sum(item.cost for item in items), len(items))
        case "member_dot":
            return _select(_cost(children[0], scope), str(tree.children[1]))
        case "member_index":
            found, index = (_cost(child, scope) for child in children)
            assert found.schema
            return Value(found.cost + index.cost + 1, _size(found.schema["items"]), found.schema["items"])
        case "ident_arg":
            return _function(str(tree.children[0]), children[0], scope)
        case "member_dot_arg":
            return _method(_cost(children[0], scope), str(tree.children[1]), children[1], scope)
        case "expr" if len(children) == 3:
            condition, yes, no = (_cost(child, scope) for child in children)
            return Value(condition.cost + max(yes.cost, no.cost), max(yes.size, no.size))
        case "relation" if len(children) == 2:
            operator, left = children[0].data, _cost(children[0].children[0], scope)
            right = _cost(children[1], scope)
            both = left.cost + right.cost
            if operator == "relation_in":
                # In a map it is one look, in a list a walk.
                return Value(both + right.size)
            return Value(both + max(1, math.ceil(min(left.size, right.size) / 10)))
        case "addition" | "multiplication" if len(children) == 2:
            left, right = _cost(children[0].children[0], scope), _cost(children[1], scope)
            return Value(left.cost + right.cost + 1)
        case "unary" if len(children) == 2:
            return Value(_cost(children[1], scope).cost + 1)
        case "conditionalor" | "conditionaland" if len(children) == 2:
            return Value(sum(_cost(child, scope).cost for child in children))
    assert len(children) == 1, f"{tree.data} is not estimated yet"
    return _cost(children[0], scope)


def _select(value: Value, field: str) -> Value:
    # The name of an object is not in the schema of a CRD, but a rule may ask for it.
    if field == "metadata":
        text = {"type": "string", "maxLength": 253}
        return Value(value.cost + 1, 0, {"type": "object", "properties": {"name": text}})
    assert value.schema, field
    schema = value.schema["properties"][field]
    return Value(value.cost + 1, _size(schema), schema)


def _function(name: str, arguments: Tree[Any], scope: Scope) -> Value:
    (argument,) = (_cost(child, scope) for child in arguments.children)
    assert name in ("has", "size"), f"{name}() is not estimated yet"
    return Value(argument.cost + 1)


def _method(target: Value, name: str, arguments: Tree[Any], scope: Scope) -> Value:
    if name in ("all", "exists"):
        variable, body = arguments.children
        assert target.schema
        is_list = target.schema["type"] == "array"
        # Of the keys of a map the server assumes nothing.
        item = Value(1, _size(target.schema["items"]), target.schema["items"]) if is_list else Value(1, 0)
        names = list(variable.find_data("ident"))
        inner = _cost(body, {**scope, str(names[0].children[0]): item})
        return Value(target.cost + target.size * (inner.cost + _LOOP))
    (argument,) = (_cost(child, scope) for child in arguments.children)
    both = target.cost + argument.cost
    match name:
        case "matches":
            return Value(both + math.ceil((target.size + 1) / 10) * math.ceil(argument.size / 4))
        case "contains":
            return Value(both + math.ceil(target.size / 10) * math.ceil(argument.size / 10))
        case "startsWith" | "endsWith":
            return Value(both + math.ceil(argument.size / 10))
    raise AssertionError(f"{name}() is not estimated yet")
