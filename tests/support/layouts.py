"""Layouts by numbers, as a checkpoint's config gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsv4._core import LayoutSpec
from dsv4.model.layout import layers_of, layout_of


def v4_layout(
    ratios: Sequence[int], *, window: int = 128, block_tokens: int = 256, **more: Any
) -> LayoutSpec:
    """V4 with the trained row formats; `csa`, `hca` and `history_of` as in `layers_of`, the rest as in `layout_of`."""
    sizes: dict[str, Any] = dict(head_dim=512, index_head_dim=128, row=(584, "fp8_ds_mla"))
    sizes |= dict(index_row=(68, "mxfp4"))
    kinds = {name: more.pop(name) for name in ("csa", "hca", "history_of") if name in more}
    layers = layers_of(ratios, window, **kinds)
    return layout_of(layers, window=window, block_tokens=block_tokens, **(sizes | more))
