"""Where the kernels of these tests run: the GPU if there is one, else Triton's interpreter on the CPU.

The interpreter is asked for in tests/conftest.py, before anything loads triton. Keep its shapes tiny: it runs a block
at a time in numpy.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import tests.support.interpreter  # noqa: F401  (an old one is mended)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
"""For shapes too large for the interpreter, and for Gluon kernels, which it does not run."""

on_hopper = pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)

on_hopper_or_blackwell = pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability()[0] not in (9, 10),
    reason="needs Hopper or Blackwell",
)


def close(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b|| in float64; NaN is infinity."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    error = float((a - b).norm() / b.norm().clamp(min=1e-30))
    return error if error == error else float("inf")
