"""The backends that ship, put together: the reference's forms (`dsv4.ops.reference`) behind those of `dsv4.kernels`, which may be left out of a
package. Ops and kernels do not know of each other's choice."""

from __future__ import annotations

import importlib
from typing import Any

from dsv4.ops.forms import Machine
from dsv4.ops.reference.forms import FORMS
from dsv4.ops.registry import Ops, Registry

try:
    from dsv4.kernels import BACKENDS
except ImportError:  # the GPU kernels ship beside the package
    BACKENDS = ()

REGISTRY = Registry(
    [*(f for name in BACKENDS for f in importlib.import_module(f"dsv4.kernels.{name}").FORMS), *FORMS]
)
"""In the order in which `auto` takes them."""


def choose(backend: str = "auto", device: str = "cpu", *, deterministic: bool = False, **pretend: Any) -> Ops:
    """The ops of `device` ("cpu", "cuda"), by the named backends first. `deterministic`: those alone that give a token the same bits in
    any batch. `pretend`: fields of another `Machine`. Raises ConfigError."""
    machine = Machine(device, **pretend) if pretend else Machine.here(device)
    return Ops.choose(backend, machine, REGISTRY, deterministic=deterministic)
