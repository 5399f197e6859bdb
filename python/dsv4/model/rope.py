"""Rotary tables: plain for layers with a window alone, YaRN-scaled for layers that compress."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4.model.config import ModelConfig

Rope = tuple[Tensor, Tensor]
"""(cos, sin), float32 [N, rope_dim / 2] each."""

_GROW = 4096
"""Positions by which a table grows."""
_PIECE = 1 << 16
"""Positions that are made at once: enough work for every thread of the host. A million take one thread seconds."""


def frequencies(dim: int, theta: float, yarn: object | None) -> Tensor:
    """float32 [dim / 2] radians per position. YaRN changes frequencies only: no factor on cos and sin, none
    on the softmax scale, and it applies at every position, not only beyond the original context."""
    f = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if yarn is None:
        return f

    def turns(n: float) -> float:  # the pair index whose wavelength fits n times into the original context
        return dim * math.log(yarn.original_max_position / (2 * math.pi * n)) / (2 * math.log(theta))

    low, high = max(math.floor(turns(yarn.beta_fast)), 0), min(math.ceil(turns(yarn.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return f / yarn.factor * ramp + f * (1 - ramp)


class RopeTable:
    """cos and sin by position, float32; angles are float32 products as in the release, and made on the CPU, so
    an entry has the same bits whenever and wherever it is made."""

    def __init__(self, freq: Tensor, device: torch.device | str) -> None:
        self._freq = freq
        self._cos = self._sin = torch.empty((0, len(freq)), device=device)

    @classmethod
    def for_ratio(cls, config: ModelConfig, ratio: int, device: torch.device | str) -> RopeTable:
        """The table that all parts of a layer with this compression ratio (0: none) use."""
        if ratio == 0:
            return cls(frequencies(config.rope_dim, config.rope_theta, None), device)
        return cls(frequencies(config.rope_dim, config.compress_rope_theta, config.yarn), device)

    def below(self, end: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) of all positions below `end` at least, float32 [N, rope_dim / 2] each."""
        self.grow(end)
        return self._cos, self._sin

    def at(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """(cos, sin), float32 [N, rope_dim / 2] each, for int64 [N] positions, all below `end`."""
        cos, sin = self.below(end)
        return cos[positions], sin[positions]

    def grow(self, end: int) -> None:
        """Makes the entries below `end`; where some are missing, all move."""
        held, end = len(self._cos), -(-end // _GROW) * _GROW
        if end <= held:
            return
        cos, sin = (torch.empty((end, len(self._freq)), device=self._cos.device) for _ in range(2))
        cos[:held], sin[:held] = self._cos, self._sin
        for at in range(held, end, _PIECE):
            to = min(at + _PIECE, end)
            angle = torch.arange(at, to, dtype=torch.float32)[:, None] * self._freq
            cos[at:to], sin[at:to] = angle.cos(), angle.sin()
        self._cos, self._sin = cos, sin
