"""Chooses a backend for every op at start-up. A factory is called only when its op is chosen, so that naming
a backend costs no import."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dsv4.errors import ConfigError
from dsv4.ops.spec import SPECS
from dsv4.ops.weight import Gated
from dsv4.spelling import nearest

Op = Callable[..., Any]

_REFERENCE_MODULES = {
    "linear": ("linear", "linear_f32", "grouped_linear", "logits"),
    "norm": ("rmsnorm", "rmsnorm_quantised", "norm_rope"),
    "rows": ("write_rows", "copy_rows"),
    "hyper": ("hc_pre", "hc_post", "hc_head"),
    "compress": ("compress",),
    "index": ("index_select", "index_candidates", "merge_candidates"),
    "attention": ("sparse_attention", "partial_attention", "merge_attention"),
    "moe": ("route", "experts", "swiglu"),
    "edits": ("edit_logits",),
    "sample": ("sample",),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One op of one backend. `usable(device)` says whether it runs there, `untried(device)` whether it never did, so that
    `auto` leaves it alone unless it is named; `priority` decides among the usable ones."""

    load: Callable[[], Op]
    usable: Callable[[str], bool]
    untried: Callable[[str], bool]
    priority: int


class Registry:
    """op -> backend -> Entry."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Entry]] = {op: {} for op in SPECS}

    def register(
        self,
        op: str,
        backend: str,
        load: Callable[[], Op],
        *,
        usable: Callable[[str], bool] = lambda device: True,
        untried: Callable[[str], bool] = lambda device: False,
        priority: int = 0,
    ) -> None:
        """Adds a backend of an op. Raises ConfigError when the op is unknown or has this backend already."""
        if op not in self._entries:
            raise ConfigError(
                f"op {op!r} is unknown; known: {', '.join(self._entries)}{nearest(op, self._entries)}"
            )
        if backend in self._entries[op]:
            raise ConfigError(f"op {op!r} has a backend {backend!r} already; register it once")
        self._entries[op][backend] = Entry(load, usable, untried, priority)

    def backends(self, op: str | None = None) -> tuple[str, ...]:
        """Names of the backends of one op, or of all."""
        ops = self._entries if op is None else {op: self._entries[op]}
        return tuple(dict.fromkeys(name for entries in ops.values() for name in entries))

    def load(self, op: str, backend: str) -> Op:
        """The callable of one op of one backend."""
        return self._entries[op][backend].load()

    def usable(self, device: str, *, untried: bool = False) -> dict[str, list[str]]:
        """Backend -> its ops that run on `device`; with `untried` those of them that never did."""
        found: dict[str, list[str]] = {name: [] for name in self.backends()}
        for op, entries in self._entries.items():
            for name, entry in entries.items():
                if entry.usable(device) and (not untried or entry.untried(device)):
                    found[name].append(op)
        return {name: ops for name, ops in found.items() if ops}

    def pick(self, op: str, backend: str, device: str) -> str:
        """The backend that runs this op: the first of the named ones ("gluon,triton") that has it and runs here. `auto`, and
        what takes an op that no named one has, is the usable one with the highest priority that was tried there."""
        usable = {name: e for name, e in self._entries[op].items() if e.usable(device)}
        for name in backend.split(","):
            if name in usable:
                return name
        tried = [name for name, e in usable.items() if not e.untried(device)]
        return max(tried, key=lambda name: usable[name].priority)


class Ops:
    """The chosen ops as attributes: `ops.linear(x, weight)`. Made by `choose`."""

    def __init__(self, chosen: dict[str, str], registry: Registry) -> None:
        self.chosen = dict(chosen)
        for op, backend in chosen.items():
            setattr(self, op, registry.load(op, backend))

    def __getattr__(self, name: str) -> Op:  # reached only for names that are not set
        raise AttributeError(f"op {name!r} is unknown; known: {', '.join(SPECS)}{nearest(name, SPECS)}")

    @classmethod
    def choose(cls, backend: str = "auto", device: str = "cpu", registry: Registry | None = None) -> Ops:
        """Picks a backend per op for a device ("cpu", "cuda"); `backend` holds names in order of preference, with commas
        between them. Raises ConfigError for a name that is unknown or runs no op on this device."""
        registry = registry or REGISTRY
        known, here = ("auto", *registry.backends()), ("auto", *registry.usable(device))
        for name in backend.split(","):
            if name not in known:
                raise ConfigError(f"backend is {name!r}; known: {', '.join(known)}{nearest(name, known)}")
            if name not in here:
                raise ConfigError(
                    f"backend is {name!r}; it runs nothing on {device} of this machine, where there are: {', '.join(here)}"
                )
        return cls({op: registry.pick(op, backend, device) for op in SPECS}, registry)

    def prepare(self, op: str, weight: Any) -> Any:
        """A `Weight` or `Gated` in the form that the chosen backend of `op` wants (see weight.py)."""
        hook = getattr(getattr(self, op), "prepare", None)
        return weight if hook is None else hook(weight)

    def quantises(self, op: str, weight: Any) -> bool:
        """Whether the chosen backend of `op` multiplies this prepared matrix (or these three) in FP8. Experts that no
        kernel repacked are left to the reference."""
        if op == "experts" and isinstance(weight, Gated):
            return False
        parts = weight if isinstance(weight, Gated) else (weight,)
        return self.chosen[op] != "reference" and not any(isinstance(w, Tensor) for w in parts)

    def on_reference(self) -> list[str]:
        """Ops that the reference runs. It looks at values on the host, so a CUDA graph can hold none of them."""
        return [op for op, backend in self.chosen.items() if backend == "reference"]

    @property
    def packed(self) -> bool:
        """Whether a backend multiplies with FP8 and FP4 weights as they are stored."""
        return any(self.chosen[op] != "reference" for op in ("linear", "experts"))

    def describe(self) -> list[str]:
        """One line per backend in use, for start-up: which ops it runs."""
        by_backend: dict[str, list[str]] = {}
        for op, backend in self.chosen.items():
            by_backend.setdefault(backend, []).append(op)
        if len(by_backend) == 1:
            return [f"{backend} (all {len(ops)} ops)" for backend, ops in by_backend.items()]
        return [f"{backend} ({', '.join(ops)})" for backend, ops in by_backend.items()]


_KERNELS = "dsv4.kernels"


def _reference(module: str, op: str) -> Callable[[], Op]:
    return lambda: getattr(importlib.import_module(f"dsv4.ops.reference.{module}"), op)


def _standard() -> Registry:
    registry = Registry()
    for module, ops in _REFERENCE_MODULES.items():
        for op in ops:
            registry.register(op, "reference", _reference(module, op))
    # By name, as ops know no backend: kernels import the specs, not the other way round. They may be left out of a package.
    if importlib.util.find_spec(_KERNELS) is not None:
        importlib.import_module(_KERNELS).register_all(registry)
    return registry


REGISTRY = _standard()
"""The backends that ship."""
