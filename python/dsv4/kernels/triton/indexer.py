"""Lightning indexer: scores of all visible entries and the best k of them, without ever writing a long score row.

1. `query`  turns, rotates and quantises the queries to e4m3; what scales them goes into the weights.
2. `scan`   multiplies tiles of stored keys with the queries of a request. It either writes scores (rows of at most
            SAMPLE entries, or an even sample of longer ones) or appends the entries that pass a threshold.
3. `topk`   selects: directly, where the whole row was written; else among the appended candidates.

The threshold of a token comes from a sample of its own scores: those of one token say little of the next one's. Should it have been wrong, `refine` takes the exact best k of each
of several parts of the row, in one launch that ends at once where nothing was wrong. So the result is exact always.

Workspace is for TOKENS tokens at a time, whatever the context: CAP candidates of 8 bytes and SAMPLE scores each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dsv4.kernels.triton import topk as select
from dsv4.kernels.triton.common import INTERPRETED, cdiv, multiprocessors, next_pow2, pdl
from dsv4.kernels.triton.forms import INDEX_CANDIDATES, INDEX_SAMPLE, INDEX_SAMPLED, INDEX_TOKENS
from dsv4.kernels.triton.index_scan import query_kernel, refine_kernel, scan_kernel
from dsv4.kernels.triton.rows import row_constants

TOKENS, CAP, SAMPLE, SAMPLED = INDEX_TOKENS, INDEX_CANDIDATES, INDEX_SAMPLE, INDEX_SAMPLED


@dataclass(frozen=True, slots=True)
class Plan:
    """One call's constants. `rows`: of `row_constants`; `heads` are padded; `queries` share a tile of `tile` keys. `refine`: FORMAT of the kernel of this name, where not that of the keys."""

    rows: dict[str, Any]
    heads: int
    queries: int
    tile: int
    k: int
    append: bool
    refine: str | None = None

    @property
    def width(self) -> int:
        """k as a power of two."""
        return next_pow2(max(16, self.k))

    @property
    def parts(self) -> int:
        return min(16, CAP // self.width)

    @property
    def stored(self) -> dict[str, Any]:
        """What the kernels need to know of the stored keys."""
        return {name: self.rows[name] for name in ("ROWS", "FORMAT", "DIM", "PLANE", "SCALES")}


Scan = Callable[..., None]


def key_arguments(
    q: Tensor, weights: Tensor, keys: Any, pages: Tensor, slab: Tensor, visible: Tensor
) -> tuple[Any, ...]:
    """What every kernel over keys takes first."""
    return q, weights, keys.region, keys.region.stride(0), pages, pages.stride(0), slab, visible


def list_arguments(lists: dict[str, Any]) -> tuple[Any, ...]:
    """What a scan takes after them; `lists` are the keyword arguments of `launch_scan`."""
    scores = lists["scores"]
    found = (lists["used"], lists["key"], lists["index"])
    return lists["bound"], *found, scores, *scores.shape


def launch_scan(
    plan: Plan,
    q: Tensor,
    weights: Tensor,
    keys: Any,
    pages: Tensor,
    slab: Tensor,
    visible: Tensor,
    most: int,
    *,
    append: bool,
    **lists: Any,
) -> None:
    """Plain Triton's scan. `lists`: bound, used, key, index and scores [T, sampled]."""
    tokens, sampled = lists["scores"].shape
    groups = cdiv(tokens, plan.queries)
    length = most if append else min(most, sampled)
    splits = max(1, min(cdiv(4 * multiprocessors(), groups), cdiv(length, plan.tile)))
    scan_kernel[(splits, groups)](
        *key_arguments(q, weights, keys, pages, slab, visible),
        *list_arguments(lists),
        APPEND=append,
        CAP=CAP,
        HEADS=plan.heads,
        QUERIES=plan.queries,
        TILE=plan.tile,
        **plan.stored,
        PDL=bool(pdl()),
        num_warps=4,
        num_stages=1 if INTERPRETED else 6 if plan.rows["FORMAT"] in ("fp8", "mxfp4") else 2,
    )


class State:
    """What outlives a call. `lists`: by device, candidates (key, index) and their numbers, and room for `refine`; calls share them, so they
    belong to one stream."""

    lists: ClassVar[dict[torch.device, tuple[Tensor, ...]]] = {}

    @classmethod
    def workspace(cls, device: torch.device) -> tuple[Tensor, ...]:
        """(used [TOKENS], key and index [TOKENS, CAP], fresh [TOKENS, CAP]), int32; `used` is 0 between calls."""
        if device not in cls.lists:
            used = torch.zeros((TOKENS,), dtype=torch.int32, device=device)
            rest = (torch.empty((TOKENS, CAP), dtype=torch.int32, device=device) for _ in range(3))
            cls.lists[device] = (used, *rest)
        return cls.lists[device]


def prepare(
    q: Tensor, cos: Tensor, sin: Tensor, weights: Tensor, plan: Plan, rope_dim: int
) -> tuple[Tensor, Tensor]:
    """Queries [T, padded heads, I] and weights float32 [T, padded heads] as the scan takes them."""
    tokens, heads, dim = q.shape
    form = plan.rows["FORMAT"]
    dtype = torch.float8_e4m3fn if form in ("fp8", "mxfp4") else torch.float32
    out = torch.empty((tokens, plan.heads, dim), dtype=dtype, device=q.device)
    folded = torch.empty((tokens, plan.heads), dtype=torch.float32, device=q.device)
    n = min(16, plan.heads)
    overlap = pdl()
    query_kernel[(tokens, cdiv(plan.heads, n))](
        q.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        weights,
        weights.stride(0),
        out.view(torch.uint8) if dtype.itemsize == 1 else out,
        folded,
        HEADS=heads,
        PADDED=plan.heads,
        N=n,
        FORMAT=form,
        DIM=dim,
        ROPE=rope_dim,
        BF16=q.dtype == torch.bfloat16,
        PDL=bool(overlap),
        num_warps=4,
        enable_fp_fusion=False,
        **overlap,
    )
    return out, folded


def index_select(
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor,
    keys: Any,
    tokens: Any,
    entries: Any,
    topk: int,
    scan: Scan = launch_scan,
    queries: int = 2,
    refine: str | None = None,
) -> Tensor:
    """The op `index_select`. `scan` launches the kernel that does the work, `queries` tokens of a
    prompt at a time; `refine` is the FORMAT in which `refine_kernel` gives its scores."""
    return best(q, cos, sin, weights, keys, tokens, entries, topk, scan, queries, None, refine)


def fixed_index_select(
    q: Tensor, cos: Tensor, sin: Tensor, weights: Tensor, keys: Any, tokens: Any, entries: Any, topk: int
) -> Tensor:
    """The op `index_select` by scores that are the same in every kernel: a program scores keys for one token at a time."""
    if entries.most <= topk:
        return every_entry(q, cos, sin, weights, keys, tokens, entries, topk)
    return best(q, cos, sin, weights, keys, tokens, entries, topk, launch_scan, 1, None)


def index_candidates(
    q: Tensor, cos: Tensor, sin: Tensor, weights: Tensor, keys: Any, tokens: Any, entries: Any, topk: int,
    into: tuple[Tensor, Tensor] | None = None, *, fixed: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op `index_candidates`; `fixed` as in `fixed_index_select`."""
    out, values = into or lists(q, entries, topk)
    best(q, cos, sin, weights, keys, tokens, entries, topk, launch_scan, 1 if fixed else 2, values, out=out)
    return out, values


def lists(q: Tensor, entries: Any, topk: int) -> tuple[Tensor, Tensor]:
    """Room for what `index_candidates` gives."""
    shape = (len(q), min(topk, entries.most))
    selected = torch.empty(shape, dtype=torch.int32, device=q.device)
    return selected, torch.empty(shape, dtype=torch.float32, device=q.device)


def best(
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor,
    keys: Any,
    tokens: Any,
    entries: Any,
    topk: int,
    scan: Scan,
    queries: int,
    values: Tensor | None,
    refine: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What all forms of the ops do: the arguments of the op, what launches the scan and for how many tokens of a prompt at a time, where scores
    go (float32 [T, k], if anywhere), FORMAT of `refine_kernel`, and where the selected go (int32 [T, k], if somewhere)."""
    total, k = len(q), min(topk, entries.most)
    if out is None:
        out = torch.empty((total, k), dtype=torch.int32, device=q.device)
    if not total or not k:
        return out
    if total == len(tokens.slabs):  # one token of each request: none share keys
        queries = 1
    plan = plan_of(q.shape[1], keys, k, entries.most, queries, refine)
    q8, folded = prepare(q, cos, sin, weights, plan, 2 * cos.shape[-1])
    select_entries(
        plan, scan, q8, folded, keys, entries.pages, tokens.slab, entries.visible, entries.most, out, values
    )
    return out


def every_entry(
    q: Tensor, cos: Tensor, sin: Tensor, weights: Tensor, keys: Any, tokens: Any, entries: Any, topk: int
) -> Tensor:
    """The op where no row has more entries than it selects: all of them."""
    every = torch.arange(entries.most, dtype=torch.int32, device=q.device)
    return torch.where(every < entries.visible[:, None], every, -1)


def plan_of(heads: int, keys: Any, k: int, most: int, queries: int = 2, refine: str | None = None) -> Plan:
    """`queries` and `refine` as in `Plan`."""
    quantised = keys.codec.name in ("fp8", "mxfp4")
    return Plan(
        rows=row_constants(keys.codec, keys.rows),
        heads=max(16, next_pow2(heads)),
        queries=queries,
        tile=32 if INTERPRETED or not quantised else 64,
        k=k,
        append=most > SAMPLE,
        refine=refine,
    )


def select_entries(
    plan: Plan,
    scan: Scan,
    q: Tensor,
    weights: Tensor,
    keys: Any,
    pages: Tensor,
    slab: Tensor,
    visible: Tensor,
    most: int,
    out: Tensor,
    values: Tensor | None = None,
) -> None:
    """Fills `out` int32 [T, k], and `values` float32 [T, k] with their scores, for prepared queries, TOKENS of them at a
    time."""
    for at in range(0, len(q), TOKENS):
        cut = slice(at, min(at + TOKENS, len(q)))
        part = (q[cut], weights[cut], keys, pages, slab[cut], visible[cut], most)
        run = appended if plan.append else whole
        run(plan, scan, part, out[cut], None if values is None else values[cut])


def whole(plan: Plan, scan: Scan, part: tuple, out: Tensor, values: Tensor | None = None) -> None:
    """Rows that fit a program: all scores, then the choice among them."""
    n, most = len(out), part[-1]
    scores = torch.empty((n, min(SAMPLE, next_pow2(most))), dtype=torch.float32, device=out.device)
    none = torch.empty((0,), dtype=torch.int32, device=out.device)
    scan(
        plan,
        *part,
        append=False,
        bound=none,
        used=none,
        key=none,
        index=none,
        scores=scores,
    )
    select.choose(scores, part[5], out, most, values)


def appended(plan: Plan, scan: Scan, part: tuple, out: Tensor, values: Tensor | None = None) -> None:
    """Longer rows: a threshold from a sample, what passes it, and the exact choice where that was wrong."""
    q, weights, keys, pages, slab, visible, _most = part
    n, device, parts, width = len(out), out.device, plan.parts, plan.width
    used, key, index, fresh = State.workspace(device)
    scores = torch.empty((n, SAMPLED), dtype=torch.float32, device=device)
    bound = torch.empty((n,), dtype=torch.float32, device=device)
    common = dict(bound=bound, used=used, key=key, index=index, scores=scores)
    scan(plan, *part, append=False, **common)
    select.threshold_kernel[(n,)](scores, SAMPLED, visible, bound, used, plan.k, BLOCK=SAMPLED, num_warps=8)
    scan(plan, *part, append=True, **common)
    overlap = pdl()
    refine_kernel[(parts, n)](
        *key_arguments(q, weights, keys, pages, slab, visible),
        used,
        key,
        index,
        fresh,
        plan.k,
        K=width,
        PARTS=parts,
        CAP=CAP,
        HEADS=plan.heads,
        TILE=min(plan.tile, width),
        **plan.stored | ({"FORMAT": plan.refine} if plan.refine else {}),
        PDL=bool(overlap),
        num_warps=4,
        num_stages=1 if INTERPRETED else 3,
        **overlap,
    )
    select.finish_kernel[(n,)](
        visible,
        used,
        key,
        index,
        fresh,
        out,
        out.stride(0),
        bound if values is None else values,
        plan.k,
        K=width,
        SMALL=min(CAP, 4 * width),
        CAP=CAP,
        PARTS=parts,
        VALUES=values is not None,
        PDL=bool(overlap),
        num_warps=8,
        **overlap,
    )
