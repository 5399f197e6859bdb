"""A dialect that this file alone knows: what it says of itself is all that routes, errors, metrics and the document need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs
import pytest
from dsv4.api import app
from dsv4.api.dialect import OF_A_GENERATION, Dialect, Operation, Post
from dsv4.api.dialects import DIALECTS
from dsv4.api.generation import Job, run
from dsv4.api.http import Call
from dsv4.api.openapi import document, operations
from dsv4.api.openapi_answers import ANSWERS
from dsv4.api.openapi_requests import request_schemas
from dsv4.api.params import sampling_params
from dsv4.api.reply import Reply
from dsv4.api.schema import answer, fields, integer, text
from dsv4.errors import RequestError
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

KEY = {"authorization": "Bearer right"}


def _error(error: RequestError, request_id: str = "") -> dict[str, Any]:
    return {"fault": error.message, "of": error.param or ""}


async def _continue(call: Call) -> None:
    bound, most = call.service.bound("words"), call.fields.integer("most", 1, 100, 3)
    prompt = await call.service.encode(call.fields.text("words") or "", bound)
    reply = Reply()
    async for _, output in run(
        call, [Job(0, prompt, sampling_params(call.fields, max_tokens=most, logprobs=None))]
    ):
        reply.read(output)
    await call.respond({"goes_on": reply.blocks.content})


MINE = Dialect(
    (
        Post(
            "/continue",
            _continue,
            Operation(
                "Goes on", "Continued", "ContinueRequest", OF_A_GENERATION, error="Fault", example={"words": "Hi"}
            ),
            generates=True,
        ),
    ),
    _error,
    {
        "ContinueRequest": fields({"words": text()}, {"most": integer(1, 100)}),
        "Continued": answer({"goes_on": text()}),
        "Fault": answer({"fault": text(), "of": text()}),
    },
)  # fmt: skip


@pytest.fixture
def server(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    monkeypatch.setattr(app, "DIALECTS", (*DIALECTS, MINE))
    with running(FakeEngine(tokenizer=tokenizer), api_key="right") as server:
        yield server


def test_a_dialect_is_served_and_told_by_what_it_says_of_itself(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url, headers=KEY, timeout=60) as http:
        told = http.get("/openapi.json").json()
        post = told["paths"]["/continue"]["post"]
        assert post["requestBody"]["content"]["application/json"]["example"] == {"words": "Hi"}

        def fits(got: httpx.Response) -> Any:
            schema = post["responses"][str(got.status_code)]["content"]["application/json"]["schema"]
            jsonschema_rs.Draft202012Validator({**schema, "components": told["components"]}).validate(
                got.json()
            )
            return got.json()

        assert fits(http.post("/continue", json={"words": "Hi"})) == {"goes_on": "one two three"}
        wrong = http.post("/continue", json={"words": "Hi", "most": 101})
        assert wrong.status_code == 400 and fits(wrong)["of"] == "most" and "101" in fits(wrong)["fault"]
        assert fits(http.post("/continue", content=b"{"))["fault"].startswith("the body is no valid JSON")
        assert fits(http.post("/continue", json={"words": "Hi"}, headers={"authorization": ""})).keys() == {
            "fault",
            "of",
        }
        assert "POST /continue" in http.get("/").json()["endpoints"]
        assert 'handler="/continue"' in http.get("/metrics").text
        server.service.draining = True
        assert http.post("/continue", json={"words": "Hi"}).status_code == 503


def test_without_it_nothing_of_it_is_there(served: RunningServer) -> None:
    assert "/continue" not in document(served.service)["paths"]
    assert httpx.post(served.url + "/continue", json={"words": "Hi"}).status_code == 404


def test_no_two_dialects_have_a_path_or_a_schema_of_one_name() -> None:
    dialects = (*DIALECTS, MINE)
    paths = [post.path for dialect in dialects for post in dialect.posts]
    others = operations([])
    assert len({*paths}) == len(paths) and not {("post", path) for path in paths} & {*others}
    schemas = [*ANSWERS, *request_schemas(100), *(name for dialect in dialects for name in dialect.schemas)]
    assert len({*schemas}) == len(schemas)
    named = [*others.values(), *(post.operation for dialect in dialects for post in dialect.posts)]
    assert {name for told in named for name in (told.answer, told.body, told.error) if name} <= {
        *schemas,
        "OpenApi",
    }
