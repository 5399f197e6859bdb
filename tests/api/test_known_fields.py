"""Each documented field of a request is honoured, harmless or refused, as `dsv4.api.known_fields` has it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from dsv4.api.known_fields import (
    CHAT,
    COMPLETIONS,
    HARMLESS,
    HARMLESS_BY_ENDPOINT,
    HONOURED,
    REFUSED,
    REFUSED_BY_ENDPOINT,
    RESPONSES,
)
from dsv4.api.responses import _ECHOED
from dsv4.text.tokenizer import Tokenizer
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from openai.types.responses import response_create_params

from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

MESSAGES = [{"role": "user", "content": "Hi"}]
PATHS = {CHAT: "/v1/chat/completions", COMPLETIONS: "/v1/completions", RESPONSES: "/v1/responses"}
ENDPOINTS = tuple(PATHS)
BASES: dict[str, dict] = {
    CHAT: {"model": "default", "messages": MESSAGES, "max_tokens": 4, "logprobs": True},
    COMPLETIONS: {"model": "default", "prompt": "Hi", "max_tokens": 4, "logprobs": 1},
    RESPONSES: {"model": "default", "input": "Hi", "max_output_tokens": 4},
}
VLLM_CHAT = """
    messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n presence_penalty
    response_format seed stop stream stream_options temperature top_p tools tool_choice reasoning_effort
    thinking_token_budget include_reasoning parallel_tool_calls user use_beam_search top_k min_p repetition_penalty
    length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
    spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids
    allowed_token_ids bad_words echo add_generation_prompt continue_final_message add_special_tokens documents chat_template
    chat_template_kwargs media_io_kwargs mm_processor_kwargs structured_outputs priority request_id session_id
    return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets return_prompt_text
    return_assistant_tokens_mask cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection
    stream_interval guided_json guided_regex guided_choice guided_grammar guided_json_object structural_tag
    guided_decoding_backend guided_whitespace_pattern
"""
VLLM_COMPLETIONS = """
    model prompt echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream stream_options
    suffix temperature top_p user use_beam_search top_k min_p repetition_penalty length_penalty stop_token_ids
    include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens
    truncate_prompt_tokens truncation_side allowed_token_ids prompt_logprobs logprob_token_ids bad_words prompt_embeds
    add_special_tokens response_format structured_outputs priority request_id session_id return_tokens_as_token_ids
    return_token_ids routed_experts_prompt_start return_token_offsets cache_salt kv_transfer_params ec_transfer_params
    vllm_xargs repetition_detection thinking_token_budget stream_interval guided_json guided_regex guided_choice
    guided_grammar guided_json_object guided_decoding_backend guided_whitespace_pattern
"""
SGLANG_CHAT = """
    messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n presence_penalty
    response_format seed stop stream stream_options temperature top_p user tools tool_choice parallel_tool_calls
    return_hidden_states return_routed_experts routed_experts_start_len return_cached_tokens_details
    return_prompt_token_ids return_token_ids return_meta_info reasoning_effort reasoning task top_k min_p min_tokens regex
    ebnf repetition_penalty stop_token_ids stop_regex no_stop_trim ignore_eos continue_final_message skip_special_tokens
    lora_path session_id session_params separate_reasoning stream_reasoning chat_template_kwargs max_dynamic_patch
    min_dynamic_patch use_audio_in_video images_config custom_logit_processor custom_params input_ids rid extra_key
    cache_salt ngram_corpus_id priority bootstrap_host bootstrap_port bootstrap_room routed_dp_rank disagg_prefill_dp_rank
    data_parallel_rank
"""
SGLANG_COMPLETIONS = """
    model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream
    stream_options suffix temperature top_p user return_hidden_states return_routed_experts routed_experts_start_len
    return_cached_tokens_details return_token_ids top_k min_p min_tokens json_schema regex ebnf repetition_penalty
    stop_token_ids stop_regex no_stop_trim ignore_eos skip_special_tokens lora_path session_id session_params
    response_format custom_params custom_logit_processor images_config bootstrap_host bootstrap_port bootstrap_room
    routed_dp_rank disagg_prefill_dp_rank data_parallel_rank rid extra_key cache_salt ngram_corpus_id priority custom_labels
"""
LLAMA_CPP = """
    n_keep n_discard n_predict n_cmpl n_indent n_probs min_p top_k top_n_sigma typical_p temperature dynatemp_range
    dynatemp_exponent repeat_penalty repeat_last_n presence_penalty frequency_penalty dry_multiplier dry_base
    dry_allowed_length dry_penalty_last_n dry_sequence_breakers xtc_probability xtc_threshold mirostat mirostat_tau
    mirostat_eta adaptive_target adaptive_decay grammar grammar_lazy grammar_triggers preserved_tokens json_schema seed
    ignore_eos logit_bias post_sampling_probs samplers cache_prompt id_slot return_tokens return_progress
    timings_per_token t_max_predict_ms response_fields lora backend_sampling stop stream
"""
LLAMA_CPP_CHAT = (
    "reasoning_format reasoning_budget thinking_forced_open parse_tool_calls chat_template_kwargs"
)
OTHERS = """
    options keep_alive images raw template context num_ctx num_keep num_predict system
    truncate watermark do_sample details decoder_input_details return_full_text top_n_tokens adapter_id inputs parameters
    sampling_seed return_logprob top_logprobs_num token_ids_logprob logprob_start_len return_text_in_logprobs
    stop_sequences max_tokens_to_sample max_length min_length num_return_sequences num_beams mcp_servers container
    random_seed safe_prompt guardrails transforms provider route plugins usage search_parameters deferred
    context_length_exceeded_behavior prompt_truncate_len perf_metrics_in_response raw_output extra_body extra_headers
    input instructions text include previous_response_id conversation background truncation max_tool_calls
"""
"""Of Ollama, Text Generation Inference, SGLang's /generate, Anthropic, Mistral, OpenRouter, xAI, Fireworks, the Responses API,
and what belongs to a client library."""

WRONG: dict[str, Any] = {
    "user": 7,
    "model": 7,
    "cache_salt": 7,
    "request_id": 7,
    "rid": 7,
    "prompt_cache_key": 7,
    "response_format": {"type": "xml"},
    "guided_json_object": 7,
    "guided_regex": 7,
    "regex": 7,
    "structured_outputs.regex": 7,
    "stop": 7,
    "reasoning_effort": "most",
    "task": "titel",
    "tool_choice": "must",
    "messages": 7,
    "prompt": 7,
    "cache_control": {"ttl": "1d"},
    "stream_options": 7,
    "chat_template_kwargs": {"drop_thinking": 7},
    "thinking": {"type": "sometimes"},
    "input": 7,
    "instructions": 7,
    "suffix": 7,
    "reasoning": {"effort": "most"},
    "logit_bias": {"a": 1},
}
"""By honoured field, a value that it does not take; others take no text."""


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    engine = FakeEngine(lambda prompt: "one</think>two", tokenizer=tokenizer)
    with running(engine) as server, httpx.Client(base_url=server.url) as server.http:
        yield server


def send(server: RunningServer, endpoint: str, **more: Any) -> httpx.Response:
    body = {**BASES[endpoint], **more}
    if "tools" in more and endpoint != COMPLETIONS:
        body.pop("logprobs", None)
    return server.http.post(PATHS[endpoint], json=body)


def nested(name: str, value: Any) -> dict[str, Any]:
    outer, _, inner = name.partition(".")
    return {outer: {inner: value}} if inner else {outer: value}


def answer(response: httpx.Response) -> dict[str, Any]:
    """What a client gets back, without what differs between any two requests."""
    assert response.status_code == 200, response.text
    body = {k: v for k, v in response.json().items() if k not in ("id", "created", "created_at", *_ECHOED)}
    for item in body.get("output", ()):
        del item["id"]
    return body


def both(table: Any, by_endpoint: Any) -> list[tuple[str, str]]:
    return [(e, name) for e in ENDPOINTS for name in (*table, *by_endpoint[e]) if name not in HONOURED[e]]


def test_every_documented_field_has_a_class() -> None:
    openai_chat = chat_create_params.CompletionCreateParamsBase.__annotations__
    openai_completions = completion_create_params.CompletionCreateParamsBase.__annotations__
    options = [f"stream_options.{name}" for name in ChatCompletionStreamOptionsParam.__annotations__]
    documented = {
        CHAT: [*VLLM_CHAT.split(), *SGLANG_CHAT.split(), *openai_chat, *options, *LLAMA_CPP_CHAT.split()],
        COMPLETIONS: [*VLLM_COMPLETIONS.split(), *SGLANG_COMPLETIONS.split(), *openai_completions, *options],
        RESPONSES: [*response_create_params.ResponseCreateParamsBase.__annotations__],
    }
    for endpoint in (CHAT, COMPLETIONS):
        documented[endpoint] += [*LLAMA_CPP.split(), *OTHERS.split()]
    for endpoint, names in documented.items():
        classes = (
            HONOURED[endpoint],
            {*HARMLESS, *HARMLESS_BY_ENDPOINT[endpoint]},
            {*REFUSED, *REFUSED_BY_ENDPOINT[endpoint]} - HONOURED[endpoint],
        )
        for name in {"stream", *names} - {"stream_options"}:
            assert sum(name in c for c in classes) == 1, (endpoint, name)


@pytest.mark.parametrize(("endpoint", "name"), both(REFUSED, REFUSED_BY_ENDPOINT))
def test_refused_by_name_with_a_remedy(server: RunningServer, endpoint: str, name: str) -> None:
    refused = {**REFUSED, **REFUSED_BY_ENDPOINT[endpoint]}[name]
    for value in ({"a": 1}, "x", ["x"], 7):
        response = send(server, endpoint, **nested(name, value))
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, name, "unsupported_field")
        assert error["message"].startswith(f"{name} is ") and error["message"].endswith(refused.remedy)
        assert len(error["message"]) < 250 and "\n" not in error["message"]
    plain = answer(send(server, endpoint))
    nothing = (None, "", [], {}, *(() if refused.false_asks else (False,)), *refused.neutral)
    if refused.false_asks:
        assert send(server, endpoint, **nested(name, False)).json()["error"]["param"] == name
    for value in nothing:
        assert answer(send(server, endpoint, **nested(name, value))) == plain, value


@pytest.mark.parametrize(("endpoint", "name"), both(HARMLESS, HARMLESS_BY_ENDPOINT))
def test_harmless_fields_change_nothing(server: RunningServer, endpoint: str, name: str) -> None:
    plain = answer(send(server, endpoint))
    for value in (True, False) if name == "skip_special_tokens" else (True, "x", 7, ["x"], {"a": 1}):
        assert answer(send(server, endpoint, **nested(name, value))) == plain, value


@pytest.mark.parametrize(("endpoint", "name"), [(e, n) for e in HONOURED for n in sorted(HONOURED[e])])
def test_honoured_fields_are_read(server: RunningServer, endpoint: str, name: str) -> None:
    """A value that it does not take is refused by the field's name."""
    response = send(server, endpoint, **nested(name, WRONG.get(name, "x")))
    error = response.json().get("error")
    assert response.status_code in (400, 404) and error["param"].startswith(name), response.text


def test_tokenizing_refuses_what_generating_does(server: RunningServer) -> None:
    for body, param in (
        ({"messages": MESSAGES, "chat_template": "{{ messages }}"}, "chat_template"),
        ({"prompt": "Hi", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ({"prompt": "Hi", "messages": MESSAGES}, "prompt"),
    ):
        for path in ("/tokenize", "/v1/prefixes"):
            error = server.http.post(path, json=body).json()["error"]
            assert (error["param"], error["code"]) == (param, "unsupported_field")


def test_unknown_fields_are_ignored_and_named_in_a_debug_line(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "dsv4.api"):
        for endpoint in (CHAT, COMPLETIONS):
            unknown = {"made_up": 1, "stream_options": {"x" * 300: "secret"}}
            assert answer(send(server, endpoint, **unknown)) == answer(send(server, endpoint))
    lines = [r.getMessage() for r in caplog.records if "unknown fields" in r.getMessage()]
    assert len(lines) == 2 and all("2 unknown fields" in t and "'made_up'" in t for t in lines)
    assert all(len(t) < 200 and "secret" not in t for t in lines)


def chat(server: RunningServer, **more: Any) -> dict[str, Any]:
    return send(server, CHAT, **{"logprobs": None, **more}).json()


def prompt_of(server: RunningServer) -> str:
    return server.engine.tokenizer.decode(server.engine.seen[-1].prompt, skip_special=False)


@pytest.mark.parametrize(
    ("wish", "thinks"),
    [
        ({"enable_thinking": True}, True),
        ({"enable_thinking": False, "reasoning_effort": "high"}, False),
        ({"reasoning": {"effort": "high"}}, True),
        ({"reasoning": {"effort": "none"}}, False),
        ({"reasoning": {"enabled": True}}, True),
        ({"reasoning": {"enabled": False, "effort": "high"}}, False),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, True),
    ],
)
def test_other_servers_words_for_thinking(server: RunningServer, wish: dict, thinks: bool) -> None:
    message = chat(server, **wish)["choices"][0]["message"]
    assert ("reasoning_content" in message) == thinks
    assert prompt_of(server).endswith("<think>" if thinks else "</think>")


@pytest.mark.parametrize("wish", [{"include_reasoning": False}, {"reasoning": {"exclude": True}}])
def test_thoughts_can_be_left_out(server: RunningServer, wish: dict) -> None:
    on = {"thinking": {"type": "enabled"}}
    body = chat(server, **on, **wish)
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "two"}
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        stream = client.chat.completions.create(
            model="default", messages=MESSAGES, max_tokens=9, stream=True, extra_body=on | wish
        )
        deltas = [c.choices[0].delta.model_dump(exclude_none=True) for c in stream if c.choices]
    assert not any("reasoning_content" in d for d in deltas)
    assert "".join(d.get("content", "") for d in deltas) == "two"


def test_a_task_for_the_last_message(server: RunningServer) -> None:
    body = chat(server, task="title", thinking={"type": "enabled"})
    assert prompt_of(server).endswith("Hi<｜title｜>")
    assert "reasoning_content" not in body["choices"][0]["message"]


def test_ids_of_the_request_and_of_tokens(server: RunningServer) -> None:
    for endpoint, prefix in ((CHAT, "chatcmpl-"), (COMPLETIONS, "cmpl-")):
        for name in ("request_id", "rid"):
            assert send(server, endpoint, **{name: "mine-1"}).json()["id"] == f"{prefix}mine-1"
        assert send(server, endpoint).json()["id"] != send(server, endpoint).json()["id"]
    choice = send(server, CHAT, return_tokens_as_token_ids=True, top_logprobs=1).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    tokens = server.engine.tokenizer.encode("one</think>two")[:4]
    assert [e["token"] for e in entries] == [f"token_id:{t}" for t in [*tokens, 1][:4]]
    assert all(e["top_logprobs"][0]["token"].startswith("token_id:") for e in entries)
    choice = send(server, COMPLETIONS, return_tokens_as_token_ids=True).json()["choices"][0]
    assert all(t.startswith("token_id:") for t in choice["logprobs"]["tokens"])


def events(server: RunningServer, endpoint: str, **more: Any) -> list[dict[str, Any]]:
    lines = send(server, endpoint, stream=True, **more).text.split("\n\n")
    return [json.loads(t.removeprefix("data: ")) for t in lines if t.startswith("data: {")]


def test_prompt_token_ids_come_once(server: RunningServer) -> None:
    for wish in ({"return_token_ids": True}, {"return_prompt_token_ids": True}):
        body = chat(server, **wish)
        assert body["prompt_token_ids"] == server.engine.seen[-1].prompt
        chunks = events(server, CHAT, **wish)
        assert [c.get("prompt_token_ids") for c in chunks] == [
            server.engine.seen[-1].prompt,
            *[None] * (len(chunks) - 1),
        ]
    assert "prompt_token_ids" not in chat(server)


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
def test_usage_in_every_chunk(server: RunningServer, endpoint: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(server, endpoint, stream_options=options)
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    last = chunks[-1]["usage"]
    assert counts == sorted(counts) and counts[-1] == last["completion_tokens"] == 4
    assert all(c["usage"]["prompt_tokens"] == last["prompt_tokens"] for c in chunks)
    assert all(
        c["usage"]["total_tokens"] == c["usage"]["prompt_tokens"] + c["usage"]["completion_tokens"]
        for c in chunks
    )
    for option in ({"continuous_usage_stats": True}, {"include_usage": True}):
        assert not any(c.get("usage") for c in events(server, endpoint, stream_options=option)[:-1])


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            "messages[1].function_call",
        ),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "messages[1].audio"),
        ({"role": "user", "content": "x", "images": ["aGk="]}, "messages[1].images"),
        ({"role": "system", "content": "x", "response_format": {"a": 1}}, "messages[1].response_format"),
    ],
)
def test_fields_of_messages(server: RunningServer, message: dict, param: str) -> None:
    error = chat(server, messages=[*MESSAGES, message, *MESSAGES])["error"]
    assert error["param"] == param and "not supported" in error["message"]


def test_a_refusal_is_what_the_assistant_said(server: RunningServer) -> None:
    for said in (
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ):
        chat(server, messages=[*MESSAGES, said, *MESSAGES])
        assert "</think>No.<｜end▁of▁sentence｜>" in prompt_of(server)


CALL = '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="n" string="false">%d</｜DSML｜parameter>\n</｜DSML｜invoke>'
TWO_CALLS = f"<｜DSML｜tool_calls>\n{CALL % 1}\n{CALL % 2}\n</｜DSML｜tool_calls>"


@pytest.mark.parametrize(("parallel", "expected"), [(True, [1, 2]), (None, [1, 2]), (False, [1])])
def test_at_most_one_call_where_calls_are_not_to_be_parallel(
    tokenizer: Tokenizer, parallel: bool | None, expected: list[int]
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with (
        running(FakeEngine(lambda prompt: TWO_CALLS, tokenizer=tokenizer)) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client,
    ):
        ask = {"model": "default", "messages": MESSAGES, "tools": [tool], "parallel_tool_calls": parallel}
        answer = client.chat.completions.create(**ask)
        choice = answer.choices[0]
        assert (choice.finish_reason, (choice.model_extra or {})["stop_reason"]) == ("tool_calls", None)
        assert answer.usage is not None  # the answer ends with its only call
        tokens = len(server.engine.tokenizer.encode(TWO_CALLS)) + 1
        assert (answer.usage.completion_tokens < 0.7 * tokens) == (parallel is False)
        calls = [json.loads(c.function.arguments)["n"] for c in choice.message.tool_calls or ()]
        assert calls == expected
        arguments: dict[int, str] = {}
        for chunk in client.chat.completions.create(**ask, stream=True):
            for call in chunk.choices[0].delta.tool_calls or ():
                arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
        assert [json.loads(a)["n"] for a in arguments.values()] == expected
