"""Rows of the cache: norm, turn, quantise and write in one launch, and copies of stored bytes."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.codec import as_model, norm, store_rows, turn
from dsv4.kernels.triton.common import cdiv, next_pow2, pdl
from dsv4.kernels.triton.norm import tile


def row_constants(codec: Any, rows: int) -> dict[str, Any]:
    """What `store_rows` needs to know of a format and of the rows in a region, as constexprs."""
    planes = codec.planes
    return dict(
        ROWS=rows,
        FORMAT=codec.name,
        DIM=codec.dim,
        BLOCK=next_pow2(codec.dim),
        PLANE=planes[0],
        SCALES=planes[1] if len(planes) > 1 else 0,
    )


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["target"])
def write_rows_kernel(
    x,
    x_stride,
    weight,
    cos,
    sin,
    target,
    region,
    stride,
    tokens,
    eps,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROPE: tl.constexpr,
    PLANE: tl.constexpr,
    SCALES: tl.constexpr,
    BF16: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    c = tl.arange(0, BLOCK)
    held = t < tokens
    id = tl.load(target + t, mask=held, other=-1)
    v = tl.load(x + t[:, None] * x_stride + c[None, :], mask=held[:, None] & (c < DIM)[None, :], other=0.0)
    v = as_model(norm(v.to(tl.float32), weight, eps, DIM, BLOCK, True), BF16)
    v = as_model(turn(v, cos, sin, t, held, N, DIM, BLOCK, ROPE), BF16)
    store_rows(
        region,
        stride,
        tl.maximum(id, 0),
        v,
        held & (id >= 0),
        N,
        ROWS,
        FORMAT,
        DIM,
        BLOCK,
        ROPE,
        PLANE,
        SCALES,
    )


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["ids", "target"])
def copy_rows_kernel(
    source,
    source_stride,
    ids,
    region,
    stride,
    target,
    count,
    N: tl.constexpr,
    SOURCE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    PLANE: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * N + tl.arange(0, N)
    held = i < count
    a, b = tl.load(ids + i, mask=held, other=0), tl.load(target + i, mask=held, other=-1)
    held, b = held & (b >= 0), tl.maximum(b, 0)
    old, new = source + (a // SOURCE_ROWS) * source_stride, region + (b // ROWS) * stride
    c = tl.arange(0, BLOCK)[None, :]
    mask = held[:, None] & (c < PLANE)
    v = tl.load((old + a % SOURCE_ROWS * PLANE)[:, None] + c, mask=mask)
    tl.store((new + b % ROWS * PLANE)[:, None] + c, v, mask=mask)
    if SCALES:
        c = tl.arange(0, SCALE_BLOCK)[None, :]
        mask = held[:, None] & (c < SCALES)
        v = tl.load((old + SOURCE_ROWS * PLANE + a % SOURCE_ROWS * SCALES)[:, None] + c, mask=mask)
        tl.store((new + ROWS * PLANE + b % ROWS * SCALES)[:, None] + c, v, mask=mask)


def write_rows(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, rows: Any, target: Tensor, *, fixed: bool = False
) -> None:  # fmt: skip
    """The op `write_rows`, in tiles of one size if `fixed`. A target below 0 is left out."""
    tokens = len(x)
    if not tokens:
        return
    constants = row_constants(rows.codec, rows.rows)
    (n, warps), overlap = tile(tokens, constants["BLOCK"], fixed=fixed), pdl()
    write_rows_kernel[(cdiv(tokens, n),)](
        x,
        x.stride(0),
        weight,
        cos.contiguous(),
        sin.contiguous(),
        target,
        rows.region,
        rows.region.stride(0),
        tokens,
        eps,
        N=n,
        ROPE=2 * cos.shape[-1],
        BF16=x.dtype == torch.bfloat16,
        PDL=bool(overlap),
        **constants,
        num_warps=warps,
        enable_fp_fusion=False,
        **overlap,
    )


def copy_rows(source: Any, ids: Tensor, rows: Any, target: Tensor) -> None:
    """The op `copy_rows`: whole words where both regions are aligned to them. A target below 0 is left out."""
    count = len(ids)
    if not count:
        return
    planes = (*rows.codec.planes, 0)[:2]
    where = (source.region, rows.region)
    sizes = [*planes, *(r.data_ptr() for r in where), *(r.stride(0) for r in where)]
    word = next(w for w in (torch.int64, torch.int32, torch.uint8) if not any(s % w.itemsize for s in sizes))
    plane, scales = (p // word.itemsize for p in planes)
    a, b = (r.view(word) for r in where)
    n = 8 if count >= 1024 else 1
    copy_rows_kernel[(cdiv(count, n),)](
        a,
        a.stride(0),
        ids,
        b,
        b.stride(0),
        target,
        count,
        N=n,
        SOURCE_ROWS=source.rows,
        ROWS=rows.rows,
        PLANE=plane,
        SCALES=scales,
        BLOCK=next_pow2(plane),
        SCALE_BLOCK=next_pow2(max(1, scales)),
        num_warps=4 if n == 8 else 1,
    )


_ROW = {"ROWS": 128, "FORMAT": "fp8_ds_mla", "DIM": 512, "BLOCK": 512, "ROPE": 64, "PLANE": 576, "SCALES": 8}
AOT = [
    Aot(
        write_rows_kernel,
        {
            "x": "*bf16",
            "x_stride": "i32:16",
            "weight": "*fp32",
            "cos": "*fp32",
            "sin": "*fp32",
            "target": "*i64",
            "region": "*u8",
            "stride": "i64:16",
            "tokens": "i32",
            "eps": "fp32",
        },
        {"N": 1, "BF16": True, "PDL": True, **_ROW},
        num_warps=1,
        options={"enable_fp_fusion": False},
    ),
    Aot(
        copy_rows_kernel,
        {
            "source": "*i64",
            "source_stride": "i64",
            "ids": "*i64",
            "region": "*i64",
            "stride": "i64",
            "target": "*i64",
            "count": "i32",
        },
        {
            "N": 8,
            "SOURCE_ROWS": 4096,
            "ROWS": 128,
            "PLANE": 72,
            "SCALES": 1,
            "BLOCK": 128,
            "SCALE_BLOCK": 1,
        },
    ),
]
