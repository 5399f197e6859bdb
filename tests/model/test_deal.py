"""How the tokens of a step are dealt out over ranks."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from dsv4.model.batch import Batch, Row
from dsv4.model.cut import Places
from dsv4.model.deal import Deal, owners, rank_columns
from dsv4.model.rank import ordered
from dsv4.model.step import Geometry

from tests.support.ranks import Deaf

FOLDABLE = {4: True, 128: False}


def batch(rows: list[tuple[int, int]]) -> Batch:
    """Of (start, length) each."""
    made, offset = [], 0
    for slab, (start, length) in enumerate(rows):
        made.append(Row(slab, start, length, offset))
        offset += length
    positions = torch.cat([torch.arange(s, s + n) for s, n in rows])
    table = torch.randperm(len(rows) * 40, dtype=torch.int32).view(len(rows), 40)
    return Batch(torch.arange(offset), positions, tuple(made), table, torch.zeros(0, dtype=torch.int64))


def drawn(seed: int, ranks: int) -> Batch:
    """One prompt that is cut, and any rows beside it."""
    draw = random.Random(seed)
    rows = [(draw.randrange(3000), draw.choice([1, 1, 5, 200, 400, 999])) for _ in range(draw.randint(0, 5))]
    rows.insert(draw.randint(0, len(rows)), (draw.randrange(2000), draw.randint(128 * ranks, 3000)))
    return batch(rows)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_work_is_even(ranks: int) -> None:
    for seed in range(20):
        b = drawn(seed, ranks)
        owner = owners(b, ranks, 128)
        counts = np.bincount(owner[owner >= 0], minlength=ranks)
        assert counts.max() - counts.min() <= 128 * (1 if ranks == 2 else 2), (seed, counts)
        for row in b.rows:  # a run of positions has one owner, and neighbours another
            of = owner[row.offset : row.offset + row.length]
            unit = np.arange(row.start, row.start + row.length) // 128
            assert ((of[1:] == of[:-1]) == ((unit[1:] == unit[:-1]) | (of[1:] < 0))).all()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_sizes_follow_from_the_capacity(ranks: int) -> None:
    """Columns of every step and rank are as long as those of another of the same capacity, and every token has a slot of its own."""
    geometry = Geometry(window=128, ring=256, block_tokens=128 * ranks, ratios=(4, 128), tile=1)
    for seed in range(20):
        b = drawn(seed, ranks)
        deal = Deal.of(b, owners(b, ranks, 128), ranks, 128)
        c = deal.capacity(geometry)
        order = deal.order(c)
        assert len(order) == c.slots and sorted(order[order >= 0]) == list(range(len(b.token_ids)))
        sizes = set()
        for rank in range(ranks):
            columns = rank_columns(deal, b, rank, geometry, FOLDABLE, c)
            sizes.add(tuple((name, len(x)) for name, x in columns.of.items()))
            again = columns.within(columns.packed())
            assert all(torch.equal(x, again.of[name]) for name, x in columns.of.items())
            assert torch.equal(columns.of["ids"][order >= 0], torch.from_numpy(order[order >= 0]))
        assert len(sizes) == 1


@pytest.mark.parametrize("shared", [0, 3])
def test_nothing_is_sorted_on_the_way(shared: int) -> None:
    """What is sent is a slice of what there is, and what comes is where it is read."""
    sent: list[torch.Tensor] = []

    class Counting(Deaf):
        def gather(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
            sent.append(x)
            return super().gather(x, out)

        def exchange(self, x: torch.Tensor) -> torch.Tensor:
            sent.append(x)
            return super().exchange(x)

    places, x = Places(Counting(1, 2), 5, shared), torch.randn(5 + shared, 7)
    every = places.all(x)
    assert torch.equal(every, torch.cat((x[:5], x[:5], x[5:])))
    assert torch.equal(places.local(every), x)
    assert sent[0].data_ptr() == x.data_ptr()
    total = places.sum(every)
    assert sent[1].data_ptr() == every.data_ptr()
    assert torch.equal(total, torch.cat((every[:5] + every[5:10], 2 * every[10:])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_sums_are_rounded_once(ranks: int, dtype: torch.dtype) -> None:
    parts = torch.randn(ranks, 1000).to(dtype)
    expected = parts[0].float()
    for part in parts[1:]:
        expected = expected + part.float()
    out = torch.empty(1000, dtype=dtype)
    assert torch.equal(ordered(parts), expected.to(dtype))
    assert torch.equal(ordered(list(parts), out), expected.to(dtype)) and torch.equal(out, expected.to(dtype))
