"""Forms for `--deterministic`: a token's bits are the same alone and among others, by every form of the family, whole and in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from dsv4.backends import choose
from dsv4.formats import row_format
from dsv4.kernels.triton import (
    attention,
    compressor,
    gemm,
    index_scan,
    indexer,
    linear,
    mhc,
    moe,
    moe_few,
    norm,
)
from dsv4.kernels.triton.forms import ONE_LAUNCH
from dsv4.ops.forms import Form
from dsv4.ops.spec import SPECS
from dsv4.ops.weight import Fp8Weight, Gated
from torch import Tensor

from tests.kernels.device import DEVICE, on_gpu, on_hopper
from tests.kernels.quantised import codes_of, fp8
from tests.kernels.test_attention import full_width, make
from tests.kernels.test_indexer import Thresholds, small  # noqa: F401  (a fixture)
from tests.kernels.test_moe import LIMIT
from tests.kernels.test_moe import make as packed_experts
from tests.ops.cases import case, history_rows, moved, outcome, partial_args, step_of


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _same(runs: dict[str, Callable[[Tensor], Tensor]], x: Tensor, parts: Sequence[int]) -> None:
    """Every run gives the rows that the first one gives of all x, of as many rows from the third on as `parts` say, too."""
    whole = next(iter(runs.values()))(x)
    for name, run in runs.items():
        assert torch.equal(run(x), whole), name
        for n in parts:
            assert torch.equal(run(x[2 : 2 + n].clone()), whole[2 : 2 + n]), (name, n)


def _family(op: str) -> list[Form]:
    """What `--deterministic` takes on a GPU without Gluon."""
    return list(choose("triton", "cuda", deterministic=True, major=8).chains[op])


ROWWISE = ["rmsnorm", "rmsnorm_quantised", "norm_rope", "hc_next", "hc_post", "hc_head", "route", "merge_attention", "sample"]  # fmt: skip


@pytest.mark.parametrize("op", ROWWISE)
def test_a_token_alone(op: str) -> None:
    (form,) = _family(op)
    args = case(op, 9)
    rows = {a.name: a.shape.split(",").index("T" if "T" in a.shape else "S") for a in SPECS[op].args if {"T", "S"} & {*a.shape.split(",")}}  # fmt: skip
    rows |= {"x": 0} if "x" in args else {}
    whole = outcome(op, form.load(), moved(args, DEVICE))
    cut = {k: v.narrow(rows[k], 2, 1).clone() if k in rows and v is not None else v for k, v in args.items()}
    for a, b in zip(whole, outcome(op, form.load(), moved(cut, DEVICE)), strict=True):
        assert torch.equal(a[2:3], b)


def _fp8(out: int, width: int, seed: int) -> Fp8Weight:
    codes, scales, _ = fp8(out, width, _g(seed))
    return Fp8Weight(codes.to(DEVICE), scales.to(DEVICE), torch.bfloat16)


def _x(tokens: int, *width: int) -> Tensor:
    return torch.randn((tokens, *width), generator=_g(7)).bfloat16().to(DEVICE)


def _products(weight: Fp8Weight) -> dict[str, Callable[[Tensor], Tensor]]:
    forms = {"narrow": linear.narrow_linear, "wide": linear.wide_linear}
    return {name: partial(form, weight=weight, fixed=True) for name, form in forms.items()}


def test_fp8_products_are_cut_by_their_weight() -> None:
    """In two sums: as parts of two programs, folded in one for many tokens, and in the form for many."""
    weight = _fp8(128, 1024, 1)
    assert gemm.shares_of(weight.codes, 8) == 2
    _same(_products(weight), _x(33, 1024), [1])


def test_grouped_and_plain_products_are_cut_by_their_weight() -> None:
    grouped = partial(linear.narrow_grouped_linear, weight=_fp8(2 * 24, 1024, 2), fixed=True)
    _same({"narrow": grouped}, _x(33, 2, 1024), [1])
    plain = (torch.randn((24, 520), generator=_g(3)) / 10).bfloat16().to(DEVICE)
    assert gemm.shares_of(plain, 9) == 2
    _same({"ours": partial(linear.our_linear_f32, weight=plain)}, _x(33, 520), [1])
    whole = linear.our_linear(_x(5, 520), plain.float())
    assert whole.dtype == torch.bfloat16 and torch.equal(
        linear.our_linear(_x(5, 520)[:1], plain.float()), whole[:1]
    )


def test_the_shared_expert_in_one_launch_and_in_three() -> None:
    w = Gated(_fp8(128, 512, 1), _fp8(128, 512, 2), _fp8(128, 128, 3))
    forms = {
        name: partial(getattr(linear, f"{name}_swiglu"), w=w, limit=0.7, fixed=True)
        for name in ("wide", "gated", "narrow")
    }
    _same(forms, _x(4, 512), [1])


@pytest.mark.parametrize(("dim", "inner"), [(256, 128), (160, 96)], ids=["as in Gluon", "scales apart"])
def test_experts_however_many_tokens_share_them(dim: int, inner: int) -> None:
    packed, _ = packed_experts(4, dim, inner)
    ids, weights = torch.tensor([[2, 0], [0, 2], [2, 0]]), torch.rand((3, 2), generator=_g(4))
    x = torch.randn((3, dim), generator=_g(5))
    run = partial(moe.run, packed=packed, limit=LIMIT, shared=None, fixed=True)
    whole = run(*(v.to(DEVICE) for v in (x, ids, weights)))
    for at, tune in ((slice(0, 1), {}), (slice(0, 3), {"bt": 32})):
        part = run(*(v[at].to(DEVICE) for v in (x, ids, weights)), tune=tune)
        assert torch.equal(part, whole[at]), tune
    if dim % 128 == 0:
        few = partial(moe_few.run_few, packed=packed, limit=LIMIT, fixed=True)
        for at in (slice(0, 1), slice(1, 3), slice(0, 3)):
            own, y, r = (v[at].to(DEVICE) for v in (ids, x, weights))
            assert torch.equal(few(y, own, r, shared=y), moe.run(y, own, r, packed, LIMIT, y, fixed=True)), at


@pytest.mark.parametrize("k", [8, None], ids=["selected", "all"])
def test_attention_is_cut_by_a_tokens_own_length(monkeypatch: pytest.MonkeyPatch, k: int | None) -> None:
    """A token beside others with longer lists, and alone with its own; of all entries some tokens have one part and some several."""
    monkeypatch.setattr(attention, "LONGEST", 2)
    case = moved(make(((250, 1), (37, 1), (0, 2), (130, 1)), form="fp8_ds_mla", k=k, dim=96), DEVICE)
    _each_token(case, partial(attention.sparse_attention, fixed=True))
    _each_token(partial_args(case), partial(attention.partial_attention, fixed=True))


def _each_token(case: dict[str, Any], run: Callable[..., Any], picks: Sequence[int] = ()) -> None:
    rows = ("q", "cos", "sin", "window_ids", "selected", "count")
    whole = run(**case)
    for t in picks or range(len(case["q"])):
        cut = {
            name: v[t : t + 1].clone() if name in rows and v is not None else v for name, v in case.items()
        }
        cut["tokens"] = replace(case["tokens"], slab=case["tokens"].slab[t : t + 1].clone())
        seen = int(case["entries"].visible[t])
        cut["entries"] = replace(
            case["entries"], visible=case["entries"].visible[t : t + 1].clone(), most=seen
        )
        if cut["selected"] is not None:
            cut["selected"] = cut["selected"][:, : max(1, min(seen, cut["selected"].shape[1]))].contiguous()
        one = run(**cut)
        for a, b in zip(*((v,) if isinstance(v, Tensor) else v for v in (one, whole)), strict=True):
            assert torch.equal(a[0], b[t]), t


@pytest.mark.parametrize("halves", [1, 2])
def test_compressors_fold_a_prompt_as_single_tokens(halves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one launch or in two."""
    args = case("compress", 6 + (halves - 1))
    dim, results = args["weight"].shape[0], []
    projected, angle = (
        torch.randn((13, 2 * halves * dim), generator=_g(halves)),
        torch.rand((8, 16), generator=_g(3)),
    )
    whole = (0, 13)
    for cuts, wide in ((whole, 0), (whole, 1000), ((0, 3, 4, 13), 0), (tuple(range(14)), 0)):
        monkeypatch.setattr(compressor, "multiprocessors", lambda wide=wide: wide)
        state = torch.zeros((1, halves, 2, dim), device=DEVICE)
        state[:, :, 1] = -torch.inf
        rows = moved({"rows": args["rows"]}, DEVICE)["rows"]
        for start, end in pairwise(cuts):
            step = step_of((start, end - start))
            at = step.blocks[4].position // 4
            tables = {k: args[k] for k in ("ape", "weight")} | {"projected": projected[start:end]}
            tables |= {
                "cos": angle.cos()[at],
                "sin": angle.sin()[at],
                "tokens": step.tokens,
                "blocks": step.blocks[4],
            }
            compressor.compress(
                **moved(tables, DEVICE), state=state, eps=1e-6, dtype=torch.float32, rows=rows, fixed=True
            )
        results.append((rows.region, state))
    for region, state in results[1:]:
        assert torch.equal(region, results[0][0]) and torch.equal(state, results[0][1])


@pytest.mark.usefixtures("small")
def test_scores_of_whole_rows_are_those_of_the_exact_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's tokens and one alone; rows written whole, and rows whose threshold was wrong."""
    args = case("index_candidates", 2)
    args["keys"] = history_rows(_g(3), 3, args["q"].shape[-1], "mxfp4")
    args = moved(args, DEVICE)
    run = partial(indexer.index_candidates, fixed=True)
    exact = run(**args)
    monkeypatch.setattr(indexer, "SAMPLE", 4096)
    for a, b in zip(run(**args), exact, strict=True):
        assert torch.equal(a, b)
    alone = {k: v[:1] if k in ("q", "cos", "sin", "weights") else v for k, v in args.items()}
    alone["tokens"] = replace(args["tokens"], slab=args["tokens"].slab[:1], slabs=args["tokens"].slabs[:1])
    alone["entries"] = replace(args["entries"], visible=args["entries"].visible[:1])
    for a, b in zip(run(**alone), exact, strict=True):
        assert torch.equal(a[0], b[0])


@triton.jit
def _decoded(data, scales, out, N: tl.constexpr):  # noqa: ANN001, ANN202
    c, g, n = index_scan.place_channel(tl.arange(0, 128)), tl.arange(0, 4), tl.arange(0, N)
    byte = tl.load(data + n[:, None] * 64 + (c // 2)[None, :])
    code, scale = index_scan._e4m3_key(byte, c, tl.load(scales + n[:, None] * 4 + g[None, :]), g)
    tl.store(out + n[:, None] * 128 + c[None, :], code.to(tl.float32) * scale[:, None])


def test_keys_as_the_gluon_scan_expands_them() -> None:
    """Every channel once, with its key's value."""
    codec = row_format("mxfp4", 128, 64)
    plane = torch.randint(0, 256, (16, 64), generator=_g(1), dtype=torch.uint8)
    scales = torch.randint(118, 128, (16, 4), generator=_g(2), dtype=torch.uint8)
    out = torch.full((16, 128), float("nan"), device=DEVICE)
    _decoded[(1,)](plane.to(DEVICE), scales.to(DEVICE), out, N=16)
    assert torch.equal(out.cpu(), codec.decode((plane, scales)))


WIDE = {
    "wq_a, wkv": (1536, 4096),
    "wq_b": (32768, 1024),
    "wo_b": (4096, 8192),
    "w2": (4096, 2048),
    "index": (8192, 1024),
}
"""Rows and channels of Flash's matrices."""


@on_hopper
@pytest.mark.parametrize("name", WIDE)
def test_fp8_products_at_full_width(name: str) -> None:
    _same(_products(_fp8(*WIDE[name], 1)), _x(1000, WIDE[name][1]), [1, 7, 17, 33, 64, 129, 700])


@on_hopper
def test_grouped_products_and_the_shared_expert_at_full_width() -> None:
    weight = _fp8(8192, 4096, 2)
    forms = {
        n: partial(getattr(linear, f"{n}_grouped_linear"), weight=weight, fixed=True)
        for n in ("narrow", "wide")
    }
    _same(forms, _x(300, 8, 4096), [1, 17, 33, 129])
    w = Gated(_fp8(2048, 4096, 1), _fp8(2048, 4096, 2), _fp8(4096, 2048, 3))
    few = {
        n: partial(getattr(linear, f"{n}_swiglu"), w=w, limit=7.0, fixed=True)
        for n in ("wide", "gated", "narrow")
    }
    _same(few, _x(32, 4096), [1, 17])


@on_gpu
@pytest.mark.parametrize("out", [256, 1024, 2624, 129280])
def test_plain_products_at_full_width(out: int) -> None:
    weight = (torch.randn((out, 4096), generator=_g(3)) / 64).bfloat16().to(DEVICE)
    _same({"ours": partial(linear.our_linear_f32, weight=weight)}, _x(600, 4096), [1, 7, 17, 33, 129])


@on_hopper
@pytest.mark.parametrize(("experts", "k"), [(8, 2), (16, 6)])
def test_experts_of_gluon_and_triton_at_full_width(experts: int, k: int) -> None:
    from dsv4.kernels.gluon import moe as gluon

    packed, _ = packed_experts(experts, 4096, 2048)
    tokens = 40 * experts
    ids = torch.rand((tokens, experts), generator=_g(1)).argsort(-1)[:, :k].sort(-1).values.to(DEVICE)
    weights, x = torch.rand((tokens, k), generator=_g(2)).to(DEVICE), _x(tokens, 4096)
    whole = gluon.run(x, ids, weights, packed, LIMIT, x)
    for n in (1, 2, 3, 8, 32, 100, tokens):
        part = moe.run(
            x[2 : 2 + n], ids[2 : 2 + n], weights[2 : 2 + n], packed, LIMIT, x[2 : 2 + n], fixed=True
        )
        assert torch.equal(part, whole[2 : 2 + n]), n
        codes = codes_of(x[2 : 2 + n])
        part = moe.run(codes, ids[2 : 2 + n], weights[2 : 2 + n], packed, LIMIT, x[2 : 2 + n], fixed=True)
        assert torch.equal(part, whole[2 : 2 + n]), n
        if n * k <= ONE_LAUNCH:
            at = slice(2, 2 + n)
            few = moe_few.run_few(x[at], ids[at], weights[at], packed, LIMIT, x[at], fixed=True)
            assert torch.equal(few, whole[at]), n


@on_hopper
@pytest.mark.parametrize("options", [{}, {"k": None}, {"heads": 128}], ids=str)
def test_attention_at_full_width(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokens by the kernel whose programs stay; all entries in parts of three blocks."""
    from dsv4.kernels.gluon import attention as gluon

    monkeypatch.setattr(attention, "LONGEST", 3)
    case = moved(full_width(((0, 300), (37, 1), (80, 300)), **options), DEVICE)
    if case["selected"] is not None:
        assert torch.equal(gluon.stream(**case), gluon.fixed_sparse_attention(**case))
    _each_token(case, gluon.fixed_sparse_attention, [0, 3, 70, 200, 299, 300, 301, 450, 600])


@on_hopper
@pytest.mark.parametrize("k", [64, None], ids=["selected", "all"])
def test_parts_of_ranks_at_full_width(k: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4.kernels.gluon import attention as gluon

    monkeypatch.setattr(attention, "LONGEST", 3)
    case = moved(partial_args(full_width(((0, 300), (37, 1), (80, 300)), k=k)), DEVICE)
    if k is not None:
        for a, b in zip(gluon.stream_part(**case), gluon.fixed_partial_attention(**case), strict=True):
            assert torch.equal(a, b)
    _each_token(case, gluon.fixed_partial_attention, [0, 3, 70, 200, 299, 300, 301, 450, 600])


@on_hopper
def test_scores_of_gluon_and_of_the_exact_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows of 20,000 entries: by the scan of prompts, by that of decode steps, and by the pass for wrong thresholds."""
    from dsv4.kernels.gluon import indexer as gluon

    entries, tokens, topk = 20_000, 4, 512
    blocks = -(-entries // 64)
    keys = history_rows_of(blocks)
    pages = torch.randperm(blocks, generator=_g(1)).int().view(1, -1).to(DEVICE)
    slab, visible = (torch.full((tokens,), n, dtype=torch.int32, device=DEVICE) for n in (0, entries))
    angle = torch.rand((tokens, 32), generator=_g(2)).to(DEVICE)
    q, weights = _x(tokens, 64, 128), torch.randn((tokens, 64), generator=_g(3)).to(DEVICE)
    found: list[tuple[Tensor, Tensor]] = []
    for queries in (4, 1, 1):
        plan = indexer.plan_of(64, keys, topk, entries, queries, "mxfp4 as e4m3")
        q8, folded = indexer.prepare(q, angle.cos(), angle.sin(), weights, plan, 64)
        out, values = (
            torch.empty((tokens, topk), dtype=d, device=DEVICE) for d in (torch.int32, torch.float32)
        )
        part = (q8, folded, keys, pages, slab, visible, entries)
        if found:  # the least score that any token selects, then one that no entry reaches
            threshold = float(found[0][1].min()) if len(found) == 1 else float("inf")
            monkeypatch.setattr(indexer.select, "threshold_kernel", Thresholds(threshold))
        indexer.appended(plan, gluon.launch_scan, part, out, values)
        found.append((out, values))
    for ids, values in found[1:]:
        assert torch.equal(ids, found[0][0]) and torch.equal(values, found[0][1])


def history_rows_of(blocks: int) -> Any:
    """MXFP4 index keys in pages of 64."""
    from dsv4.cache.rows import Rows

    codec = row_format("mxfp4", 128, 64)
    keys = Rows(codec, torch.empty((blocks, 64 * sum(codec.planes)), dtype=torch.uint8, device=DEVICE), 64)
    values = torch.randn((blocks * 64, 128), generator=_g(4)).to(DEVICE)
    keys.write(torch.arange(blocks * 64, device=DEVICE), values)
    return keys


@on_gpu
def test_norms_and_hyper_connections_at_full_width() -> None:
    g = torch.Generator(device=DEVICE).manual_seed(1)
    r = lambda *shape: torch.randn(shape, generator=g, device=DEVICE)  # noqa: E731
    angle, weight = torch.rand((1500, 32), generator=g, device=DEVICE), 1 + r(1024) / 10
    _same(
        {"rmsnorm": partial(norm.rmsnorm, weight=weight, eps=1e-6, fixed=True)},
        _x(3000, 1024),
        [1, 100, 2100],
    )
    heads, cos, sin = _x(1500, 64, 512), angle.cos(), angle.sin()
    turned = norm.norm_rope(heads, None, cos, sin, 1e-6, fixed=True)
    for n in (1, 20, 100):
        assert torch.equal(norm.norm_rope(heads[:n], None, cos[:n], sin[:n], 1e-6, fixed=True), turned[:n])
    for dim in (4096, 7168):
        fn, scale, base = r(24, 4 * dim) / dim**0.5, r(3), r(24)
        streams = r(1500, 4, dim).bfloat16()
        whole = mhc.hc_pre(streams, fn, scale, base, 1e-6, 1e-6, 20, fixed=True)
        for n in (1, 2, 17, 200, 300, 1100):
            part = mhc.hc_pre(streams[3 : 3 + n], fn, scale, base, 1e-6, 1e-6, 20, fixed=True)
            assert all(torch.equal(a, b[3 : 3 + n]) for a, b in zip(part, whole, strict=True)), (dim, n)
