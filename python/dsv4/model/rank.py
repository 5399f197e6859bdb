"""One of R ranks that run a model together, and what they say to each other.

Sums are in the order of ranks and in float32, rounded once, so every rank gets the same bits and a part of a model sums as the
whole of it does. Messages travel as bytes: any dtype, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


class PeerLost(RuntimeError):
    """A collective failed: another rank has left the group, or is gone."""


class Rank:
    """Rank `rank` of `ranks` of a torch.distributed group (gloo on the CPU; None: the default one). Collectives are called by all
    ranks alike, and raise PeerLost."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group: dist.ProcessGroup | None = dist.group.WORLD if group is None else group
        assert self._group is not None, "there is a default group"
        self.rank, self.ranks = self._group.rank(), self._group.size()
        self.said = 0
        """Collectives begun so far."""

    def leave(self) -> None:
        """Leaves the group, which fails what other ranks wait for in it."""
        self._group = None

    def join(self, group: dist.ProcessGroup) -> None:
        """Goes on in another group, of as many ranks."""
        self._group = group

    def gather(self, x: Tensor) -> Tensor:
        """What every rank has: [...] -> [R, ...]. Shapes and dtypes are the same on all."""
        out = torch.empty((self.ranks, *x.shape), dtype=x.dtype, device=x.device)
        if x.numel():
            with self._saying():
                self._in().allgather([list(_bytes(out).unbind())], [_bytes(x[None])[0]]).wait()
        return out

    def exchange(self, x: Tensor) -> Tensor:
        """x[p] goes to rank p: [R, ...] -> [R, ...], what each rank has for this one."""
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if x.numel():
            with self._saying():
                self._in().alltoall_base(_bytes(out), _bytes(x), [], []).wait()
        return out

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, on all of them."""
        return ordered(self.gather(x))

    def tell(self, x: Tensor) -> None:
        """Rank 0's x, contiguous and not empty, becomes that of all ranks."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        with self._saying():
            self._in().broadcast([x], options).wait()

    def _in(self) -> dist.ProcessGroup:
        # In no frame but this: the traceback of an error would keep a group that is to be left.
        if self._group is None:
            raise RuntimeError("this rank has left its group")
        return self._group

    @contextlib.contextmanager
    def _saying(self) -> Iterator[None]:
        self.said += 1
        try:
            yield
        except RuntimeError as e:
            raise PeerLost(str(e).partition("\n")[0]) from e


def ordered(parts: Tensor) -> Tensor:
    """The sum of [R, ...] over R, first to last, in float32; in the dtype of the parts."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts.dtype)


def _bytes(x: Tensor) -> Tensor:
    """uint8 [R, n] of [R, ...], a view where x is contiguous."""
    return x.contiguous().view(len(x), -1).view(torch.uint8)
