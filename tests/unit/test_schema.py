"""The structural-schema engine. What it says of the FineTuneJob CRD is tested against API servers in controlplane."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from finetune_api import crd
from finetune_operator.schema import (
    ErrorType,
    FieldError,
    StructuralSchema,
    format_path,
    strict_decoding_error,
    without_nulls,
)


def schema(**properties: Any) -> StructuralSchema:
    return StructuralSchema({"type": "object", "properties": {"spec": {"type": "object", "properties": properties}}})


def errors(engine: StructuralSchema, spec: Any, old: Any = None) -> list[str]:
    before = None if old is None else {"spec": old}
    return [str(error) for error in engine.validate({"spec": spec}, before)]


def rule(expression: str, **more: Any) -> list[dict[str, Any]]:
    return [{"rule": expression, "message": "no", **more}]


def test_paths_are_written_like_the_server_does() -> None:
    assert format_path(("spec", "train", 0, "uri")) == "spec.train[0].uri"
    assert format_path(()) == "<nil>"


def test_errors_can_be_found_in_a_file() -> None:
    engine = schema(train={"type": "array", "items": {"type": "object", "required": ["uri"]}})
    (error,) = engine.validate({"spec": {"train": [{"uri": 1}, {}]}})
    assert error == FieldError(("spec", "train", 1, "uri"), ErrorType.REQUIRED, "Required value")
    assert (error.field, str(error)) == ("spec.train[1].uri", "spec.train[1].uri: Required value")


def test_defaults_need_their_parent() -> None:
    nested = {"type": "object", "properties": {"x": {"type": "integer", "default": 1}}}
    engine = schema(absent=nested, present=nested, defaulted={**nested, "default": {}})
    given = {"spec": {"present": {}}}
    assert engine.defaulted(given) == {"spec": {"present": {"x": 1}, "defaulted": {"x": 1}}}
    assert given == {"spec": {"present": {}}}


def test_defaults_reach_into_lists_and_maps() -> None:
    item = {"type": "object", "properties": {"x": {"type": "integer", "default": 1}}}
    engine = schema(items={"type": "array", "items": item}, map={"type": "object", "additionalProperties": item})
    assert engine.defaulted({"spec": {"items": [{}, {"x": 2}], "map": {"a": {}}}}) == {
        "spec": {"items": [{"x": 1}, {"x": 2}], "map": {"a": {"x": 1}}}
    }


def test_null_is_dropped_or_becomes_the_default() -> None:
    engine = schema(
        plain={"type": "string"},
        defaulted={"type": "string", "default": "d"},
        nullable={"type": "string", "nullable": True},
    )
    spec = engine.defaulted({"spec": {"plain": None, "defaulted": None, "nullable": None}})["spec"]
    assert spec == {"defaulted": "d", "nullable": None}
    assert errors(engine, spec) == []
    assert without_nulls({"a": None, "b": [{"c": None, "d": 1}]}) == {"b": [{"d": 1}]}


def test_unknown_fields_are_found_and_pruned_everywhere() -> None:
    engine = schema(
        items={"type": "array", "items": {"type": "object", "properties": {"x": {"type": "integer"}}}},
        free={"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        map={"type": "object", "additionalProperties": {"type": "string"}},
    )
    obj = {
        "apiVersion": "v1",
        "metadata": {"anything": 1},
        "spec": {"items": [{"x": 1, "y": 2}], "free": {"a": 1}, "map": {"k": "v"}, "typo": 1},
        "extra": 1,
    }
    found = engine.unknown_fields(obj)
    assert [error.path for error in found] == [("spec", "items", 0, "y"), ("spec", "typo"), ("extra",)]
    assert strict_decoding_error(found) == (
        'strict decoding error: unknown field "spec.items[0].y", unknown field "spec.typo", unknown field "extra"'
    )
    pruned = engine.pruned(obj)
    assert engine.unknown_fields(pruned) == []
    assert pruned["spec"] == {"items": [{"x": 1}], "free": {"a": 1}, "map": {"k": "v"}}


@pytest.mark.parametrize(
    ("node", "good", "bad", "message"),
    [
        (
            {"type": "integer"},
            [0, -1, 2.0],
            "1",
            'Invalid value: "string": spec.x in body must be of type integer: "string"',
        ),
        ({"type": "integer"}, [1], True, 'Invalid value: "boolean": spec.x in body must be of type integer: "boolean"'),
        ({"type": "integer"}, [1], 1.5, 'Invalid value: "number": spec.x in body must be of type integer: "number"'),
        ({"type": "number"}, [1, 1.5], [], 'Invalid value: "array": spec.x in body must be of type number: "array"'),
        ({"type": "boolean"}, [True], 1, 'Invalid value: "integer": spec.x in body must be of type boolean: "integer"'),
        ({"type": "string"}, [""], None, 'Invalid value: "null": spec.x in body must be of type string: "null"'),
        ({"type": "object"}, [{}], "", 'Invalid value: "string": spec.x in body must be of type object: "string"'),
        (
            {"x-kubernetes-int-or-string": True},
            [1, "1"],
            1.5,
            'Invalid value: "number": spec.x in body must be of type integer,string: "number"',
        ),
        (
            {"type": "string", "format": "date-time"},
            ["2026-01-01T00:00:00Z", "2026-01-01T00:00:00.5+01:00"],
            "2026-01-01",
            'Invalid value: "2026-01-01": spec.x in body must be of type date-time: "2026-01-01"',
        ),
        ({"type": "string", "enum": ["a", "b"]}, ["a"], "c", 'Unsupported value: "c": supported values: "a", "b"'),
        (
            {"type": "string", "minLength": 2},
            ["ab"],
            "a",
            'Invalid value: "a": spec.x in body should be at least 2 chars long',
        ),
        ({"type": "string", "maxLength": 2}, ["ab"], "abc", "Too long: may not be more than 2 bytes"),
        (
            {"type": "string", "pattern": "^a+$"},
            ["aa"],
            "b",
            "Invalid value: \"b\": spec.x in body should match '^a+$'",
        ),
        (
            {"type": "integer", "minimum": 1},
            [1],
            0,
            "Invalid value: 0: spec.x in body should be greater than or equal to 1",
        ),
        (
            {"type": "integer", "minimum": 1, "exclusiveMinimum": True},
            [2],
            1,
            "Invalid value: 1: spec.x in body should be greater than 1",
        ),
        (
            {"type": "integer", "maximum": 9},
            [9],
            10,
            "Invalid value: 10: spec.x in body should be less than or equal to 9",
        ),
        ({"type": "integer", "multipleOf": 4}, [8], 6, "Invalid value: 6: spec.x in body should be a multiple of 4"),
        ({"type": "array", "maxItems": 1}, [[1]], [1, 2], "Too many: 2: must have at most 1 items"),
        ({"type": "array", "minItems": 1}, [[1]], [], "Invalid value: 0: spec.x in body should have at least 1 items"),
        (
            {"type": "object", "maxProperties": 1},
            [{"a": 1}],
            {"a": 1, "b": 2},
            "Too many: 2: must have at most 1 items",
        ),
        (
            {"type": "object", "minProperties": 1},
            [{"a": 1}],
            {},
            "Invalid value: 0: spec.x in body should have at least 1 properties",
        ),
        (
            {"type": "array", "x-kubernetes-list-type": "set"},
            [["a", "b"]],
            ["a", "a"],
            'spec.x[1]: Duplicate value: "a"',
        ),
        (
            {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"]},
            [[{"k": 1}, {"k": 2}]],
            [{"k": 1}, {"k": 1, "v": 2}],
            'spec.x[1]: Duplicate value: {"k":1}',
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values(node: dict[str, Any], good: list[Any], bad: Any, message: str) -> None:
    engine = schema(x=node)
    for value in good:
        assert errors(engine, {"x": value}) == []
    expected = message if message.startswith("spec.x[") else f"spec.x: {message}"
    assert errors(engine, {"x": bad}) == [expected]


def test_rules_are_found_at_every_level() -> None:
    item = {"type": "object", "properties": {"x": {"type": "integer"}}, "x-kubernetes-validations": rule("self.x > 0")}
    engine = schema(
        items={"type": "array", "items": item},
        map={"type": "object", "additionalProperties": item},
        text={"type": "string", "x-kubernetes-validations": rule("self.startsWith('a')")},
    )
    spec = {"items": [{"x": 1}, {"x": 0}], "map": {"k": {"x": 0}}, "text": "b"}
    assert errors(engine, spec) == [
        "spec.items[1]: Invalid value: no",
        "spec.map.k: Invalid value: no",
        'spec.text: Invalid value: "b": no',
    ]


def test_rules_see_the_name() -> None:
    engine = StructuralSchema({"type": "object", "x-kubernetes-validations": rule("size(self.metadata.name) < 3")})
    assert engine.validate({"metadata": {"name": "ab"}}) == []
    assert [str(error) for error in engine.validate({"metadata": {"name": "abc"}})] == ["<nil>: Invalid value: no"]


def test_wrong_types_keep_rules_from_being_evaluated() -> None:
    engine = schema(
        x={"type": "integer"},
        y={"type": "string", "x-kubernetes-validations": rule("false")},
    )
    found = errors(engine, {"x": "1", "y": "z"})
    assert found[1:] == [
        "<nil>: Invalid value: null: some validation rules were not checked because the object was invalid; correct "
        "the existing errors to complete validation"
    ]
    # Without rules there is nothing that was not checked.
    assert len(errors(schema(x={"type": "integer"}), {"x": "1"})) == 1


def test_what_a_rule_may_say() -> None:
    engine = schema(
        a={"type": "integer", "x-kubernetes-validations": [{"rule": "self < 1"}]},
        b={
            "type": "integer",
            "x-kubernetes-validations": rule("self < 1", messageExpression="'too much: ' + string(self)"),
        },
        c={"type": "object", "x-kubernetes-validations": rule("false", fieldPath=".d.e", reason="FieldValueForbidden")},
        d={"type": "object", "x-kubernetes-validations": rule("false", reason="FieldValueRequired")},
        e={"type": "object", "x-kubernetes-validations": rule("self.missing == 1")},
        f={"type": "object", "x-kubernetes-validations": [{"rule": "self.missing == 1"}]},
    )
    found = errors(engine, {"a": 5, "b": 5, "c": {}, "d": {}, "e": {}, "f": {}})
    assert found == [
        "spec.a: Invalid value: 5: failed rule: self < 1",
        "spec.b: Invalid value: 5: too much: 5",
        "spec.c.d.e: Forbidden: no",
        "spec.d: Required value: no",
        'spec.e: Invalid value: "object": no such key: missing evaluating rule: no',
        'spec.f: Invalid value: "object": no such key: missing evaluating rule: self.missing == 1',
    ]


def test_transition_rules_are_skipped_on_create() -> None:
    engine = schema(x={"type": "integer", "x-kubernetes-validations": rule("self >= oldSelf")})
    assert errors(engine, {"x": 1}) == []
    assert errors(engine, {"x": 1}, {}) == []
    assert errors(engine, {"x": 2}, {"x": 1}) == []
    assert errors(engine, {"x": 1}, {"x": 2}) == ["spec.x: Invalid value: 1: no"]


def test_list_items_are_compared_where_they_have_a_key() -> None:
    item = {
        "type": "object",
        "properties": {"k": {"type": "string"}, "v": {"type": "integer"}},
        "x-kubernetes-validations": rule("self.v == oldSelf.v"),
    }
    keyed = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"]}
    old = {"list": [{"k": "a", "v": 1}, {"k": "b", "v": 2}]}
    new = {"list": [{"k": "b", "v": 3}, {"k": "a", "v": 1}, {"k": "c", "v": 9}]}
    engine = schema(list={"type": "array", "items": item, **keyed})
    assert errors(engine, new, old) == ["spec.list[0]: Invalid value: no"]
    # Items of an atomic list have nothing to be told by.
    assert errors(schema(list={"type": "array", "items": item}), new, old) == []


def test_order_does_not_count_in_sets_and_keyed_lists() -> None:
    engine = schema(
        list={
            "type": "array",
            "items": {"type": "string"},
            "x-kubernetes-list-type": "set",
            "x-kubernetes-validations": rule("self == oldSelf"),
        }
    )
    assert errors(engine, {"list": ["b", "a"]}, {"list": ["a", "b"]}) == []
    assert errors(engine, {"list": ["b", "c"]}, {"list": ["a", "b"]}) == ["spec.list: Invalid value: no"]


def test_what_was_wrong_before_does_not_block_an_update() -> None:
    engine = schema(
        x={"type": "integer", "maximum": 5},
        y={"type": "string", "x-kubernetes-validations": rule("self == 'good'")},
        z={"type": "integer"},
    )
    old = {"x": 9, "y": "bad", "z": 1}
    assert errors(engine, {**old, "z": 2}, old) == []
    assert errors(engine, {**old, "x": 8}, old) == [
        "spec.x: Invalid value: 8: spec.x in body should be less than or equal to 5"
    ]
    assert errors(engine, {**old, "y": "worse"}, old) == ['spec.y: Invalid value: "worse": no']


def test_references_are_followed() -> None:
    definitions = {
        "Tree": {
            "type": "object",
            "properties": {
                "size": {"type": "integer"},
                "child": {"allOf": [{"$ref": "#/components/schemas/Tree"}], "default": {}},
            },
        }
    }
    engine = StructuralSchema(definitions["Tree"], definitions)
    bad = {"child": {"child": {"size": "x", "typo": 1}}}
    assert [error.field for error in engine.structure_errors(bad)] == ["child.child.size"]
    assert [error.field for error in engine.unknown_fields(bad)] == ["child.child.typo"]
    assert engine.at(["child", "child"])["type"] == "object"


def test_nothing_is_changed_in_place() -> None:
    engine = schema(
        list={"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "set"},
        x={"type": "integer", "default": 1},
    )
    obj = {"spec": {"list": ["b", "a"], "typo": None}}
    before = copy.deepcopy(obj)
    engine.defaulted(obj)
    engine.pruned(obj)
    engine.validate(obj, obj)
    assert obj == before


def test_defaults_pass_the_rules_as_they_are_written() -> None:
    """An API server asks the rules of an object about its default before it fills in the defaults of its fields, and
    refuses the whole definition otherwise."""
    root = crd.build()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    asked = []

    def walk(path: str, node: dict[str, Any]) -> None:
        if node.get("default") is not None and "x-kubernetes-validations" in node:
            asked.append(path)
            plain = {key: value for key, value in node.items() if key != "default"}
            assert schema(x=plain).validate({"spec": {"x": node["default"]}}) == [], path
        for name, child in (node.get("properties") or {}).items():
            walk(f"{path}.{name}", child)
        if "items" in node:
            walk(f"{path}[]", node["items"])

    walk("", root)
    assert {".spec.resources", ".spec.method.adapter"} <= set(asked)
