"""Routed FP4 experts of Flash and Pro, from router to sum: scores and choice of 6 experts, plan, quantisation, both
products, sum over experts and the shared expert's result. The router is random, so experts are hit at random. Where the
Gluon form takes a shape, it has a row of its own. Rows "experts" are a decode step's: without the router, whose load is uneven
as that of the weights made up by `--load-format dummy`, several layers one after the other in one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from dsv4.formats import fp4_decode, fp4_unpack, ue8m0_decode
from dsv4.kernels.gluon import moe as gluon
from dsv4.kernels.gluon.forms import MANY
from dsv4.kernels.triton.common import capability
from dsv4.kernels.triton.fits import narrow_scales
from dsv4.kernels.triton.forms import ONE_LAUNCH, ROUTE_TOKENS
from dsv4.kernels.triton.moe import run
from dsv4.kernels.triton.moe_few import run_few
from dsv4.kernels.triton.moe_pack import PackedExperts, pack
from dsv4.kernels.triton.route import few_route, many_route
from torch import Tensor

from benches.gpu.timing import Bench, Row, max_abs_err

SHAPES = {"Flash": (256, 4096, 2048), "Pro": (384, 7168, 3072)}
"""experts, hidden size, size of an expert."""

TOKENS = (1, 2, 8, 32, 128, 512, 2048, 8192)
TOPK, LIMIT = 6, 10.0
DECODED = (1, 2, 4, 8, 16, 32, 64, 128)
"""Tokens of the rows "experts"."""
SKEW = 0.2
"""How much of a token's direction all have in common. Of 1,500 tokens the busiest of 256 experts then takes 4.9 times the mean, and the
effective number of experts is 86%: as with made-up weights (`dsv4/model/dummy.py`)."""
LAYERS = 4
"""Calls of a graph, each with tokens of its own."""


class Experts:
    """Random experts: expert e's codes are those of e % DISTINCT, so that a reference stays small."""

    DISTINCT = 4

    def __init__(self, count: int, dim: int, inner: int, device: torch.device) -> None:
        def some(n: int, k: int) -> tuple[Tensor, Tensor]:
            codes = torch.randint(0, 256, (self.DISTINCT, n, k // 2), device=device, dtype=torch.uint8)
            return codes, torch.randint(
                116, 121, (self.DISTINCT, n, k // 32), device=device, dtype=torch.uint8
            )

        self.w1, self.w3, self.w2 = some(inner, dim), some(inner, dim), some(dim, inner)
        few = pack(*self.w1, *self.w3, *self.w2)
        names = ("w13", "s13", "b13", "w2", "s2", "b2")
        again = lambda t: t.repeat(count // self.DISTINCT, *[1] * (t.dim() - 1))  # noqa: E731
        self.packed = PackedExperts(*(again(getattr(few, n)) for n in names), few.hidden, few.absorb)

    def expected(self, x: Tensor, experts: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
        """float32, activations quantised as the kernel does (per 128, hidden per 64)."""
        out = shared.float()
        x = roundtrip(x.float(), 128)
        for e in range(self.DISTINCT):
            w1, w3, w2 = (
                fp4_decode(fp4_unpack(c[e])) * ue8m0_decode(s[e]).repeat_interleave(32, 1)
                for c, s in (self.w1, self.w3, self.w2)
            )
            a, b = (x @ w1.t()).clamp(max=LIMIT), (x @ w3.t()).clamp(-LIMIT, LIMIT)
            h = torch.nn.functional.silu(a) * b
            for j in range(TOPK):
                mine = torch.where(experts[:, j] % self.DISTINCT == e, weights[:, j], 0)[:, None]
                out = out + roundtrip(h * mine, 64) @ w2.t()
        return out


def roundtrip(x: Tensor, block: int) -> Tensor:
    """Through e4m3 with a power-of-two scale per `block` channels."""
    v = x.unflatten(-1, (-1, block))
    scale = torch.exp2(torch.ceil(torch.log2(v.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448)))
    return ((v / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)


def forms(tokens: int, dim: int, packed: PackedExperts) -> dict[str, Callable[..., Tensor]]:
    """The op's kernels that take this shape on this machine, by backend."""
    found: dict[str, Callable[..., Tensor]] = {"triton": run_few if tokens * TOPK <= ONE_LAUNCH else run}
    few = tokens * TOPK < MANY * len(packed.w13) or dim % 128
    if capability()[0] == 9 and not few and narrow_scales(packed):
        found["gluon"] = gluon.run
    return found


def route(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """By number of tokens, as the op."""
    return (few_route if len(x) <= ROUTE_TOKENS else many_route)(x, *rest)


def layer(
    x: Tensor,
    gate: Tensor,
    bias: Tensor,
    packed: PackedExperts,
    shared: Tensor,
    form: Callable[..., Tensor] = run,
) -> Tensor:
    """What a layer runs besides the shared expert."""
    return form(x, *route(x, gate, bias, None, TOPK, 1.5), packed, LIMIT, shared)


Step = list[tuple[Tensor, Tensor, Tensor, Tensor]]


def step(tokens: int, gate: Tensor, layers: int = LAYERS) -> Step:
    """(x, experts, weights, shared) of each layer, unevenly routed."""
    dim, dev = gate.shape[1], gate.device
    common = torch.randn(dim, device=dev)
    bias = 0.02 * torch.randn(len(gate), device=dev)
    made = []
    for _ in range(layers):
        own = torch.randn((tokens, dim), device=dev)
        x = ((1 - SKEW**2) ** 0.5 * own + SKEW * common).to(torch.bfloat16)
        made.append((x, *many_route(x, gate, bias, None, TOPK, 1.5), torch.randn_like(x)))
    return made


def run_step(made: Step, packed: PackedExperts, form: Callable[..., Tensor]) -> list[Tensor]:
    """The sums of each layer."""
    return [form(x, experts, weights, packed, LIMIT, shared) for x, experts, weights, shared in made]


def step_bytes(made: Step, packed: PackedExperts) -> tuple[float, float]:
    """(experts that are hit, least bytes that move) a layer."""
    hit = sum(len(experts.unique()) for _, experts, *_ in made) / len(made)
    return hit, hit * (packed.nbytes // len(packed.w13)) + 6 * made[0][0].numel()


def decoded(bench: Bench, name: str, model: Experts, gate: Tensor) -> Iterator[Row]:
    """Rows of decode steps; `context` is how many experts are hit."""
    (count, dim), inner = gate.shape, SHAPES[name][2]
    for tokens in DECODED:
        made = step(tokens, gate)
        hit, size = step_bytes(made, model.packed)
        form = forms(tokens, dim, model.packed)["triton"]
        us = bench.us(partial(run_step, made, model.packed, form)) / LAYERS
        last = slice(tokens - min(tokens, 16), None)
        error = max_abs_err(
            form(*made[0][:3], model.packed, LIMIT, made[0][3])[last],
            model.expected(*(t[last] for t in made[0])),
        )
        flops = 2 * tokens * TOPK * 3 * dim * inner
        yield Row("experts", f"{name} {count} x {dim} x {inner} top {TOPK} uneven", tokens, round(hit), us, round(size), flops, "fp8", "", None, error)  # fmt: skip


def rows(bench: Bench) -> Iterator[Row]:
    torch.manual_seed(0)
    for name, (count, dim, inner) in SHAPES.items():
        model = Experts(count, dim, inner, bench.device)
        size = model.packed.nbytes // count
        gate = torch.randn((count, dim), device=bench.device, dtype=torch.bfloat16) / dim**0.5
        bias = torch.randn(count, device=bench.device) / 10
        yield from decoded(bench, name, model, gate)
        for tokens in (1, 8, 128, 2048, 8192) if bench.quick else TOKENS:
            x = torch.randn((tokens, dim), device=bench.device, dtype=torch.bfloat16)
            shared = torch.randn((tokens, dim), device=bench.device, dtype=torch.bfloat16)
            experts, weights = route(x, gate, bias, None, TOPK, 1.5)
            last = slice(tokens - min(tokens, 16), None)
            expected = model.expected(x[last], experts[last], weights[last], shared[last])
            hit = len(experts.unique())
            for form, run_form in forms(tokens, dim, model.packed).items():
                f = partial(layer, x, gate, bias, model.packed, shared, run_form)
                error = max_abs_err(f()[last], expected)
                yield Row(
                    "moe",
                    f"{name} {count} x {dim} x {inner} top {TOPK} {form}",
                    tokens,
                    hit,
                    bench.us(f),
                    hit * size + gate.nbytes + 6 * x.numel(),
                    2 * tokens * TOPK * 3 * dim * inner,
                    "fp8",
                    "",
                    None,
                    error,
                )
        del model
        bench.free()
