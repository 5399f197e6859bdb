"""Memory of GPUs that other processes of this host can write to, by CUDA's handles between processes. The processes may share a GPU; no
multicast is asked for.

The driver is called as it is: what torch allocates cannot be relied on to have a handle.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

_HANDLE, _ENABLE_PEER_ACCESS = 64, 1


class _Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * _HANDLE)]


class NoPeerMemory(RuntimeError):
    """Ranks cannot write to each other's memory, and why."""


def shared_memory(size: int, rank: int, gather: Callable[[Tensor], Tensor]) -> list[int]:
    """By rank, the address here of `size` zeroed bytes on its GPU, for as long as the processes live. Called by all ranks alike; `gather` gives
    [R, n] of every rank's uint8 [n] on the current CUDA device. Raises NoPeerMemory, on all ranks or on none."""
    said = torch.zeros(1 + _HANDLE, dtype=torch.uint8)
    why, own = None, 0
    torch.cuda.synchronize()  # makes the device's context that of this thread
    try:
        own, handle = _allocated(size)
        said = torch.tensor([1, *handle.bytes], dtype=torch.uint8)
    except OSError as e:
        why = str(e)
    every = _agreed(gather, said, why)
    found = []
    try:
        for r, (_, *handle_bytes) in enumerate(every.tolist()):
            found.append(own if r == rank else _opened(_Handle((ctypes.c_ubyte * _HANDLE)(*handle_bytes))))
    except OSError as e:
        why = str(e)
    _agreed(gather, torch.tensor([why is None], dtype=torch.uint8), why)
    return found


def _agreed(gather: Callable[[Tensor], Tensor], said: Tensor, why: str | None) -> Tensor:
    """What all ranks say, on the host, where the first byte of each is not 0."""
    every = gather(said.cuda()).cpu()
    if not every[:, 0].all():
        failed = every[:, 0].tolist().index(0)
        raise NoPeerMemory(why or f"rank {failed} cannot share memory")
    return every


def _allocated(size: int) -> tuple[int, _Handle]:
    address, handle = ctypes.c_uint64(), _Handle()
    _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
    _call("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(size))
    _call("cuIpcGetMemHandle", ctypes.byref(handle), address)
    torch.cuda.synchronize()
    return address.value, handle


def _opened(handle: _Handle) -> int:
    address = ctypes.c_uint64()
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, ctypes.c_uint(_ENABLE_PEER_ACCESS))
    return address.value


@lru_cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    """Raises OSError."""
    try:
        function = getattr(_driver(), name)
    except AttributeError:
        raise OSError(f"the driver has no {name}") from None
    if code := function(*arguments):
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(text))
        raise OSError(f"{name} gave {(text.value or b'').decode() or code}")
