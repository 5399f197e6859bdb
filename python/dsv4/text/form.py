"""The form that an answer is to have, as a grammar for llguidance: JSON by a schema, a regular expression, Lark, one of several texts;
in a chat after the thoughts, and beside the calls of tools.

A chat in which tools are shown always has a grammar, so no call can be malformed: the answer is text up to the first `<｜DSML｜`,
and from there on exactly what `encode_chat` writes of calls. What lies between two markers is one terminal or several of which
none begins another that goes on differently, as the lexer never goes back. The marker spelled in letters is no text anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llguidance import LLMatcher

from dsv4.text.tokenizer import Tokenizer

SPACES = r" |\n {0,20}"
"""Blanks between two tokens of JSON: none, one, or a new line that is indented. Without a bound a model may write nothing else."""

_JSON_OPTIONS = {"whitespace_pattern": SPACES}

_COMMON = r"""
TEXT: ANY & ~MARKED
RAW: (ANY "</") & ~MARKED
ANY: /(?s:.*)/
MARKED: /(?s:.*)｜DSML｜(?s:.*)/
"""
_ANY_JSON = r"""
json: STRING | NUMBER | "true" | "false" | "null" | object | array
object: "{" SPACE? (member (SPACE? "," SPACE? member)*)? SPACE? "}"
member: STRING SPACE? ":" SPACE? json
array: "[" SPACE? (json (SPACE? "," SPACE? json)*)? SPACE? "]"
STRING: /"([^"\\\x00-\x1F]|\\["\\\/bfnrt]|\\u[0-9a-fA-F]{4})*"/ & ~MARKED
NUMBER: /-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,2})?/
SPACE: / |\n {0,20}/
KEY: /[^"\n<>｜]{1,256}/
"""


@dataclass(frozen=True, slots=True)
class Format:
    """What a whole answer, or what comes after its thoughts, is to be."""

    kind: Literal["json", "regex", "lark", "choice"]
    value: Any
    """A JSON schema, a pattern, a Lark grammar that begins at `start`, or a list of texts."""
    field: str
    """Of the request."""

    def grammar(self) -> dict[str, Any]:
        """As an entry of llguidance's list of grammars."""
        if self.kind == "json":
            return {"json_schema": _with_options(self.value)}
        if self.kind == "regex":
            made = json.loads(LLMatcher.grammar_from_regex(self.value))
            return {"lark_grammar": made["grammars"][0]["lark_grammar"]}
        if self.kind == "choice":
            return {"lark_grammar": "start: " + " | ".join(_quoted(text) for text in self.value)}
        return {"lark_grammar": self.value}

    def fault(self) -> str | None:
        """Why it is no grammar; None where it is one. It may take milliseconds."""
        return _fault(self.grammar())

    def text(self) -> str:
        """For an answer that is nothing else."""
        return _listed([self.grammar()])


@dataclass(frozen=True, slots=True)
class Calls:
    """The calls that an answer may hold."""

    tools: Sequence[Mapping[str, Any]]
    """What the model sees, in OpenAI's shape."""
    must: bool = False
    """There has to be one, and nothing but calls."""
    only: Sequence[str] | None = None
    """The tools that may be called; None for all."""
    several: bool = True

    def grammar(self, marker: str, head: str) -> tuple[str, list[dict[str, Any]]]:
        """Rules for `calls`, and the grammars they name. `head`: the terminal before the block's marker."""
        functions = [_function(tool) for tool in self.tools]
        functions = [f for f in functions if f and (self.only is None or f["name"] in self.only)]
        rules = [f'calls: {head} {marker} "tool_calls>\\n<" {marker} call']
        rules.append(f"call: {' | '.join(f't{i}' for i in range(len(functions)))}")
        end = f'"\\n</" {marker} "tool_calls>"'
        rules.append(f'end: "invoke>" ({f"NEXT {marker} call | " if self.several else ""}{end})')
        rules.append('NEXT: "\\n<"')
        rules.append(
            f'param: "parameter name=\\"" KEY "\\" string=\\"" ("true\\">" RAW | "false\\">" json "</") {marker} "parameter>" more'
        )
        rules.append(f'more: NEXT {marker} param | "\\n</" {marker} end')
        named: list[dict[str, Any]] = []
        for i, function in enumerate(functions):
            begin = (
                f'"invoke name=" {_quoted(json.dumps(function["name"], ensure_ascii=False) + ">" + chr(10))}'
            )
            begin = _quoted(f'invoke name="{function["name"]}">\n')
            strict = list(_strict(i, function, marker, named)) if function.get("strict") else None
            if strict is None or not strict:
                rules.append(f't{i}: {begin} ("<" {marker} param | "\\n</" {marker} end)')
            else:
                rules += [f"t{i}: {begin} t{i}_begin", *strict]
        return "\n".join(rules), named


def chat_grammar(
    tokenizer: Tokenizer, *, thinking: bool, format: Format | None = None, calls: Calls | None = None
) -> str | None:
    """The grammar of an answer that begins in thoughts or not; None where every answer will do. Raises ValueError where a call must
    come and the tokenizer has no token for it."""
    marker, end_think = tokenizer.find("｜DSML｜"), tokenizer.find("</think>")
    if calls is not None and marker is None:
        if calls.must:
            raise ValueError("the model's tokenizer has no token for calls")
        calls = None
    if format is None and calls is None:
        return None
    if thinking and end_think is None:
        raise ValueError("the model's tokenizer has no token that ends thoughts")
    rules, grammars, ways = [_COMMON], [], []
    if format is not None:
        grammars.append({"name": "form", **format.grammar()})
        ways.append("@form")
    elif calls is not None and not calls.must:
        ways.append("TEXT")
    if calls is not None:
        free = not calls.must and format is None
        rules.append('HEAD: (ANY "<") & ~MARKED' if free else r"HEAD: /\n{0,2}</")
        text, named = calls.grammar(f"<[{marker}]>", "HEAD")
        rules += [text, _ANY_JSON]
        grammars += named
        ways.append("calls")
    rules.append("answer: " + " | ".join(ways))
    if not thinking:
        start = "start: answer"
    else:
        # Where the answer may be empty the thoughts may be all there is.
        start = f"start: TEXT <[{end_think}]> answer" + (" | TEXT" if "TEXT" in ways else "")
    return _listed([{"lark_grammar": "\n".join([start, *rules])}, *grammars])


def _listed(grammars: list[dict[str, Any]]) -> str:
    return json.dumps({"grammars": grammars}, ensure_ascii=False)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _with_options(schema: Any) -> Any:
    """`true` is a schema as well."""
    return {**(schema if isinstance(schema, Mapping) else {}), "x-guidance": _JSON_OPTIONS}


def _fault(grammar: Mapping[str, Any]) -> str | None:
    failed, messages = LLMatcher.validate_grammar_with_warnings(_listed([dict(grammar)]))
    return " ".join(messages[0].split()) if failed else None


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function")
    return function if isinstance(function, Mapping) and function.get("name") else {}


# Strict tools: each parameter at most once and in the order of the schema.


def _strict(
    number: int, function: Mapping[str, Any], marker: str, named: list[dict[str, Any]]
) -> Iterator[str]:
    """Rules from behind the head of a call on; none where the schema is not one of an object with named parameters, or says
    what no grammar can."""
    root = function.get("parameters")
    properties = root.get("properties") if isinstance(root, Mapping) else None
    if (
        not isinstance(properties, Mapping)
        or _more_than_properties(root)
        or not all(map(_is_key, properties))
    ):
        return
    values = [_value(f"a{number}_{k}", schema, root) for k, schema in enumerate(properties.values())]
    grammars = [grammar for _, grammar in values if grammar is not None]
    required = set(root.get("required") or ())
    if not required <= properties.keys() or any(_fault(g) for g in grammars):
        return
    named += grammars
    rule, keys = f"t{number}", list(properties)
    needed = max((k for k, key in enumerate(keys) if key in required), default=-1)
    for k in range(len(keys) + 1):
        ways = [f"NEXT {marker} {rule}_n{k}"] if k < len(keys) else []
        ways += [f'"\\n</" {marker} end'] if k > needed else []
        yield f"{rule}_m{k}: {' | '.join(ways)}"
    ways = [f'"<" {marker} {rule}_n0'] if keys else []
    yield f"{rule}_begin: " + " | ".join([*ways, *([f'"\\n</" {marker} end'] if needed < 0 else [])])
    for k, (key, (value, _)) in enumerate(zip(keys, values, strict=True)):
        skip = f" | {rule}_n{k + 1}" if key not in required and k + 1 < len(keys) else ""
        yield f"{rule}_n{k}: {rule}_p{k}{skip}"
        head = _quoted(f'parameter name="{key}" string="')
        yield f'{rule}_p{k}: {head} {value} {marker} "parameter>" {rule}_m{k + 1}'


_PLAIN = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id", "x-guidance"} | {
    "title", "description", "default", "examples", "$comment", "strict",
}  # fmt: skip


def _more_than_properties(root: Mapping[str, Any]) -> bool:
    return bool(root.keys() - _PLAIN) or root.get("type", "object") != "object"


def _is_key(key: str) -> bool:
    return bool(key) and not set('"\n<>｜') & set(key)


_OF_TEXT = {"type", "title", "description", "default", "examples", "$comment"}
_OF_CHOICE = _OF_TEXT | {"enum", "const"}


def _value(name: str, schema: Any, root: Mapping[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """The rest of a parameter up to its closing marker, and the grammar of the JSON that it names. Text is written as it is where
    no more is asked of it than its length, or that it is one of some; otherwise as JSON, which may be a string too."""
    if isinstance(schema, Mapping):
        kind, some = schema.get("type"), schema.get("enum", [schema["const"]] if "const" in schema else None)
        plain = (
            isinstance(some, list) and some and all(isinstance(v, str) and "｜DSML｜" not in v for v in some)
        )
        if plain and schema.keys() <= _OF_CHOICE:
            return "(" + " | ".join(_quoted(f'true">{v}</') for v in some) + ")", None
        if kind == "string" and schema.keys() <= _OF_TEXT:
            return '"true\\">" RAW', None
    grammar = {"name": name, "json_schema": _with_options(_moved(schema, root))}
    return f'"false\\">" @{name} "</"', grammar


def _moved(schema: Any, root: Mapping[str, Any]) -> Any:
    """A parameter's schema by itself: what refers to the root finds it among the definitions."""
    text = json.dumps(schema)
    if '"$ref"' not in text:
        return schema
    whole = {k: v for k, v in root.items() if k in ("properties", "$defs", "definitions", "type")}
    return {**_redirected(schema), "$defs": {"root": _redirected(whole)}}


def _redirected(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_redirected(s) for s in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        k: f"#/$defs/root{v[1:]}"
        if k == "$ref" and isinstance(v, str)
        else v
        if k in ("enum", "const", "default", "examples")
        else _redirected(v)
        for k, v in schema.items()
    }
