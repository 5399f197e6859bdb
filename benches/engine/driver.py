"""An engine driven step by step by this process, and what it does with the GPU."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from dsv4 import LLM, SamplingParams
from dsv4.engine.messages import News


class Job:
    """A greedy request; the times of its tokens appear as it runs."""

    def __init__(self) -> None:
        self.begun, self.times, self.ids = time.perf_counter(), list[float](), list[int]()
        self.cached: int | None = None
        """Prompt tokens that were not computed, once it is over."""

    def took(self, tokens: Sequence[int]) -> None:
        """These tokens have come."""
        self.times += [time.perf_counter()] * len(tokens)
        self.ids += tokens

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.begun


class Engine(Protocol):
    """What is measured."""

    name: str
    vocab: int
    on_gpu: bool
    launching: float
    """When the host began to launch the last step; 0 where that is not told."""

    def submit(self, ids: np.ndarray, tokens: int) -> Job: ...
    def step(self) -> None: ...
    def has_work(self) -> bool: ...
    def abort_all(self) -> None: ...


class Dsv4:
    """This engine, in this process, as its own process has it when it serves: tokens are handed on, and their text is another's work."""

    name = "dsv4"

    def __init__(self, llm: LLM) -> None:
        self.llm, self.vocab, self.on_gpu = llm, llm.model_config.vocab_size, llm.config.device == "cuda"
        self.step, self.has_work, self.abort_all = llm.step, llm.has_work, llm.abort_all
        self._jobs, self._keys, self._others = dict[int, Job](), count(1 << 40), llm._loop.tell
        llm._loop.tell = self._told
        self.launching, device, launch = 0.0, llm._loop.device, llm._loop.device.launch

        def timed(*args: Any, **options: Any) -> Any:
            self.launching = time.perf_counter()
            return launch(*args, **options)

        device.launch = timed  # type: ignore[method-assign]

    def submit(self, ids: np.ndarray, tokens: int) -> Job:
        job, key = Job(), next(self._keys)
        self._jobs[key] = job
        params = SamplingParams(
            max_tokens=min(tokens, self.llm.max_model_len - len(ids)), temperature=0, ignore_eos=True
        )
        self.llm._loop.submit(key, ids, params)
        return job

    def _told(self, news: News) -> None:
        if not self._jobs:  # requests that came another way
            self._others(news)
            return
        columns = np.frombuffer(news.keys, np.int64), np.frombuffer(news.tokens, np.int32)
        for key, token in zip(*(x.tolist() for x in columns), strict=True):
            self._jobs[key].took((token,))
        for end in news.ends:
            self._jobs.pop(end.key).cached = end.explanation["cached_tokens"]
            if end.error is not None:
                raise RuntimeError(end.error)


class Driver:
    """Submits jobs to an engine and steps it."""

    def __init__(self, engine: Engine, *, steps: int = 60, seed: int = 5) -> None:
        """`steps`: decode steps that are timed."""
        self.engine, self.steps = engine, steps
        self.where: list[dict[str, Any]] = []
        """What the GPU did in the steps that `busy` saw last, as `by_kernel` says it."""
        self.rng = np.random.default_rng(seed)

    def ids(self, n: int) -> np.ndarray:
        """Random token ids int32 [n]."""
        return self.rng.integers(10, self.engine.vocab, n, dtype=np.int32)

    def job(self, ids: np.ndarray, tokens: int = 1) -> Job:
        """`ids` int32 [T]; `tokens`: how many it generates."""
        return self.engine.submit(ids, tokens)

    def run(self, until: Callable[[], object] | None = None) -> list[float]:
        """Steps until a condition holds, or nothing is left; the time at the end of each step."""
        ends = []
        while self.engine.has_work() and not (until and until()):
            self.engine.step()
            ends.append(time.perf_counter())
        return ends

    def clear(self) -> None:
        """Ends all requests."""
        self.engine.abort_all()
        self.run()

    def busy(self, steps: int) -> dict[str, float]:
        """Of the next `steps` steps: milliseconds of a step in which the GPU works (the union of kernels and copies by torch's
        profiler), and how many of them there are. Empty for an engine on the CPU, also beside a GPU."""
        if not self.engine.on_gpu:
            for _ in range(steps):
                self.engine.step()
            return {}
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
            for _ in range(steps):
                self.engine.step()
            torch.cuda.synchronize()
        on_gpu = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        self.where = by_kernel([(e.name, e.time_range.start, e.time_range.end) for e in on_gpu], steps)
        spans = sorted((e.time_range.start, e.time_range.end) for e in on_gpu)
        total, end = 0.0, float("-inf")
        for begun, ended in spans:
            total += max(0.0, ended - max(begun, end))
            end = max(end, ended)
        return {"busy_ms": total / 1e3 / steps, "kernels": len(spans) / steps}


def by_kernel(launched: list[tuple[str, float, float]], steps: int) -> list[dict[str, Any]]:
    """Of launches (name, begin, end in microseconds) in so many steps, for each kernel and kind of copy, the most first: `launches` and
    `us` a step from begin to end, in which kernels that begin before the one before is over also wait; and `chain_us`, by which they put off
    the end of all that has ended by then. The sum of the latter is at most the time in which the GPU works: of a kernel that others begin and end
    beside, only what comes after them counts. Kernels of torch have long names, of which the operation is kept."""
    found: dict[str, list[float]] = {}
    end = float("-inf")
    for name, begun, ended in sorted(launched, key=lambda span: span[2]):
        row = found.setdefault(_short(name), [0, 0.0, 0.0])
        for i, value in enumerate((1, ended - begun, max(0.0, ended - max(begun, end)))):
            row[i] += value / steps
        end = max(end, ended)
    rows = [{"kernel": k, "launches": n, "us": us, "chain_us": chain} for k, (n, us, chain) in found.items()]
    return [rounded(row) for row in sorted(rows, key=lambda row: -float(row["chain_us"]))]


def _short(name: str) -> str:
    functions = re.findall(r"(\w*(?:Functor|_kernel|Kernel|_cuda)\w*)", name)
    return " ".join(dict.fromkeys(functions))[:80] if name.startswith("void ") and functions else name[:80]


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """Three digits after the point are enough."""
    return {k: round(float(v), 3) if isinstance(v, float) else v for k, v in figures.items()}
