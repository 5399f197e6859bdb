"""Inputs of sparse attention at V4's dims, whole and as ranks have them."""

from __future__ import annotations

from typing import Any

import torch
from dsv4.cache.rows import Rows
from dsv4.ops.reference.index import entries_of_part
from dsv4.ops.tables import EntryTable, TokenTable

from tests.kernels.device import DEVICE
from tests.kernels.test_attention import Case, full_width
from tests.ops.cases import moved, moved_table, partial_args, stored

TOKENS = ((350, 1), (37, 1), (0, 1), (128, 1), (254, 1))


def part_case(tokens: tuple[tuple[int, int], ...], **options: Any) -> Case:
    """`partial_attention`'s arguments as a rank has them: a third of the window, lists of different lengths, and a token without any
    key; sink, cos and sin, which it does not take, beside them."""
    case = full_width(tokens, **options)
    case["window_ids"] = torch.where(torch.arange(128) % 3 == 1, case["window_ids"], -1)
    case["window_ids"][2] = -1
    if case["selected"] is None:
        case["entries"].visible[2] = 0
    else:
        length = torch.randint(0, case["selected"].shape[1] + 1, (len(case["q"]), 1), generator=_g(1))
        length[2] = 0
        case["selected"] = torch.where(torch.arange(case["selected"].shape[1]) < length, case["selected"], -1)
    return case | partial_args(case)


def _g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def known(case: Case) -> Case:
    return {k: v for k, v in case.items() if k not in ("sink", "cos", "sin")}


def long(heads: int, k: int | None, tokens: int, entries: int, ranks: int = 1) -> Case:
    """As many rows as in use: a full window each, pages in any order; the lists of some tokens end early."""
    g = _g(1)
    per_page = 64 if k else max(2, ranks)
    blocks = -(-entries // per_page)
    rows = [
        stored(torch.randn((tokens * n, 512), generator=g), size, "fp8_ds_mla", 64)
        for n, size in ((128, 128), (blocks * per_page, per_page))
    ]
    at = torch.arange(tokens)
    visible = (entries - 77 * (at % 3)).int()
    selected = None
    if k:
        selected = torch.rand((tokens, entries), generator=g)
        selected = selected.masked_fill(torch.arange(entries) >= visible[:, None], -1).topk(k).indices.int()
        selected[1::4, -100:] = -1
    angle = 6.3 * torch.rand((tokens, 32), generator=g)
    return dict(
        q=torch.randn((tokens, heads, 512), generator=g).bfloat16(),
        sink=torch.randn(heads, generator=g),
        scale=512**-0.5,
        cos=angle.cos(),
        sin=angle.sin(),
        tokens=TokenTable(at, at.int(), at + entries, at, at + entries, torch.ones_like(at), at, 1),
        window=rows[0],
        window_ids=(128 * at[:, None] + torch.arange(128)).int(),
        history=rows[1],
        entries=EntryTable(
            torch.randperm(tokens * blocks, generator=g).view(tokens, blocks).int(),
            per_page,
            visible,
            entries,
        ),
        selected=selected,
    )


def tokens_of(case: Case, at: torch.Tensor) -> Case:
    """Tokens int64 [n] of a case of `long`, at home in the same rows."""
    each = ("q", "cos", "sin", "window_ids", "selected")
    some = {name: v[at] if name in each and v is not None else v for name, v in case.items()}
    pages = case["entries"]
    return some | dict(
        tokens=moved_table(case["tokens"], lambda t: t[at]),
        entries=EntryTable(pages.pages, pages.per_page, pages.visible[at], pages.most),
    )


def part_of(case: Case, part: int, parts: int) -> Case:
    """What a rank attends to: its rows of every page at multiples of 64 bytes, its keys of each window and list."""
    rows, selected, count = case["history"], case["selected"], None
    region = torch.cat([plane[:, part::parts].flatten(1) for plane in rows.planes()], 1)
    size = region.shape[1]
    region = torch.nn.functional.pad(region, (0, -size % 64))[:, :size]
    if selected is not None:
        selected, count = entries_of_part(selected, part, parts)
    return case | dict(
        window_ids=torch.where(torch.arange(128) % parts == part, case["window_ids"], -1),
        history=Rows(rows.codec, region, rows.rows // parts), entries=case["entries"].of_part(part, parts),
        selected=selected, count=count, into=None,
    )  # fmt: skip


def bytes_of(region: torch.Tensor) -> torch.Tensor:
    """A region and what lies between its pages, a multiple of 256 bytes."""
    flat = region.as_strided((len(region) * region.stride(0) - region.storage_offset(),), (1,))
    return torch.cat((flat, flat.new_zeros(-len(flat) % 256)))


def together(case: Case, reverse: bool) -> tuple[torch.Tensor, int, int]:
    """One tensor with the bytes of both regions, and where the window's and the history's begin; reverse: history first."""
    one, two = (bytes_of((case[name] or case["window"]).region) for name in ("window", "history"))
    if reverse:
        return torch.cat((two, one)), len(two), 0
    return torch.cat((one, two)), 0, len(one)


def on_gpu(case: Case, reverse: bool) -> Case:
    """The case there, both regions in one tensor."""
    both, *begins = together(case, reverse)
    both, case = both.to(DEVICE), moved(case, DEVICE)
    for name, begin in zip(("window", "history"), begins, strict=True):
        rows = case[name]
        case[name] = Rows(
            rows.codec, both.as_strided(rows.region.shape, rows.region.stride(), begin), rows.rows
        )
    return case
