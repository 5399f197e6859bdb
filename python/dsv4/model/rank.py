"""One of R ranks that run a model together, and what they say to each other.

Sums are in the order of ranks and in float32, rounded once, so every rank gets the same bits and a part of a model sums as the
whole of it does. Messages travel as bytes: any dtype, bit for bit.

On GPUs a collective runs in the current stream, allocates nothing but its result and can be captured in a CUDA graph. A message that is
short goes by `direct`, which writes it into the peers' memory, if there is that; this depends on its size alone, so all ranks choose alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions, BroadcastOptions

Options = TypeVar("Options", AllgatherOptions, AllToAllOptions, BroadcastOptions)


class PeerLost(RuntimeError):
    """A collective failed: another rank has left the group, or is gone."""


class Direct(Protocol):
    """Collectives for short messages, such as `dsv4.kernels.triton.exchange.Exchange`."""

    def takes(self, size: int) -> bool:
        """Whether a message of `size` bytes to each of the others goes this way."""

    def gather(self, x: Tensor, out: Tensor | None = None) -> Tensor: ...
    def exchange(self, x: Tensor) -> Tensor: ...
    def heads(self, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]: ...
    def sum(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Of bfloat16."""

    def stop(self) -> None:
        """Ends what waits."""


class Rank:
    """Rank `rank` of `ranks` of a torch.distributed group (gloo on the CPU; None: the default one). Collectives are called by all
    ranks alike, and raise PeerLost."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group: dist.ProcessGroup | None = dist.group.WORLD if group is None else group
        assert self._group is not None, "there is a default group"
        self.rank, self.ranks = self._group.rank(), self._group.size()
        self.direct: Direct | None = None
        self.said = 0
        """Collectives begun so far."""

    def leave(self) -> None:
        """Leaves the group, which fails what other ranks wait for in it. One of NCCL it does not leave: nothing would fail there, and NCCL
        waits for the end of all graphs that hold its collectives."""
        if not self._by_nccl():
            self._group = None

    def let_go(self) -> None:
        """Ends what waits on the GPU for a short message of a rank that is lost, whatever comes of it. On any thread."""
        if self.direct is not None:
            self.direct.stop()

    def end(self) -> None:
        """Ends the group for this rank, which holds no graph of it any more."""
        self.let_go()
        if self._by_nccl():
            self._in().abort()
        self._group = None

    def _by_nccl(self) -> bool:
        return dist.is_nccl_available() and isinstance(self._group, dist.ProcessGroupNCCL)

    def join(self, group: dist.ProcessGroup) -> None:
        """Goes on in another group, of as many ranks."""
        self._group = group

    def gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """What every rank has: [...] -> [R, ...], in `out`, contiguous, if it is given. Shapes and dtypes are the same on all."""
        if (direct := self._direct(x.nbytes)) is not None:
            return direct.gather(x, out)
        if out is None:
            out = torch.empty((self.ranks, *x.shape), dtype=x.dtype, device=x.device)
        if x.numel():
            options = _in_stream(AllgatherOptions())
            with self._saying():
                _over(self._in()._allgather_base(_bytes(out).view(-1), _bytes(x[None])[0], options))
        return out

    def exchange(self, x: Tensor) -> Tensor:
        """x[p] goes to rank p: [R, ...] -> [R, ...], what each rank has for this one."""
        if (direct := self._direct(x.nbytes // self.ranks)) is not None:
            return direct.exchange(x)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if x.numel():
            options = _in_stream(AllToAllOptions())
            with self._saying():
                _over(self._in().alltoall_base(_bytes(out), _bytes(x), [], [], options))
        return out

    def heads(self, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Parts of attention o [T, h, D] with lse float32 [T, h], contiguous; an equal run of the heads goes to each rank: [R, T, h / R, D] and
        [R, T, h / R], what each rank has for this one."""
        if (direct := self._direct((o.nbytes + lse.nbytes) // self.ranks)) is not None:
            return direct.heads(o, lse)
        found = (self.exchange(x.unflatten(1, (self.ranks, -1)).transpose(0, 1)) for x in (o, lse))
        return next(found), next(found)

    def sum(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The sum of every rank's x, on all of them; in `out`, contiguous, if it is given."""
        if x.dtype == torch.bfloat16 and (direct := self._direct(x.nbytes)) is not None:
            return direct.sum(x, out)
        return ordered(self.gather(x), out)

    def tell(self, x: Tensor) -> None:
        """Rank 0's x, contiguous and not empty, becomes that of all ranks."""
        if (direct := self._direct(x.nbytes)) is not None:
            x.copy_(direct.gather(x)[0])
            return
        options = _in_stream(BroadcastOptions())
        options.rootRank, options.rootTensor = 0, 0
        with self._saying():
            _over(self._in().broadcast([x], options))

    def _direct(self, size: int) -> Direct | None:
        """What takes a message of `size` bytes to each of the others, if not the group."""
        if self.direct is None or not self.direct.takes(size):
            return None
        self.said += 1
        return self.direct

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


def _in_stream(options: Options) -> Options:
    """Has NCCL run in the current stream: one of its own would keep messages from being used again within a captured graph."""
    options.asyncOp = False
    return options


def _over(work: dist.Work | None) -> None:
    """Waits for it; what NCCL does in the current stream may be nothing to wait for."""
    try:
        if work is not None:
            work.wait()
    finally:
        del work  # which the traceback of an error would keep, and the group with it


def ordered(parts: Tensor | Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """The sum of R parts [...], first to last, in float32, rounded once to the dtype of the parts; in `out` if it is given."""
    first, *rest = parts
    if len(rest) == 1:  # torch adds two numbers in float32
        return torch.add(first, rest[0], out=out)
    total = first.float()
    for part in rest:
        total = total + part
    return total.to(first.dtype) if out is None else out.copy_(total)


def _bytes(x: Tensor) -> Tensor:
    """uint8 [R, n] of [R, ...], a view where x is contiguous."""
    return x.contiguous().view(len(x), -1).view(torch.uint8)
