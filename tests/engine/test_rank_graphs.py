"""Steps of several ranks as graphs hold them, run as they are on the CPU over gloo: all ranks capture the same, and what requests get is
what they get without graphs, to the bit."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from dsv4 import LLM, SamplingParams
from dsv4.config import default_step_tokens, step_budget
from dsv4.engine import group, warmup
from dsv4.engine.group import Group
from dsv4.engine.late import late_captures
from dsv4.engine.ranked import FollowingDevice, LeadingDevice, LedStep, RankDevice
from dsv4.engine.sampler import KINDS
from dsv4.errors import RankLost
from dsv4.model.parallel import UNIT
from dsv4.model.rank import Rank
from dsv4.plan import graphs as sizes
from dsv4.plan.graphs import captured_tokens, cut_sizes_of, extends_of, owned_of, sizes_of, steps_of

from tests.engine.test_capture_at_start import Counting
from tests.engine.test_graphs import capture
from tests.support.checkpoints import write_random
from tests.support.models import random_config, random_weights
from tests.support.ranks import RankDriver, run_ranks
from tests.support.scripted import python_path

SETTINGS: dict[str, Any] = dict(
    tensor_parallel_size=2, device="cpu", max_model_len=1024, max_num_batched_tokens=600, max_num_seqs=4,
    num_pages=40, rank_timeout=120, async_scheduling=True, snapshot_policy="every:256",
)  # fmt: skip
SHORT, LONG = [5, 9, 100, 7], [(7 * i) % 250 + 3 for i in range(560)]
"""Of these the first is shared by the ranks, the second cut over them."""


def params(n: int = 5, **given: Any) -> SamplingParams:
    return SamplingParams(**dict(max_tokens=n, temperature=1.0, seed=3, ignore_eos=True) | given)


def answers(llm: LLM) -> Iterator[tuple[Any, ...]]:
    """Decodes alone and beside chunks, short prompts and long ones, hits, every kind of draw, log-probabilities of tokens and of prompts, and more
    rows than are captured."""
    kinds = [
        params(), params(temperature=0), params(top_p=0.9, presence_penalty=1.0), params(logprobs=3), params(prompt_logprobs=2),
    ]  # fmt: skip
    batches = [
        ([SHORT], kinds),
        ([SHORT, LONG, SHORT * 9], kinds[1:2]),
        ([LONG + SHORT * 20, LONG[:300]], kinds[3:4]),
    ]
    batches += [([SHORT * k for k in (1, 2, 3, 40)], kinds[:1])]
    for prompts, knobs in batches:
        for given in knobs:
            for o in llm.generate(prompts, given):
                yield o.token_ids, o.logprobs, o.prompt_logprobs


def test_captured_steps_are_those_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(write_random(tmp_path, "flash", compress_ratios=[0, 4, 128], index_topk=24))
    plain = LLM(model, **SETTINGS)
    expected, left = list(answers(plain)), list[int]()
    plain.close()
    capture(monkeypatch)
    monkeypatch.setattr(group, "PROCESS", "tests.support.capturing_rank")
    monkeypatch.setenv("PYTHONPATH", python_path())
    llm = LLM(model, cudagraph_capture_sizes=(1, 2), **SETTINGS)
    try:
        assert list(answers(llm)) == expected
        device = llm._loop.device
        assert {size for size, _ in device.graphs._replays} == {1, 2} == set(device.graphs._heads)
        taken = {(type(s).__name__, s.tokens) for s in device.extends._graphs}
        assert {("Size", 64), ("DealtSize", 256)} <= taken, (
            taken
        )  # all tokens on both ranks, or up to 256 on each
        assert "decode steps of 1, 2 rows, steps with prompts of 64, 128, 256, 512, 1024 tokens" in "".join(
            llm.describe()
        )
        graphs, extends = device.graphs, device.extends  # as the traceback of an error would hold them
        held = [graphs._replays, graphs._heads, graphs._draws, extends._graphs]
        assert all(held)
        end = Rank.end
        monkeypatch.setattr(Rank, "end", lambda self: (left.extend(map(len, held)), end(self))[1])
    finally:
        llm.close()
    assert left == [0, 0, 0, 0] and device.graphs is None  # NCCL would wait for them


STEP = 300
"""Tokens of the longest step of a device that starts."""


def _started(rank: Rank) -> tuple[list[tuple[int, int]], list[int], int, int, int]:
    """Steps and logits that a rank captured at start, how many draws, how many of chunks, and how many after a step of each kind."""
    sizes.SHORTEST = 128
    warmup.has_triton = lambda: False  # type: ignore[assignment]
    config = random_config(compress_ratios=[0, 4, 128])
    driver = RankDriver(
        config, random_weights(config, seed=9), slabs=3, max_len=512, block_tokens=256, rank=rank, unit=UNIT
    )
    leads, counting = SimpleNamespace(tell=rank.tell), Counting()
    make = LeadingDevice if rank.rank == 0 else FollowingDevice
    device: RankDevice = make(
        leads if rank.rank == 0 else rank, driver.model, driver.cache, slabs=3, max_blocks=2, replay_tokens=0,
        step_tokens=STEP, capture=counting,
    )  # fmt: skip
    assert rank.rank or leads.release == device.release  # also a start that fails lets go of graphs
    device.warm_up(100)
    graphs, extends = device.graphs, device.extends
    assert graphs is not None and extends is not None
    return (
        list(graphs._replays),
        list(graphs._heads),
        len(graphs._draws),
        len(extends._graphs),
        late_captures(device),
    )


def test_all_ranks_capture_the_same_at_start(tmp_path: Path) -> None:
    """What hears from other ranks, that is; only rank 0 draws. (A rank that ran something else would wait for ever.)"""
    decodes = [(n, end) for end in (512, 256, 128) for n in reversed(sizes_of(2))]
    # One of two contexts is as long as a step that is dealt out.
    chunks = 2 * len(extends_of(STEP, 512, 2)) + len(owned_of(STEP, 2))
    for rank, (steps, heads, draws, extends, late) in enumerate(run_ranks(2, _started, tmp_path)):
        assert (steps, heads) == (decodes, [2, 1])
        assert draws == (len(heads) * len(KINDS) if rank == 0 else 1)  # that of the warm-up
        assert extends == chunks and late == 0


def test_what_is_counted_for_graphs_of_ranks() -> None:
    """The largest captured step of two ranks has a run more on each than a prompt of so many tokens, and rows of one token."""
    assert (
        captured_tokens(4, 4096, 4096, 1) == 4096
        and captured_tokens(4, 4096, 4096, 2) == 4096 + 2 * UNIT + 33
    )
    assert captured_tokens(4, 4096, 200, 2) == 256
    assert steps_of(4, 4096, 200, 2) < steps_of(4, 4096, 4096, 2) < steps_of(4, 4096, 4096)


def test_prompts_beside_decodes_get_a_captured_step() -> None:
    def floor(sizes: tuple[int, ...], device: str = "cuda") -> int:
        return int(step_budget("auto", device, sizes)["decodes"]["floor"])

    assert floor(cut_sizes_of(4096, 4096)) == floor(cut_sizes_of(4096, 4096, 2)) == floor(()) == 512
    assert (
        floor(cut_sizes_of(default_step_tokens("cuda", 8, 2), 4096, 2)) == 512
    )  # whatever a prompt alone gets
    assert floor(cut_sizes_of(200, 4096, 2)) == 200
    assert floor((64, 128, 256)) == 256 and floor((64, 128, 256), "cpu") == 64 and floor((600,)) == 512


def test_a_group_of_nccl_is_ended_and_never_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is dropped warns and waits for graphs; what waits for a peer is let go before it ends."""
    done: list[str] = []

    class Nccl:
        rank, size = (lambda self: 0), (lambda self: 2)

        def abort(self) -> None:
            done.append("group")

    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Nccl, raising=False)
    rank = Rank(Nccl())  # type: ignore[arg-type]
    rank.direct = SimpleNamespace(stop=lambda: done.append("messages"))  # type: ignore[assignment]
    rank.leave()
    assert rank._in() is not None and not done
    rank.end()
    assert done == ["messages", "group"]


def test_what_was_let_go_for_a_lost_rank_is_no_result() -> None:
    """A step that all have launched may still wait on the GPU when a rank is lost."""
    ranks = Group.__new__(Group)
    ranks.lost, ranks.await_step, ranks.step_at_hand = None, lambda step: None, contextlib.nullcontext  # type: ignore[method-assign, assignment]

    def waits() -> str:
        ranks.lost = "rank 1 of 2 is gone"
        return "garbage"

    with pytest.raises(RankLost, match="rank 1 of 2 is gone"):
        LedStep(SimpleNamespace(result=waits), ranks, 1).result()  # type: ignore[arg-type]


def test_a_lost_rank_is_told_though_the_gpu_takes_nothing_more() -> None:
    """Only then does a process end that waits on the GPU for ever."""
    ranks, told = Group.__new__(Group), list[str]()
    ranks._news, ranks._closing, ranks._peers, ranks.lost = threading.Condition(), threading.Event(), [], None
    ranks.on_lost = told.append

    def fails() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    ranks.rank = SimpleNamespace(let_go=fails)  # type: ignore[assignment]
    ranks._lose("rank 1 of 2 is gone")
    assert told == ["rank 1 of 2 is gone"] == [ranks.lost]
