"""What the engine reads of a checkpoint's config.json: the released form, and the one `transformers` writes.

Whatever is not supported is refused by name: a value that is ignored gives wrong tokens that look right.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from dsv4.errors import ConfigError

LAYER_TYPES = {
    "sliding_attention": "swa",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
"""transformers' names of the layer kinds."""

_MAX_JSON = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN of compressing layers: frequencies only, applied at every position (spec section 1)."""

    factor: float
    original_max_position: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model with Flash's or Pro's structure. `compress_ratios` has one entry per layer, draft layers cut off."""

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
    num_shared_experts: int
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
    compress_ratios: tuple[int, ...]
    csa_ratio: int
    hca_ratio: int
    rms_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: Yarn | None
    max_position: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    draft: str
    """`none`, `mtp` (one block, preview) or `dspark` (three blocks, GA)."""
    dspark_rank: int
    """Rank of DSpark's Markov head; 0 without."""

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """Reads config.json of a model directory. Raises ConfigError."""
        file = Path(path) / "config.json"
        return cls.from_dict(read_json(file), name=Path(path).resolve().name)

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """A released config by name: v4-flash, v4-flash-preview, v4-pro, v4-pro-preview. Raises ConfigError."""
        folder = resources.files("dsv4") / "model" / "configs"
        known = sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))
        if name not in known:
            raise ConfigError(f"model preset is {name!r}; known: {', '.join(known)}{_nearest(name, known)}")
        return cls.from_dict(json.loads((folder / f"{name}.json").read_text()), name=name)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], name: str = "model") -> ModelConfig:
        """Raises ConfigError for a missing, impossible or unsupported value."""
        return _Reader(raw).config(name)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """`swa`, `csa` or `hca` per layer."""
        kinds = {0: "swa", self.csa_ratio: "csa", self.hca_ratio: "hca"}
        return tuple(kinds[m] for m in self.compress_ratios)

    def layout(self, row_format: str, index_format: str, *, block_tokens: int = 256, draft_slack: int = 0) -> Any:
        """The cache of this model as a `LayoutSpec`. Raises ConfigError from the core for sizes that do not fit."""
        from dsv4._core import LayoutSpec
        from dsv4.formats import row_bytes

        return LayoutSpec.v4(
            compress_ratios=list(self.compress_ratios),
            csa_ratio=self.csa_ratio,
            hca_ratio=self.hca_ratio,
            head_dim=self.head_dim,
            index_head_dim=self.index_head_dim,
            window=self.window,
            row_bytes=row_bytes(row_format, self.head_dim, self.rope_dim),
            row_format=row_format,
            index_row_bytes=row_bytes(index_format, self.index_head_dim, self.rope_dim),
            index_format=index_format,
            block_tokens=block_tokens,
            draft_slack=draft_slack,
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises ConfigError."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes; the largest that is read is {_MAX_JSON}")
        data = json.loads(path.read_text())
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from None
    except ValueError as e:
        raise ConfigError(f"{path} is no JSON: {e}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, not an object")
    return data


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class _Reader:
    """config.json, field by field."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def config(self, name: str) -> ModelConfig:
        self._refuse_unsupported()
        layers = self._int("num_hidden_layers")
        rates = self.raw.get("compress_rates") or {}
        csa, hca = rates.get("compressed_sparse_attention", 4), rates.get("heavily_compressed_attention", 128)
        tail, ratios = self._ratios(layers, csa, hca)
        head_dim = self._int("head_dim")
        draft = self._draft(tail)
        config = ModelConfig(
            name=name,
            vocab_size=self._int("vocab_size"),
            hidden_size=self._int("hidden_size"),
            num_layers=layers,
            num_heads=self._int("num_attention_heads"),
            head_dim=head_dim,
            rope_dim=self._rope_dim(head_dim),
            q_lora_rank=self._int("q_lora_rank"),
            o_groups=self._int("o_groups"),
            o_lora_rank=self._int("o_lora_rank"),
            num_experts=self._int("n_routed_experts", "num_local_experts"),
            experts_per_token=self._int("num_experts_per_tok"),
            moe_intermediate_size=self._int("moe_intermediate_size"),
            num_shared_experts=self._int("n_shared_experts"),
            routed_scaling_factor=self._number("routed_scaling_factor"),
            num_hash_layers=self._hash_layers(layers),
            swiglu_limit=self._number("swiglu_limit"),
            hc_mult=self._int("hc_mult"),
            hc_sinkhorn_iters=self._int("hc_sinkhorn_iters"),
            hc_eps=self._number("hc_eps"),
            index_heads=self._int("index_n_heads"),
            index_head_dim=self._int("index_head_dim"),
            index_topk=self._int("index_topk"),
            window=self._int("sliding_window"),
            compress_ratios=ratios,
            csa_ratio=csa,
            hca_ratio=hca,
            rms_eps=self._number("rms_norm_eps"),
            rope_theta=self._main_theta(),
            compress_rope_theta=self._number("compress_rope_theta"),
            yarn=self._yarn(),
            max_position=self._int("max_position_embeddings"),
            bos_id=self.raw.get("bos_token_id"),
            eos_ids=self._eos(),
            pad_id=self.raw.get("pad_token_id"),
            draft=draft,
            dspark_rank=self._int("dspark_markov_rank") if draft == "dspark" else 0,
        )
        self._check(config)
        return config

    def _refuse_unsupported(self) -> None:
        supported: dict[str, tuple[Any, ...]] = {
            "model_type": ("deepseek_v4",),
            "scoring_func": ("sqrtsoftplus",),
            "topk_method": ("noaux_tc",),
            "norm_topk_prob": (True,),
            "tie_word_embeddings": (False,),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "hidden_act": ("silu",),
            "num_key_value_heads": (1,),
            "expert_dtype": ("fp4", "fp8", None),
        }
        if "model_type" not in self.raw:
            raise ConfigError("config.json has no model_type; supported is deepseek_v4")
        for field, values in supported.items():
            if field in self.raw and self.raw[field] not in values:
                shown = ", ".join(json.dumps(v) for v in values if v is not None)
                raise ConfigError(f"{field} is {json.dumps(self.raw[field])}; supported is {shown}")
        quant = self.raw.get("quantization_config") or {}
        expected = {
            "quant_method": ("fp8",),
            "fmt": ("e4m3",),
            "scale_fmt": ("ue8m0",),
            "weight_block_size": ([128, 128],),
        }
        for field, values in expected.items():
            if field in quant and quant[field] not in values:
                shown = json.dumps(values[0])
                raise ConfigError(f"quantization_config.{field} is {json.dumps(quant[field])}; supported is {shown}")

    def _value(self, *names: str) -> Any:
        for name in names:
            if self.raw.get(name) is not None:
                return self.raw[name]
        close = _nearest(names[0], sorted(self.raw))
        raise ConfigError(f"config.json has no {names[0]}{close}")

    def _int(self, *names: str) -> int:
        value = self._value(*names)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{names[0]} is {value!r}; it must be a whole number of at least 0")
        return value

    def _number(self, name: str) -> float:
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise ConfigError(f"{name} is {value!r}; it must be a number of at least 0")
        return float(value)

    def _ratios(self, layers: int, csa: int, hca: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(draft tail, one ratio per layer)."""
        if "layer_types" in self.raw:
            types = self._value("layer_types")
            unknown = next((t for t in types if t not in LAYER_TYPES), None)
            if unknown is not None:
                raise ConfigError(f"layer_types has {unknown!r}; supported are {', '.join(LAYER_TYPES)}")
            by_kind = {"swa": 0, "csa": csa, "hca": hca}
            ratios = [by_kind[LAYER_TYPES[t]] for t in types]
        elif "compress_ratios" in self.raw:
            ratios = list(self._value("compress_ratios"))
        else:  # any default would match neither Flash nor Pro
            raise ConfigError("config.json has neither compress_ratios nor layer_types; one of them must list every layer's kind")
        if len(ratios) < layers:
            raise ConfigError(f"compress_ratios has {len(ratios)} entries; num_hidden_layers is {layers}, each layer needs one")
        bad = next((m for m in ratios if m not in (0, csa, hca)), None)
        if bad is not None:
            raise ConfigError(f"compress_ratios has {bad!r}; each entry is 0, {csa} (CSA) or {hca} (HCA)")
        return tuple(ratios[layers:]), tuple(ratios[:layers])

    def _rope_dim(self, head_dim: int) -> int:
        if self.raw.get("qk_rope_head_dim") is not None:
            return self._int("qk_rope_head_dim")
        return int(head_dim * self._number("partial_rotary_factor"))

    def _hash_layers(self, layers: int) -> int:
        types = self.raw.get("mlp_layer_types")
        if types is None:
            return min(layers, self._int("num_hash_layers"))
        hashed = sum(t == "hash_moe" for t in types)
        if types != ["hash_moe"] * hashed + ["moe"] * (layers - hashed):
            raise ConfigError("mlp_layer_types mixes kinds; supported are hash_moe layers first, then moe layers")
        return hashed

    def _rope_parameters(self, kind: str) -> Mapping[str, Any]:
        """`main` or `compress`; flat forms hold YaRN's numbers for `compress`."""
        nested = self.raw.get("rope_parameters") or {}
        if kind in nested:
            return nested[kind]
        return (nested or self.raw.get("rope_scaling") or {}) if kind == "compress" else {}

    def _main_theta(self) -> float:
        main = self._rope_parameters("main")
        if main.get("rope_type", "default") != "default":
            raise ConfigError(f"rope_parameters.main.rope_type is {main['rope_type']!r}; supported is 'default'")
        return float(main.get("rope_theta") or self._number("rope_theta"))

    def _yarn(self) -> Yarn | None:
        p = self._rope_parameters("compress")
        kind = p.get("rope_type", p.get("type", "default"))
        if kind == "default":
            return None
        if kind != "yarn":
            raise ConfigError(f"rope_scaling.type is {kind!r}; supported are 'yarn' and 'default'")
        if p.get("attention_factor", 1.0) != 1.0 or p.get("mscale") not in (None, 1, 1.0):
            raise ConfigError("rope_scaling has an attention factor other than 1; V4 scales frequencies only")
        try:
            return Yarn(
                float(p["factor"]),
                int(p["original_max_position_embeddings"]),
                float(p.get("beta_fast", 32)),
                float(p.get("beta_slow", 1)),
            )
        except KeyError as e:
            raise ConfigError(f"rope_scaling has no {e.args[0]}") from None

    def _eos(self) -> tuple[int, ...]:
        eos = self.raw.get("eos_token_id")
        return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)

    def _draft(self, tail: tuple[int, ...]) -> str:
        if any(tail):
            raise ConfigError(f"compress_ratios ends in {list(tail)}; draft layers have ratio 0")
        if any(k.startswith("dspark_") for k in self.raw):
            return "dspark"
        return "mtp" if tail else "none"

    def _check(self, c: ModelConfig) -> None:
        problems = [
            (c.num_layers >= 1, "num_hidden_layers", c.num_layers, "at least 1"),
            (c.window >= 2, "sliding_window", c.window, "at least 2"),
            (0 < c.rope_dim <= min(c.head_dim, c.index_head_dim), "qk_rope_head_dim", c.rope_dim, "1 to head_dim and index_head_dim"),
            (c.rope_dim % 2 == 0, "qk_rope_head_dim", c.rope_dim, "even"),
            (c.index_head_dim & (c.index_head_dim - 1) == 0, "index_head_dim", c.index_head_dim, "a power of two"),
            (c.o_groups >= 1 and c.num_heads % max(c.o_groups, 1) == 0, "o_groups", c.o_groups, f"a divisor of {c.num_heads} heads"),
            (1 <= c.experts_per_token <= c.num_experts, "num_experts_per_tok", c.experts_per_token, f"1 to {c.num_experts} experts"),
            (c.num_shared_experts == 1, "n_shared_experts", c.num_shared_experts, "1"),
            (c.hc_mult >= 1, "hc_mult", c.hc_mult, "at least 1"),
            (c.hc_sinkhorn_iters >= 1, "hc_sinkhorn_iters", c.hc_sinkhorn_iters, "at least 1"),
            (c.index_topk >= 1, "index_topk", c.index_topk, "at least 1"),
        ]  # fmt: skip
        for holds, field, value, expected in problems:
            if not holds:
                raise ConfigError(f"{field} is {value}; it must be {expected}")
