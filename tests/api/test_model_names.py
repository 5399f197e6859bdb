"""The names under which a server answers."""

from __future__ import annotations

import functools
from datetime import datetime
from typing import Any

import httpx
import openai
import pytest
from dsv4.cli.serve import check_names
from dsv4.errors import ConfigError
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine
from tests.support.serving import running

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


def asked(client: openai.OpenAI, model: str) -> list[str]:
    """What the answers of both endpoints call the model, whole and streamed."""
    chunks = client.chat.completions.create(model=model, stream=True, **ASK)
    return [
        client.chat.completions.create(model=model, **ASK).model,
        client.completions.create(model=model, prompt="Hi", max_tokens=1).model,
        *(chunk.model for chunk in chunks),
    ]


def test_several_names_and_the_one_that_was_asked_for_comes_back(tokenizer: Tokenizer) -> None:
    names = ("gpt-4o", "org/deepseek-chat")
    with (
        running(FakeEngine(tokenizer=tokenizer), served_model_name=names) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        assert [m.id for m in client.models.list()] == [*names, "default"]
        for name in (*names, "default", ""):
            assert set(asked(client, name)) == {name if name in names else "gpt-4o"}
        assert [client.models.retrieve(name).id for name in (*names, "default")] == [*names, "default"]
        with pytest.raises(openai.NotFoundError, match="'gpt-4o', 'org/deepseek-chat' and 'default'"):
            asked(client, "gpt-5")


def test_any_name(tokenizer: Tokenizer) -> None:
    with (
        running(FakeEngine(tokenizer=tokenizer), any_model_name=True) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        assert [m.id for m in client.models.list()] == ["tiny", "default"]
        assert set(asked(client, "claude-opus-5")) == {"claude-opus-5"}
        assert client.models.retrieve("claude-opus-5").id == "claude-opus-5"


def test_names_with_stars_are_taken_and_not_listed(tokenizer: Tokenizer) -> None:
    names = ("claude-*", "v4", "*flash*[1m]")
    with (
        running(FakeEngine(tokenizer=tokenizer), served_model_name=names) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        assert [m.id for m in client.models.list()] == ["v4", "default"]
        for name in ("claude-opus-5", "claude-", "deepseek-flash-2[1m]", "flash[1m]"):
            assert set(asked(client, name)) == {name} and client.models.retrieve(name).id == name
        assert set(asked(client, "")) == {"v4"}
        for name in ("my-claude-5", "deepseek-flash-21", "Claude-5"):
            with pytest.raises(
                openai.NotFoundError, match=r"'v4', 'claude-\*', '\*flash\*\[1m\]' and 'default'"
            ):
                asked(client, name)
    with running(FakeEngine(tokenizer=tokenizer), served_model_name=("claude-*",)) as server:
        assert server.service.names == ("tiny", "default")


def test_anthropics_clients_get_its_shape(tokenizer: Tokenizer) -> None:
    with running(FakeEngine(tokenizer=tokenizer), served_model_name=("claude-x", "y")) as server:
        get = functools.partial(httpx.get, headers={"anthropic-version": "2023-06-01"})
        page = get(server.url + "/v1/models").json()
        assert [m["id"] for m in page["data"]] == ["claude-x", "y", "default"]
        assert (page["has_more"], page["first_id"], page["last_id"]) == (False, "claude-x", "default")
        one = get(server.url + "/v1/models/y").json()
        assert (one["type"], one["id"], one["display_name"]) == ("model", "y", "y")
        assert datetime.fromisoformat(one["created_at"].replace("Z", "+00:00")).year > 2000
        missing = get(server.url + "/v1/models/z")
        assert missing.status_code == 404 and missing.json()["error"]["type"] == "not_found_error"


def test_a_directory_is_not_taken_for_a_name() -> None:
    for given, model in ((None, None), (["a"], None), (["a", "b"], "/model")):
        check_names(given, model)
    with pytest.raises(ConfigError, match=r"2 words \(a, /models/flash\).*put MODEL before it"):
        check_names(["a", "/models/flash"], None)
