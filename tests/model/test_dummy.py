"""Weights that are made up: the release's shapes and formats, a rank's part without the whole, and how tokens are routed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4 import LLM, SamplingParams
from dsv4.errors import CheckpointError, ConfigError
from dsv4.model.config import ModelConfig
from dsv4.model.names import is_expert, tensors
from dsv4.model.parallel import Share
from dsv4.model.survey import survey, without_files
from dsv4.model.weights import load_weights
from dsv4.ops.weight import Fp4Weight, Fp8Weight, Packed, Weight, dense
from torch import Tensor

from tests.support.checkpoints import write_release
from tests.support.driving import Driver, random_tokens
from tests.support.models import random_config, random_config_dict
from tests.support.ranks import cut_weights

SMALL = random_config(
    "flash", compress_ratios=[0, 4, 128], num_hash_layers=1, moe_intermediate_size=128, o_groups=4
)


def _made(config: ModelConfig, seed: int = 0, **options: Any) -> dict[str, Weight]:
    found = without_files(config, seed)
    return load_weights("no such place", config, torch.float32, found=found, **options)


def _bytes(w: Weight) -> list[Tensor]:
    return [w.codes.view(torch.uint8), w.scales] if isinstance(w, Packed) else [w]


def _equal(a: Weight, b: Weight) -> bool:
    return type(a) is type(b) and all(map(torch.equal, _bytes(a), _bytes(b)))


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_every_tensor_is_in_the_shape_and_format_of_the_release(experts: str, tmp_path: Path) -> None:
    raw = dict(expert_dtype=experts, compress_ratios=[0, 4, 128], num_hash_layers=1)
    write_release(tmp_path, **raw)
    config = ModelConfig.from_dir(tmp_path)
    real = load_weights(tmp_path, config, torch.bfloat16, packed=True)
    found = without_files(config, 0)
    made = load_weights(tmp_path, config, torch.bfloat16, packed=True, found=found)
    assert made.keys() == real.keys()
    for name, w in real.items():
        assert type(made[name]) is type(w), name
        for a, b in zip(_bytes(made[name]), _bytes(w), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        assert torch.isfinite(dense(made[name]).float()).all(), name
    assert found.kept == survey(tmp_path, config).kept


def test_values_spread_as_stated() -> None:
    made = _made(random_config("flash", compress_ratios=[4], hidden_size=512, num_hash_layers=0), packed=True)
    assert isinstance(made["layers.0.ffn.experts.w1"], Fp4Weight)
    assert isinstance(made["layers.0.attn.wq_b.weight"], Fp8Weight)
    for name, w in made.items():
        x = dense(w).float()
        if name.endswith(("norm.weight", "_scale")):
            assert (x - (1 if "norm" in name else 0.5)).abs().max() < 0.5, name
        elif x.dim() > 1 and not name.endswith("ape") and ".gate.tid2eid" not in name:
            gain = float(x.std()) * (1 if name == "embed.weight" else x.shape[-1] ** 0.5)
            assert 0.6 < gain < 2.1 and abs(float(x.mean())) < 0.2 * float(x.std()), (name, gain)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_ranks_tensors_are_the_cut_of_the_wholes(ranks: int, packed: bool) -> None:
    whole = _made(SMALL, packed=packed)
    for rank in range(ranks):
        to = Share(rank, ranks, whole_attention=rank % 2 == 0)
        part, cut = _made(SMALL, packed=packed, share=to), cut_weights(SMALL, whole, to)
        assert part.keys() == cut.keys()
        for name in cut:
            assert _equal(part[name], cut[name]), (rank, name)


def test_a_seed_decides() -> None:
    one, same, other = _made(SMALL), _made(SMALL), _made(SMALL, seed=1)
    assert all(_equal(one[n], same[n]) for n in one)
    assert not any(_equal(one[n], other[n]) for n in one)
    ids = one["layers.0.ffn.gate.tid2eid"]
    assert isinstance(ids, Tensor) and all(len(set(row)) == len(row) for row in ids.tolist())
    assert int(ids.min()) >= 0 and int(ids.max()) < SMALL.num_experts


def _loads(config: ModelConfig, seed: int) -> list[Tensor]:
    """How many of 600 tokens choose each expert, by layer."""
    driver = Driver(config, _made(config, seed), max_len=640)
    chosen: list[Tensor] = []
    route: Callable[..., Any] = driver.model.ops.route

    def watched(*args: Any) -> Any:
        found = route(*args)
        chosen.append(found[0])
        return found

    driver.model.ops.route = watched  # type: ignore[method-assign]
    logits = driver.run(random_tokens(config, 600))
    assert torch.isfinite(logits).all() and 0.3 < float(logits.std()) < 3
    return [torch.bincount(x.flatten().long(), minlength=config.num_experts).float() for x in chosen]


def test_tokens_are_routed_as_by_a_trained_router() -> None:
    """Balanced but for what some tokens prefer: the busiest expert takes 1.05 to 3.5 times the mean, the entropy of the loads is that
    of at least 85% of the experts, and none is idle."""
    config = random_config(
        "flash",
        compress_ratios=[0, 4, 128, 4],
        n_routed_experts=32,
        num_experts_per_tok=4,
        hidden_size=256,
        num_hash_layers=1,
    )
    loads = _loads(config, seed=0)
    assert len(loads) == 4
    for load in loads:
        share = load / load.sum()
        effective = float(torch.exp(-(share * share.clamp(min=1e-9).log()).sum())) / config.num_experts
        busiest = float(load.max() / load.mean())
        assert 1.05 < busiest < 3.5 and effective > 0.85 and int(load.min()) > 0, (busiest, effective)


def _folder(path: Path, **changes: Any) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(random_config_dict("flash", **changes)))
    return str(path)


def test_an_engine_needs_config_json_alone(tmp_path: Path) -> None:
    model = _folder(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"of a download that was not finished")
    sampling = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    answers = []
    for seed in (0, 0, 1):
        llm = LLM(model, load_format="dummy", seed=seed, num_layers=3, num_pages=8, max_model_len=512)
        answers.append(llm.generate([[5, 6, 7]], sampling)[0].token_ids)
        said = "\n".join(llm.describe())
        assert f"made up from seed {seed}" in said and "left out: 3 layers" in said, said
        assert llm.tokenizer is None and "none: token ids in, token ids out" in said
    assert answers[0] == answers[1] and len(answers[0]) == 3
    with pytest.raises(CheckpointError, match="1 of 2 shards are missing"):
        LLM(model)


def test_fewer_layers_of_a_checkpoint(tmp_path: Path) -> None:
    write_release(tmp_path, compress_ratios=[0, 4, 128, 4])
    whole = ModelConfig.from_dir(tmp_path)
    few = whole.first(2)
    assert (few.num_layers, few.left_out, few.compress_ratios) == (2, 2, (0, 4))
    weights, all_of_it = (load_weights(tmp_path, c, torch.float32) for c in (few, whole))
    kept = {n for n, _ in tensors(few) if not is_expert(n)}
    assert kept <= weights.keys() and not any(n.startswith(("layers.2", "layers.3")) for n in weights)
    assert all(_equal(w, all_of_it[n]) for n, w in weights.items())
    for wrong in (1, 5):  # the first layer has no history
        with pytest.raises(ConfigError, match=rf"num_layers is {wrong}; .* takes 2 \(.*\) to 4"):
            whole.first(wrong)
