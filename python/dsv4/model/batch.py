"""One step's input to the forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """A run of consecutive tokens of one request: a prefill chunk, one decode token or a stretch of replay.

    Its tokens are `offset .. offset + length - 1` of the batch, at positions `start ..`. `reset`: the slab's
    state starts empty. A replaying row has `replay_end` > 0: history below it is cached already and is not
    written, and nothing below `floor` is looked at. What a layer makes of the first tokens is wrong then, by as many more in
    each layer as it reaches back; nothing that the first row after `replay_end` reads lies that far back.
    """

    slab: int
    start: int
    length: int
    offset: int
    reset: bool = False
    replay_end: int = 0
    replay_start: int = 0

    @property
    def floor(self) -> int:
        """Lowest position that takes part. A replay that reaches back to position 0 is a plain prefill."""
        return max(0, self.replay_start) if self.replay_end else 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Prefill chunks, decode tokens and replays of any number of requests, at most one row for each slab.

    `token_ids`, `positions` int64 [T], row after row; an id -1 - i stands for `newest[i]`, which lies on the model's device
    (int64 [N]; None where there are no such ids); `page_table` int32 [slabs, blocks] (page of each block
    of block_tokens tokens; entries that no row needs may hold anything); `logit_index` int64 [S], ascending:
    tokens whose logits are wanted. All others lie on the CPU; `device_pages` is the page table on the model's device, where
    that is another.
    """

    token_ids: Tensor
    positions: Tensor
    rows: tuple[Row, ...]
    page_table: Tensor
    logit_index: Tensor
    newest: Tensor | None = None
    device_pages: Tensor | None = None


def pages_of(batch: Batch) -> Tensor:
    """The page table on the model's device."""
    return batch.page_table if batch.device_pages is None else batch.device_pages


def resolved(token_ids: Tensor, newest: Tensor | None) -> Tensor:
    """Ids with those of `newest` in place of what stands for them (see `Batch`)."""
    if newest is None:
        return token_ids
    return torch.where(token_ids < 0, newest[(-1 - token_ids).clamp(min=0)], token_ids)
