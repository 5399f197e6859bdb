"""Projections, shared expert and output head as ops. FP8 weights stay packed and run on our kernels; plain bf16 and float32
matrices with many tokens run on cuBLAS through torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv4.kernels.triton.gemm import GATED_TOKENS, gated, narrow, product, silu_gate_of
from dsv4.ops.quantised import Quantised, plain
from dsv4.ops.weight import Fp8Weight, Gated, Packed, Weight, dense, prepared_by

_PLAIN_TOKENS = 16
"""Up to this many tokens our kernel multiplies plain matrices, beyond cuBLAS."""


def _kept(weight: Weight) -> Weight:
    """FP8 as it is; a stored form that these kernels do not multiply with, expanded."""
    return weight if isinstance(weight, Fp8Weight) else dense(weight)


@prepared_by(_kept)
def linear(x: Tensor | Quantised, weight: Weight) -> Tensor:
    """[T, in] x [out, in] -> [T, out] in x's dtype."""
    if isinstance(weight, Packed):
        return product(x, weight.codes, weight.scales, plain(x).dtype)
    return F.linear(plain(x), weight)


@prepared_by(_kept)
def grouped_linear(x: Tensor, weight: Weight) -> Tensor:
    """[T, g, in] x [g * out, in] -> [T, g, out]."""
    tokens, groups, _ = x.shape
    if isinstance(weight, Packed):
        y = product(x.reshape(tokens, -1), weight.codes, weight.scales, x.dtype, groups)
        return y.unflatten(1, (groups, -1))
    return torch.einsum("tgi,goi->tgo", x, weight.unflatten(0, (groups, -1)))


@prepared_by(dense)
def linear_f32(x: Tensor, weight: Tensor) -> Tensor:
    """[T, in] x [out, in] -> float32 [T, out]. Products of bf16 operands are exact, so they need no float32 copy."""
    if x.dtype == torch.float32 or weight.dtype == torch.float32:
        return F.linear(x.float(), weight.float())
    if len(x) <= _PLAIN_TOKENS or not x.is_cuda:
        return narrow(x, weight, None, out_dtype=torch.float32)
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


@prepared_by(dense)
def logits(x: Tensor, weight: Tensor) -> Tensor:
    """The output head: [S, d] x [V, d] -> float32 [S, V]."""
    return linear_f32(x, weight)


def _all_kept(w: Gated) -> Gated:
    return Gated(*map(_kept, w))


@prepared_by(_all_kept)
def swiglu(x: Tensor | Quantised, w: Gated, limit: float) -> Tensor:
    """The shared expert: [T, d] -> [T, d]. With few tokens both first products are one launch, SwiGLU included."""
    w1, w3, w2 = w
    if len(plain(x)) <= GATED_TOKENS and isinstance(w1, Packed) and isinstance(w3, Packed):
        h = gated(x, (w1.codes, w1.scales), (w3.codes, w3.scales), limit)
    else:
        h = silu_gate_of(linear(x, w1), linear(x, w3), limit)
    return linear(h, w2)
