"""Compressors: hidden states of a block of tokens become one stored row. Also the indexer's keys, which are
made so too."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.cache.rows import Rows
from dsv4.model.scope import Scope
from dsv4.model.step import Step
from dsv4.ops.registry import Ops
from dsv4.ops.tables import BlockTable

Pool = tuple[Tensor, Tensor]
"""(value, lse), float32 [B, D] each."""


class Compressor:
    """One compressor of one layer.

    HCA pools the tokens of its block. CSA overlaps: a token has two halves, `hi` for the entry of its own
    block and `lo` for the next one; entry e pools lo of block e - 1, as one slot pooled before, and then hi
    of block e, token by token.

    `state` float32 [slabs, rows, 2, D] holds pools as (value, lse): row 0 the entry being filled, row 1 (CSA)
    the lo halves of the block so far. Everything here is float32; ape is added to scores by place in the
    block.
    """

    def __init__(
        self,
        weights: Scope,
        ratio: int,
        eps: float,
        ops: Ops,
        state: Tensor,
        history: Rows,
        dtype: torch.dtype,
    ) -> None:
        self.ops, self.ratio, self.eps, self.dtype = ops, ratio, eps, dtype
        self.project = torch.cat((weights.float("wkv.weight"), weights.float("wgate.weight")))
        self.ape, self.norm = weights.float("ape"), weights.float("norm.weight")
        self.state, self.history = state, history

    def __call__(self, x: Tensor, step: Step, rope: tuple[Tensor, Tensor]) -> None:
        """Takes in the step's tokens (x float32 [T, d]), writes the entries that they complete, carries the
        rest over.

        `rope` is (cos, sin) at the positions of the emitted blocks."""
        blocks = step.blocks[self.ratio]
        kv, score = self.ops.linear(x, self.project).chunk(2, dim=-1)
        score = score + self.ape[blocks.slot]
        state = self.state[step.slabs]
        if state.shape[1] == 1:
            value = self._plain(kv, score, state, blocks)
        else:
            value = self._overlapping(kv, score, state, blocks)
        self.state[step.slabs] = state
        if len(blocks.emitted):
            pooled = value[blocks.emitted].to(self.dtype)
            self.history.write(blocks.target, self.ops.compress_finish(pooled, self.norm, *rope, self.eps))

    def _plain(self, kv: Tensor, score: Tensor, state: Tensor, blocks: BlockTable) -> Tensor:
        """Pooled values [B, D] of the blocks; `state` becomes what the rows carry over."""
        start = _empty(len(blocks.first), kv)
        value, lse = self._fold(_put(start, blocks.opens, state[:, 0]), kv, score, blocks)
        _carry(state[:, 0], (value, lse), blocks)
        return value

    def _overlapping(self, kv: Tensor, score: Tensor, state: Tensor, blocks: BlockTable) -> Tensor:
        (kv_lo, kv_hi), (score_lo, score_hi) = kv.chunk(2, dim=-1), score.chunk(2, dim=-1)
        start = _empty(len(blocks.first), kv_lo)
        lo = self._fold(_put(start, blocks.opens, state[:, 1]), kv_lo, score_lo, blocks)
        before = (lo[0].roll(1, 0), lo[1].roll(1, 0))  # of the block before, but for the first block of a row
        hi = self._fold(_put(before, blocks.opens, state[:, 0]), kv_hi, score_hi, blocks)
        following = torch.where(blocks.closed[:, None, None], _at(lo, blocks.ends), _at(hi, blocks.ends))
        state[:, 0] = following
        _carry(state[:, 1], lo, blocks)
        return hi[0]

    def _fold(self, pool: Pool, kv: Tensor, score: Tensor, blocks: BlockTable) -> Pool:
        return self.ops.pool_fold(*pool, kv, score, blocks.first, blocks.count)


def _empty(blocks: int, like: Tensor) -> Pool:
    value = like.new_zeros((blocks, like.shape[-1]))
    return value, torch.full_like(value, -torch.inf)


def _put(pool: Pool, index: Tensor, state: Tensor) -> Pool:
    """`pool` with state [R, 2, D] at `index`."""
    value, lse = pool
    value[index], lse[index] = state[:, 0], state[:, 1]
    return value, lse


def _at(pool: Pool, index: Tensor) -> Tensor:
    """[R, 2, D]."""
    return torch.stack((pool[0][index], pool[1][index]), dim=1)


def _carry(state: Tensor, pool: Pool, blocks: BlockTable) -> None:
    """state [R, 2, D] := the last pool of each row, or an empty one where that block is complete."""
    state.copy_(_at(pool, blocks.ends))
    state[:, 0].masked_fill_(blocks.closed[:, None], 0)
    state[:, 1].masked_fill_(blocks.closed[:, None], -torch.inf)
