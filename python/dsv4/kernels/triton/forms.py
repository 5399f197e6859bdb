"""What the Triton backend offers, and from which size on. Imports neither triton nor torch."""

from __future__ import annotations

from typing import Any

from dsv4.kernels.device import has_triton
from dsv4.ops.forms import Form, Scratch

NARROW_TOKENS = 32
"""Up to this many tokens `gemm.narrow` runs FP8 products, beyond `gemm.wide`; SwiGLU's first two are one launch."""
PLAIN_TOKENS = 16
"""Up to this many tokens our kernel multiplies plain matrices with a float32 result, beyond cuBLAS through torch."""
ROUTE_TOKENS = 16
"""Up to this many tokens the router's product and its choice are one launch."""
ONE_LAUNCH = 96
"""Up to this many slots (a token has one for each of its experts), 16 tokens of six, take `moe_few.py`; 32 tokens are slower there
(decision 0011)."""
FIXED_ONE_LAUNCH = 8
"""The same with `--deterministic`: one token (8 of them are slower there, 215 us for 165)."""

INDEX_TOKENS = 1024
"""Queries that the index kernels handle at a time: with 256 the choice among 8,192 entries took 1.65 times as long on an H200, among 131,072
1.08 times; 2,048 gain 2% more."""
INDEX_CANDIDATES = 8192
"""Candidates of a query."""
INDEX_SAMPLE, INDEX_SAMPLED = 8192, 4096
"""Entries up to which a row's scores are written whole, and how many of a longer one give its threshold."""
SPLIT_PROGRAMS, SPLIT_ROWS, SPLIT_COLUMNS = 6, 128, 16
"""Programs a multiprocessor that share a product's channels at most, and the result of each."""
ATTENTION_PROGRAMS, ATTENTION_HEADS = 2, 64
"""The same for attention: heads of each program."""
STREAM_PROGRAMS, STREAM_SUMS, STREAM_TILE = 16, 32, 64
"""Programs that share a tile of tokens, numbers of each, tokens of a tile at most."""
STREAM_SPREAD = 256
"""With `fixed` twice as many programs share up to this many tokens."""
FEW_STREAM_TOKENS, FEW_STREAM_PROGRAMS = 32, 128
"""Up to this many tokens take `mhc_few.py`, where at most so many programs share a tile."""


def lacks() -> str:
    """What Triton's kernels need beside a GPU."""
    return "" if has_triton() else "triton"


ATTENTION_SCRATCH = Scratch(
    "partial results of split attention",
    lambda d: (("heads", ATTENTION_PROGRAMS * d.multiprocessors * ATTENTION_HEADS), ("channels", d.head_dim), ("bytes", 4)),
)  # fmt: skip
INDEX_SCRATCH = Scratch(
    "index scores and candidates",
    lambda d: (
        ("queries at a time", min(d.tokens, INDEX_TOKENS)),
        ("numbers", 3 * INDEX_CANDIDATES + max(INDEX_SAMPLE, INDEX_SAMPLED)),
        ("bytes", 4),
    ),
    kept=True,
)
PRODUCT_SCRATCH = Scratch(
    "partial results of split products",
    lambda d: (
        ("numbers", SPLIT_PROGRAMS * d.multiprocessors * SPLIT_ROWS * SPLIT_COLUMNS),
        ("bytes", 4),
        ("arrays", 2),
    ),
)
STREAM_SCRATCH = Scratch(
    "hyper-connection sums",
    lambda d: (
        (
            "tokens of whole tiles, and those shared by twice as many",
            d.tokens + STREAM_TILE + min(d.tokens, STREAM_SPREAD),
        ),
        ("numbers", STREAM_PROGRAMS * STREAM_SUMS),
        ("bytes", 4),
    ),
)
FEW_STREAM_SCRATCH = Scratch(
    "hyper-connection messages",
    lambda d: (
        ("tokens", FEW_STREAM_TOKENS),
        ("programs", FEW_STREAM_PROGRAMS),
        ("numbers", STREAM_SUMS),
        ("bytes", 4),
    ),
    kept=True,
)


BACKEND = __package__.rpartition(".")[2]
_FITS = f"{__package__}.fits:"
_TMA = (9, 99)
"""Hopper and later load tiles by descriptor."""


def _form(op: str, at: str, name: str = "", *scratch: Scratch, arch: tuple[int, int] = (8, 99), **says: Any) -> Form:  # fmt: skip
    """`at`: module, or module:function where that is not named as the op."""
    path = f"{__package__}.{at}" + ("" if ":" in at else f":{op}")
    return Form(op, BACKEND, path, name, arch=arch, lacks=lacks, scratch=scratch, **says)


def _fixed(op: str, at: str, name: str = "fixed", *scratch: Scratch, options: bool = True, **says: Any) -> Form:  # fmt: skip
    """For `--deterministic`: by a function that takes `fixed`, or unless `options` by one of its own."""
    given = {"fixed": True} if options else {}
    return _form(op, at, name, *scratch, family="triton", deterministic=True, options=given, **says)


def _product(op: str, wide: str) -> list[Form]:
    """FP8 weights by our kernels, others by torch, or fixed ones by ours."""
    more = f"more than {NARROW_TOKENS} tokens"
    of_wide: dict[str, Any] = dict(
        arch=_TMA, takes=_FITS + "fp8", fits=_FITS + wide, when=f"FP8, {more}, whole blocks", packed=True
    )
    of_narrow: dict[str, Any] = dict(takes=_FITS + "fp8", when="FP8", packed=True)
    return [
        _form(op, f"linear:wide_{op}", "wide", **of_wide),
        _form(op, f"linear:narrow_{op}", "narrow", PRODUCT_SCRATCH, **of_narrow),
        _form(op, f"linear:plain_{op}", "plain, by torch"),
        _fixed(op, f"linear:wide_{op}", "wide, fixed", **of_wide),
        _fixed(op, f"linear:narrow_{op}", "narrow, fixed", PRODUCT_SCRATCH, **of_narrow),
        _fixed(op, f"linear:our_{op}", "plain, fixed", PRODUCT_SCRATCH, options=False),
    ]  # fmt: skip


_WHATEVER: dict[str, Any] = {"family": "triton"}
"""A token's bits do not depend on the others anyway."""

FORMS = [
    *(_form(op, "attention", "", ATTENTION_SCRATCH) for op in ("sparse_attention", "partial_attention")),
    *(_fixed(op, "attention", "cut by length", ATTENTION_SCRATCH) for op in ("sparse_attention", "partial_attention")),
    *(
        form
        for op, module, scratch in (
            ("merge_attention", "merge", ()),
            ("index_candidates", "indexer", (INDEX_SCRATCH,)),
            ("rmsnorm", "norm", ()),
            ("norm_rope", "norm", ()),
            ("write_rows", "rows", ()),
            ("compress", "compressor", ()),
        )
        for form in (_form(op, module, "", *scratch), _fixed(op, module, "fixed", *scratch))
    ),
    _form("decode_tables", "decode", **_WHATEVER),
    *(
        form
        for op in ("hc_next", "hc_head")
        for form in (
            _form(op, "mhc_few", "one launch", FEW_STREAM_SCRATCH, fits=f"{_FITS}few_{op[3:]}", when=f"up to {FEW_STREAM_TOKENS} tokens"),
            _form(op, "mhc", "", STREAM_SCRATCH),
            _fixed(op, "mhc", "fixed", STREAM_SCRATCH),
        )
    ),
    _form("merge_candidates", "topk", **_WHATEVER),
    _form("entries_of_part", "topk", **_WHATEVER),
    _form("rmsnorm_quantised", "norm", **_WHATEVER),
    _form("copy_rows", "rows", **_WHATEVER),
    _form("copy_state", "copies", **_WHATEVER),
    _form("hc_post", "mhc", **_WHATEVER),
    _form("index_select", "indexer:every_entry", "all entries", fits=_FITS + "all_fit", when="no more entries than top-k"),
    _form("index_select", "indexer", "", INDEX_SCRATCH),
    _fixed("index_select", "indexer:fixed_index_select", "one score", INDEX_SCRATCH, options=False),
    *_product("linear", "wide"),
    *_product("grouped_linear", "wide_groups"),
    *(
        form
        for op in ("linear_f32", "logits")
        for form in (
            _form(op, f"linear:few_{op}", "narrow", PRODUCT_SCRATCH, fits=_FITS + "few_plain", when=f"bfloat16, up to {PLAIN_TOKENS} tokens"),
            _form(op, f"linear:many_{op}", "bfloat16, by torch", fits=_FITS + "both_bfloat16", when="bfloat16"),
            _form(op, f"linear:float32_{op}", "float32, by torch"),
            _fixed(op, f"linear:our_{op}", "fixed", PRODUCT_SCRATCH, options=False),
        )
    ),
    *(
        form
        for make, more in ((_form, ""), (_fixed, ", fixed"))
        for form in (
            make("swiglu", "linear:gated_swiglu", f"one launch{more}", PRODUCT_SCRATCH, takes=_FITS + "fp8", fits=_FITS + "one_launch_gated", when=f"FP8, up to {NARROW_TOKENS} tokens", packed=True),
            make("swiglu", "linear:wide_swiglu", f"wide{more}", arch=_TMA, takes=_FITS + "fp8", fits=_FITS + "wide_gated", when="FP8, whole blocks", packed=True),
            make("swiglu", "linear:narrow_swiglu", f"narrow{more}", PRODUCT_SCRATCH, takes=_FITS + "fp8", when="FP8", packed=True),
            make("swiglu", "linear:plain_swiglu", f"plain{more}" if more else "plain, by torch"),
        )
    ),
    _form("route", "route:few_route", "one launch", PRODUCT_SCRATCH, fits=_FITS + "few_routed", when=f"bfloat16, up to {ROUTE_TOKENS} tokens"),
    _form("route", "route:many_route", "bfloat16, by torch", fits=_FITS + "both_routed", when="bfloat16"),
    _form("route", "route:float32_route", "float32, by torch"),
    _fixed("route", "route:fixed_route", "fixed", PRODUCT_SCRATCH, options=False),
    _form("experts", "moe_few:few_experts", "one launch", PRODUCT_SCRATCH, takes=_FITS + "fp4_experts", fits=_FITS + "few_experts", when=f"FP4, up to {ONE_LAUNCH} experts of all tokens", packed=True),
    _form("experts", "moe:experts", "", PRODUCT_SCRATCH, takes=_FITS + "fp4_experts", when="FP4", packed=True),
    _fixed("experts", "moe_few:few_experts", "one launch, fixed", PRODUCT_SCRATCH, takes=_FITS + "narrow_scales", suits=_FITS + "whole_channels", fits=_FITS + "fewest_experts", when=f"FP4 with narrow scales, up to {FIXED_ONE_LAUNCH} experts of all tokens", packed=True),
    _fixed("experts", "moe:experts", "fixed", PRODUCT_SCRATCH, takes=_FITS + "narrow_scales", when="FP4 with narrow scales", packed=True),
    _fixed("experts", "moe:experts", "fixed, scales apart", PRODUCT_SCRATCH, takes=_FITS + "fp4_experts", when="FP4", packed=True),
    _form("edit_logits", "edits", **_WHATEVER),
    _form("mask_logits", "edits", **_WHATEVER),
    _form("sample", "sampling", **_WHATEVER),
]  # fmt: skip
"""Within the backend, the first that fits a call runs it."""
