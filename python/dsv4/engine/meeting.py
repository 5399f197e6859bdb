"""Where the ranks of an engine meet: a torch.distributed group without a port, a file on disk or a default group.

Its members find each other in a file that lives in the memory of rank 0's process and ends with it. On the CPU they talk over the
loopback device alone.
"""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import torch.distributed as dist

from dsv4.kernels.device import has_triton
from dsv4.kernels.messages import LIMIT, room
from dsv4.kernels.peer_memory import NoPeerMemory, shared_memory
from dsv4.model.rank import Rank

log = logging.getLogger("dsv4.engine")

NEVER = timedelta(days=7)
"""What a collective may take: ranks that do not go on are found by `Group`, which knows whose fault it is."""


LEAST = 20.0
"""Seconds that ranks have to meet, at least: a busy host may keep one from running for a while."""


class Meeting:
    """The place, on rank 0. `path` is how other processes of the same user find it."""

    def __init__(self) -> None:
        self._file = os.memfd_create("dsv4-ranks")
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"

    def close(self) -> None:
        os.close(self._file)


def meet(path: str, rank: int, ranks: int, device: str, time: int, limit: float) -> dist.ProcessGroup:
    """Waits until all ranks are there, for the `time`-th time; at most `limit` seconds, or LEAST. Raises RuntimeError."""
    store = dist.PrefixStore(f"{time}", dist.FileStore(path, -1))
    store.set_timeout(timedelta(seconds=max(limit, LEAST)))
    if device == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = NEVER
        return dist.ProcessGroupNCCL(store, rank, ranks, options)
    options = dist.ProcessGroupGloo._Options()
    options._timeout = NEVER
    options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
    return dist.ProcessGroupGloo(store, rank, ranks, options)


def member(group: dist.ProcessGroup, device: str) -> Rank:
    """This process as a rank of the group. On GPUs that can write to each other's memory short messages go that way."""
    rank = Rank(group)
    if device == "cuda" and has_triton():
        if os.environ.get("NCCL_P2P_DISABLE", "0") == "1":
            log.info("ranks talk over NCCL alone: NCCL_P2P_DISABLE is set")
            return rank
        from dsv4.kernels.triton.exchange import Exchange

        try:
            addresses = shared_memory(room(rank.ranks), rank.rank, rank.gather)
        except NoPeerMemory as e:
            log.warning("ranks talk over NCCL alone: %s", e)
        else:
            rank.direct = Exchange(rank.rank, addresses, device)
    return rank


def words(rank: Rank, device: str) -> str:
    """What its messages go over."""
    if device != "cuda":
        return "gloo"
    if rank.direct is None:
        return "NCCL"
    return f"NCCL, messages of up to {LIMIT // 2**10} KiB straight into each other's memory"
