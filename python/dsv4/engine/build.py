"""From a config to a running engine, and the plan of memory and choices that start-up prints."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from dsv4._core import Core, LayoutSpec
from dsv4.backends import choose
from dsv4.cache.paged import PagedCache
from dsv4.config import EngineConfig, core_options, step_budget, step_tokens
from dsv4.engine.buffers import StepPlan
from dsv4.engine.checks import check
from dsv4.engine.costs import COST_MODELS, core_costs, parse_costs
from dsv4.engine.device import LocalDevice
from dsv4.engine.grammars import Grammars
from dsv4.engine.graphs import Recorder
from dsv4.engine.group import Group
from dsv4.engine.kv_events import KvEvents, KvEventsConfig
from dsv4.engine.loop import EngineLoop
from dsv4.engine.meeting import words
from dsv4.engine.memory import (
    Demand,
    Free,
    allocating,
    check_fits,
    demand_of,
    of_rank,
    room_for_pages,
    size,
    usable_memory,
)
from dsv4.engine.progress import Progress
from dsv4.engine.rank_count import can_share, ranks_of, threads_of
from dsv4.engine.ranked import FollowingDevice, LeadingDevice, model_of
from dsv4.engine.routing import Tenants
from dsv4.engine.steps import StepRecord
from dsv4.engine.taken import Card, Taken
from dsv4.errors import ConfigError
from dsv4.model.config import ModelConfig
from dsv4.model.layout import block_size
from dsv4.model.parallel import ALL, Share
from dsv4.model.rank import Rank
from dsv4.model.source import Source
from dsv4.model.survey import Survey
from dsv4.model.v4 import V4Model
from dsv4.model.weights import expanded_bytes, load_weights
from dsv4.ops.registry import Ops
from dsv4.ops.weight import Weight
from dsv4.plan.cache import pages_of, size_pool, table_blocks
from dsv4.plan.graphs import at_start, contexts_of, cut_sizes_of, dealt_of, extends_of, sizes_of
from dsv4.plan.ranks import least_ranks
from dsv4.plan.weights import Weights
from dsv4.quantities import counted
from dsv4.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dsv4._core import PlanSchema

log = logging.getLogger("dsv4.engine")

Device = TypeVar("Device", bound=LocalDevice)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by use. What is resolved from `auto` is here too."""

    weights: int
    packed: bool
    """FP8 and FP4 matrices are as in the checkpoint; else they are expanded to the model's dtype."""
    notes: tuple[str, ...]
    """In what the checkpoint differs from a release."""
    pages: int
    pool: int
    slabs: int
    page_table: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """A loop ready to step, and what it was built from."""

    config: EngineConfig
    model_config: ModelConfig
    layout: LayoutSpec
    memory: MemoryPlan
    loop: EngineLoop
    ops: Ops
    dtype: torch.dtype
    source: Source
    eager: str | None
    """Why decode steps are not captured; None where they are."""
    ranks_are: str
    """Why there are so many ranks."""
    taken: Taken | None = None
    """What the start took of a GPU, and what was planned; None elsewhere."""

    @property
    def max_model_len(self) -> int:
        return self.memory.max_model_len

    @property
    def name(self) -> str:
        """The model's name."""
        return self.source.name

    def _graphs(self) -> str:
        if self.eager is not None:
            return f"off: {self.eager}"
        c, contexts = self.config, contexts_of(self.max_model_len)
        sizes = sizes_of(c.max_num_seqs, c.cudagraph_capture_sizes)
        tokens, ranks = c.max_num_batched_tokens or 0, self.layout.ranks
        chunks = (*extends_of(tokens, self.max_model_len, ranks), *dealt_of(tokens, ranks))
        when = "captured at start"
        if c.capture_context is not None and c.capture_context < self.max_model_len:
            begun = at_start(contexts, c.capture_context)
            when = (
                f"captured at start up to {begun[0]:,}, longer ones when they first come"
                if begun
                else "captured when they first come"
            )
        return (
            f"decode steps of {', '.join(map(str, sizes))} row{'s' * (sizes != (1,))}, steps with prompts of {', '.join(map(str, chunks)) or 'no'} tokens, contexts up "
            f"to {', '.join(f'{n:,}' for n in contexts)} tokens, {when}; one slab is for padding"
        )

    def _ranks(self) -> str:
        """How many, and what each has."""
        ranks = self.config.tensor_parallel_size or 1
        if ranks == 1:
            return f"1 ({self.ranks_are})"
        group = self.loop.group
        assert group is not None and group.rank is not None, "an engine of several ranks has a group"
        by = words(group.rank, self.config.device)
        if self.config.device == "cpu":
            by = f"{by}, {counted(torch.get_num_threads(), 'thread')} each"
        return (
            f"{ranks} ({self.ranks_are}), a process each, over {by}; what follows is of each one: 1/{ranks} of every page, of expert "
            f"columns and of the vocabulary; a rank is given up after {self.config.rank_timeout:g} s"
        )

    def _replay(self) -> str:
        exact, asked = self.layout.replay_tokens, self.config.replay_tokens or self.layout.replay_tokens
        return f"{counted(asked, 'token')}{f', which is not exact below {exact:,}' if asked < exact else ''}"

    def _bits(self) -> str:
        """What `--deterministic` means here."""
        if self.config.deterministic:
            ranks = self.config.tensor_parallel_size or 1
            held = f"; they are those of {ranks} ranks, another number gives others" if ranks > 1 else ""
            return f"deterministic: a token's do not depend on what runs beside it, nor on how its prompt was cut, cached or resumed{held}"
        if self.config.device == "cpu":
            return "the reference's, which do not depend on what runs beside a token"
        return "may change with what runs beside a token (--deterministic)"

    def _step_time(self) -> str:
        """What `--step-ms` means here."""
        ms = self.config.step_ms
        budget = step_budget(
            ms, self.config.device, _step_sizes(self.config, self.layout, self.max_model_len)
        )
        if ms == "auto":
            times, floor = budget["decodes"].values()
            return f"step time auto: {times:g} times that of the decodes alone, or of {counted(floor, 'prompt token')} if longer"
        return "step time open" if ms is None else f"step time {ms:g} ms while requests decode"

    def describe(self) -> list[str]:
        """The memory plan and every choice made, one line each."""
        c, m, layout = self.config, self.memory, self.layout
        history = layout.history_bytes_per_token
        formats = {x.name: x.format for x in layout.components}
        index = next((formats[s.index] for s in self.model_config.layers if s.indexed), "none")
        tokens = m.pages * layout.block_tokens
        return [
            f"model      {self.name}: {counted(self.model_config.num_layers, 'layer')}, vocabulary {self.model_config.vocab_size}, from {self.source.path}",
            f"dtype      {str(self.dtype).removeprefix('torch.')}; rows {formats['window']}, index {index}",
            f"device     {c.device}",
            f"ranks      {self._ranks()}",
            *(f"{'ops' if i == 0 else '':<10} {line}" for i, line in enumerate(self.ops.describe())),
            f"bits       {self._bits()}",
            f"weights    {size(m.weights)}, {'packed as stored' if m.packed else 'expanded'}",
            *(f"           {note}" for note in m.notes),
            f"pool       {size(m.pool)}: {counted(m.pages, 'page')} of {layout.block_tokens} tokens, {size(layout.page_bytes)} each; "
            f"{history:,.2f} B of history per token, {100 * (layout.page_bytes / layout.block_tokens / history - 1):.2f}% padding",
            f"capacity   {counted(tokens, 'token')} of history; {counted(m.pages // pages_of(layout, m.max_model_len), 'request')} of "
            f"{counted(m.max_model_len, 'token')}",
            f"state      {size(m.slabs)}: {counted(m.slabs // layout.slab_bytes, 'slab')} of {size(layout.slab_bytes)}; a snapshot takes "
            f"{size(layout.snapshot_bytes)} in {counted(layout.snapshot_pages, 'page')}",
            f"prefixes   {'on' if c.enable_prefix_caching else 'off'}; snapshots {c.snapshot_policy} (budget {c.snapshot_budget:.0%}); "
            f"eviction {c.eviction}; "
            f"replay {self._replay()}; cost {c.cost_model}",
            f"graphs     {self._graphs()}",
            *([] if self.taken is None else [f"memory     {self.taken.describe()}"]),
            f"context    {counted(m.max_model_len, 'token')}; a max_tokens beyond it is {'cut' if c.max_tokens_overflow == 'cut' else 'refused'}",
            f"scheduler  {c.max_num_seqs} running, {c.max_num_waiting} waiting, {counted(c.max_num_batched_tokens or 0, 'token')} a step, "
            f"{counted(2 if c.async_scheduling else 1, 'step')} in flight; "
            f"{self._step_time()}; tenants {c.tenants or 'equal'}; "
            f"first after {c.max_wait:g} s",
            *([] if self.loop.events is None else [f"events     {self.loop.events.describe()}"]),
        ]


def build_engine(
    config: EngineConfig, progress: Progress | None = None, *, eos_ids: frozenset[int] = frozenset()
) -> BuiltEngine:
    """Resolves every `auto`, loads weights and sets up cache and core; with several ranks starts the processes of the others.
    `eos_ids`: tokens that end an answer.

    Raises ConfigError (settings, config.json), CheckpointError (weights) and RankLost, each with one line, before any slow work
    where it can.
    """
    source, found = check(config)
    model_config = found.config
    device = _device(config.device)
    dtype = _dtype(config.dtype, device)
    config = _resolve(config, device, dtype)
    ops = choose(config.backend, device, deterministic=config.deterministic)
    free = usable_memory(config)
    packed = ops.packed or expanded_bytes(model_config, dtype) > free.bytes // 2
    sizing = Sizing(config, found, dtype, packed)
    ranks, why = _ranks(sizing, free)
    config = dataclasses.replace(
        config,
        tensor_parallel_size=ranks,
        max_num_batched_tokens=step_tokens(config, device, ranks),
        block_size=block_size(model_config.layers, config.block_size, ranks),
    )
    sizing = dataclasses.replace(sizing, config=config)
    group = None if ranks == 1 else Group(ranks, config.rank_timeout)
    try:
        return _build(sizing, source, ops, free, progress, eos_ids, group, why)
    except BaseException:
        if group is not None:
            group.close()
        raise


@dataclass(frozen=True, slots=True)
class Sizing:
    """What memory is counted for."""

    config: EngineConfig
    found: Survey
    dtype: torch.dtype
    packed: bool

    def layout(self, ranks: int) -> LayoutSpec:
        """Of one of so many ranks. Raises ConfigError for a block that they cannot share."""
        config = self.config
        return self.found.config.layout(
            config.kv_cache_dtype, config.index_cache_dtype, block_tokens=config.block_size, ranks=ranks
        )

    def demand(self, ranks: int) -> Demand:
        held = "released" if self.packed else str(self.dtype).removeprefix("torch.")
        return demand_of(
            self.config,
            self.found.config,
            Weights.found(self.found),
            self.layout(ranks),
            held=held,
            width=self.dtype.itemsize,
        )


def _ranks(sizing: Sizing, free: Free) -> tuple[int, str]:
    """How many ranks the engine has, and why. Raises ConfigError where there are not so many GPUs."""
    config, wanted = sizing.config, sizing.config.tensor_parallel_size
    gpus = torch.cuda.device_count() if config.device == "cuda" else 0
    if wanted is not None:
        if gpus and wanted > gpus:
            raise ConfigError(
                f"tensor_parallel_size is {wanted}; this machine has {counted(gpus, 'GPU')} (CUDA_VISIBLE_DEVICES counts), so the largest is {gpus}"
            )
        return wanted, "tensor_parallel_size"
    if not gpus:
        return 1, "the default on a CPU"

    def fits(ranks: int) -> bool:
        demand = sizing.demand(ranks)
        pages = room_for_pages(config, demand, free) // demand.layout.page_bytes
        return pages * demand.layout.block_tokens >= demand.max_len

    valid = [n for n in ranks_of(sizing.found) if can_share(sizing.found.config.layers, config.block_size, n)]
    chosen = least_ranks(valid, gpus, fits)
    return (
        chosen,
        f"the least of 1, 2, 4, 8 whose plan holds a request of {counted(sizing.demand(chosen).max_len, 'token')}, of {counted(gpus, 'GPU')}",
    )


def _build(
    sizing: Sizing,
    source: Source,
    ops: Ops,
    free: Free,
    progress: Progress | None,
    eos_ids: frozenset[int],
    group: Group | None,
    why: str,
) -> BuiltEngine:
    config, model_config = sizing.config, sizing.found.config
    ranks = config.tensor_parallel_size or 1
    layout = sizing.layout(ranks)
    record = None if config.record_steps is None else StepRecord(config.record_steps)
    if group is not None:
        free = _greet(group, config, free)
    demand = sizing.demand(ranks)
    check_fits(config, demand, free)
    pages, max_len = size_pool(
        layout,
        model_positions=model_config.max_position,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        num_pages=config.num_pages,
        memory=config.kv_cache_memory,
        free=room_for_pages(config, demand, free),
    )
    told = KvEventsConfig.of(config.kv_events_config)
    core = _core(config, layout, pages, max_len, changes=told is not None)
    events = None if told is None else KvEvents(told, core, layout.block_tokens)
    schema = core.plan_schema()
    with allocating("lower --kv-cache-memory (or --num-pages), --max-num-seqs or --max-num-batched-tokens"):
        local, eager = _loaded(sizing, source, ops, progress, group, schema, pages, max_len)
        steps = range(2 if config.async_scheduling else 1)
        plans = tuple(StepPlan(schema, pinned=config.device == "cuda") for _ in steps)
        if tokens := _warm_up_tokens(config, max_len):
            local.warm_up(tokens, config.capture_context, progress)
        if group is not None:
            group.await_all()
    loop = EngineLoop(
        core,
        local,
        plans,
        eos_ids=eos_ids,
        seed=config.seed,
        tenants=Tenants(config.tenants),
        record=record,
        events=events,
        grammars=_grammars(config, source, model_config.vocab_size, eos_ids),
        group=group,
    )
    if events is not None:
        events.start()
    memory = _memory(sizing, local, layout, pages, max_len)
    taken = _taken(demand, memory) if config.device == "cuda" else None
    return BuiltEngine(
        config, model_config, layout, memory, loop, ops, sizing.dtype, source, eager, why, taken
    )


def _greet(group: Group, config: EngineConfig, free: Free) -> Free:
    """Starts the other ranks; what each of all may use."""
    ranks = config.tensor_parallel_size or 1
    settle_rank(config, 0, ranks)
    group.greet(config)
    if config.device != "cuda":
        return of_rank(free, ranks)
    return dataclasses.replace(free, bytes=min(free.bytes, group.free()))


def _loaded(
    sizing: Sizing,
    source: Source,
    ops: Ops,
    progress: Progress | None,
    group: Group | None,
    schema: PlanSchema,
    pages: int,
    max_len: int,
) -> tuple[LocalDevice, str | None]:
    """Rank 0's device with its weights, and what keeps its decode steps from being captured."""
    config, found, dtype, packed = sizing.config, sizing.found, sizing.dtype, sizing.packed
    ranks, layout = config.tensor_parallel_size or 1, sizing.layout(config.tensor_parallel_size or 1)
    if group is None:
        weights = _weights(config, found, dtype, progress, packed, source)
        return _device_of(config, layout, found.config, weights, ops, pages, max_len)
    group.load(packed=packed)
    share = Share(0, ranks, whole_attention=True)
    weights = _weights(config, found, dtype, group.told(progress), packed, source, share)
    rank = group.form(pages, max_len, schema, _warm_up_tokens(config, max_len))
    make = partial(LeadingDevice, group)
    return _device_of(config, layout, found.config, weights, ops, pages, max_len, rank, make)


def _grammars(config: EngineConfig, source: Source, vocab_size: int, eos_ids: frozenset[int]) -> Grammars:
    tokenizer = partial(Tokenizer.from_dir, source.path, vocab_size=vocab_size)
    return Grammars(tokenizer, vocab_size, eos_ids, pinned=config.device == "cuda")


def _memory(sizing: Sizing, local: LocalDevice, layout: LayoutSpec, pages: int, max_len: int) -> MemoryPlan:
    """What the start prints of memory."""
    return MemoryPlan(
        weights=local.model.weight_bytes,
        packed=sizing.packed,
        pages=pages,
        pool=pages * layout.page_bytes,
        slabs=len(local.page_table) * layout.slab_bytes,
        notes=tuple(sizing.found.describe(sizing.dtype.itemsize, packed=sizing.packed)),
        page_table=local.page_table.numel() * 4,
        max_model_len=max_len,
    )


def _warm_up_tokens(config: EngineConfig, max_len: int) -> int:
    """Tokens of the prompt that a start runs; 0 where it runs none."""
    if config.device != "cuda":
        return 0
    return min(config.max_num_batched_tokens or 1, config.max_num_seqs * (max_len - 1))


def _taken(demand: Demand, memory: MemoryPlan) -> Taken:
    """What the start took of the card; what differs from the plan is logged."""
    tensors = {"weights": memory.weights, "pool": memory.pool, "slabs": memory.slabs}
    taken = Taken.of(dataclasses.replace(demand, pages=memory.pages), Card.now(), **tensors)
    if (fault := taken.fault()) is not None:
        log.warning("%s", fault)
    return taken


def _weights(
    config: EngineConfig,
    found: Survey,
    dtype: torch.dtype,
    progress: Progress | None,
    packed: bool,
    source: Source,
    share: Share = ALL,
) -> dict[str, Weight]:
    return load_weights(
        source.path,
        found.config,
        dtype,
        progress,
        packed=packed,
        device=config.device,
        found=found,
        share=share,
    )


def settle_rank(config: EngineConfig, rank: int, ranks: int) -> None:
    """What a process has to be before it is one of several ranks. On the CPU all have as many threads, so that what all compute has
    the same bits on all."""
    if config.device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(threads_of(ranks, len(os.sched_getaffinity(0))))


def follower_weights(
    config: EngineConfig, rank: int, ranks: int, *, packed: bool
) -> tuple[ModelConfig, dict[str, Weight]]:
    """What a rank that is not rank 0 loads, by settings that are resolved. Raises ConfigError and CheckpointError."""
    source, found = check(config)
    share = Share(rank, ranks, whole_attention=True)
    dtype = _dtype(config.dtype, config.device)
    return found.config, _weights(config, found, dtype, None, packed, source, share)


def following_device(
    config: EngineConfig,
    model_config: ModelConfig,
    weights: dict[str, Weight],
    pages: int,
    max_len: int,
    rank: Rank,
) -> FollowingDevice:
    """The device of that rank, which consumes the weights."""
    layout = model_config.layout(
        config.kv_cache_dtype, config.index_cache_dtype, block_tokens=config.block_size, ranks=rank.ranks
    )
    ops = choose(config.backend, config.device, deterministic=config.deterministic)
    make = partial(FollowingDevice, rank)
    return _device_of(config, layout, model_config, weights, ops, pages, max_len, rank, make)[0]


def _device_of(
    config: EngineConfig,
    layout: LayoutSpec,
    model_config: ModelConfig,
    weights: dict[str, Weight],
    ops: Ops,
    pages: int,
    max_len: int,
    rank: Rank | None = None,
    make: Callable[..., Device] = LocalDevice,  # type: ignore[assignment]
) -> tuple[Device, str | None]:
    """The device's side, of one GPU or of a rank, and what keeps its decode steps from being captured."""
    eager = _why_eager(config)
    slabs = config.max_num_seqs + (eager is None)  # the last one for padding
    model: V4Model
    if rank is None:
        cache = PagedCache(layout, pages, slabs, config.device, copy_state=ops.copy_state)
        model = V4Model(model_config, weights, cache, ops, consume=True)
    else:
        model, cache = model_of(config, layout, model_config, weights, ops, pages, slabs, rank)
    if eager is None and (ops_on_host := model.uncaptured()):
        eager = f"no graph can hold {', '.join(ops_on_host)} as chosen"
    local = make(
        model,
        cache,
        slabs=slabs,
        max_blocks=table_blocks(pages_of(layout, max_len)),
        replay_tokens=config.replay_tokens or layout.replay_tokens,
        step_tokens=config.max_num_batched_tokens or 0,
        capture=Recorder() if eager is None else None,
        capture_sizes=config.cudagraph_capture_sizes,
    )
    return local, eager


def _why_eager(config: EngineConfig) -> str | None:
    """What in the settings keeps decode steps from being captured."""
    if config.device != "cuda":
        return f"the device is {config.device}"
    return "enforce_eager is set" if config.enforce_eager else None


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device is 'cuda', but torch sees no CUDA device; use --device cpu or run `dsv4 doctor`"
        )
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _resolve(config: EngineConfig, device: str, dtype: torch.dtype) -> EngineConfig:
    """Every `auto` that depends on the device replaced by what it means, so that describe() prints it."""
    plain = str(dtype).removeprefix("torch.")
    # On a GPU in bf16 rows are stored in the formats that the release was trained for, which the kernels read.
    trained = device == "cuda" and dtype == torch.bfloat16
    row, index = ("fp8_ds_mla", "mxfp4") if trained else (plain, plain)
    costs = COST_MODELS[device] | parse_costs(config.cost_model)
    return dataclasses.replace(
        config,
        device=device,
        async_scheduling=device == "cuda" if config.async_scheduling is None else config.async_scheduling,
        kv_cache_dtype=row if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        index_cache_dtype=index if config.index_cache_dtype == "auto" else config.index_cache_dtype,
        cost_model=",".join(f"{k}={v:g}" for k, v in costs.items()),
    )


def _step_sizes(config: EngineConfig, layout: LayoutSpec, max_len: int) -> tuple[int, ...]:
    """Tokens of the steps with prompts that are captured, to which the scheduler cuts."""
    if _why_eager(config) is not None:
        return ()
    return cut_sizes_of(config.max_num_batched_tokens or 0, max_len, layout.ranks)


def _core(config: EngineConfig, layout: LayoutSpec, pages: int, max_len: int, *, changes: bool) -> Core:
    sizes = _step_sizes(config, layout, max_len)
    options = {
        "pages": pages,
        "cache_changes": changes,
        "max_len": max_len,
        "max_in_flight": 2 if config.async_scheduling else 1,
        "max_wait_us": int(1e6 * config.max_wait),
        "step_budget": step_budget(config.step_ms, config.device, sizes),
        "step_sizes": sizes,
        "tenants": Tenants(config.tenants).core(layout.page_bytes),
    }
    return Core(layout, core_options(config) | core_costs(config.cost_model) | options)
