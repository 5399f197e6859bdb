"""What the engine reads of a checkpoint's config.json: the released form, and the one `transformers` writes.

Whatever is not supported is refused by name: a value that is ignored gives wrong tokens that look right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.errors import ConfigError
from dsv4.model.json_fields import Fields, read_json
from dsv4.model.layout import LayerSpec, block_size, layers_of, layout_of
from dsv4.model.quantization import check_config as check_quantization
from dsv4.model.quantization import check_files as check_foreign_files
from dsv4.model.source import RELEASED as RELEASED
from dsv4.model.source import find_source, model_name
from dsv4.quantities import counted
from dsv4.row_sizes import row_bytes
from dsv4.spelling import nearest

if TYPE_CHECKING:
    from dsv4._core import LayoutSpec

LAYER_TYPES = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
"""transformers' names of the layer kinds: window only, CSA, HCA."""

SUPPORTED: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu",),
    "num_key_value_heads": (1,),
    "n_shared_experts": (1,),
    "expert_dtype": ("fp4", "fp8", "bf16"),
}
"""Fields that name a choice of which V4 has one. Each may be absent."""

SERVED = "dsv4 serves DeepSeek-V4 (Flash and Pro, their Base and DSpark weights) and no other model"
_ARCHITECTURE = re.compile(r"DeepseekV4(?!\d)\w*ForCausalLM")

SUPPORTED_QUANTIZATION: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3",),
    "scale_fmt": ("ue8m0", "float", "float32", "fp32"),
    "weight_block_size": ([128, 128],),
    "activation_scheme": ("dynamic",),
    "expert_dtype": ("fp4", "fp8", "bf16"),
}
"""The same for quantization_config."""

ROPE_FIELDS = (
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "truncate",
)
"""What a section about rotary positions may hold."""


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN of compressing layers: frequencies only, applied at every position (spec section 1)."""

    factor: float
    original_max_position: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model with Flash's or Pro's structure."""

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    rope_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    num_experts: int
    experts_per_token: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    num_hash_layers: int
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    index_heads: int
    index_head_dim: int
    index_topk: int
    window: int
    layers: tuple[LayerSpec, ...]
    """Draft layers cut off."""
    rms_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: Yarn | None
    max_position: int
    eos_ids: tuple[int, ...]
    expert_dtype: str
    """How routed experts are stored: `fp4`, `fp8` (the Base models) or `bf16`. Where there are files, what they hold
    (`survey.py`)."""
    draft: str
    """`none`, `mtp` (one block, preview) or `dspark` (three blocks, GA)."""
    dspark_rank: int
    """Rank of DSpark's Markov head; 0 without."""
    left_out: int = 0
    """Further layers of the checkpoint that are not used (`first`)."""

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """Reads config.json of a model directory. Raises ConfigError."""
        file = Path(path) / "config.json"
        config = cls.from_dict(read_json(file), name=model_name(Path(path)))
        check_foreign_files(Path(path))
        return config

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """A released config by name: one of RELEASED. Raises ConfigError."""
        folder = resources.files("dsv4") / "model" / "configs"
        if name not in RELEASED:
            raise ConfigError(
                f"model preset is {name!r}; known: {', '.join(RELEASED)}{nearest(name, RELEASED)}"
            )
        return cls.from_dict(json.loads((folder / f"{name}.json").read_text()), name=name)

    @classmethod
    def find(cls, model: str, revision: str | None = None) -> tuple[ModelConfig, Path | None]:
        """(config, its directory) of a released config by name (which has none), a directory with config.json, the file
        itself, or a repository in the hub's cache. Raises ConfigError, CheckpointError (see `find_source`)."""
        path = Path(model).expanduser()
        if path.name == "config.json" and path.is_file():
            model, path = str(path.parent), path.parent
        if path.is_file() and path.suffix == ".json":
            return cls.from_dict(read_json(path), name=path.stem), None
        if model in RELEASED and not path.exists():
            if revision is not None:
                raise ConfigError(
                    f"revision is {revision!r}, but {model} is a config that ships; it has none"
                )
            return cls.preset(model), None
        if not path.exists() and "/" not in model:
            known = ", ".join(RELEASED)
            raise ConfigError(
                f"model is {model!r}; it must be a directory with config.json, such a file, org/name in the local hub cache, "
                f"or one of {known}{nearest(model, RELEASED)}"
            )
        source = find_source(model, revision, weights=False)
        return cls.from_dir(source.path), source.path

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], name: str = "model") -> ModelConfig:
        """Raises ConfigError for a missing, impossible or unsupported value."""
        fields = Fields(raw)
        _check_choices(fields)
        config = _read(fields, name)
        _check_sizes(config)
        return config

    def first(self, num_layers: int | None) -> ModelConfig:
        """The model with its first layers alone and no drafter, whose inputs are the last ones'; None: as it is. Raises ConfigError
        where there are not so many, or none of them stores history."""
        if num_layers is None or num_layers == self.num_layers:
            return self
        least = 1 + next((s.layer for s in self.layers if s.stores), 0)
        if not least <= num_layers <= self.num_layers:
            raise ConfigError(
                f"num_layers is {num_layers}; {self.name} takes {least} (its first layer with history) to {self.num_layers}"
            )
        return replace(
            self,
            num_layers=num_layers,
            layers=self.layers[:num_layers],
            num_hash_layers=min(self.num_hash_layers, num_layers),
            draft="none",
            dspark_rank=0,
            left_out=self.left_out + self.num_layers - num_layers,
        )

    @property
    def compress_ratios(self) -> tuple[int, ...]:
        """Tokens per history entry of each layer, 0 where it has a window only."""
        return tuple(s.ratio for s in self.layers)

    def layout(
        self, row_format: str, index_format: str, *, block_tokens: int | None = None, ranks: int = 1
    ) -> LayoutSpec:
        """The cache of this model, as one of `ranks` holds it. `block_tokens` None: the default of `block_size`. Raises ConfigError for sizes that do not
        fit."""
        return layout_of(
            self.layers,
            window=self.window,
            head_dim=self.head_dim,
            index_head_dim=self.index_head_dim,
            row=(row_bytes(row_format, self.head_dim, self.rope_dim), row_format),
            index_row=(row_bytes(index_format, self.index_head_dim, self.rope_dim), index_format),
            block_tokens=block_size(self.layers, block_tokens, ranks),
            ranks=ranks,
        )


def _check_family(f: Fields) -> None:
    """Another family of models is refused with what is served: its config has other fields, each of which would be missed."""
    if f.value("model_type") != "deepseek_v4":
        raise f.refuse("model_type", f'"deepseek_v4": {SERVED}')
    for name in f.entries("architectures", str) if "architectures" in f else ():
        if not _ARCHITECTURE.fullmatch(name):
            raise f.refuse("architectures", f"DeepseekV4ForCausalLM: {SERVED}")


def _check_choices(f: Fields) -> None:
    _check_family(f)
    for field, supported in SUPPORTED.items():
        f.check(field, supported)
    check_quantization(f)
    quantization = f.section("quantization_config")
    for field, supported in SUPPORTED_QUANTIZATION.items():
        quantization.check(field, supported)


def _read(f: Fields, name: str) -> ModelConfig:
    layers = f.integer("num_hidden_layers", high=4096)
    window = f.integer("sliding_window", low=2)
    specs, tail = _layers(f, layers, window)
    main, compress, yarn = _rope_sections(f)
    vocab = f.integer("vocab_size")
    draft = _draft(f, tail)
    return ModelConfig(
        name=name,
        vocab_size=vocab,
        hidden_size=f.integer("hidden_size"),
        num_layers=layers,
        num_heads=f.integer("num_attention_heads"),
        head_dim=f.integer("head_dim"),
        rope_dim=_rope_dim(f, main, compress),
        q_lora_rank=f.integer("q_lora_rank"),
        o_groups=f.integer("o_groups"),
        o_lora_rank=f.integer("o_lora_rank"),
        num_experts=f.integer("n_routed_experts" if "n_routed_experts" in f else "num_local_experts"),
        experts_per_token=f.integer("num_experts_per_tok"),
        moe_intermediate_size=f.integer("moe_intermediate_size"),
        routed_scaling_factor=f.number("routed_scaling_factor"),
        num_hash_layers=_hash_layers(f, layers),
        swiglu_limit=f.number("swiglu_limit"),
        hc_mult=f.integer("hc_mult"),
        hc_sinkhorn_iters=f.integer("hc_sinkhorn_iters"),
        hc_eps=f.number("hc_eps"),
        index_heads=f.integer("index_n_heads"),
        index_head_dim=f.integer("index_head_dim"),
        index_topk=f.integer("index_topk"),
        window=window,
        layers=specs,
        rms_eps=f.number("rms_norm_eps"),
        rope_theta=_theta(f, "rope_theta", main),
        compress_rope_theta=_theta(f, "compress_rope_theta", compress),
        yarn=_yarn(yarn),
        max_position=f.integer("max_position_embeddings"),
        eos_ids=token_ids(f, "eos_token_id", vocab),
        expert_dtype=told_experts(f) or USUAL_EXPERTS,
        draft=draft,
        dspark_rank=f.integer("dspark_markov_rank") if draft == "dspark" else 0,
    )


def _rates(f: Fields) -> dict[str, tuple[int, ...]]:
    """Tokens per entry by transformers' names of the two kinds; a model with more than one ratio of a kind has a list. Older
    configs of transformers have two plain fields."""
    rates, kinds = f.section("compress_rates"), LAYER_TYPES[1:]
    unknown = next((name for name in rates if name not in LAYER_TYPES), None)
    if unknown is not None:
        raise ConfigError(f"compress_rates has {unknown!r}; supported are {', '.join(kinds)}")

    def rate(kind: str, plain: str, default: int) -> tuple[int, ...]:
        if kind in rates and isinstance(rates.value(kind), list):
            found = tuple(rates.entries(kind, int))
            if not found or any(m < 2 for m in found):
                raise rates.refuse(kind, "one or more whole numbers from 2 on")
            return found
        for fields, name in ((rates, kind), (f, plain)):
            if name in fields:
                return (fields.integer(name, low=2),)
        return (default,)

    csa, hca = rate(kinds[0], "compress_rate_csa", 4), rate(kinds[1], "compress_rate_hca", 128)
    both = next((m for m in csa if m in hca), None)
    if both is not None:
        raise ConfigError(f"compress_rates has {both} tokens for both kinds; they must differ")
    return dict(zip(kinds, (csa, hca), strict=True))


def _layers(f: Fields, layers: int, window: int) -> tuple[tuple[LayerSpec, ...], tuple[int, ...]]:
    """(the layers, the ratios of draft layers after them)."""
    rates = _rates(f)
    ratios, tail = _ratios(f, layers, rates)
    history_of = None
    if "history_layers" in f:
        history_of = f.entries("history_layers", int)
        if len(history_of) != layers:
            raise ConfigError(
                f"history_layers has {counted(len(history_of), 'entry', 'entries')}; each of the num_hidden_layers ({layers}) needs one"
            )
    csa, hca = rates.values()
    return layers_of(ratios, window, csa=csa, hca=hca, history_of=history_of), tail


def _ratios(
    f: Fields, layers: int, rates: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(one ratio per layer, the draft layers' after them), from either way of writing it."""
    forms: dict[str, list[int]] = {}
    if "layer_types" in f:
        types = f.entries("layer_types", str)
        unknown = next((t for t in types if t not in LAYER_TYPES), None)
        if unknown is not None:
            raise ConfigError(f"layer_types has {unknown!r}; supported are {', '.join(LAYER_TYPES)}")
        several = next((t for t in types if len(rates.get(t, ())) > 1), None)
        if several is None:
            forms["layer_types"] = [rates.get(t, (0,))[0] for t in types]
        elif "compress_ratios" not in f:
            raise ConfigError(
                f"layer_types has {several!r}, of which compress_rates has several; give compress_ratios"
            )
    if "compress_ratios" in f:
        forms["compress_ratios"] = f.entries("compress_ratios", int)
    if not forms:  # the default that transformers takes is neither Flash nor Pro
        raise ConfigError(
            "config.json has neither compress_ratios nor layer_types; one must list the kind of every layer"
        )
    for field, ratios in forms.items():
        if len(ratios) < layers:
            raise ConfigError(
                f"{field} has {counted(len(ratios), 'entry', 'entries')}; each of the num_hidden_layers ({layers}) needs one"
            )
    if len({tuple(ratios[:layers]) for ratios in forms.values()}) > 1:
        raise ConfigError(
            "layer_types and compress_ratios name different kinds of layers; remove one of them"
        )
    longest = max(forms.values(), key=len)
    return tuple(longest[:layers]), tuple(longest[layers:])


def _draft(f: Fields, tail: tuple[int, ...]) -> str:
    if any(tail):
        raise ConfigError(f"compress_ratios has {list(tail)} after the last layer; draft layers have 0")
    if any(name.startswith("dspark_") for name in f):
        return "dspark"
    return "mtp" if tail else "none"


def _hash_layers(f: Fields, layers: int) -> int:
    if "mlp_layer_types" not in f:
        return min(layers, f.integer("num_hash_layers", low=0))
    types = f.entries("mlp_layer_types", str)[:layers]
    hashed = sum(t == "hash_moe" for t in types)
    if types != ["hash_moe"] * hashed + ["moe"] * (layers - hashed):
        raise f.refuse("mlp_layer_types", f"hash_moe for the first layers, then moe, {layers} in all")
    return hashed


def _rope_sections(f: Fields) -> tuple[Fields, Fields, Fields]:
    """(window-only layers, compressing layers, YaRN's numbers). A flat form holds YaRN's numbers and perhaps
    the theta of window-only layers; the nested form has a section for each kind of layer."""
    if "rope_parameters" in f and "rope_scaling" in f:
        raise ConfigError("config.json has both rope_parameters and rope_scaling; remove one of them")
    parameters = f.section("rope_parameters")
    if "main" in parameters or "compress" in parameters:
        main, compress = parameters.section("main"), parameters.section("compress")
        yarn = compress
        main.check("rope_type", ("default",))
    else:
        yarn = f.section("rope_scaling") if "rope_scaling" in f else parameters
        main, compress = yarn, Fields({})
    for section in (main, yarn):
        unknown = next((name for name in section if name not in ROPE_FIELDS), None)
        if unknown is not None:
            raise ConfigError(f"{section.path(unknown)} is unknown{nearest(unknown, ROPE_FIELDS)}")
    return main, compress, yarn


def _theta(f: Fields, name: str, section: Fields) -> float:
    """A rope base, given at the top, in its section, or in both and equal."""
    places = [(fields, key) for fields, key in ((f, name), (section, "rope_theta")) if key in fields]
    found = {fields.path(key): fields.number(key, above=1) for fields, key in places}
    return _agreed("rope base", found) if found else f.number(name)


def _agreed(what: str, found: Mapping[str, Any]) -> Any:
    """The one value that all places give."""
    if len(set(found.values())) > 1:
        said = ", ".join(f"{name} says {value:g}" for name, value in found.items())
        raise ConfigError(f"the {what} is unclear: {said}")
    return next(iter(found.values()))


def _rope_dim(f: Fields, *sections: Fields) -> int:
    """Rotary channels: given as a number, as a share of head_dim, or both; all must agree."""
    head_dim, found = f.integer("head_dim"), {}
    if "qk_rope_head_dim" in f:
        found["qk_rope_head_dim"] = f.integer("qk_rope_head_dim")
    for fields in (f, *sections):
        if "partial_rotary_factor" in fields:
            share = fields.number("partial_rotary_factor")
            found[fields.path("partial_rotary_factor")] = round(head_dim * share)
    return int(_agreed("number of rotary channels", found)) if found else f.integer("qk_rope_head_dim")


def _yarn(f: Fields) -> Yarn | None:
    """None without scaling. V4 scales frequencies only: no factor on cos and sin, none on the softmax."""
    kind = "rope_type" if "rope_type" in f else "type"
    if kind not in f and "factor" not in f:
        return None
    f.value(kind)
    f.check(kind, ("yarn", "default"))
    if f.value(kind) == "default":
        return None
    for name in ("attention_factor", "mscale"):
        f.check(name, (1,))
    f.check("truncate", (True,))
    return Yarn(
        factor=f.number("factor"),
        original_max_position=f.integer("original_max_position_embeddings"),
        beta_fast=f.number("beta_fast") if "beta_fast" in f else 32.0,
        beta_slow=f.number("beta_slow") if "beta_slow" in f else 1.0,
    )


USUAL_EXPERTS = "fp4"
"""Where config.json does not say it: what DeepSeek releases."""


def told_experts(f: Fields) -> str | None:
    """`expert_dtype` of config.json, which transformers moves into quantization_config; None where it is not there."""
    fields = f if "expert_dtype" in f else f.section("quantization_config")
    return str(fields.value("expert_dtype")) if "expert_dtype" in fields else None


def token_ids(f: Fields, name: str, vocab: int) -> tuple[int, ...]:
    """One id, a list of ids, or nothing."""
    if name not in f:
        return ()
    ids = f.entries(name, int) if isinstance(f.value(name), list) else [f.integer(name, low=0)]
    if not all(0 <= i < vocab for i in ids):
        raise f.refuse(name, f"below the vocabulary's {vocab}")
    return tuple(ids)


def _check_sizes(c: ModelConfig) -> None:
    rotary = f"an even number from 2 to head_dim and index_head_dim ({c.head_dim}, {c.index_head_dim})"
    power_of_two = c.index_head_dim & (c.index_head_dim - 1) == 0
    checks = [
        (c.rope_dim % 2 == 0, "qk_rope_head_dim", c.rope_dim, rotary),
        (2 <= c.rope_dim <= min(c.head_dim, c.index_head_dim), "qk_rope_head_dim", c.rope_dim, rotary),
        (power_of_two, "index_head_dim", c.index_head_dim, "a power of two"),
        (c.num_heads % c.o_groups == 0, "o_groups", c.o_groups, f"a divisor of the {c.num_heads} heads"),
        (
            c.experts_per_token <= c.num_experts,
            "num_experts_per_tok",
            c.experts_per_token,
            f"at most the {c.num_experts} experts",
        ),
    ]
    for holds, field, value, expected in checks:
        if not holds:
            raise ConfigError(f"{field} is {value}; it must be {expected}")
