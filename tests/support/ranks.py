"""R processes that run a model together over gloo."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
from dsv4.backends import choose
from dsv4.cache.sharded import ShardedCache
from dsv4.model.config import ModelConfig
from dsv4.model.names import EXPERT_AXIS, tensors
from dsv4.model.parallel import Share
from dsv4.model.rank import Rank
from dsv4.model.ranked import RankedModel, share
from dsv4.ops.weight import Weight, part
from torch import Tensor

from tests.support.driving import Driver

_WAIT = 300
"""Seconds until a silent process fails a test rather than hold it for ever."""


class Deaf(Rank):
    """A rank that hears what it says itself, from every other."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.said, self.direct = rank, ranks, 0, None

    def gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        every = x.expand(self.ranks, *x.shape)
        return every.contiguous() if out is None else out.copy_(every)

    def exchange(self, x: Tensor) -> Tensor:
        return x.contiguous().clone()

    def tell(self, x: Tensor) -> None:
        pass


def run_ranks(ranks: int, work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """work(rank, *args) in each of R processes; what each gave, by rank. `work` is a function of a module. Without a GPU they
    are forked from a process that has done nothing but import this module: to load torch in each takes longer than much of the work."""
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload([__name__])
    answers: Any = context.Queue()
    meet = f"file://{folder}/meet"
    processes = [
        context.Process(target=_process, args=(answers, meet, r, ranks, work, args), daemon=True)
        for r in range(ranks)
    ]
    for p in processes:
        p.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < ranks:
            rank, failed, value = answers.get(timeout=_WAIT)
            assert not failed, f"rank {rank} of {ranks}:\n{value}"
            found[rank] = pickle.loads(value)
    except Empty:
        raise AssertionError(f"only ranks {sorted(found)} of {ranks} answered") from None
    finally:
        for p in processes:
            p.join(5 if len(found) == ranks else 0)
            p.kill()
    return [found[r] for r in range(ranks)]


def _process(
    answers: Any, meet: str, rank: int, ranks: int, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
        # pickled here, as a tensor would be a file descriptor of this process
        answers.put((rank, False, pickle.dumps(work(Rank(), *args))))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, True, traceback.format_exc()))


def cut_weights(config: ModelConfig, weights: dict[str, Weight], to: Share) -> dict[str, Weight]:
    """What the loader gives a rank, of weights in memory."""
    axes = {name: to.cut(name, spec) for name, spec in tensors(config)}
    for layer in range(config.num_layers):
        for name in EXPERT_AXIS:
            stack = f"layers.{layer}.ffn.experts"
            axes[f"{stack}.{name}"] = axes[f"{stack}.0.{name}.weight"]
    return {n: w if axes[n] is None else part(w, *axes[n]) for n, w in weights.items()}


@dataclass
class RankDriver(Driver):
    """A Driver on one rank; all ranks do the same with theirs. `unit`: see `RankedModel`."""

    rank: Rank | None = None
    unit: int = 32

    def _build(self, pages: int) -> None:
        assert self.rank is not None
        r = self.rank
        self.cache = ShardedCache(
            self.config.layout(self.row, self.index, block_tokens=self.block_tokens, ranks=r.ranks),
            pages,
            self.slabs,
            r.rank,
            r.gather,
            self.device,
            poison=self.poison,
        )
        weights = cut_weights(self.config, self.weights, share(r))
        ops = choose(self.backend, self.device)
        self.model = RankedModel(self.config, weights, self.cache, ops, r, unit=self.unit)
