"""Attention of one layer: window rows of every layer kind, and the compressed past of CSA and HCA layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.cache.paged import PagedCache
from dsv4.cache.rows import Rows
from dsv4.formats import RowFormat
from dsv4.model.beside import beside
from dsv4.model.compressor import PROJECT, Compressor
from dsv4.model.config import ModelConfig
from dsv4.model.indexer import WEIGHTS, Indexer
from dsv4.model.norm import SharedNorm
from dsv4.model.rope import Rope
from dsv4.model.scope import Scope
from dsv4.model.stack import Stack
from dsv4.model.step import Step
from dsv4.ops.quantised import Quantised
from dsv4.ops.registry import Ops


@dataclass(frozen=True, slots=True)
class Codecs:
    """How rows and index rows are stored."""

    row: RowFormat
    index: RowFormat


class Attention:
    """x -> low-rank queries, one key-value row per token -> sparse attention -> grouped low-rank output.

    One row serves as key and value of all heads, so the output carries the rotation of the rows and is turned
    back.
    """

    def __init__(
        self,
        weights: Scope,
        config: ModelConfig,
        layer: int,
        cache: PagedCache,
        codecs: Codecs,
        ops: Ops,
        dtype: torch.dtype,
    ) -> None:
        self.ops, self.heads, self.dim, self.eps = ops, config.num_heads, config.head_dim, config.rms_eps
        self.scale = config.head_dim**-0.5
        self.down = weights.stack("linear", ("wq_a.weight",), ("wkv.weight",))
        self.wq_b = weights.matrix("linear", "wq_b.weight")
        self._load_output(weights, config)
        self.kv_norm = weights.float("kv_norm.weight")
        self.sink = weights.float("attn_sink")
        self.window = cache.rows("window", layer, codecs.row)
        spec = config.layers[layer]
        self.ratio, self.history, self.compressor, self.indexer = spec.ratio, None, None, None
        if spec.history_of is not None:
            self.history = cache.rows(spec.history, spec.history_of, codecs.row)
        if spec.stores:
            pools = cache.pools(spec.pool, layer)
            self.compressor = Compressor(
                weights.within("compressor"), self.ratio, self.eps, ops, pools, self.history, dtype
            )
        if spec.indexed:
            self.indexer = Indexer(weights.within("indexer"), config, spec, cache, codecs.index, ops, dtype)
        self.compressors, self.inputs = self._load_inputs(weights)
        readers = [self.wq_b] + ([self.indexer.wq_b] if self.indexer else [])
        self.q_norm = SharedNorm(ops, weights.float("q_norm.weight"), self.eps, "linear", readers)

    def _load_inputs(self, weights: Scope) -> tuple[list[Compressor], Stack | None]:
        """This layer's compressors, and what is made of its input in float32: what each of them takes in, then the weights of the indexer's
        scores."""
        parts, compressors = [], []
        for prefix, compressor in (
            ("", self.compressor),
            ("indexer.", self.indexer and self.indexer.compressor),
        ):
            if compressor is not None:
                parts.append(tuple(f"{prefix}compressor.{name}" for name in PROJECT))
                compressors.append(compressor)
        if self.indexer is not None:
            parts.append((f"indexer.{WEIGHTS}",))
        return compressors, weights.stack("linear_f32", *parts) if parts else None

    def _load_output(self, weights: Scope, config: ModelConfig) -> None:
        self.groups, self.wo_a = config.o_groups, weights.matrix("grouped_linear", "wo_a.weight")
        self.wo_b = weights.matrix("linear", "wo_b.weight")

    def __call__(
        self,
        x: Tensor,
        shared: Tensor | Quantised,
        step: Step,
        rope: Rope,
        block_rope: Rope | None,
        scratch: Rows | None,
    ) -> Tensor:
        """[T, d] -> [T, d]. `shared`: x for `linear`. `rope` is at the tokens' positions, `block_rope` at the blocks' first; both are of this
        layer's kind, which serves queries, window rows, entries, the indexer and the way back alike. `scratch` holds
        the step's window rows where the ring cannot (see WindowTable)."""
        ops, window = self.ops, step.window
        folded = beside(lambda: self._folded(x, step, block_rope), 0)
        low, kv = self.down(shared)
        stored = beside(lambda: self._stored(kv, step, rope, scratch), 2)
        _, qr = self.q_norm(low)
        queries = self._queries(qr, rope)
        selected = self._selected(qr, folded, step, rope)
        q, rows, compressed = queries(), stored(), self._compressed(selected, step)
        o = ops.sparse_attention(q, self.sink, self.scale, *rope, step.tokens, rows, window.ids, *compressed)
        if rows is scratch:
            ops.copy_rows(rows, window.kept, self.window, window.kept_to)
        u = ops.grouped_linear(o.view(len(x), self.groups, -1), self.wo_a)
        return ops.linear(u.flatten(1), self.wo_b)

    def _queries(self, qr: Tensor | Quantised, rope: Rope) -> Callable[[], Tensor]:
        """What gives the queries [T, h, D] of low-rank ones, normed and turned. They are on a lane where entries are chosen: the choice is a chain
        of small launches, and the queries' product, which fills the GPU, must not come before them."""

        def made() -> Tensor:
            q = self.ops.linear(qr, self.wq_b).unflatten(-1, (self.heads, self.dim))
            return self.ops.norm_rope(q, None, *rope, self.eps)

        return beside(made, None if self.indexer is None else 1)

    def _folded(self, x: Tensor, step: Step, rope: Rope | None) -> Tensor | None:
        """Takes the step's tokens into the compressors, whose entries they then see; gives what an indexer's scores are weighted with,
        float32 [T, H]."""
        if self.inputs is None:
            return None
        found = self.inputs(x)
        for compressor, projected in zip(self.compressors, found, strict=False):
            self._compress(compressor, projected, step, rope)
        return None if self.indexer is None else found[-1]

    def _stored(self, kv: Tensor, step: Step, rope: Rope, scratch: Rows | None) -> Rows:
        """Writes the step's window rows, of key-value rows [T, D] before norm and rotation; gives what holds the window's. What is attended
        to now has been through the format, as what a later step reads."""
        ops, window, rows = self.ops, step.window, self.window
        if scratch is not None and window.past is not None:
            rows = scratch
            ops.copy_rows(self.window, window.past, rows, window.past_to)
        ops.write_rows(self._kv(kv, step), self.kv_norm, *rope, self.eps, rows, window.target)
        return rows

    def _kv(self, kv: Tensor, step: Step) -> Tensor:
        """Of the step's tokens here those of all."""
        return kv

    def _compress(self, compressor: Compressor, projected: Tensor, step: Step, rope: Rope | None) -> None:
        """Takes the step's tokens into a compressor."""
        compressor(projected, step.tokens, step.blocks[self.ratio], rope)

    def _selected(
        self, qr: Tensor | Quantised, folded: Callable[[], Tensor | None], step: Step, rope: Rope
    ) -> Tensor | None:
        """Entries that the indexer chooses, once the step's own are written; None where there is no indexer."""
        query = None if self.indexer is None else self.indexer.query(qr)
        weights = folded()
        if self.indexer is None or query is None or weights is None:
            return None
        return self.indexer.select((query, weights), step, rope)

    def _compressed(self, selected: Tensor | None, step: Step) -> tuple:
        """The history arguments of `sparse_attention`."""
        if self.history is None:
            return ()
        return self.history, step.entries[self.ratio], selected
