"""What the Gluon kernels run, and from which size on. Imports neither triton nor torch."""

from __future__ import annotations

from typing import Any

from dsv4.kernels.device import has_triton
from dsv4.kernels.triton.forms import ATTENTION_SCRATCH, INDEX_SCRATCH
from dsv4.ops.forms import Dims, Form, Scratch

MANY = 32
"""Slots an expert has on average from which `moe.py` runs."""
BUSY = 4
"""Items (a token and up to 64 of its heads) a multiprocessor above which CTAs stay on Hopper (hopper_stream.py): prefill. With
fewer, with splits, and for all visible entries, whose number differs from token to token, a CTA takes one item."""
MOST_BLOCKS = 32
"""Key blocks of a CTA; their row places lie in shared memory."""
BLOCK, HEADS = 64, 64
"""Keys of a block and heads of an item."""
LONG_PROGRAMS = 16
"""Programs a multiprocessor that leave their part of a history, which is longer than one of them takes, at a time: so many that little
is lost at the end of each of them."""


def _long_parts(d: Dims) -> tuple[tuple[str, int], ...]:
    """None where one program takes all keys of a token."""
    splits = -(-d.keys // (BLOCK * MOST_BLOCKS))
    heads = min(LONG_PROGRAMS * d.multiprocessors * HEADS, d.tokens * splits * d.heads) if splits > 1 else 0
    return ("heads", heads), ("channels", d.head_dim), ("bytes", 4)


LONG_SCRATCH = Scratch("partial results of attention to long histories", _long_parts)


def lacks() -> str:
    return "" if has_triton() else "triton"


BACKEND = __package__.rpartition(".")[2]
_FITS = f"{__package__}.fits:"


def _form(op: str, at: str, name: str = "", arch: tuple[int, int] = (9, 9), **says: Any) -> Form:
    return Form(op, BACKEND, f"{__package__}.{at}", name, arch=arch, lacks=lacks, **says)


_V4 = "bfloat16, 512 channels, rows fp8_ds_mla"
_BUSY = f"{_V4}, more than {BUSY} x {HEADS} heads a multiprocessor, selected entries"
_KEYS = "mxfp4 of 128 channels, 33 to 64 heads"
_ATTENTION = (ATTENTION_SCRATCH,)
_LONG = (ATTENTION_SCRATCH, LONG_SCRATCH)
_OWN: dict[str, Any] = dict(family="hopper", deterministic=True)
FORMS = [
    _form("sparse_attention", "attention:stream", "stream", suits=_FITS + "v4_attention", fits=_FITS + "busy_attention",
          when=_BUSY, family="hopper"),
    _form("sparse_attention", "attention:sparse_attention", "hopper", suits=_FITS + "v4_attention", when=_V4, scratch=_LONG),
    _form("sparse_attention", "attention:fixed_sparse_attention", "hopper, cut by length", suits=_FITS + "v4_attention", when=_V4, scratch=_ATTENTION, **_OWN),
    _form("partial_attention", "attention:stream_part", "stream", suits=_FITS + "v4_part", fits=_FITS + "busy_part", when=_BUSY, family="hopper"),
    _form("partial_attention", "attention:partial_attention", "hopper", suits=_FITS + "v4_part", when=_V4, scratch=_LONG),
    _form("partial_attention", "attention:fixed_partial_attention", "hopper, cut by length", suits=_FITS + "v4_part", when=_V4, scratch=_ATTENTION, **_OWN),
    _form("sparse_attention", "attention:blackwell", "blackwell", (10, 10), suits=_FITS + "v4_attention", when=_V4, untried=True, scratch=_LONG),
    _form("index_select", "indexer:index_select", suits=_FITS + "v4_keys", fits=_FITS + "more_than_selected", when=f"{_KEYS}, more entries than top-k", scratch=(INDEX_SCRATCH,)),
    _form("index_select", "indexer:fixed_index_select", "one score", suits=_FITS + "v4_keys", when=_KEYS, scratch=(INDEX_SCRATCH,), **_OWN),
    _form("index_candidates", "indexer:index_candidates", suits=_FITS + "short_keys", when=f"{_KEYS}, aligned", scratch=(INDEX_SCRATCH,), family="hopper"),
    _form("experts", "moe:experts", takes="dsv4.kernels.triton.fits:narrow_scales", fits=_FITS + "many_slots", packed=True,
          when=f"FP4 with narrow scales, {MANY} slots an expert and more", family="triton"),
]  # fmt: skip
