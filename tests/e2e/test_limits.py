"""Limits of a request that only the whole engine can keep."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from dsv4 import LLM, SamplingParams
from dsv4.errors import RequestError
from dsv4.text.stream import TextStream


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


def test_one_token_is_no_plural(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"after this prompt the context holds 1 token$"):
        llm.generate([[3] * 255], SamplingParams(max_tokens=None, min_tokens=2))


def test_a_max_tokens_that_does_not_fit_is_cut(llm: LLM) -> None:
    """Clients send the same maximum whatever the prompt (Claude Code 32,000)."""
    for left in (1, 6):
        prompt = [3] * (256 - left)
        completion = llm.generate([prompt], SamplingParams(max_tokens=32_000, ignore_eos=True))[0]
        assert len(completion.token_ids) == left and completion.finish_reason == "length"


def test_a_prompt_that_does_not_fit_is_refused(llm: LLM) -> None:
    for max_tokens in (1, 32_000, None):
        with pytest.raises(RequestError, match="prompt has 256 tokens, but the context holds 256") as e:
            llm.generate([[3] * 256], SamplingParams(max_tokens=max_tokens))
        assert (e.value.param, e.value.code) == ("prompt", "context_length_exceeded")
    llm.generate([[3] * 256], SamplingParams(max_tokens=0))


def test_a_max_tokens_that_does_not_fit_is_refused_where_that_is_set() -> None:
    llm = LLM(max_num_seqs=1, max_model_len=256, max_tokens_overflow="refuse")
    with pytest.raises(RequestError, match=r"max_tokens is 4, .*can be here is 3") as e:
        llm.generate([[3] * 253], SamplingParams(max_tokens=4))
    assert (e.value.param, e.value.code) == ("max_tokens", "context_length_exceeded")
    assert len(llm.generate([[3] * 253], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


def test_a_chat_is_opened_or_continued(llm: LLM) -> None:
    asked, half = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "He"}
    assert llm.tokenizer is not None

    def prompt(*messages: dict, **more: bool) -> str:
        return llm.tokenizer.decode(llm.chat_ids(messages, **more), skip_special=False)

    opened = prompt(asked, half)
    assert opened.endswith("He<｜end▁of▁sentence｜><｜Assistant｜></think>")
    assert prompt(asked, half, add_generation_prompt=False) == opened.removesuffix("<｜Assistant｜></think>")
    assert prompt(asked, {**half, "prefix": True}).endswith("<｜Assistant｜></think>He")
    assert prompt(asked, half, continue_final_message=True).endswith("<｜Assistant｜></think>He")
    assert prompt(asked, half, continue_final_message=True, thinking=True).endswith("<think></think>He")
    with pytest.raises(RequestError, match="the last message's role is 'user'"):
        llm.chat([asked], continue_final_message=True)


def test_an_answer_that_is_whole_ends(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the first call where calls are not to be parallel."""
    monkeypatch.setattr(TextStream, "ended", property(lambda stream: stream._tokens >= 3))
    completion = llm.generate("Who are you?", SamplingParams(max_tokens=30, ignore_eos=True))[0]
    assert (len(completion.token_ids), completion.finish_reason, completion.stop_reason) == (3, "stop", None)
    completion = llm.generate("Who are you?", SamplingParams(max_tokens=3, ignore_eos=True))[0]
    assert completion.finish_reason == "stop"
