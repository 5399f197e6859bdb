"""Compressors: hidden states of a block of tokens become one stored row. Also the indexer's keys, which are
made so too."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.cache.rows import Rows
from dsv4.model.scope import Scope
from dsv4.model.step import Step
from dsv4.ops.registry import Ops
from dsv4.ops.tables import BlockTable, TokenTable


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
        project = torch.cat((weights["wkv.weight"], weights["wgate.weight"]))
        self.project = ops.prepare("linear_f32", project)
        self.ape, self.norm = weights.float("ape"), weights.float("norm.weight")
        self.state, self.history = state, history

    def __call__(self, x: Tensor, step: Step, rope: tuple[Tensor, Tensor]) -> None:
        """Takes in the step's tokens (x [T, d]), writes the entries that they complete, carries the
        rest over. `rope` is (cos, sin) at the blocks' first positions."""
        self.take(self.ops.linear_f32(x, self.project), step.tokens, step.blocks[self.ratio], rope)

    def take(
        self, projected: Tensor, tokens: TokenTable, blocks: BlockTable, rope: tuple[Tensor, Tensor]
    ) -> None:
        """The same of projected tokens float32 [T, 2 * w * D]."""
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
            self.history,
        )
