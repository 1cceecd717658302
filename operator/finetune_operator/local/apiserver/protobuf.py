"""Reading the protobuf bodies in which kubectl writes built-in kinds (`kubectl create secret`, `drain`, `auth can-i`).

Answers are always JSON, which every client takes. The schemas know the field numbers, so one small decoder serves all
kinds. Differences between absent and empty are lost for strings only, which the API treats alike.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from finetune_operator.schema import StructuralSchema

CONTENT_TYPE = "application/vnd.kubernetes.protobuf"
_MAGIC = b"k8s\0"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def kind_of(body: bytes) -> tuple[str, str, bytes]:
    """apiVersion, kind and the encoded object of a body. ValueError where it is no such body."""
    if not body.startswith(_MAGIC):
        raise ValueError("the body does not begin with k8s and a zero byte")
    envelope = dict(_fields(body[len(_MAGIC) :]))
    about = dict(_fields(_raw(envelope.get(1))))
    return _raw(about.get(1)).decode(), _raw(about.get(2)).decode(), _raw(envelope.get(2))


def decode(body: bytes, schema: StructuralSchema) -> dict[str, Any]:
    """The object in a body, as it would be in JSON."""
    api_version, kind, raw = kind_of(body)
    return {"apiVersion": api_version, "kind": kind, **_message(raw, schema.at(()), schema)}


def _raw(value: int | bytes | None) -> bytes:
    match value:
        case None:
            return b""
        case bytes():
            return value
    raise ValueError("a number where bytes were expected")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and raw value of each field on the wire."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == _BYTES:
            size, position = _varint(data, position)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if position + size > len(data):
            raise ValueError("the body is cut off")
        yield number, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    result = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return result, position
        shift += 7
    raise ValueError("the body is cut off")


def _message(data: bytes, node: Mapping[str, Any], schema: StructuralSchema) -> dict[str, Any]:
    names = {child.get("x-protobuf-field"): name for name, child in node.get("properties", {}).items()}
    result: dict[str, Any] = {}
    for number, raw in _fields(data):
        name = names.get(number)
        if name is None:
            # Newer than what is served, or one of the few structures that protobuf nests and JSON does not.
            raise ValueError(f"field {number} is not known here, write the object as JSON")
        child = schema.child(node, name)
        if child.get("type") == "array":
            result.setdefault(name, []).append(_value(raw, schema.resolve(child["items"]), schema))
        elif "additionalProperties" in child:
            entry = dict(_fields(_raw(raw)))
            inner = schema.resolve(child["additionalProperties"])
            key = _raw(entry.get(1)).decode()
            result.setdefault(name, {})[key] = _value(entry.get(2, b""), inner, schema)
        else:
            value = _value(raw, child, schema)
            if value not in (None, ""):
                result[name] = value
    return result


def _value(raw: int | bytes, node: Mapping[str, Any], schema: StructuralSchema) -> Any:
    kind, form = node.get("type"), node.get("format")
    if kind == "boolean":
        return bool(raw)
    if kind == "integer":
        number = raw if isinstance(raw, int) else int.from_bytes(raw, "little")
        return number - (1 << 64) if number >= 1 << 63 else number
    data = _raw(raw)
    if form == "date-time":
        return _time(data)
    if form == "int-or-string":
        parts = dict(_fields(data))
        return _raw(parts.get(3)).decode() if parts.get(1) else parts.get(2, 0)
    if "properties" in node:
        return _message(data, node, schema)
    if kind == "string":
        return base64.b64encode(data).decode() if form == "byte" else data.decode()
    # A quantity is a message with one string, an arbitrary object one with its JSON.
    return _raw(dict(_fields(data)).get(1)).decode()


def _time(data: bytes) -> str | None:
    """Seconds since 1970; the zero time is an empty message."""
    parts = dict(_fields(data))
    seconds = parts.get(1)
    if not isinstance(seconds, int):
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
