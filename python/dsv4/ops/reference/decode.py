"""Index tables of a step of single tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_tables(
    token_ids: Tensor,
    positions: Tensor,
    slabs: Tensor,
    pages: Tensor,
    newest: Tensor,
    turns: tuple[tuple[Tensor, Tensor], ...],
    ratios: tuple[int, ...],
    block_tokens: int,
    window: int,
    ring: int,
    part: int,
    parts: int,
) -> tuple[Tensor, ...]:
    """Batch row r is token r is block r of every ratio. `target` is the token's row of the ring, `entry` that of the page which its block's
    entry goes to, -1 where the block is not complete or the entry another part's."""
    row = torch.arange(len(slabs), device=slabs.device)
    at = positions[:, None] - torch.arange(window - 1, -1, -1, device=slabs.device)
    window_ids = torch.where((at >= 0) & (at % parts == part), slabs[:, None] * ring + at % ring, -1)
    cos, sin = turns[-1]
    no = positions.new_empty((0, len(slabs)))
    found: list[list[Tensor]] = [
        [no.int()],
        [no.bool()],
        [no],
        [no],
        [no],
        [cos.new_empty((0, 2, len(slabs), cos.shape[1]))],
    ]
    for m in ratios:
        per_page = block_tokens // m
        block, slot = positions // m, positions % m
        closed, begin, nth = slot == m - 1, block * m, block % per_page
        entry = pages[slabs, block // per_page].long() * (per_page // parts) + nth // parts
        of_ratio = (
            (((positions + 1) // m - part + parts - 1) // parts).int(),
            closed,
            torch.where(closed & (nth % parts == part), entry, -1),
            begin,
            slot,
            torch.stack((cos[begin], sin[begin])),
        )
        for column, value in zip(found, of_ratio, strict=True):
            column.append(value[None])
    visible, closed, entry, begin, slot, block_turn = map(torch.cat, found)
    return (
        torch.where(token_ids < 0, newest[(-1 - token_ids).clamp(min=0)], token_ids),
        row,
        torch.ones_like(row),
        slabs.int(),
        window_ids.int(),
        slabs * ring + positions % ring,
        visible,
        closed,
        entry,
        begin,
        slot,
        torch.stack([torch.stack((cos[positions], sin[positions])) for cos, sin in turns]),
        block_turn,
    )
