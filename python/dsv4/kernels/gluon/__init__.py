"""Kernels in Gluon, Triton's explicit dialect, for Hopper (sm_90): warp roles, barriers and layouts are written out."""

from __future__ import annotations

from dsv4.kernels.device import capability, has_triton

OPS: dict[str, str] = {
    "sparse_attention": "attention",
    "index_select": "indexer",
}
"""Op -> module of this package that defines a function of the op's name. One line per op."""


def usable(device: str) -> bool:
    """Whether these kernels run on "cpu" or "cuda" of this machine."""
    return device == "cuda" and has_triton() and capability()[0] == 9
