"""Runs the Gluon kernels of sparse attention on CPU, as `gluon_threads.py` does: their roles are threads. What those know beside."""

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

from tests.kernels import gluon_threads as threads
from tests.kernels.attention_cases import together
from tests.kernels.device import DEVICE
from tests.kernels.test_attention import Case

pytest.importorskip("triton")

from dsv4.kernels.gluon import hopper_attention, hopper_stream
from dsv4.kernels.triton import attention as portable
from dsv4.kernels.triton import merge
from dsv4.kernels.triton.common import cdiv, next_pow2


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


def attend(
    case: Case, splits: int, programs: int | None, seed: int, reverse: bool = False, part: bool = False
) -> Any:
    """The op (part: `partial_attention`, which gives two tensors) through the source of a kernel: hopper_stream.py's with so many
    programs, or, if None, hopper_attention.py's. reverse: the history lies before the window."""
    q, window, history, entries, selected = (
        case[n] for n in ("q", "window", "history", "entries", "selected")
    )
    total, heads, _ = q.shape
    rows = history or window
    both, here, there = together(case, reverse)
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
        kernel, own = hopper_attention, dict(q=flat(q.float()), SPLIT=splits > 1, NBP=blocks)
    seen = portable.visible_of(entries, selected, case.get("count"), part=part) if entries else ids
    _run(
        kernel,
        programs or work,
        dict(
            c1=Pointer(both.numpy(), here), window_ids=flat(ids),
            pages=flat(entries.pages if entries else ids), slabs=flat(case["tokens"].slab),
            selected=flat(selected if selected is not None else ids),
            visible=flat(seen),
            sink=flat(case["sink"]), cos=flat(case["cos"]), sin=flat(case["sin"]),
            out=bits(out), po=Pointer(partial.view(-1).numpy()), pm=Pointer(lse.view(-1).numpy()),
            st1=scalar(window.region.stride(0) // 4), st2=scalar(rows.region.stride(0) // 4),
            delta=tensor((there - here) // 16, np.int64), pages_stride=scalar(entries.pages.shape[1] if entries else 0),
            scale=case["scale"] * 1.4426950408889634, splits=scalar(splits),
            k=scalar(0 if selected is None else selected.shape[1]), times=None,
            H=heads, W=ids.shape[1], WIN_ROWS=window.rows, HIST_ROWS=rows.rows, MODE=mode, PART=part, **own,
        ),
        seed,
    )  # fmt: skip
    if part and splits == 1:
        return out, lse[:, 0]
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
