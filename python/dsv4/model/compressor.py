"""Compressors: hidden states of a block of tokens become one stored row. Also the indexer's keys, which are
made so too."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.cache.rows import Rows
from dsv4.model.scope import Scope
from dsv4.ops.registry import Ops
from dsv4.ops.tables import BlockTable, TokenTable

PROJECT = ("wkv.weight", "wgate.weight")
"""Values and gates of a token: matrices [w * D, d] of the release."""


class Compressor:
    """One compressor of one layer. Everything in it is float32; `state` float32 [slabs, rows, 2, D] is what a
    request carries from step to step, `history` where entries go (see the op `compress`)."""

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
        self.ape, self.norm = weights.float("ape"), weights.float("norm.weight")
        self.state, self.history = state, history

    def __call__(
        self,
        projected: Tensor,
        tokens: TokenTable,
        blocks: BlockTable,
        rope: tuple[Tensor, Tensor],
        rows: Rows | None = None,
        left: Tensor | None = None,
        left_to: Tensor | None = None,
    ) -> None:
        """Takes in tokens, projected by `PROJECT` to float32 [T, 2 * w * D], writes the entries that they complete into the history (or
        `rows`), carries the rest over (or to where `left` says, as in the op). `rope` is (cos, sin) at the blocks' first positions."""
        self.ops.compress(
            projected,
            self.ape,
            self.state,
            tokens,
            blocks,
            self.norm,
            *rope,
            self.eps,
            self.dtype,
            self.history if rows is None else rows,
            left,
            left_to,
        )
