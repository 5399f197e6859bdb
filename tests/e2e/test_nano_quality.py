"""The model that ships on a text with planted passphrases: what random weights cannot show.

Its attention means something, so an entry that is lost, stale or chosen wrongly is a wrong word in an answer. The text is
from this repository's LICENSE: longer than the model's replay (889 tokens), with five times more entries than the
indexer's 64. Where there is a GPU, it is asked there too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4 import LLM, SamplingParams

LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text()
PLANTED = {
    "harbor": "violet-anchor-42",
    "candle": "marble-forest-tunnel",
    "river bank": "pepper-window",
    "engine": "silver-bridge-707",
}
BITS_PER_BYTE = 1.27
"""Of the licence's text: a twentieth above what the model has."""

NEAR = {"cpu": 1e-4, "cuda": 0.1}
"""How far log-probabilities of the cold and the warm run may lie apart: kernels sum a chunk and a token in other orders."""

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

ROWS = {"kv_cache_dtype": "fp8_ds_mla", "index_cache_dtype": "mxfp4"}
WAYS: dict[str, dict[str, Any]] = {
    "snapshots": {"cost_model": "token_us=1,replay_factor=1000,restore_us=0"},
    "replay": {"snapshot_policy": "none", "cost_model": "token_us=1,replay_factor=0,restore_us=1e9"},
    "small chunks": {"max_num_batched_tokens": 160},
}


def text() -> str:
    """About 1,300 tokens."""
    pieces = [LICENSE[i : i + 1000] for i in range(0, 5000, 1000)]
    plants = [f"\n\nThe passphrase for {key} is {value}.\n\n" for key, value in PLANTED.items()]
    return "".join(a + b for a, b in zip(pieces, [*plants, ""], strict=True))


def questions(llm: LLM) -> list[list[int]]:
    def prompt(key: str) -> list[int]:
        content = f"{text()}\n\nWhat is the passphrase for {key}?"
        return llm.chat_ids([{"role": "user", "content": content}])

    return [prompt(key) for key in PLANTED]


def start(**settings: Any) -> LLM:
    return LLM(**{"max_num_seqs": 4, "max_model_len": 4096, "block_size": 128, "num_pages": 400} | settings)


def answers(llm: LLM, prompts: list[list[int]]) -> list[Any]:
    return llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24, logprobs=5))


def found(completions: list[Any]) -> list[bool]:
    wanted = [f"The passphrase for {key} is {value}." for key, value in PLANTED.items()]
    return [c.text == w and c.finish_reason == "stop" for c, w in zip(completions, wanted, strict=True)]


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def llm(device: str) -> Iterator[LLM]:
    yield start(device=device)


@pytest.fixture(scope="module")
def cold(device: str) -> list[Any]:
    """Each question on an engine that keeps nothing."""
    llm = start(device=device, enable_prefix_caching=False)
    return answers(llm, questions(llm)[:2])


def test_every_passphrase_is_found_and_the_text_is_read_once(llm: LLM) -> None:
    prompts = questions(llm)
    first = answers(llm, prompts[:1])
    rest = answers(llm, prompts[1:])
    assert found(first + rest) == [True] * len(PLANTED)
    assert all(c.usage.cached_tokens > 0.8 * len(p) for c, p in zip(rest, prompts[1:], strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_reuse_gives_what_the_cold_run_gives(cold: list[Any], device: str, way: str) -> None:
    llm = start(device=device, **WAYS[way])
    prompts = questions(llm)[:2]
    warm = [answers(llm, [p])[0] for p in prompts] + answers(llm, prompts)
    assert all(c.usage.cached_tokens > 0 for c in warm[1:])
    for c, expected in zip(warm, cold + cold, strict=True):
        assert c.token_ids == expected.token_ids
        pairs = zip(c.logprobs, expected.logprobs, strict=True)
        assert all(abs(a.logprob - b.logprob) < NEAR[device] for a, b in pairs)


def test_rows_of_the_release_find_them_too(device: str) -> None:
    """584-byte rows and FP4 index rows, chosen by the same indexer."""
    llm = start(device=device, **ROWS)
    assert found(answers(llm, questions(llm))) == [True] * len(PLANTED)


def test_likelihood_of_plain_text_with_either_kind_of_rows(device: str) -> None:
    exact = bits_per_byte(start(device=device, kv_cache_dtype="float32", index_cache_dtype="float32"))
    stored = bits_per_byte(start(device=device, **ROWS))
    assert exact < BITS_PER_BYTE
    assert abs(stored - exact) < 0.01 * exact


def bits_per_byte(llm: LLM) -> float:
    ids = llm.tokenizer.encode(LICENSE[:4000])
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    told = [s.logprob for s in llm.generate([ids], params)[0].prompt_logprobs if s is not None]
    return -sum(told) / math.log(2) / 4000
