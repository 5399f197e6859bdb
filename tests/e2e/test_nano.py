"""The model that ships: what it writes is what `transformers` writes (recorded by tests/record_golden.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from dsv4 import LLM, SamplingParams
from dsv4.text.output import OutputParser, ToolArguments, ToolStart

from tests.record_golden import GOLDEN, PASSPHRASE, cases, prompt_ids

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


def test_a_tool_call_comes_back_as_dsml(llm: LLM) -> None:
    parser = OutputParser(thinking=False, tools=True)
    pieces = parser.push(complete(llm, "tool").text) + parser.finish()
    assert pieces == [ToolStart(0, "get_weather"), ToolArguments(0, '{"city": "Prague"}')]


@pytest.mark.parametrize("name", ["hello", "tool"])
def test_quantised_rows_of_the_release_keep_the_answers(name: str) -> None:
    llm = LLM(max_num_seqs=1, max_model_len=1024, kv_cache_dtype="fp8_ds_mla", index_cache_dtype="mxfp4")
    assert complete(llm, name).token_ids == EXPECTED[name]["ids"]
