"""The lightning indexer and its top-k against the reference: whole rows, appended candidates, wrong thresholds."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dsv4.backends import REGISTRY, choose
from dsv4.cache.rows import Rows
from dsv4.formats import row_format
from dsv4.kernels.triton import indexer
from dsv4.ops.forms import Machine
from dsv4.ops.reference.index import lowest_index_topk

from tests.kernels.device import DEVICE, on_gpu
from tests.ops.cases import case, history_rows, moved, stored

REFERENCE = choose("reference")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So little room that rows of a hundred entries are long ones."""
    for name, value in (("SAMPLE", 8), ("CAP", 64), ("SAMPLED", 32), ("TOKENS", 16)):
        monkeypatch.setattr(indexer, name, value)
    monkeypatch.setattr(indexer.State, "lists", {})


@pytest.mark.parametrize("form", ["float32", "fp8", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_whole_rows(form: str, tokens: int) -> None:
    args = case("index_select", tokens)
    args["keys"] = history_rows(torch.Generator().manual_seed(3), 3, args["q"].shape[-1], form)
    got = indexer.index_select(**moved(args, DEVICE))
    assert torch.equal(got.cpu(), REFERENCE.index_select(**args))


def test_weights_that_are_columns_of_a_wider_matrix() -> None:
    args = moved(case("index_select", 6), DEVICE)
    wide = torch.randn((len(args["weights"]), 40), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    heads = args["weights"].shape[1]
    wide[:, 8 : 8 + heads] = args["weights"]
    expected = indexer.index_select(**args)
    assert torch.equal(indexer.index_select(**args | dict(weights=wide[:, 8 : 8 + heads])), expected)


def test_long_rows(small: None) -> None:
    """Of prompt chunks and of decode steps."""
    for tokens in (6, 1):
        args = case("index_select", tokens)
        args["keys"] = history_rows(torch.Generator().manual_seed(3), 3, args["q"].shape[-1], "fp8")
        got = indexer.index_select(**moved(args, DEVICE))
        assert torch.equal(got.cpu(), REFERENCE.index_select(**args))


class Thresholds:
    """In place of `threshold_kernel`: the same threshold for every token."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __getitem__(self, _grid: object) -> Callable[..., None]:
        return lambda _scores, _stride, _visible, bound, used, *_k, **_options: (
            bound.fill_(self.value),
            used.zero_(),
        )


@pytest.mark.parametrize("threshold", [-torch.inf, 0.0, torch.inf])
def test_wrong_thresholds(small: None, monkeypatch: pytest.MonkeyPatch, threshold: float) -> None:
    """Too many candidates for the list, and fewer than are selected: none at all."""
    monkeypatch.setattr(indexer.select, "threshold_kernel", Thresholds(threshold))
    test_long_rows(small)


def test_a_wrong_threshold_reads_no_page_behind_the_last(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 70 entries in pages of 32, 64 are taken in at a time; the page table goes on with what would not be memory."""
    monkeypatch.setattr(indexer.select, "threshold_kernel", Thresholds(torch.inf))
    g, n = torch.Generator().manual_seed(1), 70
    keys = moved({"keys": stored(torch.randn((96, 32), generator=g), 32, "fp8")}, DEVICE)["keys"]
    q, weights = torch.randn((1, 2, 32), generator=g).to(DEVICE), torch.rand((1, 2), generator=g).to(DEVICE)
    slab, visible = (torch.tensor([x], dtype=torch.int32, device=DEVICE) for x in (0, n))
    turn = (torch.ones((1, 4), device=DEVICE), torch.zeros((1, 4), device=DEVICE))
    found = []
    for behind in (0, 2**31 - 1):
        table = torch.tensor([[2, 0, 1, *[behind] * 5]], dtype=torch.int32, device=DEVICE)
        entries = SimpleNamespace(pages=table[:, :3], visible=visible, most=n)
        tokens = SimpleNamespace(slab=slab, slabs=slab)
        found.append(indexer.index_select(q, *turn, weights, keys, tokens, entries, 40))
    assert torch.equal(*found) and int(found[0].min()) >= 0 and int(found[0].max()) < n


def _integers(
    g: torch.Generator, requests: int, entries: int, heads: int, dim: int, per_page: int, stride: int
) -> dict[str, Any]:
    """FP8 keys and queries of small integers, so that every score is exact and many are equal. Pages are scattered and
    `stride` bytes apart (0: as close as they go, and what no request holds is NaN)."""
    codec = row_format("fp8", dim, dim // 2)
    blocks, size = -(-entries // per_page), per_page * (dim + 4)
    pages = (
        torch.randperm(requests * blocks + 3, generator=g)[: requests * blocks].int().view(requests, blocks)
    )
    region = torch.empty((requests * blocks + 3, stride or size + 64), dtype=torch.uint8, device=DEVICE)
    if not stride:
        region.fill_(0xFF)
    rows = Rows(codec, region[:, 32 : 32 + size], per_page)
    k = torch.randint(-1, 2, (requests, entries, dim), generator=g).float()
    data, scale = rows.planes()
    for r in range(requests):
        for b in range(blocks):
            part = k[r, b * per_page : (b + 1) * per_page]
            data[pages[r, b], : len(part)] = part.to(torch.float8_e4m3fn).view(torch.uint8).to(DEVICE)
            scale[pages[r, b], : len(part)] = torch.ones(len(part), 1).view(torch.uint8).to(DEVICE)
    q = torch.randint(-1, 2, (requests, heads, dim), generator=g).float()
    return dict(k=k, q=q, rows=rows, pages=pages)


def _check_integers(
    requests: int, entries: int, topk: int, heads: int, dim: int, per_page: int, stride: int = 0
) -> None:
    g = torch.Generator().manual_seed(entries)
    x = _integers(g, requests, entries, heads, dim, per_page, stride)
    visible = torch.tensor([max(0, entries - 17 * r * r) for r in range(requests)], dtype=torch.int32)
    if requests > 2:
        visible[1] = 0
        visible[2] = topk // 2
    weights = torch.randint(-2, 3, (requests, heads), generator=g).float()
    scores = torch.einsum("rhe,rh->re", torch.relu(torch.einsum("rhd,red->rhe", x["q"], x["k"])), weights)
    expected = lowest_index_topk(scores, visible, topk)
    rows = x["rows"]
    padded = max(16, heads)
    q = torch.zeros((requests, padded, dim))
    q[:, :heads] = x["q"]
    w = torch.zeros((requests, padded))
    w[:, :heads] = weights / 2
    for queries in (2, 1):
        plan = indexer.plan_of(heads, rows, topk, entries, queries)
        for _ in range(1 if DEVICE == "cpu" else 2):
            out = torch.full((requests, topk), -7, dtype=torch.int32, device=DEVICE)
            indexer.select_entries(
                plan,
                indexer.launch_scan,
                q.to(DEVICE).to(torch.float8_e4m3fn),
                w.to(DEVICE),
                rows,
                x["pages"].to(DEVICE),
                torch.arange(requests, dtype=torch.int32, device=DEVICE),
                visible.to(DEVICE),
                entries,
                out,
            )
            assert torch.equal(out.cpu(), expected)


def test_ties_by_lowest_index(small: None) -> None:
    _check_integers(3, 131, 8, 3, 32, 32)


def test_keys_beyond_four_gigabytes() -> None:
    """Pages so far apart that the last ones lie beyond 2^32 bytes; on a CPU untouched memory costs nothing."""
    _check_integers(1, 90, 8, 3, 32, 32, stride=900_000_000)


@on_gpu
@pytest.mark.parametrize("topk", [512, 1024])
@pytest.mark.parametrize("entries", [700, 5000, 9000, 40_000, 262_144])
def test_ties_by_lowest_index_in_long_rows(entries: int, topk: int) -> None:
    _check_integers(5, entries, min(topk, entries), 64, 128, 64)


def _scores(args: dict[str, Any], t: int, row: int) -> torch.Tensor:
    """float64 scores of all visible entries of a token."""
    from dsv4.ops.reference.norm import rope

    n, keys = int(args["entries"].visible[t]), args["keys"]
    q = keys.codec.transform(rope(args["q"], args["cos"], args["sin"]).float())[t].double()
    ids = args["entries"].locate(args["tokens"].slabs[row : row + 1], torch.arange(n, device=q.device))
    return (torch.relu(keys.read(ids).double() @ q.T) * args["weights"][t].double()).sum(1)


def wide(
    form: str, starts: tuple[int, ...], length: int, per_page: int = 64
) -> tuple[dict[str, Any], list[int]]:
    """Arguments of `index_select` on the GPU at V4's widths, of `length` tokens behind each of `starts`, and the row of each token."""
    from dsv4.model.batch import Batch, Row
    from dsv4.model.step import Geometry, build_step

    g = torch.Generator(device=DEVICE).manual_seed(1)
    count, offset, rows = len(starts), 0, []
    for slab, start in enumerate(starts):
        rows.append(Row(slab, start, length, offset))
        offset += length
    positions = torch.cat([torch.arange(r.start, r.start + r.length) for r in rows])
    blocks = -(-(max(starts) + length) // (4 * per_page))
    table = torch.randperm(count * blocks).int().view(count, blocks)
    nothing = torch.zeros(offset, dtype=torch.int64)
    step = build_step(
        Batch(nothing, positions, tuple(rows), table, nothing[:0]), Geometry(128, 128, 4 * per_page, (4,), 1)
    )
    codec = row_format(form, 128, 64)
    size = per_page * sum(codec.planes)
    region = torch.full((count * blocks, size + 128), 0xFF, dtype=torch.uint8, device=DEVICE)
    keys = Rows(codec, region[:, 64 : 64 + size], per_page)
    for slab, start in enumerate(starts):
        n = (start + length) // 4
        ids = step.entries[4].locate(torch.tensor([slab]), torch.arange(n)).to(DEVICE)
        keys.write(ids, torch.randn((n, 128), device=DEVICE, generator=g))
    angle = torch.rand((offset, 32), device=DEVICE, generator=g)
    args = dict(
        q=torch.randn((offset, 64, 128), device=DEVICE, generator=g).bfloat16(),
        cos=angle.cos(),
        sin=angle.sin(),
        weights=torch.randn((offset, 64), device=DEVICE, generator=g),
        keys=keys,
        tokens=moved(dict(t=step.tokens), DEVICE)["t"],
        entries=moved(dict(t=step.entries[4]), DEVICE)["t"],
        topk=512,
    )
    return args, step.tokens.row.tolist()


def check_selected(args: dict[str, Any], got: torch.Tensor, row_of: list[int], who: str) -> None:
    """What is selected scores at least as much as what is not, up to the rounding of the tensor cores."""
    for t in range(0, len(got), max(1, len(got) // 6)):
        scores = _scores(args, t, row_of[t])
        chosen = got[t][got[t] >= 0].long()
        assert len(chosen) == min(512, len(scores))
        if len(scores) <= 512:
            continue
        assert bool((chosen[1:] > chosen[:-1]).all()) and int(chosen[-1]) < len(scores)
        rest = torch.ones(len(scores), dtype=torch.bool, device=DEVICE)
        rest[chosen] = False
        assert scores[chosen].min() >= scores[rest].max() - 2e-3 * scores.abs().max(), who


def forms_here(op: str) -> list[str]:
    """Backends that run it on this GPU."""
    return [
        backend
        for backend in REGISTRY.backends(op)
        if backend != "reference" and REGISTRY.runs(op, backend, Machine.here(DEVICE))
    ]


CHUNKS = pytest.mark.parametrize(
    ("starts", "length"),
    [((4000, 40_000, 9000), 1), ((150_000, 3), 1), ((40_000, 20), 97), ((1_048_000,), 3)],
)


@on_gpu
@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
@CHUNKS
def test_selection_at_full_width(form: str, starts: tuple[int, ...], length: int) -> None:
    """Every backend."""
    args, row_of = wide(form, starts, length)
    for backend in forms_here("index_select"):
        select = REGISTRY.load("index_select", backend)
        got = select(**args)
        for _ in range(3):
            assert torch.equal(got, select(**args))
        check_selected(args, got, row_of, backend)


@on_gpu
@pytest.mark.parametrize("per_page", [64, 32, 8])
@CHUNKS
def test_candidates_at_full_width(per_page: int, starts: tuple[int, ...], length: int) -> None:
    """Of pages that are shorter than a tile of keys too, as ranks have them; every backend. Scores are what the keys and queries say."""
    args, row_of = wide("mxfp4", starts, length, per_page)
    for backend in forms_here("index_candidates"):
        candidates = REGISTRY.load("index_candidates", backend)
        got, values = candidates(**args)
        for _ in range(3):
            again = candidates(**args)
            assert torch.equal(got, again[0]) and torch.equal(values, again[1])
        check_selected(args, got, row_of, backend)
        for t in (0, len(got) - 1):
            scores = _scores(args, t, row_of[t])
            held = got[t] >= 0
            error = (values[t][held].double() - scores[got[t][held].long()]).abs().max()
            assert error <= 2e-3 * scores.abs().max() and bool((values[t][~held] == -torch.inf).all()), (
                backend
            )
