"""Attention of one of R ranks: a part of the keys of decoded tokens and of a prompt's, at Flash's and Pro's shapes, and parts made one.

A rank has a page's rows r, r + R, ... and attends to every R-th window row and to those of the chosen entries that it has, as
`entries_of_part` gives them. A prompt's tokens are attended to one part after the other by the rank that owns them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from dsv4.backends import REGISTRY
from dsv4.ops.forms import Machine
from dsv4.ops.reference.attention import merge_attention as reference_merge
from dsv4.ops.reference.attention import partial_attention as reference
from dsv4.ops.reference.index import entries_of_part

from benches.gpu.attention import DIM, MODELS, WINDOW, inputs
from benches.gpu.timing import Bench, Row, max_abs_err

CONTEXT, RATIO, RATIO_ALL = 32768, 4, 128
"""Tokens before those of a step; tokens of an entry where some are selected, and where all are read."""


def part(heads: int, k: int | None, tokens: int, ranks: int, *, chunk: bool = False) -> dict[str, Any]:
    """Arguments of `partial_attention` on rank 0 of `ranks`; k: entries selected of all ranks' (None: all are read)."""
    entries = CONTEXT // (RATIO if k else RATIO_ALL)
    args = inputs(heads, k, tokens, entries // ranks, chunk=chunk, ranks=ranks).args
    selected, count = None, None
    if k:
        chosen = torch.rand((tokens, entries), device="cuda").topk(k).indices.sort().values.int()
        selected, count = entries_of_part(chosen, 0, ranks)
    here = torch.arange(WINDOW, device="cuda") % ranks == 0
    ids = torch.where(here, args["window_ids"], -1)
    known = {name: v for name, v in args.items() if name not in ("sink", "cos", "sin")}
    return known | dict(window_ids=ids, selected=selected, count=count, into=None)


def _keys(args: dict[str, Any]) -> int:
    """Rows of all tokens."""
    own = args["entries"].visible if args["count"] is None else args["count"]
    return int((args["window_ids"] >= 0).sum()) + int(own.sum())


def _attended(bench: Bench, backend: str, name: str, args: dict[str, Any]) -> Row:
    run = REGISTRY.load("partial_attention", backend)
    tokens, heads = args["q"].shape[:2]
    error = None
    if tokens <= 32:
        error = max(max_abs_err(a, b) for a, b in zip(run(**args), reference(**args), strict=True))
    keys = _keys(args)
    return Row(
        kernel="partial_attention",
        shape=f"{name} {backend}",
        batch=tokens,
        context=CONTEXT,
        us=bench.us(lambda: run(**args)),
        bytes=keys * 584 + tokens * heads * (DIM * 4 + 4),
        flops=keys * heads * DIM * 4,
        max_abs_err=error,
    )


def _merged(bench: Bench, heads: int, tokens: int, ranks: int) -> Row:
    run = REGISTRY.load("merge_attention", "triton")
    o = torch.randn((ranks, tokens, heads, DIM), device="cuda", dtype=torch.bfloat16)
    lse, angle = torch.randn(o.shape[:3], device="cuda"), 6.3 * torch.rand((tokens, 32), device="cuda")
    args = (o, lse, torch.randn(heads, device="cuda"), angle.cos(), angle.sin())
    return Row(
        kernel="merge_attention",
        shape=f"{heads} heads, {ranks} parts",
        batch=tokens,
        context=0,
        us=bench.us(lambda: run(*args)),
        bytes=o.nbytes + lse.nbytes + o[0].nbytes,
        max_abs_err=max_abs_err(run(*args), reference_merge(*args)) if tokens <= 32 else None,
    )


def rows(bench: Bench) -> Iterator[Row]:
    here = Machine.here("cuda")
    backends = [b for b in REGISTRY.backends("partial_attention") if b != "reference"]
    usable = [b for b in backends if REGISTRY.runs("partial_attention", b, here)]
    models = {"flash": MODELS["flash"]} if bench.quick else MODELS
    for model, (heads, k) in models.items():
        for ranks in (2,) if bench.quick else (2, 4):
            for kind, chosen in (("csa", k), ("hca", None)):
                for tokens in (1, 8, 32, 128, 4096):
                    args = part(heads, chosen, tokens, ranks, chunk=tokens == 4096)
                    for backend in usable:
                        yield _attended(bench, backend, f"{model} {kind}, 1/{ranks}", args)
            for tokens in (1, 32, 4096):
                yield _merged(bench, heads, tokens, ranks)
