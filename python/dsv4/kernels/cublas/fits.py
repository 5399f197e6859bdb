"""FP8 weights in cuBLAS's form, and which calls it is for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.cublas.forms import FEW, GROUPED_FEW
from dsv4.kernels.triton.fits import whole_blocks
from dsv4.ops.quantised import Quantised
from dsv4.ops.weight import Fp8Weight, Gated


class Blocks(Fp8Weight):
    """FP8 weights with their scales twice: as stored, and in cuBLAS's form `wide`, float32 [rows / 128, K / 128] with the columns padded
    to a multiple of 4."""

    __slots__ = ("wide",)
    wide: Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.wide.nbytes


def blocks(w: Any) -> bool:
    """FP8 that was prepared for cuBLAS, or three such matrices."""
    if type(w) is Blocks:
        return True
    return isinstance(w, Gated) and all(type(m) is Blocks for m in w)


def many(x: Tensor | Quantised, weight: Blocks) -> bool:
    return len(x) > FEW and x.dtype == torch.bfloat16 and whole_blocks(weight)


def many_gated(x: Tensor | Quantised, w: Gated, limit: float) -> bool:
    return len(x) > FEW and x.dtype == torch.bfloat16 and all(map(whole_blocks, w))


def many_groups(x: Tensor, weight: Blocks) -> bool:
    return len(x) > GROUPED_FEW and x.dtype == torch.bfloat16 and whole_blocks(weight, x.shape[1])
