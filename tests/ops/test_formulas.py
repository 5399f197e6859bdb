"""The reference ops against their formulas, written out in float64, one token at a time where that is
plainer."""

from __future__ import annotations

import math

import pytest
import torch
from dsv4.backends import choose
from dsv4.cache.rows import Rows
from dsv4.model.batch import Row
from dsv4.model.step import Step
from dsv4.ops.reference import attention, blocks, index
from dsv4.ops.reference.index import lowest_index_topk
from dsv4.ops.reference.norm import rope
from dsv4.ops.spec import SPECS
from dsv4.ops.weight import Gated
from torch import Tensor
from torch.nn import functional as F

from tests.ops.cases import RATIO, WINDOW, case, outcome, step_of

OPS = choose("reference")


def _rmsnorm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x.double() / (x.double() ** 2).mean(-1, keepdim=True).add(eps).sqrt()
    return y if weight is None else y * weight.double()


def _rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    out = x.double().clone()
    for t in range(len(x)):
        for j in range(cos.shape[1]):
            turn = complex(cos[t, j], -sin[t, j] if inverse else sin[t, j])
            at = x.shape[-1] - 2 * cos.shape[1] + 2 * j
            pair = torch.complex(x[t, ..., at].double(), x[t, ..., at + 1].double()) * turn
            out[t, ..., at], out[t, ..., at + 1] = pair.real, pair.imag
    return out


def _mix(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    v = streams.flatten(1).double()
    return v @ fn.double().T / ((v**2).mean(-1, keepdim=True) + eps).sqrt()


def _hc_pre(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, hc_eps: float, iters: int
) -> tuple[Tensor, ...]:
    m = _mix(streams, fn, norm_eps)
    pre = torch.sigmoid(m[:, :4] * scale[0] + base[:4]) + hc_eps
    post = 2 * torch.sigmoid(m[:, 4:8] * scale[1] + base[4:8])
    a = torch.softmax((m[:, 8:] * scale[2] + base[8:]).view(-1, 4, 4), -1) + hc_eps
    a = a / (a.sum(1, keepdim=True) + hc_eps)
    for _ in range(iters - 1):
        a = a / (a.sum(2, keepdim=True) + hc_eps)
        a = a / (a.sum(1, keepdim=True) + hc_eps)
    return torch.einsum("ti,tid->td", pre, streams.double()), post, a


def _hc_next(
    y: Tensor | None, streams: Tensor, post: Tensor, comb: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float,
    hc_eps: float, iters: int, weight: Tensor, eps: float, quantised: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    if y is not None:
        streams = _hc_post(y, streams, post, comb)
    x, post, comb = _hc_pre(streams, fn, scale, base, norm_eps, hc_eps, iters)
    return _rmsnorm(x, weight, eps), streams, post, comb


def _hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = torch.einsum("tij,tid->tjd", comb.double(), streams.double())
    return torch.einsum("tj,td->tjd", post.double(), y.double()) + mixed


def _hc_head(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, hc_eps: float
) -> Tensor:
    pre = torch.sigmoid(_mix(streams, fn, norm_eps) * scale + base) + hc_eps
    return torch.einsum("ti,tid->td", pre, streams.double())


def _norm_rope(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return _rope(_rmsnorm(x, weight, eps), cos, sin)


def _pooled(values: Tensor, scores: Tensor) -> Tensor:
    return (torch.softmax(scores.double(), 0) * values.double()).sum(0)


def _route(
    x: Tensor, gate: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float
) -> tuple[Tensor, ...]:
    s = F.softplus(x.double() @ gate.double().T).sqrt()
    if chosen is None:
        chosen = (s + bias).topk(k).indices.sort().values
    picked = s.gather(1, chosen)
    return chosen, picked / picked.sum(-1, keepdim=True) * scale


def _experts(
    x: Tensor, experts: Tensor, weights: Tensor, w: Gated, limit: float, shared: Tensor | None
) -> Tensor:
    out = torch.zeros_like(x, dtype=torch.float64) if shared is None else shared.double()
    for t in range(len(x)):
        for e, r in zip(experts[t].tolist(), weights[t].tolist(), strict=True):
            out[t] += r * _swiglu(x[t], Gated(*(m[e] for m in w)), limit)
    return out


def _swiglu(x: Tensor, w: Gated, limit: float) -> Tensor:
    w1, w3, w2 = (m.double() for m in w)
    a, b = (x.double() @ w1.T).clamp(max=limit), (x.double() @ w3.T).clamp(-limit, limit)
    return (F.silu(a) * b) @ w2.T


FORMULAS = {
    "linear": lambda x, weight: x.double() @ weight.double().T,
    "linear_f32": lambda x, weight: x.double() @ weight.double().T,
    "grouped_linear": lambda x, weight: torch.einsum(
        "tgi,goi->tgo", x.double(), weight.double().unflatten(0, (x.shape[1], -1))
    ),
    "logits": lambda x, weight: x.double() @ weight.double().T,
    "rmsnorm": _rmsnorm,
    "norm_rope": _norm_rope,
    "hc_next": _hc_next,
    "hc_post": _hc_post,
    "hc_head": _hc_head,
    "route": _route,
    "experts": _experts,
    "swiglu": _swiglu,
}
"""Ops that need the step's rows have tests of their own below."""


@pytest.mark.parametrize("op", FORMULAS)
@pytest.mark.parametrize("tokens", [1, 6, 21])
def test_formula(op: str, tokens: int) -> None:
    args = case(op, tokens)
    expected = FORMULAS[op](**args)
    got = outcome(op, getattr(OPS, op), args)
    for a, b in zip(got, (expected,) if isinstance(expected, Tensor) else expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 10 * SPECS[op].tolerance  # sums of unit terms, float32 against float64


@pytest.fixture(params=[False, True], ids=["whole", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as it is and once with blocks and scratch so small that every loop over tiles and keys takes
    several turns."""
    if request.param:
        monkeypatch.setattr(attention, "KEY_BLOCK", 8)
        monkeypatch.setattr(index, "INDEX_BLOCK", 8)
        monkeypatch.setattr(blocks, "SCRATCH", 1)


def _seen(positions: Tensor) -> list[int]:
    return [(t + 1) // RATIO for t in positions.tolist()]


def test_rope_back_and_forth() -> None:
    args = case("norm_rope", 6)
    x, cos, sin = args["x"], args["cos"], args["sin"]
    assert (rope(x, cos, sin, inverse=True) - _rope(x, cos, sin, inverse=True)).abs().max() <= 1e-5
    assert (rope(rope(x, cos, sin), cos, sin, inverse=True) - x).abs().max() <= 1e-5


@pytest.mark.parametrize("tokens", [1, 6, 21])
def test_write_rows(tokens: int) -> None:
    args = case("write_rows", tokens)
    before = args["rows"].read(torch.arange(tokens + 9))
    OPS.write_rows(**args)
    names = ("x", "weight", "cos", "sin", "eps")
    before[args["target"]] = _norm_rope(*(args[n] for n in names)).float()
    assert (args["rows"].read(torch.arange(tokens + 9)) - before).abs().max() <= 1e-5


def test_copy_rows_keeps_the_bytes() -> None:
    args = case("copy_rows", 6)
    source, rows = args["source"], args["rows"]
    before = rows.region.clone()
    OPS.copy_rows(**args)
    at, to = args["ids"][args["target"] >= 0], args["target"][args["target"] >= 0]
    left = torch.ones(rows.region.shape[0] * rows.rows, dtype=torch.bool)
    left[to] = False
    assert len(at) < 6 and torch.equal(rows.read(to), source.read(at))
    for old, new, was in zip(source.planes(), rows.planes(), Rows(rows.codec, before, rows.rows).planes(), strict=True):  # fmt: skip
        assert torch.equal(new.flatten(0, 1)[left], was.flatten(0, 1)[left])
        assert torch.equal(new[to // rows.rows, to % rows.rows], old[at // source.rows, at % source.rows])


def rows_of(step: Step) -> list[Row]:
    of = step.tokens
    return [Row(*map(int, row)) for row in zip(of.slabs, of.start, of.length, of.offset, strict=True)]


@pytest.mark.parametrize("tokens", [1, 2, 6, 21])
def test_compress(tokens: int) -> None:
    """Every entry that a step completes, from its slots: what was carried, then the step's tokens."""
    step, args = step_of((150, tokens), (37, 1), (0, max(1, tokens // 2))), case("compress", tokens)
    state, halves = args["state"].clone(), args["state"].shape[1]
    OPS.compress(**args)
    kv, score = args["projected"].unflatten(1, (2, halves, -1)).unbind(1)
    ape = args["ape"].unflatten(1, (halves, -1))
    for row in rows_of(step):
        carried = [state[row.slab, i].split(1) for i in range(halves)]  # (value, lse) of each pool
        slots = [([c[0]], [c[1]]) for c in carried]
        for t in range(row.offset, row.offset + row.length):
            position = int(step.tokens.position[t])
            place, block = position % RATIO, position // RATIO
            lo_hi = [(kv[t, i, None], (score[t, i] + ape[place, i])[None]) for i in range(halves)]
            for (values, scores), (v, s) in zip(slots, lo_hi[::-1], strict=True):
                values.append(v)
                scores.append(s)
            if place < RATIO - 1:
                continue
            pooled = _pooled(torch.cat(slots[0][0]), torch.cat(slots[0][1]))[None]
            b = int(torch.searchsorted(step.blocks[RATIO].first, t, right=True)) - 1
            expected = _norm_rope(
                pooled, args["weight"], args["cos"][b : b + 1], args["sin"][b : b + 1], 1e-6
            )
            got = args["rows"].read(step.entries[RATIO].locate(torch.tensor(row.slab), torch.tensor([block])))
            assert (got - expected).abs().max() <= 1e-5
            empty = ([torch.zeros(1, kv.shape[-1])], [torch.full((1, kv.shape[-1]), -torch.inf)])
            slots = [slots[1], empty] if halves == 2 else [empty]


@pytest.mark.parametrize("tokens", [1, 6, 21])
def test_index_select(tokens: int, pieces: None) -> None:
    args, step = case("index_select", tokens), step_of((150, tokens), (37, 1), (0, max(1, tokens // 2)))
    got = OPS.index_select(**args)
    q = _rope(args["q"], args["cos"], args["sin"])
    for t, visible in enumerate(_seen(step.tokens.position)):
        at = args["entries"].locate(step.tokens.slab[t], torch.arange(visible))
        dots = torch.relu(q[t] @ args["keys"].read(at).double().T)
        scores = (args["weights"][t].double() @ dots).tolist()
        expected = sorted(sorted(range(visible), key=lambda e: (-scores[e], e))[:8])
        assert got[t].tolist() == expected + [-1] * (got.shape[1] - len(expected))


def test_index_select_takes_everything_when_little_is_visible() -> None:
    args = case("index_select", 6) | dict(topk=500)
    got = OPS.index_select(**args)
    assert [row[row >= 0].tolist() for row in got] == [
        list(range(v)) for v in args["entries"].visible.tolist()
    ]


@pytest.mark.parametrize("tokens", [1, 6, 21, 64])
def test_sparse_attention(tokens: int, pieces: None) -> None:
    args, step = case("sparse_attention", tokens), step_of((150, tokens), (37, 1), (0, max(1, tokens // 2)))
    got, entries, selected = OPS.sparse_attention(**args), args["entries"], args["selected"]
    for t, position in enumerate(step.tokens.position.tolist()):
        row = rows_of(step)[int(step.tokens.row[t])]
        seen = range(max(0, position - WINDOW + 1), position + 1)
        if step.window.direct:
            index = [row.slab * WINDOW + p % WINDOW for p in seen]
        else:
            past = len(step.window.past)
            old = int(step.tokens.row[t]) * WINDOW - (row.start - WINDOW)
            index = [old + p if p < row.start else past + row.offset + p - row.start for p in seen]
        chosen = (
            list(range((position + 1) // RATIO))
            if selected is None
            else [e for e in selected[t].tolist() if e >= 0]
        )
        at = entries.locate(step.tokens.slab[t], torch.tensor(chosen, dtype=torch.int64))
        rows = torch.cat((args["window"].read(torch.tensor(index)), args["history"].read(at))).double()
        z = torch.cat((args["q"][t].double() @ rows.T * args["scale"], args["sink"][:, None].double()), dim=1)
        expected = (torch.softmax(z, -1)[:, :-1] @ rows)[None]
        expected = _rope(expected, args["cos"][t : t + 1], args["sin"][t : t + 1], inverse=True)[0]
        assert (got[t] - expected).abs().max() <= 1e-5


def test_attention_without_keys_but_itself() -> None:
    """The first token of a sequence: its own row against the sink."""
    args, step = case("sparse_attention", 1), step_of((0, 1))
    rows = args["window"]
    cos, sin = torch.ones_like(args["cos"][:1]), torch.zeros_like(args["sin"][:1])
    got = OPS.sparse_attention(args["q"][:1], args["sink"], 1.0, cos, sin, step.tokens, rows, step.window.ids)
    own = rows.read(step.window.target)[0].double()
    z = args["q"][0].double() @ own
    weight = torch.exp(z) / (torch.exp(z) + torch.exp(args["sink"].double()))
    assert torch.allclose(got[0].double(), weight[:, None] * own, atol=1e-5)


def test_topk_breaks_ties_by_lowest_index() -> None:
    scores = torch.tensor([[1.0, 0, 2, 0, 0, 2], [0, 0, 0, 0, 0, 0], [3, math.inf, -math.inf, 1, 2, 0]])
    got = lowest_index_topk(scores, torch.tensor([6, 4, 2]), 4)
    assert got.tolist() == [[0, 1, 2, 5], [0, 1, 2, 3], [0, 1, -1, -1]]


def test_topk_keeps_damage_in_its_row() -> None:
    scores = torch.tensor([[1.0, 3, 2], [math.nan, math.nan, 0]])
    assert lowest_index_topk(scores, torch.tensor([3, 3]), 2).tolist() == [[1, 2], [0, 2]]
