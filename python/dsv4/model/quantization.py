"""Quantisations in which others publish V4 and which dsv4 does not read. Each is refused by its name in one line, with what
to take instead: the bytes would load as something else and give wrong tokens that look right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.errors import CheckpointError, ConfigError
from dsv4.model.json_fields import Fields, read_json

if TYPE_CHECKING:
    from dsv4.model.shards import Stored

INSTEAD = "take the weights that DeepSeek releases (such as deepseek-ai/DeepSeek-V4-Flash-0731), or FP8 or bfloat16 ones"
"""What a refusal ends with."""

_METHODS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "modelopt_fp4": "NVFP4",
    "modelopt": "ModelOpt's quantisation",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4 in gpt-oss's layout",
    "gguf": "GGUF",
    "auto-round": "AutoRound",
    "quark": "Quark",
    "torchao": "torchao",
    "hqq": "HQQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "fbgemm_fp8": "FBGEMM's FP8 (a scale per row)",
    "w8a8_int8": "INT8 W8A8",
    "ascend": "Ascend's quantisation",
}
"""Values of quant_method, by the names that their users know."""

_FORMATS = {
    "nvfp4": "NVFP4",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "int-quantized": "INT8 W8A8",
    "int8": "INT8",
    "w8a8": "INT8 W8A8",
    "w4a16": "INT4",
    "pack-quantized": "INT4 or INT8",
    "float-quantized": "FP8 of compressed-tensors",
}
"""Parts of the names of formats and algorithms; the first that is in a value names it."""

_ENDS = {
    "weight_scale_2": "NVFP4",
    "weight_global_scale": "NVFP4",
    "g_idx": "GPTQ",
    "qweight": "AWQ or GPTQ",
    "qzeros": "AWQ or GPTQ",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "bitsandbytes__nf4": "bitsandbytes",
    "bitsandbytes__fp4": "bitsandbytes",
    "weight_packed": "compressed-tensors with packed integers",
    "gate_up_proj_blocks": "MXFP4 in gpt-oss's layout",
    "down_proj_blocks": "MXFP4 in gpt-oss's layout",
    "weight_offset": "Ascend's quantisation",
    "weight_scale": "FP8 or integers with other scales than one per 128 x 128",
    "input_scale": "FP8 or integers with other scales than one per 128 x 128",
}
"""Last parts of tensor names that only one kind of quantisation has, the telling ones first."""


def check_config(raw: Fields) -> None:
    """Raises ConfigError for a config.json whose weights are of a foreign quantisation."""
    for section in (raw.section("quantization_config"), raw.section("compression_config")):
        _check_section(section)


def check_files(path: Path) -> None:
    """Raises ConfigError for the files that ModelOpt and Ascend's tools put beside config.json."""
    modelopt = path / "hf_quant_config.json"
    if modelopt.exists():
        fields = Fields(read_json(modelopt), modelopt.name)
        _check_section(fields.section("quantization"))
    ascend = path / "quant_model_description.json"
    if ascend.exists():
        kind = read_json(ascend).get("model_quant_type", "unknown")
        raise ConfigError(
            f"{ascend.name} says {kind!s:.40}: Ascend's quantisation is not supported; {INSTEAD}"
        )


def _check_section(section: Fields) -> None:
    for field in ("moe_quant_algo", "quant_algo", "format"):
        if field in section:
            raise _refusal(section, field, _named(section.value(field), section))
    for field in ("load_in_4bit", "load_in_8bit"):
        if field in section and section.value(field) is True:
            raise _refusal(section, field, "bitsandbytes")
    if "quant_method" in section and section.value("quant_method") != "fp8":
        method = str(section.value("quant_method")).lower()
        name = next(
            (n for key, n in _METHODS.items() if method == key or method.startswith(f"{key}_")), method
        )
        raise _refusal(section, "quant_method", f"{name:.40}")


def _named(value: Any, section: Fields) -> str:
    """The usual name of an algorithm or format. ModelOpt's mixture is named after what it holds."""
    text = str(value).lower()
    if text == "mixed_precision" and "quantized_layers" in section:
        text += str(section.value("quantized_layers")).lower()
    return next((name for part, name in _FORMATS.items() if part in text), f"{value!s:.40}")


def _refusal(section: Fields, field: str, name: str) -> ConfigError:
    shown = f"{section.value(field)!s:.40}"
    return ConfigError(f'{section.path(field)} is "{shown}": {name} is not supported; {INSTEAD}')


def check_tensors(stored: Mapping[str, Stored]) -> None:
    """Raises CheckpointError where the names of tensors are those of a foreign quantisation."""
    ends = {name.rpartition(".")[2] for name in stored}
    end = next((end for end in _ENDS if end in ends), None)
    if end is None:
        return
    name, place = next((n, p) for n, p in stored.items() if n.rpartition(".")[2] == end)
    kind, weight = _ENDS[end], stored.get(f"{name.rpartition('.')[0]}.weight")
    if end == "weight_scale" and place.dtype == "F8_E4M3":
        kind = "NVFP4"
    elif end == "weight_scale" and place.dtype in ("U8", "F8_E8M0"):
        kind = "MXFP4 or MXFP8 in another layout"
    elif end == "weight_scale" and weight is not None and weight.dtype == "I8":
        kind = "INT8 W8A8"
    raise foreign(name, kind)


def foreign(name: str, kind: str) -> CheckpointError:
    """The refusal of weights, by the tensor that gives them away."""
    return CheckpointError(f"tensor {name} is of weights in {kind}, which is not supported; {INSTEAD}")
