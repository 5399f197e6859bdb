"""Float32 masters of the weights, their optimizer, and the rounding to what the release stores.

After each step the model gets its masters' values as the files will hold them (FP8, FP4 or BF16), and the gradients go
straight to the masters: what is exported is the network that was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from dsv4.formats import E4M3_MAX, FP4_MAX, fp4_decode, fp4_encode, pow2_ceil
from dsv4.model.names import FP4_BLOCK, FP8_BLOCK, tensors
from model import Nano
from torch import Tensor, nn

_TINY = 1e-10


def storages(model: Nano) -> dict[str, str]:
    """fp8, fp4, bf16 or f32 for each parameter."""
    kinds = {name: spec.storage for name, spec in tensors(model.shape, draft=True)}
    return {name: "fp4" if ".experts.w" in name else kinds[name] for name, _ in model.named_parameters()}


def rounded(x: Tensor, storage: str) -> Tensor:
    """Values as stored: float32 [..., out, in] on the format's grid, in the blocks of `dsv4.model.export`."""
    if storage == "fp8":
        blocks = x.unflatten(-2, (-1, FP8_BLOCK)).unflatten(-1, (-1, FP8_BLOCK))
        scale = pow2_ceil(blocks.abs().amax((-3, -1), keepdim=True).clamp(min=_TINY) / E4M3_MAX)
        codes = (blocks / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return (codes.float() * scale).reshape(x.shape)
    if storage == "fp4":
        blocks = x.unflatten(-1, (-1, FP4_BLOCK))
        scale = pow2_ceil(blocks.abs().amax(-1, keepdim=True).clamp(min=_TINY) / FP4_MAX)
        return (fp4_decode(fp4_encode(blocks / scale)) * scale).reshape(x.shape)
    return x.bfloat16().float() if storage == "bf16" else x


def orthogonal(g: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrix, over a batch (Muon)."""
    x = g.bfloat16() if g.is_cuda else g.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


@dataclass(slots=True)
class _Group:
    """Matrices of one shape and storage, stacked."""

    parameters: list[nn.Parameter]
    storage: str
    master: Tensor
    momentum: Tensor


class Masters:
    """Muon for the matrices of layers, AdamW for the rest."""

    def __init__(self, model: Nano, muon_rate: float, adam_rate: float) -> None:
        self.muon_rate, self.adam_rate = muon_rate, adam_rate
        kinds, groups = storages(model), {}
        self.plain: list[tuple[nn.Parameter, str, nn.Parameter]] = []
        for name, p in model.named_parameters():
            kind = kinds[name]
            if kind in ("fp8", "fp4") or name.endswith(("compressor.wkv.weight", "compressor.wgate.weight")):
                groups.setdefault((kind, tuple(p.shape)), []).append(p)
            else:
                self.plain.append((p, kind, nn.Parameter(p.detach().float().clone())))
            if kind != "f32":
                p.data = p.data.to(model.dtype)
        self.groups = [
            _Group(ps, kind, m := torch.stack([p.detach().float() for p in ps]), torch.zeros_like(m))
            for (kind, _), ps in groups.items()
        ]
        own = [q for _, _, q in self.plain]
        self.adam = torch.optim.AdamW(
            [
                {"params": [q for q in own if q.ndim >= 2], "weight_decay": 0.01},
                {"params": [q for q in own if q.ndim < 2], "weight_decay": 0.0},
            ],
            lr=adam_rate,
            betas=(0.9, 0.95),
            fused=own[0].is_cuda,
        )
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """The model's parameters become the rounded masters."""
        for g in self.groups:
            torch._foreach_copy_([p.data for p in g.parameters], list(rounded(g.master, g.storage).unbind(0)))
        for p, kind, master in self.plain:
            p.data.copy_(rounded(master, kind))

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update with the gradients at hand; `factor` scales both learning rates."""
        for g in self.groups:
            grad = torch.stack([p.grad for p in g.parameters]).float()
            g.momentum.lerp_(grad, 0.05)
            update = orthogonal(grad.lerp(g.momentum, 0.95))
            rate = self.muon_rate * factor
            g.master.mul_(1 - rate * 0.02)
            g.master.sub_(update, alpha=rate * max(1, update.shape[-2] / update.shape[-1]) ** 0.5)
        for p, _, master in self.plain:
            master.grad = p.grad.float()
        grads = [master.grad for _, _, master in self.plain]
        torch._foreach_clamp_min_(grads, -1.0)
        torch._foreach_clamp_max_(grads, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate * factor
        self.adam.step()
        self.write()

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "groups": [(g.master, g.momentum) for g in self.groups],
            "plain": [master.detach() for _, _, master in self.plain],
            "adam": self.adam.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        for g, (master, momentum) in zip(self.groups, state["groups"], strict=True):
            g.master.copy_(master)
            g.momentum.copy_(momentum)
        for (_, _, master), saved in zip(self.plain, state["plain"], strict=True):
            master.copy_(saved)
        self.adam.load_state_dict(state["adam"])
        self.write()
