"""What cuBLAS multiplies, and from which size on. Imports no torch."""

from __future__ import annotations

from functools import lru_cache

from dsv4.kernels.device import has_triton
from dsv4.ops.forms import Form

FEW = 32
"""Up to this many tokens the Triton kernel is faster."""
GROUPED_FEW = 1024
"""The same for the grouped projection, for which cuBLAS takes a launch of some 18 us per group (H100, 512 tokens: 150 us
against 71 for Flash; 2,048: 207 against 238; between them nothing was timed)."""


@lru_cache
def lacks() -> str:
    """A torch whose cuBLAS has products with scales per 1 x 128 and 128 x 128 (CUDA 12.9), and Triton, which quantises."""
    if not has_triton():
        return "triton"
    import torch
    from torch.nn import functional

    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    return "" if version >= (12, 9) and hasattr(functional, "scaled_mm") else "a torch for CUDA 12.9 or later"


BACKEND = __package__.rpartition(".")[2]
_FITS = f"{__package__}.fits:"


def _form(op: str, fits: str, few: int) -> Form:
    when = f"FP8, more than {few:,} tokens, bfloat16, whole blocks"
    return Form(
        op, BACKEND, f"{__package__}.linear:{op}", arch=(9, 9), lacks=lacks, takes=_FITS + "blocks", fits=_FITS + fits, when=when, packed=True
    )  # fmt: skip


FORMS = [
    _form("linear", "many", FEW),
    _form("grouped_linear", "many_groups", GROUPED_FEW),
    _form("swiglu", "many_gated", FEW),
]
