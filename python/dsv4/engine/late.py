"""What was compiled or captured after the start, and so kept requests waiting. Without torch, which a process loads after it can say what fails."""

from __future__ import annotations

import sys


def late_compiles() -> int:
    """Kernels that were compiled, or read from the cache on disk, after `compile_kernels` was done."""
    compiling = sys.modules.get("dsv4.kernels.compiling")
    return 0 if compiling is None else compiling.COMPILATIONS.count


def late_captures(device: object) -> int:
    """Graphs that were captured after the start."""
    graphs = getattr(device, "graphs", None)
    return 0 if graphs is None else graphs.late
