"""An engine driven step by step by this process, and what it does with the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from dsv4 import LLM, SamplingParams
from dsv4.engine.request import RequestOutput, Usage


class Job:
    """A greedy request; the times of its tokens appear as it runs."""

    def __init__(self, llm: LLM, ids: np.ndarray, tokens: int) -> None:
        """`ids` int32 [T]; `tokens`: how many it generates."""
        self.times: list[float] = []
        self.usage: Usage | None = None
        self.begun = time.perf_counter()
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        llm.submit(ids, params, self._take)

    def _take(self, output: RequestOutput) -> None:
        if output.error is not None:
            raise RuntimeError(output.error)
        self.times += [time.perf_counter()] * len(output.token_ids)
        self.usage = output.usage or self.usage

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.begun


class Driver:
    """Submits jobs to an engine and steps it."""

    def __init__(self, llm: LLM, seed: int = 5) -> None:
        self.llm = llm
        self.rng = np.random.default_rng(seed)

    def ids(self, n: int) -> np.ndarray:
        """Random token ids int32 [n]."""
        return self.rng.integers(10, self.llm.model_config.vocab_size, n, dtype=np.int32)

    def job(self, ids: np.ndarray, tokens: int = 1) -> Job:
        return Job(self.llm, ids, tokens)

    def run(self, until: Callable[[], object] | None = None) -> list[float]:
        """Steps until a condition holds, or nothing is left; the time at the end of each step."""
        ends = []
        while self.llm.has_work() and not (until and until()):
            self.llm.step()
            ends.append(time.perf_counter())
        return ends

    def clear(self) -> None:
        """Ends all requests."""
        self.llm.abort_all()
        self.run()

    def busy(self, steps: int) -> tuple[float, float]:
        """Of the next `steps` steps: milliseconds of a step in which the GPU works (the union of kernels and copies by torch's
        profiler), and how many of them there are. NaN without a GPU."""
        from torch.profiler import ProfilerActivity, profile

        if not torch.cuda.is_available():
            return float("nan"), float("nan")
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
            for _ in range(steps):
                self.llm.step()
            torch.cuda.synchronize()
        on_gpu = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        spans = sorted((e.time_range.start, e.time_range.end) for e in on_gpu)
        total, end = 0.0, float("-inf")
        for begun, ended in spans:
            total += max(0.0, ended - max(begun, end))
            end = max(end, ended)
        return total / 1e3 / steps, len(spans) / steps
