"""Checkpoints on disk from random weights: the release's formats, and those in which others publish."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dsv4.model.config import ModelConfig
from dsv4.model.export import export_release
from dsv4.model.names import tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.models import random_config_dict, random_weights

Flat = dict[str, Tensor]


def write_random(path: Path, kind: str = "flash", seed: int = 0, **overrides: Any) -> Path:
    """A random model in released names with plain float32 tensors, which keep every bit. No tokenizer: token ids only."""
    raw = random_config_dict(kind, **overrides)
    config = ModelConfig.from_dict(raw)
    weights = random_weights(config, seed)
    flat: Flat = {}
    for name, _ in tensors(config):
        head, _, tail = name.partition(".ffn.experts.")
        if tail:
            expert, part, _ = tail.split(".")
            flat[name] = weights[f"{head}.ffn.experts.{part}"][int(expert)].contiguous()
        else:
            flat[name] = weights[name].contiguous()
    path.mkdir(parents=True, exist_ok=True)
    save_file(flat, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(raw))
    return path


def write_release(path: Path, seed: int = 0, shards: int = 1, **overrides: Any) -> Path:
    """A small random model as DeepSeek releases them: FP4 experts (or what `expert_dtype` says), FP8, E8M0 scales."""
    raw = random_config_dict("flash", **overrides)
    config = ModelConfig.from_dict(raw)
    export_release(random_weights(config, seed), config, raw, path, shards=shards)
    return path


def write_base(path: Path, scales: Callable[[str, Tensor], Tensor], **overrides: Any) -> Path:
    """Like Flash-Base: FP8 experts, and scales that are numbers. `scales(name, powers)` makes them from float32 powers of
    two. config.json does not say that experts are FP8."""
    write_release(path, expert_dtype="fp8", **overrides)

    def change(flat: Flat) -> None:
        for name in [n for n in flat if n.endswith(".scale")]:
            flat[name] = scales(name, flat[name].float()).contiguous()

    rewrite(path, change)
    set_config(path, expert_dtype=None)
    return path


def write_nvfp4(path: Path, **quantization: Any) -> Path:
    """Like NVIDIA's NVFP4 releases: experts as U8 with FP8 scales per 16 and a scale per tensor; `quantization` is added to
    quantization_config."""
    write_release(path, compress_ratios=[0, 4])

    def change(flat: Flat) -> None:
        for name in [n for n in flat if ".experts." in n and n.endswith(".weight")]:
            stem, codes = name.removesuffix(".weight"), flat[name].view(torch.uint8)
            del flat[f"{stem}.scale"]
            flat[name] = codes
            flat[f"{stem}.weight_scale"] = torch.ones(codes.shape[0], codes.shape[1] // 8).to(
                torch.float8_e4m3fn
            )
            flat[f"{stem}.weight_scale_2"] = torch.tensor(0.01)
            flat[f"{stem}.input_scale"] = torch.tensor(1.0)

    rewrite(path, change)
    set_config(path, quantization_config={"quant_method": "fp8", **quantization})
    return path


def write_hub(cache: Path, repository: str, commits: dict[str, Path], main: str | None = None) -> Path:
    """A repository in a hub cache: each commit's snapshot is links to blobs, which are links to the files of a directory.
    `main`: the commit that its branch points to. Returns the repository's folder."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    for commit, source in commits.items():
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in source.iterdir():
            blob = folder / "blobs" / f"{commit}-{file.name}"
            blob.symlink_to(file)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    if main is not None:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(main)
    return folder


def rewrite(path: Path, change: Callable[[Flat], None]) -> None:
    """Changes the tensors of the only (or the first) shard in place. An index that is there must still fit."""
    file = sorted(path.glob("*.safetensors"))[0]
    flat = load_file(file)
    change(flat)
    save_file(flat, file)


def set_config(path: Path, **values: Any) -> None:
    """Fields of config.json; None takes one out."""
    file = path / "config.json"
    fields = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
