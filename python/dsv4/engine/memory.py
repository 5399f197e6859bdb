"""Memory before it is taken: what an engine of these settings needs, what there is, and which setting asks for too much."""

from __future__ import annotations

import contextlib
import errno
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dsv4.config import EngineConfig, default_step_tokens, step_tokens
from dsv4.engine.device_errors import first_line
from dsv4.errors import ConfigError
from dsv4.host_memory import host_memory
from dsv4.model.config import ModelConfig
from dsv4.model.parallel import Parallel
from dsv4.plan.build import divide
from dsv4.plan.graphs import steps_of
from dsv4.plan.outside import ALLOCATOR, LIBRARIES
from dsv4.plan.weights import Weights, weight_rows
from dsv4.plan.workspace import Limits, bound, workspace

if TYPE_CHECKING:
    from dsv4._core import LayoutSpec

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Free:
    """Bytes that can be had, and by which rule no more."""

    bytes: int
    rule: str


def usable_memory(config: EngineConfig) -> Free:
    """Of the GPU, and of that only a share where the pool's size is not given; of the host without swapping, within the
    limits of its container."""
    if config.device == "cpu":
        least = host_memory()[0]
        return Free(least.free, least.rule)
    free, total = torch.cuda.mem_get_info()
    free -= LIBRARIES.size + ALLOCATOR.size  # they come later; the context is there already
    share = int(total * config.gpu_memory_utilization)
    if config.kv_cache_memory is None and config.num_pages is None and share < free:
        return Free(share, f"gpu_memory_utilization {config.gpu_memory_utilization:g} of the GPU's memory")
    return Free(free, "the GPU's memory")


def of_rank(free: Free, ranks: int) -> Free:
    """What one of several ranks on the same host may use."""
    return free if ranks == 1 else Free(free.bytes // ranks, f"{free.rule}, shared by {ranks} ranks")


@dataclass(frozen=True, slots=True)
class Demand:
    """What an engine takes, or one rank of it, in the counts that settings give."""

    config: ModelConfig
    tensors: Weights
    layout: LayoutSpec
    held: str
    """Form of the weights, as in `plan.weights.HELD`."""
    width: int
    """Bytes of a number of the forward pass."""
    pages: int
    running: int
    step_tokens: int
    max_len: int
    graphs: int = 0

    @property
    def plain(self) -> str:
        """Dtype of weights that are not quantised."""
        return "float32" if self.width == 4 else "bfloat16"

    @property
    def weights(self) -> int:
        rows = weight_rows(self.tensors, Parallel(self.layout.ranks), held=self.held, plain=self.plain)
        return sum(row.rank for row in rows)

    @property
    def padding(self) -> int:
        """Of the workspace, the slab of captured steps' padding rows."""
        return self.layout.slab_bytes if self.graphs else 0

    @property
    def limits(self) -> Limits:
        """Of a step, which is never larger than all that can run at once."""
        tokens = min(self.step_tokens, self.running * self.max_len)
        return Limits(max(tokens, self.running), self.running, self.max_len, self.graphs)

    @property
    def workspace(self) -> int:
        """An upper bound."""
        buffers = workspace(self.config, self.layout, Parallel(self.layout.ranks), self.limits)
        beyond = max(0, self.step_tokens - self.running * self.max_len)
        # a plan's arrays have all the room that was asked for
        return bound(buffers) * self.width // 2 + 16 * beyond

    @property
    def bytes(self) -> int:
        """All of it."""
        slabs, pool = self.running * self.layout.slab_bytes, self.pages * self.layout.page_bytes
        return self.weights + pool + slabs + self.workspace


def demand_of(
    config: EngineConfig,
    model: ModelConfig,
    tensors: Weights,
    layout: LayoutSpec,
    *,
    held: str,
    width: int,
) -> Demand:
    """Of one rank, for settings whose `auto`s are resolved but for the tokens of a step, which depend on the ranks. A pool whose size is not given
    counts as one page."""
    pages = 1
    if config.num_pages is not None:
        pages = config.num_pages
    elif config.kv_cache_memory is not None:
        pages = config.kv_cache_memory // layout.page_bytes
    max_len = min(config.max_model_len or model.max_position, model.max_position)
    graphed = config.device == "cuda" and not config.enforce_eager
    chosen, ranks = config.cudagraph_capture_sizes, layout.ranks
    tokens = step_tokens(config, config.device, ranks)
    graphs = steps_of(config.max_num_seqs, max_len, tokens, ranks, chosen) if graphed else 0
    running = config.max_num_seqs
    return Demand(model, tensors, layout, held, width, pages, running, tokens, max_len, graphs)


def room_for_pages(config: EngineConfig, demand: Demand, free: Free) -> int:
    """Bytes that the page pool may take by default: a quarter of the host's free memory, or what weights, slabs and
    workspace leave of a GPU's, as `dsv4 plan` computes it. Negative: so much is missing."""
    if config.device == "cpu":
        return min(free.bytes // 4, free.bytes - replace(demand, pages=0).bytes)
    limits = Limits(demand.step_tokens, demand.running, demand.max_len, demand.graphs)
    d = demand
    return divide(
        d.config,
        d.tensors,
        d.layout,
        Parallel(d.layout.ranks),
        limits,
        free.bytes,
        held=d.held,
        plain=d.plain,
    ).pool


def check_fits(config: EngineConfig, demand: Demand, free: Free) -> None:
    """Raises ConfigError when memory does not hold the demand: it names the setting that takes most, what it needs, what is
    free, and the largest value that fits."""
    if demand.bytes <= free.bytes:
        return
    least = replace(demand, pages=1, running=1, step_tokens=1, graphs=0)
    if least.bytes > free.bytes:
        raise ConfigError(
            f"the model does not fit: with one page, one request and one token a step it takes {size(least.bytes)} "
            f"({size(demand.weights)} of weights as {demand.held}), and {size(free.bytes)} are free ({free.rule})"
        )
    asked = max(_asked(config, demand), key=lambda a: a.takes(demand))
    fits = _largest(lambda n: asked.of(demand, n).bytes <= free.bytes, asked.count)
    if fits < 1:  # others take too much as well
        fits = _largest(lambda n: asked.of(least, n).bytes <= free.bytes, asked.count)
    takes = asked.takes(demand)
    raise ConfigError(
        f"{asked.name} is {asked.value}, which takes {size(takes)}; with {size(demand.bytes - takes)} for the rest that is more "
        f"than the {size(free.bytes)} that are free ({free.rule}); the largest that fits is {asked.shown(fits)}"
    )


@dataclass(frozen=True, slots=True)
class _Asked:
    """A setting that memory depends on."""

    name: str
    value: str
    count: int
    of: Callable[[Demand, int], Demand]
    """The demand with another count."""
    shown: Callable[[int], str] = str
    """A count as a value of the setting."""

    def takes(self, demand: Demand) -> int:
        """Bytes beside what its least value would take."""
        return demand.bytes - self.of(demand, 1).bytes


def _asked(config: EngineConfig, demand: Demand) -> Iterator[_Asked]:
    def pages(d: Demand, n: int) -> Demand:
        return replace(d, pages=n)

    def running(d: Demand, n: int) -> Demand:
        follows = d.step_tokens == default_step_tokens(config.device, d.running, d.layout.ranks)
        tokens = default_step_tokens(config.device, n, d.layout.ranks) if follows else d.step_tokens
        graphs = d.graphs and steps_of(n, d.max_len, tokens, d.layout.ranks)
        return replace(d, running=n, step_tokens=tokens, graphs=graphs)

    def tokens(d: Demand, n: int) -> Demand:
        return replace(d, step_tokens=n)

    if config.num_pages is not None:
        yield _Asked("num_pages", str(demand.pages), demand.pages, pages)
    elif config.kv_cache_memory is not None:
        shown = lambda n: _floor_size(n * demand.layout.page_bytes)  # noqa: E731
        yield _Asked("kv_cache_memory", size(config.kv_cache_memory), demand.pages, pages, shown)
    yield _Asked("max_num_seqs", str(demand.running), demand.running, running)
    yield _Asked("max_num_batched_tokens", str(demand.step_tokens), demand.step_tokens, tokens)


def _largest(fits: Callable[[int], bool], above: int) -> int:
    """The largest count below `above` that fits; 0 when none does."""
    low, high = 0, above
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def size(count: float) -> str:
    """1536 -> '1.50 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1024
    return f"{count:,.2f} TiB"


def _floor_size(count: int) -> str:
    """As a value of a setting, rounded down."""
    if count >= GIB:
        return f"{math.floor(10 * count / GIB) / 10:g}GiB"
    return f"{count // 2**20}MiB" if count >= 2**20 else str(count)


@contextlib.contextmanager
def allocating(remedy: str) -> Iterator[None]:
    """Turns a failed allocation into a ConfigError with the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as e:
        if not _out_of_memory(e):
            raise
        raise ConfigError(f"memory ran out at start ({first_line(e)}); {remedy}") from None


def _out_of_memory(error: Exception) -> bool:
    """Of Python, numpy, torch on either device, or the system."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    said = "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or said
