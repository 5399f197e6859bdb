"""GPU kernels, imported as `dsv4.kernels`: one folder per backend, whose `FORMS` (`dsv4.ops.forms.Form`) say what it runs, on what, and from
which size on. No kernel is imported until its form is chosen (neither triton nor dsv4's core)."""

from __future__ import annotations

BACKENDS: tuple[str, ...] = ("gluon", "cublas", "triton")
"""Names of the folders, in the order in which `auto` takes them."""
