"""An engine runs steps of designed shapes, and how long each took is read back from its record."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dsv4.engine.llm import LLM
from dsv4.engine.request import RequestOutput
from dsv4.sampling import SamplingParams
from dsv4.simulate.calibrate import Measured, parse_step
from dsv4.simulate.shapes import DECODES, TAIL, Limits, Shape, designed


class Measuring:
    """Of an LLM whose `record_steps` is `record`. Prompts are random tokens; a prompt is read once and serves all shapes of its length."""

    def __init__(self, llm: LLM, record: Path) -> None:
        self._llm, self._record = llm, record
        self._draw = np.random.default_rng(0)
        self._read: dict[int, list[np.ndarray]] = defaultdict(list)
        """By length, prompts that were read."""
        self._at = record.stat().st_size
        self._deadline = float("inf")

    @property
    def limits(self) -> Limits:
        llm = self._llm
        return Limits(
            llm.config.max_num_seqs,
            llm.config.max_num_batched_tokens or 1,
            llm.max_model_len,
            llm.memory.pages * llm.model_config.layout(
                llm.config.kv_cache_dtype, llm.config.index_cache_dtype, block_tokens=llm.config.block_size
            ).block_tokens,
        )  # fmt: skip

    def warm_up(self) -> None:
        """Runs every batch that `designed` has, and a prompt of several steps, uncounted: what is made when it is first needed is
        there then."""
        limits = self.limits
        shapes = designed(limits)
        for batch in sorted({s.batch for s in shapes}):
            self._run(Shape(batch, TAIL), steps=2)
        longest = min(2 * limits.step_tokens + TAIL, limits.max_len - 1)
        self._finish(self._prompt(longest))
        self._read.clear()
        self._new_steps()

    def run(self, seconds: float, progress: Callable[[int, int, Shape], None]) -> Iterator[list[Measured]]:
        """The steps of each shape, until all were run or the time is over. `progress` gets how many were run, of how many, and
        the one that begins."""
        self._deadline = time.monotonic() + seconds
        shapes = designed(self.limits)
        for i, shape in enumerate(shapes):
            if time.monotonic() >= self._deadline:
                return
            progress(i, len(shapes), shape)
            self._run(shape)
            yield self._new_steps()

    def _run(self, shape: Shape, steps: int = DECODES) -> None:
        """Reads what is not yet read, then `steps` decode steps of all."""
        prompts = self._read[shape.context]
        while len(prompts) < shape.batch:
            prompt = self._prompt(shape.context)
            self._finish(prompt)
            prompts.append(prompt)
            if time.monotonic() >= self._deadline:
                return
        params = _greedy(shape.most_new)
        begun: set[int] = set()

        def telling(i: int) -> Callable[[RequestOutput], None]:
            # What tells of a request's start has no token.
            return lambda output: begun.add(i) if output.token_ids else None

        for i, prompt in enumerate(prompts[: shape.batch]):
            self._llm.submit(np.concatenate([prompt, self._prompt(TAIL)]), params, telling(i))
        self._steps(lambda: len(begun) == shape.batch)
        if shape.beside:
            self._llm.submit(self._prompt(shape.beside), _greedy(1), telling(-1))
            self._steps(lambda: -1 in begun)
        left = iter(range(steps))
        self._steps(lambda: next(left, None) is None)
        self._end()

    def _finish(self, prompt: np.ndarray) -> None:
        """Reads a prompt alone; it ends with its first token, so that its state is kept."""
        self._llm.submit(prompt, _greedy(1), lambda output: None)
        self._steps(lambda: False)
        self._end()

    def _steps(self, done: Callable[[], bool]) -> None:
        """Steps until `done`, until there is nothing to do, or until the time is over."""
        while not done() and self._llm.has_work() and time.monotonic() < self._deadline:
            self._llm.step()

    def _end(self) -> None:
        """Ends all requests, and commits the steps in flight."""
        self._llm.abort_all()
        while self._llm.has_work():
            self._llm.step()

    def _prompt(self, length: int) -> np.ndarray:
        # Few of the first ids are ordinary tokens.
        low = min(256, self._llm.model_config.vocab_size // 2)
        return self._draw.integers(low, self._llm.model_config.vocab_size, length, dtype=np.int32)

    def _new_steps(self) -> list[Measured]:
        with open(self._record, "rb") as file:
            file.seek(self._at)
            lines = file.read()
        self._at += len(lines)
        return [parse_step(str(self._record), line) for line in lines.decode().splitlines()]


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
