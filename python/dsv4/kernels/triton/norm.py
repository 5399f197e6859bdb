"""RMSNorm, alone and with the rotary turn. Bound by memory: each value is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.codec import as_model, norm, turn
from dsv4.kernels.triton.common import cdiv, next_pow2, pdl
from dsv4.kernels.triton.quantise import store_quantised
from dsv4.ops.quantised import Quantised
from dsv4.row_sizes import FP8_BLOCK


@triton.jit(do_not_specialize=["rows"])
def rmsnorm_kernel(
    x,
    x_stride,
    weight,
    y,
    rows,
    eps,
    N: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    r = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    c = tl.arange(0, BLOCK)
    at = r[:, None] * DIM + c[None, :]
    held = (r < rows)[:, None] & (c < DIM)[None, :]
    v = tl.load(x + r[:, None] * x_stride + c[None, :], mask=held, other=0.0).to(tl.float32)
    v = norm(v, weight, eps, DIM, BLOCK, WEIGHTED)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["rows", "padded"])
def rmsnorm_quantised_kernel(
    x, x_stride, weight, y, codes, scales, rows, padded, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, WEIGHTED: tl.constexpr, BF16: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One row of y, codes [padded, DIM] and scales [blocks of GROUP channels, padded]; zeros from row `rows` on."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    r = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    c = tl.arange(0, BLOCK)
    at = r[:, None] * DIM + c[None, :]
    held = (r < rows)[:, None] & (c < DIM)[None, :]
    v = tl.load(x + r[:, None] * x_stride + c[None, :], mask=held, other=0.0).to(tl.float32)
    v = as_model(norm(v, weight, eps, DIM, BLOCK, WEIGHTED), BF16)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=held)
    store_quantised(v, codes, scales, tl.program_id(0), padded, DIM, BLOCK, GROUP)


@triton.jit(do_not_specialize=["rows"])
def norm_rope_kernel(
    x,
    weight,
    cos,
    sin,
    y,
    rows,
    per_token,
    eps,
    N: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROPE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BF16: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    r = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    c = tl.arange(0, BLOCK)
    at = r[:, None] * DIM + c[None, :]
    held = (r < rows)[:, None] & (c < DIM)[None, :]
    v = norm(tl.load(x + at, mask=held, other=0.0).to(tl.float32), weight, eps, DIM, BLOCK, WEIGHTED)
    v = turn(as_model(v, BF16), cos, sin, r // per_token, r < rows, N, DIM, BLOCK, ROPE)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=held)


MANY_ROWS = 1 << 20
"""From so many rows on a program takes as many as it ever does: what `fixed` takes them for."""


def tile(rows: int, block: int, *, fixed: bool = False) -> tuple[int, int]:
    """Rows of a program and its warps: about 16 values a thread, one row a program while rows are few, unless `fixed`: how a row's
    values are added up depends on it."""
    rows = MANY_ROWS if fixed else rows
    most = max(1, min(2048 // block, rows // 1024))
    n = 1 << (most.bit_length() - 1)
    return n, max(1, min(8, n * block // 512))


def _rows_of(x: Tensor) -> tuple[Tensor, int]:
    """x as rows of its last dimension, and how far apart they begin: columns of a wider matrix as they are, others with a copy."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x, x.stride(0)
    return x.contiguous(), x.shape[-1]


def rmsnorm(x: Tensor, weight: Tensor | None, eps: float, *, fixed: bool = False) -> Tensor:
    """The op `rmsnorm`, in tiles of one size if `fixed`."""
    x, stride = _rows_of(x)
    y, dim = x.new_empty(x.shape), x.shape[-1]
    rows = x.numel() // dim
    if rows:
        block = next_pow2(dim)
        (n, warps), overlap = tile(rows, block, fixed=fixed), pdl()
        rmsnorm_kernel[(cdiv(rows, n),)](
            x, stride, weight, y, rows, eps, N=n, DIM=dim, BLOCK=block, WEIGHTED=weight is not None, PDL=bool(overlap), num_warps=warps,
            **overlap,
        )  # fmt: skip
    return y


def rmsnorm_quantised(x: Tensor, weight: Tensor | None, eps: float) -> Quantised:
    """The op `rmsnorm_quantised`: one launch, to the bits of `rmsnorm` and `quantise`."""
    x, stride = _rows_of(x)
    rows, dim = x.shape
    padded, block = rows + -rows % 4, max(FP8_BLOCK, next_pow2(dim))
    y = x.new_empty(x.shape)
    codes = torch.empty((padded, dim), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((cdiv(dim, FP8_BLOCK), padded), dtype=torch.float32, device=x.device)
    if rows:
        overlap = pdl()
        rmsnorm_quantised_kernel[(padded,)](
            x, stride, weight, y, codes, scales, rows, padded, eps, DIM=dim, BLOCK=block, GROUP=FP8_BLOCK,
            WEIGHTED=weight is not None, BF16=x.dtype == torch.bfloat16, PDL=bool(overlap),
            num_warps=tile(1, block)[1], **overlap,
        )  # fmt: skip
    return Quantised.of(y, codes, scales)


def norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, *, fixed: bool = False
) -> Tensor:
    """The op `norm_rope`: one launch for all heads, in tiles of one size if `fixed`."""
    x = x.contiguous()
    y, dim = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // dim
    if rows:
        block = next_pow2(dim)
        (n, warps), overlap = tile(rows, block, fixed=fixed), pdl()
        norm_rope_kernel[(cdiv(rows, n),)](
            x,
            weight,
            cos.contiguous(),
            sin.contiguous(),
            y,
            rows,
            rows // len(x),
            eps,
            N=n,
            DIM=dim,
            BLOCK=block,
            ROPE=2 * cos.shape[-1],
            WEIGHTED=weight is not None,
            BF16=x.dtype == torch.bfloat16,
            PDL=bool(overlap),
            num_warps=warps,
            enable_fp_fusion=False,
            **overlap,
        )
    return y


AOT = [
    Aot(
        rmsnorm_kernel,
        {"x": "*bf16", "x_stride": "i32:16", "weight": "*fp32", "y": "*bf16", "rows": "i32", "eps": "fp32"},
        {"N": 1, "DIM": 4096, "BLOCK": 4096, "WEIGHTED": True, "PDL": True},
        num_warps=8,
    ),
    Aot(
        rmsnorm_quantised_kernel,
        {
            "x": "*bf16",
            "x_stride": "i32:16",
            "weight": "*fp32",
            "y": "*bf16",
            "codes": "*fp8e4nv",
            "scales": "*fp32",
        }
        | {"rows": "i32", "padded": "i32", "eps": "fp32"},
        {"DIM": 7168, "BLOCK": 8192, "GROUP": 128, "WEIGHTED": True, "BF16": True, "PDL": True},
        num_warps=8,
    ),
    Aot(
        norm_rope_kernel,
        {
            "x": "*bf16",
            "weight": "*fp32",
            "cos": "*fp32",
            "sin": "*fp32",
            "y": "*bf16",
            "rows": "i32",
            "per_token": "i32",
            "eps": "fp32",
        },
        {"N": 4, "DIM": 512, "BLOCK": 512, "ROPE": 64, "WEIGHTED": False, "BF16": True, "PDL": True},
        options={"enable_fp_fusion": False},
    ),
]
