"""Bytes of a stored row, without torch: what layouts, plans and codecs agree on.

A format keeps a row in one or two *planes*: its data, and its scales if it has any (see `dsv4.formats`).
"""

from __future__ import annotations

from dsv4.errors import ConfigError
from dsv4.spelling import nearest

NOPE_BLOCK, MLA_SCALE_BYTES = 64, 8
"""fp8_ds_mla: channels that share a scale, and bytes that a row keeps for scales."""
FP4_BLOCK = 32
"""mxfp4 rows and FP4 weights: channels that share a scale."""
FP8_BLOCK = 128
"""FP8 weights: rows and channels that share a scale."""
FP8_SCALE_BYTES = 4
"""fp8: one float32 scale per row."""
ROW_FORMATS = ("float32", "bfloat16", "fp8_ds_mla", "mxfp4", "fp8")


def planes(name: str, dim: int, rope_dim: int) -> tuple[int, ...]:
    """Bytes of a row of `dim` channels, the last `rope_dim` rotary, in each plane. Raises ConfigError."""
    if name not in ROW_FORMATS:
        raise ConfigError(
            f"row format is {name!r}; known: {', '.join(ROW_FORMATS)}{nearest(name, ROW_FORMATS)}"
        )
    if name == "fp8_ds_mla":
        if -(-(dim - rope_dim) // NOPE_BLOCK) > MLA_SCALE_BYTES:
            most = MLA_SCALE_BYTES * NOPE_BLOCK
            raise ConfigError(f"head_dim is {dim}; fp8_ds_mla holds {most} channels before the rope part")
        return dim + rope_dim, MLA_SCALE_BYTES
    if name == "mxfp4":
        if dim % FP4_BLOCK:
            raise ConfigError(f"index_head_dim is {dim}; mxfp4 rows need a multiple of {FP4_BLOCK}")
        return dim // 2, dim // FP4_BLOCK
    if name == "fp8":
        return dim, FP8_SCALE_BYTES
    return (dim * {"float32": 4, "bfloat16": 2}[name],)


def row_bytes(name: str, dim: int, rope_dim: int) -> int:
    """Bytes of a row: 584 for fp8_ds_mla at V4's dims, 68 for mxfp4 and 132 for fp8 at 128 channels."""
    return sum(planes(name, dim, rope_dim))


def plane_bytes(name: str, row_bytes: int) -> tuple[int, ...]:
    """Bytes of a row in each plane, from the row's bytes alone (for copies that do not decode)."""
    scales = {"fp8_ds_mla": MLA_SCALE_BYTES, "fp8": FP8_SCALE_BYTES}
    if name == "mxfp4":  # n / 2 data and n / 32 scale bytes
        return row_bytes * 16 // 17, row_bytes // 17
    return (row_bytes - scales[name], scales[name]) if name in scales else (row_bytes,)
