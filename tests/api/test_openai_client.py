"""The unmodified `openai` package against a real server."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from dsv4.text.chat import DSML
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALLS = (
    f"Let me look.\n\n<{DSML}tool_calls>\n"
    f'<{DSML}invoke name="weather">\n<{DSML}parameter name="city" string="true">Kyiv</{DSML}parameter>\n'
    f'<{DSML}parameter name="days" string="false">3</{DSML}parameter>\n</{DSML}invoke>\n'
    f'<{DSML}invoke name="clock">\n</{DSML}invoke>\n</{DSML}tool_calls>'
)


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="default", messages=HELLO)
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.role) == ("one two three four five", "assistant")
    assert (choice.finish_reason, answer.model, answer.object) == ("stop", "tiny", "chat.completion")
    assert answer.usage.completion_tokens == 6 and answer.usage.total_tokens == answer.usage.prompt_tokens + 6


def test_stream_is_the_whole_answer_in_order(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}, max_tokens=3
        )
    )
    *deltas, last, usage = chunks
    assert deltas[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in deltas) == "one two three"
    assert all(c.choices[0].finish_reason is None and c.usage is None for c in deltas)
    assert last.choices[0].finish_reason == "length"
    assert usage.choices == [] and usage.usage.completion_tokens == 3
    assert len({c.id for c in chunks}) == 1


def test_no_usage_chunk_unless_asked_for(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
    assert all(c.choices for c in chunks)


def test_the_client_for_asyncio() -> None:
    async def ask(url: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:

            async def one() -> str:
                text = ""
                async for chunk in await client.chat.completions.create(
                    model="default", messages=HELLO, stream=True
                ):
                    text += chunk.choices[0].delta.content or ""
                return text

            return list(await asyncio.gather(*(one() for _ in range(8))))

    from tests.support.fake_engine import small_tokenizer

    with running(FakeEngine(tokenizer=small_tokenizer())) as server:
        assert asyncio.run(ask(server.url)) == ["one two three four five"] * 8


def test_n_choices_and_seeds(served: RunningServer, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="default", messages=HELLO, n=3, seed=7)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert [s.params.seed for s in served.engine.seen[-3:]] == [7, 8, 9]
    assert answer.usage.completion_tokens == 18 and answer.usage.prompt_tokens == 5


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    settings = {"model": "default", "messages": HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}
    whole = client.chat.completions.create(**settings).choices[0].logprobs.content
    assert [t.token for t in whole] == ["one", " two", " three"]
    assert [t.logprob for t in whole] == [0, -0.125, -0.25]
    assert whole[0].bytes == list(b"one") and len(whole[0].top_logprobs) == 2
    streamed = [
        t
        for c in client.chat.completions.create(**settings, stream=True)
        if c.choices[0].logprobs
        for t in c.choices[0].logprobs.content
    ]
    assert streamed == whole


def test_reasoning(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(lambda prompt: "Let me think.</think>Done.", tokenizer=tokenizer)
    with running(engine) as server, openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        extra = {"thinking": {"type": "enabled"}}
        message = client.chat.completions.create(model="default", messages=HELLO, extra_body=extra)
        assert message.choices[0].message.reasoning_content == "Let me think."
        assert message.choices[0].message.content == "Done."
        thought = tokenizer.encode("Let me think.</think>")
        assert message.usage.completion_tokens_details.reasoning_tokens == len(thought)
        deltas = [
            c.choices[0].delta
            for c in client.chat.completions.create(
                model="default", messages=HELLO, extra_body=extra, stream=True
            )
        ]
        assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "Let me think."
        assert "".join(d.content or "" for d in deltas) == "Done."


@pytest.mark.parametrize(
    ("extra", "thinks"),
    [
        ({}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "high"}, False),
        ({"reasoning_effort": "medium"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"chat_template_kwargs": {"thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
    ],
)
def test_ways_to_switch_thinking(
    served: RunningServer, client: openai.OpenAI, extra: dict, thinks: bool
) -> None:
    client.chat.completions.create(model="default", messages=HELLO, extra_body=extra)
    opening = served.engine.seen[-1].prompt[-1]
    assert opening == served.engine.tokenizer.special("<think>" if thinks else "</think>")


def test_tool_calls(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(lambda prompt: CALLS, tokenizer=tokenizer)
    with running(engine) as server, openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        choice = client.chat.completions.create(model="default", messages=HELLO, tools=[WEATHER]).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
        first, second = choice.message.tool_calls
        assert (first.function.name, json.loads(first.function.arguments)) == (
            "weather",
            {"city": "Kyiv", "days": 3},
        )
        assert (second.function.name, json.loads(second.function.arguments)) == ("clock", {})
        assert first.id != second.id

        fragments = [
            c.choices[0].delta.tool_calls[0]
            for c in client.chat.completions.create(
                model="default", messages=HELLO, tools=[WEATHER], stream=True
            )
            if c.choices and c.choices[0].delta.tool_calls
        ]
        heads = [f for f in fragments if f.id]
        assert [(f.index, f.function.name) for f in heads] == [(0, "weather"), (1, "clock")]
        assert fragments[0] is heads[0], "id and name come before any argument"
        arguments = "".join(f.function.arguments for f in fragments if f.index == 0)
        assert json.loads(arguments) == {"city": "Kyiv", "days": 3}

        # The whole loop: the call goes back with its result.
        history = [*HELLO, choice.message.model_dump(exclude_none=True)]
        history += [{"role": "tool", "tool_call_id": c.id, "content": "sunny"} for c in (second, first)]
        client.chat.completions.create(model="default", messages=history, tools=[WEATHER])
        shown = tokenizer.decode(engine.seen[-1].prompt, skip_special=False)
        assert shown.count("<tool_result>sunny</tool_result>") == 2 and 'name="weather"' in shown


def test_tools_are_not_shown_with_tool_choice_none(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(lambda prompt: CALLS, tokenizer=tokenizer)
    with running(engine) as server, openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        choice = client.chat.completions.create(
            model="default", messages=HELLO, tools=[WEATHER], tool_choice="none"
        ).choices[0]
        assert "weather" not in tokenizer.decode(engine.seen[-1].prompt)
        assert choice.finish_reason == "stop" and choice.message.tool_calls is None


def test_usage_says_what_was_cached_and_why(served: RunningServer, client: openai.OpenAI) -> None:
    served.engine.cached_tokens = 3
    try:
        usage = client.chat.completions.create(model="default", messages=HELLO).usage
    finally:
        served.engine.cached_tokens = 0
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_cache_hit_tokens == 3
    assert usage.prompt_cache_miss_tokens == usage.prompt_tokens - 3
    assert usage.prompt_tokens_details.dsv4["reason"] == "never_stored"
    assert usage.prompt_tokens_details.dsv4["resumed_at"] == 3


def test_sampling_parameters_arrive(served: RunningServer, client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model="default",
        messages=[
            {"role": "system", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": "part"}]},
        ],
        temperature=0.5,
        top_p=0.9,
        stop=["x", "y"],
        logit_bias={"5": -100},
        max_completion_tokens=9,
        user="u",
        extra_body={
            "top_k": 4,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            "cache_salt": "s",
            "odd": [1],
        },
    )
    seen = served.engine.seen[-1]
    p = seen.params
    assert (p.temperature, p.top_p, p.top_k, p.min_p, p.repetition_penalty) == (0.5, 0.9, 4, 0.1, 1.1)
    assert (p.stop, p.logit_bias, p.max_tokens, p.min_tokens, seen.routing.salt) == (
        ("x", "y"),
        {5: -100},
        9,
        2,
        "s",
    )
    assert seen.routing.tenant == "u"


def test_default_lengths(served: RunningServer, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="default", messages=HELLO, extra_body={"ignore_eos": False})
    seen = served.engine.seen[-1]
    assert seen.params.max_tokens == served.engine.max_model_len - len(seen.prompt)
    answer = client.completions.create(model="default", prompt="Hello", extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16 and answer.choices[0].finish_reason == "length"


def test_models(client: openai.OpenAI) -> None:
    listed = list(client.models.list())
    assert [m.id for m in listed] == ["tiny", "default"] and listed[0].max_model_len == 4096
    assert client.models.retrieve("default").id == "default"


def test_an_unknown_model_is_told_what_is_served(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as e:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert (
        e.value.code == "model_not_found" and "'tiny'" in e.value.message and "'default'" in e.value.message
    )


def test_too_long_a_prompt(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as e:
        client.completions.create(model="default", prompt=[5] * 5000)
    assert e.value.code == "context_length_exceeded"


def test_an_error_in_the_middle_of_a_stream_is_an_error(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer=tokenizer, fail_after=2)
    with (
        running(engine) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        text = ""
        with pytest.raises(openai.APIError, match="boom"):
            for chunk in client.chat.completions.create(model="default", messages=HELLO, stream=True):
                text += chunk.choices[0].delta.content or ""
        assert text == "one two"
        with pytest.raises(openai.InternalServerError, match="boom"):
            client.chat.completions.create(model="default", messages=HELLO)
        assert engine.live == 0


def test_a_full_queue_is_429_also_for_streams(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer=tokenizer, max_live=0)
    with (
        running(engine) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as e:
                client.chat.completions.create(model="default", messages=HELLO, stream=stream)
            assert e.value.response.headers["retry-after"] == "1"
