"""What the machine is, as far as a choice of kernels depends on it. Imports no triton."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec


@lru_cache
def has_triton() -> bool:
    """Whether triton can be imported."""
    return find_spec("triton") is not None


@lru_cache
def capability(index: int = 0) -> tuple[int, int]:
    """CUDA compute capability, (9, 0) for Hopper, (10, 0) for Blackwell; (0, 0) without a CUDA device."""
    import torch

    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else (0, 0)


@lru_cache
def multiprocessors(index: int = 0) -> int:
    """Multiprocessors of the CUDA device; 1 without (the interpreter)."""
    import torch

    return torch.cuda.get_device_properties(index).multi_processor_count if torch.cuda.is_available() else 1
