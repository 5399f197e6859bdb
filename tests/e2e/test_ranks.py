"""An engine of two ranks in processes of their own, over gloo: whatever a request goes through, its tokens and log-probabilities are
those of the cold run, to the bit. One rank gives the same tokens, and log-probabilities within a tolerance."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dsv4 import LLM, SamplingParams
from dsv4.engine import group
from dsv4.engine.grammars import Grammars
from dsv4.engine.llm import Completion
from dsv4.engine.routing import Routing
from dsv4.errors import ConfigError, EngineDead, RequestError
from dsv4.sampling import Grammar
from dsv4.text.form import Format

from tests.engine.test_process import nothing_stays
from tests.record_golden import GOLDEN, cases, prompt_ids
from tests.support.checkpoints import write_random
from tests.support.letters import VOCABULARY, Letters
from tests.support.scripted import children, environment

NEAR = 1e-4
"""How far log-probabilities of one rank and of two may lie apart."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("model"), "flash", compress_ratios=[0, 4, 128], index_topk=24)


@contextlib.contextmanager
def engine(model: Path, **settings: Any) -> Iterator[LLM]:
    defaults: dict[str, Any] = dict(
        tensor_parallel_size=2,
        device="cpu",
        max_model_len=2048,
        max_num_batched_tokens=300,
        max_num_seqs=4,
        num_pages=64,
        rank_timeout=120,
    )
    llm = LLM(str(model), **defaults | settings)
    try:
        yield llm
    finally:
        llm.close()


@pytest.fixture(scope="module")
def warm(model: Path) -> Iterator[LLM]:
    """Two steps in flight, and little room: 10 pages of 256 tokens."""
    with engine(
        model, async_scheduling=True, num_pages=10, max_model_len=1100, snapshot_policy="every:256"
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def cold(model: Path) -> Iterator[LLM]:
    with engine(model, enable_prefix_caching=False, max_num_seqs=1) as llm:
        yield llm


def tokens(seed: int, n: int) -> list[int]:
    r = random.Random(seed)
    return [r.randrange(3, 256) for _ in range(n)]


def sampled(n: int, seed: int = 0, temperature: float = 1.0, **options: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=n, temperature=temperature, seed=seed, ignore_eos=True, logprobs=5, **options
    )


def same(a: Completion, b: Completion) -> bool:
    return (a.token_ids, a.logprobs, a.prompt_logprobs) == (b.token_ids, b.logprobs, b.prompt_logprobs)


def test_a_prefix_is_reused_to_the_bit(warm: LLM, cold: LLM) -> None:
    prefix = tokens(1, 700)
    warm.generate([prefix], sampled(1))
    for k, n in enumerate((513, 650, 700)):
        ids = prefix[:n] + tokens(2 + k, 20)
        again = warm.generate([ids], sampled(4))[0]
        assert again.usage is not None and again.usage.explanation["history_matched"] == 512
        assert same(again, cold.generate([ids], sampled(4))[0])
    warm.core.check()
    assert warm.core.stats()["snapshots_used"] > 0


def test_a_replay_is_exact(model: Path, cold: LLM) -> None:
    costs = "token_us=1,replay_factor=0,restore_us=1e9"
    with engine(model, snapshot_policy="none", cost_model=costs) as llm:
        prefix = tokens(10, 800)
        llm.generate([prefix], sampled(1))
        again = llm.generate([prefix + tokens(11, 30)], sampled(4))[0]
        assert again.usage is not None and again.usage.explanation["replayed"] > 300
        assert same(again, cold.generate([prefix + tokens(11, 30)], sampled(4))[0])


def test_choices_fork(warm: LLM, cold: LLM) -> None:
    before, ids = warm.core.stats()["forks"], tokens(27, 257)
    done = [Completion() for _ in range(4)]
    parent = warm.submit(ids, sampled(6, temperature=0), done[0].add)
    for k in range(1, 4):
        warm.submit(ids, sampled(6, seed=k), done[k].add, parent=parent)
    while warm.has_work():
        warm.step()
    assert warm.core.stats()["forks"] == before + 3
    for k, choice in enumerate(done):
        assert same(choice, cold.generate([ids], sampled(6, seed=k, temperature=k and 1.0))[0])


def test_a_request_that_gives_way_goes_on_where_it_was(model: Path, cold: LLM) -> None:
    with engine(model, max_num_seqs=1, async_scheduling=True, snapshot_policy="none") as llm:
        first, second, low, high = Completion(), Completion(), tokens(30, 200), tokens(31, 60)
        llm.submit(low, sampled(20, 1), first.add)
        while len(first.token_ids) < 9:
            llm.step()
        llm.submit(high, sampled(5, 2), second.add, routing=Routing(priority=1))
        while llm.has_work():
            llm.step()
        llm.core.check()
        stats = llm.core.stats()
        assert (stats["unparked"], stats["recomputed_tokens"], stats["replayed_tokens"]) == (1, 0, 0)
    assert same(first, cold.generate([low], sampled(20, 1))[0])
    assert same(second, cold.generate([high], sampled(5, 2))[0])


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_that_gives_way_without_room_for_its_state_is_computed_again(
    model: Path, cold: LLM, overlap: bool
) -> None:
    """Four requests of one page that grow to two, in a pool of five."""
    prompts = [tokens(32 + k, 240 + k) for k in range(4)]
    settings: dict[str, Any] = dict(num_pages=5, max_model_len=1024, snapshot_policy="none")
    with engine(model, async_scheduling=overlap, **settings) as llm:
        done = [Completion() for _ in prompts]
        for k, ids in enumerate(prompts):
            llm.submit(ids, sampled(30, k), done[k].add)
        while llm.has_work():
            llm.step()
            llm.core.check()
        stats = llm.core.stats()
        assert stats["preemptions"] > stats["unparked"] and stats["recomputed_tokens"] > 0
    for k, ids in enumerate(prompts):
        assert same(done[k], cold.generate([ids], sampled(30, k))[0])


def test_what_is_pinned_stays_on_every_rank(model: Path, cold: LLM) -> None:
    """Its history and its states, through prompts that take all other pages; after the pin it goes like any other prefix."""
    with engine(model, num_pages=16, max_model_len=1100, snapshot_policy="every:256", eviction="lru") as llm:
        prefix = tokens(36, 520)
        llm.generate([prefix], sampled(1))
        pin = llm.core.pin(b"", np.asarray(prefix, np.int32))
        kept = llm.core.stats()["pinned_pages"]
        assert kept > 2

        def crowd(seed: int) -> None:
            for k in range(3):
                llm.generate([tokens(seed + k, 1000)], sampled(1))
            llm.core.check()

        crowd(37)
        stats = llm.core.stats()
        assert stats["evicted_blocks"] > 0 and (stats["pins_broken"], stats["pinned_pages"]) == (0, kept)
        again = llm.generate([prefix], sampled(4))[0]
        assert again.usage is not None and again.usage.cached_tokens == 512
        assert same(again, cold.generate([prefix], sampled(4))[0])
        assert llm.core.unpin(pin) and llm.core.stats()["pinned_pages"] == 0
        crowd(47)
        last = llm.generate([prefix], sampled(4))[0]
        assert last.usage is not None and last.usage.cached_tokens < 512  # the states have gone
        assert same(last, again)


def test_one_rank_gives_the_same(model: Path, cold: LLM) -> None:
    """Log-probabilities of prompts too, penalties, a biased token and a prompt that is aborted between."""
    alone = LLM(str(model), device="cpu", num_pages=64, max_model_len=2048, max_num_seqs=1)
    for k, n in enumerate((3, 700)):
        params = sampled(6, temperature=0, prompt_logprobs=2, presence_penalty=1.0, logit_bias={7: 2.0})
        one, two = (llm.generate([tokens(40 + k, n)], params)[0] for llm in (alone, cold))
        assert one.token_ids == two.token_ids and one.prompt_logprobs and two.prompt_logprobs
        pairs = list(
            zip(one.logprobs + one.prompt_logprobs[1:], two.logprobs + two.prompt_logprobs[1:], strict=True)
        )  # type: ignore[operator]
        assert max(abs(a.logprob - b.logprob) for a, b in pairs) < NEAR
        cold.submit(tokens(50, 900), sampled(50), lambda output: None)
        cold.step()
        cold.abort_all()
    cold.core.check()


def test_a_prompt_that_ranks_cut_keeps_its_log_probabilities(warm: LLM, cold: LLM) -> None:
    params = sampled(2, temperature=0, prompt_logprobs=1)
    assert same(warm.generate([tokens(60, 640)], params)[0], cold.generate([tokens(60, 640)], params)[0])


@pytest.mark.parametrize("which", ["warm", "cold"])
def test_a_grammar_binds_several_ranks(model: Path, which: str, request: pytest.FixtureRequest) -> None:
    """Masks are made while all compute; one that cannot be made leaves the others in the midst of a step, and costs its requests."""
    llm: LLM = request.getfixturevalue(which)
    alone = LLM(str(model), device="cpu", num_pages=16, max_num_seqs=1)
    for one in (llm, alone):
        one._loop.grammars = Grammars(Letters, VOCABULARY, [1])  # type: ignore[arg-type]
    grammar = Grammar(Format("regex", "([ab]{3}-){2}c", "guided_regex").text(), "guided_regex")
    params = SamplingParams(max_tokens=40, seed=3, grammar=grammar)
    expected = alone.generate([tokens(70, 9)], params)[0].token_ids
    assert len(expected) == 10 and llm.generate([tokens(70, 9)], params)[0].token_ids == expected

    def fails(*arguments: Any) -> Any:
        raise ValueError("no mask today")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm._loop.grammars.maker, "masks", fails)
        with pytest.raises(RequestError, match="no mask today"):
            llm.generate([tokens(70, 9)], params)
    assert llm.generate([tokens(70, 9)], params)[0].token_ids == expected
    llm.core.check()


def test_the_model_that_ships_writes_what_it_should_on_two_ranks() -> None:
    expected = json.loads(GOLDEN.read_text())
    llm = LLM(max_num_seqs=4, max_model_len=1024, device="cpu", tensor_parallel_size=2)
    try:
        names = ("hello", "repeat", "result")
        prompts = [prompt_ids(cases()[name], llm.tokenizer, llm.model_config) for name in names]
        done = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=60, skip_special_tokens=False))
        assert [c.token_ids for c in done] == [expected[name]["ids"] for name in names]
        assert any("2 (tensor_parallel_size), a process each" in line for line in llm.describe())
    finally:
        llm.close()


SHAPES: dict[int, dict[str, Any]] = {
    3: dict(
        kind="flash", compress_ratios=[0, 4, 128], num_attention_heads=6, o_groups=3, moe_intermediate_size=96
    ),
    4: dict(kind="pro", compress_ratios=[128, 4, 128], o_groups=4, moe_intermediate_size=128),
    8: dict(
        kind="pro",
        compress_ratios=[128, 4, 128],
        num_attention_heads=8,
        o_groups=8,
        moe_intermediate_size=256,
    ),
}


@pytest.mark.parametrize("ranks", SHAPES)
def test_more_ranks_give_what_one_does(ranks: int, tmp_path: Path) -> None:
    """A prompt that they cut beside one that they share, then one that hits. Nothing stays of engines that nobody holds any more."""
    path, told = write_random(tmp_path / "model", index_topk=16, **SHAPES[ranks]), []
    params, length = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True), 900 if ranks < 8 else 1100
    for r in (1, ranks):
        settings: dict[str, Any] = dict(num_pages=12, max_num_seqs=2, max_num_batched_tokens=700)
        before = children(os.getpid())
        llm = LLM(str(path), device="cpu", tensor_parallel_size=r, **settings)
        done = llm.generate([tokens(76, length), tokens(77, 30)], params)
        done += llm.generate([[*tokens(76, length), 9]], params)
        assert done[2].usage is not None and done[2].usage.cached_tokens >= 512
        told.append([completion.token_ids for completion in done])
        assert len(children(os.getpid())) == len(before) + r - 1
        del llm
        gc.collect()
        assert children(os.getpid()) == before
    assert told[0] == told[1]


def test_weights_that_are_made_up_are_those_of_one_rank(model: Path) -> None:
    settings: dict[str, Any] = dict(
        load_format="dummy", device="cpu", num_pages=8, max_num_seqs=1, num_layers=2
    )
    params, told = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True), []
    for ranks in (1, 2):
        llm = LLM(str(model), tensor_parallel_size=ranks, **settings)
        told.append(llm.generate([tokens(75, 9)], params)[0].token_ids)
        llm.close()
    assert told[0] == told[1]


@contextlib.contextmanager
def breaking(monkeypatch: pytest.MonkeyPatch, how: str, at: int) -> Iterator[None]:
    """Ranks that are started meanwhile do something wrong at a step."""
    with monkeypatch.context() as patch:
        patch.setattr(group, "PROCESS", "tests.support.breaking_rank")
        for name, value in environment().items():
            patch.setenv(name, value)
        patch.setenv("BREAKS_HOW", how)
        patch.setenv("BREAKS_AT", str(at))
        yield


@pytest.mark.parametrize("how", ["raise", "raise after"])
def test_a_step_that_fails_on_one_rank_costs_its_requests_alone(
    model: Path, cold: LLM, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with breaking(monkeypatch, how, 4), engine(model, async_scheduling=True) as llm:
        with pytest.raises(RequestError, match="rank 1: ValueError: a rank's own fault"):
            llm.generate([tokens(80, 20)], sampled(20))
        assert same(
            llm.generate([tokens(81, 20)], sampled(4))[0], cold.generate([tokens(81, 20)], sampled(4))[0]
        )
        llm.core.check()


def test_a_step_that_fails_on_rank_0_costs_its_requests_alone(
    model: Path, cold: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the ranks wait in the midst of it: its draw fails."""
    expected = cold.generate([tokens(81, 20)], sampled(4))[0]
    for part in ("_computed", "_logits"):
        with monkeypatch.context() as patch:

            def fails(*arguments: Any) -> None:
                raise ValueError("rank 0's own fault")

            patch.setattr(cold._loop.device, part, fails)
            with pytest.raises(RequestError, match="rank 0's own fault"):
                cold.generate([tokens(80, 20)], sampled(2))
        assert same(cold.generate([tokens(81, 20)], sampled(4))[0], expected)


def rank_1(llm: LLM) -> int:
    """Its process."""
    pid: int = llm._loop.device._group._peers[0].child.pid
    return pid


def test_a_rank_that_is_killed_ends_the_engine_by_name(model: Path) -> None:
    with nothing_stays(), engine(model) as llm:
        begun: list[Any] = []
        llm.submit(tokens(90, 20), sampled(1000), begun.append)
        while not begun:
            llm.step()
        os.kill(rank_1(llm), signal.SIGKILL)
        with pytest.raises(EngineDead, match=r"rank 1 of 2 is gone, it was killed by SIGKILL"):
            while llm.has_work():
                llm.step()
        with pytest.raises((EngineDead, RequestError), match="rank 1 of 2"):
            llm.generate([tokens(91, 20)], sampled(1))


def test_a_rank_that_hangs_is_named_with_the_stacks_of_all(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(group, "STACKS_WAIT", 60.0)  # rank 1 tells where it is, however busy the machine
    with (
        breaking(monkeypatch, "hang", 3),
        nothing_stays(),
        engine(model, rank_timeout=10) as llm,
        pytest.raises(EngineDead, match="rank 1 of 2 has not gone on for"),
    ):
        llm.generate([tokens(90, 20)], sampled(20))
    told = caplog.text
    assert "rank 0 is at" in told and "rank 1 is at" in told
    assert (
        "in launch" in told.partition("rank 1 is at")[0] and "in breaks" in told.partition("rank 1 is at")[2]
    )


def test_a_rank_that_is_stopped_is_named(model: Path) -> None:
    with nothing_stays(), engine(model, rank_timeout=10) as llm:
        os.kill(rank_1(llm), signal.SIGSTOP)
        with pytest.raises(EngineDead, match=r"rank 1 of 2 has not .*; it is stopped \(SIGSTOP\)"):
            llm.generate([tokens(90, 20)], sampled(2000))


def test_a_rank_that_cannot_start_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "PROCESS", "this.is.no.module")
    with nothing_stays(), pytest.raises(EngineDead, match="rank 1 of 2 is gone, it ended with exit code 1"):
        LLM(str(model), device="cpu", num_pages=8, max_num_seqs=1, tensor_parallel_size=2)


@pytest.mark.parametrize(("ranks", "nearest"), [(3, 2), (4, 2), (8, 2)])
def test_a_model_that_ranks_do_not_divide_is_refused(model: Path, ranks: int, nearest: int) -> None:
    with pytest.raises(ConfigError, match=f"tensor_parallel_size is {ranks}; .*the nearest is {nearest}"):
        LLM(str(model), device="cpu", tensor_parallel_size=ranks)
    with pytest.raises(ConfigError, match="block_size is 128; it must be a multiple of 256"):
        LLM(str(model), device="cpu", tensor_parallel_size=2, block_size=128)
