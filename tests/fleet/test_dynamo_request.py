"""Dynamo's requests and answers in our terms, field by field. Needs no Dynamo."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from dsv4.cli import main
from dsv4.config import load
from dsv4.engine.request import RequestOutput, Sampled, Usage
from dsv4.errors import ConfigError, RequestError
from dsv4.fleet.dynamo_request import Translator, Whole
from dsv4.fleet.settings import DynamoConfig

from tests.support.fake_engine import EOS, small_tokenizer


def request(prompt: tuple[int, ...] = (5, 6), **parts: Any) -> dict[str, Any]:
    """As the frontend sends it: what is not set is None."""
    empty: dict[str, Any] = {"sampling_options": {"n": None, "seed": None}, "stop_conditions": {"stop": None}}
    return empty | {"token_ids": list(prompt), "output_options": {"logprobs": None}} | parts


def translator(**defaults: Any) -> Translator:
    return Translator(small_tokenizer(), frozenset([EOS]), defaults)


def test_every_field_is_taken_over() -> None:
    sampling = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 3,
        "presence_penalty": 1.0,
    }
    sampling |= {"frequency_penalty": 0.5, "repetition_penalty": 1.1}
    ends = {
        "max_tokens": 9,
        "min_tokens": 2,
        "stop": ["x"],
        "stop_token_ids": [4],
        "stop_token_ids_hidden": [EOS, 8],
    }
    asked = request(
        sampling_options=sampling | {"n": 2},
        stop_conditions=ends,
        output_options={"logprobs": 2, "prompt_logprobs": 1},
        agent_context={"session_id": "talk"},
        routing={"priority": 4, "cache_salt": "mine"},
    )
    first, second = translator(top_p=0.1).jobs(asked)
    params = first.params
    assert {name: getattr(params, name) for name in sampling} == sampling
    assert (params.max_tokens, params.min_tokens, params.stop) == (9, 2, ("x",))
    assert params.stop_token_ids == (4, 8), "the model's own end is no further one"
    assert (params.logprobs, params.prompt_logprobs, params.ignore_eos) == (2, 1, False)
    assert first.routing.session == "talk" and first.routing.priority == 4 and first.routing.salt == "mine"
    assert (second.index, second.parent, second.params.seed) == (1, 0, 4)
    assert first.prompt.tolist() == [5, 6]


def test_what_is_not_set_has_the_models_default() -> None:
    [job] = translator(temperature=0.25).jobs(request())
    assert job.params.temperature == 0.25 and job.params.max_tokens is None and job.params.top_p == 1
    assert job.routing.session is None and job.routing.salt == ""
    [job] = translator().jobs(request(stop_conditions={"ignore_eos": True, "stop_token_ids_hidden": [8]}))
    assert job.params.ignore_eos and job.params.stop_token_ids == ()


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ({"sampling_options": {"n": 0}}, "n is 0"),
        ({"routing": {"priority": 2**40}}, "priority is 1099511627776; it must be a whole number"),
        ({"routing": {"priority": "high"}}, "priority is 'high'"),
        ({"sampling_options": {"n": 129}}, "1 to 128"),
        ({"sampling_options": {"best_of": 3}}, "best_of is 3"),
        ({"sampling_options": {"use_beam_search": True}}, "use_beam_search is true"),
        ({"sampling_options": {"temperature": 3.0}}, "temperature is 3"),
        ({"stop_conditions": {"stop": ["x"] * 17}}, "stop has 17"),
        ({"sampling_options": {"guided_decoding": {"regex": "[a"}}}, "regex"),
        ({"sampling_options": {"guided_decoding": {"structural_tag": {"type": "x"}}}}, "structural_tag"),
        ({"sampling_options": {"guided_decoding": {"json": {}, "whitespace_pattern": " "}}}, "whitespace_pattern"),
        ({"sampling_options": {"guided_decoding": {"json": {}, "regex": "a"}}}, "send one of them"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(parts: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        translator().jobs(request(**parts))
    assert field in caught.value.message and caught.value.status == 400


def test_a_form_begins_where_the_thoughts_end() -> None:
    """The prompt's last token says whether the answer begins in thoughts; other prompts are no chats."""
    tokenizer = small_tokenizer()
    guided = {"sampling_options": {"guided_decoding": {"choice": ["red", "green"]}}}
    texts = {}
    for name in ("<think>", "</think>", None):
        prompt = (20,) if name is None else (20, tokenizer.find(name) or 0)
        [job] = translator().jobs(request(prompt, **guided))
        assert job.params.grammar is not None
        assert job.params.grammar.chat == (name is not None)
        texts[name] = job.params.grammar.text
    end = f"<[{tokenizer.find('</think>')}]>"
    assert end in texts["<think>"] and end not in texts["</think>"]
    assert all("red" in text for text in texts.values())


def test_an_empty_form_asks_for_nothing() -> None:
    for guided in (None, {}, {"json": None, "choice": None}):
        [job] = translator().jobs(request(sampling_options={"guided_decoding": guided}))
        assert job.params.grammar is None


def usage(prompt: int, completion: int, cached: int) -> Usage:
    return Usage(prompt, completion, cached, {})


def bytes_of(token: int) -> bytes:
    return b"\xc3" if token == 9 else str(token).encode()


def test_an_answer_of_one_choice() -> None:
    whole = Whole(1)
    assert list(whole.chunks(0, RequestOutput("r", prefilled=5), bytes_of)) == []
    assert list(whole.chunks(0, RequestOutput("r", [1, 2]), bytes_of)) == [{"index": 0, "token_ids": [1, 2]}]
    last = RequestOutput("r", [3], finished=True, finish_reason="length", usage=usage(7, 3, 4))
    [chunk] = whole.chunks(0, last, bytes_of)
    assert whole.over and chunk["token_ids"] == [3] and chunk["finish_reason"] == "length"
    assert chunk["completion_usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


@pytest.mark.parametrize("order", [("stop", "length"), ("length", "stop"), ("stop", "stop")])
def test_of_several_choices_one_chunk_has_an_end(order: tuple[str, str]) -> None:
    """The runtime reads nothing after it; the frontend sees a stop by itself, so it is the other one that is told. It comes with the last
    tokens where it is theirs: the frontend reads no more of a request whose choices it has all seen to stop."""
    whole, chunks = Whole(2), []
    for index, reason in enumerate(order):
        end = RequestOutput("r", [index], finished=True, finish_reason=reason, usage=usage(7, 2, 4))
        chunks += whole.chunks(index, end, bytes_of)
    told = order.index("length") if "length" in order else 1
    assert [c["token_ids"] for c in chunks] == [[0], [1], []][: 2 + (told == 0)]
    assert ["finish_reason" in c for c in chunks] == [False, True] if told else [False, False, True]
    assert chunks[-1]["finish_reason"] == order[told] and chunks[-1]["index"] == told
    assert chunks[-1]["completion_usage"]["completion_tokens"] == 4
    assert chunks[-1]["completion_usage"]["prompt_tokens"] == 7


def test_log_probabilities_have_rank_text_and_bytes() -> None:
    judged = Sampled(9, -2.0, 3, ((1, -0.5),))
    end = RequestOutput(
        "r", [9], logprobs=[judged], prompt_logprobs=[None, judged], finished=True, finish_reason="stop"
    )
    [chunk] = Whole(1).chunks(0, end, bytes_of)
    assert chunk["log_probs"] == [-2.0]
    assert chunk["top_logprobs"] == [
        [
            {"rank": 1, "token_id": 1, "token": "1", "logprob": -0.5, "bytes": [49]},
            {"rank": 3, "token_id": 9, "token": "\ufffd", "logprob": -2.0, "bytes": [0xC3]},
        ]
    ]
    assert chunk["engine_data"]["prompt_logprobs"] == [
        None,
        {
            "1": {"logprob": -0.5, "rank": 1, "decoded_token": "1"},
            "9": {"logprob": -2.0, "rank": 3, "decoded_token": "\ufffd"},
        },
    ]


def test_settings_become_what_dynamo_reads() -> None:
    (config,) = load(
        [DynamoConfig], {"worker_host": "10.0.0.7", "metrics_port": "9100", "discovery_dir": "/d"}, {}
    )
    made = config.environment()
    assert made["DYN_TCP_RPC_HOST"] == made["DYN_SYSTEM_HOST"] == made["DYN_EVENT_PLANE_HOST"] == "10.0.0.7"
    assert made["DYN_SYSTEM_PORT"] == "9100" and made["DYN_FILE_KV"] == "/d"
    (config,) = load([DynamoConfig], {"log_level": "warning", "log_format": "json"}, {})
    assert config.environment()["DYN_LOG"] == "warn" and config.environment()["DYN_LOGGING_JSONL"] == "1"
    assert "DYN_SYSTEM_PORT" not in config.environment()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metrics_port": "40000"}, "32767"),
        ({"namespace": " "}, "namespace is empty"),
        ({"served_model_name": ["claude-*"]}, "claude-"),
        ({"discovery_backend": "etcd", "discovery_dir": "/d"}, "goes with file"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([DynamoConfig], settings, {})
    assert words in str(caught.value)


def test_without_dynamo_it_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dynamo", None)
    assert main(["dynamo"]) == 2
    told = capsys.readouterr().err
    assert "pip install --no-deps ai-dynamo==" in told and told.count("\n") == 1
