"""Triton's interpreter, mended. Imported where kernels run in it.

Before 3.9 it takes `int()` of an array of one element for a loop's bound, which NumPy warns of from 1.25 on and refuses from
2.4 on; a Triton that does it right is left alone. And it puts its own functions in the place of the language's at every call
of one kernel function by another, though the launch has done so: that took up to half of the time of a test."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.runtime import interpreter

_TENSOR, _LANG = interpreter._patch_lang_tensor, interpreter._patch_lang


def _with_index(tensor: Any, scope: Any) -> None:
    _TENSOR(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _once(fn: Any) -> Any:
    """Nothing to do where all that a function sees of the language is the interpreter's; what it returns restores nothing then."""
    seen = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
    if seen and not any(map(tl.core.is_builtin, [lang.load for lang in seen] + [tl.tensor.__add__])):
        return interpreter._LangPatchScope()
    return _LANG(fn)


if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
    interpreter._patch_lang_tensor = _with_index
interpreter._patch_lang = _once
