"""JSON schemas, changed word by word."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_NAMED = {"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"}
"""Words with schemas by names, which may look like words."""
_VALUES = {"enum", "const", "default", "examples"}
"""Words with values, which may look like schemas."""

Change = Callable[[str, Any], Any]
"""Of a word and its value: what it is to be, or `LEFT_OUT`."""

LEFT_OUT = object()


def rewritten(schema: Any, change: Change) -> Any:
    """A schema, or a list of such, with every word as `change` has it."""
    if isinstance(schema, list):
        return [rewritten(s, change) for s in schema]
    if not isinstance(schema, Mapping):
        return schema
    made: dict[str, Any] = {}
    for word, value in schema.items():
        if word in _NAMED and isinstance(value, Mapping):
            made[word] = {name: rewritten(inner, change) for name, inner in value.items()}
        elif (new := change(word, value)) is not LEFT_OUT:
            made[word] = new if word in _VALUES else rewritten(new, change)
    return made


_FORMATS = (
    "date-time", "time", "date", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6", "uri", "uri-reference",
    "uri-template", "iri", "iri-reference", "uuid", "regex", "json-pointer", "relative-json-pointer",
)  # fmt: skip
"""Those that JSON Schema defines."""


def without_foreign_formats(schema: Any) -> Any:
    """Without other formats (`password`, `int64`, …), of which JSON Schema says that they bar nothing."""
    return rewritten(
        schema, lambda word, value: LEFT_OUT if word == "format" and value not in _FORMATS else value
    )
