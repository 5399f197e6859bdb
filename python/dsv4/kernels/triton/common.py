"""Shared by the Triton kernels. Runs on Triton 3.6 and 3.9."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from dsv4.kernels.device import capability, multiprocessors

__all__ = ["INTERPRETED", "capability", "cdiv", "multiprocessors", "next_pow2", "pdl", "pointer_gap"]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Kernels run in Triton's interpreter, on CPU tensors."""


def cdiv(a: int, b: int) -> int:
    """Smallest integer >= a / b."""
    return -(-a // b)


def next_pow2(n: int) -> int:
    """Smallest power of two >= n; Triton's block sizes are powers of two."""
    return 1 << max(0, n - 1).bit_length()


def pdl() -> dict[str, bool]:
    """Launch option: start while the kernel before it ends (a kernel that uses it calls `gdc_wait` first)."""
    return {"launch_pdl": True} if capability()[0] >= 9 and not INTERPRETED else {}


def pointer_gap(base: torch.Tensor, other: torch.Tensor) -> int:
    """Bytes from base's first element to other's: one kernel argument serves two storages. Both on one device."""
    return other.data_ptr() - base.data_ptr()


@triton.jit
def gdc_wait():
    """Waits for the kernel before this one in the stream, where the launch asked for overlap (`pdl`)."""
    tl.extra.cuda.gdc_wait()
