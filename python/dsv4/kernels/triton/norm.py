"""RMSNorm, alone and with the rotary turn. Bound by memory: each value is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.codec import as_model, norm, turn
from dsv4.kernels.triton.common import cdiv, next_pow2


@triton.jit
def rmsnorm_kernel(
    x,
    weight,
    y,
    rows,
    eps,
    N: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    c = tl.arange(0, BLOCK)
    at = r[:, None] * DIM + c[None, :]
    held = (r < rows)[:, None] & (c < DIM)[None, :]
    v = norm(tl.load(x + at, mask=held, other=0.0).to(tl.float32), weight, eps, DIM, BLOCK, WEIGHTED)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=held)


@triton.jit
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
):
    r = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    c = tl.arange(0, BLOCK)
    at = r[:, None] * DIM + c[None, :]
    held = (r < rows)[:, None] & (c < DIM)[None, :]
    v = norm(tl.load(x + at, mask=held, other=0.0).to(tl.float32), weight, eps, DIM, BLOCK, WEIGHTED)
    v = turn(as_model(v, BF16), cos, sin, r // per_token, r < rows, N, DIM, BLOCK, ROPE)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=held)


def tile(rows: int, block: int) -> tuple[int, int]:
    """Rows of a program and its warps: about 16 values a thread, one row a program while rows are few."""
    most = max(1, min(2048 // block, rows // 1024))
    n = 1 << (most.bit_length() - 1)
    return n, max(1, min(8, n * block // 512))


def rmsnorm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The op `rmsnorm`."""
    x = x.contiguous()
    y, dim = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // dim
    if rows:
        block = next_pow2(dim)
        n, warps = tile(rows, block)
        rmsnorm_kernel[(cdiv(rows, n),)](
            x, weight, y, rows, eps, N=n, DIM=dim, BLOCK=block, WEIGHTED=weight is not None, num_warps=warps
        )
    return y


def norm_rope(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """The op `norm_rope`: one launch for all heads."""
    x = x.contiguous()
    y, dim = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // dim
    if rows:
        block = next_pow2(dim)
        n, warps = tile(rows, block)
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
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return y


AOT = [
    Aot(
        rmsnorm_kernel,
        {"x": "*bf16", "weight": "*fp32", "y": "*bf16", "rows": "i32", "eps": "fp32"},
        {"N": 1, "DIM": 4096, "BLOCK": 4096, "WEIGHTED": True},
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
        {"N": 4, "DIM": 512, "BLOCK": 512, "ROPE": 64, "WEIGHTED": False, "BF16": True},
        options={"enable_fp_fusion": False},
    ),
]
