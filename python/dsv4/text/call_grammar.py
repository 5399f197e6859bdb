"""The calls that an answer may hold, as rules of a grammar: exactly what `encode_chat` writes of calls.

What lies between two markers is one terminal, or several of which none begins another that goes on differently, as the lexer never
goes back. A strict tool's parameters come each at most once, in the order of its schema, and with values that fit; where no grammar
can say so the tool's calls have the form of all others, and `api/strict_tools.py` judges them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4.text.json_schema import rewritten, without_foreign_formats
from dsv4.text.lark import TEXT_RULES, Grammars, fault_of, json_grammar, pattern, quoted
from dsv4.text.tools import MAX_KEY

MOST_STRICT = 2**18
"""Characters of the schemas of strict tools that are made into rules, in all."""

_RULES = r"""
RAW: (ANY "</") & ~MARKED
NEXT: "\n<"
param: "parameter name=\"" KEY "\" string=\"" ("true\">" RAW | "false\">" json "</") mark "parameter>" more
more: NEXT mark param | "\n</" mark end
json: STRING | NUMBER | "true" | "false" | "null" | object | array
object: "{" SPACE? (member (SPACE? "," SPACE? member)*)? SPACE? "}"
member: STRING SPACE? ":" SPACE? json
array: "[" SPACE? (json (SPACE? "," SPACE? json)*)? SPACE? "]"
STRING: /"([^"\\\x00-\x1F]|\\["\\\/bfnrt]|\\u[0-9a-fA-F]{4})*"/ & ~MARKED
NUMBER: /-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,2})?/
SPACE: / |\n {0,20}/
"""


@dataclass(frozen=True, slots=True)
class Calls:
    """What may be called."""

    tools: Sequence[Mapping[str, Any]]
    """What the model sees, in OpenAI's shape."""
    must: bool = False
    """There has to be a call, and nothing but calls."""
    only: Sequence[str] | None = None
    """The tools that may be called; None for all."""
    several: bool = True
    inputs: Mapping[str, tuple[str, str] | None] = field(default_factory=dict)
    """Tools that take one text, `input`, and what it is: (`regex`, a pattern), (`lark`, a grammar that begins at `start`), or any."""

    def functions(self) -> list[Mapping[str, Any]]:
        """Those that may be called."""
        found = [tool.get("function") for tool in self.tools if isinstance(tool, Mapping)]
        named = [f for f in found if isinstance(f, Mapping) and isinstance(f.get("name"), str)]
        return [f for f in named if self.only is None or f["name"] in self.only]

    def rules(self, marker: str, head: str) -> tuple[str, Grammars]:
        """Rules for `calls`, and the grammars that they name. `marker`: the token that opens every tag; `head`: the terminal before the
        block's first."""
        functions, room = self.functions(), MOST_STRICT
        another = "NEXT mark call | " if self.several else ""
        rules = [
            f"mark: {marker}",
            f'calls: {head} mark "tool_calls>\\n<" mark call',
            f"call: {' | '.join(f't{i}' for i in range(len(functions)))}",
            f'end: "invoke>" ({another}"\\n</" mark "tool_calls>")',
            _RULES,
            f'KEY: /[^"\\n]{{1,{MAX_KEY}}}/ & ~MARKED',
        ]
        named: Grammars = []
        for i, function in enumerate(functions):
            begin = quoted(f'invoke name="{function["name"]}">\n')
            room -= len(json.dumps(function.get("parameters"))) if function.get("strict") else 0
            strict = _Strict.of(f"t{i}", function) if function.get("strict") and room > 0 else None
            if function["name"] in self.inputs:
                rules.append(
                    f't{i}: {begin} {_TEXT_HEAD} ({self._input(i, named)}) mark "parameter>\\n</" mark end'
                )
            elif strict is None:
                rules.append(f't{i}: {begin} ("<" mark param | "\\n</" mark end)')
            else:
                rules += [f"t{i}: {begin} t{i}_begin", *strict.rules()]
                named += strict.named
        return TEXT_RULES + "\n".join(rules), named

    def _input(self, i: int, named: Grammars) -> str:
        """The text of the i-th tool up to its closing marker, the grammar of which is added."""
        held = self.inputs[self.functions()[i]["name"]]
        if held is None:
            return "RAW"
        kind, value = held
        if (
            kind == "regex"
        ):  # in one terminal with what ends it, as a lexer that has begun with more does not go back
            named.append({"name": f"input{i}", "lark_grammar": f'start: INPUT\nINPUT: {pattern(value)} "</"'})
            return f"@input{i}"
        named.append({"name": f"input{i}", "lark_grammar": value})
        return f'@input{i} "</"'


_TEXT_HEAD = '"<" mark "parameter name=\\"input\\" string=\\"true\\">"'
_BESIDE = {"title", "description", "default", "examples", "$comment"}
"""Words that bar no value."""
_DEEPEST = 4
"""Unions within unions that are looked into."""
_ANY_TEXT = '"true\\">" RAW'
_OF_ROOT = _BESIDE | {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_OF_ROOT |= {"$schema", "$id", "strict", "x-guidance"}
_BESIDE_REF = {"$defs", "definitions", "$schema", "$id"}


@dataclass(slots=True)
class _Strict:
    """One strict tool. `name`: what its rules' names begin with; `keys`: its parameters, and `ways` the ways to write each."""

    name: str
    keys: list[str]
    required: set[str]
    ways: list[str] = field(default_factory=list)
    named: Grammars = field(default_factory=list)

    @classmethod
    def of(cls, name: str, function: Mapping[str, Any]) -> _Strict | None:
        """None where the schema is not that of an object with named parameters, or says what no grammar can."""
        root = without_foreign_formats(function.get("parameters"))
        if not isinstance(root, Mapping):
            return None
        # A schema that refers to itself, as pydantic writes it, is a reference beside its definitions.
        top = _followed({word: value for word, value in root.items() if word not in _BESIDE_REF}, root)
        if not isinstance(top, Mapping) or top.get("type", "object") != "object" or top.keys() - _OF_ROOT:
            return None
        properties, required = top.get("properties", {}), top.get("required") or []
        if not isinstance(properties, Mapping):
            return None
        if not isinstance(required, list) or any(key not in list(properties) for key in required):
            return None
        strict = cls(name, list(properties), set(required))
        for schema in properties.values():
            strict.ways.append(" | ".join(strict._values(schema, root)))
        return strict if all(strict.ways) and not any(map(fault_of, strict.named)) else None

    def rules(self) -> Iterator[str]:
        """`_begin`: behind the head. `_nK`: one of the parameters from K on; `_mK`: the same behind another one, or the end."""
        name, last = self.name, len(self.keys)
        close = '"\\n</" mark end'
        needed = max((k for k, key in enumerate(self.keys) if key in self.required), default=-1)
        first = [f'"<" mark {name}_n0'] if self.keys else []
        yield f"{name}_begin: " + " | ".join([*first, *([close] if needed < 0 else [])])
        for k in range(1, last + 1):
            ways = [f"NEXT mark {name}_n{k}"] if k < last else []
            yield f"{name}_m{k}: " + " | ".join([*ways, *([close] if needed < k else [])])
        for k, (key, ways) in enumerate(zip(self.keys, self.ways, strict=True)):
            skip = f" | {name}_n{k + 1}" if key not in self.required and k + 1 < last else ""
            head = quoted(f'parameter name="{key}" string="')
            yield f'{name}_n{k}: {head} ({ways}) mark "parameter>" {name}_m{k + 1}{skip}'

    def _values(self, schema: Any, root: Mapping[str, Any], depth: int = 0) -> list[str]:
        """Ways to write a value, up to its closing marker: as it is where it is any text or one of some, otherwise as JSON."""
        inner = _followed(schema, root)
        if isinstance(inner, Mapping) and depth < _DEEPEST:
            words = inner.keys() - _BESIDE
            if not words:
                return [_ANY_TEXT, *self._as_json(True, root)]
            if words == {"anyOf"} and isinstance(inner["anyOf"], list):
                return [way for option in inner["anyOf"] for way in self._values(option, root, depth + 1)]
            kinds = inner.get("type") if isinstance(inner.get("type"), list) else [inner.get("type")]
            if words == {"type"} and "string" in kinds:
                others = [kind for kind in kinds if kind != "string"]
                return [_ANY_TEXT, *(self._as_json({"type": others}, root) if others else [])]
            some = inner.get("enum", [inner["const"]] if "const" in inner else None)
            if words <= {"type", "enum", "const"} and isinstance(some, list):
                texts = [v for v in some if isinstance(v, str) and "｜DSML｜" not in v]
                others = [v for v in some if not isinstance(v, str)]
                fits = "type" not in inner or "string" in kinds
                ways = [quoted(f'true">{text}</') for text in texts if fits]
                rest = {"enum": others} | ({"type": kinds} if "type" in inner else {})
                return [*ways, *(self._as_json(rest, root) if others else [])]
        return self._as_json(schema, root)

    def _as_json(self, schema: Any, root: Mapping[str, Any]) -> list[str]:
        name = f"{self.name}_v{len(self.named)}"
        self.named.append({"name": name, **json_grammar(_alone(schema, root))})
        return [f'"false\\">" @{name} "</"']


def _followed(schema: Any, root: Mapping[str, Any]) -> Any:
    """What a schema that is a reference alone refers to; itself where that is not found."""
    found, hops = schema, 8
    while isinstance(found, Mapping) and isinstance(ref := found.get("$ref"), str) and hops:
        if found.keys() - _BESIDE != {"$ref"} or not ref.startswith("#/"):
            return schema
        found, hops = root, hops - 1
        for part in ref[2:].split("/"):
            found = (
                found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
            )
    return schema if found is None or not hops else found


def _alone(schema: Any, root: Mapping[str, Any]) -> Any:
    """A parameter's schema by itself: what refers to the root finds it among the definitions."""
    if '"$ref"' not in json.dumps(schema):
        return schema
    whole = {k: v for k, v in root.items() if k in ("type", "properties", "$defs", "definitions")}
    return {**rewritten(schema, _from_root), "$defs": {"root": rewritten(whole, _from_root)}}


def _from_root(word: str, value: Any) -> Any:
    """A reference led to `#/$defs/root`."""
    return f"#/$defs/root{value[1:]}" if word == "$ref" and isinstance(value, str) else value
