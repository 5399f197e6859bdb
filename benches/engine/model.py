"""A random model of Flash's widths with few layers, as a directory that an engine of this process can be made from."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from dsv4.engine import build, checks
from dsv4.model.config import ModelConfig
from dsv4.model.names import tensors
from dsv4.model.survey import Survey
from safetensors.torch import save_file

from benches.decode_step import random_weights


def flash(layers: int) -> str:
    """A directory with the config.json of a model of Flash's widths; engines in this process make its weights."""
    source = Path(build.__file__).parents[1] / "model/configs/v4-flash.json"
    raw = json.loads(source.read_text())
    raw |= {"num_hidden_layers": layers, "num_hash_layers": 1, "num_nextn_predict_layers": 0}
    raw["compress_ratios"] = [4, 128] * (layers // 2)
    path = Path(tempfile.mkdtemp())
    (path / "config.json").write_text(
        json.dumps({k: v for k, v in raw.items() if not k.startswith("dspark")})
    )

    save_file({}, path / "model.safetensors")

    def surveyed(_: Path, config: ModelConfig) -> Survey:
        kept = dict(tensors(config))
        return Survey(
            config, stored={}, kept=kept, rescaled=(), expanded=(), buffers=0, asked=config.expert_dtype
        )

    checks.survey = surveyed
    build.load_weights = lambda source, config, *_, device, **__: random_weights(config, device)
    return str(path)
