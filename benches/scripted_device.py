"""A device of known step time, so that a machine without a GPU shows what the host adds: a step's forward takes so many milliseconds, its
draw a fortieth of that, and each row gets some token that its mask allows."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
from dsv4.engine.buffers import StepPlan
from dsv4.engine.device import StepResult
from dsv4.engine.masks import Masks
from dsv4.engine.request import EngineRequest


class ScriptedDevice:
    """In place of a `LocalDevice`."""

    kind = "cpu"

    def __init__(self, step_ms: float, vocab: int) -> None:
        self.forward, self.draw, self.vocab = 0.975e-3 * step_ms, 0.025e-3 * step_ms, vocab
        self.free_at = 0.0
        self.idle = 0.0
        """Seconds between steps, or between forward and draw, in which it had nothing to do."""
        self.rng = np.random.default_rng(3)

    def launch(
        self, plan: StepPlan, requests: Mapping[int, EngineRequest], *, held: bool = False
    ) -> ScriptedStep:
        step = ScriptedStep(self, plan.step, plan.row_req[np.flatnonzero(plan.row_samples)].tolist())
        if not held:
            step.draw()
        return step

    def takes(self, seconds: float) -> float:
        """It works for so long once it has come so far; when it is done."""
        now = time.perf_counter()
        self.idle += max(0.0, now - self.free_at)
        self.free_at = max(now, self.free_at) + seconds
        return self.free_at


class ScriptedStep:
    """In place of a `Pending`."""

    def __init__(self, device: ScriptedDevice, step: int, keys: list[int]) -> None:
        self._device, self._step, self._keys = device, step, keys
        self._begun = device.takes(device.forward) - device.forward
        self._tokens, self._ended = np.zeros(0, np.int32), 0.0

    def draw(self, masks: Masks | None = None) -> None:
        self._ended = self._device.takes(self._device.draw)
        self._tokens = self._device.rng.integers(10, self._device.vocab, len(self._keys), dtype=np.int32)
        for place, bits in () if masks is None else zip(masks.places.tolist(), masks.bits, strict=True):
            self._tokens[place] = _some(bits, int(self._tokens[place]))

    def result(self) -> StepResult:
        time.sleep(max(0.0, self._ended - time.perf_counter()))
        fine = np.ones(len(self._keys), np.int32)
        us = 1e6 * (self._ended - self._begun)
        return StepResult(self._step, self._keys, self._tokens, fine, {}, [], [], us)


def _some(bits: np.ndarray, near: int) -> int:
    """The first token that int32 [words] has the bit of in or after the word of token `near`."""
    word = near // 32
    for part, begin in ((bits[word:], word), (bits, 0)):
        if part.any():
            at = begin + int((part != 0).argmax())
            return 32 * at + (int(bits[at]) & -int(bits[at])).bit_length() - 1
    raise AssertionError("nothing is allowed")
