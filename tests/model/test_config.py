"""config.json: the released form, the one of transformers, and one clear line for everything else."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from dsv4._core import LayoutSpec
from dsv4.errors import ConfigError
from dsv4.model.config import ModelConfig
from dsv4.model.names import release_totals

from tests.support.models import random_config_dict

FLASH_RATIOS = (0, 0, *(4, 128) * 20, 4)
PRO_RATIOS = (128, 128, *(4, 128) * 29, 4)

RELEASES = {
    # preset: ratios, draft, tensors, bytes of tensor data (the published totals)
    "v4-flash-preview": (FLASH_RATIOS, "mtp", 69_187, 159_609_485_896),
    "v4-flash": (FLASH_RATIOS, "dspark", 72_317, 166_878_536_440),
    "v4-pro-preview": (PRO_RATIOS, "mtp", 145_116, 864_704_792_696),
    "v4-pro": (PRO_RATIOS, "dspark", 149_782, 892_727_580_904),
}


@pytest.mark.parametrize("name", RELEASES)
def test_shapes_reproduce_the_published_sizes(name: str) -> None:
    ratios, draft, count, size = RELEASES[name]
    config = ModelConfig.preset(name)
    assert (config.compress_ratios, config.draft) == (ratios, draft)
    assert release_totals(config) == (count, size)


@pytest.mark.parametrize(
    ("name", "per_token", "replay"), [("v4-flash", 3514.25, 5461), ("v4-pro", 5031.4375, 7747)]
)
def test_layout_of_the_releases(name: str, per_token: float, replay: int) -> None:
    layout = ModelConfig.preset(name).layout("fp8_ds_mla", "mxfp4")
    assert layout.history_bytes_per_token == per_token
    assert layout.replay_tokens == replay


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_the_core_is_tried_with_the_layouts_of_the_releases(name: str) -> None:
    preset = Path(__file__).parents[2] / "rust" / "core" / "src" / "layout" / f"{name}.json"
    assert LayoutSpec(json.loads(preset.read_text())) == ModelConfig.preset(f"v4-{name}").layout(
        "fp8_ds_mla", "mxfp4"
    )


def test_a_layout_needs_no_torch() -> None:
    """`dsv4 plan` and `dsv4 simulate` start at once."""
    code = (
        "import sys; from dsv4.model.config import ModelConfig; "
        "ModelConfig.preset('v4-pro').layout('fp8_ds_mla', 'fp8'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_model_is_found_by_name_directory_or_file(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    raw = random_config_dict()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(raw))
    assert ModelConfig.find("v4-pro") == (ModelConfig.preset("v4-pro"), None)
    mine = ModelConfig.from_dict(raw, "mine"), tmp_path / "mine"
    assert ModelConfig.find(str(tmp_path / "mine")) == mine
    assert ModelConfig.find(str(tmp_path / "mine" / "config.json")) == mine
    with pytest.raises(ConfigError, match=r"model is 'v4-flsh'; .*did you mean 'v4-flash'\?"):
        ModelConfig.find("v4-flsh")


def test_values_of_flash() -> None:
    c = ModelConfig.preset("v4-flash")
    stored = Counter(spec.history for spec in c.layers)
    assert stored == {"": 2, "csa": 21, "hca": 20}
    assert (c.num_layers, c.rope_dim, c.index_topk, c.routed_scaling_factor) == (43, 64, 512, 1.5)
    assert (c.rope_theta, c.compress_rope_theta, c.eos_ids, c.draft) == (10000.0, 160000.0, (1,), "dspark")
    assert c.yarn is not None and (c.yarn.factor, c.yarn.original_max_position) == (16.0, 65536)


def transformers_form(raw: dict[str, Any], folder: Path) -> ModelConfig:
    """The config after transformers has read it and written it again."""
    pytest.importorskip("transformers")  # `make test-lowest` runs without it
    from transformers import DeepseekV4Config

    legacy = {k: v for k, v in raw.items() if k != "rope_scaling"}
    scaling = dict(raw["rope_scaling"])
    rope = {"rope_type": scaling.pop("type"), **scaling}
    DeepseekV4Config(**legacy, rope_parameters=rope).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    assert "layer_types" in written and "compress" in written["rope_parameters"]
    return ModelConfig.from_dir(folder)


@pytest.mark.parametrize("kind", ["flash", "pro"])
def test_both_forms_of_a_config_are_equal(kind: str, tmp_path: Path) -> None:
    raw = random_config_dict(kind, num_hash_layers=2, rope_theta=12345.0, compress_rope_theta=54321.0)
    ours, theirs = ModelConfig.from_dict(raw), transformers_form(raw, tmp_path)
    assert dataclasses.replace(theirs, name="model") == ours


def test_rates_other_than_the_releases() -> None:
    raw = random_config_dict("flash")
    kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"] * 2
    del raw["compress_ratios"]
    raw["layer_types"] = kinds
    rates = {"compressed_sparse_attention": 8, "heavily_compressed_attention": 64}
    nested = ModelConfig.from_dict({**raw, "compress_rates": rates})
    plain = ModelConfig.from_dict({**raw, "compress_rate_csa": 8, "compress_rate_hca": 64})
    assert nested == plain and nested.compress_ratios == (0, 8, 64) * 2


YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "deepseek_v41"}, 'model_type is "deepseek_v41"; it must be "deepseek_v4"'),
    ({"model_type": None}, "config.json has no model_type"),
    (
        {"model_type": "deepseek_v3"},
        'model_type is "deepseek_v3"; it must be "deepseek_v4": dsv4 serves DeepSeek-V4',
    ),
    (
        {"model_type": "qwen3_moe"},
        'model_type is "qwen3_moe"; .* dsv4 serves DeepSeek-V4 .* and no other model',
    ),
    ({"model_type": 4}, "model_type is 4; it must be"),
    (
        {"architectures": ["Qwen3MoeForCausalLM"]},
        "architectures is .*Qwen3Moe.*DeepseekV4ForCausalLM: dsv4 serves",
    ),
    (
        {"architectures": ["DeepseekV41ForCausalLM"]},
        "architectures is .*V41.*; it must be DeepseekV4ForCausalLM",
    ),
    ({"architectures": ["DeepseekV4ForSequenceClassification"]}, "architectures is .*Classification"),
    ({"architectures": "DeepseekV4ForCausalLM"}, "architectures is .*; it must be a list of names"),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0; it must be a whole number of at least 1"),
    ({"max_position_embeddings": None}, "config.json has no max_position_embeddings"),
    ({"max_position_embeddings": 1e6}, "max_position_embeddings is 1000000.0; it must be a whole number"),
    ({"max_position_embeddings": "1M"}, 'max_position_embeddings is "1M"; it must be a whole number'),
    ({"scoring_func": "softmax"}, 'scoring_func is "softmax"; it must be "sqrtsoftplus"'),
    ({"topk_method": "greedy"}, 'topk_method is "greedy"; it must be "noaux_tc"'),
    ({"norm_topk_prob": False}, "norm_topk_prob is false; it must be true"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings is true; it must be false"),
    ({"attention_bias": True}, "attention_bias is true; it must be false"),
    ({"num_key_value_heads": 2}, "num_key_value_heads is 2; it must be 1"),
    ({"n_shared_experts": 2}, "n_shared_experts is 2; it must be 1"),
    ({"expert_dtype": "int4"}, 'expert_dtype is "int4"; it must be "fp4" or "fp8"'),
    ({"quantization_config": {"quant_method": "gptq"}}, 'quantization_config.quant_method is "gptq"'),
    ({"quantization_config": {"fmt": "e5m2"}}, 'quantization_config.fmt is "e5m2"; it must be "e4m3"'),
    ({"quantization_config": {"scale_fmt": "int"}}, 'quantization_config.scale_fmt is "int"'),
    ({"quantization_config": {"weight_block_size": [64, 64]}}, r"weight_block_size is \[64, 64\]"),
    ({"quantization_config": {"expert_dtype": "mxfp8"}}, 'quantization_config.expert_dtype is "mxfp8"'),
    ({"compress_ratios": None}, "neither compress_ratios nor layer_types"),
    ({"compress_ratios": [0, 0, 4, 64, 4, 128]}, "compress_ratios has 64; each entry is 0, 4"),
    ({"compress_ratios": [0, 4]}, "compress_ratios has 2 entries; each of the num_hidden_layers"),
    ({"compress_ratios": [0, 0, 4, 128, 4, 128, 4]}, r"compress_ratios has \[4\] after the last layer"),
    ({"compress_ratios": None, "layer_types": ["full_attention"] * 6}, "layer_types has 'full_attention'"),
    ({"layer_types": ["sliding_attention"] * 6}, "layer_types and compress_ratios name different"),
    ({"mlp_layer_types": ["moe", "hash_moe"] * 3}, "mlp_layer_types is .* it must be hash_moe for the first"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, 'rope_scaling.type is "linear"; it must be "yarn"'),
    ({"rope_scaling": {"factor": 16}}, "rope_scaling has no type"),
    ({"rope_scaling": {**YARN, "attention_factor": 1.27}}, "rope_scaling.attention_factor is 1.27"),
    ({"rope_scaling": {"type": "yarn", "facto": 16}}, "rope_scaling.facto is unknown; did you mean 'factor'"),
    ({"rope_parameters": YARN}, "both rope_parameters and rope_scaling"),
    (
        {"rope_scaling": None, "rope_parameters": {"main": {"rope_type": "yarn"}}},
        "rope_parameters.main.rope_type",
    ),
    (
        {"rope_scaling": None, "rope_parameters": {"compress": {**YARN, "rope_theta": 5e5}}},
        "rope base is unclear: .* rope_parameters.compress.rope_theta says 5",
    ),
    ({"partial_rotary_factor": 0.25}, "rotary channels is unclear: qk_rope_head_dim says 32, partial_rotary"),
    ({"qk_rope_head_dim": 33}, "qk_rope_head_dim is 33; it must be an even number"),
    ({"index_head_dim": 96}, "index_head_dim is 96; it must be a power of two"),
    ({"o_groups": 3}, "o_groups is 3; it must be a divisor of the 8 heads"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9; it must be at most the 8 experts"),
    ({"hidden_size": 10**12}, "hidden_size is 1000000000000; it must be a whole number from 1 to 2147483647"),
    ({"hidden_size": 0}, "hidden_size is 0; it must be a whole number of at least 1"),
    ({"hidden_size": "128"}, 'hidden_size is "128"; it must be a whole number'),
    ({"hidden_size": None, "hiden_size": 128}, "config.json has no hidden_size; did you mean 'hiden_size'"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN; it must be a finite number"),
    ({"eos_token_id": [1, 4096]}, "eos_token_id is .* below the vocabulary's 256"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda x: x[:40] if isinstance(x, str) else "")
def test_what_is_not_supported_is_one_line(change: dict[str, Any], message: str) -> None:
    raw = {**random_config_dict("flash"), "num_hidden_layers": 6, **change}
    with pytest.raises(ConfigError, match=message) as error:
        ModelConfig.from_dict(raw)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


WRONG = [None, "x", -1, 0, [], {}, [1], ["x"], {"a": 1}, [None], {"main": 1}, float("inf"), 1.5, True, 10**30]


def test_no_value_of_any_field_escapes_as_another_error(tmp_path: Path) -> None:
    raw = random_config_dict("flash", quantization_config={"quant_method": "fp8"})
    transformers_form(random_config_dict("flash"), tmp_path)
    for form in (raw, json.loads((tmp_path / "config.json").read_text())):
        for field in form:
            for value in WRONG:
                try:
                    ModelConfig.from_dict({**form, field: value})
                except ConfigError as e:
                    assert "\n" not in str(e)


def test_what_says_nothing_of_its_architecture_or_is_a_drafters_is_read() -> None:
    for names in (None, [], ["DeepseekV4ForCausalLM"], ["DeepseekV4DSparkForCausalLM"]):
        ModelConfig.from_dict(random_config_dict(architectures=names))


def test_unreadable_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: No such file"):
        ModelConfig.from_dir(tmp_path)
    file = tmp_path / "config.json"
    for text, message in [
        ("{", "is no JSON"),
        ("[1]", "holds a list, not an object"),
        ("[" * 10**5, "is no JSON"),
    ]:
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            ModelConfig.from_dir(tmp_path)
    with file.open("wb") as f:
        f.truncate(2**30)
    with pytest.raises(ConfigError, match="the largest that is read"):
        ModelConfig.from_dir(tmp_path)


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'v4-flash'"):
        ModelConfig.preset("v4-flsh")
