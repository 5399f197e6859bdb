"""`dsv4 plan` of a directory: what its files hold, as `dsv4 serve` loads it, and the same refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4 import LLM
from dsv4.cli import main
from dsv4.model.config import ModelConfig
from dsv4.model.weights import load_weights
from dsv4.plan.weights import Weights, find_weights
from torch import Tensor

from tests.support.checkpoints import (
    Flat,
    rewrite,
    set_config,
    write_base,
    write_nvfp4,
    write_random,
    write_release,
)
from tests.support.models import random_config_dict

Capture = pytest.CaptureFixture[str]


def plan(capsys: Capture, path: Path, *flags: str) -> dict[str, Any]:
    assert main(["plan", str(path), "--gpu", "h100", "--max-len", "4096", *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def loaded(path: Path, **how: Any) -> int:
    weights = load_weights(path, ModelConfig.from_dir(path), torch.bfloat16, packed=True, **how)
    return sum(w.nbytes for w in weights.values())


def experts(p: dict[str, Any]) -> dict[str, int]:
    return {row["dtype"]: row["total"] for row in p["weights"] if row["group"] == "routed experts"}


def odd(name: str, scale: Tensor) -> Tensor:
    return 0.7 * scale if ".attn." in name else scale


CHECKPOINTS = {
    "release": lambda p: write_release(p, shards=2),
    "base, E8M0": lambda p: (write_release(p, expert_dtype="fp8"), set_config(p, expert_dtype=None)),
    "base, powers of two": lambda p: write_base(p, lambda name, scale: scale),
    "base, other numbers": lambda p: write_base(p, odd),
    "base, experts too": lambda p: write_base(p, lambda name, scale: (0.7 * scale).bfloat16()),
    "plain": write_random,
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_is_planned_is_what_is_loaded(tmp_path: Path, capsys: Capture, name: str) -> None:
    CHECKPOINTS[name](tmp_path)
    p = plan(capsys, tmp_path)
    assert p["memory"]["weights"] == loaded(tmp_path)
    headers = [
        json.loads(f.read_bytes()[8:][: int.from_bytes(f.read_bytes()[:8], "little")])
        for f in tmp_path.glob("*.safetensors")
    ]
    places = [v["data_offsets"] for h in headers for k, v in h.items() if k != "__metadata__"]
    assert p["release"]["tensors"] == len(places)
    assert p["release"]["bytes"] == sum(end - start for start, end in places)
    count = len(headers)
    assert p["counted_from"] == f"the headers in {tmp_path} (files: {count})"


def test_fp8_experts_that_the_config_does_not_mention(tmp_path: Path, capsys: Capture) -> None:
    """Flash: 147 GB of experts as FP4, 277 as FP8."""
    write_release(tmp_path, compress_ratios=[0, 4])
    fp4 = experts(plan(capsys, tmp_path))
    write_base(tmp_path, lambda name, scale: scale, compress_ratios=[0, 4])
    p = plan(capsys, tmp_path)
    assert p["notes"][0] == "experts are fp8 in the files; config.json means fp4"
    assert experts(p)["fp8"] == 2 * fp4["fp4"] and "fp4" not in experts(p)
    assert main(["plan", str(tmp_path), "--gpu", "h100", "--max-len", "4096"]) == 0
    text = capsys.readouterr().out
    assert "experts are fp8 in the files" in text and f"headers in {tmp_path} (files: 1)" in text


def test_a_config_that_says_otherwise_than_the_files(tmp_path: Path, capsys: Capture) -> None:
    write_release(tmp_path, compress_ratios=[0, 4])
    set_config(tmp_path, expert_dtype="fp8")
    p = plan(capsys, tmp_path)
    assert set(experts(p)) == {"fp4", "scales"} and p["memory"]["weights"] == loaded(tmp_path)
    assert p["notes"] == ["experts are fp4 in the files; config.json means fp8"]


def test_the_drafter_is_counted_from_the_files(tmp_path: Path, capsys: Capture) -> None:
    nano = Path(__file__).parents[2] / "python" / "dsv4" / "data" / "nano"
    assert plan(capsys, nano, "--draft")["memory"]["weights"] == loaded(nano, draft=True)


def test_a_config_alone_says_so(tmp_path: Path, capsys: Capture) -> None:
    write_release(tmp_path, compress_ratios=[0, 4])
    whole = plan(capsys, tmp_path)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    p = plan(capsys, tmp_path)
    assert p["counted_from"] == "config.json; there are no weights beside it"
    assert p["memory"] == whole["memory"] and p["release"] == whole["release"]


def test_plan_and_serve_refuse_in_the_same_words_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from dsv4.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules, 'torch was imported'; sys.exit(code)"
    )

    def said(command: str) -> str:
        flags = ["--gpu", "h100"] if command == "plan" else ["--port", "0"]
        arguments = [sys.executable, "-c", code, command, str(tmp_path), *flags]
        run = subprocess.run(arguments, capture_output=True, text=True)
        assert run.returncode in (1, 2) and run.stdout == "" and run.stderr.count("\n") == 1, run.stderr
        return run.stderr

    def gptq(flat: Flat) -> None:
        flat["layers.1.ffn.experts.0.w1.g_idx"] = torch.zeros(128, dtype=torch.int32)

    write_nvfp4(tmp_path, moe_quant_algo="NVFP4")
    assert said("plan") == said("serve") and "moe_quant_algo" in said("plan")
    set_config(tmp_path, quantization_config=None)
    assert said("plan") == said("serve") and "NVFP4" in said("plan")
    rewrite(write_release(tmp_path, compress_ratios=[0, 4]), gptq)
    assert said("plan") == said("serve") and "GPTQ" in said("plan")
    rewrite(tmp_path, lambda flat: (flat.pop("layers.1.ffn.experts.0.w1.g_idx"), flat.pop("norm.weight")))
    assert said("plan") == said("serve") and "norm.weight" in said("plan")


def test_the_simulator_reads_the_experts_of_the_files_too(tmp_path: Path) -> None:
    write_base(tmp_path, lambda name, scale: scale, compress_ratios=[0, 4])
    config, weights, source = find_weights(str(tmp_path / "config.json"))
    assert config.expert_dtype == "fp8" and source == f"the headers in {tmp_path} (files: 1)"
    assert Weights.released(config).kinds == weights.kinds


MOVED = {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp8"}


@pytest.mark.parametrize(
    ("fields", "assumes"),
    [
        ({}, True),
        ({"expert_dtype": "fp4"}, False),
        ({"expert_dtype": "fp8"}, False),
        ({"quantization_config": MOVED}, False),
    ],
)
def test_what_a_config_alone_leaves_open_is_told(
    tmp_path: Path, capsys: Capture, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], assumes: bool
) -> None:
    """FP8 experts were planned, and made up, as FP4 without a word; from Python for longer."""
    raw = random_config_dict("flash")
    raw.pop("expert_dtype", None)
    files = [tmp_path / "config.json", tmp_path / "other.json"]
    for file in files:
        file.write_text(json.dumps(raw | fields))
    told = "experts are taken as fp4, as config.json has no expert_dtype"
    for path in (tmp_path, *files):
        assert main(["plan", str(path), "--gpu", "h200"]) == 0
        assert capsys.readouterr().out.count(told) == assumes
    LLM(str(tmp_path), load_format="dummy", device="cpu", num_pages=8, block_size=128)
    assert caplog.text.count(told) == assumes


def test_the_engine_prints_what_differs(tmp_path: Path) -> None:
    from dsv4.config import EngineConfig
    from dsv4.engine.build import build_engine

    write_base(tmp_path, odd, compress_ratios=[0, 4])
    built = build_engine(EngineConfig(model=str(tmp_path), device="cpu", num_pages=8, block_size=128))
    shown = "\n".join(built.describe())
    assert "experts are fp8 in the files; config.json means fp4" in shown
    assert re.search(r"scales in F32 or BF16, .*: \d+ matrices", shown)
    assert built.model_config.expert_dtype == "fp8"
