"""The layers of DeepSeek-V4 for training: whole rows at once, differentiable, and fit for torch.compile.

The formulas are those of `dsv4.ops.reference`, which the engine runs; tests/examples/test_train_nano.py compares the
two. Parameters have the released names.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sinkhorn import sinkhorn
from torch import Tensor, nn

EPS = 1e-6
MASKED = -1e30
Rope = tuple[Tensor, Tensor]
"""(cos, sin), float32 [T, 32]."""


class Params(nn.Module):
    """A bag of parameters: `Params(weight=(out, in))`."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))


def rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)
    return (y if weight is None else y * weight.float()).to(x.dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


def rotate(x: Tensor, rope: Rope, inverse: bool = False) -> Tensor:
    """Turns the last 64 channels in pairs; the tables broadcast to [..., 32]."""
    cos, sin = rope
    sin = -sin if inverse else sin
    turned = x[..., -64:].float()
    a, b = turned[..., 0::2], turned[..., 1::2]
    pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([x[..., :-64], pairs.to(x.dtype)], -1)


class Compressor(nn.Module):
    """[B, T, d] -> one row per `ratio` tokens; with overlap (CSA) a row pools the block before as well."""

    def __init__(self, hidden: int, ratio: int, width: int) -> None:
        super().__init__()
        self.ratio, self.width = ratio, width
        wide = width * (2 if ratio == 4 else 1)
        self.wkv, self.wgate = Params(weight=(wide, hidden)), Params(weight=(wide, hidden))
        self.norm, self.ape = Params(weight=(width,)), nn.Parameter(torch.zeros(ratio, wide))

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        batch, tokens, _ = x.shape
        blocks = tokens // self.ratio
        kv = linear(x, self.wkv.weight).view(batch, blocks, self.ratio, -1).float()
        score = linear(x, self.wgate.weight).view(batch, blocks, self.ratio, -1).float() + self.ape.float()
        if self.ratio == 4:
            kv = torch.cat([self._before(kv, 0.0), kv[..., self.width :]], 2)
            score = torch.cat([self._before(score, MASKED), score[..., self.width :]], 2)
        pooled = rms((score.softmax(2) * kv).sum(2).to(x.dtype), self.norm.weight)
        return rotate(pooled, (rope[0][: tokens : self.ratio], rope[1][: tokens : self.ratio]))

    def _before(self, x: Tensor, empty: float) -> Tensor:
        """The lo halves of the block before."""
        return F.pad(x[:, :-1, :, : self.width], (0, 0, 0, 0, 1, 0), value=empty)


class Indexer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.heads, hidden = config["index_n_heads"], config["hidden_size"]
        self.wq_b = Params(weight=(self.heads * 128, config["q_lora_rank"]))
        self.weights_proj, self.compressor = Params(weight=(self.heads, hidden)), Compressor(hidden, 4, 128)

    def forward(self, x: Tensor, qr: Tensor, rope: Rope) -> Tensor:
        """Scores float32 [B, T, E] of all entries."""
        batch, tokens, _ = x.shape
        q = linear(qr, self.wq_b.weight).view(batch, tokens, self.heads, 128)
        q = rotate(q, (rope[0][:tokens, None], rope[1][:tokens, None]))
        keys = self.compressor(x, rope)
        weights = linear(x, self.weights_proj.weight).float() * (128 * self.heads) ** -0.5
        dots = torch.matmul(q.flatten(1, 2), keys.transpose(1, 2)).view(batch, tokens, self.heads, -1)
        return (dots.relu().float() * weights[..., None]).sum(2)


class Attention(nn.Module):
    """Window and compressed past in one softmax with a sink. T must be a multiple of 128."""

    def __init__(self, config: dict[str, Any], ratio: int) -> None:
        super().__init__()
        hidden, heads, low = config["hidden_size"], config["num_attention_heads"], config["q_lora_rank"]
        self.ratio, self.heads, self.groups = ratio, heads, config["o_groups"]
        self.window = config["sliding_window"]
        rank = config["o_lora_rank"]
        self.wq_a, self.q_norm, self.wq_b = (
            Params(weight=s) for s in ((low, hidden), (low,), (heads * 512, low))
        )
        self.wkv, self.kv_norm = Params(weight=(512, hidden)), Params(weight=(512,))
        self.attn_sink = nn.Parameter(torch.zeros(heads))
        self.wo_a = Params(weight=(self.groups * rank, heads * 512 // self.groups))
        self.wo_b = Params(weight=(hidden, self.groups * rank))
        if ratio:
            self.compressor = Compressor(hidden, ratio, 512)
        if ratio == 4:
            self.indexer = Indexer(config)

    def forward(self, x: Tensor, rope: Rope, dense: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        """(output [B, T, d], the indexer's loss). `dense` bool []: attend to every entry whatever `topk`."""
        batch, tokens, _ = x.shape
        rope_q = (rope[0][:tokens, None], rope[1][:tokens, None])
        qr = rms(linear(x, self.wq_a.weight), self.q_norm.weight)
        q = rms(linear(qr, self.wq_b.weight).view(batch, tokens, self.heads, 512))
        q = rotate(q, rope_q) * 512**-0.5
        kv = rotate(
            rms(linear(x, self.wkv.weight), self.kv_norm.weight), (rope[0][:tokens], rope[1][:tokens])
        )
        near, band = self._window(q, kv)
        sink = self.attn_sink.float()
        top = torch.maximum(near.amax(-1), sink).detach()
        loss = x.new_zeros((), dtype=torch.float32)
        if self.ratio:
            rows = self.compressor(x, rope)
            far, visible = self._entries(q, rows)
            top = torch.maximum(top, far.amax(-1).detach())
            far = torch.exp(far - top[..., None])
        near = torch.exp(near - top[..., None])
        total = near.sum(-1) + torch.exp(sink - top)
        if self.ratio == 4:
            scores = torch.where(visible[None], self.indexer(x.detach(), qr.detach(), rope), MASKED)
            mass = far.detach() / (total + far.sum(-1)).detach()[..., None]
            loss = _indexer_loss(scores, mass.mean(2))
            if topk < far.shape[-1]:
                best = scores.detach().topk(topk, dim=-1, sorted=False).indices
                chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(2, best, True) | dense
                far = far * chosen[:, :, None]
        o = self._weigh(near, band, x.dtype)
        if self.ratio:
            total = total + far.sum(-1)
            o = o + torch.matmul(far.to(x.dtype).flatten(1, 2), rows).view_as(o)
        o = rotate((o.float() / total[..., None]).to(x.dtype), rope_q, inverse=True)
        o = o.view(batch, tokens, self.groups, -1)
        wo_a = self.wo_a.weight.to(x.dtype).view(self.groups, -1, o.shape[-1])
        u = torch.einsum("btgi,gri->btgr", o, wo_a).flatten(2)
        return linear(u, self.wo_b.weight), loss

    def _window(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Logits float32 [B, T, h, 2W] over each chunk of W tokens and the one before, and those rows."""
        batch, tokens, heads, _ = q.shape
        w, n = self.window, tokens // self.window
        chunks = kv.view(batch, n, w, 512)
        band = torch.cat([F.pad(chunks[:, :-1], (0, 0, 0, 0, 1, 0)), chunks], 2).flatten(0, 1)
        logits = torch.matmul(q.reshape(batch * n, w * heads, 512), band.transpose(1, 2))
        logits = logits.view(batch, n, w, heads, 2 * w).float()
        i, j = torch.arange(w, device=q.device)[:, None], torch.arange(2 * w, device=q.device)[None]
        first = torch.arange(n, device=q.device)[:, None, None] == 0
        seen = ((j - i >= 1) & (j - i <= w))[None] & (~first | (j >= w)[None])
        return torch.where(seen[None, :, :, None], logits, MASKED).view(batch, tokens, heads, 2 * w), band

    def _entries(self, q: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits float32 [B, T, h, E] over the compressed rows, and which a token sees, bool [T, E]."""
        batch, tokens, heads, _ = q.shape
        logits = torch.matmul(q.reshape(batch, tokens * heads, 512), rows.transpose(1, 2)).float()
        at = (torch.arange(tokens, device=q.device) + 1) // self.ratio
        visible = torch.arange(rows.shape[1], device=q.device)[None] < at[:, None]
        logits = logits.view(batch, tokens, heads, -1)
        return torch.where(visible[None, :, None], logits, MASKED), visible

    def _weigh(self, near: Tensor, band: Tensor, dtype: torch.dtype) -> Tensor:
        batch, tokens, heads, wide = near.shape
        weights = near.to(dtype).view(len(band), self.window * heads, wide)
        return torch.matmul(weights, band).view(batch, tokens, heads, 512)


def _indexer_loss(scores: Tensor, mass: Tensor) -> Tensor:
    """Cross-entropy of the scores' softmax against the attention's mass on each entry, less the mass's own
    entropy. The mass is not normalised: tokens that look at their window alone weigh little."""
    cross = -(mass * scores.log_softmax(-1).clamp(min=-1e4)).sum(-1).mean()
    share = mass / (mass.sum(-1, keepdim=True) + 1e-9)
    return cross + (mass * (share + 1e-9).log()).sum(-1).mean()


class MoE(nn.Module):
    """At this size every expert runs on every token, and those not chosen weigh 0."""

    def __init__(self, config: dict[str, Any], hashed: bool) -> None:
        super().__init__()
        hidden, inner, experts = (
            config[k] for k in ("hidden_size", "moe_intermediate_size", "n_routed_experts")
        )
        self.k, self.scale = config["num_experts_per_tok"], config["routed_scaling_factor"]
        self.limit, self.hashed, self.count = config["swiglu_limit"], hashed, experts
        self.gate = Params(weight=(experts, hidden))
        if hashed:
            self.gate.register_buffer("tid2eid", torch.zeros(config["vocab_size"], self.k, dtype=torch.long))
        else:
            self.gate.register_buffer("bias", torch.zeros(experts))
        self.experts = Params(
            w1=(experts, inner, hidden), w3=(experts, inner, hidden), w2=(experts, hidden, inner)
        )
        self.shared_experts = nn.ModuleDict(
            {
                n: Params(weight=s)
                for n, s in (("w1", (inner, hidden)), ("w3", (inner, hidden)), ("w2", (hidden, inner)))
            }
        )

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(output, share of tokens per expert float32 [E])."""
        e, s = self.experts, self.shared_experts
        scores = F.softplus(F.linear(x.float(), self.gate.weight.float())).sqrt()
        if self.hashed:
            chosen = self.gate.tid2eid[ids]
        else:
            chosen = (scores.detach() + self.gate.bias).topk(self.k, dim=-1).indices
        hot = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        weights = scores * hot
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale
        y = self._gated(linear(x, e.w1.flatten(0, 1)), linear(x, e.w3.flatten(0, 1)))
        y = y.unflatten(-1, (self.count, -1)) * weights[..., None].to(x.dtype)
        y = linear(y.flatten(-2), e.w2.permute(1, 0, 2).flatten(1))
        shared = self._gated(linear(x, s["w1"].weight), linear(x, s["w3"].weight))
        return y + linear(shared, s["w2"].weight), hot.mean((0, 1)).detach()

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


def collapse(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> Tensor:
    """Four streams as one, for a head."""
    v = streams.flatten(2)
    mix = F.linear(v, fn.to(v.dtype)).float() * torch.rsqrt(v.float().square().mean(-1, keepdim=True) + EPS)
    weights = torch.sigmoid(mix * scale + base) + EPS
    return (weights[..., None] * streams.float()).sum(2).to(streams.dtype)


class Block(nn.Module):
    """Attention and experts, each between its hyper-connections. Streams are [B, T, 4, d]."""

    def __init__(self, config: dict[str, Any], ratio: int, hashed: bool) -> None:
        super().__init__()
        hidden, self.rounds = config["hidden_size"], config["hc_sinkhorn_iters"]
        self.attn, self.ffn = Attention(config, ratio), MoE(config, hashed)
        self.attn_norm, self.ffn_norm = Params(weight=(hidden,)), Params(weight=(hidden,))
        for part in ("attn", "ffn"):
            for name, shape in (("fn", (24, 4 * hidden)), ("base", (24,)), ("scale", (3,))):
                setattr(self, f"hc_{part}_{name}", nn.Parameter(torch.zeros(shape)))

    def forward(
        self, streams: Tensor, ids: Tensor, rope: Rope, dense: Tensor, topk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(streams, the indexer's loss, experts' load)."""
        y, post, comb = self._pre(streams, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale)
        y, loss = self.attn(rms(y, self.attn_norm.weight), rope, dense, topk)
        streams = _post(y, streams, post, comb)
        y, post, comb = self._pre(streams, self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale)
        y, load = self.ffn(rms(y, self.ffn_norm.weight), ids)
        return _post(y, streams, post, comb), loss, load

    def _pre(self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v = streams.flatten(2)
        mix = F.linear(v, fn.to(v.dtype)).float() * torch.rsqrt(
            v.float().square().mean(-1, keepdim=True) + EPS
        )
        pre = torch.sigmoid(mix[..., :4] * scale[0] + base[:4]) + EPS
        post = 2 * torch.sigmoid(mix[..., 4:8] * scale[1] + base[4:8])
        comb = sinkhorn((mix[..., 8:] * scale[2] + base[8:]).unflatten(-1, (4, 4)), self.rounds)
        return (pre[..., None] * streams.float()).sum(2).to(streams.dtype), post, comb


def _post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    wide = streams.float()
    mixed = sum(comb[:, :, i, :, None] * wide[:, :, i, None] for i in range(4))
    return (post[..., None] * y.float()[:, :, None] + mixed).to(y.dtype)
