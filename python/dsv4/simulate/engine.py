"""The engine that a simulation stands for: a model on some GPUs under settings, as `dsv4 serve` would have it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv4.config import EngineConfig, core_options, step_budget, step_tokens
from dsv4.errors import ConfigError
from dsv4.gpus import Gpu
from dsv4.model import parallel
from dsv4.model.config import ModelConfig
from dsv4.model.layout import over_ranks
from dsv4.model.parallel import Parallel, valid_tp
from dsv4.plan.graphs import cut_sizes_of, steps_of
from dsv4.plan.weights import Weights, weight_rows
from dsv4.plan.workspace import Limits, bound, workspace
from dsv4.quantities import counted

if TYPE_CHECKING:
    from dsv4._core import LayoutSpec

MOST_WEIGHTS = 0.75
"""Largest share of a GPU's memory that weights take where the number of GPUs is chosen here."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine: `tp` GPUs, of which each holds its rows of every page."""

    config: ModelConfig
    layout: LayoutSpec
    gpu: Gpu
    tp: int
    pages: int
    settings: EngineConfig
    """Those of graphs and of the server are not simulated."""
    weights: Mapping[str, float]
    """Shares of tenants by name; others have 1."""
    coefficients: Mapping[str, Any]
    """Of the step model, from which the scheduler's costs follow too."""
    sequential: bool
    """One request at a time, and no time passes."""

    @property
    def pool_bytes(self) -> int:
        """On each GPU."""
        return self.pages * over_ranks(self.layout, self.tp).page_bytes

    @property
    def max_len(self) -> int:
        """Longest request: what the settings say, else the model's limit, and no more than the pool holds."""
        return min(
            self.settings.max_model_len or self.config.max_position, self.pages * self.layout.block_tokens
        )

    @property
    def step_tokens(self) -> int:
        """Most tokens of a step."""
        return step_tokens(self.settings, "cuda", self.tp)

    def core_options(self, longest_prompt: int) -> dict[str, Any]:
        """Of the core, without tenants. `longest_prompt`: of the trace."""
        s, tokens = self.settings, self.step_tokens
        sizes = () if s.enforce_eager else cut_sizes_of(tokens, self.max_len, self.tp)
        return core_options(s) | {
            "pages": self.pages,
            "max_step_tokens": max(tokens, longest_prompt) if self.sequential else tokens,
            "max_len": self.max_len,
            "max_wait_us": int(1e6 * s.max_wait),
            "step_budget": step_budget(s.step_ms, "cuda", sizes),
            "step_sizes": sizes,
        }

    def describe(self) -> str:
        """In one line."""
        tokens = self.pages * self.layout.block_tokens
        return (
            f"{self.config.name} on {self.tp} x {self.gpu.name}; pool {self.pool_bytes / 2**30:.2f} GiB{' each' if self.tp > 1 else ''}: "
            f"{counted(self.pages, 'page')} of {self.layout.block_tokens} tokens, {tokens / 1e6:.2f}M tokens"
        )


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where the step model comes from."""

    coefficients: str | None = None
    """File of `dsv4 calibrate`."""
    step_model: str | None = None
    """File of measured steps, or name=number,…."""


def build(
    model: ModelConfig,
    card: Gpu,
    settings: EngineConfig,
    times: StepTimes,
    *,
    pool: int | None = None,
    weights: Mapping[str, float] | None = None,
    sequential: bool = False,
) -> tuple[Engine, str]:
    """The engine, and where its step times come from. `pool`: bytes on each GPU, else what the settings' share of memory leaves.
    Raises ConfigError."""
    rows, index = settings.kv_cache_dtype, settings.index_cache_dtype
    settings = dataclasses.replace(  # what auto means on a GPU
        settings,
        kv_cache_dtype="fp8_ds_mla" if rows == "auto" else rows,
        index_cache_dtype="mxfp4" if index == "auto" else index,
    )
    tp = settings.tensor_parallel_size or smallest_tp(model, card)
    parallel.check(model, tp, 1, tp)
    formats = settings.kv_cache_dtype, settings.index_cache_dtype
    layout = model.layout(*formats, block_tokens=settings.block_size)
    block = over_ranks(layout, tp).block_tokens  # of which every GPU has as many rows
    layout = model.layout(*formats, block_tokens=block)
    page_bytes = over_ranks(layout, tp).page_bytes
    size = _pool_bytes(model, layout, card, tp, settings) if pool is None else pool
    pages = size // page_bytes
    if pages < 1:
        raise ConfigError(f"--pool-gib is {size / 2**30:g}; one page is {page_bytes} bytes")
    coefficients, about = _step_model(times, model, settings, layout, card, tp)
    return Engine(model, layout, card, tp, pages, settings, weights or {}, coefficients, sequential), about


def smallest_tp(config: ModelConfig, gpu: Gpu) -> int:
    """The fewest GPUs on which weights leave room for a pool. Raises ConfigError."""
    ways = valid_tp(config)
    for tp in ways:
        if _weights(config, tp) <= MOST_WEIGHTS * gpu.memory_bytes:
            return tp
    need = _weights(config, ways[-1]) / 1e9
    raise ConfigError(
        f"gpu is {gpu.name!r}; {config.name} needs {need:,.0f} GB of weights on each of {ways[-1]} of them"
    )


def _pool_bytes(config: ModelConfig, layout: LayoutSpec, gpu: Gpu, tp: int, settings: EngineConfig) -> int:
    """What the share of a GPU's memory leaves for pages, by the planner's figures. Raises ConfigError."""
    running, tokens = settings.max_num_seqs, step_tokens(settings, "cuda", tp)
    longest = settings.max_model_len or config.max_position
    chosen = settings.cudagraph_capture_sizes
    graphs = 0 if settings.enforce_eager else steps_of(running, longest, tokens, tp, chosen)
    limits = Limits(tokens, running, longest, graphs)
    weights, memory = _weights(config, tp), gpu.memory_bytes * settings.gpu_memory_utilization
    rest = limits.running * layout.slab_bytes + bound(workspace(config, layout, Parallel(tp=tp), limits))
    left = int(memory) - weights - rest
    if left < over_ranks(layout, tp).page_bytes:
        raise ConfigError(
            f"tp is {tp}; {config.name} on {gpu.name} needs {weights / 1e9:,.1f} GB of weights and {rest / 1e9:,.1f} GB "
            f"of state and workspace on each GPU, of {memory / 1e9:,.1f} GB; give a larger --tp"
        )
    return left


def _weights(config: ModelConfig, tp: int) -> int:
    return sum(row.rank for row in weight_rows(Weights.released(config), Parallel(tp=tp), held="released"))


def _step_model(
    times: StepTimes, config: ModelConfig, settings: EngineConfig, layout: LayoutSpec, card: Gpu, tp: int
) -> tuple[dict[str, Any], str]:
    """Coefficients by roofline, overridden or fitted, and how they came about."""
    from dsv4.simulate.calibrate import calibrate, read_steps
    from dsv4.simulate.coefficients import Calibration
    from dsv4.simulate.device import Shares, parse_overrides, step_coefficients

    if times.coefficients is not None:
        if times.step_model is not None:
            raise ConfigError("give --coefficients or --step-model, not both")
        found = Calibration.read(times.coefficients)
        found.check(config, settings.kv_cache_dtype, settings.index_cache_dtype)
        return found.coefficients(config, layout, tp), found.about(config, tp)
    text = times.step_model or ""
    if text and "=" not in text:
        fit = calibrate(step_coefficients(config, layout, card, tp), read_steps(text))
        return fit.coefficients, str(fit)
    shares, direct = parse_overrides(text)
    coefficients = step_coefficients(config, layout, card, tp, shares) | direct
    changed = [
        f"{f.name} {getattr(shares, f.name):g}"
        for f in dataclasses.fields(Shares)
        if getattr(shares, f.name) != f.default
    ]
    changed += [f"{name} {value:g}" for name, value in direct.items()]
    how = f"roofline with {', '.join(changed)}" if changed else "roofline with assumed shares, not measured"
    return coefficients, f"{how}; overhead {coefficients['overhead_us'] / 1000:.2f} ms a step"
