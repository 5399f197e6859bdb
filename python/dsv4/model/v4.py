"""The forward of DeepSeek-V4: embedding, four residual streams through the layers, head."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dsv4.cache.paged import PagedCache
from dsv4.cache.rows import Rows
from dsv4.formats import row_format
from dsv4.model.attention import Attention, Codecs
from dsv4.model.batch import Batch, pages_of, resolved
from dsv4.model.beside import lanes
from dsv4.model.config import ModelConfig
from dsv4.model.hyper import HyperConnection, Residual
from dsv4.model.moe import MoE
from dsv4.model.rope import Rope, RopeTable
from dsv4.model.scope import Scope
from dsv4.model.step import Columns, Geometry, Step, columns_of, decode_step, step_of
from dsv4.ops.registry import Ops
from dsv4.ops.weight import Weight
from dsv4.transfer import to_device

_TILE_ROWS = 64
"""Query rows (tokens times heads) that share a block of window keys: enough to be worth a matrix product."""

_SCRATCH_ROWS = 64
"""Rows of a page of the scratch region."""


class Layer:
    """Attention and mixture of experts, each after its hyper-connection and norm."""

    attention: ClassVar[type[Attention]] = Attention
    mixture: ClassVar[type[MoE]] = MoE

    def __init__(
        self,
        weights: Scope,
        config: ModelConfig,
        index: int,
        cache: PagedCache,
        codecs: Codecs,
        ops: Ops,
        dtype: torch.dtype,
    ) -> None:
        self.ratio = config.compress_ratios[index]
        self.attn = self.attention(weights.within("attn"), config, index, cache, codecs, ops, dtype)
        self.moe = self.mixture(weights.within("ffn"), config, index, ops)
        self.attn_hc = HyperConnection(weights, "attn", config, ops, "linear", self.attn.down.matrices)
        self.ffn_hc = HyperConnection(weights, "ffn", config, ops, "swiglu", (self.moe.shared,))

    def __call__(
        self, residual: Residual, step: Step, rope: Rope, block_rope: Rope | None, scratch: Rows | None
    ) -> Residual:
        x, shared, residual = self.attn_hc(residual)
        residual = residual._replace(y=self.attn(x, shared, step, rope, block_rope, scratch))

        x, shared, residual = self.ffn_hc(residual)
        return residual._replace(y=self.moe(x, shared, step))


class V4Model:
    """Any model with Flash's or Pro's structure. Weights are in the released naming; activations have the
    dtype of the embedding; norms, compressors, gate, hyper-connections, softmax and head compute in
    float32. `consume`: weights that take another form are taken out of `weights` (see Scope)."""

    layer: ClassVar[type[Layer]] = Layer
    part = (0, 1)
    """Which of how many parts of history and windows this model has."""

    def __init__(
        self,
        config: ModelConfig,
        weights: MutableMapping[str, Weight],
        cache: PagedCache,
        ops: Ops,
        *,
        consume: bool = False,
    ) -> None:
        self.config, self.cache, self.ops = config, cache, ops
        top = self._scope(weights, consume)
        self.embed, self.norm = top["embed.weight"], top.float("norm.weight")
        self.head = top.matrix("logits", "head.weight")
        self.hc_head = tuple(top.float(f"hc_head_{part}") for part in ("fn", "scale", "base"))
        formats = {c.name: c.format for c in cache.layout.components}
        index = next((formats[s.index] for s in config.layers if s.indexed), "float32")
        codecs = Codecs(
            row=row_format(formats["window"], config.head_dim, config.rope_dim),
            index=row_format(index, config.index_head_dim, config.rope_dim),
        )
        self.window_codec = codecs.row
        self.layers = [
            self.layer(top.within(f"layers.{i}"), config, i, cache, codecs, ops, self.embed.dtype)
            for i in range(config.num_layers)
        ]
        self.weight_bytes = top.nbytes
        # Layers with history turn alike, whatever its ratio: one table for all of them
        tables = {bool(m): RopeTable.for_ratio(config, m, cache.device) for m in config.compress_ratios}
        self.rope_tables = dict(sorted(tables.items()))
        self.ropes = {m: tables[bool(m)] for m in sorted(set(config.compress_ratios))}
        self.geometry = Geometry(
            window=config.window,
            ring=next(c.rows for c in cache.layout.components if c.kind == "window"),
            block_tokens=cache.layout.block_tokens,
            ratios=tuple(m for m in self.ropes if m),
            tile=max(1, _TILE_ROWS // config.num_heads),
        )

    def _scope(self, weights: MutableMapping[str, Weight], consume: bool) -> Scope:
        return Scope(weights, self.ops, consume=consume)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """float32 logits [S, V] of the tokens in `batch.logit_index`; see `hidden`."""
        return self.logits(self.hidden(batch))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [S, V] of streams [S, n, d]. The memory that takes is the caller's to bound."""
        h = self.ops.hc_head(hidden, *self.hc_head, self.config.rms_eps, self.config.hc_eps)
        return self.ops.logits(self.ops.rmsnorm(h, self.norm, self.config.rms_eps), self.head)

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> Tensor:
        """Streams [S, n, d] after the last layer, of the tokens in `batch.logit_index`.

        Writes window rows, compressor pools and the entries that become complete; reads history through the
        page table. Rows of one batch do not see each other. A row's state must be that of its start (or
        `reset`).
        """
        self.reset_fresh(batch)
        device = self.embed.device
        columns, wanted = columns_of(batch, self.geometry).to(device), to_device(batch.logit_index, device)
        return self.extend(columns, wanted, pages_of(batch), batch.newest)

    def reset_fresh(self, batch: Batch) -> None:
        """Empties the state of the rows that begin."""
        if fresh := [row.slab for row in batch.rows if row.reset]:
            self.cache.reset(fresh)

    @torch.inference_mode()
    def decode(
        self, token_ids: Tensor, positions: Tensor, slabs: Tensor, pages: Tensor, newest: Tensor, end: int
    ) -> Tensor:
        """Streams [R, n, d] after the last layer of one token of each of R requests: `hidden` of such a batch, from int64
        [R] each, the page table and the newest tokens, all on the model's device. Nothing is read back, so a CUDA graph can hold it if no op
        is in `uncaptured` and `reserve(end)` was called."""
        tables = [table.below(end) for table in self.rope_tables.values()]
        step, turns, block_turns = decode_step(
            self.ops, token_ids, positions, slabs, pages, newest, tables, end, self.geometry, *self.part
        )
        by_kind = dict(zip(self.rope_tables, turns, strict=True))
        ropes = {m: (by_kind[bool(m)], block_turns.get(m)) for m in self.ropes}
        with lanes(self.embed.device):
            return self._through(*self._alone(step, ropes)).settled(self.ops)

    @torch.inference_mode()
    def extend(self, columns: Columns, logit_index: Tensor, pages: Tensor, newest: Tensor | None) -> Tensor:
        """Streams [S, n, d] after the last layer of tokens `logit_index` int64 [S]: `hidden` of a step, after `reset_fresh`, from its columns
        and the rest on the model's device. As `decode`, for a CUDA graph."""
        step = step_of(columns, pages, self.geometry)
        step = replace(step, token_ids=resolved(step.token_ids, newest))
        return self._through(*self._whole(step)).picked(logit_index).settled(self.ops)

    def _alone(self, step: Step, ropes: dict[int, tuple[Rope, Rope | None]]) -> tuple[Any, dict[int, Any]]:
        """A step of single tokens with its rotations, as layers take both."""
        return step, ropes

    def _whole(self, step: Step) -> tuple[Any, dict[int, Any]]:
        """The same of any step."""
        return step, self._ropes(step)

    def _through(self, step: Any, ropes: dict[int, Any]) -> Residual:
        scratch, residual = self._scratch(step), Residual.of(self._embedded(step))
        for layer in self.layers:
            residual = layer(residual, step, *ropes[layer.ratio], scratch)
        return residual

    def reserve(self, end: int) -> None:
        """Makes what grows with the positions, up to `end`; it stays where it is from then on."""
        for table in self.ropes.values():
            table.grow(end)

    def uncaptured(self) -> list[str]:
        """Ops of a decode step with a form that no CUDA graph can hold, as the reference's, which look at values. Snapshots are copied outside."""
        held = {"experts": [layer.moe.experts for layer in self.layers]}
        inside = [op for op in self.ops.chains if op != "copy_state"]
        return [op for op in inside if any(self.ops.uncaptured(op, w) for w in held.get(op, [None]))]

    def _embedded(self, step: Any) -> Tensor:
        """Streams [T, n, d] of the step's tokens, all alike."""
        return self.embed[step.token_ids].unsqueeze(1).repeat(1, self.config.hc_mult, 1)

    def _ropes(self, step: Step) -> dict[int, tuple[Rope, Rope | None]]:
        """By ratio: rotations at the tokens' positions and at the blocks' first."""
        return {
            m: (
                table.at(step.tokens.position, step.end),
                table.at(step.blocks[m].position, step.end) if m else None,
            )
            for m, table in self.ropes.items()
        }

    def _scratch(self, step: Step) -> Rows | None:
        """A region for the window rows of a step that the ring cannot hold; all layers use it in turn."""
        if step.window.past is None:
            return None
        codec, rows = self.window_codec, len(step.window.past) + len(step.window.target)
        pages = -(-rows // _SCRATCH_ROWS)
        shape = (pages, _SCRATCH_ROWS * sum(codec.planes))
        return Rows(codec, torch.empty(shape, dtype=torch.uint8, device=self.embed.device), _SCRATCH_ROWS)
