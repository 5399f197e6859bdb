"""Checkpoints of others: scales that are numbers, FP8 experts that config.json does not mention, foreign quantisations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4 import LLM, SamplingParams
from dsv4.backends import choose
from dsv4.errors import CheckpointError, ConfigError
from dsv4.model.config import ModelConfig
from dsv4.model.survey import survey
from dsv4.model.weights import load_weights
from dsv4.ops.weight import Fp4Weight, Fp8Weight, Gated, Packed, dense
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoints import rewrite, set_config, write_base, write_nvfp4, write_release

RAGGED = {"hidden_size": 192, "moe_intermediate_size": 160, "compress_ratios": [0, 4], "q_lora_rank": 96}
"""No multiples of 128, so that edge blocks are smaller."""


def powers(name: str, scale: Tensor) -> Tensor:
    return scale


def any_value(name: str, scale: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(len(name))
    return scale * (0.6 + 0.7 * torch.rand(scale.shape, generator=g))


def in_bf16(name: str, scale: Tensor) -> Tensor:
    return any_value(name, scale).bfloat16()


def exact(path: Path) -> dict[str, Tensor]:
    """Every FP8 matrix in float64: each block of codes times its scale."""
    [file] = path.glob("*.safetensors")
    flat, found = load_file(file), {}
    for name, codes in flat.items():
        if codes.dtype == torch.float8_e4m3fn:
            scale, value = flat[name.replace(".weight", ".scale")].double(), codes.double()
            for i in range(scale.shape[0]):
                for j in range(scale.shape[1]):
                    value[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scale[i, j]
            found[name] = value
    return found


def one(weights: dict[str, Any], name: str) -> Tensor:
    """A tensor of the loaded weights, or an expert's part of its stack."""
    head, _, tail = name.partition(".ffn.experts.")
    if not tail:
        return dense(weights[name])
    expert, part, _ = tail.split(".")
    return dense(weights[f"{head}.ffn.experts.{part}"][int(expert)])


@pytest.mark.parametrize("scales", [powers, any_value, in_bf16])
@pytest.mark.parametrize("packed", [False, True], ids=["expanded", "packed"])
def test_scales_of_any_value_give_the_stored_numbers(
    tmp_path: Path, scales: Callable[[str, Tensor], Tensor], packed: bool
) -> None:
    write_base(tmp_path, scales, **RAGGED)
    config, wanted = ModelConfig.from_dir(tmp_path), exact(tmp_path)
    assert len(wanted) == 2 * (3 * 8 + 3 + 5) + 1
    weights = load_weights(tmp_path, config, torch.float32, packed=packed)
    for name, value in wanted.items():
        assert torch.equal(one(weights, name), value.float()), name
    half = load_weights(tmp_path, config, torch.bfloat16, packed=packed)
    for name, value in wanted.items():
        assert ((one(half, name).double() - value).abs() <= value.abs() * 2**-8).all(), name


def test_powers_of_two_stay_packed_and_others_are_expanded(tmp_path: Path) -> None:
    def mixed(name: str, scale: Tensor) -> Tensor:
        odd = name == "layers.1.attn.wo_b.scale" or name == "layers.1.ffn.experts.3.w2.scale"
        return 1.5 * scale if odd else scale

    write_base(tmp_path, mixed, **RAGGED)
    weights = load_weights(tmp_path, ModelConfig.from_dir(tmp_path), torch.bfloat16, packed=True)
    kinds = {name: type(w) for name, w in weights.items() if isinstance(w, Packed)}
    assert set(kinds.values()) == {Fp8Weight}
    expected = {"layers.1.attn.wo_b.weight", "layers.1.ffn.experts.w2"}
    assert (
        not expected & kinds.keys()
        and "layers.1.ffn.experts.w1" in kinds
        and "layers.0.attn.wo_b.weight" in kinds
    )
    found = survey(tmp_path, ModelConfig.from_dir(tmp_path))
    assert found.config.expert_dtype == "fp8"
    bytes_more = 192 * 64 + 8 * 192 * 160 - 2 * 4 - 8 * 4 * 4  # two for one, without the scales
    assert found.describe(2) == [
        "experts are fp8 in the files; config.json means fp4",
        "56 matrices (layers.0.attn.wq_a.weight, ...): scales are powers of two written as numbers; packed with E8M0 "
        "scales, exactly",
        "9 matrices (layers.1.attn.wo_b.weight, ...) cannot stay packed (scales that are no powers of two, or experts "
        f"stored unlike each other): expanded, {bytes_more / 1e6:.1f} MB more than in the files",
    ]
    assert sum(w.nbytes for w in weights.values()) == sum(
        s.numel() * s.element_size()
        for name, spec in found.kept.items()
        for _, dtype, shape in spec.stored(name)
        for s in [torch.empty(shape, dtype=_DTYPES[dtype])]
    )


_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,
}


def test_a_block_of_zeros_may_have_the_scale_zero(tmp_path: Path) -> None:
    name = "layers.0.attn.wkv.scale"
    write_base(tmp_path, lambda n, s: 0 * s if n == name else s, **RAGGED)
    weights = load_weights(tmp_path, ModelConfig.from_dir(tmp_path), torch.float32, packed=True)
    assert isinstance(weights["layers.0.attn.wkv.weight"], Fp8Weight)
    assert not dense(weights["layers.0.attn.wkv.weight"]).any()


def test_fp4_experts_with_scales_of_any_value(tmp_path: Path) -> None:
    write_release(tmp_path / "release", **RAGGED)
    before = load_weights(tmp_path / "release", ModelConfig.from_dir(tmp_path / "release"), torch.float32)
    for factor, kind in ((0.25, Fp4Weight), (0.75, torch.Tensor)):

        def change(flat: dict[str, Tensor], factor: float = factor) -> None:
            for name in [n for n in flat if ".experts." in n and n.endswith("scale")]:
                flat[name] = factor * flat[name].float()

        path = tmp_path / str(factor)
        write_release(path, **RAGGED)
        rewrite(path, change)
        weights = load_weights(path, ModelConfig.from_dir(path), torch.float32, packed=True)
        stack = weights["layers.0.ffn.experts.w1"]
        assert isinstance(stack, kind)
        assert torch.equal(dense(stack), factor * before["layers.0.ffn.experts.w1"])


def test_a_model_with_scales_of_any_value_writes_what_its_numbers_say(tmp_path: Path) -> None:
    """The whole engine, against the same numbers stored plainly."""
    write_base(tmp_path / "base", any_value, compress_ratios=[0, 4])
    write_base(tmp_path / "plain", any_value, compress_ratios=[0, 4])

    def plain(flat: dict[str, Tensor]) -> None:
        for name, value in exact(tmp_path / "base").items():
            flat[name] = value.float()
            del flat[name.replace(".weight", ".scale")]

    rewrite(tmp_path / "plain", plain)
    prompt, params = list(range(5, 40)), SamplingParams(max_tokens=8, temperature=0, logprobs=3)
    base, same = (
        LLM(str(tmp_path / name), device="cpu", num_pages=8, block_size=128).generate([prompt], params)[0]
        for name in ("base", "plain")
    )
    assert (base.token_ids, base.logprobs) == (same.token_ids, same.logprobs)


def test_a_scale_below_zero_is_refused(tmp_path: Path) -> None:
    """It loaded, and turned the signs of its block."""
    name = "layers.0.attn.wkv.scale"

    def turned(n: str, scale: Tensor) -> Tensor:
        if n == name:
            scale[-1, 0] *= -1
        return scale

    write_base(tmp_path, turned, **RAGGED)
    with pytest.raises(CheckpointError, match=rf"^tensor {name} holds -\S+; scales are above zero, or zero$"):
        survey(tmp_path, ModelConfig.from_dir(tmp_path))


@pytest.mark.parametrize("packed", [False, True], ids=["expanded", "packed"])
@pytest.mark.parametrize("name", ["layers.0.attn.wkv.scale", "layers.1.ffn.experts.3.w2.scale"])
def test_a_scale_of_one_byte_that_is_no_number(tmp_path: Path, name: str, packed: bool) -> None:
    """It was said of the weights, which have no such value."""
    write_release(tmp_path)

    def damage(flat: dict[str, Tensor]) -> None:
        flat[name].view(torch.uint8)[-1, 0] = 255

    rewrite(tmp_path, damage)
    with pytest.raises(CheckpointError, match=rf"^tensor {name} holds values that are not finite$"):
        load_weights(tmp_path, ModelConfig.from_dir(tmp_path), torch.float32, packed=packed)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (float("nan"), r"layers.0.attn.wkv.scale holds values that are not finite"),
        (float("inf"), r"layers.0.attn.wkv.scale holds values that are not finite"),
    ],
)
def test_scales_that_are_no_numbers(tmp_path: Path, bad: float, said: str) -> None:
    write_base(tmp_path, lambda n, s: s + bad if n == "layers.0.attn.wkv.scale" else s, **RAGGED)
    with pytest.raises(CheckpointError, match=said):
        survey(tmp_path, ModelConfig.from_dir(tmp_path))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1,), torch.float32), ((64, 1), torch.float32), ((1, 2), torch.int64)]
)
def test_other_scales_than_one_per_block(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    write_base(tmp_path, powers, **RAGGED)
    rewrite(tmp_path, lambda flat: flat.update({"layers.0.attn.wkv.scale": torch.ones(shape, dtype=dtype)}))
    with pytest.raises(CheckpointError, match=r"wkv.scale is .*; expected is F8_E8M0, F32 or BF16 \[1, 2\]"):
        survey(tmp_path, ModelConfig.from_dir(tmp_path))


def test_scales_named_as_in_v3(tmp_path: Path) -> None:
    write_base(tmp_path, any_value, **RAGGED)
    wanted = exact(tmp_path)

    def rename(flat: dict[str, Tensor]) -> None:
        for name in [n for n in flat if n.endswith(".scale")]:
            flat[name.replace(".scale", ".weight_scale_inv")] = flat.pop(name)

    rewrite(tmp_path, rename)
    (tmp_path / "model.safetensors.index.json").unlink()
    weights = load_weights(tmp_path, ModelConfig.from_dir(tmp_path), torch.float32)
    assert all(torch.equal(one(weights, name), value.float()) for name, value in wanted.items())


def test_stacked_experts_with_scales_as_transformers_names_them(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "compress_ratios": [0, 4]}
    write_base(tmp_path, any_value, **sizes)
    wanted = exact(tmp_path)

    def stack(flat: dict[str, Tensor]) -> None:
        for layer in range(2):
            for ours, theirs in (("weight", ""), ("scale", "_scale_inv")):
                head = f"layers.{layer}.ffn.experts"
                w1, w3, w2 = (
                    torch.stack([flat.pop(f"{head}.{e}.{part}.{ours}") for e in range(8)])
                    for part in ("w1", "w3", "w2")
                )
                where = f"model.layers.{layer}.mlp.experts"
                both = torch.cat((w1.view(torch.uint8), w3.view(torch.uint8)), 1).view(w1.dtype)
                flat[f"{where}.gate_up_proj{theirs}"], flat[f"{where}.down_proj{theirs}"] = both, w2

    rewrite(tmp_path, stack)
    (tmp_path / "model.safetensors.index.json").unlink()
    weights = load_weights(tmp_path, ModelConfig.from_dir(tmp_path), torch.float32)
    assert all(torch.equal(one(weights, name), value.float()) for name, value in wanted.items())


INSTEAD = "is not supported; take the weights that DeepSeek releases"

CONFIGS: list[tuple[dict[str, Any], str]] = [
    (
        {"quant_method": "fp8", "moe_quant_algo": "NVFP4"},
        'quantization_config.moe_quant_algo is "NVFP4": NVFP4',
    ),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 'quantization_config.quant_algo is "NVFP4": NVFP4'),
    (
        {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {"layers.0.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16}},
        },
        'quantization_config.quant_algo is "MIXED_PRECISION": NVFP4',
    ),
    ({"quant_method": "modelopt_fp4"}, 'quantization_config.quant_method is "modelopt_fp4": NVFP4'),
    (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}},
        'quantization_config.format is "nvfp4-pack-quantized": NVFP4',
    ),
    ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "INT8 W8A8"),
    ({"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}, "MXFP4"),
    ({"quant_method": "compressed-tensors"}, 'quant_method is "compressed-tensors": compressed-tensors'),
    ({"quant_method": "awq", "bits": 4}, 'quantization_config.quant_method is "awq": AWQ'),
    ({"quant_method": "awq_marlin", "bits": 4}, 'quant_method is "awq_marlin": AWQ'),
    ({"quant_method": "gptq", "bits": 4}, 'quantization_config.quant_method is "gptq": GPTQ'),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ({"load_in_8bit": True}, "quantization_config.load_in_8bit is .*: bitsandbytes"),
    ({"quant_method": "mxfp4"}, 'quant_method is "mxfp4": MXFP4 in gpt-oss'),
    ({"quant_method": "gguf"}, "GGUF"),
    ({"quant_method": "my-own"}, 'quant_method is "my-own": my-own'),
]


@pytest.mark.parametrize(("quantization", "said"), CONFIGS, ids=lambda x: str(x)[:30])
def test_foreign_quantisations_are_named_by_the_config(quantization: dict[str, Any], said: str) -> None:
    from tests.support.models import random_config_dict

    with pytest.raises(ConfigError, match=said) as error:
        ModelConfig.from_dict(random_config_dict(quantization_config=quantization))
    assert INSTEAD in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 250


def test_foreign_quantisations_are_named_by_files_beside_the_config(tmp_path: Path) -> None:
    write_release(tmp_path, compress_ratios=[0, 4])
    modelopt = tmp_path / "hf_quant_config.json"
    modelopt.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}))
    with pytest.raises(ConfigError, match=r'hf_quant_config.json.quantization.quant_algo is "NVFP4": NVFP4'):
        ModelConfig.from_dir(tmp_path)
    modelopt.unlink()
    (tmp_path / "quant_model_description.json").write_text('{"model_quant_type": "W8A8_DYNAMIC"}')
    with pytest.raises(ConfigError, match=r"quant_model_description.json says W8A8_DYNAMIC: Ascend"):
        ModelConfig.from_dir(tmp_path)


W1 = "layers.1.ffn.experts.0.w1"


def as_int8(flat: dict[str, Tensor]) -> None:
    flat[f"{W1}.weight"] = torch.zeros(64, 128, dtype=torch.int8)
    flat[f"{W1}.scale"] = torch.ones(64, 1)


def as_gptq(flat: dict[str, Tensor]) -> None:
    flat[f"{W1}.qweight"] = torch.zeros(16, 64, dtype=torch.int32)
    flat[f"{W1}.g_idx"] = torch.zeros(128, dtype=torch.int32)


def as_awq(flat: dict[str, Tensor]) -> None:
    flat[f"{W1}.qweight"] = torch.zeros(128, 8, dtype=torch.int32)
    flat[f"{W1}.qzeros"] = torch.zeros(1, 8, dtype=torch.int32)


def as_bitsandbytes(flat: dict[str, Tensor]) -> None:
    flat[f"{W1}.weight.absmax"] = torch.zeros(8)
    flat[f"{W1}.weight.quant_state.bitsandbytes__nf4"] = torch.zeros(8, dtype=torch.uint8)


def as_gpt_oss(flat: dict[str, Tensor]) -> None:
    flat["layers.1.mlp.experts.gate_up_proj_blocks"] = torch.zeros(8, 128, 4, 16, dtype=torch.uint8)


def as_mxfp4(flat: dict[str, Tensor]) -> None:
    flat[f"{W1}.weight_scale"] = torch.ones(64, 4, dtype=torch.uint8)


def as_nvfp4(flat: dict[str, Tensor]) -> None:
    flat[f"{W1}.scale"] = torch.ones(64, 8).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (as_int8, f"tensor {W1}.weight is of weights in INT8"),
        (as_gptq, f"tensor {W1}.g_idx is of weights in GPTQ"),
        (as_awq, f"tensor {W1}.qweight is of weights in AWQ or GPTQ"),
        (as_bitsandbytes, "is of weights in bitsandbytes"),
        (as_gpt_oss, "gate_up_proj_blocks is of weights in MXFP4 in gpt-oss"),
        (as_mxfp4, "weight_scale is of weights in MXFP4 or MXFP8 in another layout"),
        (as_nvfp4, f"tensor {W1}.scale is of weights in NVFP4"),
    ],
)
def test_foreign_quantisations_are_named_by_their_tensors(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], said: str
) -> None:
    write_release(tmp_path, compress_ratios=[0, 4])
    (tmp_path / "model.safetensors.index.json").unlink()
    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=said) as error:
        survey(tmp_path, ModelConfig.from_dir(tmp_path))
    assert INSTEAD.replace("is not", "which is not") in str(error.value) and len(str(error.value)) < 250


def test_nvfp4_without_a_word_in_the_config(tmp_path: Path) -> None:
    write_nvfp4(tmp_path)
    with pytest.raises(CheckpointError, match=r"weight_scale_2 is of weights in NVFP4"):
        LLM(str(tmp_path), num_pages=8)
    set_config(tmp_path, quantization_config={"quant_method": "fp8", "moe_quant_algo": "NVFP4"})
    with pytest.raises(ConfigError, match=r'moe_quant_algo is "NVFP4": NVFP4 is not supported'):
        LLM(str(tmp_path), num_pages=8)


def test_tables_of_rotations_are_left_out(tmp_path: Path) -> None:
    write_release(tmp_path, compress_ratios=[0, 4])

    def add(flat: dict[str, Tensor]) -> None:
        flat["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
        flat["model.rotary_emb.compress_inv_freq"] = torch.ones(16)
        flat["freqs_cis"] = torch.ones(16)

    rewrite(tmp_path, add)
    found = survey(tmp_path, ModelConfig.from_dir(tmp_path))
    assert found.buffers == 3
    assert found.describe() == [
        "left out: 3 buffers (such as rotary_emb.inv_freq), which the engine computes"
    ]
    load_weights(tmp_path, found.config, torch.bfloat16)
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}, tmp_path / "again.safetensors"
    )
    assert survey(tmp_path, found.config).buffers == 3


def test_kernels_leave_fp8_experts_to_the_reference_as_they_are(tmp_path: Path) -> None:
    """In the bytes of the file: expanded, Flash-Base would take twice of them. No graph can hold the reference."""
    moe = pytest.importorskip("dsv4.kernels.triton.moe", reason="triton is not installed")
    write_base(tmp_path, powers, compress_ratios=[0, 4])
    weights = load_weights(tmp_path, ModelConfig.from_dir(tmp_path), torch.bfloat16, packed=True)
    stacks = Gated(*(weights[f"layers.0.ffn.experts.{part}"] for part in Gated._fields))
    prepared = moe.prepare(stacks)
    assert all(isinstance(w, Fp8Weight) for w in prepared)
    ops = choose("triton", "cuda", major=9)
    assert not ops.quantises("experts", prepared) and ops.uncaptured("experts", prepared) == ["reference"]
