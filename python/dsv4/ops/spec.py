"""What each op takes, gives and means. The reference implements it; every backend is compared with the
reference.

Letters in shapes: T tokens of the step, d hidden size, n streams of mHC, h heads, D head dim, r rope dim, H
index heads, I index head dim, B blocks that the step touches, W window, k selected entries or experts, E
experts, m ratio, w pool rows, S sampled tokens, M ratios, K rotary tables. Dtype `model` is the dtype of the model (float32 or
bfloat16); the others are exact. `rows` are stored rows, read and written in place (`tables.RowSource`).
`quantised`: values with their FP8 form (`quantised.py`), which `linear`, `swiglu` and `experts` take for `x` where
they multiply in FP8 (`Ops.quantises`).
`weight` is a matrix as stored and `gated` three of them (`weight.py`), each in the form that the backend asked for.
Tables are described in `tables.py`. Sources name sections of DeepSeek's V4 paper (arXiv 2606.19348) or the
module of the released inference code.
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
    float32 for inputs of unit scale; 0 means equal results, as selections must be. 2e-6 is four steps of float32 at 4, the
    size of what a norm gives; 1e-5 is what a sum in another order costs.

    With FP8 and FP4 weights a backend may quantise activations as the release does: e4m3, one power-of-two scale per
    token and at most 128 channels. Then `tolerance` holds against the reference with activations that lie on that grid
    (and, for hidden values of experts, a reference that quantises them too: tests/kernels), and `QUANTISED` is the
    largest relative error (2-norm) against the reference with the activations as they are."""

    name: str
    args: tuple[Arg, ...]
    result: tuple[Arg, ...]
    tolerance: float
    source: str
    writes: tuple[str, ...] = ()
    """Arguments that the op changes in place (tensors and rows)."""

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.args))}) -> {', '.join(map(str, self.result))}"


QUANTISED = 0.08
"""See OpSpec. e4m3 rounds a value by at most 2^-4 and 2.6% on average; experts do so twice."""


def _args(text: str) -> tuple[Arg, ...]:
    """'x model[T,in]; eps value' as Args."""
    parsed = []
    for part in filter(None, map(str.strip, text.split(";"))):
        name, kind = part.split(" ", 1)
        dtype, _, shape = kind.partition("[")
        parsed.append(Arg(name, shape.rstrip("]"), dtype))
    return tuple(parsed)


def _spec(
    name: str, args: str, result: str, tolerance: float, source: str, writes: str = ""
) -> tuple[str, OpSpec]:
    return name, OpSpec(name, _args(args), _args(result), tolerance, source, tuple(writes.split()))


SPECS: dict[str, OpSpec] = dict(
    (
        _spec("linear", "x model[T,in]; weight weight[out,in]", "y model[T,out]", 1e-5, "y = W x"),
        _spec(
            "linear_f32",
            "x model[T,in]; weight weight[out,in]",
            "y float32[T,out]",
            1e-5,
            "compressors, paper 2.3: the same product in float32",
        ),
        _spec(
            "grouped_linear",
            "x model[T,g,in]; weight weight[g*out,in]",
            "y model[T,g,out]",
            1e-5,
            "grouped output projection, paper 2.3.1",
        ),
        _spec(
            "logits",
            "x model[S,d]; weight weight[V,d]",
            "y float32[S,V]",
            1e-5,
            "ParallelHead, float32 product",
        ),
        _spec(
            "rmsnorm",
            "x model[...,d]; weight float32[d] or None; eps value",
            "y model[...,d]",
            2e-6,
            "RMSNorm",
        ),
        _spec(
            "rmsnorm_quantised",
            "x model[T,d]; weight float32[d] or None; eps value",
            "y quantised[T,d]",
            2e-6,
            "rmsnorm, and its result as e4m3 (`quantised.py`) for the FP8 products that share it",
        ),
        _spec(
            "norm_rope",
            "x model[T,...,D]; weight float32[D] or None; cos float32[T,r/2]; sin float32[T,r/2]; eps value",
            "y model[T,...,D]",
            1e-6,
            "RMSNorm, then apply_rotary_emb: interleaved pairs of the last r channels",
        ),
        _spec(
            "write_rows",
            "x model[T,D]; weight float32[D]; cos float32[T,r/2]; sin float32[T,r/2]; eps value; "
            "rows rows[.,D]; target int64[T]",
            "",
            1e-6,
            "norm_rope of the key-value row, encoded into physical row target[t]",
            writes="rows",
        ),
        _spec(
            "copy_rows",
            "source rows[.,D]; ids int64[N]; rows rows[.,D]; target int64[N]",
            "",
            0.0,
            "row ids[n] of source to row target[n] (below 0: to none), bytes as they are; both of one format",
            writes="rows",
        ),
        _spec(
            "copy_state",
            "pages uint8[P,page]; slabs uint8[S,slab]; state StateTable; jobs value",
            "",
            0.0,
            "snapshots: jobs (SAVE or RESTORE, slab, position, pages ...) and (RESET, slab); no slab and no page is in two of them",
            writes="pages slabs",
        ),
        _spec(
            "decode_tables",
            "token_ids int64[T]; positions int64[T]; slabs int64[T]; pages int32[slabs,blocks]; newest int64[N]; "
            "turns value; ratios value; block_tokens value; window value; ring value; part value; parts value",
            "ids int64[T]; row int64[T]; count int64[T]; slab int32[T]; window_ids int32[T,W]; target int64[T]; "
            "visible int32[M,T]; closed bool[M,T]; entry int64[M,T]; begin int64[M,T]; slot int64[M,T]; "
            "turn float32[K,2,T,r/2]; block_turn float32[M,2,T,r/2]",
            0.0,
            "the tables of a step of one token of each of T requests (`tables.py`), as part `part` of `parts` has them: window rows of "
            "positions and entries of numbers part mod parts; turns: K pairs (cos, sin) float32[positions,r/2], blocks turn by the last",
        ),
        _spec(
            "hc_next",
            "y model[T,d] or None; streams model[T,n,d]; post float32[T,n] or None; comb float32[T,n,n] or None; "
            "fn float32[n(n+2),nd]; scale float32[3]; base float32[n(n+2)]; norm_eps value; hc_eps value; iters value; "
            "weight float32[d]; eps value; quantised value",
            "x model[T,d]; streams model[T,n,d]; post float32[T,n]; comb float32[T,n,n]",
            1e-5,
            "manifold-constrained hyper-connections, paper 2.2, from one sub-layer to the next: the streams after y (hc_post; None: as they "
            "are), what the next takes of them (sigmoid gates; column first Sinkhorn) after its rmsnorm, in FP8 too if quantised",
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
            "hc_head of the release: hc_next without Sinkhorn and norm",
        ),
        _spec(
            "compress",
            "projected float32[T,2*w*D]; ape float32[m,w*D]; state float32[slabs,w,2,D]; tokens TokenTable; "
            "blocks BlockTable; weight float32[D]; cos float32[B,r/2]; sin float32[B,r/2]; eps value; "
            "dtype value; rows rows[.,D]; left float32[N,w,2,D] or None; left_to int64[R] or None",
            "",
            1e-5,
            "paper 2.3.1 (CSA, w = 2) and 2.3.2 (HCA, w = 1): softmax over slots per channel as a left fold of "
            "(value, lse) pairs; complete blocks are rounded to dtype, normed, turned and written to blocks.target; a row whose "
            "tokens.slabs is -1 begins with no state; what row r carries over goes to left[left_to[r]] (-1: nowhere), or without left to its slab",
            writes="state rows left",
        ),
        _spec(
            "index_select",
            "q model[T,H,I]; cos float32[T,r/2]; sin float32[T,r/2]; weights float32[T,H]; keys rows[.,I]; "
            "tokens TokenTable; entries EntryTable; topk value",
            "selected int32[T,k]",
            0.0,
            "lightning indexer, paper 2.3.1: rope and the codec's transform of q, then sum_h w_h relu(q_h . k_e); "
            "top-k, ties by lowest index, ascending, -1 pads; k = min(topk, most visible)",
        ),
        _spec(
            "index_candidates",
            "q model[T,H,I]; cos float32[T,r/2]; sin float32[T,r/2]; weights float32[T,H]; keys rows[.,I]; "
            "tokens TokenTable; entries EntryTable; topk value; into value",
            "selected int32[T,k]; scores float32[T,k]",
            1e-5,
            "index_select and the scores of what it selects, -inf after the last: a rank's own entries; into: None, or contiguous "
            "(selected, scores) that take the result",
        ),
        _spec(
            "merge_candidates",
            "selected int32[P,T,k]; scores float32[P,T,k]; topk value",
            "selected int32[T,topk]",
            0.0,
            "the best of P lists, ascending with -1 after the last, where entry i of list p is entry i P + p of the whole; ties by lowest, ascending, -1 pads",
        ),
        _spec(
            "entries_of_part",
            "selected int32[T,k]; part value; parts value",
            "own int32[T,k]; count int32[T]",
            0.0,
            "of selected entries those with number part mod parts, by their number within the part, in their order, -1 pads; and how many",
        ),
        _spec(
            "sparse_attention",
            "q model[T,h,D]; sink float32[h]; scale value; cos float32[T,r/2]; sin float32[T,r/2]; "
            "tokens TokenTable; window rows[.,D]; window_ids int32[T,W]; "
            "history rows[.,D] or None; entries EntryTable or None; selected int32[T,k] or None",
            "o model[T,h,D]",
            1e-5,
            "one softmax over the window, the visible (or selected) entries and the sink; "
            "keys are the values; the result's last r channels are turned back by the token's position",
        ),
        _spec(
            "partial_attention",
            "q model[T,h,D]; scale value; tokens TokenTable; window rows[.,D]; window_ids int32[T,W]; "
            "history rows[.,D] or None; entries EntryTable or None; selected int32[T,k] or None; count int32[T] or None; into value",
            "o model[T,h,D]; lse float32[T,h]",
            1e-5,
            "sparse_attention over a part of the keys, without the sink and not turned back; lse is the natural logarithm of "
            "the sum of exponentials, -inf (and o 0) where there is no key; count comes with selected, of which a token has that many, "
            "-1 after the last; into: None, or contiguous (o, lse) that take the result",
        ),
        _spec(
            "merge_attention",
            "o model[P,T,h,D]; lse float32[P,T,h]; sink float32[h]; cos float32[T,r/2]; sin float32[T,r/2]",
            "o model[T,h,D]",
            1e-5,
            "parts weighted by exp(lse), with the sink, added in their order and turned back: sparse_attention of all keys",
        ),
        _spec(
            "route",
            "x model[T,d]; gate weight[E,d]; bias float32[E] or None; "
            "chosen int64[T,k] or None; k value; scale value",
            "experts int64[T,k]; weights float32[T,k]",
            1e-5,
            "Gate: sqrt(softplus) of a float32 product, bias for the choice only, or the hash table's choice; "
            "ascending ids, ties by lowest",
        ),
        _spec(
            "experts",
            "x model[T,d]; experts int64[T,k]; weights float32[T,k]; w gated[E,i,d]; limit value; "
            "shared model[T,d] or None",
            "y model[T,d]",
            1e-5,
            "Expert: w2 (weight * silu(min(a, limit)) * clamp(b, limit)), float32 sum over experts and `shared`",
        ),
        _spec(
            "swiglu",
            "x model[T,d]; w gated[i,d]; limit value",
            "y model[T,d]",
            1e-5,
            "the shared expert: the same clamp, weight 1",
        ),
        _spec(
            "edit_logits",
            "logits float32[S,V]; row int64[S]; bias float32[E,V]; marks int32[E,V]; penalties float32[E,3]; "
            "until int64[E]; position int64[S]",
            "y float32[S,V]",
            1e-5,
            "vLLM's logit_bias, repetition, presence and frequency penalty and min_tokens; row s by the tables' row[s]",
        ),
        _spec(
            "mask_logits",
            "logits float32[S,V]; row int64[S]; masks int32[M,V/32]",
            "",
            0.0,
            "-inf for every token whose bit in masks[row[s]] is 0 (token t is bit t % 32 of word t / 32), rows below 0 stay; so do "
            "NaN and +inf, by which a broken row is known",
            writes="logits",
        ),
        _spec(
            "sample",
            "logits float32[S,V]; knobs float64[S,4]; seed int64[S]; position int64[S]; filtered value",
            "token int64[S]",
            0.0,
            "knobs: temperature, top_k, top_p, min_p; the order of filters is vLLM's; a draw depends on seed and position alone; -2 where a logit is not finite",
        ),
    )
)
