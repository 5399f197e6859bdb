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
from dsv4.kernels.messages import room
from dsv4.kernels.peer_memory import shared_memory
from dsv4.kernels.triton import exchange
from dsv4.model.rank import Rank
from torch import Tensor

COUNT, REPLAYS = 200, 9
SIZES = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""KiB of a rank's message."""


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


def measure(rank: Rank, ours: exchange.Exchange, kind: str, kib: int) -> dict[str, Any]:
    """One row: ours and NCCL's time of a collective, and whether ours is right."""
    ranks = rank.ranks
    words = 256 * kib
    inputs = [message(r, words) for r in range(ranks)]
    x = inputs[rank.rank]
    found: list[Tensor] = []
    if kind == "all_reduce":
        theirs = x.clone()
        run, other = ours.sum, lambda: dist.all_reduce(theirs)
        expected = inputs[0].float()
        for more in inputs[1:]:
            expected += more.float()
        expected = expected.bfloat16()
    elif kind == "all_gather":
        theirs = x.new_empty((ranks, len(x)))
        run, other = ours.gather, lambda: dist.all_gather_into_tensor(theirs, x)
        expected = torch.stack(inputs)
    else:
        x, theirs = x.view(ranks, -1), torch.empty_like(x)
        run, other = ours.exchange, lambda: dist.all_to_all_single(theirs, x)
        expected = torch.stack([i.view(ranks, -1)[rank.rank] for i in inputs])
    us = timed(lambda: found.__setitem__(slice(None), [run(x)]))
    right = torch.equal(found[0].view(torch.int16), expected.view(torch.int16))
    if kind == "all_reduce":
        right = right and same_everywhere(found[0])
    return {"kind": kind, "KiB": kib, "us": us, "nccl_us": timed(other), "right": right}


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
    rows, here = [], Rank()
    memory = shared_memory(room(here.ranks), rank, here.gather)
    ours = exchange.Exchange(rank, memory, torch.device("cuda", rank))
    for kind in ("all_reduce", "all_gather", "all_to_all"):
        for kib in (8, 64) if args.quick else SIZES:
            rows.append(measure(here, ours, kind, kib))
            if rank == 0:
                words = (f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items())
                print(*words, flush=True)
    if rank == 0 and args.out:
        device = torch.cuda.get_device_name()
        args.out.write_text(json.dumps({"device": device, "ranks": args.ranks, "rows": rows}, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
