"""Inputs for every op, small, from its spec. Used against formulas written out and against every other
backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from dsv4.cache.rows import Rows
from dsv4.formats import row_format
from dsv4.model.batch import Batch, Row
from dsv4.model.step import Geometry, Step, build_step
from dsv4.ops.quantised import Quantised, plain
from dsv4.ops.spec import SPECS
from dsv4.ops.tables import END, PROMPT, RESET, RESTORE, SAVE, Span, StateTable
from dsv4.ops.weight import Fp4Weight, Fp8Weight, Gated, Weight
from torch import Tensor

D, HEADS, DIM, ROPE, INDEX_HEADS, INDEX_DIM, WINDOW, RATIO = 96, 6, 64, 32, 3, 32, 16, 4
BLOCK_TOKENS, BLOCKS = 32, 12


def step_of(*rows: tuple[int, int], window: int = WINDOW) -> Step:
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
    geometry = Geometry(window, window, BLOCK_TOKENS, (RATIO,), tile=4)
    return build_step(batch, geometry)


def stored(values: Tensor, per_page: int, form: str = "float32", rope: int = ROPE) -> Rows:
    """Rows float32 [N, dim] stored in pages of `per_page`, in a region with other bytes around it, as in a page."""
    codec = row_format(form, values.shape[1], rope)
    pages, size = -(-len(values) // per_page), per_page * sum(codec.planes)
    storage = torch.full((pages, size + 64), 0xFF, dtype=torch.uint8)
    rows = Rows(codec, storage[:, 16 : 16 + size], per_page)
    rows.write(torch.arange(len(values)), values)
    return rows


def history_rows(g: torch.Generator, rows: int, dim: int, form: str = "float32") -> Rows:
    """Random values for every physical row of `rows` sequences."""
    per_page = BLOCK_TOKENS // RATIO
    return stored(torch.randn((rows * BLOCKS * per_page, dim), generator=g), per_page, form)


def window_rows(step: Step, g: torch.Generator, dim: int, form: str = "float32") -> Rows:
    """Random values for every row that the step's window ids name, in ring or scratch pages."""
    count = max(int(step.window.ids.max()), int(step.window.target.max())) + 1
    return stored(torch.randn((count, dim), generator=g), WINDOW, form)


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


def _hc_next(t: int, g: torch.Generator) -> dict[str, Any]:
    """For an even number of tokens the way into the first sub-layer."""
    around = dict.fromkeys(("y", "streams", "post", "comb")) if t % 2 == 0 else _hc_post(t, g)
    norm = dict(iters=20, weight=1 + 0.1 * torch.randn(D, generator=g), eps=1e-6, quantised=t % 3 == 0)
    return around | _hyper(t, g, 24, 3) | norm


def _norm_rope(t: int, g: torch.Generator) -> dict[str, Any]:
    cos, sin = _cos_sin(t, g)
    weight = 1 + 0.1 * torch.randn(DIM, generator=g) if t % 2 else None
    return dict(x=torch.randn((t, HEADS, DIM), generator=g), weight=weight, cos=cos, sin=sin, eps=1e-6)


def _write_rows(t: int, g: torch.Generator) -> dict[str, Any]:
    cos, sin = _cos_sin(t, g)
    return dict(
        x=torch.randn((t, DIM), generator=g),
        weight=1 + 0.1 * torch.randn(DIM, generator=g),
        cos=cos,
        sin=sin,
        eps=1e-6,
        rows=stored(torch.zeros(t + 9, DIM), 8),
        target=torch.randperm(t + 9, generator=g)[:t],
    )


def _copy_rows(t: int, g: torch.Generator) -> dict[str, Any]:
    return dict(
        source=stored(torch.randn((t + 5, DIM), generator=g), 4, "fp8_ds_mla"),
        ids=torch.randint(0, t + 5, (t,), generator=g),
        rows=stored(torch.zeros(t + 9, DIM), 8, "fp8_ds_mla"),
        target=torch.where(torch.arange(t) % 5 == 3, -1, torch.randperm(t + 9, generator=g)[:t]),
    )


def _compress(t: int, g: torch.Generator) -> dict[str, Any]:
    """Overlapping blocks for odd t, plain ones for even."""
    step, halves = _two_rows(t), 1 + t % 2
    n, blocks = len(step.token_ids), step.blocks[RATIO]
    cos, sin = _cos_sin(len(blocks.first), g)
    state = torch.randn((3, halves, 2, DIM), generator=g)
    state[2, :, 0], state[2, :, 1] = 0, -torch.inf  # the row that starts at position 0
    return dict(
        projected=torch.randn((n, 2 * halves * DIM), generator=g),
        ape=torch.randn((RATIO, halves * DIM), generator=g),
        state=state,
        tokens=step.tokens,
        blocks=blocks,
        weight=1 + 0.1 * torch.randn(DIM, generator=g),
        cos=cos,
        sin=sin,
        eps=1e-6,
        dtype=torch.float32,
        rows=stored(torch.zeros(3 * BLOCKS * BLOCK_TOKENS // RATIO, DIM), BLOCK_TOKENS // RATIO),
        left=torch.zeros((4, halves, 2, DIM)),
        left_to=torch.tensor([3, -1, 0]),
    )


def _two_rows(t: int) -> Step:
    return step_of((150, t), (37, 1), (0, max(1, t // 2)))


def _index_select(t: int, g: torch.Generator) -> dict[str, Any]:
    step = _two_rows(t)
    n = len(step.token_ids)
    cos, sin = _cos_sin(n, g)
    return dict(
        q=torch.randn((n, INDEX_HEADS, INDEX_DIM), generator=g),
        cos=cos,
        sin=sin,
        weights=torch.randn((n, INDEX_HEADS), generator=g),
        keys=history_rows(g, 3, INDEX_DIM),
        tokens=step.tokens,
        entries=step.entries[RATIO],
        topk=8,
    )


def _index_candidates(t: int, g: torch.Generator) -> dict[str, Any]:
    return _index_select(t, g) | dict(into=None)


def _sparse_attention(t: int, g: torch.Generator) -> dict[str, Any]:
    """Selected entries for odd t, all visible ones for even."""
    step = _two_rows(t)
    n = len(step.token_ids)
    cos, sin = _cos_sin(n, g)
    chosen = torch.stack([torch.randperm(5, generator=g)[:3].sort().values for _ in range(n)]).int()
    selected = torch.where(chosen < step.entries[RATIO].visible[:, None], chosen, -1)
    return dict(
        q=torch.randn((n, HEADS, DIM), generator=g),
        sink=torch.randn(HEADS, generator=g),
        scale=DIM**-0.5,
        cos=cos,
        sin=sin,
        tokens=step.tokens,
        window=window_rows(step, g, DIM),
        window_ids=step.window.ids,
        history=history_rows(g, 3, DIM),
        entries=step.entries[RATIO],
        selected=selected.sort(descending=True).values if t % 2 else None,
    )


def _partial_attention(t: int, g: torch.Generator) -> dict[str, Any]:
    """With a token that has no key in this part."""
    args = _sparse_attention(t, g)
    args["window_ids"] = torch.where(args["window_ids"] % 3 == 1, args["window_ids"], -1)
    args["window_ids"][0], args["entries"].visible[0] = -1, 0
    if args["selected"] is not None:
        args["selected"][0] = -1
    return partial_args(args)


def partial_args(args: dict[str, Any]) -> dict[str, Any]:
    """What `partial_attention` takes, of arguments of `sparse_attention` that have -1 after the last of each list."""
    known = {name: args[name] for name in args if name not in ("sink", "cos", "sin")}
    selected = args["selected"]
    count = None if selected is None else (selected >= 0).sum(-1, dtype=torch.int32)
    return known | dict(count=count, into=None)


def _merge_attention(t: int, g: torch.Generator) -> dict[str, Any]:
    cos, sin = _cos_sin(t, g)
    lse = 3 * torch.randn((3, t, HEADS), generator=g)
    lse[1, ::2], lse[:, 0, 0] = -torch.inf, -torch.inf
    o = torch.randn((3, t, HEADS, DIM), generator=g).masked_fill(lse[..., None] == -torch.inf, 0)
    return dict(o=o, lse=lse, sink=torch.randn(HEADS, generator=g), cos=cos, sin=sin)


def _merge_candidates(t: int, g: torch.Generator) -> dict[str, Any]:
    """Lists of 0 to 6 entries with scores that tie often, one of them nowhere finite."""
    number = torch.arange(30).expand(3, t, 30)
    chosen = torch.rand(number.shape, generator=g).argsort(-1)[..., :6].sort(-1).values.int()
    held = torch.arange(6) < torch.randint(0, 7, (3, t, 1), generator=g)
    scores = torch.randint(-2, 3, chosen.shape, generator=g).float()
    scores[1, ::5] = -torch.inf
    return dict(selected=torch.where(held, chosen, -1), scores=scores.masked_fill(~held, -torch.inf), topk=8)


def _entries_of_part(t: int, g: torch.Generator) -> dict[str, Any]:
    """Lists of which a part has all, none or some, and an empty one."""
    number = torch.rand((t, 90), generator=g).argsort(-1)[:, :20].sort(-1).values
    number[::4] = 3 * torch.arange(20) + t % 3
    held = torch.arange(20) < torch.randint(0, 21, (t, 1), generator=g)
    return dict(selected=torch.where(held, number, -1).int(), part=1, parts=3)


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


def _experts(t: int, g: torch.Generator, inner: int = 40) -> dict[str, Any]:
    w = lambda *shape: torch.randn(shape, generator=g) / shape[-1] ** 0.5  # noqa: E731
    return dict(
        x=torch.randn((t, D), generator=g),
        experts=torch.rand((t, 8), generator=g).argsort(-1)[:, :3],
        weights=torch.rand((t, 3), generator=g),
        w=Gated(w(8, inner, D), w(8, inner, D), w(8, D, inner)),
        limit=0.7,
        shared=torch.randn((t, D), generator=g) if t % 2 else None,
    )


def _swiglu(t: int, g: torch.Generator) -> dict[str, Any]:
    case = _experts(t, g)
    return dict(x=case["x"], w=Gated(*(m[0] for m in case["w"])), limit=0.7)


def _linear(rows: int) -> Callable[[int, torch.Generator], dict[str, Any]]:
    return lambda t, g: dict(
        x=torch.randn((t, D), generator=g), weight=torch.randn((rows, D), generator=g) / 10
    )


def fp8_weight(*shape: int, g: torch.Generator) -> Fp8Weight:
    """Random codes and scales, decoding to float32 of a size that keeps products near 1."""
    *lead, out, width = shape
    scales = torch.randint(
        116, 120, (*lead, -(-out // 128), -(-width // 128)), generator=g, dtype=torch.uint8
    )
    codes = (64 * torch.randn(shape, generator=g)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return Fp8Weight(codes, scales, torch.float32)


def fp4_weight(*shape: int, g: torch.Generator) -> Fp4Weight:
    """The same in FP4."""
    *lead, width = shape
    codes = torch.randint(0, 256, (*lead, width // 2), generator=g, dtype=torch.uint8)
    scales = torch.randint(120, 124, (*lead, width // 32), generator=g, dtype=torch.uint8)
    return Fp4Weight(codes, scales, torch.float32)


def quantised(op: str, t: int, seed: int = 0) -> dict[str, Any]:
    """The op's case with FP8 weights, experts with FP4."""
    g = _g(seed + t)
    if op == "linear":
        return dict(x=torch.randn((t, D), generator=g), weight=fp8_weight(136, D, g=g))
    if op == "grouped_linear":
        return dict(x=torch.randn((t, 2, D), generator=g), weight=fp8_weight(2 * 24, D, g=g))
    if op == "swiglu":
        w = Gated(fp8_weight(40, D, g=g), fp8_weight(40, D, g=g), fp8_weight(D, 40, g=g))
        return dict(x=torch.randn((t, D), generator=g), w=w, limit=0.7)
    w = Gated(fp4_weight(8, 64, D, g=g), fp4_weight(8, 64, D, g=g), fp4_weight(8, D, 64, g=g))
    return {**_experts(t, g), "w": w}


QUANTISED = ("linear", "grouped_linear", "experts", "swiglu")
"""Ops whose weights the release quantises."""


def each_weight(value: Weight | Gated, f: Callable[[Weight], Weight]) -> Weight | Gated:
    """f of a weight, or of each of three."""
    return Gated(*map(f, value)) if isinstance(value, Gated) else f(value)


def _edit_logits(t: int, g: torch.Generator) -> dict[str, Any]:
    """Four rows of tables: one that changes nothing, one with a bias, one with penalties, one with all and a minimum length."""
    bias, penalties = torch.zeros((4, 300)), torch.tensor([[1.0, 0.0, 0.0]]).repeat(4, 1)
    bias[1::2] = torch.randn((2, 300), generator=g) * (torch.rand((2, 300), generator=g) < 0.1)
    penalties[2:] = torch.tensor([[1.3, 0.5, -0.25], [0.7, -1.0, 2.0]])
    marks = torch.randint(0, 4, (4, 300), generator=g) * (torch.rand((4, 300), generator=g) < 0.2)
    marks += PROMPT * (torch.rand((4, 300), generator=g) < 0.3)
    marks[:, 7:9] += END
    return dict(
        logits=2 * torch.randn((t, 300), generator=g),
        row=torch.arange(t) % 4,
        bias=bias,
        marks=marks.int(),
        penalties=penalties,
        until=torch.tensor([0, 0, 0, 40]),
        position=torch.randint(0, 80, (t,), generator=g),
    )


def _mask_logits(t: int, g: torch.Generator) -> dict[str, Any]:
    """Five masks: of random bits, with none and with all of them; every third row has none, and some are broken."""
    logits = torch.randn((t, 300), generator=g)
    logits[2::7, 5] = torch.inf
    masks = torch.randint(-(2**31), 2**31, (5, 10), generator=g).int()
    masks[3], masks[4] = 0, -1
    turn = torch.arange(t)
    return dict(logits=logits, row=torch.where(turn % 3 == 1, -1, turn % 5), masks=masks)


def _sample(t: int, g: torch.Generator) -> dict[str, Any]:
    """Greedy, unfiltered, and each filter alone and with the others, in turn; a row with ties, one with an infinity."""
    logits = 2 * torch.randn((t, 300), generator=g)
    logits[3::7] = logits[3::7].round()
    logits[5::11, 7] = torch.inf
    turn = torch.arange(t)
    knobs = (
        torch.where(turn % 5 == 1, 0.0, 0.3 + torch.rand(t, generator=g).double()),
        torch.where(turn % 3 == 0, 1 + turn % 40, 0).double(),
        torch.where(turn % 4 == 0, 0.05 + 0.9 * torch.rand(t, generator=g).double(), 1.0),
        torch.where(turn % 6 == 2, 0.05, 0.0).double(),
    )
    return dict(
        logits=logits,
        knobs=torch.stack(knobs, dim=1),
        seed=torch.randint(-(2**63), 2**63 - 1, (t,), generator=g),
        position=torch.randint(0, 2**34, (t,), generator=g),
        filtered=True,
    )


def _copy_state(t: int, g: torch.Generator) -> dict[str, Any]:
    """A ring, rows of two planes and a pool; a snapshot saved, one restored, a slab emptied, whose pages lie scattered."""
    spans = (
        Span(16, 24, 8, 5, 0, pool=False),
        Span(208, 8, 8, 5, 120, pool=False),
        Span(272, 32, 4, 2, 160, pool=True),
    )
    numbers = lambda *shape: torch.randint(0, 120, shape, generator=g, dtype=torch.uint8)  # noqa: E731
    order = torch.randperm(12, generator=g).tolist()
    jobs = [(SAVE, 2, 3 + t, *order[:4]), (RESTORE, 0, 5 + 2 * t, *order[4:8]), (RESET, 3)]
    return dict(pages=numbers(12, 64), slabs=numbers(4, 416), state=StateTable(spans), jobs=jobs)


def _decode_tables(t: int, g: torch.Generator) -> dict[str, Any]:
    """Rows that end blocks of both ratios and of pages, begin, or are padding of one slab at position 0; every third token is one of the
    newest. The last of three parts for odd t, the whole for even."""
    table = lambda: tuple(torch.randn((2, 400, ROPE // 2), generator=g).unbind())  # noqa: E731
    positions = torch.randint(0, 400, (t,), generator=g)
    ends = torch.tensor([31, 0, 383, 128, 127, 95, 3, 2])[: max(1, t - 2)]
    positions[: len(ends)] = ends
    slabs = torch.randperm(t + 1, generator=g)[:t]
    if t > 3:
        positions[-2:], slabs[-2:] = 0, t
    tokens = torch.randint(0, 900, (t,), generator=g)
    return dict(
        token_ids=torch.where(torch.arange(t) % 3 == 0, -1 - torch.arange(t), tokens),
        positions=positions,
        slabs=slabs,
        pages=torch.randperm((t + 1) * BLOCKS, generator=g).int().view(t + 1, BLOCKS),
        newest=torch.randint(0, 900, (t,), generator=g),
        turns=(table(), table())[: 1 + t // 2],
        ratios=(4, 8, 16),
        block_tokens=48,
        window=WINDOW,
        ring=24,
        part=2 * (t % 2),
        parts=1 + 2 * (t % 2),
    )


CASES: dict[str, Callable[[int, torch.Generator], dict[str, Any]]] = {
    "decode_tables": _decode_tables,
    "linear": _linear(24),
    "linear_f32": _linear(24),
    "grouped_linear": lambda t, g: dict(
        x=torch.randn((t, 2, D), generator=g), weight=torch.randn((2 * 24, D), generator=g) / 10
    ),
    "logits": _linear(50),
    "rmsnorm": lambda t, g: dict(
        x=torch.randn((t, D), generator=g), weight=torch.randn(D, generator=g) if t % 2 else None, eps=1e-6
    ),
    "rmsnorm_quantised": lambda t, g: CASES["rmsnorm"](t, g),
    "norm_rope": _norm_rope,
    "write_rows": _write_rows,
    "copy_rows": _copy_rows,
    "copy_state": _copy_state,
    "hc_next": _hc_next,
    "hc_post": _hc_post,
    "hc_head": lambda t, g: _hyper(t, g, 4, 1),
    "compress": _compress,
    "index_select": _index_select,
    "index_candidates": _index_candidates,
    "merge_candidates": _merge_candidates,
    "entries_of_part": _entries_of_part,
    "sparse_attention": _sparse_attention,
    "partial_attention": _partial_attention,
    "merge_attention": _merge_attention,
    "route": _route,
    "experts": _experts,
    "swiglu": _swiglu,
    "edit_logits": _edit_logits,
    "mask_logits": _mask_logits,
    "sample": _sample,
}


def case(op: str, tokens: int, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for `op` with about `tokens` tokens."""
    return CASES[op](tokens, _g(seed + tokens))


def moved_table(table: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """The table with `move` applied to every tensor."""
    values = {f.name: getattr(table, f.name) for f in fields(table) if f.init and not f.name.startswith("_")}
    return type(table)(**{k: move(v) if isinstance(v, Tensor) else v for k, v in values.items()})


def moved(args: dict[str, Any], device: str) -> dict[str, Any]:
    """A copy of the arguments on a device."""

    def move(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(device, copy=True)
        if isinstance(x, Rows):  # with the bytes around it and the stride between pages
            storage = x.region.as_strided((len(x.region), x.region.stride(0)), x.region.stride(), 0)
            region = storage.to(device, copy=True)[:, x.region.storage_offset() :][:, : x.region.shape[1]]
            return Rows(x.codec, region, x.rows)
        if isinstance(x, Gated):
            return Gated(*map(move, x))
        if isinstance(x, tuple):
            return tuple(map(move, x))
        if is_dataclass(x) and not isinstance(x, type):
            return moved_table(x, move)
        return x

    return {name: move(value) for name, value in args.items()}


def outcome(op: str, run: Callable[..., Any], args: dict[str, Any]) -> tuple[Tensor, ...]:
    """What an op gives: its results, and what it wrote (rows decoded, unwritten ones as zeros). Changes `args`."""
    result = run(**args)
    several = isinstance(result, tuple) and not isinstance(result, Quantised)
    found = () if result is None else tuple(map(plain, result)) if several else (plain(result),)
    for name in SPECS[op].writes:
        x = args[name]
        if isinstance(x, Rows):
            x = x.read(torch.arange(len(x.region) * x.rows, device=x.region.device)).nan_to_num()
        found += (x,)
    return found
