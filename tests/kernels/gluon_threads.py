"""Runs a Gluon kernel's own source on CPU: roles are threads, tensors numpy arrays, shared memory plain bytes (so layouts and
swizzles are not seen), barriers count arrivals and bytes as the hardware's do. Copies land at once or later, at random. What is
checked: which element goes where, masks, the order of roles. A wait that nobody ends fails after PATIENCE seconds.

It knows the part of the language that `gluon/moe.py` uses.
"""

from __future__ import annotations

import random
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

PATIENCE = 20.0
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
"""Value of each byte."""


class Array(np.ndarray):
    """A tensor."""

    type = types.SimpleNamespace(layout=None)

    def to(self, kind: Any, bitcast: bool = False) -> Array:
        plain = np.asarray(self)
        if bitcast and plain.dtype.kind != "f":
            plain = plain.astype(np.int32)
        return array(plain.view(kind) if bitcast else plain.astype(kind))

    def permute(self, order: list[int]) -> Array:
        return self.transpose(order)

    def broadcast_to(self, shape: list[int]) -> Array:
        return array(np.broadcast_to(self, shape))


def array(values: Any) -> Array:
    return np.asarray(values).view(Array)


class Pointer:
    """A flat numpy array and offsets into it."""

    def __init__(self, memory: np.ndarray, at: Any = 0) -> None:
        self.memory, self.at = memory, at

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.at + more)

    def places(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        at = np.asarray(self.at).astype(np.int64)
        mask = np.broadcast_to(True if mask is None else mask, at.shape)
        assert ((at >= 0) & (at < len(self.memory)))[mask].all(), "an address outside the tensor"
        return at, mask


class Shared:
    """Shared memory."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def index(self, i: int) -> Shared:
        return Shared(self.values[i])

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.values[start : start + length])

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.values.transpose(order))

    def reinterpret(self, kind: Any, shape: list[int], layout: Any) -> Shared:
        return Shared(self.values.reshape(-1).view(kind).reshape(shape))

    def load(self, layout: Any) -> Array:
        _linger()
        return array(self.values.copy())

    def store(self, values: Any) -> None:
        _linger()
        self.values[...] = values


class Barrier:
    """One mbarrier."""

    def __init__(self) -> None:
        self.change, self.phase, self.count, self.missing, self.bytes = threading.Condition(), 0, 0, 0, 0

    def add(self, arrivals: int, nbytes: int) -> None:
        with self.change:
            self.missing -= arrivals
            self.bytes += nbytes
            assert self.missing >= 0, "more arrivals than the barrier counts"
            if self.missing == 0 and self.bytes == 0:
                self.phase, self.missing = self.phase + 1, self.count
                self.change.notify_all()


class Barriers(list[Barrier]):
    def index(self, i: int) -> Barrier:
        return self[i]


class Mbarrier:
    """The module of that name."""

    @staticmethod
    def MBarrierLayout() -> str:
        return "barriers"

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    @staticmethod
    def wait(barrier: Barrier, phase: int, pred: bool = True) -> None:
        if not pred:
            return
        with barrier.change:
            assert barrier.change.wait_for(lambda: barrier.phase & 1 != phase, PATIENCE), (
                "nobody ends this wait"
            )

    @staticmethod
    def arrive(barrier: Barrier, count: int, pred: bool = True) -> None:
        _linger()
        if pred:
            barrier.add(count, 0)

    @staticmethod
    def expect(barrier: Barrier, nbytes: int, pred: bool = True) -> None:
        if pred:
            barrier.add(1, nbytes)


class Descriptor:
    """Of a matrix that is copied in blocks; what lies beyond its rows is zero."""

    layout = None

    def __init__(self, matrix: np.ndarray, block: tuple[int, int]) -> None:
        self.matrix, self.block = matrix, block


def _linger() -> None:
    if random.random() < 0.15:
        time.sleep(random.random() * 1e-3)


def _copy(source: Descriptor, at: list[int], barrier: Barrier, to: Shared, pred: bool = True) -> None:
    def land() -> None:
        _linger()
        (y, x), (rows, columns) = at, source.block
        part = source.matrix[y : y + rows, x : x + columns]
        to.values[...] = 0
        to.values[: len(part)] = part
        barrier.add(0, -to.values.nbytes)

    if pred:
        threading.Thread(target=land).start() if random.random() < 0.5 else land()


def _multiply(a: Shared, b: Shared, acc: Array, use_acc: bool = True, is_async: bool = True) -> Array:
    _linger()
    product = E4M3[a.values] @ E4M3[b.values]
    return array(product + acc if use_acc else product)


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
    at, mask = pointer.places(mask)
    values = np.where(mask, pointer.memory[np.where(mask, at, 0)], other)
    return array(values) if at.ndim else int(values)


def _store(pointer: Pointer, values: Any, mask: Any = None) -> None:
    at, mask = pointer.places(mask)
    assert np.unique(at[mask]).size == mask.sum(), "two values for one address"
    pointer.memory[at[mask]] = np.broadcast_to(values, at.shape)[mask]


def _warp_specialize(
    roles: list[tuple[Callable[..., None], tuple]], warps: list[int], registers: list[int]
) -> None:
    failed: list[BaseException] = []

    def play(role: Callable[..., None], args: tuple) -> None:
        try:
            with np.errstate(all="ignore"):
                role(*args)
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=play, args=role, daemon=True) for role in roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def _language(program: int, programs: int, assembly: Any) -> types.SimpleNamespace:
    ignored = lambda *args, **kwargs: None  # noqa: E731
    layouts = (
        "BlockedLayout",
        "SliceLayout",
        "NVMMASharedLayout",
        "SwizzledSharedLayout",
        "NVMMADistributedLayout",
    )
    return types.SimpleNamespace(
        **dict.fromkeys(layouts, ignored),
        constexpr=Any, int32=np.int32, int64=np.int64, float32=np.float32, bfloat16=np.float32, float8e4nv=np.uint8, uint8=np.uint8,
        program_id=lambda axis: program, num_programs=lambda axis: programs, static_range=range,
        load=_load, store=_store, inline_asm_elementwise=assembly, warp_specialize=_warp_specialize,
        allocate_shared_memory=lambda kind, shape, layout: Barriers(Barrier() for _ in range(shape[0]))
        if layout == "barriers" else Shared(np.zeros(shape, kind)),
        arange=lambda lo, hi, layout: array(np.arange(lo, hi, dtype=np.int32)),
        full=lambda shape, value, kind, layout: array(np.full(shape, value, kind)),
        zeros=lambda shape, kind, layout: array(np.zeros(shape, kind)),
        minimum=min, maximum=max, max=lambda v, axis: array(np.max(v, axis)), abs=np.abs,
        split=lambda v: (v[..., 0], v[..., 1]), join=lambda a, b: array(np.stack((a, b), -1)),
        convert_layout=lambda v, layout, assert_trivial=False: v,
    )  # fmt: skip


def run(
    module: Any, kernel: str, args: tuple, programs: int, assembly: Any, others: dict[str, Any], seed: int = 0
) -> None:  # fmt: skip
    """Runs `kernel` of a module, program after program. `assembly` stands for `inline_asm_elementwise`, `others` for
    functions that the module imports, by name; every other jit function of the module runs as it is written."""
    random.seed(seed)
    names = {
        "mbarrier": Mbarrier, "tma_load": _copy, "warpgroup_mma": _multiply, "fence_async_shared": lambda: None,
        "warpgroup_mma_wait": lambda pending, deps: deps[0],
    }  # fmt: skip
    for name, value in vars(module).items():
        value = getattr(value, "value", value)  # of a constexpr
        if callable(getattr(value, "fn", None)) and value.fn.__module__ == module.__name__:
            value = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
        names.setdefault(name, value)
    names.update(others)
    for program in range(programs):
        names["gl"] = _language(program, programs, assembly)
        names[kernel](*args)
