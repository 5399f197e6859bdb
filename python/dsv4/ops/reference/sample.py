"""The draw: logits to tokens, row by row, in float64."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

NOT_FINITE = -2
"""Token of a row with a logit that is no finite number."""

_FIRST = 256
"""Largest tokens that top_p looks at first; eight times as many each time that they do not suffice."""


def sample(logits: Tensor, knobs: Tensor, seed: Tensor, position: Tensor, filtered: bool) -> Tensor:
    """int64 [S]: a token for each row of float32 [S, V]. knobs float64 [S, 4]: temperature, top_k, top_p, min_p; seed and
    position int64 [S]; all but the logits best on the host.

    A token weighs exp((l - max) / temperature). Kept are those of at least min_p; of these the top_k largest (0 or less:
    all); of these, in falling order, as long as the ones before weigh less than top_p of all of these; equals by lowest
    id. The result is the first token in the order of ids at which the kept ones so far weigh more than the row's draw (in
    [0, 1), see `draws`) of all kept. Temperature 0 takes the largest logit. `filtered` says whether a row may have top_k or
    top_p; it is for backends.
    """
    uniform = draws(seed.cpu().numpy(), position.cpu().numpy())
    tokens = [
        _row(row, heat, int(top_k), top_p, min_p, u)
        for row, (heat, top_k, top_p, min_p), u in zip(logits.cpu(), knobs.tolist(), uniform, strict=True)
    ]
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


def draws(seed: np.ndarray, position: np.ndarray) -> np.ndarray:
    """float64 [S] in [0, 1) from int64 [S] each: the first 53 bits of Philox4x32-10 (Salmon et al., SC 2011), whose key is
    the seed and whose counter is the position of the token that the logits follow. So a draw depends on nothing else."""
    low = np.uint64(0xFFFFFFFF)
    k0, k1 = _halves(seed)
    c0, c1 = _halves(position)
    c2 = c3 = np.zeros_like(c0)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> _32) ^ c1 ^ k0, b & low, (a >> _32) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    bits = ((c0 >> np.uint64(5)) << np.uint64(26)) + (c1 >> np.uint64(6))
    return bits.astype(np.float64) * 2.0**-53


_32 = np.uint64(32)


def _halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Low and high 32 bits of int64, each as uint64."""
    bits = x.astype(np.int64).view(np.uint64)
    return bits & np.uint64(0xFFFFFFFF), bits >> _32


def _row(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    least, most = (float(x) for x in torch.aminmax(logits))
    if not (math.isfinite(least) or least == -math.inf) or not math.isfinite(most):
        return NOT_FINITE
    if temperature == 0:
        return int(logits.argmax())  # the first of equals
    limited = 0 < top_k < len(logits)
    if limited:
        ids = largest(logits, top_k)[:top_k]
        weight = _weights(logits[ids], most, temperature, min_p)
    else:
        ids, weight = None, _weights(logits, most, temperature, min_p)
    if top_p < 1:
        wanted = top_p * float(weight.sum())
        ids, weight = _nucleus(logits, ids, weight, wanted)
    if ids is not None:
        ids, order = ids.sort()
        weight = weight[order]
    cumulative = weight.cumsum(0)
    place = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    place = min(place, int(weight.nonzero()[-1]))
    return place if ids is None else int(ids[place])


def _weights(logits: Tensor, most: float, temperature: float, min_p: float) -> Tensor:
    weight = torch.exp((logits.double() - most) / temperature)
    return weight if min_p <= 0 else torch.where(weight >= min_p, weight, 0)


def _nucleus(logits: Tensor, ids: Tensor | None, weight: Tensor, wanted: float) -> tuple[Tensor, Tensor]:
    """Ids and weights in falling order, up to the first that brings the sum to `wanted`. `ids`: all there are, in falling
    order; None for every token."""
    count = _FIRST
    while ids is None:
        first = largest(logits, count)
        if count >= len(logits) or float(weight[first].sum()) >= wanted:
            ids, weight = first, weight[first]
        count = min(count * 8, len(logits))
    before = weight.cumsum(0) - weight
    kept = before < wanted
    return ids[kept], weight[kept]


def largest(logits: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest and of all that equal the least of them, in falling order, equals by lowest id."""
    if count >= len(logits):
        return logits.sort(descending=True, stable=True).indices
    least = logits.topk(count, sorted=False).values.min()
    ids = (logits >= least).nonzero().flatten()
    return ids[logits[ids].sort(descending=True, stable=True).indices]
