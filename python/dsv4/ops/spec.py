"""What each op takes, gives and means. The reference implements it; every backend is compared with the
reference.

Letters in shapes: T tokens of the step, d hidden size, n streams of mHC, h heads, D head dim, r rope dim, H
index heads, I index head dim, B blocks that the step touches, K key columns, k selected entries or experts, E
experts, S sampled tokens. Dtype `model` is the dtype of the model (float32 or bfloat16); the others are
exact. Tables are described in `tables.py`. Sources name sections of DeepSeek's V4 paper (arXiv 2606.19348) or
the module of the released inference code.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arg:
    """One argument or result: a tensor with a shape in letters, or a plain value (empty shape, dtype
    `value`)."""

    name: str
    shape: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{self.shape}]" if self.shape else f"{self.name}: {self.dtype}"


@dataclass(frozen=True, slots=True)
class OpSpec:
    """The contract of one op. `tolerance` is the largest absolute error of a backend against the reference in
    float32 for inputs of unit scale; 0 means equal results, as selections must be."""

    name: str
    args: tuple[Arg, ...]
    result: tuple[Arg, ...]
    tolerance: float
    source: str

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.args))}) -> {', '.join(map(str, self.result))}"


def _args(text: str) -> tuple[Arg, ...]:
    """'x model[T,in]; eps value' as Args."""
    parsed = []
    for part in filter(None, map(str.strip, text.split(";"))):
        name, kind = part.split(" ", 1)
        dtype, _, shape = kind.partition("[")
        parsed.append(Arg(name, shape.rstrip("]"), dtype))
    return tuple(parsed)


def _spec(name: str, args: str, result: str, tolerance: float, source: str) -> tuple[str, OpSpec]:
    return name, OpSpec(name, _args(args), _args(result), tolerance, source)


SPECS: dict[str, OpSpec] = dict(
    (
        _spec("linear", "x model[T,in]; weight model[out,in]", "y model[T,out]", 1e-5, "y = W x"),
        _spec(
            "grouped_linear",
            "x model[T,g,in]; weight model[g,out,in]",
            "y model[T,g,out]",
            1e-5,
            "grouped output projection, paper 2.3.1",
        ),
        _spec(
            "logits",
            "x model[S,d]; weight float32[V,d]",
            "y float32[S,V]",
            1e-5,
            "ParallelHead, float32 product",
        ),
        _spec(
            "rmsnorm",
            "x model[...,d]; weight float32[d] or None; eps value",
            "y model[...,d]",
            1e-6,
            "RMSNorm",
        ),
        _spec(
            "rope",
            "x model[T,...,D]; cos float32[T,r/2]; sin float32[T,r/2]; inverse value",
            "y model[T,...,D]",
            1e-6,
            "apply_rotary_emb: interleaved pairs of the last r channels; inverse rotates by -t",
        ),
        _spec(
            "hc_pre",
            "streams model[T,n,d]; fn float32[n(n+2),nd]; scale float32[3]; base float32[n(n+2)]; "
            "norm_eps value; hc_eps value; iters value",
            "y model[T,d]; post float32[T,n]; comb float32[T,n,n]",
            1e-5,
            "manifold-constrained hyper-connections, paper 2.2; column first Sinkhorn",
        ),
        _spec(
            "hc_post",
            "y model[T,d]; streams model[T,n,d]; post float32[T,n]; comb float32[T,n,n]",
            "streams model[T,n,d]",
            1e-6,
            "X'[j] = post_j y + sum_i comb[i][j] X[i]",
        ),
        _spec(
            "hc_head",
            "streams model[T,n,d]; fn float32[n,nd]; scale float32[1]; base float32[n]; "
            "norm_eps value; hc_eps value",
            "y model[T,d]",
            1e-5,
            "hc_head of the release: hc_pre without Sinkhorn",
        ),
        _spec(
            "pool_fold",
            "value float32[B,D]; lse float32[B,D]; kv float32[T,D]; score float32[T,D]; "
            "first int64[B]; count int64[B]",
            "value float32[B,D]; lse float32[B,D]",
            1e-5,
            "softmax over slots per channel, paper 2.3.1 and 2.3.2, as a left fold of (value, lse) pairs",
        ),
        _spec(
            "compress_finish",
            "pooled model[B,D]; weight float32[D]; cos float32[B,r/2]; sin float32[B,r/2]; eps value",
            "rows float32[B,D]",
            1e-6,
            "norm, then rope at the first position of the block",
        ),
        _spec(
            "index_select",
            "q float32[T,H,I]; weights float32[T,H]; keys rows[.,I]; tiles TileTable; "
            "entries EntryTable; topk value",
            "selected int64[T,k]",
            0.0,
            "lightning indexer, paper 2.3.1: sum_h w_h relu(q_h . k_e); "
            "top-k, ties by lowest index, ascending, -1 pads",
        ),
        _spec(
            "sparse_attention",
            "q model[T,h,D]; sink float32[h]; scale value; "
            "tiles TileTable; window_rows float32[.,D]; window KeyTable; "
            "history rows[.,D] or None; entries EntryTable or None; selected int64[T,k] or None",
            "o float32[T,h,D]",
            1e-5,
            "one softmax over the window, the visible (or selected) entries and the sink; "
            "keys are the values",
        ),
        _spec(
            "route",
            "x float32[T,d]; gate float32[E,d]; bias float32[E] or None; "
            "chosen int64[T,k] or None; k value; scale value",
            "experts int64[T,k]; weights float32[T,k]",
            1e-5,
            "Gate: sqrt(softplus), bias for the choice only, or the hash table's choice; "
            "ascending ids, ties by lowest",
        ),
        _spec(
            "experts",
            "x model[T,d]; experts int64[T,k]; weights float32[T,k]; w1 model[E,i,d]; "
            "w3 model[E,i,d]; w2 model[E,d,i]; limit value",
            "y float32[T,d]",
            1e-5,
            "Expert: w2 (weight * silu(min(a, limit)) * clamp(b, limit)), float32 sum over experts",
        ),
        _spec(
            "swiglu",
            "x model[T,d]; w1 model[i,d]; w3 model[i,d]; w2 model[d,i]; limit value",
            "y model[T,d]",
            1e-5,
            "the shared expert: the same clamp, weight 1",
        ),
    )
)
