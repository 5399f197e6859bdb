"""The loop knows plans and results, nothing of the device: no torch object has a name in it."""

from __future__ import annotations

import ast
import inspect

from dsv4.engine import loop


def test_it_names_no_torch_object() -> None:
    """Neither by import (types apart, which are not there at run time) nor by reaching into a result."""
    tree = ast.parse(inspect.getsource(loop))
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert not any(name.split(".")[0] == "torch" for name in names), names
    assert not hasattr(loop, "torch") and not hasattr(loop, "LocalDevice")
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not used & {"tolist_", "cpu", "cuda", "item", "synchronize", "numpy", "tensor"}
