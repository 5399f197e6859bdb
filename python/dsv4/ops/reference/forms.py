"""Every op has a form here, which takes any call on any device. It looks at values on the host, so a CUDA graph can hold almost none."""

from __future__ import annotations

from dsv4.ops.forms import Form

_MODULES = {
    "decode": ("decode_tables",),
    "linear": ("linear", "linear_f32", "grouped_linear", "logits"),
    "norm": ("rmsnorm", "rmsnorm_quantised", "norm_rope"),
    "rows": ("write_rows", "copy_rows"),
    "state": ("copy_state",),
    "hyper": ("hc_next", "hc_post", "hc_head"),
    "compress": ("compress",),
    "index": ("index_select", "index_candidates", "merge_candidates", "entries_of_part"),
    "attention": ("sparse_attention", "partial_attention", "merge_attention"),
    "moe": ("route", "experts", "swiglu"),
    "edits": ("edit_logits", "mask_logits"),
    "sample": ("sample",),
}

FORMS = [
    Form(
        op,
        "reference",
        f"{__package__}.{module}:{op}",
        capturable=op in ("copy_rows", "decode_tables"),
        family="reference",
    )
    for module, ops in _MODULES.items()
    for op in ops
]
