"""The reference ops against their formulas, written out in float64, one token at a time where that is
plainer."""

from __future__ import annotations

import math

import pytest
import torch
from dsv4.ops.reference import attention, blocks, index
from dsv4.ops.reference.index import lowest_index_topk
from dsv4.ops.registry import Ops
from dsv4.ops.spec import SPECS
from torch import Tensor
from torch.nn import functional as F

from tests.ops.cases import RATIO, WINDOW, case, step_of

OPS = Ops.choose("reference")


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


def _hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = torch.einsum("tij,tid->tjd", comb.double(), streams.double())
    return torch.einsum("tj,td->tjd", post.double(), y.double()) + mixed


def _hc_head(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, hc_eps: float
) -> Tensor:
    pre = torch.sigmoid(_mix(streams, fn, norm_eps) * scale + base) + hc_eps
    return torch.einsum("ti,tid->td", pre, streams.double())


def _pool_fold(
    value: Tensor, lse: Tensor, kv: Tensor, score: Tensor, first: Tensor, count: Tensor
) -> tuple[Tensor, ...]:
    values, totals = [], []
    for b in range(len(first)):
        at = slice(int(first[b]), int(first[b] + count[b]))
        slots = torch.cat((value[b : b + 1], kv[at])).double()
        scores = torch.cat((lse[b : b + 1], score[at])).double()
        values.append((torch.softmax(scores, 0) * slots).sum(0))
        totals.append(torch.logsumexp(scores, 0))
    return torch.stack(values), torch.stack(totals)


def _route(
    x: Tensor, gate: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float
) -> tuple[Tensor, ...]:
    s = F.softplus(x.double() @ gate.double().T).sqrt()
    if chosen is None:
        chosen = (s + bias).topk(k).indices.sort().values
    picked = s.gather(1, chosen)
    return chosen, picked / picked.sum(-1, keepdim=True) * scale


def _experts(
    x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float
) -> Tensor:
    out = torch.zeros_like(x, dtype=torch.float64)
    for t in range(len(x)):
        for e, w in zip(experts[t].tolist(), weights[t].tolist(), strict=True):
            out[t] += w * _swiglu(x[t], w1[e], w3[e], w2[e], limit)
    return out


def _swiglu(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float) -> Tensor:
    a, b = (x.double() @ w1.double().T).clamp(max=limit), (x.double() @ w3.double().T).clamp(-limit, limit)
    return (F.silu(a) * b) @ w2.double().T


FORMULAS = {
    "linear": lambda x, weight: x.double() @ weight.double().T,
    "grouped_linear": lambda x, weight: torch.einsum("tgi,goi->tgo", x.double(), weight.double()),
    "logits": lambda x, weight: x.double() @ weight.double().T,
    "rmsnorm": _rmsnorm,
    "rope": _rope,
    "hc_pre": _hc_pre,
    "hc_post": _hc_post,
    "hc_head": _hc_head,
    "pool_fold": _pool_fold,
    "compress_finish": lambda pooled, weight, cos, sin, eps: _rope(_rmsnorm(pooled, weight, eps), cos, sin),
    "route": _route,
    "experts": _experts,
    "swiglu": _swiglu,
}
"""`index_select` and `sparse_attention` need the step's rows and have tests of their own below."""


@pytest.mark.parametrize("op", FORMULAS)
@pytest.mark.parametrize("tokens", [1, 6, 21])
def test_formula(op: str, tokens: int) -> None:
    args = case(op, tokens)
    got, expected = getattr(OPS, op)(**args), FORMULAS[op](**args)
    for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (got, expected)), strict=True):
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


@pytest.mark.parametrize("tokens", [1, 6, 21])
def test_index_select(tokens: int, pieces: None) -> None:
    args, step = case("index_select", tokens), step_of((150, tokens), (37, 1), (0, max(1, tokens // 2)))
    got = OPS.index_select(**args)
    for t, visible in enumerate(_seen(step.positions)):
        keys = args["keys"].read(args["entries"].ids[args["entries"].row[t], :visible]).double()
        dots = torch.relu(args["q"][t].double() @ keys.T)
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
    past = len(step.window.past)
    for t, position in enumerate(step.positions.tolist()):
        row = step.rows[int(entries.row[t])]
        own = range(max(row.start, position - WINDOW + 1), position + 1)
        old = range(max(0, position - WINDOW + 1), min(row.start, position + 1))
        index = [past + row.offset + p - row.start for p in own]
        index += [int(entries.row[t]) * WINDOW + p - (row.start - WINDOW) for p in old]
        chosen = (
            list(range((position + 1) // RATIO))
            if selected is None
            else [e for e in selected[t].tolist() if e >= 0]
        )
        compressed = args["history"].read(entries.ids[entries.row[t], chosen])
        rows = torch.cat((args["window_rows"][index], compressed)).double()
        z = torch.cat((args["q"][t].double() @ rows.T * args["scale"], args["sink"][:, None].double()), dim=1)
        expected = torch.softmax(z, -1)[:, :-1] @ rows
        assert (got[t] - expected).abs().max() <= 1e-5


def test_attention_without_keys_but_itself() -> None:
    """The first token of a sequence: its own row against the sink."""
    args, step = case("sparse_attention", 1), step_of((0, 1))
    rows = torch.randn(WINDOW + 2, args["q"].shape[-1])
    got = OPS.sparse_attention(args["q"][:1], args["sink"], 1.0, step.tiles, rows, step.window.keys)
    z = args["q"][0].double() @ rows[WINDOW].double()
    weight = torch.exp(z) / (torch.exp(z) + torch.exp(args["sink"].double()))
    assert torch.allclose(got[0].double(), weight[:, None] * rows[WINDOW].double(), atol=1e-5)


def test_topk_breaks_ties_by_lowest_index() -> None:
    scores = torch.tensor([[1.0, 0, 2, 0, 0, 2], [0, 0, 0, 0, 0, 0], [3, math.inf, -math.inf, 1, 2, 0]])
    got = lowest_index_topk(scores, torch.tensor([6, 4, 2]), 4)
    assert got.tolist() == [[0, 1, 2, 5], [0, 1, 2, 3], [0, 1, -1, -1]]


def test_topk_keeps_damage_in_its_row() -> None:
    scores = torch.tensor([[1.0, 3, 2], [math.nan, math.nan, 0]])
    assert lowest_index_topk(scores, torch.tensor([3, 3]), 2).tolist() == [[1, 2], [0, 2]]
