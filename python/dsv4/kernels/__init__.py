"""GPU kernels, imported as `dsv4.kernels`. Each backend registers its ops here; nothing is imported until one
is chosen (neither triton nor dsv4's core)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv4.ops.registry import Registry

BACKENDS: tuple[str, ...] = ("triton", "cublas", "gluon")
"""Names of the subpackages with kernels; each has a table `OPS` and a function `usable(device, op)`, and may have
`untried(device, op)`: it runs there only when named."""

PRIORITY = {"triton": 10, "cublas": 15, "gluon": 20}
"""Which backend `auto` takes of those that run on a device: the higher one."""


def register_all(registry: Registry) -> None:
    """Adds every backend's ops to the registry: name, lazy factory, what it needs."""
    from functools import partial
    from importlib import import_module

    for backend in BACKENDS:
        package = import_module(f"{__name__}.{backend}")
        for op, module in package.OPS.items():
            registry.register(
                op,
                backend,
                lambda path=f"{package.__name__}.{module}", op=op: getattr(import_module(path), op),
                usable=partial(package.usable, op=op),
                untried=partial(getattr(package, "untried", lambda device, op: False), op=op),
                priority=PRIORITY[backend],
            )
