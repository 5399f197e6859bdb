"""Inputs for every op, small, from its spec. Used against formulas written out and against every other
backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dsv4.model.batch import Batch, Row
from dsv4.model.step import Geometry, Step, build_step
from torch import Tensor

D, HEADS, DIM, ROPE, INDEX_HEADS, INDEX_DIM, WINDOW, RATIO = 96, 6, 64, 32, 3, 32, 16, 4
BLOCK_TOKENS, BLOCKS = 32, 12


class TensorRows:
    """Rows that lie in a tensor [N, dim]."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def read(self, ids: Tensor) -> Tensor:
        return self.values[ids]


def step_of(*rows: tuple[int, int]) -> Step:
    """Tables for rows (start, length), one slab each, pages in reverse order."""
    placed, offset = [], 0
    for slab, (start, length) in enumerate(rows):
        placed.append(Row(slab, start, length, offset))
        offset += length
    positions = torch.cat([torch.arange(start, start + length) for start, length in rows])
    table = torch.arange(len(rows) * BLOCKS - 1, -1, -1, dtype=torch.int32).view(len(rows), BLOCKS)
    batch = Batch(
        torch.zeros(offset, dtype=torch.int64),
        positions,
        tuple(placed),
        table,
        torch.empty(0, dtype=torch.int64),
    )
    geometry = Geometry(WINDOW, WINDOW, BLOCK_TOKENS, (RATIO,), tile=4)
    step = build_step(batch, geometry)
    assert step is not None
    return step


def history_rows(g: torch.Generator, rows: int, dim: int) -> TensorRows:
    """Random values for every physical row of `rows` sequences."""
    return TensorRows(torch.randn((rows * BLOCKS * BLOCK_TOKENS // RATIO, dim), generator=g))


def _g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _cos_sin(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    angle = 6.3 * torch.rand((n, ROPE // 2), generator=g)
    return angle.cos(), angle.sin()


def _hyper(t: int, g: torch.Generator, rows: int, scales: int) -> dict[str, Any]:
    return dict(
        streams=torch.randn((t, 4, D), generator=g),
        fn=torch.randn((rows, 4 * D), generator=g) / (4 * D) ** 0.5,
        scale=0.5 + torch.rand(scales, generator=g),
        base=0.5 * torch.randn(rows, generator=g),
        norm_eps=1e-6,
        hc_eps=1e-6,
    )


def _hc_post(t: int, g: torch.Generator) -> dict[str, Any]:
    r = lambda *shape: torch.rand(shape, generator=g)  # noqa: E731
    return dict(y=r(t, D), streams=r(t, 4, D), post=r(t, 4), comb=r(t, 4, 4))


def _rope(t: int, g: torch.Generator) -> dict[str, Any]:
    cos, sin = _cos_sin(t, g)
    return dict(x=torch.randn((t, HEADS, DIM), generator=g), cos=cos, sin=sin, inverse=bool(t % 2))


def _pool_fold(t: int, g: torch.Generator) -> dict[str, Any]:
    count = torch.randint(1, 5, (max(1, t // 3),), generator=g)
    value, lse = torch.randn((2, len(count), DIM), generator=g)
    value[::2], lse[::2] = 0, -torch.inf
    kv, score = torch.randn((2, int(count.sum()), DIM), generator=g)
    return dict(value=value, lse=lse, kv=kv, score=score, first=count.cumsum(0) - count, count=count)


def _finish(t: int, g: torch.Generator) -> dict[str, Any]:
    cos, sin = _cos_sin(t, g)
    norm = 1 + 0.1 * torch.randn(DIM, generator=g)
    return dict(pooled=torch.randn((t, DIM), generator=g), weight=norm, cos=cos, sin=sin, eps=1e-6)


def _two_rows(t: int) -> Step:
    return step_of((150, t), (37, 1), (0, max(1, t // 2)))


def _index_select(t: int, g: torch.Generator) -> dict[str, Any]:
    step = _two_rows(t)
    n = len(step.positions)
    return dict(
        q=torch.randn((n, INDEX_HEADS, INDEX_DIM), generator=g),
        weights=torch.randn((n, INDEX_HEADS), generator=g),
        keys=history_rows(g, 3, INDEX_DIM),
        tiles=step.tiles,
        entries=step.entries[RATIO],
        topk=8,
    )


def _sparse_attention(t: int, g: torch.Generator) -> dict[str, Any]:
    step = _two_rows(t)
    n, past = len(step.positions), len(step.window.past)
    rows = torch.randn((past + n + 1, DIM), generator=g)
    rows[-1] = 0
    chosen = torch.stack([torch.randperm(5, generator=g)[:3].sort().values for _ in range(n)])
    selected = torch.where(chosen < step.entries[RATIO].visible[:, None], chosen, -1)
    return dict(
        q=torch.randn((n, HEADS, DIM), generator=g),
        sink=torch.randn(HEADS, generator=g),
        scale=DIM**-0.5,
        tiles=step.tiles,
        window_rows=rows,
        window=step.window.keys,
        history=history_rows(g, 3, DIM),
        entries=step.entries[RATIO],
        selected=selected.sort(descending=True).values if t % 2 else None,
    )


def _route(t: int, g: torch.Generator) -> dict[str, Any]:
    hashed = t % 2 == 0
    chosen = torch.rand((t, 8), generator=g).argsort(-1)[:, :3].sort().values
    return dict(
        x=torch.randn((t, D), generator=g),
        gate=torch.randn((8, D), generator=g) / D**0.5,
        bias=None if hashed else 0.5 * torch.randn(8, generator=g),
        chosen=chosen if hashed else None,
        k=3,
        scale=1.5,
    )


def _experts(t: int, g: torch.Generator) -> dict[str, Any]:
    w = lambda *shape: torch.randn(shape, generator=g) / shape[-1] ** 0.5  # noqa: E731
    return dict(
        x=torch.randn((t, D), generator=g),
        experts=torch.rand((t, 8), generator=g).argsort(-1)[:, :3],
        weights=torch.rand((t, 3), generator=g),
        w1=w(8, 40, D),
        w3=w(8, 40, D),
        w2=w(8, D, 40),
        limit=0.7,
    )


def _swiglu(t: int, g: torch.Generator) -> dict[str, Any]:
    case = _experts(t, g)
    return dict(x=case["x"], w1=case["w1"][0], w3=case["w3"][0], w2=case["w2"][0], limit=0.7)


CASES: dict[str, Callable[[int, torch.Generator], dict[str, Any]]] = {
    "linear": lambda t, g: dict(
        x=torch.randn((t, D), generator=g), weight=torch.randn((24, D), generator=g) / 10
    ),
    "grouped_linear": lambda t, g: dict(
        x=torch.randn((t, 2, D), generator=g), weight=torch.randn((2, 24, D), generator=g) / 10
    ),
    "logits": lambda t, g: dict(
        x=torch.randn((t, D), generator=g), weight=torch.randn((50, D), generator=g) / 10
    ),
    "rmsnorm": lambda t, g: dict(
        x=torch.randn((t, D), generator=g), weight=torch.randn(D, generator=g) if t % 2 else None, eps=1e-6
    ),
    "rope": _rope,
    "hc_pre": lambda t, g: dict(**_hyper(t, g, 24, 3), iters=20),
    "hc_post": _hc_post,
    "hc_head": lambda t, g: _hyper(t, g, 4, 1),
    "pool_fold": _pool_fold,
    "compress_finish": _finish,
    "index_select": _index_select,
    "sparse_attention": _sparse_attention,
    "route": _route,
    "experts": _experts,
    "swiglu": _swiglu,
}


def case(op: str, tokens: int, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for `op` with about `tokens` tokens."""
    return CASES[op](tokens, _g(seed + tokens))
