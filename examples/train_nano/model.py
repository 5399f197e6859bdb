"""The whole model with its MTP block, its initial values, and its weights under the released names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dsv4.model.config import ModelConfig
from dsv4.model.rope import frequencies
from dsv4.model.weights import load_weights
from layers import Block, Params, Rope, collapse, linear, rms
from torch import Tensor, nn


class Draft(nn.Module):
    """MTP as in the preview release: streams at t and token t + 1 give token t + 2. It learns from the trunk and
    does not change it."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        block = Block(config, 0, hashed=False)
        for name, child in block.named_children():
            setattr(self, name, child)
        self.rounds = block.rounds
        for name, value in block.named_parameters(recurse=False):
            setattr(self, name, value)
        self.e_proj, self.h_proj = Params(weight=(hidden, hidden)), Params(weight=(hidden, hidden))
        self.enorm, self.hnorm, self.norm = (Params(weight=(hidden,)) for _ in range(3))
        self.hc_head_fn = nn.Parameter(torch.zeros(4, 4 * hidden))
        self.hc_head_base, self.hc_head_scale = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))

    def enter(self, streams: Tensor, embedded: Tensor) -> Tensor:
        """Streams [B, T, 4, d] and the next tokens' embeddings [B, T, d] -> the block's streams."""
        e = linear(rms(embedded, self.enorm.weight), self.e_proj.weight)
        return e[:, :, None] + linear(rms(streams, self.hnorm.weight), self.h_proj.weight)

    def leave(self, streams: Tensor) -> Tensor:
        """[B, T, 4, d] -> what the shared head reads, [B, T, d]."""
        return rms(
            collapse(streams, self.hc_head_fn, self.hc_head_base, self.hc_head_scale), self.norm.weight
        )

    _pre, block = Block._pre, Block.forward


class Nano(nn.Module):
    """Parameters are float32 masters' copies; activations have `dtype`."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        self.config, self.dtype, self.topk = config, dtype, config["index_topk"]
        self.embed, self.head = Params(weight=(vocab, hidden)), Params(weight=(vocab, hidden))
        self.norm = Params(weight=(hidden,))
        self.hc_head_fn = nn.Parameter(torch.zeros(4, 4 * hidden))
        self.hc_head_base, self.hc_head_scale = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))
        ratios = config["compress_ratios"][: config["num_hidden_layers"]]
        self.layers = nn.ModuleList(
            Block(config, ratio, i < config["num_hash_layers"]) for i, ratio in enumerate(ratios)
        )
        self.mtp = nn.ModuleList([Draft(config)])
        self.shape = ModelConfig.from_dict(config)
        self._tables: dict[tuple[int, Any], Rope] = {}

    def ropes(self, tokens: int, device: Any, gaps: Tensor | None = None) -> tuple[Rope, Rope]:
        """Tables of window-only and of compressing layers; `gaps` int64 [T] is added to the latter's positions."""
        config = self.shape
        most = tokens if gaps is None else config.max_position
        out = []
        for theta, yarn in ((config.rope_theta, None), (config.compress_rope_theta, config.yarn)):
            key = (theta, most, str(device))
            if key not in self._tables:
                angle = torch.arange(most, dtype=torch.float32)[:, None] * frequencies(64, theta, yarn)
                self._tables[key] = (angle.cos().to(device), angle.sin().to(device))
            cos, sin = self._tables[key]
            at = torch.arange(tokens, device=device) + (0 if gaps is None or yarn is None else gaps)
            out.append((cos[at], sin[at]))
        return out[0], out[1]

    def streams(
        self, ids: Tensor, *, dense: Tensor | None = None, topk: int | None = None, gaps: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(streams [B, T, 4, d] after the last layer, the indexers' loss, experts' loads). T: a multiple of 128."""
        ropes = self.ropes(ids.shape[1], ids.device, gaps)
        dense = torch.zeros((), dtype=torch.bool, device=ids.device) if dense is None else dense
        x = F.embedding(ids, self.embed.weight).to(self.dtype)[:, :, None].repeat(1, 1, 4, 1)
        loss, loads = torch.zeros((), device=ids.device), []
        for layer in self.layers:
            x, more, load = layer(x, ids, ropes[bool(layer.attn.ratio)], dense, topk or self.topk)
            loss = loss + more
            loads.append(load)
        return x, loss, loads

    def out(self, streams: Tensor) -> Tensor:
        """What the head reads, [B, T, d]."""
        return rms(
            collapse(streams, self.hc_head_fn, self.hc_head_base, self.hc_head_scale), self.norm.weight
        )

    def hidden(self, ids: Tensor, topk: int | None = None) -> tuple[Tensor, Tensor]:
        """(what the head reads [B, T, d], streams) for any T."""
        tokens = ids.shape[1]
        streams = self.streams(F.pad(ids, (0, -tokens % 128), value=2), topk=topk)[0][:, :tokens]
        return self.out(streams), streams

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [..., V]."""
        return linear(hidden, self.head.weight).float()

    def draft(self, streams: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """(what the head reads for the token after `following` int64 [B, T], experts' load). T: a multiple of
        128."""
        mtp = self.mtp[0]
        tokens, device = following.shape[1], following.device
        embedded = F.embedding(following, self.embed.weight.detach()).to(self.dtype)
        entered = mtp.enter(streams.detach(), embedded)
        never = torch.zeros((), dtype=torch.bool, device=device)
        x, _, load = mtp.block(entered, following, self.ropes(tokens, device)[0], never, self.topk)
        return mtp.leave(x), load

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers under the released names, experts stacked."""
        return {n: p.detach() for n, p in (*self.named_parameters(), *self.named_buffers())}


@torch.no_grad()
def read(model: Nano, path: Path) -> None:
    """Values of an exported model, as they are stored."""
    stored = load_weights(path, ModelConfig.from_dir(path), torch.float32, draft=True)
    for name, value in model.weights().items():
        value.copy_(stored[name])


@torch.no_grad()
def initialise(model: Nano, seed: int) -> None:
    """Hyper-connections near the identity. CSA rows start with a group of channels for each slot, so that the
    order of the tokens in a row is not lost: without it whole copies fail one time in five."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.fill_(1)
        elif name.endswith("_scale"):
            p.fill_(0.1)
        elif name.endswith("_fn"):
            p.normal_(0, p.shape[1] ** -0.5)
        elif name.endswith("_base"):
            p.zero_()
        elif name == "embed.weight":
            p.normal_(0, 1)
        elif p.ndim >= 2 and not name.endswith(".ape"):
            small = 0.2 if "wo_b" in name or ".w2" in name else 0.3 if name == "head.weight" else 1.0
            p.normal_(0, small * p.shape[-1] ** -0.5)
    for i, block in enumerate((*model.layers, *model.mtp)):
        for base in (block.hc_attn_base, block.hc_ffn_base):
            base[:4] = -2.0
            base[i % 4] = 2.0
            base[8:] = 3 * torch.eye(4).flatten().to(base)
        if block.attn.ratio == 4:
            block.attn.compressor.ape.copy_(_slots(block.attn.compressor.width))
        if block.ffn.hashed:
            table = block.ffn.gate.tid2eid
            order = torch.rand(len(table), block.ffn.count).argsort(-1)
            table.copy_(order[:, : block.ffn.k])


def _slots(width: int, bias: float = 3.0) -> Tensor:
    """ape [4, 2 * width]: of every 16 channels 12 lean to a slot of the own block (hi), 4 to one before (lo)."""
    channel = torch.arange(width)
    own = channel % 16 < 12
    slot = torch.arange(4)[:, None]
    lean = (channel % 4 == slot).float() * bias
    return torch.cat([lean * ~own, lean * own], dim=1)
