"""What people get wrong with `LLM` and `AsyncEngine`: each mistake is one line that names it, and the engine goes on."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dsv4 import LLM, EngineConfig, SamplingParams
from dsv4.engine.messages import Submit
from dsv4.engine.request import RequestOutput
from dsv4.engine.routing import PLAIN, Routing
from dsv4.errors import ConfigError, RequestError
from dsv4.text.chat import ending_of

from tests.support.checkpoints import rewrite, write_release
from tests.support.engines import tiny_engine, write_tiny

PARAMS = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(str(model), num_pages="20", max_num_seqs="2", device="cpu", enable_prefix_caching="on")


def test_settings_are_written_as_flags_are() -> None:
    config = EngineConfig(
        kv_cache_memory="64MiB",  # type: ignore[arg-type]
        max_model_len="4k",  # type: ignore[arg-type]
        step_ms="2.5",
        enforce_eager="yes",  # type: ignore[arg-type]
        cudagraph_capture_sizes=[4, 1],  # type: ignore[arg-type]
    )
    assert config.kv_cache_memory == 64 * 2**20 and config.max_model_len == 4000
    assert config.step_ms == 2.5 and config.enforce_eager is True and config.cudagraph_capture_sizes == (1, 4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kv_cache_memory": "64XB"}, "kv_cache_memory is '64XB'; it takes a size above 0, such as 2GiB"),
        ({"max_num_seqs": 1.5}, "max_num_seqs is 1.5; it takes a whole number from 1"),
        ({"max_num_seqs": True}, "max_num_seqs is True; it takes a whole number from 1"),
        ({"max_num_sqs": 2}, "unknown setting 'max_num_sqs'; did you mean 'max_num_seqs'?"),
        ({"port": 8000}, "port is a setting of dsv4 serve; an engine takes none"),
        ({"quantization": "fp8"}, "unknown setting 'quantization': weights are used in the formats"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as told:
        LLM(**settings)
    assert str(told.value).startswith(says)


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ({"prompt_token_ids": [1]}, "prompts is an object"),
        (None, "prompts is null; it takes text, token ids, or a list of such"),
        (5, "prompts is 5; it takes"),
        ([[5], []], "prompts[1]: prompt is empty"),
        ([[5], {"prompt": [1]}], "prompts[1]: prompt is no list of token ids"),
        ([[5], [10**6], [7]], "prompts[1]: prompt holds token id 1000000; valid ids are 0 to "),
        ([[5], "text"], "prompts[1]: this model directory has no tokenizer"),
        ([10**6], "prompt holds token id 1000000"),
        ([7, -1], "prompt holds token id -1; valid ids are 0 to "),
    ],
)
def test_a_wrong_prompt_is_named_and_costs_nothing(llm: LLM, prompts: Any, says: str) -> None:
    with pytest.raises(RequestError) as told:
        llm.generate(prompts, PARAMS)
    assert str(told.value).startswith(says)
    assert not llm._loop.requests
    assert [len(c.token_ids) for c in llm.generate(([t] for t in (5, 6)), PARAMS)] == [2, 2]


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"max_tokens": 3}, "params is an object"),
        ([PARAMS, PARAMS], "params is a list of 2; it takes one SamplingParams(...)"),
        (SamplingParams(logit_bias={10**6: 5.0}), "logit_bias has the token id 1000000; valid ids are 0 to "),
    ],
)
def test_wrong_params_are_named(llm: LLM, model: Path, params: Any, says: str) -> None:
    with pytest.raises(RequestError) as told:
        llm.generate([[5], [6]], params)
    assert says in str(told.value)

    async def remote() -> None:
        async with tiny_engine(model) as engine:
            with pytest.raises(RequestError) as told:
                await anext(engine.generate([5], params))
            assert says in str(told.value)

    asyncio.run(remote())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"logit_bias": [1]}, "logit_bias is a list of 1; it must be a dict of token ids and numbers"),
        ({"ignore_eos": "yes"}, "ignore_eos is 'yes'; it must be true or false"),
        ({"stop": 5}, "stop is 5; it must be a list"),
        ({"stop_token_ids": "12"}, "stop_token_ids is '12'; it must be a list"),
        ({"stop": ["\ud83d"]}, "stop has '\\ud83d', half of a surrogate pair"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"temperature": -1}, "temperature is -1; it must be from 0 to 2; the nearest is 0"),
        ({"logprobs": 21}, "logprobs is 21; it must be from 0 to 20; the nearest is 20"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be from 0 to 1; the nearest is 1"),
        ({"grammar": 'start: "a"'}, "grammar is 'start: \"a\"'; it must be a Grammar(...)"),
    ],
)
def test_a_wrong_field_of_the_params_is_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        SamplingParams(**fields)


def test_numbers_may_be_numpys(model: Path) -> None:
    params = SamplingParams(
        max_tokens=np.int64(2),  # type: ignore[arg-type]
        temperature=np.float64(0),
        stop_token_ids=np.array([9]),  # type: ignore[arg-type]
        logit_bias={np.int64(3): np.float32(1)},  # type: ignore[dict-item]
        ignore_eos=True,
    )

    async def remote() -> int:
        async with tiny_engine(model) as engine:
            return sum([len(o.token_ids) async for o in engine.generate([5, 6], params)])

    assert asyncio.run(remote()) == 2


@pytest.mark.parametrize(
    ("hints", "says"),
    [
        ({"salt": 3}, "salt is 3; it must be Unicode text"),
        ({"tenant": "\ud83d"}, "tenant is '\\ud83d'; it must be Unicode text"),
        ({"session": 5}, "session is 5; it must be Unicode text"),
        (
            {"priority": "high"},
            "priority is 'high'; it must be a whole number from -2147483648 to 2147483647",
        ),
        ({"priority": 2**70}, "priority is 1180591620717411303424; it must be"),
        ({"retention": 101}, "retention is 101; it must be a whole number from -100 to 100"),
        ({"deadline_ms": float("nan")}, "deadline_ms is nan; it must be a number from 0 to 1e+09"),
        ({"ttl": -1}, "ttl is -1; it must be a number from 0 to 1e+09"),
    ],
)
def test_wrong_hints_are_named(hints: dict[str, Any], says: str) -> None:
    """They would reach the engine's process, where nobody could say what was wrong."""
    with pytest.raises(ValueError, match=re.escape(says)):
        Routing(**hints)


def test_a_wrong_salt_is_named(llm: LLM, model: Path) -> None:
    for salt in (3, None, "\ud83d"):
        with pytest.raises(RequestError, match=r"cache_salt is .*; it must be Unicode text"):
            llm.generate([[5]], PARAMS, cache_salt=salt)  # type: ignore[arg-type]

    async def remote() -> None:
        async with tiny_engine(model) as engine:
            with pytest.raises(RequestError, match="routing is 'high'; it takes one Routing"):
                await anext(engine.generate([5], PARAMS, routing="high"))  # type: ignore[arg-type]
            with pytest.raises(RequestError, match="cache_salt is 3"):
                await engine.pin([5], 3)  # type: ignore[arg-type]
            with pytest.raises(RequestError, match="prompt is empty"):
                await engine.pin([])

    asyncio.run(remote())


def test_an_engine_ends_at_a_message_that_it_cannot_read(model: Path) -> None:
    """It went on without whoever reads, and every later request waited for ever."""

    async def remote() -> None:
        async with tiny_engine(model) as engine:
            bad = Submit("no number", PARAMS, PLAIN, None, 0.0)  # type: ignore[arg-type]
            engine._send(bad, np.array([5], np.int32))
            for _ in range(400):
                if engine.ended is not None:
                    break
                await asyncio.sleep(0.05)
            assert "a message cannot be read: Expected `int`, got `str`" in (engine.ended or "")

    asyncio.run(remote())


def test_what_cannot_be_sent_is_not_waited_for(model: Path) -> None:
    async def remote() -> None:
        async with tiny_engine(model, stuck_after=0.2) as engine:
            with pytest.raises((TypeError, OverflowError)):
                await engine.ask("unpin", 2**100)
            await asyncio.sleep(0.5)
            assert engine.check_alive() == (True, "ok")

    asyncio.run(remote())


@pytest.mark.parametrize("messages", [None, "hi", {"role": "user", "content": "hi"}])
def test_messages_are_a_list(messages: Any) -> None:
    with pytest.raises(RequestError, match=r"messages is .*; it must be a list of messages"):
        ending_of(messages)


def test_threads_share_an_engine(llm: LLM) -> None:
    prompts = [[5, 6, 7], [8, 9], [10], [11, 12, 13, 14]]
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0)
    expected = [c.token_ids for c in llm.generate(prompts, params)]

    def ask(place: int) -> bool:
        i = place % len(prompts)
        if place % 2:
            return [t for o in llm.stream(prompts[i], params) for t in o.token_ids] == expected[i]
        return llm.generate([prompts[i]], params)[0].token_ids == expected[i]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(40)))


def test_a_callback_that_raises_ends_its_request_alone(llm: LLM) -> None:
    got: list[int] = []
    one = llm.submit([5], PARAMS, lambda output: 1 / 0)  # type: ignore[arg-type, return-value]
    llm.submit([6], PARAMS, lambda output: got.extend(output.token_ids))
    with pytest.raises(ZeroDivisionError):
        while llm.has_work():
            llm.step()
    assert one not in llm._loop.requests
    while llm.has_work():
        llm.step()
    assert got == llm.generate([[6]], PARAMS)[0].token_ids


def test_a_callback_may_ask_the_engine(llm: LLM) -> None:
    expected, got = llm.generate([[7]], PARAMS)[0].token_ids, []

    def ask(output: RequestOutput) -> None:
        if output.finished:
            got.append(llm.generate([[7]], PARAMS)[0].token_ids)

    llm.submit([5], PARAMS, ask)
    while llm.has_work():
        llm.step()
    assert got == [expected]


def test_a_closed_engine_says_so(model: Path) -> None:
    llm = LLM(str(model), num_pages=20, device="cpu")
    stream = llm.stream([5], SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    llm.close()
    llm.close()
    assert [output.finish_reason for output in stream][-1] == "abort"
    with pytest.raises(RequestError, match="the engine has stopped: it was closed; make a new one"):
        llm.generate([[5]], PARAMS)


def test_a_notebook_shows_the_text(llm: LLM) -> None:
    blocks = LLM(device="cpu", num_pages=8).chat([{"role": "user", "content": "Hello"}], PARAMS).blocks
    assert repr(blocks) == f"[Text({blocks.content!r})]" and blocks.content


def test_one_is_no_plural(tmp_path: Path) -> None:
    """`1 steps in flight`, `1 layers are left out`."""
    path = write_release(tmp_path, compress_ratios=[4, 0])
    rewrite(path, lambda flat: flat.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}))
    one = {"num_layers": 1, "num_pages": 1, "max_num_seqs": 1, "replay_tokens": 1, "async_scheduling": False}
    lines = LLM(str(path), device="cpu", block_size=128, **one).describe()
    said = "\n".join(lines)
    nouns = "layers|pages|tokens|steps|slabs|requests|rows|ranks|threads|buffers|matrices"
    assert not (wrong := re.findall(rf"(?<![\d.,])1 (?:{nouns})\b", said)), (wrong, said)
    for right in (
        "1 layer,",
        "left out: 1 layer (",
        "1 buffer ",
        "1 page of",
        "1 request of",
        "1 slab of",
        "1 step in",
        "replay 1 token,",
    ):
        assert right in said, (right, said)


def test_the_start_says_how_many_requests_the_pages_hold_and_what_is_not_exact(model: Path) -> None:
    """One page is one request's, however many of them would have room in it."""
    lines = LLM(str(model), num_pages=3, block_size=1024, max_model_len=512, replay_tokens=5).describe()
    said = {line.split()[0]: line for line in lines}
    assert said["capacity"].endswith(" 3,072 tokens of history; 3 requests of 512 tokens")
    assert "; replay 5 tokens, which is not exact below " in said["prefixes"]
