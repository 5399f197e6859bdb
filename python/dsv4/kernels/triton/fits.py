"""Which calls and which weights the forms of `forms.py` are for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.triton.forms import (
    FEW_STREAM_TOKENS,
    FIXED_ONE_LAUNCH,
    NARROW_TOKENS,
    ONE_LAUNCH,
    PLAIN_TOKENS,
    ROUTE_TOKENS,
)
from dsv4.ops.quantised import Quantised
from dsv4.ops.weight import FP8_BLOCK, Fp8Weight, Gated


def fp8(w: Any) -> bool:
    """FP8 as stored, or three such matrices."""
    return isinstance(w, Fp8Weight) or (isinstance(w, Gated) and all(isinstance(m, Fp8Weight) for m in w))


def fp4_experts(w: Any) -> bool:
    """Experts that `moe.prepare` repacked: FP4."""
    return not isinstance(w, Gated)


def narrow_scales(w: Any) -> bool:
    """FP4 experts whose rows' scales span at most 2^11, in one address range of 31 bits."""
    return fp4_experts(w) and w.absorb and max(w.s13.numel(), w.s2.numel()) < 1 << 31


def whole_blocks(weight: Any, groups: int = 1) -> bool:
    """Whether a matrix is cut into whole blocks of 128 x 128, group by group."""
    rows, width = weight.codes.shape
    return (rows // groups) % FP8_BLOCK == 0 and width % FP8_BLOCK == 0


def wide(x: Tensor | Quantised, weight: Any) -> bool:
    return len(x) > NARROW_TOKENS and whole_blocks(weight)


def wide_groups(x: Tensor, weight: Any) -> bool:
    return len(x) > NARROW_TOKENS and whole_blocks(weight, x.shape[1])


def wide_gated(x: Tensor | Quantised, w: Gated, limit: float) -> bool:
    return len(x) > NARROW_TOKENS and all(map(whole_blocks, w))


def one_launch_gated(x: Tensor | Quantised, w: Gated, limit: float) -> bool:
    return len(x) <= NARROW_TOKENS


def few_plain(x: Tensor, weight: Tensor) -> bool:
    return len(x) <= PLAIN_TOKENS and x.dtype == weight.dtype == torch.bfloat16


def both_bfloat16(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype == torch.bfloat16 and x.is_cuda


def both_routed(x: Tensor, gate: Tensor, *rest: Any) -> bool:
    return both_bfloat16(x, gate)


def few_routed(x: Tensor, gate: Tensor, *rest: Any) -> bool:
    return 0 < len(x) <= ROUTE_TOKENS and x.dtype == gate.dtype == torch.bfloat16


def few_experts(x: Tensor | Quantised, experts: Tensor, *rest: Any) -> bool:
    """Few slots, of values: it quantises them itself."""
    values = x.values if isinstance(x, Quantised) else x
    return 0 < experts.numel() <= ONE_LAUNCH and values is not None


def fewest_experts(x: Tensor | Quantised, experts: Tensor, *rest: Any) -> bool:
    return experts.numel() <= FIXED_ONE_LAUNCH and few_experts(x, experts)


def whole_channels(x: Tensor | Quantised, *rest: Any) -> bool:
    """Channels in whole blocks of 128."""
    return x.shape[1] % FP8_BLOCK == 0


def few_next(y: Tensor | None, streams: Tensor, *rest: Any) -> bool:
    return 0 < len(streams) <= FEW_STREAM_TOKENS


def few_head(streams: Tensor, *rest: Any) -> bool:
    return 0 < len(streams) <= FEW_STREAM_TOKENS


def all_fit(q: Tensor, cos: Tensor, sin: Tensor, weights: Tensor, keys: Any, tokens: Any, entries: Any, topk: int) -> bool:  # fmt: skip
    return entries.most <= topk
