"""A dry run of the small model's kinds of steps with the kernels for Hopper, on a machine without a GPU: `python -m tests.kernels.dry_run
[RANKS [deterministic]]`, of the last of so many ranks. Prints how many kernels the start finds, and, a line each, those that random steps need beyond them."""

from __future__ import annotations

# ruff: noqa: E402
import random
import sys
import tempfile
from dataclasses import replace
from importlib import resources
from pathlib import Path

import torch
from dsv4.kernels import device as machine

machine.capability = lambda index=0: (9, 0)  # type: ignore[assignment]
machine.multiprocessors = lambda index=0: 132  # type: ignore[assignment]

from dsv4.backends import REGISTRY
from dsv4.cache.paged import PagedCache
from dsv4.cache.sharded import ShardedCache
from dsv4.engine import warmup
from dsv4.engine.device import LocalDevice
from dsv4.engine.ranked import RankDevice
from dsv4.kernels.compiling import COMPILATIONS, Specialisation, _loaded
from dsv4.kernels.known import Known
from dsv4.model.batch import Row
from dsv4.model.config import ModelConfig
from dsv4.model.parallel import UNIT
from dsv4.model.ranked import RankedModel, share
from dsv4.model.v4 import V4Model
from dsv4.model.weights import load_weights
from dsv4.ops.forms import Machine
from dsv4.ops.registry import Ops
from dsv4.ops.spec import SPECS
from dsv4.plan import graphs as sizes
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.support.ranks import Deaf

SLABS = 3


class Hopper:
    """As much of a driver as compiling asks for."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))


def device(ranks: int, tokens: int, context: int, *, deterministic: bool) -> LocalDevice:
    hopper = Machine("cuda", 9)
    chains = {op: REGISTRY.chain(op, "gluon,triton", hopper, deterministic=deterministic) for op in SPECS}
    without = {op: tuple(f for f in forms if f.backend != "cublas") for op, forms in chains.items()}
    ops, source = Ops(without, hopper), Path(str(resources.files("dsv4") / "data" / "nano"))
    config = ModelConfig.from_dir(source)
    layout = config.layout("fp8_ds_mla", "mxfp4", ranks=ranks)
    pages = SLABS * context // layout.block_tokens + 2 * layout.snapshot_pages
    cache: PagedCache
    if ranks == 1:
        cache = PagedCache(layout, pages, SLABS, copy_state=ops.copy_state)
        model = V4Model(config, load_weights(source, config, torch.bfloat16, packed=True), cache, ops)
    else:
        rank = Deaf(ranks - 1, ranks)
        cache = ShardedCache(layout, pages, SLABS, rank.rank, rank.gather, copy_state=ops.copy_state)
        weights = load_weights(source, config, torch.bfloat16, packed=True, share=share(rank))
        model = RankedModel(config, weights, cache, ops, rank)
    model.layers = list(warmup._kinds(model.layers))
    make = LocalDevice if ranks == 1 else RankDevice
    return make(
        model, cache, slabs=SLABS, max_blocks=context // layout.block_tokens, replay_tokens=layout.replay_tokens,
        step_tokens=tokens, capture=lambda run, before: run,
    )  # fmt: skip


def names(found: list[Specialisation]) -> set[tuple[str, str, str]]:
    return {(f.module, f.kernel, repr(f.key)) for f in found}


@torch.inference_mode()
def random_steps(local: LocalDevice, count: int, tokens: int, context: int) -> None:
    """Prompts, resumed and replayed, alone and beside decodes, and decodes alone, on short contexts and long ones."""
    draw = random.Random(3)
    shape = (local.model.config.hc_mult, local.model.config.hidden_size)
    for rows in (5, 40, 90, 256):  # of a prompt whose log-probabilities are asked for
        local.model.logits(torch.zeros((rows, *shape), dtype=torch.bfloat16))
    for _ in range(count):
        within = draw.choice([8, 64, context])
        length = draw.randint(1, min(tokens - 2, within - 1))
        start = draw.choice([0, draw.randint(1, within - length)])
        end = start + length if start and draw.random() < 0.5 else 0
        prompt = Row(2, start, length, 0, reset=not start, replay_end=end, replay_start=start if end else 0)
        decodes = [Row(slab, draw.randrange(within), 1, slab) for slab in range(draw.randint(1, 2))]
        warmup._eager(local, [prompt])
        warmup._eager(local, decodes)
        warmup._eager(local, [prompt, *(replace(row, offset=length + row.offset) for row in decodes)])


@torch.inference_mode()
def many_prompts(local: LocalDevice, longest: int, context: int) -> None:
    """Steps of several prompts, longer than one prompt can be, or than one that several ranks share whole, and of many short ones."""
    for most in {context, min(context, local.rank_of[1] * UNIT), 102}:
        for tokens in (n for n in (most + 1, longest - 7, longest) if most < n <= longest):
            starts = range(0, tokens, most - 1)
            warmup._eager(
                local, [Row(i % SLABS, 0, min(most - 1, tokens - at), at) for i, at in enumerate(starts)]
            )


@torch.inference_mode()
def rests(local: LocalDevice, tokens: int, context: int) -> None:
    """Last pieces of prompts that no graph holds, as their log-probabilities are asked for: some tokens after histories of every length."""
    for n in (2, 92, 130):
        for end in range(n + 7, context, 61):
            if n <= tokens:
                warmup._eager(local, [Row(2, end - n, n, 0)])


@torch.inference_mode()
def captured_steps(local: LocalDevice) -> None:
    """Every step with prompts that a start captures."""
    assert local.extends is not None, "steps are captured"
    for capture in local.extends.captures(None):
        capture()()


def main() -> None:
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    tokens = 12 if ranks == 1 else 4 * ranks * UNIT  # so that prompts are cut over the ranks
    longest = 4096 if ranks == 1 else tokens
    context = 768 if ranks == 1 else 8 * ranks * UNIT
    sizes.SHORTEST = 256  # so that there are several contexts
    driver.set_active(Hopper())
    with COMPILATIONS.dry() as first:
        local = device(ranks, tokens, context, deterministic=sys.argv[2:] == ["deterministic"])
        warmup.rehearse(local, longest, context)
    with tempfile.TemporaryDirectory() as folder:
        Known("these steps", Path(folder)).keep(COMPILATIONS.needed)
        kept = Known("these steps", Path(folder)).recall()
        assert kept is not None and [spec.digest() for spec, _ in kept] == [spec.digest() for spec in first]
        assert [call for _, call in kept] == [call for _, call in COMPILATIONS.needed]
        assert Known("others", Path(folder)).recall() is None
    for function in _loaded():  # as of a process that has compiled for an engine before
        function.device_caches[0][0].update({spec.key: object() for spec in first})
    with COMPILATIONS.dry() as again:
        warmup.rehearse(local, longest, context)
    print(len(names(first)), "kernels are found")
    print(len(names(first) - names(again)), "of them are not found a second time")
    with COMPILATIONS.dry() as later:
        random_steps(local, 12, tokens, context)
        many_prompts(local, longest, context)
        rests(local, tokens, context)
        captured_steps(local)
    for name in sorted(names(later) - names(first)):
        print("not found:", *name)


if __name__ == "__main__":
    main()
