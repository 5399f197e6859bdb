"""`/v1/completions`: every form of prompt, `echo` with `logprobs`, and models without a tokenizer."""

from __future__ import annotations

import httpx
import openai
import pytest

from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running


def test_forms_of_prompt(served: RunningServer, client: openai.OpenAI) -> None:
    ids = served.engine.tokenizer.encode("Hello there")
    for prompt, count in (
        ("Hello there", 1),
        (ids, 1),
        (["Hello there", "Hello there"], 2),
        ([ids, ids, ids], 3),
    ):
        answer = client.completions.create(model="default", prompt=prompt, max_tokens=2)
        assert [c.text for c in answer.choices] == ["one two"] * count
        assert all(s.prompt == ids for s in served.engine.seen[-count:])
        assert answer.usage.prompt_tokens == count * len(ids) and answer.usage.completion_tokens == 2 * count


def test_choices_are_numbered_prompt_by_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="default", prompt=["a", "b"], n=2, max_tokens=1)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3] and answer.usage.prompt_tokens == 2
    assert len(answer.usage.prompt_tokens_details.dsv4) == 2


def test_streams_of_many_choices_join_to_the_same_text(client: openai.OpenAI) -> None:
    texts = ["", "", "", ""]
    for chunk in client.completions.create(model="default", prompt=["a", "b"], n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["one two three four five"] * 4


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_as_evaluation_harnesses_ask(client: openai.OpenAI, max_tokens: int) -> None:
    answer = client.completions.create(
        model="default",
        prompt=[[336, 1537, 405], [336, 405]],
        echo=True,
        logprobs=1,
        max_tokens=max_tokens,
        temperature=0,
    )
    assert answer.usage.completion_tokens == 2 * max_tokens
    for choice, prompt_length in zip(answer.choices, (3, 2), strict=True):
        got = choice.logprobs
        assert (
            len(got.tokens) == len(got.token_logprobs) == len(got.top_logprobs) == prompt_length + max_tokens
        )
        assert got.token_logprobs[0] is None and got.top_logprobs[0] is None
        assert "".join(got.tokens) == choice.text
        assert got.text_offset == [sum(map(len, got.tokens[:i])) for i in range(len(got.tokens))]
        for token, best in zip(got.tokens[1:], got.top_logprobs[1:], strict=True):
            assert token in best


def test_echo_in_a_stream_comes_first(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(model="default", prompt="Say: ", echo=True, stream=True, max_tokens=2)
    )
    assert (
        chunks[0].choices[0].text == "Say: " and "".join(c.choices[0].text for c in chunks) == "Say: one two"
    )


def test_logprobs_in_a_stream_equal_those_of_the_whole(client: openai.OpenAI) -> None:
    settings = {"model": "default", "prompt": "a", "logprobs": 2, "max_tokens": 4}
    whole = client.completions.create(**settings).choices[0].logprobs
    parts = [
        c.choices[0].logprobs
        for c in client.completions.create(**settings, stream=True)
        if c.choices[0].logprobs
    ]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for p in parts for x in getattr(p, name)] == getattr(whole, name), name


def test_stop_strings(client: openai.OpenAI) -> None:
    choice = client.completions.create(model="default", prompt="a", stop=" three").choices[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("one two", "stop", " three")


def test_token_ids_on_request(client: openai.OpenAI, served: RunningServer) -> None:
    choice = client.completions.create(
        model="default", prompt=[5, 6], max_tokens=2, extra_body={"return_token_ids": True}
    ).choices[0]
    assert choice.token_ids == served.engine.tokenizer.encode("one two") and choice.prompt_token_ids == [5, 6]


def test_pieces_of_characters_keep_their_bytes(client: openai.OpenAI, served: RunningServer) -> None:
    tokenizer = served.engine.tokenizer
    ids = tokenizer.encode("\U0001f9ed")
    assert len(ids) > 1, "the test needs a character of several tokens"
    tokens = (
        client.completions.create(model="default", prompt=ids, echo=True, logprobs=0, max_tokens=0)
        .choices[0]
        .logprobs
    )
    raw = "".join(t.removeprefix("bytes:") for t in tokens.tokens)
    assert bytes.fromhex(raw.replace("\\x", "")).decode() == "\U0001f9ed"


def test_without_a_tokenizer_token_ids_are_served() -> None:
    with running(FakeEngine(lambda prompt: [7, 8, 9])) as server:
        post = lambda path, **body: httpx.post(server.url + path, json={"model": "default", **body})  # noqa: E731
        choice = post("/v1/completions", prompt=[3, 4], logprobs=1).json()["choices"][0]
        assert (
            choice["token_ids"] == [7, 8, 9, 1]
            and choice["prompt_token_ids"] == [3, 4]
            and choice["text"] == ""
        )
        assert choice["logprobs"]["tokens"][0] == "token_id:7"
        stream = post("/v1/completions", prompt=[3, 4], stream=True)
        assert '"token_ids":[7]' in stream.text and stream.text.endswith("data: [DONE]\n\n")
        for path, body in (
            ("/v1/completions", {"prompt": "text"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
            ("/tokenize", {"prompt": "text"}),
        ):
            refused = post(path, **body)
            assert refused.status_code == 400 and refused.json()["error"]["code"] == "no_tokenizer", path
            assert "token ids" in refused.json()["error"]["message"]


def test_tokenize_and_back(served: RunningServer) -> None:
    body = httpx.post(
        served.url + "/tokenize", json={"prompt": "Hello there", "return_token_strs": True}
    ).json()
    assert body["count"] == len(body["tokens"]) and "".join(body["token_strs"]) == "Hello there"
    assert httpx.post(served.url + "/detokenize", json={"tokens": body["tokens"]}).json() == {
        "prompt": "Hello there"
    }
    chat = httpx.post(served.url + "/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]}).json()
    assert chat["tokens"][0] == 0 and chat["max_model_len"] == 4096
