"""Sparse attention kernels against the reference: formats, index lists, splits, damage in rows that must not be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from dsv4.backends import REGISTRY
from dsv4.kernels.triton import attention
from dsv4.ops.reference.attention import sparse_attention as reference

from tests.kernels.device import DEVICE, close, on_gpu, on_hopper, on_hopper_or_blackwell
from tests.ops.cases import BLOCK_TOKENS, BLOCKS, RATIO, moved, step_of, stored

Case = dict[str, Any]


def make(
    rows: tuple[tuple[int, int], ...],
    *,
    form: str = "float32",
    heads: int = 3,
    dim: int = 64,
    rope: int = 32,
    k: int | None = 8,
    dtype: torch.dtype = torch.float32,
    window: int = 16,
    seed: int = 0,
) -> Case:
    """Inputs for rows (start, length). Every stored row that a token may read is finite; the others are NaN."""
    g = torch.Generator().manual_seed(seed)
    step = step_of(*rows, window=window)
    n, entries, per_page = len(step.token_ids), step.entries[RATIO], BLOCK_TOKENS // RATIO
    seen = torch.zeros(int(step.window.ids.max()) + 1, dtype=torch.bool)
    seen[step.window.ids[step.window.ids >= 0].long()] = True
    values = torch.randn((len(seen), dim), generator=g)
    window = stored(values, 16, form, rope)
    past = torch.randn((len(rows) * BLOCKS * per_page, dim), generator=g)
    history = stored(past, per_page, form, rope)
    selected = None
    if k is not None:
        selected = torch.full((n, k), -1, dtype=torch.int32)
        for t, v in enumerate(entries.visible.tolist()):
            take = torch.randperm(v, generator=g)[: max(0, k - t % 3)].sort().values
            selected[t, : len(take)] = take.int()
    angle = 6.3 * torch.rand((n, rope // 2), generator=g)
    case = dict(
        q=torch.randn((n, heads, dim), generator=g).to(dtype),
        sink=torch.randn(heads, generator=g),
        scale=dim**-0.5,
        cos=angle.cos(),
        sin=angle.sin(),
        tokens=step.tokens,
        window=window,
        window_ids=step.window.ids,
        history=history,
        entries=entries,
        selected=selected,
    )
    poison(case, seen)
    return case


def poison(case: Case, seen: torch.Tensor) -> None:
    """0xFF, a NaN in every format, in the rows that no token reads."""
    entries, slabs = case["entries"], case["tokens"].slab
    read = torch.zeros(len(case["history"].region) * case["history"].rows, dtype=torch.bool)
    for t, v in enumerate(entries.visible.tolist()):
        every = torch.arange(v) if case["selected"] is None else case["selected"][t][case["selected"][t] >= 0]
        read[entries.locate(slabs[t], every.long())] = True
    for rows, used in ((case["window"], seen), (case["history"], read)):
        at = (~used).nonzero().flatten()
        for plane in rows.planes():
            plane[at // rows.rows, at % rows.rows] = 0xFF


def full_width(rows: tuple[tuple[int, int], ...], **options: Any) -> Case:
    """V4's dims and rows."""
    kinds = dict(dim=512, rope=64, heads=64, form="fp8_ds_mla", window=128, k=64, dtype=torch.bfloat16)
    return make(rows, **(kinds | options))


def check(case: Case, tolerance: float, run: Any = attention.sparse_attention, **options: Any) -> None:
    expected = reference(**moved(case, "cpu"))
    got = run(**moved(case, DEVICE), **options)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert close(got, expected) <= tolerance


TOLERANCE = {"float32": 2e-6, "bfloat16": 6e-3, "fp8_ds_mla": 2e-3}
"""||error|| / ||result||; probabilities are rounded to the type of the matrix product."""


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("k", [8, None], ids=["selected", "all"])
@pytest.mark.parametrize("form", TOLERANCE)
def test_formats(form: str, k: int | None, splits: int) -> None:
    """Decode: rows of one token at odd positions, so that windows are short, full and wrapped."""
    check(make(((150, 1), (37, 1), (0, 1)), form=form, k=k), TOLERANCE[form], splits=splits)


@pytest.mark.parametrize("k", [5, None], ids=["selected", "all"])
def test_chunks_and_decode_together(k: int | None) -> None:
    """Prefill chunks beside a decode token: window rows come from the scratch region."""
    check(make(((9, 5), (0, 3), (40, 1)), k=k, form="fp8_ds_mla", dim=96), TOLERANCE["fp8_ds_mla"])


def test_dims_that_are_no_power_of_two() -> None:
    check(make(((33, 1), (2, 1)), dim=80, rope=16, heads=5), TOLERANCE["float32"])


def test_window_alone() -> None:
    case = make(((20, 1), (3, 1)))
    case |= dict(history=None, entries=None, selected=None)
    check(case, TOLERANCE["float32"])


def test_empty_lists() -> None:
    """Nothing selected, and a first token that sees itself alone."""
    case = make(((150, 1), (0, 1)))
    case["selected"].fill_(-1)
    check(case, TOLERANCE["float32"])


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), 200.0])
def test_sinks_at_the_edge(value: float, splits: int) -> None:
    """An infinite sink takes everything, one of minus infinity nothing; a large one does not overflow."""
    case = make(((150, 1),), heads=4)
    case["sink"][1] = value
    got = attention.sparse_attention(**moved(case, DEVICE), splits=splits)
    assert got.isfinite().all()
    if value > 0:
        assert (got[:, 1].abs() < 1e-6).all()
    else:
        case["sink"][1] = -1e4
        assert close(got, reference(**moved(case, "cpu"))) <= TOLERANCE["float32"]


def test_bfloat16_model() -> None:
    check(make(((150, 1), (5, 1)), dtype=torch.bfloat16, form="bfloat16"), 6e-3)


@triton.jit
def _softmax(x, out, BLOCKS: tl.constexpr, N: tl.constexpr, SLACK: tl.constexpr):  # noqa: ANN001, ANN202
    """Rows of x [16, BLOCKS * N]: mean column under 2^x, largest weight, changes of the maximum, log2 of the sum."""
    row, col = tl.arange(0, 16), tl.arange(0, N)
    top, total = tl.full((16,), float("-inf"), tl.float32), tl.zeros((16,), tl.float32)
    most, raised, acc = total, total, total
    for i in range(BLOCKS):
        s = tl.load(x + row[:, None] * (BLOCKS * N) + i * N + col[None, :])
        p, fade, top = attention.weigh(s, top, SLACK)
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade + tl.sum(p * (i * N + col)[None, :], 1)
        most = tl.maximum(most, tl.max(p, 1))
        raised += (fade < 1).to(tl.float32)
    some = tl.where(total > 0, total, 1.0)
    tl.store(out + row, acc / some)
    tl.store(out + 16 + row, most)
    tl.store(out + 32 + row, raised)
    tl.store(out + 48 + row, tl.where(top == float("-inf"), 0.0, top) + tl.log2(some))


@pytest.mark.parametrize("slack", [0, 8])
def test_a_maximum_that_stays(slack: int) -> None:
    """The step of the online softmax that Gluon kernels share: with slack (Blackwell) the same sums, weights up to
    2^slack and fewer changes of the maximum; rows that rise slowly, at once, or hold nothing at first or at all."""
    blocks, n = 8, 16
    x = 4 * torch.randn((16, blocks * n), generator=torch.Generator().manual_seed(5))
    x += torch.linspace(-20, 20, 16)[:, None] * torch.linspace(0, 1, blocks * n)
    x[3, :40], x[4, 40:], x[5] = float("-inf"), float("-inf"), float("-inf")
    x[6, 100] = 90.0
    out = torch.empty((4, 16), device=DEVICE)
    _softmax[(1,)](x.to(DEVICE), out, blocks, n, slack)
    mean, most, raised, sums = out.cpu()
    live = torch.arange(16) != 5
    y = x[live].double() * torch.log(torch.tensor(2.0, dtype=torch.float64))
    assert torch.allclose(mean[live].double(), y.softmax(1) @ torch.arange(blocks * n).double(), rtol=1e-5)
    assert torch.allclose(sums[live].double() * 0.6931471805599453, y.logsumexp(1), rtol=1e-5)
    assert mean[5] == 0 and (most <= 2.0**slack).all()
    exact = torch.full((16,), float("-inf"))
    changes = torch.zeros(16)
    for block in x.split(n, 1):
        new = torch.maximum(exact, block.max(1).values)
        changes += ~((new == exact) & exact.isfinite())
        exact = new
    assert (raised == changes).all() if slack == 0 else raised[live].sum() < changes[live].sum() / 2


ON_GPU = [pytest.param("triton", marks=on_gpu), pytest.param("gluon", marks=on_hopper_or_blackwell)]


@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize(
    "options", [{}, {"heads": 4, "k": 50}, {"heads": 128}, {"k": None}, {"k": 0}], ids=str
)
def test_full_width(backend: str, options: dict[str, Any]) -> None:
    """Decode at odd batch sizes, alone and split, and a chunk beside decode tokens."""
    run = REGISTRY.load("sparse_attention", backend)
    for rows in (((350, 1),), ((350, 1), (37, 1), (0, 1), (128, 1), (254, 1)), ((300, 70), (0, 5), (201, 1))):
        for splits in (None, 1, 2):
            check(full_width(rows, **options), 4e-3, run, splits=splits)


@pytest.mark.parametrize("backend", ON_GPU)
def test_repeats_are_bitwise_equal(backend: str) -> None:
    run, case = REGISTRY.load("sparse_attention", backend), moved(full_width(((350, 1), (99, 1))), DEVICE)
    first = run(**case)
    assert all(torch.equal(first, run(**case)) for _ in range(20))


@on_hopper
def test_times_of_the_roles_change_no_bit() -> None:
    """Every role of every CTA passes its marks, and the result stays as it is without them."""
    run, case = REGISTRY.load("sparse_attention", "gluon"), moved(full_width(((350, 1), (99, 1))), DEVICE)
    times = torch.zeros((2, 1 + 4, 4, 8), dtype=torch.int32, device=DEVICE)  # 128 + 64 rows: three blocks
    assert torch.equal(run(**case, splits=1, times=times), run(**case, splits=1))
    assert (times[:, 0, :, 3] != 0).all() and (times[:, 1:4, 3, 5] != 0).all() and (times[:, 4] == 0).all()


@pytest.mark.parametrize("backend", ON_GPU)
def test_sinks_at_full_width(backend: str) -> None:
    run = REGISTRY.load("sparse_attention", backend)
    case = full_width(((350, 1),))
    case["sink"][:2] = torch.tensor([float("inf"), float("-inf")])
    for splits in (1, 2):
        got = run(**moved(case, DEVICE), splits=splits)
        assert got.isfinite().all() and (got[:, 0].abs() < 1e-6).all() and got[:, 1].abs().max() > 1e-3


@pytest.mark.parametrize("backend", ON_GPU)
def test_pools_beyond_4_gib(backend: str) -> None:
    """The same pages at the end of a pool of 2^31 elements and more give the same bits."""
    run = REGISTRY.load("sparse_attention", backend)
    case = moved(full_width(((350, 1), (99, 1))), DEVICE)
    expected, history, entries = run(**case), case["history"], case["entries"]
    stride = 1 << 20
    pages = (5 << 30) // stride
    pool = torch.full((pages, stride), 0xFF, dtype=torch.uint8, device=DEVICE)
    size, count = history.region.shape[1], len(history.region)
    region = pool[:, 4096 : 4096 + size]
    region[pages - count :] = history.region
    case["history"] = type(history)(history.codec, region, history.rows)
    case["entries"] = type(entries)(
        entries.pages + (pages - count), entries.per_page, entries.visible, entries.most
    )
    assert torch.equal(run(**case), expected)
