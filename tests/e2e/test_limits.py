"""Limits of a request that only the whole engine can keep."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from dsv4 import LLM, SamplingParams
from dsv4.errors import RequestError


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    yield LLM(max_num_seqs=1, max_model_len=256)


def test_a_stop_string_before_min_tokens_is_plain_text(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, min_tokens=12, stop=("e",), ignore_eos=True)
    completion = llm.generate("Who are you?", params)[0]
    assert len(completion.token_ids) >= 12


def test_more_min_tokens_than_the_context_holds_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"min_tokens is 254.*253") as e:
        llm.generate([[3, 4, 5]], SamplingParams(max_tokens=None, min_tokens=254))
    assert (e.value.param, e.value.status) == ("min_tokens", 400)
