"""Compressors: softmax pooling of a block's tokens, kept as (value, lse) per channel so that it can stop
anywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.ops.reference.elementwise import logaddexp
from dsv4.ops.reference.norm import rmsnorm, rope


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


def compress_finish(pooled: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Pooled values [B, D] in the model's dtype as rows to store, float32: norm, then rope at the block's
    first position."""
    return rope(rmsnorm(pooled, weight, eps), cos, sin).float()


def _fold(value: Tensor, lse: Tensor, kv: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    total = logaddexp(lse, score)
    return value + torch.exp(score - total) * (kv - value), total
