"""What a graph is to hold, with the Triton kernels in the interpreter: nothing is read back and nothing comes from the host."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("dsv4._core")
pytest.importorskip("triton")

from dsv4.backends import choose
from dsv4.cache.paged import PagedCache
from dsv4.cache.sharded import ShardedCache
from dsv4.engine.graphs import DecodeGraphs, Step
from dsv4.engine.ranked import RankGraphs
from dsv4.kernels.triton.common import INTERPRETED
from dsv4.model.config import ModelConfig
from dsv4.model.export import export_release
from dsv4.model.ranked import RankedModel, share
from dsv4.model.v4 import V4Model
from dsv4.model.weights import load_weights
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

import tests.support.interpreter  # noqa: F401  (an old one is mended)
from tests.support.models import random_config_dict, random_weights
from tests.support.ranks import Deaf

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled here")

READ_BACK = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave", "equal")
"""Torch ops that wait for the device, or whose result has a size that it decides."""


class NoHost(TorchDispatchMode):
    """Raises where a CUDA graph could not be captured. Not looked at: the interpreter's own doings inside a kernel."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0].lstrip("_")
        assert not name.startswith(READ_BACK + tuple(n.lstrip("_") for n in READ_BACK)), f"{func} waits"
        assert name != "lift_fresh", "a tensor made of host values"
        if name in ("index", "index_put"):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), "a boolean index"
        return func(*args, **(kwargs or {}))


def test_the_mode_sees_what_a_capture_refuses() -> None:
    x = torch.arange(4)
    for refused in (lambda: int(x[0]), lambda: x[x > 1], lambda: torch.tensor([1, 2]), lambda: x.nonzero()):
        with NoHost(), pytest.raises(AssertionError):
            refused()


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_is_read_back(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of layer, routing by table and by scores, FP8 and FP4 weights, more entries than the index keeps; on one GPU, and as one of
    two ranks."""
    raw = random_config_dict(compress_ratios=[0, 4, 128], index_topk=32, index_n_heads=2)
    config = ModelConfig.from_dict(raw)
    export_release(random_weights(config, 3), config, raw, tmp_path)
    layout = config.layout("float32", "float32", block_tokens=128 * ranks, ranks=ranks)
    ops = choose("triton", "cuda", major=9)  # on the CPU, interpreted
    load = partial(load_weights, tmp_path, config, torch.float32, packed=True)
    cache: PagedCache
    if ranks == 1:
        cache = PagedCache(layout, 4, 4, poison=True)
        model = V4Model(config, load(), cache, ops)
    else:
        rank = Deaf(1, ranks)
        cache = ShardedCache(layout, 4, 4, rank.rank, rank.gather, poison=True)
        model = RankedModel(config, load(share=share(rank)), cache, ops, rank)
    assert model.uncaptured() == []
    launch = InterpretedFunction.run

    def unwatched(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return launch(*args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", unwatched)
    cache.reset([0, 1, 2])
    cache.slabs[:3] = 0
    cache.pages[:] = 0
    watched = []

    def capture(run: Step, before: bool) -> Step:
        assert before, "the first of its kind runs before it is captured"

        def again() -> None:
            with NoHost():
                watched.append(run())

        run()  # as before a capture: what outlives a step is allocated
        return again

    graphs = (DecodeGraphs if ranks == 1 else RankGraphs)(
        model,
        torch.arange(4, dtype=torch.int32)[:, None].repeat(1, 2),
        torch.zeros(4, dtype=torch.int64),
        None,
        capture,
    )
    hidden = graphs.hidden(np.array([3, 4, 5]), np.array([3, 130, 127]), np.array([0, 1, 2]))
    if isinstance(graphs, RankGraphs):
        assert graphs.head(3).isfinite().all()
    assert len(watched) == ranks and hidden.shape == (3, 4, 128) and hidden.isfinite().all()
