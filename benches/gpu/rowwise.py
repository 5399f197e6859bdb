"""What moves rows: compressors, hyper-connections, norms and row writes, in decode (one token a request) and prefill.

All are bound by memory; in decode by launch and latency, so that the figure to look at there is us.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from dsv4.formats import row_format
from dsv4.kernels.triton import compressor, mhc, mhc_few, norm
from dsv4.kernels.triton import rows as row_kernels
from dsv4.kernels.triton.forms import FEW_STREAM_TOKENS
from dsv4.ops.tables import BlockTable, TokenTable
from torch import Tensor

from benches.gpu.timing import Bench, Row

MODELS = {"Flash": (4096, 64), "Pro": (7168, 128)}
"""hidden size, attention heads"""
COMPRESSORS = {
    "CSA": (2, 4, "fp8_ds_mla", 512),
    "CSA index": (2, 4, "mxfp4", 128),
    "HCA": (1, 128, "fp8_ds_mla", 512),
}
"""halves, ratio, row format, channels"""
DECODE, PREFILL = (1, 8, 32, 128), (8192, 65_536)


class Stored:
    """Rows of a format in pages, as the cache holds them."""

    def __init__(self, form: str, dim: int, count: int, per_page: int, device: torch.device) -> None:
        self.codec, self.rows = row_format(form, dim, 64), per_page
        size = -(-per_page * sum(self.codec.planes) // 16) * 16
        pages = -(-count // per_page)
        self.region = torch.zeros((pages, size), dtype=torch.uint8, device=device)[
            :, : per_page * sum(self.codec.planes)
        ]


def rows(bench: Bench) -> Iterator[Row]:
    torch.manual_seed(0)
    for tokens in (*DECODE, *PREFILL):
        if not (bench.quick and tokens in (8, 32, 65_536)):
            yield from _compressors(bench, tokens)
            yield from _writes(bench, tokens)
    for name, (dim, heads) in MODELS.items():
        for tokens in (*DECODE, 8192):
            yield from _hyper(bench, name, dim, tokens)
            if tokens in DECODE:
                yield from _between(bench, name, dim, tokens)
            yield from _norms(bench, name, dim, heads, tokens)
            bench.free()


def _angles(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angle = torch.rand((n, 32), device=device)
    return angle.cos(), angle.sin()


def _tables(tokens: int, ratio: int, device: torch.device) -> tuple[TokenTable, BlockTable, int]:
    """Decode: a token that closes a block for each of `tokens` requests. Prefill: one prompt from position 0."""
    decode = tokens <= max(DECODE)
    count = tokens if decode else tokens // ratio
    each = torch.arange(count, device=device)
    per = 1 if decode else ratio
    requests = each if decode else torch.zeros(1, dtype=torch.int64, device=device)
    row = (
        torch.arange(tokens, device=device)
        if decode
        else torch.zeros(tokens, dtype=torch.int64, device=device)
    )
    blocks = BlockTable(
        first=each * per,
        count=each * 0 + per,
        opens=each if decode else requests,
        ends=each if decode else requests + count - 1,
        closed=torch.ones(len(requests), dtype=torch.bool, device=device),
        target=torch.randperm(count, device=device),
        position=each * ratio,
        slot=torch.arange(tokens, device=device) % ratio if not decode else row * 0 + ratio - 1,
    )
    table = TokenTable(row, row.int(), row, requests, requests, requests, requests, 1)
    return table, blocks, len(requests)


def _compressors(bench: Bench, tokens: int) -> Iterator[Row]:
    for name, (halves, ratio, form, dim) in COMPRESSORS.items():
        table, blocks, requests = _tables(tokens, ratio, bench.device)
        count = len(blocks.first)
        stored = Stored(form, dim, count, 64, bench.device)
        projected = torch.randn((tokens, 2 * halves * dim), device=bench.device)
        state = torch.zeros((requests, halves, 2, dim), device=bench.device)
        f = partial(
            compressor.compress,
            projected,
            torch.randn((ratio, halves * dim), device=bench.device),
            state,
            table,
            blocks,
            torch.ones(dim, device=bench.device),
            *_angles(count, bench.device),
            1e-6,
            torch.bfloat16,
            stored,
        )
        moved = projected.nbytes + 2 * state.nbytes + count * sum(stored.codec.planes)
        kind = "decode" if requests == tokens else "prefill"
        yield Row("compressor", f"{name} {kind}", tokens, 0, bench.us(f), moved)


def _writes(bench: Bench, tokens: int) -> Iterator[Row]:
    stored = Stored("fp8_ds_mla", 512, tokens, 128, bench.device)
    x = torch.randn((tokens, 512), device=bench.device, dtype=torch.bfloat16)
    target = torch.randperm(tokens, device=bench.device)
    f = partial(
        row_kernels.write_rows,
        x,
        torch.ones(512, device=bench.device),
        *_angles(tokens, bench.device),
        1e-6,
        stored,
        target,
    )
    yield Row("rows", "window rows, 584 B", tokens, 0, bench.us(f), tokens * (1024 + 256 + 8 + 584))
    copy = partial(row_kernels.copy_rows, stored, target, stored, target)
    yield Row("rows", "copy, 584 B", tokens, 0, bench.us(copy), tokens * (2 * 584 + 16))


def _hyper(bench: Bench, name: str, dim: int, tokens: int) -> Iterator[Row]:
    streams = torch.randn((tokens, 4, dim), device=bench.device, dtype=torch.bfloat16)
    fn = torch.randn((24, 4 * dim), device=bench.device) / (4 * dim) ** 0.5
    scale, base = torch.rand(3, device=bench.device), torch.randn(24, device=bench.device)
    f = partial(mhc.hc_pre, streams, fn, scale, base, 1e-6, 1e-6, 20)
    y, post, comb = f()
    small = tokens * 80
    yield Row("mhc", f"{name} pre", tokens, 0, bench.us(f), streams.nbytes + y.nbytes + fn.nbytes + small)
    g = partial(mhc.hc_post, y, streams, post, comb)
    yield Row("mhc", f"{name} post", tokens, 0, bench.us(g), 2 * streams.nbytes + y.nbytes + small)


CHAIN = 16
"""Ways from one sub-layer to the next in one graph, each with weights of its own as in a step: a launch may begin before the one before it is
over."""


def _between(bench: Bench, name: str, dim: int, tokens: int) -> Iterator[Row]:
    """Time of one way: by three launches, and by one where there are few tokens."""
    r = lambda *shape: torch.randn(shape, device=bench.device)  # noqa: E731
    fns, rest = [r(24, 4 * dim) / dim**0.5 / 2 for _ in range(CHAIN)], (r(3).abs(), r(24), 1e-6, 1e-6, 20)
    start = (
        r(tokens, dim).bfloat16(),
        r(tokens, 4, dim).bfloat16(),
        r(tokens, 4).sigmoid(),
        r(tokens, 4, 4).softmax(-1),
    )
    norm_of = r(dim), 1e-6, True

    def chain(run: Callable[..., Any]) -> None:
        before = start
        for fn in fns:
            x, *after = run(*before, fn, *rest, *norm_of)
            before = (x.values, *after)

    moved = 2 * start[1].nbytes + start[0].nbytes * 5 // 2 + fns[0].nbytes + tokens * 160
    ways = {"three launches": mhc.hc_next} | (
        {"one launch": mhc_few.hc_next} if tokens <= FEW_STREAM_TOKENS else {}
    )
    for way, run in ways.items():
        us = (bench.us(partial(chain, run)) - bench.floor_us) / CHAIN
        yield Row("mhc", f"{name} between sub-layers, {way}", tokens, 0, us, moved)


def _norms(bench: Bench, name: str, dim: int, heads: int, tokens: int) -> Iterator[Row]:
    x = torch.randn((tokens, dim), device=bench.device, dtype=torch.bfloat16)
    weight = torch.ones(dim, device=bench.device)
    yield Row(
        "norm", f"{name} rmsnorm", tokens, 0, bench.us(partial(norm.rmsnorm, x, weight, 1e-6)), 2 * x.nbytes
    )
    f = partial(norm.rmsnorm_quantised, x, weight, 1e-6)
    yield Row("norm", f"{name} rmsnorm and FP8", tokens, 0, bench.us(f), 3 * x.nbytes - x.nbytes // 2)
    q = torch.randn((tokens, heads, 512), device=bench.device, dtype=torch.bfloat16)
    f = partial(norm.norm_rope, q, None, *_angles(tokens, bench.device), 1e-6)
    yield Row("norm", f"{name} q norm and rope", tokens, 0, bench.us(f), 2 * q.nbytes + tokens * 256)
