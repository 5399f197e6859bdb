"""Attention and selection over the parts that ranks hold, put together, against the ops over all keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dsv4.backends import REGISTRY
from dsv4.cache.rows import Rows, woven
from dsv4.ops.forms import Machine
from dsv4.ops.reference.index import entries_of_part
from dsv4.ops.spec import SPECS
from dsv4.ops.tables import EntryTable
from torch import Tensor

from tests.ops.cases import BLOCK_TOKENS, RATIO, case, moved, stored

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    b
    for b in REGISTRY.backends("partial_attention")
    if REGISTRY.runs("partial_attention", b, Machine.here(DEVICE))
]


def part_of(rows: Rows, entries: EntryTable, part: int, parts: int) -> tuple[Rows, EntryTable]:
    """Rows part, part + parts, … of every page, as that rank's pages hold them."""
    values = rows.read(torch.arange(len(rows.region) * rows.rows)).view(len(rows.region), rows.rows, -1)
    mine = values[:, part::parts].flatten(0, 1)
    return stored(mine, rows.rows // parts, rows.codec.name), entries.of_part(part, parts)


@pytest.mark.parametrize("form", ["float32", "fp8", "mxfp4"])
@pytest.mark.parametrize("parts", [2, 4])
def test_rows_of_parts_are_woven_into_those_of_the_whole(form: str, parts: int) -> None:
    values = torch.randn((3 * 8, 32), generator=torch.Generator().manual_seed(1))
    whole = stored(values, 8, form)
    pages = values.view(3, 8, -1)
    found = woven([stored(pages[:, p::parts].flatten(0, 1), 8 // parts, form) for p in range(parts)])
    every = torch.arange(len(values))
    assert found.rows == 8 and found.region.stride(0) % 64 == 0
    assert torch.equal(found.read(every), whole.read(every))


def merged_attention(backend: str, args: dict[str, Any], parts: int) -> Tensor:
    """`sparse_attention` by parts: window rows dealt out by their place, entries by their number."""
    partial, merge = (REGISTRY.load(op, backend) for op in ("partial_attention", "merge_attention"))
    found = []
    for part in range(parts):
        rows, entries = part_of(args["history"], args["entries"], part, parts)
        place = torch.arange(args["window_ids"].shape[1]) % parts == part
        selected, count = None, None
        if args["selected"] is not None:
            selected, count = entries_of_part(args["selected"], part, parts)
        mine = dict(
            window_ids=torch.where(place, args["window_ids"], -1), history=rows, entries=entries, selected=selected, count=count
        )  # fmt: skip
        own = {k: v for k, v in (args | mine).items() if k not in ("sink", "cos", "sin")}
        found.append(partial(**moved(own, DEVICE)))
    o, lse = (torch.stack(x).cpu() for x in zip(*found, strict=True))
    turned = {k: args[k] for k in ("sink", "cos", "sin")}
    return merge(**moved(dict(o=o, lse=lse, **turned), DEVICE)).cpu()


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 12, 65])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_by_parts(backend: str, tokens: int, parts: int) -> None:
    args = case("sparse_attention", tokens)
    whole = REGISTRY.load("sparse_attention", "reference")(**args)
    difference = (merged_attention(backend, args, parts) - whole).abs().max()
    assert difference <= 2 * SPECS["sparse_attention"].tolerance


def test_one_part_may_hold_all_selected_entries() -> None:
    args = case("sparse_attention", 7)
    assert args["selected"] is not None
    args["selected"] = (
        torch.where(args["selected"] % 2 == 0, args["selected"], -1).sort(descending=True).values
    )
    (own, count), (other, none) = (entries_of_part(args["selected"], p, 2) for p in (0, 1))
    assert (own >= 0).sum() == count.sum() == (args["selected"] >= 0).sum()
    assert not (other >= 0).any() and not none.any()
    whole = REGISTRY.load("sparse_attention", "reference")(**args)
    assert (merged_attention("reference", args, 2) - whole).abs().max() <= 2e-5


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tokens", [1, 12, 65])
@pytest.mark.parametrize("backend", BACKENDS)
def test_selection_by_parts(backend: str, tokens: int, ties: bool, parts: int) -> None:
    """The same entries, and of equal scores those with the lowest index, whichever part holds them."""
    args = case("index_select", tokens)
    if ties:
        rows = args["keys"].read(torch.arange(len(args["keys"].region) * args["keys"].rows))
        args["keys"] = stored(rows[torch.arange(len(rows)) // 5 * 5], BLOCK_TOKENS // RATIO)
    whole = REGISTRY.load("index_select", "reference")(**args)
    candidates, merge = (REGISTRY.load(op, backend) for op in ("index_candidates", "merge_candidates"))
    found = []
    for part in range(parts):
        rows, entries = part_of(args["keys"], args["entries"], part, parts)
        selected, scores = candidates(**moved(args | dict(keys=rows, entries=entries), DEVICE))
        assert ((selected < 0) == (scores == -torch.inf)).all()
        place = torch.empty((2, *selected.shape), dtype=torch.int32, device=selected.device)
        into = place[0], place[1].view(torch.float32)
        candidates(**moved(args | dict(keys=rows, entries=entries), DEVICE), into=into)
        assert torch.equal(into[0], selected) and torch.equal(into[1], scores)
        found.append(place)
    every = torch.stack(found)
    selected, scores = every[:, 0], every[:, 1].view(torch.float32)  # lists that lie apart
    assert torch.equal(merge(selected, scores, whole.shape[1]).cpu(), whole)
    assert torch.equal(merge(selected.contiguous(), scores, whole.shape[1]).cpu(), whole)


def test_the_part_of_a_table() -> None:
    visible = torch.tensor([0, 1, 2, 3, 9], dtype=torch.int32)
    table = EntryTable(torch.zeros((1, 4), dtype=torch.int32), 8, visible, 9)
    parts = [table.of_part(p, 4) for p in range(4)]
    assert all(t.per_page == 2 and t.most == 3 for t in parts)  # as wide on every rank
    assert [t.visible.tolist() for t in parts] == [
        [0, 1, 1, 1, 3], [0, 0, 1, 1, 2], [0, 0, 0, 1, 2], [0, 0, 0, 0, 2]
    ]  # fmt: skip
    assert torch.equal(sum(t.visible for t in parts), visible)
    assert torch.equal(table.of_part(0, 1).visible, visible)
    chosen = torch.tensor([[0, 3, 4, 5, 7, -1]], dtype=torch.int32)
    own, count = entries_of_part(chosen, 1, 2)
    assert own.tolist() == [[1, 2, 3, -1, -1, -1]] and count.tolist() == [3]
