"""Names that differ between Triton 3.6 and 3.9 in Gluon."""

from __future__ import annotations

from triton.experimental.gluon import language as gl

_DESCRIPTOR = gl.shared_memory_descriptor
NEW_NAMES = hasattr(_DESCRIPTOR, "reinterpret")
"""Triton 3.9: `reinterpret` and `barrier`; before that `_reinterpret` and `thread_barrier`."""

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

if not NEW_NAMES:
    _DESCRIPTOR.reinterpret = _DESCRIPTOR._reinterpret
