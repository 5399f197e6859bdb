"""One of R ranks that run a model together, and what they say to each other.

Sums are in the order of ranks and in float32, rounded once, so every rank gets the same bits and a part of a model sums as the
whole of it does. Messages travel as bytes: any dtype, bit for bit.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Rank:
    """Rank `rank` of `ranks` of a torch.distributed group (gloo on the CPU; None: the default one)."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, x: Tensor) -> Tensor:
        """What every rank has: [...] -> [R, ...]. Shapes and dtypes are the same on all."""
        out = torch.empty((self.ranks, *x.shape), dtype=x.dtype, device=x.device)
        if x.numel():
            dist.all_gather(list(_bytes(out).unbind()), _bytes(x[None])[0], group=self._group)
        return out

    def exchange(self, x: Tensor) -> Tensor:
        """x[p] goes to rank p: [R, ...] -> [R, ...], what each rank has for this one."""
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if x.numel():
            dist.all_to_all_single(_bytes(out), _bytes(x), group=self._group)
        return out

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, on all of them."""
        return ordered(self.gather(x))


def ordered(parts: Tensor) -> Tensor:
    """The sum of [R, ...] over R, first to last, in float32; in the dtype of the parts."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts.dtype)


def _bytes(x: Tensor) -> Tensor:
    """uint8 [R, n] of [R, ...], a view where x is contiguous."""
    return x.contiguous().view(len(x), -1).view(torch.uint8)
