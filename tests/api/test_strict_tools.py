"""Strict tools: what fits, what does not, and that checking it is bounded work."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from dsv4.api.strict_tools import MOST_WORK, StrictTools
from dsv4.errors import RequestError
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine
from tests.support.serving import running

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": ["integer", "null"]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def tools(schema: Any, strict: Any = True) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": strict}}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ('{"city": "x", "days": 1}', None),
        ('{"city": "x", "days": null}', None),
        ('{"city": "x", "days": 123456789012345678901234567890}', None),
        ('{"city": "x"}', '"days" is a required property'),
        ('{"city": 3, "days": 1}', '3 is not of type "string"'),
        ('{"city": "x", "days": 1, "more": 2}', "'more' was unexpected"),
        ("[]", 'is not of type "object"'),
        ("{", "line 1"),
        ("[" * 100_000, "too much work"),
    ],
)
def test_arguments_against_a_schema(arguments: str, words: str | None) -> None:
    fault = StrictTools(tools(SCHEMA)).fault([("g", "{}"), ("f", arguments)])
    if words is None:
        assert fault is None
    else:
        assert fault is not None and words in fault and len(fault) < 500 and "\n" not in fault
        assert fault.startswith("tool_calls[1].function.arguments does not fit the schema of f: ")
    for strict in (False, None):
        assert StrictTools(tools(SCHEMA, strict)).fault([("f", arguments)]) is None


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "objekt"}, '"objekt"'),
        ({"properties": {"a": {"pattern": "("}}}, "regex"),
        ({"$ref": "file:///etc/hostname"}, "does not begin with '#/'"),
        ({"$ref": "http://127.0.0.1/x.json"}, "does not begin with '#/'"),
        ({"$ref": "#/$defs/none"}, "nothing at the reference"),
        ({"$ref": "#"}, "leads back to itself"),
        ({"not": {"$ref": "#"}}, "leads back to itself"),
        ({"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}]}}}, "leads back to itself"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "leads back to itself"),
        ({"$schema": "http://127.0.0.1:1/x.json"}, "127.0.0.1"),
        ({"$defs": {"a": {"$ref": "file:///etc/hostname"}}}, "file:///etc/hostname"),
    ],
)
def test_what_is_no_schema_is_refused_by_name(schema: dict, words: str) -> None:
    with pytest.raises(RequestError) as e:
        StrictTools(tools(schema))
    assert e.value.param == "tools[0].function.parameters" and words in e.value.message
    StrictTools(tools(schema, strict=False))


def test_parameters_may_have_any_name_and_default() -> None:
    names = ("$ref", "properties", "items", "enum", "$defs", "const")
    schema = {"properties": {n: {"type": "string", "default": {"$ref": "#/no"}} for n in names}}
    strict = StrictTools(tools(schema))
    for name in names:
        assert strict.fault([("f", json.dumps({name: "x"}))]) is None
        assert "3 is not" in str(strict.fault([("f", json.dumps({name: 3}))]))


def test_schemas_that_refer_to_themselves() -> None:
    tree = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#"}}},
        "required": ["name"],
    }
    value: dict[str, Any] = {"name": "leaf"}
    for _ in range(12):
        value = {"name": "branch", "children": [value, {"name": "leaf"}]}
    strict = StrictTools(tools(tree))
    assert strict.fault([("f", json.dumps(value))]) is None
    value["children"][0]["children"][0] = {}
    assert '"name" is a required property' in str(strict.fault([("f", json.dumps(value))]))


def doubling(n: int) -> dict[str, Any]:
    """Looked at 2 ** n times."""
    definitions: dict[str, Any] = {"a0": {"type": "object"}}
    for i in range(1, n + 1):
        definitions[f"a{i}"] = {"allOf": [{"$ref": f"#/$defs/a{i - 1}"}] * 2}
    return {"$defs": definitions, "$ref": f"#/$defs/a{n}"}


def deep_doubling(n: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {"a0": {"type": "object"}}
    for i in range(1, n + 1):
        inner = {"properties": {"a": {"$ref": f"#/$defs/a{i - 1}"}}}
        definitions[f"a{i}"] = {**inner, "allOf": [inner]}
    return {"$defs": definitions, "$ref": f"#/$defs/a{n}"}


@pytest.mark.parametrize(
    "schema", [doubling(60), deep_doubling(60), {"anyOf": [{"properties": {"a": {"$ref": "#"}}}] * 2}]
)
def test_too_much_work_is_not_begun(schema: dict) -> None:
    """It would take years."""
    value: dict[str, Any] = {}
    for _ in range(60):
        value = {"a": value}
    assert "too much work" in str(StrictTools(tools(schema)).fault([("f", json.dumps(value))]))
    flat = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}}
    many = json.dumps({"a": [1] * (MOST_WORK // 10)})
    assert StrictTools(tools(flat)).fault([("f", many)]) is None


CALL = (
    '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="%s" string="true">x</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">1</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


@pytest.mark.parametrize(
    ("parameter", "strict", "reason"),
    [
        ("city", True, "tool_calls"),
        ("town", True, "stop"),
        ("town", False, "tool_calls"),
        ("town", None, "tool_calls"),
    ],
)
def test_a_call_that_does_not_fit_is_not_called_finished(
    tokenizer: Tokenizer, parameter: str, strict: bool | None, reason: str
) -> None:
    """It is delivered all the same, whole and streamed."""
    with (
        running(FakeEngine(lambda prompt: CALL % parameter, tokenizer=tokenizer)) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client,
    ):
        ask: Any = {
            "model": "default",
            "messages": [{"role": "user", "content": "Hi"}],
            "tools": tools(SCHEMA, strict),
        }
        choice = client.chat.completions.create(**ask).choices[0]
        assert choice.finish_reason == reason
        call = (choice.message.tool_calls or [])[0]
        assert json.loads(call.function.arguments) == {parameter: "x", "days": 1}
        last = list(client.chat.completions.create(**ask, stream=True))[-1].choices[0]
        assert last.finish_reason == reason
        for found in (choice, last):
            error = (found.model_extra or {}).get("strict_error")
            assert (error is None) == (reason == "tool_calls"), error


def test_a_bad_schema_of_a_strict_tool_is_refused(tokenizer: Tokenizer) -> None:
    with (
        running(FakeEngine(tokenizer=tokenizer)) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client,
    ):
        ask: Any = {"model": "default", "messages": [{"role": "user", "content": "Hi"}]}
        with pytest.raises(openai.BadRequestError, match="no JSON Schema") as e:
            client.chat.completions.create(**ask, tools=tools({"type": "objekt"}))
        assert e.value.param == "tools[0].function.parameters"
        client.chat.completions.create(**ask, tools=tools({"type": "objekt"}, strict=False))
