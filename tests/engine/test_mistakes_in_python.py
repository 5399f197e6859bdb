"""What people get wrong with `LLM` and `AsyncEngine`: each mistake is one line that names it, and the engine goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from dsv4 import LLM, EngineConfig, SamplingParams
from dsv4.errors import ConfigError, RequestError

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
        ({"kv_cache_memory": "64XB"}, "kv_cache_memory is '64XB'; it takes a size such as 2GiB"),
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


def test_a_notebook_shows_the_text(llm: LLM) -> None:
    blocks = LLM(device="cpu", num_pages=8).chat([{"role": "user", "content": "Hello"}], PARAMS).blocks
    assert repr(blocks) == f"[Text({blocks.content!r})]" and blocks.content


def test_the_start_says_how_many_requests_the_pages_hold_and_what_is_not_exact(model: Path) -> None:
    """One page is one request's, however many of them would have room in it."""
    lines = LLM(str(model), num_pages=3, block_size=1024, max_model_len=512, replay_tokens=5).describe()
    said = {line.split()[0]: line for line in lines}
    assert said["capacity"].endswith(" 3,072 tokens of history; 3 requests of 512 tokens")
    assert "; replay 5 tokens, which is not exact below " in said["prefixes"]
