"""Partial attention on Hopper: the roles of both kernels as threads on CPU; on a GPU small shapes and those in use."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from dsv4.backends import REGISTRY
from dsv4.cache.rows import Rows
from dsv4.ops.forms import Machine
from dsv4.ops.reference.attention import partial_attention as reference_part
from dsv4.ops.reference.attention import sparse_attention as reference

from tests.kernels.attention_cases import TOKENS, known, long, on_gpu, part_case, part_of, tokens_of
from tests.kernels.attention_threads import attend
from tests.kernels.device import DEVICE, close, on_hopper
from tests.kernels.test_attention import Case
from tests.ops.cases import moved

pytest.importorskip("triton")

from dsv4.kernels.gluon import attention, fits, hopper_attention, hopper_stream
from dsv4.kernels.triton import merge

PARTIAL_ATTENTION = REGISTRY.load("partial_attention", "gluon", Machine("cuda", 9))


@pytest.mark.parametrize(
    ("options", "splits", "programs"),
    [
        ({}, 1, None),
        ({"k": 200}, 1, None),
        ({"k": 200}, 3, None),
        ({"k": None}, 1, None),
        ({"k": None}, 2, None),
        ({"k": 0}, 1, None),
        ({"k": 200}, 1, 2),
        ({"k": 200, "heads": 128}, 1, 3),
        ({"k": 200}, 1, 1),
        ({"heads": 4, "k": 50}, 1, 5),
        ({"k": 0}, 1, 2),
    ],
    ids=str,
)
def test_a_part_as_threads(options: dict[str, Any], splits: int, programs: int | None) -> None:
    """As `sparse_attention`, without the sink and not turned; a token without any key has nothing."""
    case = part_case(((350, 1), (300, 1), (0, 1), (128, 1), (370, 3)), **options)
    got, sums = attend(case, splits, programs, seed=splits, part=True)
    wanted, lse = reference_part(**known(case))
    some = torch.isfinite(lse)
    assert not some[2].any() and some.any() and not got[2].any()
    assert close(got, wanted) <= 4e-3
    assert torch.equal(torch.isfinite(sums), some) and float((sums - lse)[some].abs().max()) < 2e-2


@pytest.mark.parametrize("programs", [1, 2])
def test_parts_of_long_lists_as_threads(programs: int) -> None:
    """Items of 2 to 10 blocks one after the other; a rank may have all of a list, or nothing."""
    case = long(64, 512, 5, 700)
    case["selected"][2] = 2 * torch.arange(512).clamp(max=340)
    case["selected"][2, 300:] = -1
    for p in (0, 1):
        part = part_of(case, p, 2)
        assert p == 1 or set((2 + (part["count"] + 63) // 64).tolist()) >= {6, 7}
        got, sums = attend(part, 1, programs, seed=p, part=True)
        wanted, lse = reference_part(**known(part))
        assert close(got, wanted) <= 4e-3 and float((sums - lse).abs().max()) < 2e-2


class _Launch:
    """In place of a kernel: stores what it would, as one split or as several of which the others are empty."""

    def __init__(self, o: torch.Tensor, lse: torch.Tensor) -> None:
        self.o, self.lse = o, lse
        self.values: dict[str, Any] = {}
        self.visible = torch.empty(0)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._store

    def _store(self, *arguments: Any, **values: Any) -> None:
        self.values, self.visible, (out, parts, sums) = values, arguments[6], arguments[10:13]
        if values.get("SPLIT", False):
            assert parts.dtype == sums.dtype == torch.float32
            parts[:, 0], sums[:, 0] = self.o.float(), 1.4426950408889634 * self.lse
            parts[:, 1:], sums[:, 1:] = 0, -torch.inf
        else:
            out.copy_(self.o)
            sums.copy_(self.lse)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_part_is_written_where_it_belongs(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel, or from its splits; of several parts one after the other."""
    case = known(part_case(TOKENS, k=200))
    assert fits.v4_part(**case)
    wanted, lse = reference_part(**case)
    launch = _Launch(wanted, lse)
    monkeypatch.setattr(hopper_attention, "attend", launch)
    o = torch.zeros((2, *wanted.shape), dtype=wanted.dtype, device=DEVICE)
    natural = torch.zeros((2, *lse.shape), device=DEVICE)
    there = moved(case, DEVICE)
    found = attention.partial_attention(**there | dict(into=(o[1], natural[1])), splits=splits)
    assert launch.values["SPLIT"] is (splits > 1) and launch.values["PART"] and launch.values["MODE"] == 2
    assert launch.visible is there["count"]
    assert close(o[1], wanted) <= 4e-3 and torch.allclose(natural[1].cpu(), lse, atol=1e-5)
    assert not o[0].any() and not natural[0].any() and found[0].data_ptr() == o[1].data_ptr()
    assert not fits.v4_part(**{**case, "q": case["q"].float()})


def test_rows_that_are_not_at_16_bytes_have_no_part_here() -> None:
    """As of pages of one row, 584 bytes apart; `RankedAttention` gathers them at multiples of 64."""
    case = known(part_case(TOKENS))
    gathered = Rows(case["history"].codec, torch.zeros((8, 584), dtype=torch.uint8), 1)
    assert not fits.v4_part(**case | dict(history=gathered))
    padded = Rows(case["history"].codec, torch.zeros((8, 640), dtype=torch.uint8)[:, :584], 1)
    assert fits.v4_part(**case | dict(history=padded))


@pytest.mark.parametrize(
    ("tokens", "options", "stays"),
    [(9, {}, True), (8, {}, False), (9, {"k": 0}, True), (9, {"k": None}, False)],
    ids=str,
)
def test_which_kernel_takes_a_part(
    tokens: int, options: dict[str, Any], stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU of two multiprocessors, as `sparse_attention`."""
    monkeypatch.setattr(attention, "multiprocessors", lambda: 2)
    monkeypatch.setattr(fits, "multiprocessors", lambda: 2)
    case = known(part_case(((300, tokens),), **options))
    one, other = (_Launch(*reference_part(**case)) for _ in range(2))
    monkeypatch.setattr(hopper_stream, "attend", one)
    monkeypatch.setattr(hopper_attention, "attend", other)
    PARTIAL_ATTENTION(**moved(case, DEVICE))
    assert bool(one.values) is stays and bool(other.values) is not stays


def _check_part(case: Case, splits: tuple[int | None, ...]) -> None:
    """The history behind the window and before it, whichever kernel; the same bits every time, into what is given."""
    expected: Any = None
    for reverse in (False, True):
        here = known(on_gpu(case, reverse))
        if expected is None:
            expected = [x.cpu() for x in reference_part(**here)]
        runs = [partial(attention.partial_attention, splits=n) for n in splits]
        if here["entries"] is None or here["selected"] is not None:
            runs.append(attention.stream_part)
        whole = []
        for run in runs:
            o, lse = run(**here)
            assert close(o, expected[0]) <= 4e-3, f"{run}, history {'before' if reverse else 'behind'}"
            some = torch.isfinite(expected[1])
            assert torch.equal(torch.isfinite(lse).cpu(), some) and o.isfinite().all()
            assert float((lse.cpu() - expected[1])[some].abs().max()) < 2e-2
            for _ in range(5):
                into = torch.full_like(o, torch.nan), torch.full_like(lse, torch.nan)
                run(**here | dict(into=into))
                assert torch.equal(into[0], o) and torch.equal(into[1], lse)
            if run is attention.stream_part or run.keywords.get("splits") == 1:
                whole.append((o, lse))
        for o, lse in whole[1:]:  # both kernels sum alike
            assert torch.equal(o, whole[0][0]) and torch.equal(lse, whole[0][1])


@on_hopper
@pytest.mark.parametrize(
    "options", [{}, {"heads": 4, "k": 50}, {"heads": 128, "k": 200}, {"k": None}, {"k": 0}], ids=str
)
def test_parts_on_a_gpu(options: dict[str, Any]) -> None:
    _check_part(part_case(TOKENS, **options), (None, 1, 2, 3))
    _check_part(part_case(((100, 270), (0, 5), (201, 1)), **options), (1, 2))


@on_hopper
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("shape", [(64, 512, 4096), (128, 1024, 4096), (64, None, 2500)], ids=str)
def test_parts_as_long_as_in_use(shape: tuple[int, int | None, int], ranks: int) -> None:
    """All ranks' parts of a few tokens and of many are put together to the whole."""
    heads, k, entries = shape
    case = long(heads, k, 16, entries, ranks)
    repeated = torch.arange(16).repeat(40)  # more tokens than BUSY for each multiprocessor
    for at in (torch.arange(5), repeated):
        some = tokens_of(case, at)
        for p in (0, ranks - 1):
            _check_part(part_of(some, p, ranks), (None, 1) if len(at) == 5 else (1,))
        parts = [PARTIAL_ATTENTION(**known(moved(part_of(some, p, ranks), DEVICE))) for p in range(ranks)]
        o, lse = (torch.stack(x) for x in zip(*parts, strict=True))
        turn = {n: some[n].to(DEVICE) for n in ("sink", "cos", "sin")}
        merged = merge.merge_attention(o, lse, **turn)
        assert close(merged, reference(**moved(some, DEVICE))) <= 8e-3
