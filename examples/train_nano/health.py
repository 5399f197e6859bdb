"""Whether a run still learns. A second seed once lost everything at a quarter of its time and never came back."""

from __future__ import annotations

import math


class Health:
    """A smoothed loss and the lowest that it has been."""

    def __init__(self, limit: float = 1.5, fine: float = 1.15, memory: float = 0.8) -> None:
        self.limit, self.fine, self.memory = limit, fine, memory
        self.mean = self.best = math.inf

    def take(self, loss: float) -> None:
        """The loss of a step now and then; steps differ by a third in what they hold."""
        known = math.isfinite(self.mean) and math.isfinite(loss)
        self.mean = self.memory * self.mean + (1 - self.memory) * loss if known else loss
        if self.mean < self.best:
            self.best = self.mean

    @property
    def lost(self) -> bool:
        """Far above the best: back to a checkpoint."""
        return not self.mean <= self.limit * self.best  # nor is a number that is none

    @property
    def good(self) -> bool:
        """Near enough to the best to be kept as a checkpoint."""
        return self.mean <= self.fine * self.best

    def forget(self) -> None:
        """After going back: the mean starts anew, the best stays."""
        self.mean = self.best
