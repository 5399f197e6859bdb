"""Steps whose prompts are dealt out over ranks as graphs hold them, run as they are on the CPU over gloo, against the ordinary path: equal
to the bit."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dsv4._core import REPLAY
from dsv4.engine.dealt import RankExtends
from dsv4.engine.graphs import DecodeGraphs
from dsv4.model.batch import Batch
from dsv4.model.parallel import UNIT
from dsv4.model.rank import Rank
from dsv4.plan import graphs as sizes
from dsv4.plan.graphs import (
    DEALT,
    cut_sizes_of,
    dealt_contexts_of,
    dealt_of,
    extends_of,
    owned_of,
    steps_of,
)

from tests.engine.test_graphs import as_it_is
from tests.support.driving import Chunk, random_tokens
from tests.support.models import random_config, random_weights
from tests.support.ranks import Deaf, RankDriver, run_ranks

SHAPES: dict[int, dict[str, Any]] = {
    2: dict(compress_ratios=[0, 4, 128], index_topk=16),
    3: dict(
        compress_ratios=[128, 4],
        index_topk=16,
        num_attention_heads=6,
        o_groups=3,
        moe_intermediate_size=96,
    ),
}


def test_sizes() -> None:
    assert dealt_of(8192, 1) == () == dealt_of(2 * UNIT, 2) == owned_of(256, 2)
    assert dealt_of(8192, 2) == DEALT and dealt_of(300, 2) == (512,) and dealt_of(4097, 2) == DEALT[:-1]
    assert dealt_of(4096, 8) == (2048, 3072, 4096)
    assert owned_of(4096, 2) == (256, 512, 1024, 1536, 2048, 2048 + UNIT)
    assert owned_of(512, 3) == (256, 256 + UNIT)
    assert extends_of(4096, 2**20, 2) == (64, 128, 256) and extends_of(100, 2**20, 2) == (64, 128)
    assert cut_sizes_of(4096, 2**20, 2) == (64, 128, 256, 512, 1024, 2048, 3072, 4096)
    assert cut_sizes_of(600, 2**20, 2) == (64, 128, 256, 512, 600) and cut_sizes_of(200, 2**20, 2)[-1] == 200
    assert dealt_contexts_of(2**20, 2048, 2) == (2**12, 2**14, 2**16, 2**18, 2**20)
    assert dealt_contexts_of(1000, 2048, 2) == (1000,)
    few, many = steps_of(16, 2**20, 4096, 2), steps_of(256, 2**20, 4096, 2)
    assert few - steps_of(16, 2**20, 256, 2) == 29 and many > few


def graphs_of(driver: RankDriver, step_tokens: int) -> RankExtends:
    none = torch.zeros(9, dtype=torch.int64)
    decode = DecodeGraphs(driver.model, driver.page_table, none, None, as_it_is)  # type: ignore[arg-type]
    return RankExtends(decode, driver.page_table, step_tokens)


def driver_of(rank: Rank, slabs: int) -> RankDriver:
    config = random_config("flash", **SHAPES[rank.ranks])
    weights = random_weights(config, 1)
    return RankDriver(
        config, weights, slabs=slabs, max_len=1536, block_tokens=128 * rank.ranks, rank=rank, unit=UNIT
    )


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def plan_of(batch: Batch) -> SimpleNamespace:
    rows = batch.rows
    return SimpleNamespace(
        tokens=len(batch.token_ids),
        rows=len(rows),
        row_start=torch.tensor([r.start for r in rows]),
        row_len=torch.tensor([r.length for r in rows]),
        row_samples=np.ones(len(rows)),
        row_flags=np.full(len(rows), REPLAY * bool(rows[0].replay_end), np.int32),
    )


def _random_steps(rank: Rank) -> dict[str, Any]:
    """Chunks and single tokens of five requests in any order, from the first token on, and a replay of one of them. All memory was poisoned, the sink's too."""
    sizes.EXTEND_ROWS, sizes.SHORTEST = (4, 7), 512
    plain, other = driver_of(rank, 6), driver_of(rank, 6)
    graphs, wrong, dealt = graphs_of(other, 1024), [], set()
    replayed = graphs._dealt
    graphs._dealt = lambda size: (dealt.add((turn, size)), replayed(size))[1]  # type: ignore[method-assign]
    ids = [random_tokens(plain.config, 1536, seed) for seed in range(5)]
    at, draw = [0] * 5, random.Random(5)
    for turn in range(14):
        slabs = draw.sample(range(5), draw.randint(1, 5))
        room, chunks = 1024, []
        for s in slabs:
            n = min(draw.choice([1, 1, 2, 40, 129, 300, 511, 650]), room, 1536 - at[s])
            if n:
                chunks.append(Chunk(s, ids[s][at[s] : at[s] + n], at[s]))
                at[s], room = at[s] + n, room - n
        if not chunks:
            continue
        expected = torch.stack([logits[-1] for logits in plain.step(chunks)])
        batch = other.batch(chunks)
        ends = torch.tensor([row.offset + row.length - 1 for row in batch.rows])
        if (size := graphs.fit(plan_of(batch))) is None:  # type: ignore[arg-type]
            wrong.append((turn, [len(c.tokens) for c in chunks], "is not taken"))
            continue
        hidden = graphs.hidden(dataclasses.replace(batch, logit_index=ends), size)
        if not torch.equal(other.model.logits(hidden), expected):
            wrong.append((turn, [(c.start, len(c.tokens)) for c in chunks], "other logits"))
    end = at[0] // plain.block_tokens * plain.block_tokens
    start = end - plain.layout.replay_tokens
    for begun in range(start, end, 300):
        tokens = ids[0][begun : min(begun + 300, end)]
        chunk = Chunk(0, tokens, begun, replay_end=end, replay_start=start)
        plain.step([chunk])
        batch = other.batch([chunk])
        graphs.hidden(batch, graphs.fit(plan_of(batch)))  # type: ignore[arg-type]
    if start <= 0 or not torch.equal(plain.cache.slabs[:5], other.cache.slabs[:5]):
        wrong.append("other state")
    if not same_bytes(plain.cache.pages, other.cache.pages):
        wrong.append("other pages")
    return {"wrong": wrong, "steps": len(dealt), "sizes": len({size for _, size in dealt})}


@pytest.mark.parametrize("ranks", SHAPES)
def test_padded_steps_equal_the_ordinary_path(ranks: int, tmp_path: Path) -> None:
    for found in run_ranks(ranks, _random_steps, tmp_path):
        assert found["wrong"] == [] and found["steps"] >= 6 and found["sizes"] >= 2, found


def test_every_step_can_be_captured_of_padding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at start: no page is written, and a size has columns of one length."""
    monkeypatch.setattr(sizes, "SHORTEST", 512)
    driver = driver_of(Deaf(1, 2), 3)
    graphs = graphs_of(driver, 1024)
    pages, state = driver.cache.pages.clone(), driver.cache.slabs[:2].clone()
    for take in graphs.captures(None):
        take()
    graphs.rehearse()
    assert {s.tokens for s in graphs._graphs} == {256, 512, 512 + UNIT, 64, 128}  # type: ignore[attr-defined]
    assert len(graphs._graphs) == steps_of(2, 1536, 1024, 2) - len(sizes.sizes_of(2)) * 3
    assert same_bytes(pages, driver.cache.pages) and same_bytes(state, driver.cache.slabs[:2])


def test_what_fits_no_size_is_not_taken() -> None:
    driver = driver_of(Deaf(0, 2), 3)
    graphs = graphs_of(driver, 1024)
    assert graphs.shapes != graphs_of(driver, 512).shapes  # a list of kernels goes by these
    assert graphs._dealt_size_of([0], [1024]) == graphs._dealt_size_of([5], [1024])
    assert graphs._dealt_size_of([0], [1024]).tokens == 512  # type: ignore[union-attr]
    assert graphs._dealt_size_of([64, 0], [128, 896]).tokens == 512 + UNIT  # type: ignore[union-attr]
    assert graphs._dealt_size_of([0], [1500]) is None
    assert graphs._dealt_size_of([0] * 5, [2] * 5).tokens == 512  # type: ignore[union-attr]
    assert graphs._dealt_size_of([0] * 11, [2] * 11) is None
    assert graphs._dealt_size_of([0] * 40, [1] * 40) is None and graphs._dealt_size_of(
        [0] + [3] * 32, [300] + [1] * 32
    )
