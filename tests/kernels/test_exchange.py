"""Ranks that write into each other's memory hear what a torch group would tell them, to the bit. Here the memory is a file that processes
share, and the interpreter runs the kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dsv4.kernels.messages import LIMIT, room
from dsv4.kernels.triton.common import INTERPRETED
from dsv4.kernels.triton.exchange import Exchange
from dsv4.model.config import ModelConfig
from dsv4.model.rank import Rank
from dsv4.plan.graphs import EXTEND_ROWS

from tests.support.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="a GPU has tests/engine/test_ranks_on_gpu.py, where the memory is its own"
)

WORDS = (6, 768, 288, 48)
"""Of messages: more than a program's share, and less, so that programs have not met equally often."""


def _messages(rank: Rank, words: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(10 * words + rank.rank)
    return [torch.randn(2 * words, generator=g).bfloat16(), torch.randn(words, generator=g)]


def _says(rank: Rank, folder: str) -> tuple[list[bool], int, int]:
    """Whether each message came as over gloo; how often a torch group was asked when ranks had a direct way, and for too long a message."""
    rooms = [torch.from_file(f"{folder}/{r}", shared=True, size=room(rank.ranks), dtype=torch.uint8) for r in range(rank.ranks)]  # fmt: skip
    direct = Exchange(rank.rank, [r.data_ptr() for r in rooms], "cpu")
    direct._epochs[1:] = -3  # numbers that wrap soon
    asked, same = [0], []
    group = rank._in

    def counted() -> object:
        asked[0] += 1
        return group()

    for tokens, heads, dim in ((1, 3, 2), (5, 6, 64), (2, 12, 130)):
        g = torch.Generator().manual_seed(tokens + rank.rank)
        parts = (
            torch.randn((tokens, heads, dim), generator=g).bfloat16(),
            torch.randn((tokens, heads), generator=g),
        )
        rank.direct = None
        expected = rank.heads(*parts)
        rank.direct, rank._in = direct, counted  # type: ignore[method-assign]
        found = rank.heads(*parts)
        rank._in = group  # type: ignore[method-assign]
        same += [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
    for words in WORDS:
        for x in _messages(rank, words):
            spread = x.view(rank.ranks, -1).repeat(1, rank.ranks)
            told = x.clone()
            rank.direct = None
            expected = [rank.gather(x), rank.exchange(spread), rank.sum(x), rank.gather(x)[0], rank.gather(x)]
            rank.direct, rank._in = direct, counted  # type: ignore[method-assign]
            place = torch.empty_like(expected[0])
            found = [rank.gather(x), rank.exchange(spread), rank.sum(x), told, rank.gather(x, place)]
            rank.tell(told)
            same.append(found[-1] is place or found[-1].data_ptr() == place.data_ptr())
            rank._in = group  # type: ignore[method-assign]
            same += [torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True)]
    directly = asked[0]
    rank._in = counted  # type: ignore[method-assign]
    rank.gather(torch.zeros(LIMIT + 64, dtype=torch.uint8))
    rank.gather(torch.zeros(65, dtype=torch.uint8))
    return same, directly, asked[0] - directly


def test_parts_of_as_many_rows_as_a_captured_step_shares_are_one_message() -> None:
    """Of Flash on two ranks 1 MiB and what crosses beside it, which went as two messages and two copies."""
    flash, rows = ModelConfig.preset("v4-flash"), EXTEND_ROWS[0] - 1
    heads = rows * flash.num_heads // 2
    direct = Exchange(0, [0, 0], "cpu")
    assert direct.takes(heads * flash.head_dim * 2) and direct.takes(heads * (flash.head_dim * 2 + 4))
    assert LIMIT % 64 == 0 and not direct.takes(2 << 20)


def test_messages_are_those_of_a_group(tmp_path: Path) -> None:
    ranks = 3
    for r in range(ranks):
        (tmp_path / str(r)).write_bytes(bytes(room(ranks)))
    for same, directly, otherwise in run_ranks(ranks, _says, tmp_path, str(tmp_path)):
        assert len(same) == 6 + 12 * len(WORDS) and all(same)
        assert (directly, otherwise) == (0, 2)
