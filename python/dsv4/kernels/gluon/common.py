"""Names that differ between Triton 3.6 and 3.9 in Gluon."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import blackwell
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma

_DESCRIPTOR = gl.shared_memory_descriptor
NEW_NAMES = hasattr(_DESCRIPTOR, "reinterpret")
"""Triton 3.9: `reinterpret` and `barrier`; before that `_reinterpret` and `thread_barrier`."""

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

thread_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
"""Copies a block of pointers to shared memory, thread by thread (cp.async)."""

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

if not NEW_NAMES:
    _DESCRIPTOR.reinterpret = _DESCRIPTOR._reinterpret


def tensor_memory_registers(
    shape: list[int], layout: blackwell.TensorMemoryLayout, warps: int
) -> gl.constexpr:
    """The registers in which `warps` warps load and store a float32 matrix in tensor memory."""
    if hasattr(blackwell, "get_tmem_reg_layout"):
        return gl.constexpr(blackwell.get_tmem_reg_layout(gl.float32, shape, layout, warps))
    kind = blackwell.tensor_memory_descriptor_type(gl.float32, shape, layout, shape)
    return gl.constexpr(kind.get_reg_layout(num_warps=warps))
