"""Routing and experts."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.ops.quantised import Quantised, plain
from dsv4.ops.reference.elementwise import ordered_sum, silu, softplus
from dsv4.ops.reference.index import lowest_index_topk
from dsv4.ops.reference.linear import float32, linear, linear_f32
from dsv4.ops.weight import Gated, Weight, prepared_by


@prepared_by(float32)
def route(
    x: Tensor, gate: Weight, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Experts int64 [T, k] and their weights float32 [T, k] for x [T, d].

    Scores are sqrt(softplus(gate . x)). The choice is `chosen` [T, k] (hash layers) or the top k of score +
    bias; the bias has no part in the weights, which are normalised and multiplied by `scale`.
    """
    scores = torch.sqrt(softplus(linear_f32(x, gate)))
    if chosen is None:
        every = torch.full((x.shape[0],), scores.shape[1], dtype=torch.int64, device=x.device)
        chosen = lowest_index_topk(scores if bias is None else scores + bias, every, k).long()
    picked = scores.gather(1, chosen)
    return chosen, picked / (ordered_sum(picked, 1)[:, None] + 1e-20) * scale


def experts(
    x: Tensor | Quantised, experts: Tensor, weights: Tensor, w: Gated, limit: float, shared: Tensor | None
) -> Tensor:
    """[T, d]: the sum over a token's experts of w2 (weight * silu(min(w1 x, limit)) * clamp(w3 x, limit)), and `shared`.

    The terms are added in float32 in the order of the columns of `experts`, whichever expert was computed first.
    """
    x, (tokens, k) = plain(x), experts.shape
    flat = experts.flatten()
    terms = x.new_empty((tokens * k, x.shape[1]), dtype=torch.float32)
    for e in torch.unique(flat).tolist():
        place = torch.nonzero(flat == e).flatten()
        hidden = _gated(x[place // k], w.w1[e], w.w3[e], limit) * weights.flatten()[place, None]
        terms[place] = linear(hidden.to(x.dtype), w.w2[e]).float()
    routed = ordered_sum(terms.view(tokens, k, -1), 1)
    return (routed if shared is None else routed + shared.float()).to(x.dtype)


def swiglu(x: Tensor, w: Gated, limit: float) -> Tensor:
    """One expert for every token, weight 1: [T, d] -> [T, d]."""
    return linear(_gated(x, w.w1, w.w3, limit).to(x.dtype), w.w2)


def _gated(x: Tensor, w1: Weight, w3: Weight, limit: float) -> Tensor:
    """silu(min(w1 x, limit)) * clamp(w3 x, -limit, limit), float32."""
    gate, up = linear(x, w1).float(), linear(x, w3).float()
    return silu(gate.clamp(max=limit)) * up.clamp(min=-limit, max=limit)
