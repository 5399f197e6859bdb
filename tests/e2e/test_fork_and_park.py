"""Requests that take over the state of another, and requests that give way with their state saved, generate what they would
have generated alone. Memory is poisoned as in test_reuse.py. On the CPU, where the reference is batch-invariant: with sampling
in play equal means equal bits."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dsv4.engine.build
import pytest
from dsv4 import LLM, SamplingParams
from dsv4.cache.paged import PagedCache
from dsv4.engine.llm import Completion
from dsv4.engine.routing import Routing

from tests.support.checkpoints import write_random


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path: Path = write_random(tmp_path_factory.mktemp("model"), "flash", compress_ratios=[0, 4, 128])

    def make(**settings: Any) -> LLM:
        defaults = dict(
            device="cpu", block_size=128, max_model_len=1024, max_num_batched_tokens=128, num_pages=64
        )
        return LLM(str(path), **defaults | settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsv4.engine.build, "PagedCache", functools.partial(PagedCache, poison=True))
        yield make


KEYS: dict[int, int] = {}
"""Numbers of requests by what becomes of them."""


def tokens(seed: int, n: int) -> list[int]:
    r = random.Random(seed)
    return [r.randrange(3, 256) for _ in range(n)]


def sampled(seed: int, n: int = 6, temperature: float = 1.0) -> SamplingParams:
    return SamplingParams(max_tokens=n, temperature=temperature, seed=seed, ignore_eos=True, logprobs=5)


def submit(
    llm: LLM, ids: list[int], params: SamplingParams, *, parent: Completion | None = None, **hints: Any
) -> Completion:
    done = Completion()
    key = None if parent is None else KEYS[id(parent)]
    KEYS[id(done)] = llm.submit(ids, params, done.add, routing=Routing(**hints), parent=key)
    return done


def finish(llm: LLM) -> None:
    while llm.has_work():
        llm.step()
        llm.core.check()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("n", [3, 130, 257])
def test_choices_are_what_separate_requests_give(start: Any, overlap: bool, n: int) -> None:
    llm, alone = (
        start(async_scheduling=overlap, max_num_seqs=4),
        start(enable_prefix_caching=False, max_num_seqs=1),
    )
    ids = tokens(n, n)
    choices = [submit(llm, ids, sampled(0, temperature=0))]
    choices += [submit(llm, ids, sampled(k), parent=choices[0]) for k in range(1, 4)]
    finish(llm)
    stats = llm.core.stats()
    assert stats["forks"] == 3
    for k, choice in enumerate(choices):
        assert choice == _like(choice, alone.generate([ids], sampled(k, temperature=k and 1.0))[0])


def _like(got: Completion, expected: Completion) -> Completion:
    """The expected completion with the usage of the other: what was cached is not to be equal."""
    expected.usage = got.usage
    return expected


def test_a_live_request_is_forked_in_the_middle_of_its_answer(start: Any) -> None:
    llm, alone = start(max_num_seqs=4), start(enable_prefix_caching=False, max_num_seqs=1)
    ids = tokens(9, 140)
    parent = submit(llm, ids, sampled(1, 40))
    while len(parent.token_ids) < 7:
        llm.step()
    said = [*ids, *parent.token_ids]
    child = submit(llm, said, sampled(2, 12), parent=parent)
    finish(llm)
    assert llm.core.stats()["forks"] == 1
    assert parent.token_ids == alone.generate([ids], sampled(1, 40))[0].token_ids
    assert child.token_ids == alone.generate([said], sampled(2, 12))[0].token_ids


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_that_lost_its_slab_goes_on_where_it_was(start: Any, overlap: bool) -> None:
    llm = start(max_num_seqs=1, num_pages=256, async_scheduling=overlap, snapshot_policy="none")
    alone = start(enable_prefix_caching=False, max_num_seqs=1)
    low, high = tokens(20, 200), tokens(21, 60)
    first = submit(llm, low, sampled(1, 30))
    while len(first.token_ids) < 9:
        llm.step()
    second = submit(llm, high, sampled(2, 5), priority=1)
    finish(llm)
    stats = llm.core.stats()
    assert (stats["preempted_with_state"], stats["unparked"]) == (1, 1)
    assert (stats["recomputed_tokens"], stats["replayed_tokens"]) == (0, 0)
    assert first.token_ids == alone.generate([low], sampled(1, 30))[0].token_ids
    assert second.token_ids == alone.generate([high], sampled(2, 5))[0].token_ids


def test_a_prompt_that_gives_way_for_a_page_goes_on_where_it_was(start: Any) -> None:
    """Two requests of 5 pages: together they are one too many, and the prompt has unwritten pages for its state."""
    llm = start(max_num_seqs=2, num_pages=9, snapshot_policy="none", max_num_batched_tokens=32)
    alone = start(enable_prefix_caching=False, max_num_seqs=1)
    decode, long = tokens(30, 240), tokens(31, 600)
    first = submit(llm, decode, sampled(1, 60))
    while not first.token_ids:
        llm.step()
    second = submit(llm, long, sampled(2, 3))
    finish(llm)
    assert first.token_ids == alone.generate([decode], sampled(1, 60))[0].token_ids
    assert second.token_ids == alone.generate([long], sampled(2, 3))[0].token_ids


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "never hit the cache" in r.getMessage()]


def test_prefixes_that_never_hit_are_told_once(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Each request has a salt of its own."""
    llm, ids = start(max_num_seqs=4), tokens(40, 130)
    for k in range(100):
        llm.generate([ids], sampled(1, 1), cache_salt=f"user {k}")
    assert len(told(caplog)) == 1
    assert re.search(r"tokens lost: salt \d+\. .* the same cache_salt", told(caplog)[0])
    assert llm.core.stats()["zero_hit_warnings"] > 1


@pytest.mark.parametrize("n", [5, 128])
def test_prompts_without_a_whole_block_to_hit_are_no_reason_to_warn(
    start: Any, caplog: pytest.LogCaptureFixture, n: int
) -> None:
    """A block is 128 tokens, and the last token of a prompt is always computed."""
    llm = start(max_num_seqs=4)
    for k in range(2):
        llm.generate([tokens(40, n)] * 48, sampled(1, 1), cache_salt=f"user {k}")
    assert not told(caplog) and llm.core.stats()["zero_hit_warnings"] == 0


def test_equal_prompts_that_come_at_once_are_no_reason_to_warn(
    start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """None of them could have hit what the others have not stored yet."""
    llm = start(max_num_seqs=40, num_pages=256, max_num_batched_tokens=40 * 140)
    llm.generate([tokens(40, 130)] * 40, sampled(1, 1))
    assert not told(caplog) and llm.core.stats()["zero_hit_warnings"] == 0
