"""The output head: bf16 hidden states and weights, float32 logits of 129,280 tokens. The peer is torch.mm (cuBLAS)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from dsv4.backends import choose

from benches.gpu.timing import Bench, Row, max_abs_err

VOCAB = 129280
SIZES = {"Flash": 4096, "Pro": 7168}


def rows(bench: Bench) -> Iterator[Row]:
    torch.manual_seed(0)
    ops = choose("auto", "cuda")
    for name, dim in SIZES.items():
        stored = torch.randn((VOCAB, dim), device=bench.device, dtype=torch.bfloat16) / dim**0.5
        weight = ops.prepare("logits", stored)
        for batch in (1, 32) if bench.quick else (1, 8, 32, 128):
            x = torch.randn((batch, dim), device=bench.device, dtype=torch.bfloat16)
            run = partial(ops.logits, x, weight)
            peer = partial(torch.mm, x, stored.t(), out_dtype=torch.float32)
            yield Row(
                "logits",
                f"{name} {VOCAB} x {dim}",
                batch,
                0,
                bench.us(run),
                2 * VOCAB * dim + 2 * x.numel() + 4 * batch * VOCAB,
                2 * batch * VOCAB * dim,
                "bf16",
                "torch.mm",
                bench.us(peer),
                max_abs_err(run()[:, :4096], x.float() @ stored[:4096].float().t()),
            )
