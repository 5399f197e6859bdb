"""Sparse attention on Hopper: the roles of both kernels, their own source as threads on CPU (places, masks, barriers, items
that follow each other in a CTA); on a GPU both at small shapes and at those in use."""

from __future__ import annotations

import builtins
import random
import sys
import threading
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dsv4.backends import REGISTRY
from dsv4.cache.rows import Rows
from dsv4.ops.forms import Machine
from dsv4.ops.reference.attention import partial_attention as reference_part
from dsv4.ops.reference.attention import sparse_attention as reference
from dsv4.ops.tables import EntryTable, TokenTable

from tests.kernels import gluon_threads as threads
from tests.kernels.device import DEVICE, close, on_hopper
from tests.kernels.test_attention import Case, full_width
from tests.ops.cases import moved, moved_table, stored

pytest.importorskip("triton")

from dsv4.kernels.gluon import attention, fits, hopper_attention, hopper_stream
from dsv4.kernels.triton import attention as portable
from dsv4.kernels.triton import merge
from dsv4.kernels.triton.common import cdiv, next_pow2

SPARSE_ATTENTION = REGISTRY.load("sparse_attention", "gluon", Machine("cuda", 9))


class Tensor(threads.Array):
    """A tensor; a scalar is one without dimensions."""

    def __array_wrap__(self, out: Any, context: Any = None, return_scalar: bool = False) -> Tensor:
        return np.asarray(out).view(Tensor)

    def __iadd__(self, more: Any) -> Tensor:
        return self + more  # a name gets another value

    def to(self, kind: Any, bitcast: bool = False) -> Tensor:
        if kind == "bfloat16":
            rounded = torch.from_numpy(np.array(self, np.float32)).to(torch.bfloat16)
            return tensor(rounded.view(torch.int16).numpy())
        return tensor(np.asarray(self).astype(kind))

    def broadcast_to(self, shape: list[int]) -> Tensor:
        return tensor(np.broadcast_to(self, shape))


def tensor(values: Any, kind: Any = None) -> Tensor:
    return np.asarray(values, kind).view(Tensor)


class Pointer(threads.Pointer):
    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.at + np.asarray(more, np.int64))

    def to(self, kind: Any) -> Pointer:
        size = np.dtype(kind).itemsize  # of the bytes that it points to
        assert self.at % size == 0
        return Pointer(self.memory.view(kind), self.at // size)


class Shared(threads.Shared):
    layout = None

    def index(self, i: int) -> Shared:
        return Shared(self.values[int(i)])

    def slice(self, start: int, size: int, dim: int) -> Shared:
        return Shared(self.values[:, start : start + size] if dim else self.values[start : start + size])

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.values.transpose(order))

    def reinterpret(self, kind: Any, shape: list[int], layout: Any) -> Shared:
        flat = self.values.reshape(-1)
        assert np.shares_memory(flat, self.values), "shared memory is looked at in another form, not copied"
        return Shared(flat.view(np.int16 if kind == "bfloat16" else kind).reshape(shape))

    def load(self, layout: Any) -> Tensor:
        threads._linger()
        return tensor(self.values.copy())


COPIES = threading.local()
"""groups: of those that are under way, the last one open."""


def _groups() -> list[list[tuple[Shared, np.ndarray]]]:
    if not hasattr(COPIES, "groups"):
        COPIES.groups = [[]]
    return COPIES.groups


def _thread_load(to: Shared, source: Pointer, mask: Any) -> None:
    """What is masked is zero; it lands at once, or when its group is waited for."""
    at, mask = source.places(mask)
    values = np.where(mask, source.memory[np.where(mask, at, 0)], 0)
    if random.random() < 0.5:
        to.store(values)
    else:
        _groups()[-1].append((to, values))


def _wait_group(outstanding: int) -> None:
    while len(_groups()) > outstanding + 1:
        for to, values in _groups().pop(0):
            to.store(values)


def _pairs(low: Any, high: Any) -> Tensor:
    """Words of two float16."""
    return tensor(np.stack((low, high), -1).astype(np.float16).view(np.int32)[..., 0])


def _assembly(text: str, registers: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    if "e4m3x2" in text:
        raw, scale = (np.ascontiguousarray(a, np.int32) for a in np.broadcast_arrays(*args))
        codes = threads.E4M3[raw.view(np.uint8).reshape(*raw.shape, 4)].astype(np.float16)
        codes *= scale.view(np.float16).reshape(*raw.shape, 2)[..., :1]
        return _pairs(codes[..., 0], codes[..., 1]), _pairs(codes[..., 2], codes[..., 3])
    if "shl.b32" in text:
        raw = np.ascontiguousarray(args[0], np.int32)
        return _pairs((raw << 16).view(np.float32), (raw & -65536).view(np.float32))
    if "$1, $1" in text:
        value = np.ascontiguousarray(args[0], np.int32).view(np.float32)
        return _pairs(value, value)
    if text.startswith("mov.b32 $0, $1"):
        return args[0]
    if "prefetch" in text:
        args[0].places(np.asarray(args[1]) != 0)
    else:
        assert "bar.warp.sync" in text
    return None


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    at, mask = pointer.places(mask)
    memory = pointer.memory if len(pointer.memory) else np.zeros(1, pointer.memory.dtype)
    return tensor(np.where(mask, memory[np.where(mask, at, 0)], other).astype(memory.dtype))


def _where(choice: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Pointer):
        return a if choice else b
    return tensor(np.where(choice, a, b))


def _multiply(a: Shared, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = True) -> Tensor:
    product = a.values.astype(np.float32) @ b.values.astype(np.float32)
    threads._linger()
    return tensor(product + acc if use_acc else product)


def _play(role: Any) -> Any:
    def run(*args: Any) -> None:
        with np.errstate(all="ignore"):  # of this thread
            role(*args)

    return run


def _warp_specialize(roles: list[tuple[Any, tuple]], warps: list[int], registers: list[int]) -> None:
    threads._warp_specialize([(_play(role), args) for role, args in roles], warps, registers)


def _barriers(shape: list[int]) -> Any:
    return (
        threads.Barriers(threads.Barrier() for _ in range(shape[0])) if len(shape) > 1 else threads.Barrier()
    )


def _language(program: int, programs: int) -> SimpleNamespace:
    ignored = lambda *args, **kwargs: None  # noqa: E731
    layouts = (
        "BlockedLayout", "SliceLayout", "NVMMASharedLayout", "SwizzledSharedLayout", "NVMMADistributedLayout"
    )  # fmt: skip
    return SimpleNamespace(
        **dict.fromkeys(layouts, ignored),
        constexpr=Any, int32=np.int32, int64=np.int64, float32=np.float32, float16=np.float16, bfloat16="bfloat16",
        program_id=lambda axis: tensor(program, np.int32), num_programs=lambda axis: tensor(programs, np.int32),
        static_range=range, load=_load, store=threads._store, inline_asm_elementwise=_assembly, where=_where,
        pointer_type=lambda kind: kind, warp_specialize=_warp_specialize,
        allocate_shared_memory=lambda kind, shape, layout: _barriers(shape)
        if layout == "barriers" else Shared(np.full(shape, 77, kind)),
        arange=lambda lo, hi, layout: tensor(np.arange(lo, hi, dtype=np.int32)),
        zeros=lambda shape, kind, layout: tensor(np.zeros(shape, kind)),
        full=lambda shape, value, kind, layout: tensor(np.full(shape, value, kind)),
        minimum=np.minimum, maximum=np.maximum, exp2=np.exp2, log2=np.log2,
        max=lambda v, axis: tensor(np.max(v, axis)), sum=lambda v, axis: tensor(np.sum(v, axis)),
        split=lambda v: (v[..., 0], v[..., 1]), join=lambda a, b: tensor(np.stack((a, b), -1)),
        convert_layout=lambda v, layout, assert_trivial=False: v,
    )  # fmt: skip


def _source(module: Any, names: dict[str, Any], known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a module's functions see: `names` where it has them, jit functions as they are written."""
    if module.__name__ in known:
        return known[module.__name__]
    seen = known[module.__name__] = {"range": names["range"]}
    for name, value in vars(module).items():
        value = getattr(value, "value", value)  # of a constexpr
        if name in names:
            value = names[name]
        elif callable(getattr(value, "fn", None)):
            inside = _source(sys.modules[value.fn.__module__], names, known)
            value = FunctionType(value.fn.__code__, inside, name, value.fn.__defaults__)
        seen.setdefault(name, value)
    return seen


def _run(kernel: Any, programs: int, args: dict[str, Any], seed: int) -> None:
    random.seed(seed)
    names = dict(
        mbarrier=threads.Mbarrier, fence_async_shared=lambda: None, barrier=lambda: None, thread_load=_thread_load,
        warpgroup_mma=_multiply, warpgroup_mma_wait=lambda pending, deps: deps[0] if len(deps) == 1 else deps,
        async_copy=SimpleNamespace(commit_group=lambda: _groups().append([]), wait_group=_wait_group),
        range=lambda *ends: (tensor(i, np.int32) for i in builtins.range(*map(int, ends))),
    )  # fmt: skip
    for program in range(programs):
        names["gl"] = names["tl"] = _language(program, programs)
        with np.errstate(all="ignore"):
            _source(kernel, names, {})["attend"](**args)


def _bytes(region: torch.Tensor) -> torch.Tensor:
    """A region and what lies between its pages, a multiple of 256 bytes."""
    flat = region.as_strided((len(region) * region.stride(0) - region.storage_offset(),), (1,))
    return torch.cat((flat, flat.new_zeros(-len(flat) % 256)))


def _together(case: Case, reverse: bool) -> tuple[torch.Tensor, int, int]:
    """One tensor with the bytes of both regions, and where the window's and the history's begin; reverse: history first."""
    one, two = (_bytes((case[name] or case["window"]).region) for name in ("window", "history"))
    if reverse:
        return torch.cat((two, one)), len(two), 0
    return torch.cat((one, two)), 0, len(one)


def _attend(
    case: Case, splits: int, programs: int | None, seed: int, reverse: bool = False, part: bool = False
) -> Any:
    """The op (part: `partial_attention`, which gives two tensors) through the source of a kernel: hopper_stream.py's with so many programs, or, if None, hopper_attention.py's.
    reverse: the history lies before the window."""
    q, window, history, entries, selected = (
        case[n] for n in ("q", "window", "history", "entries", "selected")
    )
    total, heads, _ = q.shape
    rows = history or window
    both, here, there = _together(case, reverse)
    out = torch.full(q.shape, float("nan"), dtype=torch.bfloat16)
    partial = torch.full((total, splits, heads, 512), float("nan"))
    lse = torch.full((total, splits, heads), float("nan"))
    flat = lambda t: Pointer(t.contiguous().flatten().numpy())  # noqa: E731
    bits = lambda t: Pointer(t.view(torch.int16).flatten().numpy())  # noqa: E731
    ids = case["window_ids"]
    work = total * cdiv(heads, 64) * splits
    scalar = lambda v: tensor(v, np.int32)  # noqa: E731
    mode = 0 if entries is None else 1 if selected is None else 2
    if programs:
        kernel, own = hopper_stream, dict(q=bits(q), work=scalar(work), lines=0)
    else:
        blocks = next_pow2(cdiv(portable.max_blocks(ids, entries, selected, 64), splits))
        kernel, own = hopper_attention, dict(q=flat(q.float()), SPLIT=part or splits > 1, NBP=blocks)
    _run(
        kernel,
        programs or work,
        dict(
            c1=Pointer(both.numpy(), here), window_ids=flat(ids),
            pages=flat(entries.pages if entries else ids), slabs=flat(case["tokens"].slab),
            selected=flat(selected if selected is not None else ids),
            visible=flat(entries.visible if entries else ids),
            sink=flat(case["sink"]), cos=flat(case["cos"]), sin=flat(case["sin"]),
            out=bits(out), po=Pointer(partial.view(-1).numpy()), pm=Pointer(lse.view(-1).numpy()),
            st1=scalar(window.region.stride(0) // 4), st2=scalar(rows.region.stride(0) // 4),
            delta=tensor((there - here) // 16, np.int64), pages_stride=scalar(entries.pages.shape[1] if entries else 0),
            scale=case["scale"] * 1.4426950408889634, splits=scalar(splits),
            k=scalar(0 if selected is None else selected.shape[1]), times=None,
            H=heads, W=ids.shape[1], WIN_ROWS=window.rows, HIST_ROWS=rows.rows, MODE=mode, **own,
        ),
        seed,
    )  # fmt: skip
    if part:
        o, natural = torch.empty(q.shape, device=DEVICE), torch.empty(q.shape[:2], device=DEVICE)
        merge.join(partial.to(DEVICE), lse.to(DEVICE), None, None, o, natural, ranks=False)
        return o.cpu(), natural.cpu()
    if splits > 1:
        merged = torch.empty(q.shape, device=DEVICE)  # of the interpreter's bfloat16 we ask nothing
        merge.merge(
            *(t.to(DEVICE) for t in (partial, lse, *(case[n] for n in ("sink", "cos", "sin")))), merged
        )
        return merged.cpu()
    return out


TOKENS = ((350, 1), (37, 1), (0, 1), (128, 1), (254, 1))


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
    got = _attend(case, splits, programs, seed=splits)
    assert close(got, reference(**case)) <= 4e-3


@pytest.mark.parametrize(("options", "splits"), [({}, 1), ({"k": None}, 2), ({"k": 0}, 1)], ids=str)
def test_a_part_as_threads(options: dict[str, Any], splits: int) -> None:
    """As `sparse_attention`, without the sink and not turned; a token without any key has nothing."""
    case = full_width(TOKENS, **options)
    case["window_ids"] = torch.where(torch.arange(128) % 3 == 1, case["window_ids"], -1)
    case["window_ids"][2] = -1
    if case["selected"] is not None:
        case["selected"] = case["selected"].clone()
        case["selected"][2] = -1
    got, sums = _attend(case, splits, None, seed=splits, part=True)
    known = {k: v for k, v in case.items() if k not in ("sink", "cos", "sin")}
    wanted, lse = reference_part(**known)
    some = torch.isfinite(lse)
    assert not some[2].any() or case["selected"] is None
    assert close(got, wanted) <= 4e-3
    assert torch.equal(torch.isfinite(sums), some) and float((sums - lse)[some].abs().max()) < 2e-2


def long(heads: int, k: int | None, tokens: int, entries: int) -> Case:
    """As many rows as in use: a full window each, pages in any order; the lists of some tokens end early."""
    g = torch.Generator().manual_seed(1)
    per_page = 64 if k else 2
    blocks = cdiv(entries, per_page)
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


@pytest.mark.parametrize("reverse", [False, True], ids=["behind", "before"])
@pytest.mark.parametrize("shape", [(64, 512, 700, 1), (128, 1024, 1100, 2), (64, None, 500, 3)], ids=str)
def test_long_lists_and_a_history_behind_or_before_the_window(shape: Any, reverse: bool) -> None:
    heads, k, entries, splits = shape
    case = long(heads, k, 2, entries)
    got = _attend(case, splits, 1 if splits == 1 else None, seed=0, reverse=reverse)
    assert close(got, reference(**case)) <= 4e-3


def _on_gpu(case: Case, reverse: bool) -> Case:
    """The case there, both regions in one tensor."""
    both, *begins = _together(case, reverse)
    both, case = both.to(DEVICE), moved(case, DEVICE)
    for name, begin in zip(("window", "history"), begins, strict=True):
        rows = case[name]
        case[name] = Rows(
            rows.codec, both.as_strided(rows.region.shape, rows.region.stride(), begin), rows.rows
        )
    return case


def _check(case: Case, splits: tuple[int | None, ...]) -> None:
    """The history behind the window and before it; the same bits every time."""
    expected = None
    for reverse in (False, True):
        here = _on_gpu(case, reverse)
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
    repeated = torch.arange(16).repeat(20)  # more tokens than multiprocessors, at home in the same rows
    for name in ("q", "cos", "sin", "window_ids", "selected"):
        many[name] = None if many[name] is None else many[name][repeated]
    table, pages = many["tokens"], many["entries"]
    many["tokens"] = moved_table(table, lambda t: t[repeated])
    many["entries"] = EntryTable(pages.pages, pages.per_page, pages.visible[repeated], pages.most)
    _check(many, (1,))


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


class _Launch:
    """In place of a kernel: stores what it would as one split."""

    def __init__(self, o: torch.Tensor, lse: torch.Tensor) -> None:
        self.o, self.lse = o, lse
        self.values: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._store

    def _store(self, *arguments: Any, **values: Any) -> None:
        self.values, (parts, sums) = values, arguments[11:13]
        assert parts.dtype == sums.dtype == torch.float32
        parts.copy_(self.o.float()[:, None])
        sums.copy_(1.4426950408889634 * self.lse[:, None])


def test_a_part_is_launched_as_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    case = full_width(TOKENS)
    known = {k: v for k, v in case.items() if k not in ("sink", "cos", "sin")}
    assert fits.v4_part(**known)
    wanted, lse = reference_part(**known)
    launch = _Launch(wanted, lse)
    monkeypatch.setattr(hopper_attention, "attend", launch)
    o, natural = attention.partial_attention(**moved(known, DEVICE), splits=1)
    assert launch.values["SPLIT"] is True and launch.values["MODE"] == 2
    assert close(o, wanted) <= 4e-3 and torch.allclose(natural.cpu(), lse, atol=1e-5)
    narrow = {**known, "q": case["q"].float()}
    assert not fits.v4_part(**narrow)


def test_rows_that_are_not_at_16_bytes_have_no_part_here() -> None:
    """A history gathered from ranks with one row of a page each: its pages are 584 bytes apart."""
    case = full_width(TOKENS)
    known = {k: v for k, v in case.items() if k not in ("sink", "cos", "sin")}
    gathered = Rows(case["history"].codec, torch.zeros((8, 584), dtype=torch.uint8), 1)
    assert not fits.v4_part(**{**known, "history": gathered})


@on_hopper
@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("options", [{}, {"k": None}, {"k": 0}], ids=str)
def test_a_part_on_a_gpu(options: dict[str, Any], splits: int | None) -> None:
    case = full_width(TOKENS, **options)
    known = {k: v for k, v in case.items() if k not in ("sink", "cos", "sin")}
    wanted, lse = reference_part(**known)
    o, natural = attention.partial_attention(**moved(known, DEVICE), splits=splits)
    assert close(o, wanted) <= 4e-3 and torch.allclose(natural.cpu(), lse, atol=2e-2)
