"""A model of Flash's widths with few layers, as a directory for `load_format="dummy"`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import dsv4


def flash(layers: int) -> str:
    """A directory with the config.json of a model of Flash's widths: CSA and HCA layers in turn, the first routed by token ids; with as many
    layers as Flash has, Flash."""
    raw = json.loads((Path(dsv4.__file__).parent / "model/configs/v4-flash.json").read_text())
    if layers < raw["num_hidden_layers"]:
        raw |= {
            "num_hidden_layers": layers,
            "num_hash_layers": 1,
            "compress_ratios": [4, 128] * (layers // 2),
        }
    raw["num_nextn_predict_layers"] = 0
    path = Path(tempfile.mkdtemp())
    kept = {k: v for k, v in raw.items() if not k.startswith("dspark")}
    (path / "config.json").write_text(json.dumps(kept))
    return str(path)
