"""The layers of a model and its cache, as data: what each layer stores and reads, and the components that follow.

All of a model's geometry comes from here: attention, names of tensors, cache, planner and simulator go by `LayerSpec`,
byte counts and offsets by the `LayoutSpec` that the core makes of the components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv4.errors import ConfigError

if TYPE_CHECKING:
    from dsv4._core import LayoutSpec

LEAST_BLOCK = 256
"""Tokens of a page from which the default is taken."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one attention layer stores and reads besides its window."""

    layer: int
    ratio: int = 0
    """Tokens of an entry of the history that it reads; 0: it reads none."""
    overlap: bool = False
    """An entry is made of the block before, too."""
    indexed: bool = False
    """It reads the entries that its indexer selects, else all."""
    history_of: int | None = None
    """The layer whose history it reads: itself, an earlier one, or None."""
    history: str = ""
    """The component of that history."""
    reach: int = 0
    """Tokens before a position that, run again in this layer, rebuild its state there."""

    @property
    def stores(self) -> bool:
        """Whether it has compressors and history of its own."""
        return self.history_of == self.layer

    @property
    def pool(self) -> str:
        """The component of its open entries."""
        return f"{self.history}_pool"

    @property
    def index(self) -> str:
        """The component of its index keys."""
        return f"{self.history}_index"

    @property
    def index_pool(self) -> str:
        """The component of its open index keys."""
        return f"{self.index}_pool"


def layers_of(
    ratios: Sequence[int],
    window: int,
    *,
    csa: Sequence[int] = (4,),
    hca: Sequence[int] = (128,),
    history_of: Sequence[int] | None = None,
) -> tuple[LayerSpec, ...]:
    """One spec per layer. Ratios `csa` overlap and are indexed, those in `hca` are neither; 0 has a window only. `history_of`:
    the layer whose history each reads, where that is not always its own; of a layer that has none it is its own number.
    Raises ConfigError for a ratio that is in neither, and for a history that is not there."""
    names = {m: "csa" if m == csa[0] else f"csa_{m}" for m in csa}
    names |= {m: "hca" if m == hca[0] else f"hca_{m}" for m in hca}
    specs: list[LayerSpec] = []
    for layer, ratio in enumerate(ratios):
        if ratio and ratio not in names:
            known = ", ".join([*(f"{m} (CSA)" for m in csa), *(f"{m} (HCA)" for m in hca)])
            raise ConfigError(f"compress_ratios has {ratio!r}; each entry is 0, {known}")
        of = layer if history_of is None else history_of[layer]
        if of != layer and not (0 <= of < layer and ratio and specs[of].stores and specs[of].ratio == ratio):
            fits = [s.layer for s in specs if s.stores and s.ratio == ratio]
            raise ConfigError(
                f"history_layers has {of} for layer {layer}; it takes {layer}, or an earlier layer that stores history of ratio "
                f"{ratio}: {fits or 'there is none'}"
            )
        overlap = ratio in csa
        specs.append(
            LayerSpec(
                layer=layer,
                ratio=ratio,
                overlap=overlap,
                indexed=overlap,
                history_of=of if ratio else None,
                history=names.get(ratio, ""),
                # The block before the next entry is needed whole where entries overlap.
                reach=max(window - 1, ratio if overlap and of == layer else 0),
            )
        )
    return tuple(specs)


def block_size(layers: Sequence[LayerSpec], wanted: int | None = None, ranks: int = 1) -> int:
    """Tokens of a page: `wanted`, or the least that is possible from LEAST_BLOCK on. Each of `ranks` has as many rows of a
    page as any other. Raises ConfigError with the next possible one."""
    step = math.lcm(*(s.ratio for s in layers if s.ratio)) * ranks
    nearest = max(1, -(-(wanted or LEAST_BLOCK) // step)) * step
    if wanted is not None and wanted != nearest:
        raise ConfigError(f"block_size is {wanted}; it must be a multiple of {step}, the next is {nearest}")
    return nearest


def layout_of(
    layers: Sequence[LayerSpec],
    *,
    window: int,
    head_dim: int,
    index_head_dim: int,
    row: tuple[int, str],
    index_row: tuple[int, str],
    block_tokens: int,
    ranks: int = 1,
) -> LayoutSpec:
    """The cache of these layers, as one of `ranks` holds it. `row` is (bytes, format) of window rows and entries, `index_row` of
    index keys. Raises ConfigError for sizes that do not fit."""
    from dsv4._core import LayoutSpec

    history: list[dict[str, Any]] = []
    state: list[dict[str, Any]] = []

    def add(name: str, kind: dict[str, dict[str, int]], of: list[int], row: tuple[int, str]) -> None:
        component = {"name": name, "kind": kind, "layers": of, "row_bytes": row[0], "format": row[1]}
        (history if "stride" in kind else state).append(component)

    def pool_row(dim: int) -> tuple[int, str]:
        return 2 * dim * 4, "float32"  # value and lse per channel

    add("window", {"window": {"tokens": window, "slack": 0}}, [s.layer for s in layers], row)
    kinds = {s.history: s for s in layers if s.stores}
    for spec in sorted(kinds.values(), key=lambda s: (not s.overlap, s.ratio)):
        of = [s.layer for s in layers if s.stores and s.history == spec.history]
        stride = {"stride": {"ratio": spec.ratio}}
        pool = {"pool": {"rows": 1 + spec.overlap, "saved": int(spec.overlap)}}
        add(spec.history, stride, of, row)
        add(spec.pool, pool, of, pool_row(head_dim))
        if spec.indexed:
            add(spec.index, stride, of, index_row)
            add(spec.index_pool, pool, of, pool_row(index_head_dim))
    return LayoutSpec(
        {
            "block_tokens": block_tokens,
            "ranks": ranks,
            "window": window,
            "layers": [{"reach": s.reach, "history_of": s.history_of} for s in layers],
            "components": history + state,
        }
    )


def over_ranks(layout: LayoutSpec, ranks: int) -> LayoutSpec:
    """The layout as one of `ranks` holds it; its block grows to the next that is possible."""
    from dsv4._core import LayoutSpec

    step = math.lcm(*(c.ratio for c in layout.components if c.kind == "stride")) * ranks
    block = -(-layout.block_tokens // step) * step
    return LayoutSpec(layout.data() | {"ranks": ranks, "block_tokens": block})
