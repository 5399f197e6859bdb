"""The document at `/openapi.json` says what the server does: its routes, the fields that it reads, what it takes and refuses, and the shape
of its answers. `make test-tools` runs schemathesis with it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
from dsv4.api.known_fields import CHAT, COMPLETIONS, HONOURED, RESPONSES
from dsv4.api.openapi import OPERATIONS
from dsv4.text.tokenizer import Tokenizer
from starlette.routing import Route

from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

BODIES = sorted((Path(__file__).parent.parent / "data" / "clients").glob("*.json"))
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALLS = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">Paris'
    "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
BASES: dict[str, dict[str, Any]] = {
    path: dict(told.example)
    for (_, path), told in OPERATIONS.items()
    if told.example is not None and not path.startswith(("/beta/", "/admin/"))
}
HTTP = httpx.Client(timeout=60)


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    def script(prompt: Any) -> str:
        text = tokenizer.decode(list(prompt), skip_special=False)
        return ("Hm.</think>" if text.endswith("<think>") else "") + (
            CALLS if "get_weather" in text else "Two words."
        )

    with running(
        FakeEngine(script, tokenizer=tokenizer, max_model_len=32768), served_model_name=("dsv4",)
    ) as server:
        yield server


@pytest.fixture(scope="module")
def document(server: RunningServer) -> dict[str, Any]:
    answer = HTTP.get(server.url + "/openapi.json")
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    return answer.json()


def validator(document: dict[str, Any], schema: Any) -> Any:
    return jsonschema_rs.Draft202012Validator({**schema, "components": document["components"]})


def body_of(document: dict[str, Any], path: str) -> Any:
    return validator(document, schema_of(document, path))


def answer_of(document: dict[str, Any], path: str, answer: httpx.Response, method: str = "post") -> None:
    """The answer has a documented status and its shape."""
    told = document["paths"][path][method]["responses"][str(answer.status_code)]
    content = told["content"][answer.headers["content-type"].partition(";")[0]]
    text = answer.headers["content-type"].startswith("text/")
    validator(document, content["schema"]).validate(answer.text if text else answer.json())


def test_every_route_is_in_it(server: RunningServer) -> None:
    app = (
        server.server.config.loaded_app
        if hasattr(server.server.config, "loaded_app")
        else server.server.config.app
    )
    while not hasattr(app, "routes"):
        app = app.app
    routes = {
        (method.lower(), route.path.replace(":text", ""))
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or {"POST"}) - {"HEAD"}
    }
    assert routes == set(OPERATIONS)


@pytest.mark.parametrize(
    ("schema", "endpoint"),
    [("ChatRequest", CHAT), ("CompletionRequest", COMPLETIONS), ("ResponsesRequest", RESPONSES)],
)
def test_every_field_that_is_read_is_in_it(document: dict[str, Any], schema: str, endpoint: str) -> None:
    properties = document["components"]["schemas"][schema]["properties"]
    for name in HONOURED[endpoint]:
        outer, _, inner = name.partition(".")
        assert outer in properties, name
        assert not inner or inner in json.dumps(properties[outer]) or inner == "structural_tag", name


@pytest.mark.parametrize("path", BODIES, ids=lambda p: p.stem)
def test_recorded_bodies_fit_and_so_do_their_answers(
    server: RunningServer, document: dict[str, Any], path: Path
) -> None:
    recorded = json.loads(path.read_text(encoding="utf-8"))
    where, body = recorded["path"].partition("?")[0], recorded["body"] | {"stream": False}
    body_of(document, where).validate(body)
    answer_of(document, where, HTTP.post(server.url + where, json=body))


@pytest.mark.parametrize("path", BASES)
def test_answers_fit(server: RunningServer, document: dict[str, Any], path: str) -> None:
    """Whole, with thoughts, with calls, with probabilities, cut, refused."""
    inner = {"type": "function", **TOOL} if "responses" in path else {"function": TOOL, "type": "function"}
    inner = {"name": TOOL["name"], "input_schema": TOOL["parameters"]} if "messages" in path else inner
    bare = {k: v for k, v in BASES[path].items() if not k.startswith("max_")}
    for more in (
        {},
        {"max_tokens": 2, "max_output_tokens": 2} if "responses" not in path else {"max_output_tokens": 2},
        {"reasoning_effort": "high"}
        if "chat" in path
        else {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"reasoning": {"effort": "high"}, "include": ["reasoning.encrypted_content"]}
        if "responses" in path
        else {},
        {"tools": [inner]}
        if "complet" not in path or "chat" in path
        else {"logprobs": 2, "n": 2, "echo": True},
        {"logprobs": True, "top_logprobs": 2, "return_token_ids": True} if "chat" in path else {},
        {"model": "nobody"},
        {"messages": 5, "prompt": {}, "input": 5, "tokens": "x"},
    ):
        if path != "/v1/responses" and "max_output_tokens" in more:
            more = {"max_tokens": 2}
        answer_of(document, path, HTTP.post(server.url + path, json=bare | more))


def test_other_answers_fit(server: RunningServer, document: dict[str, Any]) -> None:
    for (method, path), _ in OPERATIONS.items():
        if path in BASES or "complet" in path:
            continue
        for part in ("dsv4", "pin-1", "page.css"):
            for headers in ({}, {"anthropic-version": "2023-06-01"}):
                url = server.url + path.replace("{id}", part).replace("{key}", part).replace("{name}", part)
                answer_of(document, path, HTTP.request(method.upper(), url, headers=headers), method)


ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2.0,
    1.5,
    2**31,
    1e300,
    "",
    "x",
    "x" * 3000,
    [],
    [1],
    ["x"],
    [None],
    {},
)
ODD += ({"type": "x"}, {"type": 5}, {"x": None}, [{}], {"5": 1}, {"5": "1"}, "low", "auto")
BETWEEN_FIELDS = {
    "task",
    "best_of",
    "min_tokens",
    "continue_final_message",
    "top_logprobs",
    "tool_choice",
    "regex",
}


@pytest.mark.parametrize("path", BASES)
def test_a_value_is_refused_where_the_document_says_so(
    server: RunningServer, document: dict[str, Any], path: str
) -> None:
    """Each documented field with each odd value: what does not fit is refused, and what fits is taken."""
    fits, wrong = body_of(document, path), []
    schema = document["components"]["schemas"][schema_of(document, path)["$ref"].rpartition("/")[2]]
    for either in schema.get("anyOf", [schema]):
        base = (
            BASES[path] if BASES[path].keys() & set(either.get("required", BASES[path])) else {"messages": HI}
        )
        named = {name for name, told in either["properties"].items() if told.keys() - {"description"}}
        for name, odd in itertools.product(sorted(named), ODD):
            body = base | {name: odd}
            answer = HTTP.post(server.url + path, json=body)
            assert answer.status_code in (200, 400, 404), (name, odd, answer.text)
            if fits.is_valid(body) != (answer.status_code != 400) and not beyond_schemas(name, answer):
                wrong.append((name, odd, answer.text[:150]))
    assert not wrong, "\n".join(map(str, wrong))


def beyond_schemas(name: str, answer: httpx.Response) -> bool:
    """Refused for what depends on other fields, or is more than a schema can say."""
    return answer.status_code == 400 and (
        name in BETWEEN_FIELDS or any(text in answer.text for text in CANNOT)
    )


CANNOT = ("no form that an answer can be held to", "it takes a grammar in Lark or GBNF")


def schema_of(document: dict[str, Any], path: str) -> Any:
    return document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def test_special_tokens_are_told(server: RunningServer) -> None:
    """And are one token each where they are tokenized, as lm-eval does."""
    told = HTTP.get(server.url + "/tokenizer_info").json()
    for name, token in (("bos_token", 0), ("eos_token", 1)):
        answer = HTTP.post(server.url + "/tokenize", json={"prompt": told[name], "add_special_tokens": False})
        assert answer.json()["tokens"] == [token]
