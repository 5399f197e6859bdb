"""What a backend says of each of its forms of an op. Loads nothing: a form names where its function is.

A *form* is one way to run an op: a kernel, a few of them, or a library. Which of an op's forms runs is decided by `Ops`
(`registry.py`) and nowhere else, by the conditions that forms state here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True)
class Machine:
    """Where ops run: device "cpu" or "cuda", and there the major compute capability (9 for Hopper, 10 for Blackwell)."""

    device: str = "cpu"
    major: int = 0

    @classmethod
    def here(cls, device: str) -> Machine:
        """`device` of this machine."""
        import torch

        cuda = device == "cuda" and torch.cuda.is_available()
        return cls(device, torch.cuda.get_device_capability()[0] if cuda else 0)

    def __str__(self) -> str:
        return f"sm_{self.major}x" if self.device == "cuda" else self.device


@dataclass(frozen=True, slots=True)
class Dims:
    """What a kernel's scratch depends on."""

    tokens: int
    """Tokens of a step."""
    head_dim: int
    multiprocessors: int
    heads: int
    keys: int
    """Rows that a token attends to in a layer, at most."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """Memory that a kernel takes beside its arguments and results. `factors` gives (what it is, number), which are multiplied to bytes.
    `kept`: between steps; else while the op runs. Kernels that state the same name share it."""

    name: str
    factors: Callable[[Dims], tuple[tuple[str, int], ...]]
    kept: bool = False


@cache
def at(path: str) -> Callable[..., Any]:
    """What "module:function" names."""
    module, _, function = path.partition(":")
    return getattr(import_module(module), function)


def _nothing() -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Form:
    """One form of one op. The function at `path` takes the op's arguments."""

    op: str
    backend: str
    path: str
    """"module:function"."""
    name: str = ""
    """Tells forms of one backend apart."""
    arch: tuple[int, int] | None = None
    """First and last major compute capability that it is for; None: any device."""
    lacks: Callable[[], str] = _nothing
    """What this machine's software lacks for it; "" where that is nothing."""
    takes: str | None = None
    """"module:function" that says whether it multiplies with a prepared weight; None: with any. Asked of the op's argument of matrices."""
    suits: str | None = None
    """The same for what is alike in all calls of a model: widths, dtypes, formats of rows."""
    fits: str | None = None
    """The same for a call with these arguments."""
    when: str = ""
    """`takes`, `suits` and `fits` in words, with the thresholds."""
    family: str = ""
    """Forms of a family give a token the same bits, whichever of them runs, whatever is computed beside the token and however much; "": it
    is of none. A form for any device is of its family on the CPU alone."""
    deterministic: bool = False
    """Taken with `--deterministic` alone."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments by name that the function takes beside the op's."""
    packed: bool = False
    """Multiplies FP8 and FP4 weights as they are stored."""
    capturable: bool = True
    """Reads nothing back, so a CUDA graph can hold it."""
    untried: bool = False
    """Compiled, but never run: taken only where its backend is named."""
    scratch: tuple[Scratch, ...] = ()

    def runs(self, machine: Machine) -> bool:
        """Whether the form is for this machine and its software is there."""
        if self.arch is None:
            return True
        return machine.device == "cuda" and self.arch[0] <= machine.major <= self.arch[1] and not self.lacks()

    def family_on(self, machine: Machine) -> str:
        """Its family there."""
        return self.family if self.arch is not None or machine.device == "cpu" else ""

    @property
    def conditional(self) -> bool:
        """Whether there are calls that it does not take."""
        return any(c is not None for c in (self.takes, self.suits, self.fits))

    def load(self) -> Callable[..., Any]:
        """The function, with its `options`."""
        function = at(self.path)
        if not self.options:
            return function
        run = partial(function, **self.options)
        if hasattr(function, "prepare"):
            run.prepare = function.prepare  # type: ignore[attr-defined]
        return run

    def multiplies(self, weight: Any) -> bool:
        """Whether it takes this prepared weight."""
        return self.takes is None or at(self.takes)(weight)

    @property
    def label(self) -> str:
        return f"{self.backend} {self.name}".strip()

    def __str__(self) -> str:
        notes = [self.when] * bool(self.when) + ["never run before"] * self.untried
        return self.label + (f" ({'; '.join(notes)})" if notes else "")
