"""One table of a checkpoint: every tensor's released name, storage format and shape, from the config.

Loader, exporter and size arithmetic all use it. Its totals reproduce the published sizes of all four
releases. The other namings are those of transformers: what it keeps in memory, and the mix that
`save_pretrained` writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod

from dsv4.model.config import ModelConfig
from dsv4.model.layout import LayerSpec
from dsv4.row_sizes import FP4_BLOCK, FP8_BLOCK

DTYPE_BYTES = {
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
    "I32": 4,
    "I64": 8,
}
"""safetensors dtype names and their bytes; no weight is read from I32, but a refusal should name more than that."""


DRAFT = LayerSpec(layer=-1)
"""A draft layer has a window only."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A logical tensor. `storage` is how the release keeps it: fp8 (e4m3, one ue8m0 scale per 128 x 128), fp4
    (packed e2m1, one ue8m0 scale per 32), bf16, f32 or i64. `axis`: the one along which ranks divide it (see `parallel.py`);
    None: every rank has it whole."""

    shape: tuple[int, ...]
    storage: str
    axis: int | None = None

    def stored(self, name: str) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, safetensors dtype, shape) of what lies in the file."""
        if self.storage == "fp8":
            scale = tuple(ceil(n / FP8_BLOCK) for n in self.shape)
            return [(name, "F8_E4M3", self.shape), (scale_name(name), "F8_E8M0", scale)]
        if self.storage == "fp4":
            out, width = self.shape
            return [(name, "I8", (out, width // 2)), (scale_name(name), "F8_E8M0", (out, width // FP4_BLOCK))]
        return [(name, {"bf16": "BF16", "f32": "F32", "i64": "I64"}[self.storage], self.shape)]


def scale_name(name: str) -> str:
    """`X.weight` -> `X.scale`."""
    return name.removesuffix(".weight") + ".scale"


def is_expert(name: str) -> bool:
    """Whether a tensor is a routed expert's."""
    return ".ffn.experts." in name


def is_attention(name: str) -> bool:
    """Whether a tensor is an attention layer's, its indexer and compressors included."""
    return ".attn." in name


_BUFFERS = ("inv_freq", "cos_cached", "sin_cached", "freqs_cis")


def is_buffer(name: str) -> bool:
    """Whether a tensor is a table of rotations, which some files hold and the model computes."""
    return name.endswith(_BUFFERS)


def tensors(c: ModelConfig, *, draft: bool = False) -> Iterator[tuple[str, TensorSpec]]:
    """Every tensor of the checkpoint, `draft` ones (MTP or DSpark) included on demand."""
    yield "embed.weight", TensorSpec((c.vocab_size, c.hidden_size), "bf16", 0)
    yield "head.weight", TensorSpec((c.vocab_size, c.hidden_size), "bf16", 0)
    yield "norm.weight", TensorSpec((c.hidden_size,), "bf16")
    yield from _head_mix(c, "")
    for spec in c.layers:
        yield from _block(c, f"layers.{spec.layer}.", spec, hashed=spec.layer < c.num_hash_layers)
    if draft and c.draft == "mtp":
        yield from _mtp(c)
    if draft and c.draft == "dspark":
        yield from _dspark(c)


def _head_mix(c: ModelConfig, prefix: str) -> Iterator[tuple[str, TensorSpec]]:
    yield f"{prefix}hc_head_fn", TensorSpec((c.hc_mult, c.hc_mult * c.hidden_size), "f32")
    yield f"{prefix}hc_head_base", TensorSpec((c.hc_mult,), "f32")
    yield f"{prefix}hc_head_scale", TensorSpec((1,), "f32")


def _block(c: ModelConfig, p: str, spec: LayerSpec, *, hashed: bool) -> Iterator[tuple[str, TensorSpec]]:
    """A transformer block under prefix `p`."""
    d, mix = c.hidden_size, c.hc_mult * (c.hc_mult + 2)
    for part in ("attn", "ffn"):
        yield f"{p}{part}_norm.weight", TensorSpec((d,), "bf16")
        yield f"{p}hc_{part}_fn", TensorSpec((mix, c.hc_mult * d), "f32")
        yield f"{p}hc_{part}_base", TensorSpec((mix,), "f32")
        yield f"{p}hc_{part}_scale", TensorSpec((3,), "f32")
    yield from _attention(c, f"{p}attn.", spec)
    yield from _moe(c, f"{p}ffn.", hashed=hashed)


def _attention(c: ModelConfig, p: str, spec: LayerSpec) -> Iterator[tuple[str, TensorSpec]]:
    d, heads, q = c.hidden_size, c.num_heads * c.head_dim, c.q_lora_rank
    yield f"{p}wq_a.weight", TensorSpec((q, d), "fp8")
    yield f"{p}wq_b.weight", TensorSpec((heads, q), "fp8", 0)
    yield f"{p}wkv.weight", TensorSpec((c.head_dim, d), "fp8")
    yield f"{p}wo_a.weight", TensorSpec((c.o_groups * c.o_lora_rank, heads // c.o_groups), "fp8", 0)
    yield f"{p}wo_b.weight", TensorSpec((d, c.o_groups * c.o_lora_rank), "fp8", 1)
    yield f"{p}q_norm.weight", TensorSpec((q,), "bf16")
    yield f"{p}kv_norm.weight", TensorSpec((c.head_dim,), "bf16")
    yield f"{p}attn_sink", TensorSpec((c.num_heads,), "f32", 0)
    if spec.stores:
        yield from _compressor(f"{p}compressor.", spec, c.head_dim, d)
    if spec.indexed:
        yield f"{p}indexer.wq_b.weight", TensorSpec((c.index_heads * c.index_head_dim, q), "fp8")
        yield f"{p}indexer.weights_proj.weight", TensorSpec((c.index_heads, d), "bf16")
    if spec.indexed and spec.stores:
        yield from _compressor(f"{p}indexer.compressor.", spec, c.index_head_dim, d)


def _compressor(p: str, spec: LayerSpec, dim: int, d: int) -> Iterator[tuple[str, TensorSpec]]:
    width = 2 * dim if spec.overlap else dim
    yield f"{p}wkv.weight", TensorSpec((width, d), "bf16")
    yield f"{p}wgate.weight", TensorSpec((width, d), "bf16")
    yield f"{p}ape", TensorSpec((spec.ratio, width), "f32")
    yield f"{p}norm.weight", TensorSpec((dim,), "bf16")


def _moe(c: ModelConfig, p: str, *, hashed: bool) -> Iterator[tuple[str, TensorSpec]]:
    d = c.hidden_size
    yield f"{p}gate.weight", TensorSpec((c.num_experts, d), "bf16")
    if hashed:
        yield f"{p}gate.tid2eid", TensorSpec((c.vocab_size, c.experts_per_token), "i64")
    else:
        yield f"{p}gate.bias", TensorSpec((c.num_experts,), "f32")
    for name, shape in expert_shapes(c):
        for e in range(c.num_experts):
            yield f"{p}experts.{e}.{name}.weight", TensorSpec(shape, c.expert_dtype, EXPERT_AXIS[name])
        yield f"{p}shared_experts.{name}.weight", TensorSpec(shape, "fp8", EXPERT_AXIS[name])


EXPERT_AXIS = {"w1": 0, "w3": 0, "w2": 1}
"""An expert is divided by its columns: rows of gate and up, inputs of down."""


def expert_shapes(c: ModelConfig) -> tuple[tuple[str, tuple[int, int]], ...]:
    """(name, shape) of an expert's gate, up and down projections."""
    d, i = c.hidden_size, c.moe_intermediate_size
    return ("w1", (i, d)), ("w3", (i, d)), ("w2", (d, i))


def _mtp(c: ModelConfig) -> Iterator[tuple[str, TensorSpec]]:
    d = c.hidden_size
    yield from _block(c, "mtp.0.", DRAFT, hashed=False)
    for name in ("e_proj", "h_proj"):
        yield f"mtp.0.{name}.weight", TensorSpec((d, d), "fp8")
    for name in ("enorm", "hnorm", "norm"):
        yield f"mtp.0.{name}.weight", TensorSpec((d,), "bf16")
    yield from _head_mix(c, "mtp.0.")


def _dspark(c: ModelConfig) -> Iterator[tuple[str, TensorSpec]]:
    """Three window-only blocks; the first projects the main model's streams, the last has the heads (spec 7
    and 9.1)."""
    d, rank = c.hidden_size, c.dspark_rank
    for stage in range(3):
        yield from _block(c, f"mtp.{stage}.", DRAFT, hashed=False)
    yield "mtp.0.main_proj.weight", TensorSpec((d, 3 * d), "fp8")
    yield "mtp.0.main_norm.weight", TensorSpec((d,), "bf16")
    yield "mtp.2.norm.weight", TensorSpec((d,), "bf16")
    yield from _head_mix(c, "mtp.2.")
    for name in ("markov_w1", "markov_w2"):
        yield f"mtp.2.markov_head.{name}.weight", TensorSpec((c.vocab_size, rank), "bf16")
    yield "mtp.2.confidence_head.proj.weight", TensorSpec((1, d + rank), "bf16")


def release_totals(c: ModelConfig) -> tuple[int, int]:
    """(tensors, bytes of tensor data) of the released checkpoint, from shapes alone."""
    count = size = 0
    for name, spec in tensors(c, draft=True):
        for _, dtype, shape in spec.stored(name):
            count += 1
            size += prod(shape) * DTYPE_BYTES[dtype]
    return count, size


_GLOBAL = {
    "embed.weight": "embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "hc_head_fn": "hc_head.hc_fn",
    "hc_head_base": "hc_head.hc_base",
    "hc_head_scale": "hc_head.hc_scale",
}
"""Released name: the one of transformers, without its `model.` prefix."""

_COMPRESSOR = {"wkv.": "kv_proj.", "wgate.": "gate_proj.", "ape": "position_bias", "norm.": "kv_norm."}

_IN_LAYER = {
    "attn_norm.": "input_layernorm.",
    "ffn_norm.": "post_attention_layernorm.",
    "hc_attn_": "attn_hc.",
    "hc_ffn_": "ffn_hc.",
    "attn.wq_a.": "self_attn.q_a_proj.",
    "attn.wq_b.": "self_attn.q_b_proj.",
    "attn.wkv.": "self_attn.kv_proj.",
    "attn.wo_a.": "self_attn.o_a_proj.",
    "attn.wo_b.": "self_attn.o_b_proj.",
    "attn.q_norm.": "self_attn.q_a_norm.",
    "attn.kv_norm.": "self_attn.kv_norm.",
    "attn.attn_sink": "self_attn.sinks",
    **{f"attn.compressor.{a}": f"self_attn.compressor.{b}" for a, b in _COMPRESSOR.items()},
    **{f"attn.indexer.compressor.{a}": f"self_attn.compressor.indexer.{b}" for a, b in _COMPRESSOR.items()},
    "attn.indexer.wq_b.": "self_attn.compressor.indexer.q_b_proj.",
    "attn.indexer.weights_proj.": "self_attn.compressor.indexer.scorer.weights_proj.",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared_experts.w1.": "mlp.shared_experts.gate_proj.",
    "ffn.shared_experts.w3.": "mlp.shared_experts.up_proj.",
    "ffn.shared_experts.w2.": "mlp.shared_experts.down_proj.",
}
"""The same within a layer, by the start of the name."""

_STACKED = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
"""Tensors `mlp.experts.*` [E, ...] of transformers that hold these projections of all experts, one under the other."""


def canonical_name(name: str) -> str:
    """A file's tensor name in the released naming; a name that is in no table stays as it is.

    `save_pretrained` writes the released names with a `model.` prefix, but its own for the embedding, the
    head mix and the KV norm; with `save_original_format=False` it writes its own throughout. Scales are `X.scale`, or
    `X.weight_scale_inv` as with DeepSeek-V3, which is the same number.
    """
    name = name.removeprefix("model.")
    if name.endswith(".weight_scale_inv"):
        name = name.removesuffix(".weight_scale_inv") + ".scale"
    parts = name.split(".", 2)
    if parts[0] != "layers" or len(parts) < 3:
        return next((ours for ours, theirs in _GLOBAL.items() if name == theirs), name)
    if parts[2].startswith("ffn.experts."):  # most of a release's 70,000 names
        return name
    layer, rest = f"layers.{parts[1]}.", parts[2]
    if rest == "attn.norm.weight":
        return f"{layer}attn.kv_norm.weight"
    found = ((ours, theirs) for ours, theirs in _IN_LAYER.items() if rest.startswith(theirs))
    ours, theirs = next(found, ("", ""))
    return layer + ours + rest.removeprefix(theirs)


def transformers_name(name: str) -> str:
    """The name that transformers has in memory, experts apart (it stacks them). KeyError for unknown ones."""
    if not name.startswith("layers."):
        theirs = _GLOBAL.get(name, name)
        return theirs if theirs.startswith("lm_head") else f"model.{theirs}"
    _, layer, rest = name.split(".", 2)
    for ours, theirs in _IN_LAYER.items():
        if rest.startswith(ours):
            return f"model.layers.{layer}.{theirs}{rest.removeprefix(ours)}"
    raise KeyError(name)


def stacked_experts(name: str, experts: int) -> list[str]:
    """Released names of the equal pieces of a stacked tensor in the order they lie in it, or nothing.

    gate_up_proj [E, 2 i, d] is expert 0's w1, its w3, expert 1's w1, ...; down_proj [E, d, i] is one w2 after
    another; so are their scales, `gate_up_proj_scale_inv` and `down_proj_scale_inv`.
    """
    layer, _, rest = name.partition(".mlp.experts.")
    leaf = "scale" if rest.endswith("_scale_inv") else "weight"
    projections = _STACKED.get(rest.removesuffix("_scale_inv"), ())
    return [
        f"{layer}.ffn.experts.{e}.{p}.{leaf}"
        for e in range(experts if projections else 0)
        for p in projections
    ]
