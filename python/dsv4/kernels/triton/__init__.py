"""Kernels in plain Triton (`tl`): any CUDA device from Ampere on, wgmma on Hopper and tcgen05 on Blackwell through
`tl.dot`, and the interpreter in tests."""

from __future__ import annotations

from dsv4.kernels.triton.forms import FORMS

__all__ = ["FORMS"]
