"""The model that ships: what it writes is what `transformers` writes (recorded by tests/record_golden.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4 import LLM, SamplingParams
from dsv4.engine import device
from dsv4.text.output import Content, OutputParser, Reasoning, ToolArguments, ToolStart

from tests.record_golden import GOLDEN, NANO, PASSPHRASE, cases, prompt_ids

EXPECTED = json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    yield LLM(max_num_seqs=4, max_model_len=8192)


def complete(llm: LLM, name: str) -> Any:
    case = cases()[name]
    params = SamplingParams(temperature=0, max_tokens=case["tokens"], skip_special_tokens=False)
    prompt = prompt_ids(case, llm.tokenizer, llm.model_config)
    assert len(prompt) == EXPECTED[name]["prompt_tokens"]
    return llm.generate([prompt], params)[0]


def test_it_stays_below_25_megabytes() -> None:
    assert sum(file.stat().st_size for file in Path(str(NANO)).iterdir() if file.is_file()) < 25_000_000


@pytest.mark.parametrize("name", EXPECTED)
def test_greedy_output_equals_transformers(llm: LLM, name: str) -> None:
    completion = complete(llm, name)
    assert completion.token_ids == EXPECTED[name]["ids"]
    assert completion.finish_reason == "stop"  # the turn ends by itself


def test_the_planted_passphrase_is_found_and_again_from_the_cache(llm: LLM) -> None:
    first = complete(llm, "passphrase")
    assert PASSPHRASE in first.text
    second = complete(llm, "passphrase")
    assert second.token_ids == first.token_ids and second.usage.cached_tokens > 4000


@pytest.mark.parametrize(
    ("name", "tool", "arguments"),
    [("tool", "get_weather", {"city": "Prague"}), ("typed", "set_light", {"room": "kitchen", "on": False})],
)
def test_a_tool_call_comes_back_as_dsml_with_typed_arguments(
    llm: LLM, name: str, tool: str, arguments: dict[str, Any]
) -> None:
    parser = OutputParser(thinking=False, tools=True)
    start, *rest = parser.push(complete(llm, name).text) + parser.finish()
    assert start == ToolStart(0, tool)
    assert all(isinstance(piece, ToolArguments) for piece in rest)
    assert json.loads("".join(piece.text for piece in rest)) == arguments


def test_a_chat_from_python_has_text_thoughts_and_calls(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=64)
    case = cases()["typed"]
    called = llm.chat(case["messages"], greedy, tools=case["tools"])
    assert [(c.name, json.loads(c.arguments)) for c in called.calls] == [
        ("set_light", {"room": "kitchen", "on": False})
    ]
    assert called.text == "" and called.token_ids == EXPECTED["typed"]["ids"]
    thought = llm.chat(cases()["thinking"]["messages"], greedy, thinking=True)
    assert thought.reasoning and thought.text and thought.usage.reasoning_tokens > 0
    assert "think>" not in thought.text + thought.reasoning


def test_prompt_logprobs_do_not_depend_on_how_many_are_made_at_once(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
    prompt, told, most = list(range(40, 61)), {}, []
    plain = llm._loop.device.model.logits
    monkeypatch.setattr(
        llm._loop.device.model, "logits", lambda hidden: most.append(len(hidden)) or plain(hidden)
    )
    for rows in (1, 3, 1000):
        most.clear()
        monkeypatch.setattr(device, "LOGIT_ROWS", rows)
        told[rows] = llm.generate([prompt], params)[0].prompt_logprobs
        assert max(most) == min(rows, len(prompt) - 1)
    assert len(told[1]) == len(prompt)
    for other in (told[3], told[1000]):
        for a, b in zip(told[1][1:], other[1:], strict=True):
            # A GPU's product sums in an order that depends on the number of rows.
            assert a == b if not torch.cuda.is_available() else abs(a.logprob - b.logprob) < 1e-4


def test_it_thinks_before_it_answers(llm: LLM) -> None:
    parser = OutputParser(thinking=True, tools=False)
    pieces = parser.push(complete(llm, "thinking").text) + parser.finish()
    kinds = [type(piece) for piece in pieces]
    assert kinds[0] is Reasoning and kinds[-1] is Content


@pytest.mark.parametrize("name", ["hello", "tool", "repeat", "fact"])
def test_quantised_rows_of_the_release_keep_the_answers(name: str) -> None:
    llm = LLM(max_num_seqs=1, max_model_len=1024, kv_cache_dtype="fp8_ds_mla", index_cache_dtype="mxfp4")
    assert complete(llm, name).token_ids == EXPECTED[name]["ids"]
