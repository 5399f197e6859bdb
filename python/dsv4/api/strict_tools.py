"""Tools with `strict: true`.

OpenAI promises that their calls fit the tool's schema. The grammar of an answer sees to that (`text/call_grammar.py`), but for schemas
that no grammar can hold, so it is looked at once more: a call that does not fit is not
called finished. It is delivered as the model wrote it, the answer's `finish_reason` is `stop` in place of `tool_calls`, and
`strict_error` says what does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jsonschema_rs

from dsv4.errors import RequestError

MOST_WORK = 10**6
"""Schemas looked at for one call, at most: under a tenth of a second. A few lines of schema can ask for years."""

_LONGEST = 300
"""Characters of an error that are shown; it may quote the arguments."""
_BEGUN = -1
_BY_NAME = {"properties", "patternProperties"}
_FURTHER_IN = {
    "additionalProperties",
    "items",
    "prefixItems",
    "contains",
    "propertyNames",
    "unevaluatedProperties",
}
_DEFINITIONS = {"$defs", "definitions"}
_NO_SCHEMAS = {"enum", "const", "default", "examples"}


class StrictTools:
    """The schemas of a request's strict tools."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """`tools`: the request's. Raises RequestError for a strict tool whose parameters are no JSON Schema."""
        self._tools: dict[str, tuple[Any, dict[str, Any]]] = {}
        for i, tool in enumerate(tools):
            function, where = tool["function"], f"tools[{i}].function.parameters"
            schema = function.get("parameters")
            if not function.get("strict") or schema is None:
                continue
            try:
                _Work(schema).check()
                validator = jsonschema_rs.validator_for(schema, retriever=_outside)
            except (ValueError, RecursionError, jsonschema_rs.ReferencingError) as e:
                text = f"{where} is no JSON Schema, which a strict tool needs: {_first_line(e)}"
                raise RequestError(text, where, "invalid_value", 400) from None
            self._tools[function["name"]] = (validator, schema)

    def fault(self, calls: Iterable[tuple[str, str]]) -> str | None:
        """What does not fit, of calls given as (name, arguments as JSON); None where all do."""
        for i, (name, arguments) in enumerate(calls):
            if name in self._tools and (why := _fault(*self._tools[name], arguments)) is not None:
                return f"tool_calls[{i}].function.arguments does not fit the schema of {name}: {why}"
        return None


def _outside(uri: str) -> Any:
    """A schema's references never reach the network or a file."""
    raise ValueError(f"{uri[:80]} is outside the schema")


def _fault(validator: Any, schema: dict[str, Any], arguments: str) -> str | None:
    try:
        value = json.loads(arguments)
        depth, nodes = _extent(value)
        if _Work(schema).of(schema, depth) * nodes > MOST_WORK:
            return "it is too much work to check"
        error = next(iter(validator.iter_errors(value)), None)
    except RecursionError:
        return "it is too much work to check"
    except ValueError as e:
        error = e
    return None if error is None else _first_line(error)


def _extent(value: Any) -> tuple[int, int]:
    """(Levels, values) of a JSON value."""
    level, depth, nodes = [value], 0, 0
    while level:
        depth, nodes = depth + 1, nodes + len(level)
        level = [x for v in level if type(v) in (dict, list) for x in (v.values() if type(v) is dict else v)]
    return depth, nodes


def _inner(schema: Any) -> list[Any]:
    """The schemas that stand in a schema, or in a list of such."""
    if type(schema) is list:
        return schema
    found: list[Any] = []
    for word, value in schema.items() if type(schema) is dict else ():
        if type(value) is dict and (word in _BY_NAME or word in _DEFINITIONS):
            found += value.values()
        elif word not in _NO_SCHEMAS:
            found.append(value)
    return found


class _Work:
    """How many schemas a validator looks at, at most, for a value of so many levels."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._known: dict[tuple[int, int], int] = {}

    def check(self) -> None:
        """Raises ValueError for a reference that is not within the schema, or that leads back to itself without going
        further into the value: some validators fall over it."""
        level = [self._root]
        while level:
            for schema in level:
                self.of(schema, 0)
            level = [inner for schema in level for inner in _inner(schema)]

    def of(self, schema: Any, levels: int) -> int:
        """Raises ValueError for a reference that is not within the schema."""
        if type(schema) is list:
            return sum(self.of(s, levels) for s in schema)
        if type(schema) is not dict:
            return 0
        key = (id(schema), levels)
        if key not in self._known:
            self._known[key] = _BEGUN
            work = 1 + sum(self._word(w, v, levels) for w, v in schema.items())
            self._known[key] = min(work, MOST_WORK + 1)
        if self._known[key] == _BEGUN:
            raise ValueError("a reference leads back to itself")
        return self._known[key]

    def _word(self, word: str, value: Any, levels: int) -> int:
        if word in _NO_SCHEMAS or word in _DEFINITIONS:
            return 0
        if word in ("$ref", "$dynamicRef", "$recursiveRef"):
            return self.of(self._target(value), levels)
        if word in _BY_NAME or word in _FURTHER_IN:
            if not levels:
                return 0
            return self.of(
                list(value.values()) if word in _BY_NAME and type(value) is dict else value, levels - 1
            )
        return self.of(value, levels)

    def _target(self, reference: Any) -> Any:
        if type(reference) is not str or not (reference == "#" or reference.startswith("#/")):
            raise ValueError(f"the reference {str(reference)[:80]!r} does not begin with '#/'")
        found = self._root
        for part in reference[2:].split("/") if len(reference) > 1 else ():
            part = part.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(part) if type(found) is list else part]
            except (KeyError, IndexError, ValueError, TypeError):
                raise ValueError(f"there is nothing at the reference {reference[:80]!r}") from None
        return found


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
