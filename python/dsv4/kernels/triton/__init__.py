"""Kernels in plain Triton (`tl`): any CUDA device from Ampere on, wgmma on Hopper and tcgen05 on Blackwell through
`tl.dot`, and the interpreter in tests."""

from __future__ import annotations

from dsv4.kernels.device import capability, has_triton

OPS: dict[str, str] = {
    "sparse_attention": "attention",
    "partial_attention": "attention",
    "merge_attention": "attention",
    "rmsnorm": "norm",
    "rmsnorm_quantised": "norm",
    "norm_rope": "norm",
    "write_rows": "rows",
    "copy_rows": "rows",
    "compress": "compressor",
    "hc_pre": "mhc",
    "hc_post": "mhc",
    "hc_head": "mhc",
    "index_select": "indexer",
    "index_candidates": "indexer",
    "merge_candidates": "topk",
    "linear": "linear",
    "linear_f32": "linear",
    "grouped_linear": "linear",
    "logits": "linear",
    "swiglu": "linear",
    "route": "route",
    "experts": "moe",
    "edit_logits": "edits",
    "sample": "sampling",
}
"""Op -> module of this package that defines a function of the op's name. One line per op."""


def usable(device: str, op: str) -> bool:
    """Whether these kernels run on "cpu" or "cuda" of this machine."""
    return device == "cuda" and has_triton() and capability() >= (8, 0)
