"""Checkpoints: both namings give the same tensors, damage is one line at once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4 import LLM
from dsv4.errors import CheckpointError, ConfigError
from dsv4.model.config import ModelConfig
from dsv4.model.export import export_release
from dsv4.model.names import DTYPE_BYTES, TensorSpec, tensors
from dsv4.model.parallel import Share
from dsv4.model.weights import expanded_bytes, load_weights
from dsv4.ops.weight import Fp4Weight, Fp8Weight, dense
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.driving import Chunk, Driver
from tests.support.models import hf_twin, random_config_dict, random_weights

NARROW = {
    "hidden_size": 192,
    "moe_intermediate_size": 64,
    "compress_ratios": [0, 0, 4, 128, 4],
    "q_lora_rank": 96,
}
"""Small, and no multiple of 128, so that scales have ragged edges."""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A random model with Flash's names, dtypes and structure in the release format, in two shards."""
    raw = random_config_dict("flash", **NARROW)
    path = tmp_path_factory.mktemp("release")
    config = ModelConfig.from_dict(raw)
    export_release(random_weights(config, seed=3), config, raw, path, shards=2)
    return path, raw


def test_stored_names_and_dtypes_are_the_releases(release: tuple[Path, dict[str, Any]]) -> None:
    path, raw = release
    found = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            found |= {n: (f.get_slice(n).get_dtype(), tuple(f.get_slice(n).get_shape())) for n in f.keys()}  # noqa: SIM118
    expected = {
        n: (d, s) for name, spec in tensors(ModelConfig.from_dict(raw)) for n, d, s in spec.stored(name)
    }
    assert found == expected
    assert found["layers.2.attn.wq_a.scale"] == ("F8_E8M0", (1, 2))
    assert found["layers.0.ffn.experts.7.w1.weight"] == ("I8", (64, 96))


def test_the_transformers_named_twin_is_equal(release: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, raw = release
    config = ModelConfig.from_dict(raw)
    ours = load_weights(path, config, torch.float32)
    hf_twin(config, ours).save_pretrained(tmp_path)
    theirs = ModelConfig.from_dir(tmp_path)
    assert (theirs.compress_ratios, theirs.yarn, theirs.num_hash_layers) == (
        config.compress_ratios,
        config.yarn,
        config.num_hash_layers,
    )
    again = load_weights(tmp_path, theirs, torch.float32)
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_what_lies_on_the_grid_comes_back_exactly(
    release: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, raw = release
    config = ModelConfig.from_dict(raw)
    once = load_weights(path, config, torch.float32)
    export_release(once, config, raw, tmp_path, shards=3)
    calls: list[tuple[int, int, str]] = []
    again = load_weights(tmp_path, config, torch.float32, lambda *news: calls.append(news))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert calls[-1][0] == calls[-1][1] and [c[0] for c in calls] == sorted(c[0] for c in calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_weights_take_the_bytes_of_the_file_and_give_the_same_bits(
    release: tuple[Path, dict[str, Any]], dtype: torch.dtype
) -> None:
    path, raw = release
    config = ModelConfig.from_dict(raw)
    expanded = load_weights(path, config, dtype)
    packed = load_weights(path, config, dtype, packed=True)
    assert sum(w.nbytes for w in expanded.values()) == expanded_bytes(config, dtype)
    assert sum(w.nbytes for w in packed.values()) == sum(
        prod(shape) * (dtype.itemsize if kind == "BF16" else DTYPE_BYTES[kind])
        for name, spec in tensors(config)
        for _, kind, shape in spec.stored(name)
    )
    assert isinstance(packed["layers.2.attn.wq_a.weight"], Fp8Weight)
    assert isinstance(packed["layers.2.ffn.experts.w2"], Fp4Weight)
    assert packed.keys() == expanded.keys()
    assert all(torch.equal(dense(packed[name]), expanded[name]) for name in packed)
    ids = torch.arange(40) * 5 % config.vocab_size
    logits = [Driver(config, w).step([Chunk(0, ids, 0)])[0] for w in (expanded, packed)]
    assert torch.equal(*logits)


def test_a_stack_of_experts_that_are_stored_unlike_each_other_is_expanded(
    release: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, raw = release
    config = ModelConfig.from_dict(raw)
    name = "layers.0.ffn.experts.3.w1.weight"
    expanded = load_weights(path, config, torch.float32)
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def widen(flat: dict[str, torch.Tensor]) -> None:
        flat[name] = expanded["layers.0.ffn.experts.w1"][3].contiguous()
        del flat[name.replace("weight", "scale")]

    rewrite(tmp_path, widen)
    mixed = load_weights(tmp_path, config, torch.float32, packed=True)
    stack = mixed["layers.0.ffn.experts.w1"]
    assert isinstance(stack, torch.Tensor) and torch.equal(stack, expanded["layers.0.ffn.experts.w1"])
    assert isinstance(mixed["layers.0.ffn.experts.w3"], Fp4Weight)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Changes the tensors of the shard that holds the first layers."""
    file = path / "model-00001-of-00002.safetensors"
    flat = load_file(file)
    change(flat)
    save_file(flat, file)


def truncate(path: Path) -> None:
    file = path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def set_config(path: Path, **values: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


WQ = "layers.0.attn.wq_a.weight"
DAMAGE: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "truncated": (truncate, CheckpointError, "truncated"),
    "missing tensor": (lambda p: rewrite(p, lambda t: t.pop(WQ)), CheckpointError, WQ),
    "wrong dtype": (
        lambda p: rewrite(p, lambda t: t.update({WQ: t[WQ].to(torch.float32).long()})),
        CheckpointError,
        "I64",
    ),
    "wrong shape": (
        lambda p: rewrite(p, lambda t: t.update({WQ: t[WQ][:-1].contiguous()})),
        CheckpointError,
        "shape",
    ),
    "missing scale": (
        lambda p: rewrite(p, lambda t: t.pop(WQ.replace("weight", "scale"))),
        CheckpointError,
        "layers.0.attn.wq_a.scale",
    ),
    "foreign tensor": (
        lambda p: rewrite(p, lambda t: t.update({"layers.0.x": torch.ones(1)})),
        CheckpointError,
        "layers.0.x",
    ),
    "missing shard": (lambda p: (p / "model-00002-of-00002.safetensors").unlink(), CheckpointError, "00002"),
    "unknown scoring": (lambda p: set_config(p, scoring_func="softmax"), ConfigError, "scoring_func"),
    "unknown model": (lambda p: set_config(p, model_type="deepseek_v3"), ConfigError, "deepseek_v4"),
    "no directory": (lambda p: [f.unlink() for f in p.iterdir()] and None, ConfigError, "config.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_line_in_under_two_seconds(
    release: tuple[Path, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    for file in release[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage, kind, words = DAMAGE[name]
    damage(tmp_path)
    start = time.monotonic()
    with pytest.raises(kind) as e:
        LLM(str(tmp_path), num_pages=8, block_size=128)
    assert time.monotonic() - start < 20
    assert "\n" not in str(e.value) and words in str(e.value), str(e.value)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("ranks", "whole"), [(2, False), (2, True)])
def test_the_ranks_read_the_parts_of_every_tensor(
    release: tuple[Path, dict[str, Any]], ranks: int, whole: bool, packed: bool
) -> None:
    path, raw = release
    config = ModelConfig.from_dict(raw)
    shares = [Share(r, ranks, whole) for r in range(ranks)]
    all_of = load_weights(path, config, torch.float32, packed=packed)
    read: list[list[int]] = [[] for _ in shares]
    parts = [
        load_weights(
            path,
            config,
            torch.float32,
            lambda *news, r=r: read[r].append(news[0]),
            packed=packed,
            share=share,
        )
        for r, share in enumerate(shares)
    ]
    for name, weight in all_of.items():
        stacked = ".ffn.experts." in name
        axis = dict(tensors(config))[
            name.replace("experts.", "experts.0.") + ".weight" if stacked else name
        ].axis
        pieces = [dense(p[name]) for p in parts]
        if axis is None or (whole and ".attn." in name):
            assert all(torch.equal(piece, dense(weight)) for piece in pieces)
        else:
            assert torch.equal(torch.cat(pieces, axis + (stacked and 1)), dense(weight)), name
            assert type(parts[0][name]) is type(weight)
    assert all(seen[-1] < sum(w.nbytes for w in all_of.values()) for seen in read)


def test_a_cut_across_blocks_that_share_a_scale_is_refused() -> None:
    spec = TensorSpec((384, 96), "fp8", 0)
    assert Share(2, 3).cut("x", spec) == (0, 256, 384) and Share(5, 6).cut("x", spec) == (0, 320, 384)
    for rank in range(2):
        with pytest.raises(
            ConfigError, match=r"size is 2; it cuts x every 192 of 384, across .* divisor of 3"
        ):
            Share(rank, 2).cut("x", spec)
    with pytest.raises(ConfigError, match="every 16 of 64, across blocks of 32"):
        Share(1, 4).cut("x", TensorSpec((96, 64), "fp4", 1))
    assert Share(1, 2).of("x", TensorSpec((7,), "f32", 0)).shape == (3,)
    with pytest.raises(ConfigError, match="rank is 2; of 2 ranks it must be 0 to 1"):
        Share(2, 2)
