"""Activations from exp and log1p alone, and sums in a fixed order (see the package docstring for why)."""

from __future__ import annotations

import torch
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)); at most one of the two may be -inf."""
    return torch.maximum(a, b) + torch.log1p(torch.exp(-(a - b).abs()))


def ordered_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over a short dimension, first to last."""
    first, *rest = x.unbind(dim)
    for term in rest:
        first = first + term
    return first
