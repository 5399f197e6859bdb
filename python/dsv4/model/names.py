"""One table of a checkpoint: every tensor's released name, storage format and shape, as a function of the config.

Loader, exporter and size arithmetic all use it. Its totals reproduce the published sizes of all four releases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod

from dsv4.model.config import ModelConfig

DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "I64": 8}
"""safetensors dtype names and their bytes."""

FP8_BLOCK, FP4_BLOCK = 128, 32


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A logical tensor. `storage`: fp8 (e4m3, one ue8m0 scale per 128 x 128), fp4 (packed e2m1, one ue8m0 scale per 32),
    bf16, f32 or i64."""

    shape: tuple[int, ...]
    storage: str

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


def tensors(c: ModelConfig, *, draft: bool = False) -> Iterator[tuple[str, TensorSpec]]:
    """Every tensor of the checkpoint, `draft` ones (MTP or DSpark) included on demand."""
    yield "embed.weight", TensorSpec((c.vocab_size, c.hidden_size), "bf16")
    yield "head.weight", TensorSpec((c.vocab_size, c.hidden_size), "bf16")
    yield "norm.weight", TensorSpec((c.hidden_size,), "bf16")
    yield from _head_mix(c, "")
    for layer, ratio in enumerate(c.compress_ratios):
        yield from _block(c, f"layers.{layer}.", ratio, hashed=layer < c.num_hash_layers)
    if draft and c.draft == "mtp":
        yield from _mtp(c)
    if draft and c.draft == "dspark":
        yield from _dspark(c)


def _head_mix(c: ModelConfig, prefix: str) -> Iterator[tuple[str, TensorSpec]]:
    yield f"{prefix}hc_head_fn", TensorSpec((c.hc_mult, c.hc_mult * c.hidden_size), "f32")
    yield f"{prefix}hc_head_base", TensorSpec((c.hc_mult,), "f32")
    yield f"{prefix}hc_head_scale", TensorSpec((1,), "f32")


def _block(c: ModelConfig, p: str, ratio: int, *, hashed: bool) -> Iterator[tuple[str, TensorSpec]]:
    """A transformer block under prefix `p`."""
    d, mix = c.hidden_size, c.hc_mult * (c.hc_mult + 2)
    for part in ("attn", "ffn"):
        yield f"{p}{part}_norm.weight", TensorSpec((d,), "bf16")
        yield f"{p}hc_{part}_fn", TensorSpec((mix, c.hc_mult * d), "f32")
        yield f"{p}hc_{part}_base", TensorSpec((mix,), "f32")
        yield f"{p}hc_{part}_scale", TensorSpec((3,), "f32")
    yield from _attention(c, f"{p}attn.", ratio)
    yield from _moe(c, f"{p}ffn.", hashed=hashed)


def _attention(c: ModelConfig, p: str, ratio: int) -> Iterator[tuple[str, TensorSpec]]:
    d, heads, q = c.hidden_size, c.num_heads * c.head_dim, c.q_lora_rank
    yield f"{p}wq_a.weight", TensorSpec((q, d), "fp8")
    yield f"{p}wq_b.weight", TensorSpec((heads, q), "fp8")
    yield f"{p}wkv.weight", TensorSpec((c.head_dim, d), "fp8")
    yield f"{p}wo_a.weight", TensorSpec((c.o_groups * c.o_lora_rank, heads // c.o_groups), "fp8")
    yield f"{p}wo_b.weight", TensorSpec((d, c.o_groups * c.o_lora_rank), "fp8")
    yield f"{p}q_norm.weight", TensorSpec((q,), "bf16")
    yield f"{p}kv_norm.weight", TensorSpec((c.head_dim,), "bf16")
    yield f"{p}attn_sink", TensorSpec((c.num_heads,), "f32")
    if ratio:
        yield from _compressor(f"{p}compressor.", ratio, c.head_dim, d, overlap=ratio == c.csa_ratio)
    if ratio == c.csa_ratio:
        yield f"{p}indexer.wq_b.weight", TensorSpec((c.index_heads * c.index_head_dim, q), "fp8")
        yield f"{p}indexer.weights_proj.weight", TensorSpec((c.index_heads, d), "bf16")
        yield from _compressor(f"{p}indexer.compressor.", ratio, c.index_head_dim, d, overlap=True)


def _compressor(p: str, ratio: int, dim: int, d: int, *, overlap: bool) -> Iterator[tuple[str, TensorSpec]]:
    width = 2 * dim if overlap else dim
    yield f"{p}wkv.weight", TensorSpec((width, d), "bf16")
    yield f"{p}wgate.weight", TensorSpec((width, d), "bf16")
    yield f"{p}ape", TensorSpec((ratio, width), "f32")
    yield f"{p}norm.weight", TensorSpec((dim,), "bf16")


def _moe(c: ModelConfig, p: str, *, hashed: bool) -> Iterator[tuple[str, TensorSpec]]:
    d, i = c.hidden_size, c.moe_intermediate_size
    yield f"{p}gate.weight", TensorSpec((c.num_experts, d), "bf16")
    if hashed:
        yield f"{p}gate.tid2eid", TensorSpec((c.vocab_size, c.experts_per_token), "i64")
    else:
        yield f"{p}gate.bias", TensorSpec((c.num_experts,), "f32")
    for name, shape in expert_shapes(c):
        for e in range(c.num_experts):
            yield f"{p}experts.{e}.{name}.weight", TensorSpec(shape, "fp4")
        yield f"{p}shared_experts.{name}.weight", TensorSpec(shape, "fp8")


def expert_shapes(c: ModelConfig) -> tuple[tuple[str, tuple[int, int]], ...]:
    """(name, shape) of an expert's gate, up and down projections."""
    d, i = c.hidden_size, c.moe_intermediate_size
    return ("w1", (i, d)), ("w3", (i, d)), ("w2", (d, i))


def _mtp(c: ModelConfig) -> Iterator[tuple[str, TensorSpec]]:
    d = c.hidden_size
    yield from _block(c, "mtp.0.", 0, hashed=False)
    for name in ("e_proj", "h_proj"):
        yield f"mtp.0.{name}.weight", TensorSpec((d, d), "fp8")
    for name in ("enorm", "hnorm", "norm"):
        yield f"mtp.0.{name}.weight", TensorSpec((d,), "bf16")
    yield from _head_mix(c, "mtp.0.")


def _dspark(c: ModelConfig) -> Iterator[tuple[str, TensorSpec]]:
    """Three window-only blocks; the first projects the main model's streams, the last has the heads (spec 7, 9.1)."""
    d, rank = c.hidden_size, c.dspark_rank
    for stage in range(3):
        yield from _block(c, f"mtp.{stage}.", 0, hashed=False)
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


def canonical_name(name: str) -> str:
    """A file's tensor name in the released naming. `save_pretrained` of transformers writes a mix: a `model.` prefix, its
    own names for embedding, head mix and the KV norm, the released ones for the rest."""
    name = name.removeprefix("model.")
    name = name.replace("hc_head.hc_", "hc_head_") if name.startswith("hc_head.") else name
    name = name[: -len("norm.weight")] + "kv_norm.weight" if name.endswith(".attn.norm.weight") else name
    return {"embed_tokens.weight": "embed.weight", "lm_head.weight": "head.weight"}.get(name, name)
