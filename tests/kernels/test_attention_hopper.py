"""Sparse attention on Hopper: the roles of both kernels, their own source as threads on CPU (places, masks, barriers, items
that follow each other in a CTA); on a GPU both at small shapes and at those in use. Parts of it: test_parts_hopper.py."""

from __future__ import annotations

import weakref
from importlib import import_module
from typing import Any

import pytest
import torch
from dsv4.backends import REGISTRY
from dsv4.ops.forms import Machine
from dsv4.ops.reference.attention import sparse_attention as reference

from tests.kernels.attention_cases import TOKENS, known, long, on_gpu, part_case, tokens_of
from tests.kernels.attention_threads import attend
from tests.kernels.device import DEVICE, close, on_hopper
from tests.kernels.test_attention import Case, full_width
from tests.ops.cases import moved

pytest.importorskip("triton")

from dsv4.kernels.gluon import attention, fits, hopper_attention, hopper_stream
from dsv4.kernels.triton import attention as portable
from dsv4.kernels.triton.common import cdiv

SPARSE_ATTENTION = REGISTRY.load("sparse_attention", "gluon", Machine("cuda", 9))


@pytest.mark.parametrize(
    ("options", "splits", "programs"),
    [
        ({}, 1, None),
        ({}, 1, 5),
        ({}, 1, 2),
        ({"k": 200}, 1, 2),
        ({"heads": 4, "k": 50}, 1, 1),
        ({"heads": 128}, 1, 3),
        ({"k": None}, 1, None),
        ({"k": 0}, 1, None),
        ({"k": 0}, 1, 2),
        ({}, 2, None),
        ({"k": None}, 3, None),
    ],
    ids=str,
)
def test_roles_as_threads(options: dict[str, Any], splits: int, programs: int | None) -> None:
    case = full_width(TOKENS, **options)
    got = attend(case, splits, programs, seed=splits)
    assert close(got, reference(**case)) <= 4e-3


@pytest.mark.parametrize("reverse", [False, True], ids=["behind", "before"])
@pytest.mark.parametrize("shape", [(64, 512, 700, 1), (128, 1024, 1100, 2), (64, None, 500, 3)], ids=str)
def test_long_lists_and_a_history_behind_or_before_the_window(shape: Any, reverse: bool) -> None:
    heads, k, entries, splits = shape
    case = long(heads, k, 2, entries)
    got = attend(case, splits, 1 if splits == 1 else None, seed=0, reverse=reverse)
    assert close(got, reference(**case)) <= 4e-3


def _check(case: Case, splits: tuple[int | None, ...]) -> None:
    """The history behind the window and before it; the same bits every time."""
    expected = None
    for reverse in (False, True):
        here = on_gpu(case, reverse)
        expected = reference(**here).cpu() if expected is None else expected
        for n in splits:
            got = SPARSE_ATTENTION(**here, splits=n)
            assert close(got.cpu(), expected) <= 4e-3, (
                f"{n} splits, history {'before' if reverse else 'behind'}"
            )
            assert all(torch.equal(got, SPARSE_ATTENTION(**here, splits=n)) for _ in range(10))


@pytest.fixture(params=[0, 1 << 30], ids=["stays", "one item"])
def busy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that is taken without splits, whatever there is to do."""
    monkeypatch.setattr(fits, "BUSY", request.param)


@on_hopper
@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize(
    "options", [{}, {"heads": 4, "k": 50}, {"heads": 128, "k": 200}, {"k": None}, {"k": 0}], ids=str
)
def test_small_lists_on_a_gpu(options: dict[str, Any]) -> None:
    """More items than CTAs, and few of them in splits."""
    _check(full_width(TOKENS, **options), (None, 1, 2, 3))
    _check(full_width(((100, 270), (0, 5), (201, 1)), **options), (1, 2))


@on_hopper
@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("shape", [(64, 512, 4096), (128, 1024, 4096), (64, None, 2500)], ids=str)
def test_lists_as_long_as_in_use(shape: tuple[int, int | None, int]) -> None:
    heads, k, entries = shape
    _check(long(heads, k, 5, entries), (None, 1, 4))
    many = long(heads, k, 16, entries)
    repeated = torch.arange(16).repeat(20)  # more tokens than multiprocessors
    _check(tokens_of(many, repeated), (1,))


@on_hopper
@pytest.mark.usefixtures("busy")
def test_times_of_the_roles_change_no_bit() -> None:
    case = moved(full_width(((100, 200),)), DEVICE)
    times = torch.zeros((200, 1 + 4, 4, 8), dtype=torch.int32, device=DEVICE)  # 128 + 64 rows: three blocks
    plain = SPARSE_ATTENTION(**case, splits=1)
    assert torch.equal(SPARSE_ATTENTION(**case, splits=1, times=times), plain)
    assert (times[:, 0, :, 3] != 0).all() and (times[:, 1:4, 3, 5] != 0).all() and (times[:, 4] == 0).all()


@pytest.mark.parametrize(
    ("tokens", "options", "splits", "stays"),
    [
        (9, {}, None, True),
        (8, {}, None, False),
        (5, {"heads": 128}, None, True),
        (9, {"k": 0}, None, True),
        (9, {}, 2, False),
        (9, {"k": None}, None, False),
    ],
    ids=str,
)
def test_which_kernel_is_taken(
    tokens: int, options: dict[str, Any], splits: int | None, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU of two multiprocessors: more than four items each, no splits, lists of one length."""
    taken: list[tuple[str, int]] = []

    def launch(name: str) -> Any:
        run = lambda grid: lambda *args, **values: taken.append((name, grid[0]))  # noqa: E731
        return type("Kernel", (), {"__getitem__": lambda self, grid: run(grid)})()

    monkeypatch.setattr(attention, "multiprocessors", lambda: 2)
    monkeypatch.setattr(fits, "multiprocessors", lambda: 2)
    monkeypatch.setattr(hopper_stream, "attend", launch("stays"))
    monkeypatch.setattr(hopper_attention, "attend", launch("one item"))
    monkeypatch.setattr(attention, "merge", lambda *args: None)
    case = full_width(((300, tokens),), **options)
    SPARSE_ATTENTION(**case, splits=splits)
    items = tokens * cdiv(options.get("heads", 64), 64)
    assert taken == [("stays", 2) if stays else ("one item", items * (splits or 1))]


@pytest.mark.parametrize("part", [False, True])
def test_sums_of_many_tokens_over_a_long_history_are_made_some_tokens_at_a_time(
    part: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of every CTA of 4,096 tokens over a million were 2.5 GiB. The portable kernel stands in for Hopper's."""
    launched: list[tuple[int, int]] = []
    held: list[weakref.ref[torch.Tensor]] = []

    def plain(kernel: Any, q: torch.Tensor, *more: Any, **options: Any) -> Any:
        *table, splits, _ = more if len(more) == 12 else (*more, None)
        launched.append((len(q), splits))
        assert not any(made() is not None for made in held), "sums of the tokens before lie beside"
        parts, lse = portable._run(q, *table, splits, **options)
        held.append(weakref.ref(parts))
        return parts, lse

    monkeypatch.setattr(attention, "_run", plain)
    monkeypatch.setattr(attention, "multiprocessors", lambda: 2)
    monkeypatch.setattr(attention, "MOST_BLOCKS", 2)
    rows = ((300, 9),)  # four blocks of 64 keys
    case = moved(known(part_case(rows, k=None)) if part else full_width(rows, k=None), DEVICE)
    run = attention.partial_attention if part else attention.sparse_attention
    whole = run(**case)
    assert launched == [(9, 2)]
    monkeypatch.setattr(attention, "LONG_PROGRAMS", 4)
    pieces = run(**case)
    assert launched[1:] == [(4, 2), (4, 2), (1, 2)]
    assert all(map(torch.equal, whole, pieces))


@pytest.mark.parametrize("file", ["hopper_attention", "hopper_stream", "blackwell_attention"])
def test_how_far_apart_regions_lie_is_a_number_of_64_bits(file: str) -> None:
    """Whatever it is: a kernel for short ways and one for long ones would be compiled when a request first meets the other."""
    attend = import_module(f"dsv4.kernels.gluon.{file}").attend
    [delta] = [p for p in attend.params if p.name == "delta"]
    assert delta.annotation_type == "i64" and delta.do_not_specialize
