"""Upper bound of what a step needs beside weights, pool and slabs, from limits alone.

No buffer grows with the context but the page table and the rotary tables: index scores and attention to a long history are made
for some tokens at a time, and of a long row only candidates are kept. Buffers of one phase are live together, phases follow each other, so
the bound is what stays plus the largest phase. What kernels take beside that they state themselves (`Form.scratch`); ops run one after
the other, so a phase counts that of the op that takes most. Activations are counted as if no kernel were fused.

What is not in it lies outside the memory fraction: `plan/outside.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from dsv4._core import plan_schema
from dsv4.backends import REGISTRY
from dsv4.kernels.messages import room
from dsv4.model.config import ModelConfig
from dsv4.model.parallel import UNIT, Parallel
from dsv4.ops.forms import Dims, Scratch
from dsv4.plan.cache import pages_of, table_blocks
from dsv4.plan.graphs import captured_tokens, dealt_steps_of, sizes_of, steps_of

if TYPE_CHECKING:
    from dsv4._core import LayoutSpec

MULTIPROCESSORS = 160
"""At least those of any known GPU; split work is cut to fill them and no further."""
LOGIT_ROWS = 256
"""Prompt positions whose log-probabilities the runner works out at a time."""
GRAPH_BYTES = 4096 * 48
"""Device memory of a captured layer: an allowance of 4 KiB for each of 48 launches."""
DEALT_BYTES = 4096 * 160 + 4 * 192 * 1024
"""The same where prompts are dealt out over ranks: 160 launches, and 192 KiB for each of four long messages of NCCL, which is about what 8 and
43 layers on two H200 took."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a step."""

    step_tokens: int
    """T: tokens of one step."""
    running: int
    """R: requests with a slab."""
    max_len: int
    graphs: int | None = 0
    """Steps captured as CUDA graphs, at most; None: those that an engine captures by default (`dsv4.plan.graphs`)."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """One array, or several equal ones. `phase` is "always" or the phase in which it lives."""

    phase: str
    name: str
    formula: str
    size: int


class _Sheet:
    """Collects buffers; a factor is (what it is, number)."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []

    def add(self, phase: str, name: str, *factors: tuple[str, int]) -> None:
        text = " x ".join(f"{value:,} {what}" for what, value in factors)
        self.buffers.append(Buffer(phase, name, text, prod(value for _, value in factors)))


def workspace(config: ModelConfig, layout: LayoutSpec, parallel: Parallel, limits: Limits) -> list[Buffer]:
    """Every buffer with its formula, on one rank, activations in bfloat16."""
    sheet = _Sheet()
    if limits.graphs is None:
        graphs = steps_of(limits.running, limits.max_len, limits.step_tokens, parallel.tp)
        limits = replace(limits, graphs=graphs)
    if limits.graphs:  # their memory pool is their own
        tokens = captured_tokens(limits.running, limits.max_len, limits.step_tokens, parallel.tp)
        step = replace(limits, step_tokens=tokens, graphs=0)
        phases = [b for b in workspace(config, layout, parallel, step) if b.phase not in ("always", "logits")]
        sheet.add("always", "largest phase of a captured step", ("bytes", bound(phases)))
        sheet.add("always", "slab of captured steps' padding", ("bytes", layout.slab_bytes))
        if parallel.tp > 1:
            rows = ("rows", sizes_of(limits.running)[-1])
            sheet.add(
                "always", "logits of captured steps", rows, ("vocabulary", config.vocab_size), ("bytes", 4)
            )
    _always(sheet, config, layout, parallel, limits)
    _attention(sheet, config, layout, parallel, limits)
    _experts(sheet, config, parallel, limits)
    _logits(sheet, config, limits)
    _scratch(sheet, config, parallel, limits)
    return sheet.buffers


def bound(buffers: list[Buffer]) -> int:
    """What stays plus the largest phase."""
    phases: dict[str, int] = {}
    for b in buffers:
        phases[b.phase] = phases.get(b.phase, 0) + b.size
    return phases.pop("always", 0) + max(phases.values(), default=0)


def _always(sheet: _Sheet, c: ModelConfig, layout: LayoutSpec, parallel: Parallel, limits: Limits) -> None:
    t, r = ("tokens", limits.step_tokens), ("requests", limits.running)
    streams = ("streams", c.hc_mult), ("hidden", c.hidden_size)
    sheet.add("always", "residual streams, before and after", t, *streams, ("bytes", 2), ("arrays", 2))
    blocks = table_blocks(pages_of(layout, limits.max_len))
    sheet.add("always", "page table", r, ("pages", blocks), ("bytes", 4))
    options = {"slabs": limits.running, "max_step_tokens": limits.step_tokens, "max_len": limits.max_len}
    schema = plan_schema(layout, options)
    sheet.add("always", "plans, two steps", ("words", schema["words"]), ("bytes", 4), ("steps", 2))
    sheet.add(
        "always",
        "sampling tables: bias, counts",
        ("requests and one", limits.running + 1),
        ("vocabulary", c.vocab_size),
        ("bytes", 8),
    )
    sheet.add(
        "always",
        "sampling tables: masks",
        ("requests", limits.running),
        ("words", -(-c.vocab_size // 32)),
        ("bytes", 4),
    )
    if parallel.tp > 1:
        sheet.add("always", "short messages of ranks", ("bytes", room(parallel.tp)))
    tables = len({bool(m) for m in c.compress_ratios})
    sheet.add(
        "always",
        "rotary tables",
        ("positions", blocks * layout.block_tokens),
        ("channels", c.rope_dim),
        ("bytes", 4),
        ("tables", tables),
    )
    sheet.add("always", "lowest scales of repacked experts", *_expert_rows(c, parallel))
    ordinary, dealt = graphs_of(limits, parallel.tp)
    layers = ("layers", c.num_layers)
    sheet.add("always", "captured graphs", ("steps", ordinary), layers, ("bytes", GRAPH_BYTES))
    if dealt:
        dealt_steps = ("steps with prompts that are dealt out", dealt)
        sheet.add("always", "captured graphs", dealt_steps, layers, ("bytes", DEALT_BYTES))


def graphs_of(limits: Limits, ranks: int) -> tuple[int, int]:
    """Captured steps, and beside them those whose prompts are dealt out over ranks."""
    dealt = dealt_steps_of(limits.running, limits.max_len, limits.step_tokens, ranks) if limits.graphs else 0
    return (limits.graphs or 0) - dealt, dealt


def graph_bytes(limits: Limits, layers: int, ranks: int) -> int:
    """What the driver and NCCL keep of all of them."""
    ordinary, dealt = graphs_of(limits, ranks)
    return layers * (ordinary * GRAPH_BYTES + dealt * DEALT_BYTES)


def _expert_rows(c: ModelConfig, parallel: Parallel) -> tuple[tuple[str, int], ...]:
    """One byte for each row of w1, w3 and w2 of the experts on a rank."""
    columns = c.moe_intermediate_size // (1 if parallel.ep > 1 else parallel.tp)
    experts = ("experts", c.num_experts // parallel.ep if c.expert_dtype == "fp4" else 0)
    return ("layers", c.num_layers), experts, ("rows", 2 * columns + c.hidden_size)


def _attention(sheet: _Sheet, c: ModelConfig, layout: LayoutSpec, parallel: Parallel, limits: Limits) -> None:
    phase, t = "attention", ("tokens", limits.step_tokens)
    heads = ("heads", c.num_heads // parallel.tp)
    sheet.add(phase, "input, also in float32", t, ("hidden", c.hidden_size), ("bytes", 2 + 4))
    sheet.add(phase, "low-rank queries", t, ("rank", c.q_lora_rank), ("bytes", 2))
    sheet.add(
        phase,
        "queries and outputs, before and after rotation",
        t,
        heads,
        ("channels", c.head_dim),
        ("bytes", 2),
        ("arrays", max(4, 2 + parallel.tp)),  # of a cut token every rank's part, from which the whole is made
    )
    sheet.add(phase, "rows of the step", t, ("channels", c.head_dim), ("bytes", 4), ("arrays", 2))
    window = next(x for x in layout.components if x.kind == "window")
    rows = limits.step_tokens + limits.running * window.tokens
    sheet.add(phase, "window rows of the step and before it", ("rows", rows), ("bytes", window.row_bytes))
    groups = ("groups", max(1, c.o_groups // parallel.tp))
    sheet.add(phase, "grouped outputs", t, groups, ("rank", c.o_lora_rank), ("bytes", 2))
    sheet.add(phase, "output", t, ("hidden", c.hidden_size), ("bytes", 2))
    sheet.add(
        phase, "compressor values and gates", t, ("channels", 2 * c.head_dim), ("bytes", 4), ("arrays", 2)
    )
    if any(s.indexed for s in c.layers):
        _index(sheet, c, limits)
    if parallel.tp > 1:
        _gathered(sheet, c, layout, limits, parallel.tp)


def _gathered(sheet: _Sheet, c: ModelConfig, layout: LayoutSpec, limits: Limits, ranks: int) -> None:
    """What a prompt's ranks fetch from each other in a layer: the history of the longest request (a page of each further prompt is filled in
    part), and what crosses of its compressors. Of prompts there are at most two for each run that a rank has."""
    phase, runs = "attention", -(-limits.step_tokens // (ranks * UNIT))
    of = {x.name: x for x in layout.components if x.kind == "stride"}
    main = max(
        (x for n, x in of.items() if n != "csa_index"), key=lambda x: x.row_bytes / x.ratio, default=None
    )
    for x in filter(None, (main, of.get("csa_index"))):
        rows = ("rows", -(-limits.max_len // x.ratio))
        sheet.add(phase, f"{x.name} of the longest request, gathered", rows, ("bytes", x.row_bytes))
        part = ("rows", -(-limits.max_len // (x.ratio * ranks)))
        sheet.add(phase, f"{x.name} of it that a rank sends", part, ("bytes", x.row_bytes))
        rows = ("rows, sent and gathered", 2 * layout.block_tokens // x.ratio)
        sheet.add(
            phase, f"{x.name} of pages filled in part", ("pages", 2 * runs), rows, ("bytes", x.row_bytes)
        )
    if (index := of.get("csa_index")) is not None:
        rows = ("rows", -(-(limits.max_len + 2 * runs * layout.block_tokens) // index.ratio))
        sheet.add(phase, "gathered csa_index, in order", rows, ("bytes", index.row_bytes))
    if main is not None:
        ratio = max((s.ratio for s in c.layers if s.overlap), default=0)
        channels = ("channels", 4 * (c.head_dim + c.index_head_dim))
        tails = ("tokens", 3 * ranks * runs * ratio)
        sheet.add(phase, "compressor inputs before a run, gathered", tails, channels, ("bytes", 4))
        each = limits.running + 2 * runs
        made = -(-limits.step_tokens // main.ratio) + ranks * each
        size = sum(x.row_bytes for x in (main, of.get("csa_index")) if x is not None)
        sheet.add(phase, "entries of the step, gathered", ("entries", made), ("bytes", size))
        left = ("rows, sent and gathered", (ranks + 1) * each)
        sheet.add(phase, "states that compressors leave", left, channels, ("bytes", 4))


def _index(sheet: _Sheet, c: ModelConfig, limits: Limits) -> None:
    phase, t = "attention", ("tokens", limits.step_tokens)
    sheet.add(
        phase,
        "index queries, plain and rotated",
        t,
        ("heads", c.index_heads),
        ("channels", c.index_head_dim),
        ("bytes", 2),
        ("arrays", 2),
    )
    sheet.add(phase, "index compressor", t, ("channels", 2 * c.index_head_dim), ("bytes", 4), ("arrays", 2))
    sheet.add(phase, "selected entries", t, ("top-k", c.index_topk), ("bytes", 4))


def _experts(sheet: _Sheet, c: ModelConfig, parallel: Parallel, limits: Limits) -> None:
    phase, t = "experts", ("tokens", limits.step_tokens)
    sheet.add(phase, "input and sum", t, ("hidden", c.hidden_size), ("bytes", 2 + 4))
    sheet.add(phase, "router scores", t, ("experts", c.num_experts), ("bytes", 4), ("arrays", 2))
    if parallel.ep > 1:  # every rank may send all its tokens here
        rows = (
            ("tokens of all ranks", limits.step_tokens * parallel.dp),
            ("choices", min(c.experts_per_token, c.num_experts // parallel.ep)),
        )
        columns = c.moe_intermediate_size
    else:
        rows = (t, ("choices", c.experts_per_token))
        columns = c.moe_intermediate_size // parallel.tp
    sheet.add(
        phase, "routed inputs in FP8 with scales", *rows, ("hidden", c.hidden_size + c.hidden_size // 32)
    )
    sheet.add(phase, "gate and up", *rows, ("columns", columns), ("bytes", 2), ("arrays", 2))
    sheet.add(phase, "hidden in FP8 with scales", *rows, ("columns", columns + columns // 32))
    sheet.add(phase, "routed outputs", *rows, ("hidden", c.hidden_size), ("bytes", 2))


PHASES = {
    "route": "experts",
    "experts": "experts",
    "swiglu": "experts",
    "hc_head": "logits",
    "logits": "logits",
}
"""Phase in which an op runs; of others "attention". (Sampling's is the logits'.)"""


def _keys(c: ModelConfig, parallel: Parallel, max_len: int) -> int:
    """Rows that a token attends to at once in the layer in which they are most: of several ranks' entries those of one."""
    entries = ((-(-max_len // (s.ratio * parallel.tp)), s.indexed) for s in c.layers if s.ratio)
    return c.window + max((min(n, c.index_topk) if indexed else n for n, indexed in entries), default=0)


def _scratch(sheet: _Sheet, c: ModelConfig, parallel: Parallel, limits: Limits) -> None:
    """Of the forms of every backend, as a plan may be for another machine."""
    keys = _keys(c, parallel, limits.max_len)
    dims = Dims(limits.step_tokens, c.head_dim, MULTIPROCESSORS, c.num_heads, keys)
    largest: dict[str, tuple[int, Scratch]] = {}
    kept: dict[str, Scratch] = {}
    for form in REGISTRY.forms():
        if form.op == "index_select" and not any(s.indexed for s in c.layers):
            continue
        for scratch in form.scratch:
            if scratch.kept:
                kept[scratch.name] = scratch
                continue
            phase, size = PHASES.get(form.op, "attention"), prod(n for _, n in scratch.factors(dims))
            if size > largest.get(phase, (0, scratch))[0]:
                largest[phase] = size, scratch
    for name, scratch in kept.items():
        sheet.add("always", f"{name}, kept between steps", *scratch.factors(dims))
    for phase, (_, scratch) in largest.items():
        sheet.add(phase, scratch.name, *scratch.factors(dims))


def _logits(sheet: _Sheet, c: ModelConfig, limits: Limits) -> None:
    """Of sampled rows, or of a slice of the prompt positions that want log-probabilities."""
    rows = ("rows at a time", min(limits.step_tokens, max(limits.running, LOGIT_ROWS)))
    sheet.add(
        "logits", "logits and a copy of them", rows, ("vocabulary", c.vocab_size), ("bytes", 4), ("arrays", 2)
    )
    hidden = ("streams", c.hc_mult), ("hidden", c.hidden_size)
    sheet.add("logits", "streams that become logits", ("tokens", limits.step_tokens), *hidden, ("bytes", 2))
