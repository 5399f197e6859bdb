"""Kernels in Gluon, Triton's explicit dialect, for Hopper (sm_90) and in part for Blackwell (sm_100): warp roles,
barriers and layouts are written out."""

from __future__ import annotations

from dsv4.kernels.device import capability, has_triton

OPS: dict[str, str] = {
    "sparse_attention": "attention",
    "index_select": "indexer",
    "experts": "moe",
}
"""Op -> module of this package that defines a function of the op's name. One line per op."""


ON: dict[str, tuple[int, ...]] = {"sparse_attention": (9, 10), "index_select": (9,), "experts": (9,)}
"""Op -> major compute capabilities that have a form of it."""

UNTRIED: dict[str, tuple[int, ...]] = {"sparse_attention": (10,)}
"""Those of them that are compiled and were never run: they are taken only when `gluon` is named."""


def usable(device: str, op: str) -> bool:
    """Whether the op has a kernel here for "cpu" or "cuda" of this machine."""
    return device == "cuda" and has_triton() and capability()[0] in ON[op]


def untried(device: str, op: str) -> bool:
    """Whether the op's form for this machine was never run."""
    return capability()[0] in UNTRIED.get(op, ())
