"""A dry run of the small model's kinds of steps with the kernels for Hopper, on a machine without a GPU: `python -m tests.kernels.dry_run`.
Prints how many kernels the start finds, and, a line each, those that random steps need beyond them."""

from __future__ import annotations

# ruff: noqa: E402
import random
from importlib import resources
from pathlib import Path

import torch
from dsv4.kernels import device as machine

machine.capability = lambda index=0: (9, 0)  # type: ignore[assignment]
machine.multiprocessors = lambda index=0: 132  # type: ignore[assignment]

from dsv4.backends import REGISTRY
from dsv4.cache.paged import PagedCache
from dsv4.engine import warmup
from dsv4.engine.device import LocalDevice
from dsv4.kernels.compiling import COMPILATIONS, Specialisation
from dsv4.model.batch import Row
from dsv4.model.config import ModelConfig
from dsv4.model.v4 import V4Model
from dsv4.model.weights import load_weights
from dsv4.ops.forms import Machine
from dsv4.ops.registry import Ops
from dsv4.ops.spec import SPECS
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

SLABS, TOKENS, CONTEXT = 3, 12, 768


class Hopper:
    """As much of a driver as compiling asks for."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))


def device() -> LocalDevice:
    hopper = Machine("cuda", 9)
    chains = {op: REGISTRY.chain(op, "gluon,triton", hopper) for op in SPECS}
    without = {op: tuple(f for f in forms if f.backend != "cublas") for op, forms in chains.items()}
    ops, source = Ops(without, hopper), Path(str(resources.files("dsv4") / "data" / "nano"))
    config = ModelConfig.from_dir(source)
    layout = config.layout("fp8_ds_mla", "mxfp4", block_tokens=256)
    pages = SLABS * CONTEXT // 256 + 2 * layout.snapshot_pages
    cache = PagedCache(layout, pages, SLABS, copy_state=ops.copy_state)
    model = V4Model(config, load_weights(source, config, torch.bfloat16, packed=True), cache, ops)
    model.layers = list(warmup._kinds(model.layers))
    return LocalDevice(
        model, cache, slabs=SLABS, max_blocks=CONTEXT // 256, replay_tokens=layout.replay_tokens,
        step_tokens=TOKENS, capture=lambda run: run,
    )  # fmt: skip


def names(found: list[Specialisation]) -> set[tuple[str, str, str]]:
    return {(f.module, f.kernel, repr(f.key)) for f in found}


@torch.inference_mode()
def random_steps(local: LocalDevice, count: int) -> None:
    """Prompts, resumed and replayed, alone and beside decodes."""
    draw = random.Random(3)
    for _ in range(count):
        length, others = draw.randint(1, TOKENS - 2), draw.randint(0, 2)
        start = draw.choice([0, draw.randint(1, CONTEXT - length)])
        end = start + length if start and draw.random() < 0.5 else 0
        rows = [Row(2, start, length, 0, reset=not start, replay_end=end, replay_start=start if end else 0)]
        rows += [Row(slab, draw.randint(0, CONTEXT - 1), 1, length + slab) for slab in range(others)]
        warmup._eager(local, rows)


def main() -> None:
    driver.set_active(Hopper())
    with COMPILATIONS.dry() as first:
        local = device()
        warmup.rehearse(local, TOKENS, CONTEXT)
    with COMPILATIONS.dry() as later:
        random_steps(local, 12)
    print(len(names(first)), "kernels are found")
    for name in sorted(names(later) - names(first)):
        print("not found:", *name)


if __name__ == "__main__":
    main()
