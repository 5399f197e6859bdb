"""Everything that a request can need is compiled and captured before the first one: a dry run of every kind of step finds the
kernels, or an earlier start has (`dsv4.kernels.known`), processes compile them beside each other, they are loaded (`dsv4.kernels.compiling`),
and graphs are captured.

A dry run takes one layer of each kind, as layers of a kind launch the same kernels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from dsv4.engine.sampler import KINDS, judge
from dsv4.kernels.device import has_triton
from dsv4.model.batch import Batch, Row
from dsv4.model.parallel import UNIT
from dsv4.plan.workspace import LOGIT_ROWS
from dsv4.sampling import SamplingParams

if TYPE_CHECKING:
    from dsv4.engine.device import LocalDevice
    from dsv4.engine.progress import Progress
    from dsv4.kernels.compiling import Specialisation
    from dsv4.kernels.known import Known
    from dsv4.model.v4 import Layer

log = logging.getLogger("dsv4.engine")


def compile_kernels(device: LocalDevice, step_tokens: int, max_len: int, progress: Progress) -> None:
    """Leaves nothing to compile for steps of up to `step_tokens` tokens and requests of up to `max_len`. For a device that holds
    no request: it writes pages and state, and what is in them afterwards means nothing."""
    if not has_triton():
        return
    from dsv4.kernels.compiling import COMPILATIONS, cache_dir, compile_all
    from dsv4.kernels.known import Known

    begun = time.perf_counter()
    known = Known(_said(device, step_tokens, max_len), cache_dir() / "dsv4")
    found, how = _found_before(device, known), "as an earlier start found"
    if not (again := bool(found)):
        with COMPILATIONS.dry() as found:
            rehearse(device, step_tokens, max_len)
        device.forget()
        how = "as a dry run found"
    collected = time.perf_counter()
    log.info("%d kernels are needed, %s in %.1f s (list %s)", len(found), how, collected - begun, known.name)
    compiled = 0
    if not again:
        compiled = compile_all(found, lambda done, total, what: progress(done, total, what, "kernels"))
    loading, needed = time.perf_counter(), COMPILATIONS.needed
    COMPILATIONS.load()
    log.info(
        "compiled %d kernels in %.1f s, loaded %d in %.1f s",
        compiled, loading - collected, len(found), time.perf_counter() - loading,
    )  # fmt: skip
    if not again:
        known.keep(needed)


def _found_before(device: LocalDevice, known: Known) -> list[Specialisation]:
    """What an earlier start needed, if all of it lies compiled in the cache; nothing unless every rank knows, as in a dry run ranks talk."""
    from dsv4.kernels.compiling import COMPILATIONS, compiled_already

    needed = known.recall() or []
    found = [spec for spec, _ in needed]
    if not device.all_agree(bool(found) and compiled_already(found)):
        return []
    COMPILATIONS.needed = needed
    return found


def _said(device: LocalDevice, step_tokens: int, max_len: int) -> str:
    """All that decides which kernels a device's steps need, beside code and machine; not the model's name, which is that of its folder. Of the
    number of pages, which may differ a little from start to start, only how far offsets may reach: no kernel is told it."""
    model, cache, graphs, extends = device.model, device.cache, device.graphs, device.extends
    layout = [(c.name, c.format, c.rows, c.row_bytes) for c in cache.layout.components]
    sizes: tuple[object, ...] = () if graphs is None else (graphs.sizes, graphs.contexts)
    sizes += () if extends is None else (extends.shapes,)
    return repr(
        (
            type(device).__name__, device.rank_of, replace(model.config, name=""), model.embed.dtype, model.ops.describe(), layout,
            _held(model.layers), len(cache.pages).bit_length(), cache.slabs.shape, device.page_table.shape, sizes,
            step_tokens, max_len,
        )
    )  # fmt: skip


def _held(layers: Sequence[Layer]) -> list[tuple[str, ...]]:
    """How each kind of layer holds its weights, which a config does not say."""
    parts = [
        x for layer in _kinds(layers) for x in (layer.attn, layer.attn.indexer, layer.moe) if x is not None
    ]
    return [
        (name, type(value).__name__, str(getattr(value, "dtype", "")), str(getattr(value, "absorb", "")))
        for part in parts
        for name, value in vars(part).items()
    ]


def capture_graphs(device: LocalDevice, capture_context: int | None, progress: Progress) -> None:
    """Captures the steps of contexts up to `capture_context` tokens (None: all), and every draw. For a device that holds no request."""
    if device.graphs is None or device.extends is None:
        return
    captures = [*device.extends.captures(capture_context), *device.graphs.captures(capture_context)]
    begun, free = time.perf_counter(), _free(device)
    for done, capture in enumerate(captures):
        capture()()  # what brings it to the device, some 10 ms for 3,500 kernels, a first request would wait for
        progress(done + 1, len(captures), "capturing", "graphs")
    if captures:
        log.info(
            "captured %d graphs in %.1f s; they took %.1f MiB",
            device.graphs.held, time.perf_counter() - begun, (free - _free(device)) / 2**20,
        )  # fmt: skip


def _free(device: LocalDevice) -> int:
    """Bytes of the GPU that are neither used nor kept by torch for later."""
    if device.kind != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def nothing_is_left(device: LocalDevice) -> None:
    """What is compiled or captured from now on keeps requests waiting."""
    if device.graphs is not None:
        device.graphs.ready = True
    if has_triton():
        from dsv4.kernels.compiling import COMPILATIONS

        COMPILATIONS.all_ready()


@torch.inference_mode()
def rehearse(device: LocalDevice, step_tokens: int, max_len: int) -> None:
    """Every kind of step once."""
    model, slab = device.model, len(device.page_table) - 1
    layers = model.layers
    model.layers = list(_kinds(layers))
    try:
        if device.graphs is not None:
            device.graphs.rehearse()
        if device.extends is not None:
            device.extends.rehearse()
        for end, n in _cases(step_tokens, max_len, device.rank_of[1]):
            start = max(0, end - n)
            _eager(device, [Row(slab, start, min(n, end), 0, reset=not start)])
        for each in _short(device.rank_of[1], max_len, model.geometry.window):
            for n in _lengths(step_tokens):
                if n > each:
                    _eager(device, _short_rows(slab, n, each))
        lengths = _lengths(min(step_tokens, max_len - 1))
        for rows in (2, 3):  # beside decodes
            _eager(device, [Row(slab, 0, lengths[-1] // 2, 0), *(Row(slab, 5, 1, lengths[-1] // 2 + i) for i in range(rows))])  # fmt: skip
        _draws(device, sorted({1, 2, 3, 8, 15, 16, 17, 32, 64, LOGIT_ROWS, len(device.page_table)}))
        _copies(device)
        device.rehearse()
    finally:
        model.layers = layers


@torch.inference_mode()
def beside_steps(device: LocalDevice) -> None:
    """What a request needs beside steps, once: libraries load a kernel, take page-locked memory and connect ranks where they first run, for
    which the first request would wait."""
    slab = len(device.page_table) - 1
    for params in (_EVERYTHING, SamplingParams()):  # the last changes nothing
        device.sampler.begin(slab, params, prompt=np.zeros(2, np.int32), output=[0], seed=0, ends=[0])
    device.change_pages(np.array([[slab, 0, int(device.page_table[slab, 0])]], np.int32))
    _draws(device, (1,))
    _copies(device)
    device.rehearse()


_EVERYTHING = SamplingParams(presence_penalty=1.0, repetition_penalty=2.0, logit_bias={0: 1.0}, min_tokens=2)
"""All that is edited in logits."""


def _kinds(layers: Sequence[Layer]) -> Iterator[Layer]:
    """One layer of each kind."""
    seen = set()
    for layer in layers:
        kind = (layer.ratio, layer.attn.compressor is None, layer.moe.table is None)
        if kind not in seen:
            seen.add(kind)
            yield layer


def _short(ranks: int, max_len: int, window: int) -> list[int]:
    """Tokens of rows of which a step may have many. The longest that every one of `ranks` ranks has all of (longer ones are dealt out, and a rank
    has a part of the step), and short ones: then all of a step's rows are kept in windows, and the entries to choose from are few, a multiple of 16 (a
    window's tokens: 32) or not (a little more than half of them: 17, on several ranks R of each)."""
    longest = (max_len if ranks == 1 else min(max_len, ranks * UNIT)) - 1
    return sorted({min(n, longest) for n in (longest, window, window // 2 + 4)})


def _short_rows(slab: int, tokens: int, longest: int) -> list[Row]:
    """A step of as many tokens in rows of up to `longest`: several prompts, none of which is that long."""
    return [Row(slab, 0, min(longest, tokens - at), at) for at in range(0, tokens, longest)]


def _lengths(most: int) -> list[int]:
    """Tokens of steps: kernels change with the power of two, and where there are few."""
    powers = [1 << i for i in range(most.bit_length()) if 1 << i <= most]
    return sorted({n for p in (*powers, most) for n in (p, p + 1, p * 3 // 2) if 0 < n <= most})


def _cases(step_tokens: int, max_len: int, ranks: int) -> Iterator[tuple[int, int]]:
    """(end, tokens) of steps of one row: kernels depend on how many tokens there are, and on how many before them or on whether that is a
    power of two. On several ranks also on whether they are dealt out: some that are not, and too many for the ring of a window."""
    lengths = _lengths(min(step_tokens, max_len - 1))
    kinds = (1, lengths[-1]) if ranks == 1 else (1, min(UNIT - 1, lengths[-1]), lengths[-1])
    cases = [(max_len, n) for n in lengths] + [(n, n) for n in lengths]
    cases += [(end, n) for end in _contexts(max_len) for n in kinds]
    yield from dict.fromkeys(cases)


def _contexts(max_len: int) -> list[int]:
    """Tokens that rows go up to: powers of two, and ends at which a number of entries is odd."""
    powers = (1 << i for i in range(32))
    return [n for p in powers for n in (p, p + 20) if n < max_len] + [max_len]


def _eager(device: LocalDevice, rows: list[Row]) -> None:
    count = sum(row.length for row in rows)
    device.model.hidden(
        Batch(
            token_ids=torch.zeros(count, dtype=torch.int64),
            positions=torch.cat([torch.arange(row.start, row.start + row.length) for row in rows]),
            rows=tuple(rows),
            page_table=device.page_table,
            logit_index=torch.tensor([count - 1]),
            device_pages=device.device_pages,
        )
    )


def _draws(device: LocalDevice, rows_of: Sequence[int]) -> None:
    """Draws of so many rows outside of a graph, and log-probabilities, of prompts too."""
    model, slabs = device.model, len(device.page_table)
    shape = (model.config.hc_mult, model.config.hidden_size)
    for rows in rows_of:
        hidden = torch.zeros((rows, *shape), dtype=model.embed.dtype, device=device.device)
        at = torch.zeros(rows, dtype=torch.int64, device=device.device)
        logits = model.logits(hidden)
        judge(logits, at, 5)
        for kind in KINDS if rows <= slabs else ():
            device.sampler.tokens(logits, at, at, kind)


def _copies(device: LocalDevice) -> None:
    layout, last = device.cache.layout, len(device.page_table) - 1
    pages = [0] * layout.snapshot_pages
    for jobs in (1, 2):
        device.cache.save_all([(last, layout.block_tokens, *pages)] * jobs)
        device.cache.restore_all([(last, layout.block_tokens, *pages)] * jobs)
        device.cache.reset([last] * jobs)
