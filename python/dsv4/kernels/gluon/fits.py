"""Which calls and which weights the forms of `forms.py` are for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.device import multiprocessors
from dsv4.kernels.gluon.forms import BLOCK, BUSY, HEADS, MANY, MOST_BLOCKS
from dsv4.ops.quantised import Quantised


def v4_attention(
    q: Tensor, sink: Tensor, scale: float, cos: Tensor, sin: Tensor, tokens: Any, window: Any, window_ids: Tensor, *rest: Any, **options: Any
) -> bool:  # fmt: skip
    """V4's dims in bfloat16 over rows of 584 bytes."""
    return (
        q.dtype == torch.bfloat16
        and q.shape[2] == 512
        and cos.shape[1] == 32
        and window_ids.shape[1] % BLOCK == 0
        and window.codec.name == "fp8_ds_mla"
    )


def v4_part(
    q: Tensor, scale: float, tokens: Any, window: Any, window_ids: Tensor, history: Any = None, entries: Any = None, *rest: Any, **options: Any
) -> bool:  # fmt: skip
    """V4's dims in bfloat16, over regions whose rows are loaded 16 bytes at a time: those of a gathered history may not be."""
    read = history if history is not None and entries is not None and entries.most else window
    return (
        q.dtype == torch.bfloat16
        and q.shape[2] == 512
        and window_ids.shape[1] % BLOCK == 0
        and window.codec.name == "fp8_ds_mla"
        and not (window.region.stride(0) % 16 or read.region.stride(0) % 16)
        and (read.region.data_ptr() - window.region.data_ptr()) % 16 == 0
    )


def busy_attention(
    q: Tensor, sink: Tensor, scale: float, cos: Tensor, sin: Tensor, tokens: Any, window: Any, window_ids: Tensor, *rest: Any, **options: Any
) -> bool:  # fmt: skip
    """Where CTAs stay."""
    return _busy(q, window, window_ids, *rest, **options)


def busy_part(q: Tensor, scale: float, tokens: Any, window: Any, window_ids: Tensor, *rest: Any, **options: Any) -> bool:  # fmt: skip
    """Where CTAs stay."""
    return _busy(q, window, window_ids, *rest, **options)


def _busy(
    q: Tensor, window: Any, window_ids: Tensor, history: Any = None, entries: Any = None, selected: Tensor | None = None, *rest: Any,
    splits: int | None = None, times: Any = None,
) -> bool:  # fmt: skip
    """More than BUSY items a multiprocessor, and lists of one width that no CTA must share, of rows at multiples of 16 bytes."""
    if len(q) * -(-q.shape[1] // HEADS) <= BUSY * multiprocessors() or (splits or 1) != 1:
        return False
    rows, keys = window, window_ids.shape[1]
    if history is not None and entries is not None and entries.most:
        if selected is None:
            return False
        rows, keys = history, keys + BLOCK * -(-selected.shape[1] // BLOCK)
    aligned = window.region.stride(0) % 16 == rows.region.stride(0) % 16 == 0
    return aligned and keys <= BLOCK * MOST_BLOCKS


def v4_keys(q: Tensor, cos: Tensor, sin: Tensor, weights: Tensor, keys: Any, tokens: Any, entries: Any, topk: int) -> bool:  # fmt: skip
    """MXFP4 keys of 128 channels in pages of a multiple of 64 rows, for 33 to 64 heads."""
    stored = keys.codec.name == "mxfp4" and q.shape[2] == 128 and keys.rows % BLOCK == 0
    return stored and 32 < q.shape[1] <= 64


def short_keys(q: Tensor, cos: Tensor, sin: Tensor, weights: Tensor, keys: Any, tokens: Any, entries: Any, topk: int, *rest: Any) -> bool:  # fmt: skip
    """MXFP4 keys of 128 channels, 16 bytes of which are loaded at a time, in pages whose rows are a multiple or a part of 64, for 33 to 64
    heads."""
    whole = keys.rows % BLOCK == 0 or (BLOCK % keys.rows == 0 and keys.rows % 4 == 0)
    aligned = not (keys.region.stride(0) % 16 or keys.region.data_ptr() % 16)
    return keys.codec.name == "mxfp4" and q.shape[2] == 128 and 32 < q.shape[1] <= 64 and whole and aligned


def more_than_selected(q: Tensor, cos: Tensor, sin: Tensor, weights: Tensor, keys: Any, tokens: Any, entries: Any, topk: int) -> bool:  # fmt: skip
    return entries.most > topk


def many_slots(x: Tensor | Quantised, experts: Tensor, weights: Tensor, w: Any, *rest: Any) -> bool:
    """Whole tiles and MANY slots an expert."""
    return experts.numel() >= MANY * len(w.w13) and x.shape[1] % 128 == 0
