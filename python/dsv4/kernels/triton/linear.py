"""Projections, shared expert and output head as ops. FP8 weights stay packed and run on our kernels; plain bf16 and float32
matrices with many tokens run on cuBLAS through torch. Which of an op's functions runs is said in `forms.py`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv4.kernels.triton.gemm import gated, narrow, narrow_product, silu_gate_of, wide_product
from dsv4.ops.quantised import Quantised, plain
from dsv4.ops.weight import Fp8Weight, Gated, Packed, Weight, dense, prepared_by


def _kept(weight: Weight) -> Weight:
    """FP8 as it is; a stored form that these kernels do not multiply with, expanded."""
    return weight if isinstance(weight, Fp8Weight) else dense(weight)


@prepared_by(_kept)
def wide_linear(x: Tensor | Quantised, weight: Packed, *, fixed: bool = False) -> Tensor:
    """[T, in] x [out, in] -> [T, out] in x's dtype. `fixed`, here and below: as in `gemm.narrow`."""
    return wide_product(x, weight.codes, weight.scales, x.dtype, fixed=fixed)


@prepared_by(_kept)
def narrow_linear(x: Tensor | Quantised, weight: Packed, *, fixed: bool = False) -> Tensor:
    """The same for any number of tokens and any shape."""
    return narrow_product(x, weight.codes, weight.scales, x.dtype, fixed=fixed)


@prepared_by(_kept)
def plain_linear(x: Tensor | Quantised, weight: Tensor) -> Tensor:
    """The same for a plain matrix."""
    return F.linear(plain(x), weight)


def _ours(x: Tensor, weight: Tensor, out: torch.dtype, groups: int = 1) -> Tensor:
    """x [T, groups * in] times a plain matrix [groups * rows, in] by our kernel, cut by the matrix alone: [T, groups * rows]."""
    common = torch.promote_types(x.dtype, weight.dtype)
    return narrow(
        x.to(common).contiguous(), weight.to(common), None, out_dtype=out, groups=groups, fixed=True
    )


@prepared_by(_kept)
def our_linear(x: Tensor | Quantised, weight: Tensor) -> Tensor:
    """The same by our kernel, whatever the number of tokens."""
    return _ours(plain(x), weight, x.dtype)


@prepared_by(_kept)
def wide_grouped_linear(x: Tensor, weight: Packed, *, fixed: bool = False) -> Tensor:
    """[T, g, in] x [g * out, in] -> [T, g, out]."""
    y = wide_product(x.flatten(1), weight.codes, weight.scales, x.dtype, x.shape[1], fixed=fixed)
    return y.unflatten(1, (x.shape[1], -1))


@prepared_by(_kept)
def narrow_grouped_linear(x: Tensor, weight: Packed, *, fixed: bool = False) -> Tensor:
    """The same for any number of tokens and any shape."""
    y = narrow_product(x.flatten(1), weight.codes, weight.scales, x.dtype, x.shape[1], fixed=fixed)
    return y.unflatten(1, (x.shape[1], -1))


@prepared_by(_kept)
def plain_grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The same for a plain matrix."""
    return torch.einsum("tgi,goi->tgo", x, weight.unflatten(0, (x.shape[1], -1)))


@prepared_by(_kept)
def our_grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The same by our kernel, whatever the number of tokens."""
    return _ours(x.flatten(1), weight, x.dtype, x.shape[1]).unflatten(1, (x.shape[1], -1))


@prepared_by(dense)
def few_linear_f32(x: Tensor, weight: Tensor) -> Tensor:
    """bf16 [T, in] x [out, in] -> float32 [T, out]. Products of bf16 operands are exact, so they need no float32 copy."""
    return narrow(x, weight, None, out_dtype=torch.float32)


@prepared_by(dense)
def our_linear_f32(x: Tensor, weight: Tensor) -> Tensor:
    """The same for any dtypes, whatever the number of tokens."""
    return _ours(x, weight, torch.float32)


@prepared_by(dense)
def many_linear_f32(x: Tensor, weight: Tensor) -> Tensor:
    """The same by cuBLAS."""
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


@prepared_by(dense)
def float32_linear_f32(x: Tensor, weight: Tensor) -> Tensor:
    """The same where one of them is float32."""
    return F.linear(x.float(), weight.float())


few_logits, our_logits, many_logits, float32_logits = (
    few_linear_f32,
    our_linear_f32,
    many_linear_f32,
    float32_linear_f32,
)
"""The output head: [S, d] x [V, d] -> float32 [S, V]."""


def _all_kept(w: Gated) -> Gated:
    return Gated(*map(_kept, w))


@prepared_by(_all_kept)
def gated_swiglu(x: Tensor | Quantised, w: Gated, limit: float, *, fixed: bool = False) -> Tensor:
    """The shared expert: [T, d] -> [T, d]. Both first products are one launch, SwiGLU included."""
    w1, w3, w2 = w
    both = gated(x, (w1.codes, w1.scales), (w3.codes, w3.scales), limit, fixed=fixed)
    return narrow_linear(both, w2, fixed=fixed)


@prepared_by(_all_kept)
def wide_swiglu(x: Tensor | Quantised, w: Gated, limit: float, *, fixed: bool = False) -> Tensor:
    """The same for many tokens."""
    a, b = wide_linear(x, w.w1, fixed=fixed), wide_linear(x, w.w3, fixed=fixed)
    return wide_linear(silu_gate_of(a, b, limit), w.w2, fixed=fixed)


@prepared_by(_all_kept)
def narrow_swiglu(x: Tensor | Quantised, w: Gated, limit: float, *, fixed: bool = False) -> Tensor:
    """The same for any number of tokens and any shape."""
    a, b = narrow_linear(x, w.w1, fixed=fixed), narrow_linear(x, w.w3, fixed=fixed)
    return narrow_linear(silu_gate_of(a, b, limit), w.w2, fixed=fixed)


@prepared_by(_all_kept)
def plain_swiglu(x: Tensor | Quantised, w: Gated, limit: float, *, fixed: bool = False) -> Tensor:
    """The same for matrices of which at least one is plain."""

    def product(y: Tensor | Quantised, m: Weight) -> Tensor:
        if isinstance(m, Packed):
            return narrow_linear(y, m, fixed=fixed)
        return our_linear(y, m) if fixed else plain_linear(y, m)

    return product(silu_gate_of(product(x, w.w1), product(x, w.w3), limit), w.w2)
