"""Small random V4 models: config, weights with every parameter randomised, and the same model in
`transformers`.

The initialisation that `transformers` gives (ape and sinks zero, tid2eid zero, norms one) hides bugs, so
nothing keeps it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dsv4.model.config import ModelConfig
from dsv4.model.layout import LayerSpec
from torch import Tensor, nn

SCHEDULES = {
    "flash": [0, 0, 4, 128, 4, 128],
    "pro": [128, 128, 4, 128, 4],
}
"""Compression ratios per layer as in the two releases: window only or HCA first, then CSA and HCA in turn."""

_BASE: dict[str, Any] = dict(
    model_type="deepseek_v4",
    architectures=["DeepseekV4ForCausalLM"],
    vocab_size=256,
    hidden_size=128,
    moe_intermediate_size=64,
    num_attention_heads=8,
    num_key_value_heads=1,
    head_dim=64,
    qk_rope_head_dim=32,
    q_lora_rank=64,
    o_groups=2,
    o_lora_rank=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    routed_scaling_factor=1.5,
    num_hash_layers=1,
    swiglu_limit=10.0,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    index_n_heads=4,
    index_head_dim=64,
    index_topk=512,
    sliding_window=128,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    rope_scaling=dict(
        type="yarn", factor=16, original_max_position_embeddings=65536, beta_fast=32, beta_slow=1
    ),
    max_position_embeddings=65536,
    scoring_func="sqrtsoftplus",
    topk_method="noaux_tc",
    norm_topk_prob=True,
    num_nextn_predict_layers=0,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
)


def random_config_dict(kind: str = "flash", **overrides: object) -> dict[str, Any]:
    """A released-style config.json of a small model; `kind` is a key of SCHEDULES, overrides are config.json
    keys."""
    config = {**_BASE, "compress_ratios": SCHEDULES[kind], **overrides}
    config["num_hidden_layers"] = len(config["compress_ratios"])
    return config


def random_config(kind: str = "flash", **overrides: object) -> ModelConfig:
    """The same as a ModelConfig."""
    return ModelConfig.from_dict(random_config_dict(kind, **overrides))


def weight_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in canonical names (tid2eid apart)."""
    d, n, hc = c.hidden_size, c.hc_mult, c.hc_mult * c.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (c.vocab_size, d),
        "head.weight": (c.vocab_size, d),
        "norm.weight": (d,),
        "hc_head_fn": (n, hc),
        "hc_head_base": (n,),
        "hc_head_scale": (1,),
    }
    for layer, spec in enumerate(c.layers):
        p = f"layers.{layer}."
        for side in ("attn", "ffn"):
            shapes[f"{p}{side}_norm.weight"] = (d,)
            shapes |= {
                f"{p}hc_{side}_fn": (n * (n + 2), hc),
                f"{p}hc_{side}_base": (n * (n + 2),),
                f"{p}hc_{side}_scale": (3,),
            }
        shapes |= {f"{p}attn.{k}": s for k, s in _attention_shapes(c, spec).items()}
        shapes |= {f"{p}ffn.{k}": s for k, s in _ffn_shapes(c, layer).items()}
    return shapes


def _attention_shapes(c: ModelConfig, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
    d = c.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "wq_a.weight": (c.q_lora_rank, d),
        "q_norm.weight": (c.q_lora_rank,),
        "wq_b.weight": (c.num_heads * c.head_dim, c.q_lora_rank),
        "wkv.weight": (c.head_dim, d),
        "kv_norm.weight": (c.head_dim,),
        "attn_sink": (c.num_heads,),
        "wo_a.weight": (c.o_groups * c.o_lora_rank, c.num_heads * c.head_dim // c.o_groups),
        "wo_b.weight": (d, c.o_groups * c.o_lora_rank),
    }
    if spec.stores:
        shapes |= {f"compressor.{k}": s for k, s in _compressor_shapes(d, spec, c.head_dim).items()}
    if spec.indexed and spec.stores:
        inner = _compressor_shapes(d, spec, c.index_head_dim)
        shapes |= {f"indexer.compressor.{k}": s for k, s in inner.items()}
    if spec.indexed:
        shapes["indexer.wq_b.weight"] = (c.index_heads * c.index_head_dim, c.q_lora_rank)
        shapes["indexer.weights_proj.weight"] = (c.index_heads, d)
    return shapes


def _compressor_shapes(d: int, spec: LayerSpec, dim: int) -> dict[str, tuple[int, ...]]:
    wide = dim * (2 if spec.overlap else 1)
    matrices = {"wkv.weight": (wide, d), "wgate.weight": (wide, d)}
    return {**matrices, "ape": (spec.ratio, wide), "norm.weight": (dim,)}


def _ffn_shapes(c: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    d, i, e = c.hidden_size, c.moe_intermediate_size, c.num_experts
    shapes: dict[str, tuple[int, ...]] = {"gate.weight": (e, d)}
    if layer >= c.num_hash_layers:
        shapes["gate.bias"] = (e,)
    for name, shape in (("w1", (i, d)), ("w3", (i, d)), ("w2", (d, i))):
        shapes[f"experts.{name}"] = (e, *shape)
        shapes[f"shared_experts.{name}.weight"] = shape
    return shapes


def random_weights(
    config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Weights in canonical names: norms 1 +- 0.1; sinks, ape, hc base and gate bias of width 0.5; matrices of
    width 1.5 / sqrt(fan in); hash tables of random distinct experts. What the release keeps in float32 stays
    so."""
    g = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in weight_shapes(config).items():
        x = torch.randn(shape, generator=g)
        if name.endswith("norm.weight"):
            x = 1 + 0.1 * x
        elif name.endswith("_scale"):
            x = 0.5 + 0.1 * x
        elif name.endswith(("attn_sink", "ape", "_base", "gate.bias")):
            x = 0.5 * x
        else:
            x = 1.5 * x / shape[-1] ** 0.5
        plain = "hc_" in name or name.endswith(("attn_sink", "ape", "gate.bias"))
        weights[name] = x if plain else x.to(dtype)
    for layer in range(min(config.num_hash_layers, config.num_layers)):
        order = torch.rand((config.vocab_size, config.num_experts), generator=g).argsort(-1)
        weights[f"layers.{layer}.ffn.gate.tid2eid"] = order[:, : config.experts_per_token].contiguous()
    return weights


_HF_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "hc_attn_": "attn_hc.",
    "hc_ffn_": "ffn_hc.",
    "attn.wq_a.": "self_attn.q_a_proj.",
    "attn.wq_b.": "self_attn.q_b_proj.",
    "attn.wkv.": "self_attn.kv_proj.",
    "attn.q_norm.": "self_attn.q_a_norm.",
    "attn.kv_norm.": "self_attn.kv_norm.",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wo_a.": "self_attn.o_a_proj.",
    "attn.wo_b.": "self_attn.o_b_proj.",
    "attn.compressor.": "self_attn.compressor.",
    "attn.indexer.wq_b.": "self_attn.compressor.indexer.q_b_proj.",
    "attn.indexer.weights_proj.": "self_attn.compressor.indexer.scorer.weights_proj.",
    "attn.indexer.compressor.": "self_attn.compressor.indexer.",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.": "mlp.gate.",
    "ffn.shared_experts.w1.": "mlp.shared_experts.gate_proj.",
    "ffn.shared_experts.w3.": "mlp.shared_experts.up_proj.",
    "ffn.shared_experts.w2.": "mlp.shared_experts.down_proj.",
}
_HF_COMPRESSOR = {"wkv.": "kv_proj.", "wgate.": "gate_proj.", "ape": "position_bias", "norm.": "kv_norm."}


def hf_name(name: str) -> str:
    """The `transformers` name of a tensor (experts apart, which it stacks)."""
    if not name.startswith("layers."):
        flat = {
            "embed.weight": "model.embed_tokens.weight",
            "head.weight": "lm_head.weight",
            "norm.weight": "model.norm.weight",
        }
        return flat.get(name) or "model." + name.replace("hc_head_", "hc_head.hc_")
    _, layer, rest = name.split(".", 2)
    ours, theirs = max(((a, b) for a, b in _HF_NAMES.items() if rest.startswith(a)), key=lambda x: len(x[0]))
    tail = rest.removeprefix(ours)
    if ours.endswith("compressor."):
        part = next(p for p in _HF_COMPRESSOR if tail.startswith(p))
        tail = _HF_COMPRESSOR[part] + tail.removeprefix(part)
    return f"model.layers.{layer}.{theirs}{tail}"


def hf_state_dict(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Canonical weights under the names of `transformers`."""
    state = {hf_name(n): w for n, w in weights.items() if ".experts." not in n}
    for layer in range(config.num_layers):
        w1, w3, w2 = (weights[f"layers.{layer}.ffn.experts.{n}"] for n in ("w1", "w3", "w2"))
        state[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat((w1, w3), dim=1)
        state[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    return state


def hf_twin(config: ModelConfig, weights: dict[str, Tensor]) -> nn.Module:
    """`transformers.DeepseekV4ForCausalLM` in float32 with the same weights, in eval mode."""
    pytest.importorskip("transformers")  # `make test-lowest` runs without it
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    c, yarn = config, config.yarn
    rope: dict[str, Any] = dict(rope_type="default", rope_theta=c.rope_theta)
    if yarn is not None:
        rope |= dict(
            rope_type="yarn",
            factor=yarn.factor,
            original_max_position_embeddings=yarn.original_max_position,
            beta_fast=yarn.beta_fast,
            beta_slow=yarn.beta_slow,
        )
    model = DeepseekV4ForCausalLM(
        DeepseekV4Config(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            moe_intermediate_size=c.moe_intermediate_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            head_dim=c.head_dim,
            q_lora_rank=c.q_lora_rank,
            o_groups=c.o_groups,
            o_lora_rank=c.o_lora_rank,
            n_routed_experts=c.num_experts,
            num_experts_per_tok=c.experts_per_token,
            routed_scaling_factor=c.routed_scaling_factor,
            swiglu_limit=c.swiglu_limit,
            hc_mult=c.hc_mult,
            hc_sinkhorn_iters=c.hc_sinkhorn_iters,
            hc_eps=c.hc_eps,
            index_n_heads=c.index_heads,
            index_head_dim=c.index_head_dim,
            index_topk=c.index_topk,
            sliding_window=c.window,
            num_hash_layers=c.num_hash_layers,
            qk_rope_head_dim=c.rope_dim,
            compress_ratios=list(c.compress_ratios),
            rope_theta=c.rope_theta,
            compress_rope_theta=c.compress_rope_theta,
            rms_norm_eps=c.rms_eps,
            max_position_embeddings=c.max_position,
            rope_parameters=rope,
        )
    ).eval()
    state = hf_state_dict(config, weights)
    model.load_state_dict({n: w.float() if w.is_floating_point() else w for n, w in state.items()})
    return model
