"""Writes a checkpoint in the release format: released names, FP8 with 128 x 128 scales, FP4 experts, BF16, F32, I64."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv4.formats import E4M3_MAX, FP4_MAX, fp4_encode, fp4_pack, pow2_ceil, ue8m0_encode
from dsv4.model.config import ModelConfig
from dsv4.model.names import FP4_BLOCK, FP8_BLOCK, scale_name, tensors

_TINY = 1e-10


def export_release(weights: Mapping[str, Tensor], config: ModelConfig, raw: Mapping[str, Any], path: Path, shards: int = 1) -> None:
    """Quantises `weights` (released names, experts stacked, any float dtype) and writes shards, index and `raw` as config.json.

    Values that already lie on a format's grid come back exactly from `load_weights`.
    """
    path.mkdir(parents=True, exist_ok=True)
    files = dict(_stored(weights, config))
    per_shard = -(-len(files) // shards)
    weight_map = {}
    for i in range(shards):
        part = dict(list(files.items())[i * per_shard : (i + 1) * per_shard])
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, path / name)
        weight_map |= dict.fromkeys(part, name)
    size = sum(t.numel() * t.element_size() for t in files.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(dict(raw), indent=1))


def _stored(weights: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    for name, spec in tensors(config):
        value = _of(weights, name)
        if spec.storage == "fp8":
            codes, scales = quantise_fp8(value)
            yield name, codes
            yield scale_name(name), scales
        elif spec.storage == "fp4":
            packed, scales = quantise_fp4(value)
            yield name, packed
            yield scale_name(name), scales
        else:
            dtype = {"bf16": torch.bfloat16, "f32": torch.float32, "i64": torch.int64}[spec.storage]
            yield name, value.to(dtype).contiguous()


def _of(weights: Mapping[str, Tensor], name: str) -> Tensor:
    head, _, tail = name.partition(".ffn.experts.")
    if not tail:
        return weights[name]
    expert, part, _ = tail.split(".")
    return weights[f"{head}.ffn.experts.{part}"][int(expert)]


def quantise_fp8(value: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> e4m3 [out, in] and ue8m0 scales [ceil(out / 128), ceil(in / 128)]; edge blocks may be smaller."""
    out, width = value.shape
    rows, columns = -(-out // FP8_BLOCK), -(-width // FP8_BLOCK)
    padded = torch.nn.functional.pad(value.float(), (0, columns * FP8_BLOCK - width, 0, rows * FP8_BLOCK - out))
    blocks = padded.unflatten(0, (rows, FP8_BLOCK)).unflatten(2, (columns, FP8_BLOCK))
    scale = pow2_ceil(blocks.abs().amax((1, 3)).clamp(min=_TINY) / E4M3_MAX)
    codes = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:out, :width]
    return codes.to(torch.float8_e4m3fn).contiguous(), ue8m0_encode(scale).view(torch.float8_e8m0fnu)


def quantise_fp4(value: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> packed e2m1 [out, in / 2] (int8) and ue8m0 scales [out, in / 32]."""
    blocks = value.float().unflatten(1, (-1, FP4_BLOCK))
    scale = pow2_ceil(blocks.abs().amax(-1).clamp(min=_TINY) / FP4_MAX)
    packed = fp4_pack(fp4_encode(blocks / scale[..., None]).flatten(1))
    return packed.view(torch.int8).contiguous(), ue8m0_encode(scale).view(torch.float8_e8m0fnu)
