"""Sparse attention: decode and prefill at Flash's and Pro's shapes, beside FlashMLA on the same rows.

The window and the history are pools of 584-byte rows much larger than L2; rows are picked at random. FlashMLA gets the
same bytes in its own page form (pages of 64 rows) and physical row ids instead of entries and a page table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from dsv4.backends import REGISTRY
from dsv4.cache.rows import Rows
from dsv4.formats import row_format
from dsv4.ops.forms import Machine
from dsv4.ops.reference.attention import sparse_attention as reference
from dsv4.ops.tables import EntryTable, TokenTable
from torch import Tensor

from benches.gpu.peers import flashmla
from benches.gpu.timing import Bench, Row, max_abs_err

DIM, ROPE, WINDOW, PER_PAGE, RING = 512, 64, 128, 64, 128
MODELS = {"flash": (64, 512), "pro": (128, 1024)}
"""Heads and selected entries."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of the op, and FlashMLA's form of them."""

    args: dict[str, Any]
    window_ids: Tensor
    history_ids: Tensor
    rows: int
    """Rows that each token attends to."""


def _random_rows(pages: int, per_page: int, page_bytes: int) -> Rows:
    """Rows of norm about 2 in random pages with a stride as in a page of many layers."""
    codec = row_format("fp8_ds_mla", DIM, ROPE)
    storage = torch.empty((pages, page_bytes), dtype=torch.uint8, device="cuda")
    rows = Rows(codec, storage[:, : per_page * sum(codec.planes)], per_page)
    for at in range(0, pages * per_page, 1 << 16):
        ids = torch.arange(at, min(pages * per_page, at + (1 << 16)), device="cuda")
        rows.write(ids, torch.randn((len(ids), DIM), device="cuda") / 10)
    return rows


def inputs(
    heads: int, k: int | None, tokens: int, entries: int, *, chunk: bool = False, ranks: int = 1
) -> Inputs:
    """`tokens` requests that decode (or one whose chunk is prefilled) with `entries` entries each, `k` of them selected
    (None: all). Pages are those of one of `ranks`."""
    torch.manual_seed(0)
    per_page = max(1, (PER_PAGE if k else 2) // ranks)
    blocks, requests = -(-entries // per_page), 1 if chunk else tokens
    pages = max(requests * blocks, 1024)
    window = _random_rows(max(tokens, 8), RING, RING * 584)
    history = _random_rows(pages, per_page, -(-per_page * 584 // 64) * 64 if ranks > 1 else per_page * 584)
    table = torch.randperm(pages, device="cuda")[: requests * blocks].view(requests, blocks).int()
    step = 1 if chunk else RING
    ids = torch.arange(RING, device="cuda") + step * torch.arange(tokens, device="cuda")[:, None]
    if k:
        selected = torch.rand((tokens, entries), device="cuda").topk(k).indices.sort().values.int()
    else:
        selected = torch.arange(entries, device="cuda").expand(tokens, entries).int()
    at = torch.arange(tokens, device="cuda")
    slab = torch.zeros_like(at) if chunk else at
    token_table = TokenTable(at, slab.int(), at + entries, at, at + entries, torch.ones_like(at), at, 1)
    visible = torch.full((tokens,), entries, dtype=torch.int32, device="cuda")
    entry_table = EntryTable(table, per_page, visible, entries)
    angle = 6.3 * torch.rand((tokens, ROPE // 2), device="cuda")
    args = dict(
        q=torch.randn((tokens, heads, DIM), device="cuda", dtype=torch.bfloat16),
        sink=torch.randn(heads, device="cuda"),
        scale=DIM**-0.5,
        cos=angle.cos(),
        sin=angle.sin(),
        tokens=token_table,
        window=window,
        window_ids=ids.int().contiguous(),
        history=history,
        entries=entry_table,
        selected=selected if k else None,
    )
    physical = entry_table.locate(token_table.slab[:, None], selected.long()).int()
    return Inputs(args, args["window_ids"], physical, WINDOW + selected.shape[1])


def _peer(x: Inputs) -> Callable[[], Any] | None:
    """FlashMLA's decode on the same rows; without the inverse rotation, which it lacks."""
    ops = flashmla()
    if ops is None:
        return None
    a = x.args
    tokens, heads = a["q"].shape[:2]

    def pages(rows: Rows) -> Tensor:
        region = rows.region
        shape = (len(region), rows.rows, 1, 584)
        return region.as_strided(shape, (region.stride(0), 584, 584, 1)).view(torch.float8_e4m3fn)

    q = a["q"].view(tokens, 1, heads, DIM)
    one, two = pages(a["window"]), pages(a["history"])
    i1, i2 = x.window_ids.view(tokens, 1, -1), x.history_ids.view(tokens, 1, -1).contiguous()

    def call(meta: Any = None, splits: Any = None, out: Any = None) -> Any:
        return ops.sparse_decode_fwd(
            q, one, i1, None, a["sink"], meta, splits, two, i2, None, DIM, a["scale"], out
        )

    out, _, meta, splits = call()
    return lambda: call(meta, splits, out)


def _prefill_peer(x: Inputs) -> Callable[[], Any] | None:
    """FlashMLA's prefill: rows as bfloat16 in one array, which somebody has made from the stored rows before; that is not
    timed."""
    ops, a = flashmla(), x.args
    if ops is None:
        return None
    every = [torch.arange(len(r.region) * r.rows, device="cuda") for r in (a["window"], a["history"])]
    kv = torch.cat([r.read(i).bfloat16() for r, i in zip((a["window"], a["history"]), every, strict=True)])[
        :, None
    ]
    ids = torch.cat((x.window_ids, x.history_ids + len(every[0])), 1)[:, None].contiguous()
    out = torch.empty_like(a["q"])
    return lambda: ops.sparse_prefill_fwd(a["q"], kv, ids, a["scale"], DIM, a["sink"], None, out)


def _row(bench: Bench, backend: str, kernel: str, name: str, x: Inputs, context: int) -> Row:
    run = REGISTRY.load("sparse_attention", backend)
    a = x.args
    tokens, heads = a["q"].shape[:2]
    error = None
    if tokens <= 32:
        error = max_abs_err(run(**a), reference(**a))
    peer = _prefill_peer(x) if kernel == "sparse_prefill" else _peer(x)
    return Row(
        kernel=kernel,
        shape=f"{name} {backend}",
        batch=tokens,
        context=context,
        us=bench.us(lambda: run(**a)),
        bytes=tokens * (x.rows * 584 + heads * DIM * 4),
        flops=tokens * heads * x.rows * DIM * 4,
        peer="FlashMLA" if peer else "",
        peer_us=bench.us(peer) if peer else None,
        max_abs_err=error,
    )


def rows(bench: Bench) -> Iterator[Row]:
    backends = [b for b in REGISTRY.backends("sparse_attention") if b != "reference"]
    usable = [b for b in backends if REGISTRY.runs("sparse_attention", b, Machine.here("cuda"))]
    for model, (heads, k) in MODELS.items():
        batches = (1, 8, 32, 128, 256) if not bench.quick else (1, 64, 256)
        for batch in batches:
            x = inputs(heads, k, batch, 8192)
            for backend in usable:
                yield _row(bench, backend, "sparse_decode", f"{model} csa", x, 32768)
        for context, batch in ((131072, 8), (1 << 20, 1), (1 << 20, 8)) if not bench.quick else ():
            x = inputs(heads, None, batch, context // 128)
            for backend in usable:
                yield _row(bench, backend, "sparse_decode", f"{model} hca", x, context)
        batch = 4096 if not bench.quick else 1024
        x = inputs(heads, k, batch, 8192, chunk=True)
        for backend in usable:
            yield _row(bench, backend, "sparse_prefill", f"{model} csa", x, 32768)
