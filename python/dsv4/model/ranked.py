"""The forward on one of R ranks (see `cut.py`). A single GPU runs `v4.py`, which knows nothing of this.

| what | where it is | what is said for it |
| --- | --- | --- |
| norms, mHC, projections, queries | a cut token on its owner, a shared one everywhere | |
| window rows, compressor pools | whole on every rank | key-value rows of cut tokens are gathered; `fold.py` has what crosses of compressors |
| history, index keys | row j of a page on rank j mod R | shared: candidates gathered, parts to the owner of the head; cut: rows gathered |
| attention weights | whole on every rank | shared: `wo_a` by group, `wo_b` by input, summed |
| experts | 1 / R of each one's columns | inputs of cut tokens (their codes, if all is in FP8) and the choice gathered, sums go back to the owner |
| embedding, head | 1 / R of the vocabulary | summed; gathered |
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4.cache.paged import PagedCache
from dsv4.cache.rows import ALIGNED, Rows, woven
from dsv4.model.attention import Attention
from dsv4.model.batch import Batch, pages_of, resolved
from dsv4.model.beside import beside
from dsv4.model.compressor import Compressor
from dsv4.model.config import ModelConfig
from dsv4.model.cut import Group, Places, RankStep
from dsv4.model.deal import Capacity, Deal, RankColumns, owners, rank_columns, wanted
from dsv4.model.moe import MoE
from dsv4.model.parallel import UNIT, Share
from dsv4.model.rank import Rank, ordered
from dsv4.model.rope import Rope
from dsv4.model.scope import Scope
from dsv4.model.step import Step
from dsv4.model.v4 import Layer, V4Model
from dsv4.ops.quantised import Quantised
from dsv4.ops.registry import Ops
from dsv4.ops.weight import Weight


@dataclass(frozen=True, slots=True)
class Ropes:
    """Rotations at the positions of the local tokens and of all."""

    local: Rope
    all: Rope


class RankedAttention(Attention):
    """Attention whose parts are on R ranks."""

    rank: Rank

    def _load_output(self, weights: Scope, config: ModelConfig) -> None:
        rank = weights.rank
        assert rank is not None, "a ranked model's scope has a rank"
        self.rank = rank
        self.groups = config.o_groups
        self.wo_a = weights.parts("grouped_linear", "wo_a.weight", 0, rank.ranks)
        self.wo_b = weights.parts("linear", "wo_b.weight", 1, rank.ranks)

    def __call__(  # type: ignore[override]
        self,
        x: Tensor,
        shared: Tensor | Quantised,
        step: RankStep,
        rope: Ropes,
        block_rope: Rope | None,
        scratch: Rows | None,
    ) -> Tensor:
        """Of the local tokens [n, d] -> [n, d]."""
        ops, window, indexer = self.ops, step.window, self.indexer
        # A decode step, which alone has streams for it, says nothing to other ranks beside.
        folded = beside(lambda: self._folded(x, step, block_rope), 0)
        low, kv = self.down(shared)
        stored = beside(lambda: self._stored(kv, step, rope.all, scratch), 2)
        _, qr = self.q_norm(low)
        queries = self._queries(qr, rope.local)
        asked = None if indexer is None else indexer.query(qr)
        weights, rows = folded(), stored()
        query = None if asked is None or weights is None else (asked, weights)
        y = self._attended(step, queries, rope.local, rows, query)
        if rows is scratch:
            ops.copy_rows(rows, window.kept, self.window, window.kept_to)
        return y

    def _attended(
        self,
        step: RankStep,
        queries: Callable[[], Tensor],
        rope: Rope,
        rows: Rows,
        query: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Of what gives the queries [n, h, D] of the local tokens: [n, d]."""
        if step.cut is None:
            assert step.shared is not None, "a step has tokens"
            return self._shared(step.shared, queries, rope, rows, query)
        q = queries()
        past, keys = ([], []) if step.pages is None else self._gathered(step.pages)
        own = self._cut(step.cut, q, rope, rows, past, keys, query)
        if step.shared is None:
            return ordered(own)
        y = own[0].new_empty((len(q), own[0].shape[1]))
        ordered(own, step.cut.pick(y))
        self._shared(step.shared, lambda: q, rope, rows, query, step.shared.pick(y))
        return y

    def _kv(self, kv: Tensor, step: RankStep) -> Tensor:  # type: ignore[override]
        return step.places.all(kv)

    def _folded(self, x: Tensor, step: RankStep, rope: Rope | None) -> Tensor | None:  # type: ignore[override]
        """Every rank gets the pools of all rows, and the entries that it holds."""
        fold = step.folds.get(self.ratio)
        if self.inputs is None or not self.compressors or fold is None:  # none: entries are another layer's
            return super()._folded(x, step, rope)  # type: ignore[arg-type]
        assert rope is not None, "a layer with a compressor has a ratio"
        found = self.inputs.split(fold.with_tails(self.inputs.whole(x), self.rank))
        fold(self.compressors, found[: len(self.compressors)], rope, self.rank)
        return None if self.indexer is None else found[-1][: len(x)]

    def _compress(  # type: ignore[override]
        self, compressor: Compressor, projected: Tensor, step: RankStep, rope: Rope | None
    ) -> None:
        """Of what is not folded every rank takes in all."""
        assert rope is not None, "a layer with a compressor has a ratio"
        projected = step.places.all(projected)
        if step.slot is not None:
            projected = projected[step.slot]
        assert step.tokens is not None, "what is not folded is taken in whole"
        compressor(projected, step.tokens, step.blocks[self.ratio], rope)

    def _shared(
        self,
        group: Group,
        queries: Callable[[], Tensor],
        rope: Rope,
        rows: Rows,
        query: tuple[Tensor, Tensor] | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Each rank sums its part, the owner of a head all parts of it; in `out` if it is given."""
        ops, rank = self.ops, self.rank
        turn = tuple(group.pick(r) for r in rope)
        compressed: tuple = ()
        if self.history is not None:
            compressed = self.history, group.entries[self.ratio][0]
        if query is not None:
            chosen = self._best_of_ranks(group, turn, query)
            compressed = *compressed, *ops.entries_of_part(chosen, rank.rank, rank.ranks)
        o, lse = ops.partial_attention(
            group.pick(queries()), self.scale, group.tokens, rows, group.window[0], *compressed
        )
        o, lse = rank.heads(o, lse)
        sink = self.sink.chunk(rank.ranks)[rank.rank]
        o = ops.merge_attention(o, lse, sink, *turn)
        return rank.sum(self._projected(o, rank.rank), out)

    def _cut(
        self,
        group: Group,
        q: Tensor,
        rope: Rope,
        rows: Rows,
        past: list[Rows],
        keys: list[Rows],
        query: tuple[Tensor, Tensor] | None,
    ) -> list[Tensor]:
        """The owner chooses among all entries and makes all parts, [m, d] each."""
        ops, ranks = self.ops, self.rank.ranks
        turn, q = tuple(group.pick(r) for r in rope), group.pick(q)
        chosen = None
        if query is not None and self.indexer is not None:
            asked, weights = map(group.pick, query)
            every = group.whole[self.ratio]
            chosen = ops.index_select(
                asked, *turn, weights, woven(keys), group.tokens, every, self.indexer.topk
            )
        o = q.new_empty((ranks, *q.shape))
        lse = q.new_empty(o.shape[:-1], dtype=torch.float32)
        for p in range(ranks):
            compressed: tuple = (past[p], group.entries[self.ratio][p]) if past else (None, None)
            own = (None, None) if chosen is None else ops.entries_of_part(chosen, p, ranks)
            ops.partial_attention(
                q, self.scale, group.tokens, rows, group.window[p], *compressed, *own, (o[p], lse[p])
            )
        merged = ops.merge_attention(o, lse, self.sink, *turn)
        return [self._projected(v, p) for p, v in enumerate(merged.chunk(ranks, 1))]

    def _projected(self, o: Tensor, part: int) -> Tensor:
        """What the heads [m, h / R, D] of a part add to the result [m, d]. Matrices of a part, not the whole one's rows: how a product is cut may
        follow from its matrix."""
        u = self.ops.grouped_linear(o.reshape(len(o), self.groups // self.rank.ranks, -1), self.wo_a[part])
        return self.ops.linear(u.flatten(1), self.wo_b[part])

    def _best_of_ranks(self, group: Group, turn: tuple, query: tuple[Tensor, Tensor]) -> Tensor:
        """The best entries of all ranks int32 [m, k], for which each tells its own: entries and their scores, int32 [2, m, k], cross as they are. One
        rank may hold all of them."""
        assert self.indexer is not None
        (q, weights), entries = map(group.pick, query), group.entries[self.ratio][0]
        ranks, topk = self.rank.ranks, self.indexer.topk
        shape = len(q), min(topk, entries.most)
        count = prod(shape)
        room = (
            count + -count % ALIGNED
        )  # so that both lists have one alignment, for which kernels are compiled
        own = torch.empty((2, room), dtype=torch.int32, device=q.device)
        into = own[0, :count].view(shape), own[1, :count].view(torch.float32).view(shape)
        self.ops.index_candidates(q, *turn, weights, self.indexer.keys, group.tokens, entries, topk, into)
        every = self.rank.gather(own)[..., :count].unflatten(-1, shape)
        selected, scores = every[:, 0], every[:, 1].view(torch.float32)
        return self.ops.merge_candidates(selected, scores, min(topk, ranks * entries.most))

    def _gathered(self, pages: Tensor) -> tuple[list[Rows], list[Rows]]:
        """Every rank's rows of these pages, and index rows."""
        keys = None if self.indexer is None else self.indexer.keys
        return self._gather(self.history, pages), self._gather(keys, pages)

    def _gather(self, rows: Rows | None, pages: Tensor) -> list[Rows]:
        if rows is None:
            return []
        region = rows.region[pages]
        size = region.shape[1]
        if size % ALIGNED:
            region = torch.nn.functional.pad(region, (0, -size % ALIGNED))
        return [Rows(rows.codec, every[:, :size], rows.rows) for every in self.rank.gather(region)]


class RankedMoE(MoE):
    """A mixture of experts of which this rank has some columns."""

    def __init__(self, weights: Scope, config: ModelConfig, layer: int, ops: Ops) -> None:
        super().__init__(weights, config, layer, ops)
        self.in_fp8 = ops.quantises("swiglu", self.shared) and ops.quantises("experts", self.experts)

    def __call__(self, x: Tensor, shared: Tensor | Quantised, step: RankStep) -> Tensor:  # type: ignore[override]
        """Of the local tokens [n, d] -> [n, d]."""
        places = step.places
        if not places.owned:
            return places.sum(super().__call__(x, shared, step))  # type: ignore[arg-type]
        chosen = self.routed(x, places.local(step.token_ids))
        every, experts, weights = self._crossed(shared if self.in_fp8 else x, chosen, step)
        return places.sum(self.mixed(every, lambda: (experts, weights)))

    @staticmethod
    def _crossed(
        x: Tensor | Quantised, routed: tuple[Tensor, Tensor], step: RankStep
    ) -> tuple[Tensor | Quantised, Tensor, Tensor]:
        """x, experts and weights of all tokens from those of the local ones. In FP8 codes cross and no values; scales go with the choice."""
        all_of, n, total = step.places.all, len(x), len(step.token_ids)
        words = [part.view(torch.int32) for part in routed]
        if isinstance(x, Quantised):
            words.append(x.scales.view(torch.int32).t()[:n])
        found = all_of(torch.cat(words, 1), pad=4).split([part.shape[1] for part in words], 1)
        experts, weights = (part[:total].contiguous() for part in found[:2])
        every: Tensor | Quantised
        if isinstance(x, Quantised):
            scales = found[2].t().contiguous().view(torch.float32)
            every = Quantised(all_of(x.codes, pad=4), scales, total, x.dtype)
        else:
            every = all_of(x)
        return every, experts.view(torch.int64), weights.view(torch.float32)


class RankedLayer(Layer):
    attention, mixture = RankedAttention, RankedMoE


class RankedModel(V4Model):
    """`V4Model` on one of R ranks, all of which are called alike. `weights` are what `load_weights` gives for `share(rank)`;
    `cache` is a `ShardedCache`."""

    layer = RankedLayer

    def __init__(
        self,
        config: ModelConfig,
        weights: MutableMapping[str, Weight],
        cache: PagedCache,
        ops: Ops,
        rank: Rank,
        *,
        consume: bool = False,
        unit: int = UNIT,
    ) -> None:
        self.rank, self.unit = rank, unit
        self.part = rank.rank, rank.ranks
        super().__init__(config, weights, cache, ops, consume=consume)
        self.first_id, _ = share(rank).bounds(config.vocab_size)
        self.foldable = {s.ratio: s.overlap for s in config.layers if s.stores and unit % s.ratio == 0}

    def _scope(self, weights: MutableMapping[str, Weight], consume: bool) -> Scope:
        return Scope(weights, self.ops, consume=consume, rank=self.rank)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        vocabulary = -(-self.config.vocab_size // self.rank.ranks)
        part = super().logits(hidden)
        part = torch.nn.functional.pad(part, (0, vocabulary - part.shape[1]))
        return torch.cat(self.rank.gather(part).unbind(), dim=1)[:, : self.config.vocab_size].contiguous()

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> Tensor:
        owner = owners(batch, self.rank.ranks, self.unit)
        if (owner < 0).all():
            return super().hidden(batch)
        self.reset_fresh(batch)
        columns = self.dealt_columns(batch, owner).to(self.embed.device)
        return self.dealt(columns, pages_of(batch), batch.newest)

    def dealt_columns(
        self, batch: Batch, owner: np.ndarray, capacity: Capacity | None = None, **padding: int
    ) -> RankColumns:
        """What `dealt` takes of a batch, whose tokens' owners are given, on the CPU; `capacity` and `padding` of a larger step, as in `rank_columns`."""
        rank, ranks = self.rank.rank, self.rank.ranks
        deal = Deal.of(batch, owner, ranks, self.unit)
        c = capacity or deal.capacity(self.geometry)
        columns = rank_columns(deal, batch, rank, self.geometry, self.foldable, c, **padding)
        most = None if capacity is None else c.long
        ends = wanted(owner, batch.logit_index.numpy(), deal.local(c, rank), c.owned, ranks, rank, most)
        return replace(
            columns, of=columns.of | {name: torch.from_numpy(column) for name, column in ends.items()}
        )

    @torch.inference_mode()
    def dealt(self, columns: RankColumns, pages: Tensor, newest: Tensor | None) -> Tensor:
        """Streams [S, n, d] after the last layer, on every rank, of the tokens that the columns of `deal.wanted` among `columns` tell of: `hidden`
        of a step of which some rows are cut, after `reset_fresh`. As `decode`, for a CUDA graph."""
        step = RankStep.of(columns, self.rank, self.geometry, pages)
        step = replace(step, token_ids=resolved(step.token_ids, newest))
        streams = self._through(step, self._rank_ropes(step)).settled(self.ops)
        return self._wanted(streams, step.places, columns.of["send"], columns.of["source"])

    def _alone(self, step: Step, ropes: dict[int, tuple[Rope, Rope | None]]) -> tuple[Any, dict[int, Any]]:
        here = {m: (Ropes(rope, rope), block_rope) for m, (rope, block_rope) in ropes.items()}
        return RankStep.alone(step, self.rank), here

    def _whole(self, step: Step) -> tuple[Any, dict[int, Any]]:
        """Every token on every rank."""
        here = RankStep.whole(step, self.rank)
        return here, self._rank_ropes(here)

    def _embedded(self, step: RankStep) -> Tensor:
        """Streams [n, n_streams, d] of the local tokens; each row of the embedding is on one rank."""
        at = step.token_ids - self.first_id
        held = (at >= 0) & (at < len(self.embed))
        part = torch.where(held[:, None], self.embed[at.clamp(0, len(self.embed) - 1)], 0)
        return step.places.sum(part).unsqueeze(1).repeat(1, self.config.hc_mult, 1)

    def _rank_ropes(self, step: RankStep) -> dict[int, tuple[Ropes, Rope | None]]:
        found = {}
        for m, table in self.ropes.items():
            every = table.at(step.position, step.end)
            cos, sin = map(step.places.local, every)
            blocks = table.at(step.block_positions(m), step.end) if m else None
            found[m] = Ropes((cos, sin), every), blocks
        return found

    def _wanted(self, streams: Tensor, places: Places, send: Tensor, source: Tensor) -> Tensor:
        """Streams [S, n, d] on every rank, of the tokens that `deal.wanted` gave the columns of; `streams` are the local ones."""
        if not len(source):
            return streams[:0]
        shared = streams[places.owned :]
        if not len(send):
            return shared[source]
        return torch.cat((self.rank.gather(streams[send]).flatten(0, 1), shared))[source]


def share(rank: Rank) -> Share:
    """What a rank loads."""
    return Share(rank.rank, rank.ranks, whole_attention=True)
