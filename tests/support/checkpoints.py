"""Checkpoints on disk from random weights, for tests that start the whole engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from dsv4.model.config import ModelConfig
from dsv4.model.names import tensors
from safetensors.torch import save_file

from tests.support.models import random_config_dict, random_weights


def write_random(path: Path, kind: str = "flash", seed: int = 0, **overrides: Any) -> Path:
    """A random model in released names with plain float32 tensors, which keep every bit. No tokenizer: token ids only."""
    raw = random_config_dict(kind, **overrides)
    config = ModelConfig.from_dict(raw)
    weights = random_weights(config, seed)
    flat: dict[str, torch.Tensor] = {}
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
