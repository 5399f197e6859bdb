"""Norms, row writes, compressors and hyper-connections against their references: small in the interpreter, at V4's
widths on a GPU."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from typing import Any

import pytest
import torch
from dsv4.backends import choose
from dsv4.cache.rows import Rows
from dsv4.formats import row_format
from dsv4.kernels.triton import mhc_few
from dsv4.kernels.triton.forms import FEW_STREAM_TOKENS
from dsv4.kernels.triton.quantise import quantise
from dsv4.ops.spec import SPECS

from tests.kernels.device import DEVICE, close, on_gpu
from tests.ops.cases import case, moved, outcome, step_of

REFERENCE = choose("reference")
MODULES = {
    "rmsnorm": "norm",
    "norm_rope": "norm",
    "write_rows": "rows",
    "copy_rows": "rows",
    "compress": "compressor",
    "hc_next": "mhc",
    "hc_post": "mhc",
    "hc_head": "mhc",
}
FEW = [("hc_next", "mhc_few"), ("hc_head", "mhc_few")]
"""The same ops in one launch for few tokens."""
FORMATS = [
    ("float32", 64, 32),
    ("bfloat16", 64, 32),
    ("fp8_ds_mla", 64, 32),
    ("fp8_ds_mla", 256, 64),
    ("mxfp4", 64, 32),
    ("fp8", 64, 32),
]


def kernel(op: str, module: str = "") -> Any:
    return getattr(import_module(f"dsv4.kernels.triton.{module or MODULES[op]}"), op)


@pytest.mark.parametrize(("op", "module"), [*MODULES.items(), *FEW])
@pytest.mark.parametrize("tokens", [1, 7, 18])
def test_equals_reference(op: str, module: str, tokens: int) -> None:
    args = case(op, tokens)
    ours = outcome(op, kernel(op, module), moved(args, DEVICE))
    theirs = outcome(op, getattr(REFERENCE, op), args)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.allclose(a.cpu(), b, rtol=0, atol=max(SPECS[op].tolerance, 2e-6), equal_nan=True)


def bfloat16(op: str, tokens: int) -> dict[str, Any]:
    """Arguments as a bfloat16 model has them."""
    args = case(op, tokens)
    model = [a.name for a in SPECS[op].args if a.dtype == "model" and args[a.name] is not None]
    return args | {name: args[name].bfloat16() for name in model}


@pytest.mark.parametrize("op", ["norm_rope", "rmsnorm", "hc_post", "hc_next"])
def test_bfloat16(op: str) -> None:
    args = bfloat16(op, 5)
    for a, b in zip(kernel(op)(**moved(args, DEVICE)), getattr(REFERENCE, op)(**args), strict=True):
        assert a.dtype == b.dtype
        assert close(a, b) < 6e-3


@pytest.mark.parametrize("tokens", [1, 3, 6])
def test_one_launch_gives_what_three_give(tokens: int) -> None:
    """To rounding, and one step of bfloat16 in a value of a hundred; the e4m3 form is that of the values. No message is left behind."""
    args = moved(bfloat16("hc_next", tokens) | {"quantised": True}, DEVICE)
    (x, *rest), (y, *others) = (kernel("hc_next", m)(**args) for m in ("mhc_few", "mhc"))
    codes, scales = quantise(x.values, pad=4)
    assert torch.equal(x.codes[:tokens].float(), codes[:tokens].float())
    assert torch.equal(x.scales[:, :tokens], scales[:, :tokens])
    assert x.codes.shape == y.codes.shape and not x.codes[tokens:].float().any()
    for a, b in zip((x.values, *rest), (y.values, *others), strict=True):
        assert a.dtype == b.dtype and torch.allclose(a.float(), b.float(), rtol=2.0**-7, atol=1e-5)
        assert a.dtype != torch.bfloat16 or (a != b).float().mean() < 0.01
    assert all((words == mhc_few.EMPTY.value).all() for words in mhc_few._words.values())


def test_not_a_number_reaches_its_own_token_alone() -> None:
    args = moved(case("hc_next", 7), DEVICE)
    whole = kernel("hc_next", "mhc_few")(**args)
    args["y"][3] = float("nan")
    for a, b in zip(kernel("hc_next", "mhc_few")(**args), whole, strict=True):
        assert a[3].isnan().any() and torch.equal(a[:3], b[:3]) and torch.equal(a[4:], b[4:])


@pytest.mark.parametrize("dim", [16, 64, 256, 1024, 4096, 7168, 16384])
def test_each_thread_has_sums_of_its_own(dim: int) -> None:
    """Of a word that several threads read one could see it sent and another not yet, which only one is asked."""
    threads = 32 * mhc_few._warps(mhc_few._block(dim))
    slices = mhc_few._slices(dim)
    assert slices["SP"] * mhc_few.INPUT_WORDS >= threads * mhc_few.VECTOR and slices["SP"] >= slices["SPLITS"]


@on_gpu
def test_no_sum_is_taken_before_it_is_sent() -> None:
    args = moved(case("hc_next", 7), DEVICE)
    first, other = kernel("hc_next", "mhc_few")(**args), torch.empty(1 << 26, device=DEVICE)
    for i in range(3000):
        if i % 4 == 0:
            other.add_(1)  # programs start while another kernel still has most of the GPU
        for a, b in zip(kernel("hc_next", "mhc_few")(**args), first, strict=True):
            assert torch.equal(a, b), f"launch {i}"


def test_other_numbers_of_streams_are_named() -> None:
    args = moved(case("hc_post", 2), DEVICE)
    args |= {"streams": args["streams"][:, :2], "post": args["post"][:, :2], "comb": args["comb"][:, :2, :2]}
    with pytest.raises(ValueError, match="hc_mult is 2; the kernels hold 4 streams; --backend reference"):
        kernel("hc_post")(**args)


def _region(codec: Any, pages: int, rows: int) -> Rows:
    """Rows of NaN in a region between other bytes."""
    size = rows * sum(codec.planes)
    storage = torch.full((pages, size + 64), 0xFF, dtype=torch.uint8)
    return Rows(codec, storage[:, 32 : 32 + size], rows)


def _write(
    form: str, dim: int, rope: int, tokens: int, dtype: torch.dtype
) -> tuple[Rows, Rows, torch.Tensor]:
    """A write by the reference and by the kernel; every third token has no target."""
    g = torch.Generator().manual_seed(dim + tokens)
    codec, rows = row_format(form, dim, rope), 8
    angle = 6.3 * torch.rand((tokens, rope // 2), generator=g)
    x = (torch.randn((tokens, dim), generator=g) * torch.exp(torch.randn((tokens, dim), generator=g))).to(
        dtype
    )
    x[0] = 0
    weight = 1 + 0.1 * torch.randn(dim, generator=g)
    target = torch.randperm(tokens + 9, generator=g)[:tokens]
    kept = torch.arange(tokens) % 3 != 2
    args = dict(x=x, weight=weight, cos=angle.cos(), sin=angle.sin(), eps=1e-6)
    theirs = _region(codec, -(-(tokens + 9) // rows), rows)
    ours = moved({"rows": theirs}, DEVICE)["rows"]
    kernel("write_rows")(**moved(args, DEVICE), rows=ours, target=torch.where(kept, target, -1).to(DEVICE))
    part = {k: v[kept] if k in ("x", "cos", "sin") else v for k, v in args.items()}
    REFERENCE.write_rows(**part, rows=theirs, target=target[kept])
    return ours, theirs, target[kept]


def _same(ours: Rows, theirs: Rows, ids: torch.Tensor) -> None:
    """Equal bytes but for values that rounding puts next to a boundary: at most one code of a hundred may differ, and
    by one step; rows that were not written keep their bytes."""
    a = moved({"rows": ours}, "cpu")["rows"]
    untouched = torch.ones(len(theirs.region) * theirs.rows, dtype=torch.bool)
    untouched[ids] = False
    rest = torch.nonzero(untouched).flatten()
    if len(rest):
        assert not a.read(rest).isfinite().any()
    x, y = a.read(ids), theirs.read(ids)
    assert not x.isnan().any()
    differing = ((x - y).abs() > 1e-5 + 1e-5 * y.abs()).float().mean()
    assert differing < 0.01 and (x - y).abs().max() <= 0.26 * y.abs().max(), float(differing)


@pytest.mark.parametrize(("form", "dim", "rope"), FORMATS)
def test_row_formats(form: str, dim: int, rope: int) -> None:
    ours, theirs, ids = _write(form, dim, rope, 11, torch.float32)
    _same(ours, theirs, ids)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("form", "dim"), [("fp8_ds_mla", 512), ("bfloat16", 512), ("mxfp4", 128), ("fp8", 128)]
)
def test_row_formats_at_full_width(form: str, dim: int, dtype: torch.dtype) -> None:
    for tokens in (1, 33, 3001):
        ours, theirs, ids = _write(form, dim, 64, tokens, dtype)
        _same(ours, theirs, ids)


@pytest.fixture(params=[0, 1000], ids=["edges, then what is between", "one launch"])
def compressor_launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to launch a prompt's blocks, however many there are."""
    monkeypatch.setattr(
        import_module("dsv4.kernels.triton.compressor"), "multiprocessors", lambda: request.param
    )


@pytest.mark.usefixtures("compressor_launches")
@pytest.mark.parametrize("halves", [1, 2])
def test_compress_in_pieces_equals_whole(halves: int) -> None:
    """A prompt of 21 tokens whole and cut into chunks, each carrying its state on: same rows, same state."""
    g = torch.Generator().manual_seed(halves)
    args = case("compress", 6 + (halves - 1))
    dim, results = args["weight"].shape[0], []
    projected = torch.randn((21, 2 * halves * dim), generator=g)
    angle = torch.rand((8, 16), generator=g)
    for cuts in ((0, 21), (0, 3, 4, 5, 13, 21), (0, 10, 11, 21)):
        state = torch.zeros((1, halves, 2, dim))
        state[:, :, 1] = -torch.inf
        rows = moved({"rows": args["rows"]}, DEVICE)["rows"]
        state = state.to(DEVICE)
        for start, end in pairwise(cuts):
            step = step_of((start, end - start))
            blocks = step.blocks[4]
            at = blocks.position // 4
            fixed = {k: args[k] for k in ("ape", "weight")} | {"projected": projected[start:end]}
            fixed |= {"cos": angle.cos()[at], "sin": angle.sin()[at], "tokens": step.tokens, "blocks": blocks}
            kernel("compress")(**moved(fixed, DEVICE), state=state, eps=1e-6, dtype=torch.float32, rows=rows)
        results.append((rows.read(torch.arange(88, 96, device=DEVICE)), state))
    for rows, state in results[1:]:
        assert torch.allclose(rows, results[0][0], atol=1e-5, equal_nan=True)
        assert torch.allclose(state, results[0][1], atol=1e-5)


@pytest.mark.usefixtures("compressor_launches")
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_what_begins_without_state_reads_none(halves: int, tokens: int) -> None:
    """Slab -1 gives what an empty slab gives; with a place to leave its state nothing else is written, without one the slab is."""
    found = []
    for slab in (-1, 2):
        args = case("compress", 6 + (halves - 1))
        step = step_of((0, tokens), (37, 1))
        blocks, g = step.blocks[4], torch.Generator().manual_seed(3)
        at = blocks.position // 4
        angle = torch.rand((16, 16), generator=g)
        args |= {
            "projected": torch.randn((tokens + 1, args["projected"].shape[1]), generator=g),
            "blocks": blocks,
        }
        args |= {
            "cos": angle.cos()[at],
            "sin": angle.sin()[at],
            "left": args["left"][:2],
            "left_to": torch.tensor([1, -1]),
        }
        slabs = torch.tensor([slab, 1])
        args["tokens"] = replace(step.tokens, slabs=slabs)
        state = args["state"].clone()
        ours = moved(args, DEVICE)
        kernel("compress")(**ours)
        assert torch.equal(ours["state"].cpu(), state) and not ours["left"][0].any()
        found.append((ours["left"][1].cpu(), moved({"rows": ours["rows"]}, "cpu")["rows"].region))
        REFERENCE.compress(**args)
        assert torch.equal(args["state"], state) and torch.allclose(
            args["left"], ours["left"].cpu(), atol=1e-5
        )
        again = case("compress", 6 + (halves - 1)) | {
            k: args[k] for k in ("projected", "blocks", "cos", "sin")
        }
        again |= {"tokens": replace(step.tokens, slabs=torch.tensor([2, 1])), "left": None, "left_to": None}
        REFERENCE.compress(**again)
        assert torch.equal(again["state"][2], args["left"][1]) and not torch.equal(
            again["state"][1], state[1]
        )
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@on_gpu
@pytest.mark.usefixtures("compressor_launches")
@pytest.mark.parametrize(
    ("halves", "ratio", "form", "dim"),
    [(2, 4, "fp8_ds_mla", 512), (2, 4, "mxfp4", 128), (1, 128, "fp8_ds_mla", 512)],
)
def test_compress_at_full_width(halves: int, ratio: int, form: str, dim: int) -> None:
    from dsv4.model.batch import Batch, Row
    from dsv4.model.step import Geometry, build_step

    g = torch.Generator().manual_seed(ratio)
    rows, offset = [], 0
    for slab, (start, length) in enumerate([(0, 1), (511, 1), (300, 700), (1024, 256), (77, 3)]):
        rows.append(Row(slab, start, length, offset))
        offset += length
    positions = torch.cat([torch.arange(r.start, r.start + r.length) for r in rows])
    table = torch.randperm(5 * 6, generator=g).int().view(5, 6)
    nothing = torch.zeros(offset, dtype=torch.int64)
    step = build_step(
        Batch(nothing, positions, tuple(rows), table, nothing[:0]), Geometry(128, 128, 256, (ratio,), 1)
    )
    blocks, codec = step.blocks[ratio], row_format(form, dim, 64)
    angle = 6.3 * torch.rand((len(blocks.first), 32), generator=g)
    state = torch.randn((5, halves, 2, dim), generator=g)
    args = dict(
        projected=torch.randn((offset, 2 * halves * dim), generator=g),
        ape=torch.randn((ratio, halves * dim), generator=g),
        state=state,
        tokens=step.tokens,
        blocks=blocks,
        weight=1 + 0.1 * torch.randn(dim, generator=g),
        cos=angle.cos(),
        sin=angle.sin(),
        eps=1e-6,
        dtype=torch.bfloat16,
        rows=_region(codec, 30, 256 // ratio),
    )
    ours = moved(args, DEVICE)
    kernel("compress")(**ours)
    REFERENCE.compress(**args)
    _same(ours["rows"], args["rows"], blocks.target[blocks.target >= 0])
    assert torch.allclose(ours["state"].cpu(), args["state"], atol=2e-5)


@on_gpu
@pytest.mark.parametrize("dim", [4096, 7168])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 32, 33, 200, 300, 1500])
def test_hyper_connections_at_full_width(dim: int, first: bool, tokens: int) -> None:
    """The streams against the reference's, and what is made of them against what the reference makes of the same streams: the kernel fuses
    multiply and add, so of some 16,384 sums of a token one in two tokens rounds to the next bfloat16, which alone moves `post` by up to
    1.5e-4 (1,500 tokens on the CPU, in float64). Beside that fn in two bfloat16 pieces moves it by 5e-6, sums in another order by less than 1e-4."""
    g = torch.Generator().manual_seed(tokens)
    r = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    streams, fn = r(tokens, 4, dim).bfloat16(), r(24, 4 * dim) / (4 * dim) ** 0.5
    args = dict(y=r(tokens, dim).bfloat16(), streams=streams, post=2 * r(tokens, 4).sigmoid())
    args["comb"] = r(tokens, 4, 4).softmax(-1)
    args |= dict.fromkeys(("y", "post", "comb")) if first else {}
    args |= dict(fn=fn, scale=r(3).abs(), base=r(24), norm_eps=1e-6, hc_eps=1e-6, iters=20)
    args |= dict(weight=1 + r(dim) / 10, eps=1e-6, quantised=True)
    streams, given = REFERENCE.hc_next(**args)[1], moved(args, DEVICE)
    for module in ("mhc", "mhc_few") if tokens <= FEW_STREAM_TOKENS else ("mhc",):
        once = expected = None
        for _ in range(20):
            x, *rest = kernel("hc_next", module)(**given)
            assert close(rest[0], streams) < 3e-3
            if expected is None:
                on = dict.fromkeys(("y", "post", "comb")) | {"streams": rest[0].cpu()}
                expected = REFERENCE.hc_next(**args | on)
            assert close(x.values, expected[0].values) < 3e-3
            assert torch.allclose(rest[1].cpu(), expected[2], atol=1e-4)
            assert torch.allclose(rest[2].cpu(), expected[3], atol=1e-4)
            codes, scales = quantise(x.values, pad=4)
            assert torch.equal(x.codes[:tokens].view(torch.uint8), codes[:tokens].view(torch.uint8))
            assert torch.equal(x.scales[:, :tokens], scales[:, :tokens])
            once = once or (x.values, *rest)
            assert all(map(torch.equal, once, (x.values, *rest)))


@on_gpu
def test_a_graph_of_steps_between_sub_layers() -> None:
    """Launches that follow each other closely, as a decode step's do, of changing numbers of tokens: what they give one by one."""
    dim, g = 4096, torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(shape, generator=g).to(DEVICE)  # noqa: E731
    fn, rest = (
        r(24, 4 * dim) / (4 * dim) ** 0.5,
        (r(3).abs(), r(24), 1e-6, 1e-6, 20, 1 + r(dim) / 10, 1e-6, True),
    )
    starts = [(None, r(t, 4, dim).bfloat16(), None, None) for t in (1, 8, 32, 3)]

    def chain() -> list[torch.Tensor]:
        found = []
        for before in starts:
            for _ in range(6):
                x, *after = kernel("hc_next", "mhc_few")(*before, fn, *rest)
                before = (x.values, *after)
            found += [x.values, *after]
        return found

    with torch.cuda.stream(torch.cuda.Stream()):
        expected = chain()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            got = chain()
        for _ in range(50):
            graph.replay()
        torch.cuda.synchronize()
    assert all(map(torch.equal, got, expected))


def test_rows_beyond_four_gigabytes() -> None:
    """Rows whose byte offset exceeds 2^32: few pages, far apart. On a CPU untouched memory costs nothing."""
    codec, rows, stride = row_format("fp8_ds_mla", 512, 64), 4, 900_000_000
    storage = torch.empty((6, stride), dtype=torch.uint8, device=DEVICE)
    region = Rows(codec, storage[:, 4096 : 4096 + rows * 584], rows)
    target = torch.tensor([0, 6 * rows - 1, 5 * rows], device=DEVICE)
    x = torch.randn((3, 512), device=DEVICE)
    one, zero = torch.ones((3, 32), device=DEVICE), torch.zeros((3, 32), device=DEVICE)
    kernel("write_rows")(x, torch.ones(512, device=DEVICE), one, zero, 1e-6, region, target)
    assert close(region.read(target), REFERENCE.rmsnorm(x, None, 1e-6)) < 0.05
    to = torch.tensor([5 * rows + 1, 2, 5 * rows + 2], device=DEVICE)
    kernel("copy_rows")(region, target, region, to)
    assert torch.equal(region.read(to), region.read(target))
