"""Sampling from float32 logits of 129,280 tokens. The peer does the same with torch alone, sorting the vocabulary. The limit
is one read of the logits. Options are on the device already."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from dsv4.kernels.triton.sampling import sample
from torch import Tensor

from benches.gpu.timing import Bench, Row

VOCAB = 129280
KINDS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.8, 0, 1.0, 0.0),
    "top_k 40": (0.8, 40, 1.0, 0.0),
    "top_p 0.9": (0.6, 0, 0.9, 0.0),
    "min_p 0.05": (1.0, 0, 1.0, 0.05),
}
"""temperature, top_k, top_p, min_p."""


def sorting(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, uniform: Tensor
) -> Tensor:
    """The plain way."""
    if temperature == 0:
        return logits.argmax(1)
    values, ids = (logits / temperature).sort(dim=1, descending=True)
    probs = values.softmax(1)
    keep = probs >= min_p * probs[:, :1]
    if top_k:
        keep[:, top_k:] = False
    keep &= probs.cumsum(1) - probs < top_p
    running = torch.where(keep, probs, 0).cumsum(1)
    place = torch.searchsorted(running, uniform[:, None] * running[:, -1:])
    return ids.gather(1, place)


def rows(bench: Bench) -> Iterator[Row]:
    torch.manual_seed(0)
    for batch in (1, 32) if bench.quick else (1, 8, 32, 128):
        logits = 4 * torch.randn((batch, VOCAB), device=bench.device)
        for name, (temperature, top_k, top_p, min_p) in KINDS.items():
            uniform = torch.rand(batch, device=bench.device, dtype=torch.float64)
            options = torch.tensor(
                [temperature, top_k, top_p, min_p], device=bench.device, dtype=torch.float64
            )
            knobs, seed = options.expand(batch, 4).contiguous(), torch.arange(batch, device=bench.device)
            run = partial(sample, logits, knobs, seed, 7 * seed, bool(top_k or top_p < 1))
            yield Row(
                "sampling",
                name,
                batch,
                VOCAB,
                bench.us(run),
                4 * batch * VOCAB,
                0,
                "bf16",
                "torch sort",
                bench.us(partial(sorting, logits, temperature, top_k, top_p, min_p, uniform.float())),
            )
