"""What bodies of every dialect ask for as a form of the answer, tried on the grammar that reaches the engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from dsv4.engine.grammars import Grammars
from dsv4.sampling import Grammar
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import EOS, FakeEngine, small_tokenizer
from tests.support.serving import RunningServer, running

CHAT, COMPLETIONS, MESSAGES, RESPONSES = "chat/completions", "completions", "messages", "responses"
HELLO = [{"role": "user", "content": "Hello"}]
BASES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    COMPLETIONS: {"prompt": "Hello"},
    MESSAGES: {"messages": HELLO, "max_tokens": 20},
    RESPONSES: {"input": "Hello"},
}
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}
FUNCTION = {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}, {"type": "function", "function": {"name": "stop"}}]
FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]
ANTHROPIC = [
    {"name": "look", "input_schema": FUNCTION["parameters"]},
    {"name": "stop", "input_schema": {"type": "object"}},
]


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    with running(FakeEngine(tokenizer=tokenizer)) as server, httpx.Client(base_url=server.url) as server.http:
        yield server


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(small_tokenizer, 8192, [EOS])


class Asked:
    """A request that was taken, and which answers its grammar takes."""

    def __init__(
        self, server: RunningServer, grammars: Grammars, endpoint: str, body: dict[str, Any]
    ) -> None:
        answer = server.http.post(f"/v1/{endpoint}", json={**BASES[endpoint], **body})
        assert answer.status_code == 200, answer.text
        self.grammar: Grammar | None = server.engine.seen[-1].params.grammar
        self._grammars, self._tokenizer = grammars, small_tokenizer()

    def takes(self, text: str) -> bool:
        """A whole answer, special tokens recognised."""
        assert self.grammar is not None
        matcher = self._grammars.constraint(self.grammar, ends=[EOS], least=0).matcher
        ids = self._tokenizer.encode(text)
        return matcher.validate_tokens([*ids, EOS]) == len(ids) + 1


def call_of(name: str, *parameters: str) -> str:
    return f'<｜DSML｜invoke name="{name}">\n' + "\n".join(parameters) + "\n</｜DSML｜invoke>"


def block(*calls: str) -> str:
    return "\n\n<｜DSML｜tool_calls>\n" + "\n".join(calls) + "\n</｜DSML｜tool_calls>"


LOOK = call_of("look", '<｜DSML｜parameter name="at" string="true">the sky</｜DSML｜parameter>')
STOP = call_of("stop")

FORMATS: dict[str, tuple[list[str], dict[str, Any], str, str]] = {
    "json_schema": ([CHAT, COMPLETIONS], {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}}, '{"n": 1}', '{"n": "1"}'),
    "json_object": ([CHAT, COMPLETIONS], {"response_format": {"type": "json_object"}}, '{"a": [null]}', "[1]"),
    "json_object with a schema": ([CHAT], {"response_format": {"type": "json_object", "schema": SCHEMA}}, '{"n": 1}', "{}"),
    "guided_json": ([CHAT, COMPLETIONS], {"guided_json": SCHEMA}, '{"n": 1}', "{}"),
    "guided_json as text": ([CHAT], {"guided_json": json.dumps(SCHEMA)}, '{\n  "n": 1\n}', "{}"),
    "guided_regex": ([CHAT, COMPLETIONS], {"guided_regex": "[0-9]{3}"}, "123", "1234"),
    "guided_choice": ([CHAT, COMPLETIONS], {"guided_choice": ["yes", 'a "no"\n']}, 'a "no"\n', "ye"),
    "guided_grammar": ([CHAT, COMPLETIONS], {"guided_grammar": 'start: "a" B\nB: /b+/'}, "abb", "a"),
    "guided_grammar in GBNF": ([CHAT], {"guided_grammar": 'root ::= "a" b\nb ::= [0-9]'}, "a1", "a"),
    "structured_outputs": ([CHAT, COMPLETIONS], {"structured_outputs": {"choice": ["yes", "no"]}}, "no", "yesno"),
    "structured_outputs json": ([CHAT], {"structured_outputs": {"json": SCHEMA}}, '{"n": 1}', "{}"),
    "SGLang's json_schema": ([CHAT], {"json_schema": json.dumps(SCHEMA)}, '{"n": 1}', "{}"),
    "SGLang's regex": ([CHAT], {"regex": "a|b"}, "b", "c"),
    "SGLang's ebnf": ([CHAT], {"ebnf": 'root ::= "a"'}, "a", "b"),
    "llama.cpp's grammar": ([COMPLETIONS], {"grammar": 'root ::= ("a" | "b")+'}, "abba", "c"),
    "Ollama's format": ([CHAT], {"format": "json"}, "{}", "1"),
    "formats that JSON Schema has not": ([CHAT], {"guided_json": {"type": "array", "items": {"type": "string", "format": "password"}}}, '["x"]', "[1]"),
    "a property called format": ([CHAT], {"guided_json": {"properties": {"format": {"const": 1}}, "required": ["format"]}}, '{"format": 1}', "{}"),
    "text.format": ([RESPONSES], {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}, '{"n": 1}', "{}"),
    "output_format": ([MESSAGES], {"output_format": {"type": "json_schema", "schema": SCHEMA}}, '{"n": 1}', "{}"),
    "output_config": ([MESSAGES], {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, '{"n": 1}', "{}"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_form_by_any_name(server: RunningServer, grammars: Grammars, name: str) -> None:
    endpoints, body, good, bad = FORMATS[name]
    for endpoint in endpoints:
        asked = Asked(server, grammars, endpoint, body)
        assert (
            asked.takes(good)
            and not asked.takes(bad)
            and not asked.takes("")
            and not asked.takes(f"So: {good}")
        )


def test_thoughts_come_before_the_form(server: RunningServer, grammars: Grammars) -> None:
    body = {"guided_regex": "[0-9]+", "thinking": {"type": "enabled"}}
    asked = Asked(server, grammars, CHAT, body)
    assert asked.takes("Hm, 12 or 13?</think>13") and asked.takes("</think>13")
    assert not asked.takes("13") and not asked.takes("Hm</think>") and not asked.takes("Hm</think>x")


def test_a_form_beside_tools(server: RunningServer, grammars: Grammars) -> None:
    """An answer has it, unless it calls."""
    asked = Asked(server, grammars, CHAT, {"guided_choice": ["yes"], "tools": TOOLS})
    assert (
        asked.takes("yes")
        and asked.takes(block(LOOK))
        and not asked.takes("no")
        and not asked.takes("yes" + block(LOOK))
    )


CHOICES: dict[str, tuple[str, dict[str, Any], tuple[bool, bool, bool, bool]]] = {
    # text, a call of look, a call of stop, both
    "auto": (CHAT, {"tools": TOOLS}, (True, True, True, True)),
    "one at most": (CHAT, {"tools": TOOLS, "parallel_tool_calls": False}, (True, True, True, False)),
    "required": (CHAT, {"tools": TOOLS, "tool_choice": "required"}, (False, True, True, True)),
    "named": (CHAT, {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "look"}}}, (False, True, False, False)),
    "allowed": (CHAT, {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "stop"}}]}}}, (True, False, True, False)),
    "Anthropic's auto": (MESSAGES, {"tools": ANTHROPIC}, (True, True, True, True)),
    "Anthropic's any": (MESSAGES, {"tools": ANTHROPIC, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}, (False, True, True, False)),
    "Anthropic's tool": (MESSAGES, {"tools": ANTHROPIC, "tool_choice": {"type": "tool", "name": "stop"}}, (False, False, True, False)),
    "Responses, required": (RESPONSES, {"tools": FLAT, "tool_choice": "required"}, (False, True, True, True)),
    "Responses, named": (RESPONSES, {"tools": FLAT, "tool_choice": {"type": "function", "name": "look"}}, (False, True, False, False)),
    "Responses, allowed": (RESPONSES, {"tools": FLAT, "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "stop"}]}}, (False, False, True, False)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_calls(server: RunningServer, grammars: Grammars, name: str) -> None:
    endpoint, body, wanted = CHOICES[name]
    asked = Asked(server, grammars, endpoint, body)
    answers = ("Well, <b> is bold.", block(LOOK), block(STOP), block(LOOK, STOP))
    assert tuple(map(asked.takes, answers)) == wanted
    assert asked.takes("Let me see." + block(LOOK)) == (wanted[0] and wanted[1])
    for damaged in (
        block(LOOK).replace("tool_calls", "calls"),
        block(LOOK)[:-10],
        block(call_of("other")),
        block(LOOK) + " Done.",
        LOOK,
        block(LOOK.replace('string="true"', 'string="false"')),
        block(LOOK.replace(' string="true"', "")),
    ):
        assert not asked.takes(damaged), damaged


def test_strict_arguments(server: RunningServer, grammars: Grammars) -> None:
    parameters = {
        "type": "object",
        "properties": {
            "what": {"enum": ["a", "b", 1]},
            "n": {"$ref": "#/$defs/few"},
            "note": {"type": ["string", "null"]},
            "at": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "day": {"type": "string", "pattern": "^[0-9]{2}$"},
            "key": {"type": "string", "format": "password"},
        },
        "required": ["what", "note"],
        "additionalProperties": False,
        "$defs": {"few": {"type": "integer", "minimum": 1, "maximum": 3}},
    }
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}
    asked = Asked(server, grammars, CHAT, {"tools": [tool]})

    def takes(*pairs: tuple[str, str]) -> bool:
        rows = [f'<｜DSML｜parameter name="{k}" string={v}</｜DSML｜parameter>' for k, v in pairs]
        return asked.takes(block(call_of("f", *rows)))

    what, note = ("what", '"true">a'), ("note", '"true">any <text>\n')
    assert takes(what, note) and takes(("what", '"false">1'), ("note", '"false">null'))
    assert takes(what, ("n", '"false">3'), note, ("at", '"true">x'), ("day", '"false">"31"'))
    assert takes(what, note, ("at", '"false">null'), ("key", '"true">secret'))
    assert not takes() and not takes(what) and not takes(note) and not takes(note, what)
    assert not takes(("what", '"true">c'), note) and not takes(what, ("n", '"false">4'), note)
    assert not takes(what, what, note) and not takes(what, note, ("more", '"true">x'))
    assert not takes(what, note, ("day", '"false">"x"')) and not takes(what, ("note", '"false">7'))


def test_a_strict_schema_may_be_a_reference_to_one_that_holds_itself(
    server: RunningServer, grammars: Grammars
) -> None:
    node = {
        "type": "object",
        "properties": {
            "n": {"type": "integer"},
            "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
        },
        "required": ["n", "next"],
        "additionalProperties": False,
    }
    parameters = {"$defs": {"Node": node}, "$ref": "#/$defs/Node"}
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}
    asked = Asked(server, grammars, CHAT, {"tools": [tool]})

    def takes(*pairs: tuple[str, str]) -> bool:
        rows = [f'<｜DSML｜parameter name="{k}" string="false">{v}</｜DSML｜parameter>' for k, v in pairs]
        return asked.takes(block(call_of("f", *rows)))

    assert takes(("n", "1"), ("next", "null")) and takes(("n", "1"), ("next", '{"n": 2, "next": null}'))
    assert not takes(("n", "1")) and not takes(("n", "1"), ("next", '{"n": 2}')) and not takes(("m", "1"))


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {"at": {"type": "array", "uniqueItems": True}}},
        {"$ref": "#/$defs/any", "$defs": {"any": True}},
    ],
)
def test_a_strict_tool_that_no_grammar_holds_is_called_like_any_other(
    server: RunningServer, grammars: Grammars, parameters: dict[str, Any]
) -> None:
    tool = {"type": "function", "function": {"name": "look", "strict": True, "parameters": parameters}}
    asked = Asked(server, grammars, CHAT, {"tools": [tool]})
    assert asked.takes(block(LOOK)) and not asked.takes(block(STOP))


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [(CHAT, {}), (CHAT, {"tools": TOOLS, "tool_choice": "none"}), (COMPLETIONS, {}), (MESSAGES, {}), (RESPONSES, {}),
     (CHAT, {"response_format": {"type": "text"}}), (CHAT, {"guided_json_object": False, "structured_outputs": {}})],
)  # fmt: skip
def test_without_a_wish_there_is_no_grammar(
    server: RunningServer, grammars: Grammars, endpoint: str, body: dict[str, Any]
) -> None:
    assert Asked(server, grammars, endpoint, body).grammar is None


DEEP: Any = {"type": "integer"}
for _ in range(70):
    DEEP = {"type": "array", "items": DEEP}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"guided_json": {"type": "foo"}}, "guided_json", "no form that an answer can be held to: Invalid type: foo"),
        ({"guided_json": "{"}, "guided_json", "no JSON"),
        ({"guided_json": 7}, "guided_json", "takes a JSON schema"),
        ({"guided_json": DEEP}, "guided_json", "nests 72 levels deep; the limit is 64"),
        ({"guided_json": {"enum": ["x" * 2**18]}}, "guided_json", "the limit is 262144"),
        ({"guided_json": {"$ref": "http://127.0.0.1/x"}}, "guided_json", "no form"),
        ({"guided_json": False}, None, ""),
        ({"guided_choice": ["<thinking>", "", "a\n"]}, None, ""),
        ({"guided_json": {"properties": {"const": {"description": "<think>", "type": "string"}}}}, None, ""),
        ({"guided_json": {"type": "string", "format": "json-pointer"}}, "guided_json", "Unknown format: json-pointer"),
        ({"guided_json": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}, "guided_json", "write anyOf"),
        ({"guided_regex": "("}, "guided_regex", "no form"),
        ({"guided_regex": "(?=a)b"}, "guided_regex", "look-around"),
        ({"guided_choice": []}, "guided_choice", "at least one text"),
        ({"guided_choice": ["<think>"]}, "guided_choice[0]", "is '<think>', of which a chat shows ''"),
        ({"guided_choice": ["no", "yes</think>"]}, "guided_choice[1]", "of which a chat shows 'yes'"),
        ({"guided_choice": ["<｜DSML｜"]}, "guided_choice[0]", "use /v1/completions"),
        ({"guided_choice": ["\nyes"]}, "guided_choice[0]", "newlines at the start"),
        ({"structured_outputs": {"choice": ["<think>"]}}, "structured_outputs.choice[0]", "'<think>'"),
        ({"guided_json": {"const": "<think>"}}, "guided_json.const", "of which a chat shows"),
        ({"guided_json": {"properties": {"const": {"enum": [1, "</think>"]}}}}, "guided_json.properties.const.enum[1]", "shows"),
        ({"guided_json": {"$defs": {"a": {"anyOf": [{"const": {"<think>": 1}}]}}}}, "guided_json.$defs.a.anyOf[0].const", "shows"),
        ({"guided_choice": ["a", 7]}, "guided_choice[1]", "7"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar", "unknown name"),
        ({"guided_grammar": "x"}, "guided_grammar", "Lark or GBNF"),
        ({"response_format": {"type": "json_schema"}}, "response_format.schema", "missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema", "missing"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "send one of them"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "takes nothing"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "lok"}}}, "tool_choice.function.name", "'look'"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"guided_regex": "a", "messages": [*HELLO, {"role": "assistant", "content": "x", "prefix": True}]}, "guided_regex", "continued"),
    ],
)  # fmt: skip
def test_refusals(server: RunningServer, body: dict[str, Any], param: str | None, words: str) -> None:
    before = len(server.engine.seen)
    answer = server.http.post("/v1/chat/completions", json={"messages": HELLO, **body})
    if param is None:
        assert answer.status_code == 200
        return
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert words in error["message"] and "\n" not in error["message"] and len(error["message"]) < 500
    assert len(server.engine.seen) == before


def test_a_completion_may_be_markup(server: RunningServer, grammars: Grammars) -> None:
    """Its text is shown as it is."""
    assert Asked(server, grammars, COMPLETIONS, {"guided_choice": ["<think>"]}).grammar is not None


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, MESSAGES, RESPONSES])
def test_a_form_that_cannot_be_followed_ends_its_answer(tokenizer: Tokenizer, endpoint: str) -> None:
    """It is the request's own and would fail again: no fault of the server, after which clients try once more by themselves."""
    why = "guided_regex could not be followed any further: too many states"
    engine = FakeEngine(tokenizer=tokenizer, fail_after=2, failure=(why, "guided_regex"))
    with running(engine) as server:
        url, body = f"{server.url}/v1/{endpoint}", BASES[endpoint]
        whole, streamed = httpx.post(url, json=body), httpx.post(url, json=body | {"stream": True})
    error = whole.json()["error"]
    assert (whole.status_code, error["type"], error["message"]) == (400, "invalid_request_error", why)
    if endpoint != MESSAGES:  # Anthropic's errors have neither
        assert (error["param"], error["code"]) == ("guided_regex", "form_failed")
    assert why in streamed.text and "server_error" not in streamed.text and "api_error" not in streamed.text
