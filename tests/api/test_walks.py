"""Walks over everything there is: every route without a key, every numeric field of every body with extreme values. Both lists come from the
server itself, so that what is added is walked too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from dsv4.api.keys import hash_of
from dsv4.api.openapi import OPERATIONS, document
from dsv4.api.service import Service
from dsv4.config import ServerConfig
from dsv4.text.tokenizer import Tokenizer
from starlette.routing import Route

from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

OPEN = {"/health", "/page/{name}"}
"""What needs no key: probes, and the page, which holds nothing."""

BASES: dict[str, dict[str, Any]] = {
    path: dict(told.example) for (_, path), told in OPERATIONS.items() if told.example is not None
}
EXTREMES = (
    *(
        b"-9223372036854775809",
        b"-2147483649",
        b"-1",
        b"0",
        b"-0.0",
        b"1",
        b"2147483648",
        b"9007199254740993",
    ),
    *(b"9223372036854775808", b"18446744073709551616", b"1e308", b"-1e308", b"5e-324", b"1e999", b"1.5"),
    *(b"NaN", b"Infinity", b"9" * 400, b'"1"', b'""', b"null", b"[]", b"{}", b"true", b"[1]"),
)


def routes_of(server: RunningServer) -> Iterator[Route]:
    app: Any = server.server.config.app
    while not hasattr(app, "routes"):
        app = app.app
    return (route for route in app.routes if isinstance(route, Route))


def test_every_route_without_a_key(tokenizer: Tokenizer, tmp_path: Any) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[tenants.t]\nkeys = ["{hash_of("right")}"]\n')
    with running(FakeEngine(tokenizer=tokenizer), keys_file=str(file), admin_key="boss") as server:
        engine, walked = server.engine, 0
        with httpx.Client(base_url=server.url, timeout=60) as http:
            for route in routes_of(server):
                path = route.path.replace("{name:text}", "{name}").replace("{key:text}", "{key}")
                for method in {
                    *(route.methods or {"POST"}),
                    "GET",
                    "HEAD",
                    "POST",
                    "PUT",
                    "PATCH",
                    "OPTIONS",
                }:
                    for key in (None, "wrong", "righ", "rightx", "Bearer right"):
                        walked += 1
                        headers = {} if key is None else {"x-api-key": key}
                        where = path.replace("{id:text}", "x").replace("{", "").replace("}", "")
                        got = http.request(method, where, headers=headers)
                        if path in OPEN:
                            assert got.status_code in (200, 404, 405), (method, path)
                        else:
                            assert got.status_code == 401, (method, path, key, got.text[:200])
            for odd in (
                "//v1/models",
                "/v1/%6dodels",
                "/v1/models/",
                "/./v1/models",
                "/nothing",
                "/admin/../metrics",
            ):
                assert http.get(odd).status_code == 401, odd
            assert http.get("/v1/models", headers={"x-api-key": "right"}).status_code == 200
            page = http.get("/", headers={"accept": "text/html"})
            assert page.status_code == 200 and "dsv4" in page.text and "tiny" not in page.text
        assert walked > 100 and engine.begun == 0 and not engine.asked and not server.service.draining


def numeric(
    schema: Any, components: dict[str, Any], depth: int = 0
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """(way to it, its schema) of every number in a body. A list is entered at 0, any key of an object by number is `7`."""
    if "$ref" in schema:
        schema = components[schema["$ref"].rpartition("/")[2]]
    if depth > 6:
        return
    kinds = schema.get("type", ())
    if {"number", "integer"} & set([kinds] if isinstance(kinds, str) else kinds):
        yield (), schema
    for other in schema.get("anyOf", ()):
        yield from numeric(other, components, depth + 1)
    for name, inner in schema.get("properties", {}).items():
        for way, found in numeric(inner, components, depth + 1):
            yield (name, *way), found
    if isinstance(schema.get("items"), dict):
        for way, found in numeric(schema["items"], components, depth + 1):
            yield (0, *way), found
    if isinstance(schema.get("additionalProperties"), dict):
        for way, found in numeric(schema["additionalProperties"], components, depth + 1):
            yield ("7", *way), found


def fields() -> list[tuple[str, tuple[Any, ...], tuple[bytes, ...]]]:
    """(path of the endpoint, way to the field, values of its own bounds)."""
    told = document(Service(FakeEngine(), ServerConfig(), "tiny"))  # type: ignore[arg-type]
    components, found = told["components"]["schemas"], {}
    for (method, path), operation in OPERATIONS.items():
        if operation.body is None or path.startswith("/beta/"):  # those are the same handlers
            continue
        assert method == "post" and path in BASES, f"{path} has a body and no example here"
        for way, schema in numeric(components[operation.body], components):
            bounds = [schema[k] for k in ("minimum", "maximum", "exclusiveMinimum") if k in schema]
            values = {json.dumps(b + d).encode() for b in bounds for d in (-1, 0, 1)}
            found[path, way] = tuple(sorted(values))
    return [(path, way, values) for (path, way), values in found.items()]


FIELDS = fields()


def nested(way: tuple[Any, ...], base: dict[str, Any]) -> bytes:
    """A body with `@` where the value goes."""
    value: Any = "@"
    for step in reversed(way):
        value = [value] if step == 0 else {step: value}
    return json.dumps({**base, **value}).encode()


@pytest.fixture(scope="module")
def http(tokenizer: Tokenizer) -> Iterator[httpx.Client]:
    headers = {"content-type": "application/json", "x-api-key": "boss"}
    engine = FakeEngine(tokenizer=tokenizer)
    with (
        running(engine, admin_key="boss") as server,
        httpx.Client(base_url=server.url, headers=headers, timeout=60) as client,
    ):
        yield client
        assert engine.live == 0


def test_there_are_fields_to_walk() -> None:
    names = {(path, way[0]) for path, way, _ in FIELDS}
    for path, name in (
        ("/v1/chat/completions", "temperature"),
        ("/v1/chat/completions", "logit_bias"),
        ("/v1/completions", "prompt"),
        ("/v1/messages", "max_tokens"),
        ("/v1/responses", "max_output_tokens"),
        ("/v1/prefixes", "prompt"),
        ("/detokenize", "tokens"),
    ):
        assert (path, name) in names
    assert len(FIELDS) > 60


@pytest.mark.parametrize("path", sorted({path for path, _, _ in FIELDS}))
def test_every_number_with_extreme_values(http: httpx.Client, path: str) -> None:
    for where, way, own in FIELDS:
        if where != path:
            continue
        body = nested(way, BASES[path])
        for value in (*EXTREMES, *own):
            got = http.post(path, content=body.replace(b'"@"', value))
            told = (path, way, value[:40], got.text[:300])
            assert got.status_code in (200, 400, 403, 413), told
            if got.status_code != 200:
                error = got.json()["error"]
                message = error if isinstance(error, str) else error["message"]  # as its dialect has it
                assert 5 < len(message) < 500 and "\n" not in message, told
                assert "Traceback" not in got.text and "Error(" not in got.text, told
    assert http.get("/health").status_code == 200
