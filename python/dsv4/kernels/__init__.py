"""GPU kernels, imported as `dsv4.kernels`. Each backend registers its ops here; nothing is imported until one
is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv4.ops.registry import Registry

BACKENDS: tuple[str, ...] = ()
"""Names of the subpackages with kernels; each has a function `register(registry)`."""


def register_all(registry: Registry) -> None:
    """Adds every backend's ops to the registry: name, lazy factory, what it needs."""
    from importlib import import_module

    for name in BACKENDS:
        import_module(f"{__name__}.{name}").register(registry)
