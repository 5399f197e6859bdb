"""The tools of a chat as the output parser needs them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Schemas = Mapping[str, Mapping[str, Any]]
"""By tool, the JSON schemas of its parameters by name."""

MAX_NAME, MAX_KEY = 512, 256
"""Characters of a tool's name, and of a parameter's."""
_UNREADABLE = re.compile(r'["\n]|｜DSML｜|</?think>')


def can_be_called(name: str, most: int) -> bool:
    """Whether a name could be read back where the model calls the tool, or gives the parameter."""
    return 0 < len(name) <= most and not _UNREADABLE.search(name)


def properties_of(function: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The parameters of a tool by name, each with its schema; None where they have not the shape of one."""
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return properties if isinstance(properties, Mapping) else None


def shown_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[Mapping[str, Any]]:
    """Every tool that a chat's prompt shows to the model: the request's, and those that its messages bring along. Where
    there is one, calls in the answer are calls."""
    brought = [m.get("tools") for m in messages if m.get("role") in ("system", "developer")]
    return [*(tools or ()), *(tool for own in brought if isinstance(own, (list, tuple)) for tool in own)]


def schemas_of(tools: Sequence[Any]) -> Schemas:
    """Parameters by tool; what has not the shape of a tool is left out."""
    schemas: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping) and (properties := properties_of(function)) is not None:
            schemas.setdefault(str(function.get("name")), properties)
    return schemas


def takes_text(schemas: Schemas, tool: str, parameter: str) -> bool:
    """Whether a parameter may be a string; yes where nothing says otherwise."""
    return _may_be_text(schemas.get(tool, {}).get(parameter))


def _may_be_text(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return True
    kind = schema.get("type")
    if kind is not None:
        return "string" in (kind if isinstance(kind, (list, tuple)) else (kind,))
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), (list, tuple)):
            return any(_may_be_text(option) for option in schema[key])
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return not isinstance(values, (list, tuple)) or any(isinstance(v, str) for v in values)
