"""A plan as text in which every figure can be followed, and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from dsv4.model.parallel import Parallel
from dsv4.plan.build import Alternative, Plan
from dsv4.plan.cache import Capacity, window_bytes_per_token
from dsv4.plan.outside import outside
from dsv4.plan.weights import PUBLISHED, whole_attention
from dsv4.quantities import counted

NOT_YET = "an engine is one group of tensor-parallel ranks; data and expert parallelism, as planned here, it has not yet"


def as_json(plan: Plan) -> dict[str, Any]:
    """Every number of the report under plain names; bytes are whole numbers."""
    q, layout = plan.question, plan.question.rank_layout
    return {
        "model": q.config.name,
        "gpu": {**asdict(q.gpu), "num": q.num},
        "parallel": {**asdict(q.parallel), "name": str(q.parallel), "pools": q.parallel.pools},
        "servable_today": q.parallel.ranks == q.parallel.tp,
        "limits": asdict(q.limits),
        "release": {
            "tensors": q.weights.files[0],
            "bytes": q.weights.files[1],
            "published": _published(plan),
        },
        "counted_from": q.counted_from or "the config of a release",
        "notes": list(q.weights.notes),
        "weights": [asdict(row) for row in plan.weights],
        "memory": {**asdict(plan.memory), "total": plan.memory.total},
        "outside": [asdict(x) for x in outside(q.parallel.tp)],
        "workspace": [asdict(b) for b in plan.buffers],
        "layout": {
            "block_tokens": layout.block_tokens,
            "history_bytes_per_token": layout.history_bytes_per_token,
            "window_bytes_per_token": window_bytes_per_token(layout),
            "page_bytes": layout.page_bytes,
            "slab_bytes": layout.slab_bytes,
            "snapshot_bytes": layout.snapshot_bytes,
            "snapshot_pages": layout.snapshot_pages,
            "replay_tokens": layout.replay_tokens,
        },
        "capacity": [_capacity_json(c, q.parallel.pools) for c in plan.capacities],
        "what_if": [_alternative_json(a) for a in plan.alternatives],
        "how": how(plan),
    }


def _capacity_json(c: Capacity, pools: int) -> dict[str, Any]:
    return {**asdict(c), "tokens_in_all": c.tokens * pools, "requests_in_all": c.requests * pools}


def _alternative_json(a: Alternative) -> dict[str, Any]:
    fits = a.per_pool is not None
    return {
        "parallel": str(a.parallel),
        "fits": fits,
        "memory": asdict(a.memory),
        "capacity": _capacity_json(a.per_pool, a.parallel.pools) if a.per_pool else None,
    }


def _published(plan: Plan) -> int | None:
    """Bytes of the release that this is, in whole."""
    config = plan.question.config
    return None if config.left_out else PUBLISHED.get(config.name)


def as_text(plan: Plan) -> str:
    """The whole report."""
    parts = (
        _head(plan),
        _weights(plan),
        _memory(plan),
        _capacity(plan),
        _what_if(plan),
        ["how", *(f"  {line}" for line in how(plan))],
    )
    return "\n\n".join("\n".join(part) for part in parts)


def _head(plan: Plan) -> list[str]:
    q = plan.question
    tensors, size = q.weights.files
    published = _published(plan)
    same = (
        ""
        if published is None
        else ", as published"
        if published == size
        else f", but {published:,} B published"
    )
    formats = {c.name: c.format for c in q.layout.components}
    index = next((formats[s.index] for s in q.config.layers if s.indexed), "none")
    ranks = (
        f"{counted(q.parallel.ranks, 'GPU')} an engine" if q.parallel.replicas > 1 else counted(q.num, "GPU")
    )
    return [
        f"model    {q.config.name}: {counted(q.config.num_layers, 'layer')}, {counted(tensors, 'tensor')}, {size:,} B{same}",
        *([f"counted  from {q.counted_from}"] if q.counted_from else []),
        *(f"         {note}" for note in q.weights.notes),
        f"gpu      {q.num} x {q.gpu.name}, {_gb(q.gpu.memory_bytes)} each; {q.parallel} ({ranks})",
        *_serve(q.parallel),
        f"cache    rows {formats['window']}, index {index}, {q.rank_layout.block_tokens} tokens a page",
        f"limits   {q.limits.max_len:,} tokens a request, {q.limits.running:,} running, {q.limits.step_tokens:,} tokens a step",
    ]


def _serve(parallel: Parallel) -> list[str]:
    """How a plan of several GPUs is served."""
    if parallel.ranks > parallel.tp:
        return [f"serve    {NOT_YET}"]
    return [f"serve    dsv4 serve MODEL --tensor-parallel-size {parallel.tp}"] if parallel.tp > 1 else []


def _weights(plan: Plan) -> list[str]:
    q = plan.question
    rows = [(w.group, w.dtype, f"{w.tensors:,}", f"{w.total:,}", f"{w.rank:,}") for w in plan.weights]
    total, rank = sum(w.total for w in plan.weights), sum(w.rank for w in plan.weights)
    rows.append(("sum", "", f"{sum(w.tensors for w in plan.weights):,}", f"{total:,}", f"{rank:,}"))
    note = (
        ""
        if q.draft or q.config.draft == "none"
        else f"; the {q.config.draft} drafter is left out (--draft counts it)"
    )
    return [
        f"weights, kept as {q.held}{note}",
        *_table(("group", "dtype", "tensors", "bytes in all", "bytes a GPU"), rows, left=2),
    ]


def _memory(plan: Plan) -> list[str]:
    m, q = plan.memory, plan.question
    have = q.gpu.memory_bytes
    beside = outside(q.parallel.tp)
    left = have - m.total - sum(x.size for x in beside)
    rows = [
        ("weights", f"{m.weights:,}", f"{m.weights / have:.1%}"),
        (f"state: {counted(q.limits.running, 'slab')}", f"{m.slabs:,}", f"{m.slabs / have:.1%}"),
        ("workspace, at most", f"{m.workspace:,}", f"{m.workspace / have:.1%}"),
        (f"pool: {counted(m.pages, 'page')}", f"{m.pool:,}", f"{m.pool / have:.1%}"),
        *((f"{x.name}, about", f"{x.size:,}", f"{x.size / have:.1%}") for x in beside),
        ("left", f"{left:,}", f"{left / have:.1%}"),
    ]
    lines = ["memory of one GPU", *_table(("", "bytes", ""), rows, left=1)]
    if left < 0:
        lines.append(f"  that is {_gb(-left)} more than the GPU has")
    return lines


def _capacity(plan: Plan) -> list[str]:
    q = plan.question
    pools = q.parallel.pools
    rows = [
        (c.policy, f"{c.bytes_per_token:,.1f}", f"{c.tokens * pools:,}", f"{c.requests * pools:,}", c.assumes)
        for c in plan.capacities
    ]
    where = "one pool" if pools == 1 else f"{pools} pools of {plan.capacities[0].tokens:,} and more tokens"
    head = ("snapshots", "bytes a token", "tokens", f"requests of {q.limits.max_len:,}", "")
    return [
        f"what fits, {where} (requests: in memory at once; at most {q.limits.running * pools:,} run)",
        *_table(head, rows, left=1),
    ]


def _what_if(plan: Plan) -> list[str]:
    q = plan.question
    rows = []
    for a in plan.alternatives:
        mark = "*" if a.parallel == q.parallel else ""
        pools, c = a.parallel.pools, a.per_pool
        what = (_gb(a.memory.weights), _gb(a.memory.workspace), _gb(a.memory.pool))
        if c is None:
            rows.append((f"{a.parallel}{mark}", *what, "does not fit", "", ""))
        else:
            rows.append(
                (
                    f"{a.parallel}{mark}",
                    *what,
                    f"{c.tokens * pools:,}",
                    f"{c.tokens:,}",
                    f"{c.requests * pools:,}",
                )
            )
    head = ("layout", "weights", "workspace", "pool", "tokens (auto)", "longest request", "full requests")
    return [
        f"other layouts of {counted(q.num, 'GPU')} at the same {_gb(plan.memory.total)} a GPU (* asked for)",
        *_table(head, rows, left=1),
    ]


def how(plan: Plan) -> list[str]:
    """Each figure as its formula with the numbers put in."""
    return [*_how_weights(plan), *_how_cache(plan), *_how_memory(plan), *_how_capacity(plan)]


def _how_weights(plan: Plan) -> Iterator[str]:
    q, p = plan.question, plan.question.parallel
    yield "weights: one table of names, shapes and formats gives both the loader's checks and these sums"
    yield "  fp8 matrix [n, m] = n m B + ceil(n / 128) ceil(m / 128) B of scales; fp4 = n m / 2 B + n m / 32 B of scales"
    experts = (
        f"{q.config.num_experts} / {p.ep} whole experts"
        if p.ep > 1
        else f"all {q.config.num_experts} experts, 1/{p.tp} of the columns"
    )
    heads = "all heads" if whole_attention(q.weights, q.held) else f"1/{p.tp} of heads"
    yield f"  a GPU has {heads} (wq_b, wo_a, wo_b, sinks), 1/{p.tp} of the shared expert's columns and of the vocabulary; {experts}"
    yield "  and all of the low-rank, key-value, compressor, indexer, gate, hyper-connection and norm weights"


def _how_cache(plan: Plan) -> Iterator[str]:
    layout = plan.question.rank_layout
    history = [c for c in layout.components if c.kind == "stride"]
    state = [c for c in layout.components if c.kind != "stride"]
    per_token = " + ".join(f"{c.name} {len(c.layers)} layers x {c.row_bytes} B / {c.ratio}" for c in history)
    where = ""
    if layout.ranks > 1:
        where, per_token = " on one GPU", f"({per_token}) / {layout.ranks} ranks"
    yield f"history a token{where} = {per_token} = {layout.history_bytes_per_token:,.4f} B"
    page = " + ".join(f"{len(c.layers)} x {c.layer_stride:,}" for c in history)
    padding = layout.page_bytes / layout.block_tokens / layout.history_bytes_per_token - 1
    yield f"page = {page}, rounded up to 256 = {layout.page_bytes:,} B for {layout.block_tokens} tokens ({padding:.2%} padding)"
    slab = " + ".join(f"{c.name} {len(c.layers)} x {c.layer_stride:,}" for c in state)
    yield f"state of a request (slab) = {slab}, rounded up to 256 = {layout.slab_bytes:,} B"
    saved = " + ".join(
        f"{c.name} {len(c.layers)} x {c.snapshot_layer_stride:,}" for c in state if c.saved_rows
    )
    yield (
        f"snapshot = {saved} = {layout.snapshot_bytes:,} B, in ceil({layout.snapshot_bytes:,} / {layout.page_bytes:,}) "
        f"= {layout.snapshot_pages} pages"
    )
    yield f"window rows of one token = {window_bytes_per_token(layout):,} B in all layers"
    reaches = Counter(s.reach for s in plan.question.config.layers)
    how = " + ".join(f"{reach} x {count} layers" for reach, count in reaches.items())
    yield f"replay that rebuilds a state = {how} = {layout.replay_tokens:,} tokens"


def _how_memory(plan: Plan) -> Iterator[str]:
    q, m = plan.question, plan.memory
    yield "workspace = what stays + the largest phase:"
    for b in plan.buffers:
        yield f"  {b.phase:<9} {b.name}: {b.formula} = {b.size:,} B"
    if q.pool_bytes is None:
        have = int(q.gpu.memory_bytes * q.memory_fraction)
        yield (
            f"pool = {q.memory_fraction:g} x {q.gpu.memory_bytes:,} - weights - slabs - workspace = {have:,} - {m.weights:,} "
            f"- {m.slabs:,} - {m.workspace:,}, in whole pages = {m.pages:,} x {q.rank_layout.page_bytes:,} = {m.pool:,} B"
        )
    else:
        yield f"pool = {q.pool_bytes:,} B as given, in whole pages = {m.pages:,} x {q.rank_layout.page_bytes:,} = {m.pool:,} B"


def _how_capacity(plan: Plan) -> Iterator[str]:
    q, layout = plan.question, plan.question.rank_layout
    block, pages = layout.block_tokens, plan.memory.pages
    yield f"tokens = pages / (1 + snapshots a page x {layout.snapshot_pages}) x {block}; none = {pages:,} x {block} = {pages * block:,}"
    turns = q.traffic
    yield (
        f"turns: {float(turns.per_turn):g} snapshots in {turns.turn_tokens:,} tokens = "
        f"{float(turns.per_turn * block / turns.turn_tokens):.4f} a page; forks {float(turns.forks_over_turns):.3f} times that"
    )
    yield (
        f"auto: at most {q.snapshot_budget:g} of the pool holds snapshots, so at least (1 - {q.snapshot_budget:g}) x "
        f"{pages:,} pages hold history"
    )
    if q.parallel.tp > 1:
        yield f"a page covers {block:,} tokens, a multiple of 128 x {q.parallel.tp}: up to {block - 1:,} tokens of a prefix beyond whole pages are read again"
        yield f"row j of a page lies on rank j mod {q.parallel.tp} of a TP group, and 1/{q.parallel.tp} of a snapshot on each: a page of a GPU counts for all its tokens"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> Iterator[str]:
    """Aligned columns, the first `left` and those that hold text to the left."""
    widths = [max(len(str(row[i])) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        last = len(row) - 1
        cells = [
            cell if i == last and i >= left and not head[i] else cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        yield ("  " + "  ".join(cells)).rstrip()
