"""Triton's interpreter before 3.9 takes `int()` of an array of one element for a loop's bound, which NumPy warns of from
1.25 on and refuses from 2.4 on. Imported where kernels run in it; a Triton that does it right is left alone."""

from __future__ import annotations

from typing import Any

import triton
from triton.runtime import interpreter

_BEFORE = interpreter._patch_lang_tensor


def _with_index(tensor: Any, scope: Any) -> None:
    _BEFORE(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
    interpreter._patch_lang_tensor = _with_index
