"""Small collectives between the GPUs of one host, back to back in one CUDA graph: ours (`dsv4.kernels.triton.exchange`) beside NCCL.

    python3 -m benches.gpu.collectives [--ranks 2] [--out FILE]

One process a GPU. Every result is compared with the sum, list or exchange made from the seeds, on all ranks; ours also with
itself on the other ranks, to the bit. A time is that of a graph of COUNT collectives over COUNT, the median of several replays, on the
slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from dsv4.kernels.triton import exchange
from dsv4.kernels.triton.common import cdiv
from torch import Tensor

COUNT, REPLAYS = 200, 9
SIZES = (1, 4, 8, 16, 32, 64, 128, 256)
"""KiB of a rank's message."""

Run = Callable[[Tensor, Tensor], None]


class Exchange:
    """Memory that all ranks can write to, for messages up to `capacity` 32-bit words."""

    def __init__(self, capacity: int, block: int) -> None:
        self.rank, self.ranks, self.block, self.capacity = (
            dist.get_rank(),
            dist.get_world_size(),
            block,
            capacity,
        )
        memory = symmetric.empty(2 * self.ranks * capacity, dtype=torch.int64, device="cuda")
        memory.zero_()
        handle = symmetric.rendezvous(memory, dist.group.WORLD)
        self._memory = memory
        self._buffers = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device="cuda")
        self._epochs = torch.zeros(cdiv(capacity, block), dtype=torch.int32, device="cuda")
        self.failed = torch.zeros(1, dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()
        dist.barrier()

    def run(self, kernel: Any, x: Tensor, out: Tensor, n: int, **flags: bool) -> None:
        kernel[(cdiv(n, self.block),)](
            x.view(torch.int32), out.view(torch.int32), self._buffers, self._epochs, self.failed, n, self.capacity,
            RANK=self.rank, RANKS=self.ranks, BLOCK=self.block, SPINS=exchange.SPINS, num_warps=self.block // 128, **flags,
        )  # fmt: skip


def timed(run: Callable[[], None]) -> float:
    """Microseconds of one collective on the slowest rank."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(COUNT):
            run()
    times = []
    for _ in range(REPLAYS):
        dist.barrier()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / COUNT)
    slowest = torch.tensor(median(times), device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def message(rank: int, words: int) -> Tensor:
    """bf16 [2 * words] of a rank."""
    g = torch.Generator(device="cuda").manual_seed(100 * words + rank)
    return torch.randn(2 * words, generator=g, device="cuda").bfloat16()


def same_everywhere(x: Tensor) -> bool:
    """Whether all ranks hold the same bits."""
    bits = x.view(torch.int32).long()
    low, high = bits.clone(), bits.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return bool((low == high).all())


def measure(kind: str, kib: int, block: int) -> dict[str, Any]:
    """One row: ours and NCCL's time of a collective, and whether ours is right."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    words = 256 * kib
    inputs = [message(r, words) for r in range(ranks)]
    x, per = inputs[rank], words // ranks
    if kind == "all_reduce":
        kernel, flags, n, out, theirs = exchange.all_reduce_kernel, {}, words, torch.empty_like(x), x.clone()
        expected = torch.zeros(2 * words, device="cuda")
        for other in inputs:
            expected += other.float()
        expected = expected.bfloat16()
        nccl = lambda: dist.all_reduce(theirs)  # noqa: E731
    elif kind == "all_gather":
        kernel, flags, n, out = (
            exchange.gather_kernel,
            {"SPREAD": False},
            words,
            x.new_empty(ranks * 2 * words),
        )
        expected, theirs = torch.cat(inputs), torch.empty_like(out)
        nccl = lambda: dist.all_gather_into_tensor(theirs, x)  # noqa: E731
    else:
        kernel, flags, n, out = exchange.gather_kernel, {"SPREAD": True}, per, torch.empty_like(x)
        expected = torch.cat([i.view(ranks, -1)[rank] for i in inputs])
        theirs = torch.empty_like(out)
        nccl = lambda: dist.all_to_all_single(theirs, x)  # noqa: E731
    ours = Exchange(words, block)
    us = timed(lambda: ours.run(kernel, x, out, n, **flags))
    right = torch.equal(out.view(torch.int16), expected.view(torch.int16)) and int(ours.failed) == 0
    if kind == "all_reduce":
        right = right and same_everywhere(out)
    return {"kind": kind, "KiB": kib, "block": block, "us": us, "nccl_us": timed(nccl), "right": right}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.multiprocessing.spawn(worker, (args,), nprocs=args.ranks)


def worker(rank: int, args: argparse.Namespace) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=args.ranks, device_id=torch.device("cuda", rank))
    rows = []
    for kind in ("all_reduce", "all_gather", "all_to_all"):
        for kib in (8, 64) if args.quick else SIZES:
            for block in (512,) if args.quick else (256, 512, 1024):
                rows.append(measure(kind, kib, block))
                if rank == 0:
                    print(
                        " ".join(
                            f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}"
                            for k, v in rows[-1].items()
                        )
                    )
    if rank == 0 and args.out:
        device = torch.cuda.get_device_name()
        args.out.write_text(json.dumps({"device": device, "ranks": args.ranks, "rows": rows}, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
