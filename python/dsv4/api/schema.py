"""Pieces of JSON Schema, for `/openapi.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]

INT32 = 2**31 - 1


def ref(name: str) -> Schema:
    """A schema of the document's components."""
    return {"$ref": f"#/components/schemas/{name}"}


def optional(schema: Schema) -> Schema:
    """The same, or null."""
    kind = schema.get("type")
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], None], "type": [kind, "null"]}
    if isinstance(kind, str) and "anyOf" not in schema:
        return {**schema, "type": [kind, "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def text(longest: int | None = None, least: int = 0) -> Schema:
    """A string of so many characters."""
    bound: Schema = {"maxLength": longest} if longest is not None else {}
    return {"type": "string", **bound} | ({"minLength": least} if least else {})


def integer(low: int, high: int) -> Schema:
    """A whole number."""
    return {"type": "integer", "minimum": low, "maximum": high}


def number(low: float, high: float) -> Schema:
    """A number."""
    return {"type": "number", "minimum": low, "maximum": high}


def one_of(*values: str) -> Schema:
    """One of some texts."""
    return {"type": "string", "enum": list(values)}


def array(items: Schema, most: int, least: int = 0) -> Schema:
    """A list of so many."""
    return {"type": "array", "items": items, "maxItems": most} | ({"minItems": least} if least else {})


def fields(required: Mapping[str, Schema], others: Mapping[str, Schema] | None = None) -> Schema:
    """An object. `others` may be null."""
    properties = {**required, **{name: optional(s) for name, s in (others or {}).items()}}
    return {"type": "object", "properties": properties} | ({"required": list(required)} if required else {})


def any_of(*schemas: Schema) -> Schema:
    """One of some kinds of value."""
    return {"anyOf": list(schemas)}


def answer(required: Mapping[str, Schema], others: Mapping[str, Schema] | None = None) -> Schema:
    """An object whose `required` fields are always there."""
    return {"type": "object", "properties": {**required, **(others or {})}, "required": list(required)}


FLAG: Schema = {"type": "boolean"}
