"""Manifold-constrained hyper-connections: n residual streams, mixed before and after every sub-layer."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.ops.quantised import Quantised
from dsv4.ops.reference.elementwise import ordered_sum, sigmoid
from dsv4.ops.reference.linear import linear
from dsv4.ops.reference.norm import rmsnorm, rmsnorm_quantised


def hc_next(
    y: Tensor | None,
    streams: Tensor,
    post: Tensor | None,
    comb: Tensor | None,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_eps: float,
    hc_eps: float,
    iters: int,
    weight: Tensor,
    eps: float,
    quantised: bool,
) -> tuple[Tensor | Quantised, Tensor, Tensor, Tensor]:
    """From the streams [T, n, d] around a sub-layer with result y [T, d] (None: there was none) to the normed input [T, d] of the next,
    quantised too where asked, with the streams before it and `post` and `comb` for its end."""
    if y is not None:
        assert post is not None and comb is not None, "a sub-layer has both"
        streams = hc_post(y, streams, post, comb)
    x, post, comb = hc_pre(streams, fn, scale, base, norm_eps, hc_eps, iters)
    return (rmsnorm_quantised if quantised else rmsnorm)(x, weight, eps), streams, post, comb


def hc_pre(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, hc_eps: float, iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    """From the streams [T, n, d]: the sub-layer's input [T, d] (dtype of the streams), `post` float32 [T, n]
    and the doubly stochastic `comb` float32 [T, n, n]."""
    n = streams.shape[1]
    mix = _mix(streams, fn, norm_eps)
    pre = sigmoid(mix[:, :n] * scale[0] + base[:n]) + hc_eps
    post = 2 * sigmoid(mix[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = _sinkhorn((mix[:, 2 * n :] * scale[2] + base[2 * n :]).view(-1, n, n), hc_eps, iters)
    return _collapse(pre, streams), post, comb


def hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """X'[j] = post_j * y + sum_i comb[i][j] * X[i], in float32, cast to the dtype of the streams."""
    out = post[:, :, None] * y.float()[:, None]
    for i, stream in enumerate(streams.float().unbind(1)):
        out += comb[:, i, :, None] * stream[:, None]
    return out.to(streams.dtype)


def hc_head(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, hc_eps: float
) -> Tensor:
    """The streams [T, n, d] as one [T, d] before the final norm."""
    return _collapse(sigmoid(_mix(streams, fn, norm_eps) * scale + base) + hc_eps, streams)


def _mix(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    """fn . v / rms(v), v being the streams one after the other; float32."""
    v = streams.flatten(1).float()
    return linear(v, fn) * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)


def _collapse(pre: Tensor, streams: Tensor) -> Tensor:
    return ordered_sum(pre[:, :, None] * streams.float(), 1).to(streams.dtype)


def _sinkhorn(logits: Tensor, eps: float, iters: int) -> Tensor:
    """Softmax over rows, then `iters` rounds of normalising; the first round is the columns alone."""
    floor = logits.new_tensor(eps)  # as a tensor: adding a Python number converts it on every call
    a = torch.exp(logits - logits.amax(-1, keepdim=True))
    a = (a / a.sum(-1, keepdim=True)).add_(floor)
    a.div_(a.sum(-2, keepdim=True).add_(floor))
    for _ in range(iters - 1):
        a.div_(a.sum(-1, keepdim=True).add_(floor))
        a.div_(a.sum(-2, keepdim=True).add_(floor))
    return a
