"""Compressors: softmax pooling of a block's tokens, kept as (value, lse) per channel so that it can stop
anywhere. HCA pools the tokens of its block. CSA overlaps: a token has two halves, `hi` for the entry of its own block
and `lo` for the next one; entry e pools lo of block e - 1, as one slot pooled before, and then hi of block e."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.ops.reference.elementwise import logaddexp
from dsv4.ops.reference.norm import norm_rope
from dsv4.ops.tables import BlockTable, RowSource, TokenTable

Pool = tuple[Tensor, Tensor]
"""(value, lse), float32 [B, D] each."""


def compress(
    projected: Tensor,
    ape: Tensor,
    state: Tensor,
    tokens: TokenTable,
    blocks: BlockTable,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    dtype: torch.dtype,
    rows: RowSource,
    left: Tensor | None = None,
    left_to: Tensor | None = None,
) -> None:
    """Takes in a step's tokens, writes the entries that they complete and carries the rest over.

    `projected` float32 [T, 2 w D]: values, then scores, of each token's w halves (`lo` before `hi`); `ape` float32
    [m, w D] is added to the scores by place in the block. `state` float32 [slabs, w, 2, D] holds pools as (value,
    lse): row 0 the entry being filled, row 1 (CSA) the lo halves of the block so far. cos and sin float32 [B, r/2]
    are at `blocks.position`. A row of slab -1 begins with empty pools. `left` float32 [N, w, 2, D], if given, takes what row r carries over
    at `left_to[r]` (int64 [R]; -1: nowhere) in place of its slab.
    """
    kv, score = projected.chunk(2, dim=-1)
    score = score + ape[blocks.slot]
    begins = tokens.slabs >= 0
    carried = torch.where(begins[:, None, None, None], state[tokens.slabs.clamp(min=0)], _none(state))
    pool = _plain if state.shape[1] == 1 else _overlapping
    value = pool(kv, score, carried, blocks)
    if left is None or left_to is None:
        left, left_to = state, tokens.slabs
    taken = left_to >= 0
    left[left_to[taken]] = carried[taken]
    emitted = torch.nonzero(blocks.target >= 0).flatten()
    if len(emitted):
        pooled = value[emitted].to(dtype)
        rows.write(blocks.target[emitted], norm_rope(pooled, weight, cos[emitted], sin[emitted], eps).float())


def pool_fold(
    value: Tensor, lse: Tensor, kv: Tensor, score: Tensor, first: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """Folds tokens first[b] .. first[b] + count[b] - 1 into pool b, one after the other; all float32, count
    >= 1.

    A pool stands for a set of slots: lse = logsumexp(scores), value = softmax(scores) . kv. An empty one is
    (0, -inf). Always a left fold in the order of positions: the same bits however the tokens came in chunks.
    """
    value, lse = value.clone(), lse.clone()
    fewest, most = int(count.min()), int(count.max())
    for j in range(most):
        if j < fewest:
            value, lse = _fold(value, lse, kv[first + j], score[first + j])
            continue
        live = torch.nonzero(count > j).flatten()
        token = first[live] + j
        value[live], lse[live] = _fold(value[live], lse[live], kv[token], score[token])
    return value, lse


def _fold(value: Tensor, lse: Tensor, kv: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    total = logaddexp(lse, score)
    return value + torch.exp(score - total) * (kv - value), total


def _plain(kv: Tensor, score: Tensor, state: Tensor, blocks: BlockTable) -> Tensor:
    """Pooled values [B, D] of the blocks; `state` [R, 1, 2, D] becomes what the rows carry over."""
    start = _put(_empty(len(blocks.first), kv), blocks.opens, state[:, 0])
    value, lse = pool_fold(*start, kv, score, blocks.first, blocks.count)
    _carry(state[:, 0], (value, lse), blocks)
    return value


def _overlapping(kv: Tensor, score: Tensor, state: Tensor, blocks: BlockTable) -> Tensor:
    (kv_lo, kv_hi), (score_lo, score_hi) = kv.chunk(2, dim=-1), score.chunk(2, dim=-1)
    start = _put(_empty(len(blocks.first), kv_lo), blocks.opens, state[:, 1])
    lo = pool_fold(*start, kv_lo, score_lo, blocks.first, blocks.count)
    before = (lo[0].roll(1, 0), lo[1].roll(1, 0))  # of the block before, but for the first block of a row
    before = _put(before, blocks.opens, state[:, 0])
    hi = pool_fold(*before, kv_hi, score_hi, blocks.first, blocks.count)
    following = torch.where(blocks.closed[:, None, None], _at(lo, blocks.ends), _at(hi, blocks.ends))
    state[:, 0] = following
    _carry(state[:, 1], lo, blocks)
    return hi[0]


def _none(state: Tensor) -> Tensor:
    """[2, 1]: value and lse of an empty pool."""
    return state.new_tensor([[0], [-torch.inf]])


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
