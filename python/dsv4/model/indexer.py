"""The lightning indexer: which compressed entries a token attends to."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.cache.paged import PagedCache
from dsv4.formats import RowFormat
from dsv4.model.compressor import Compressor
from dsv4.model.config import ModelConfig
from dsv4.model.layout import LayerSpec
from dsv4.model.scope import Scope
from dsv4.model.step import Step
from dsv4.ops.quantised import Quantised
from dsv4.ops.registry import Ops

WEIGHTS = "weights_proj.weight"
"""Matrix [H, d] of the release."""


class Indexer:
    """Scores every visible entry of a second, smaller compressor with a few heads and keeps the best
    `index_topk`."""

    def __init__(
        self,
        weights: Scope,
        config: ModelConfig,
        spec: LayerSpec,
        cache: PagedCache,
        codec: RowFormat,
        ops: Ops,
        dtype: torch.dtype,
    ) -> None:
        self.ops = ops
        self.heads, self.dim, self.topk = config.index_heads, config.index_head_dim, config.index_topk
        self.ratio = spec.ratio
        self.wq_b = weights.matrix("linear", "wq_b.weight")
        self.keys, self.compressor = cache.rows(spec.index, spec.history_of, codec), None
        if spec.stores:
            pools = cache.pools(spec.index_pool, spec.layer)
            self.compressor = Compressor(
                weights.within("compressor"), self.ratio, config.rms_eps, ops, pools, self.keys, dtype
            )

    def query(self, qr: Tensor | Quantised) -> Tensor:
        """Queries [T, H, I]; `qr` is the attention's low-rank query."""
        return self.ops.linear(qr, self.wq_b).unflatten(-1, (self.heads, self.dim))

    def select(self, query: tuple[Tensor, Tensor], step: Step, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Selected entries int32 [T, k], ascending, -1 after the last, for queries and what the scores of their heads are weighted with,
        float32 [T, H]: x times `WEIGHTS`. (The release multiplies these by (I H)^-0.5, which changes no order.) This step's keys are written."""
        q, weights = query
        return self.ops.index_select(
            q, *rope, weights, self.keys, step.tokens, step.entries[self.ratio], self.topk
        )
